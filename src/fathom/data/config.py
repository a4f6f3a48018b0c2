"""What a run reads: ``data.*`` of the configuration. Imports no torch.

A dataset knows its domains and its tokenizer; the configuration only chooses the dataset, the row
length and how much of what is drawn.
"""

import math
from dataclasses import dataclass, field

from fathom.layers.base import Config, require, require_positive

BUNDLED_TOKENIZERS = ("1k", "4k")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """``source`` is ``"bundled"`` or a folder made by ``fathom data prepare``.

    A prepared folder brings its own tokenizer: ``tokenizer`` chooses for the bundled corpus only.
    ``weights`` gives each domain's share of the tokens drawn, in any unit; empty draws every domain
    by its number of training tokens, and a domain left out of a non-empty table is not drawn.
    ``workers`` prefetch threads change the speed, never the stream.
    """

    source: str = "bundled"
    tokenizer: str = "1k"
    seq_len: int = 256
    weights: dict[str, float] = field(default_factory=dict)
    workers: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "seq_len")
        require(self.source != "", 'data.source must be "bundled" or a folder, got ""')
        require(
            self.tokenizer in BUNDLED_TOKENIZERS,
            f'data.tokenizer must be "1k" or "4k", got {self.tokenizer!r}: another vocabulary '
            "comes with a folder made by fathom data prepare",
        )
        require(0 <= self.workers <= 64, f"data.workers must be 0 to 64, got {self.workers}")
        for domain, weight in self.weights.items():
            require(
                math.isfinite(weight) and weight >= 0,
                f"data.weights.{domain} must be a finite number of at least 0, got {weight}",
            )
        require(
            not self.weights or sum(self.weights.values()) > 0,
            "data.weights are all 0: give at least one domain a share",
        )
