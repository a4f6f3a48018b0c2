"""What a text is generated with where a request does not say.

Four places may say it; the first that does wins: the request, the command line (the engine's
``defaults``), the model's ``generation_config.json``, and what is built in: greedy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from fathom.convert.hf_tokenizer import object_in
from fathom.convert.run_folder import CheckpointError
from fathom.generate.sample import Sampling
from fathom.layers.base import require

GENERATION_CONFIG = "generation_config.json"
MAX_NEW_TOKENS = 64
MAX_EOS_IDS = 1000
KNOWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """The fields of :class:`Sampling`, and two more; None: not said here.

    Args:
        max_new_tokens: at most so many tokens after a prompt.
        eos_ids: each of these ends a text; None: the tokenizer's end-of-text token.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    max_new_tokens: int | None = None
    eos_ids: tuple[int, ...] | None = None

    def over(self, below: "GenerationDefaults") -> "GenerationDefaults":
        """What is said here, and else what is said below."""
        return replace(below, **self.said())

    def said(self) -> dict[str, Any]:
        """The fields that are not None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def sampling(self, seed: int) -> Sampling:
        """How to choose a token; what is said nowhere is as ``Sampling`` has it.

        Raises:
            ValueError: a value that cannot be.
        """
        own = {f.name for f in fields(Sampling)}
        return Sampling(**{name: v for name, v in self.said().items() if name in own}, seed=seed)

    def check(self) -> None:
        """``ValueError`` for a value that cannot be."""
        self.sampling(0)
        require(self.length >= 1, f"max_new_tokens must be at least 1, got {self.length}")

    @property
    def length(self) -> int:
        """``max_new_tokens``, or the built-in one."""
        return MAX_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens


def read_defaults(
    files: Mapping[str, bytes], config: Mapping[str, Any], source: str
) -> GenerationDefaults:
    """What a Hugging Face checkpoint says: ``generation_config.json``, end ids also its config.

    As its own code understands them: a temperature counts only with ``do_sample``, and a ``top_k``
    of 0 is none.

    Args:
        files: name to content.
        config: its ``config.json``.
        source: where they lie, for messages.

    Raises:
        CheckpointError: a file that cannot be read, or a value that cannot be.
    """
    said = object_in(files, GENERATION_CONFIG, source)
    ends = said.get("eos_token_id", config.get("eos_token_id"))
    source = f"{source}/{GENERATION_CONFIG}"
    known = {name: said[name] for name in KNOWN if said.get(name) is not None}
    for name, value in known.items():
        whole = name in ("top_k", "max_new_tokens")
        if type(value) not in ((int,) if whole else (int, float)) or not -1e9 < value < 1e9:
            raise CheckpointError(f"{source}: {name} is {value!r:.80}")
    if said.get("do_sample") is not True:
        known = {n: v for n, v in known.items() if n in ("repetition_penalty", "max_new_tokens")}
    else:
        known = {"temperature": 1.0, **known}
    if known.get("top_k") == 0:
        del known["top_k"]
    defaults = GenerationDefaults(**known, eos_ids=_ids(ends, source))
    try:
        defaults.check()
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return defaults


def _ids(value: Any, source: str) -> tuple[int, ...] | None:
    """One id or a list of them."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > MAX_EOS_IDS or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise CheckpointError(f"{source}: eos_token_id must be an id or a list of ids")
    return tuple(ids) or None
