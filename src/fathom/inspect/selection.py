"""What each query of one layer reads, and what it would weigh if it read everything.

The true attention is the softmax of the layer's own scores over every token a query may see; a
sparse attention reads only the blocks that it selected.

Shapes: T tokens, H heads, I selection heads, J blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.data.tokenizer import Tokenizer
from fathom.layers.base import require
from fathom.model import Decoder
from fathom.probes.base import attention_inputs, attentions
from fathom.probes.selection import blocks_read, queries_shares


@dataclass(frozen=True, kw_only=True)
class Look:
    """One layer over one text.

    Args:
        tokens: the text, token by token.
        layer: which layer, from 0; of ``n_layers``.
        kind: of its attention.
        weights_HTT: true attention of each head, float32; rows are queries.
        block_size: tokens of a block; None: this attention reads everything it may see.
        read_TIJ: the blocks that each selection head reads, or None.
        selected_TI: share of the true attention in them.
        best_TI: the most that as many blocks could hold.
    """

    tokens: list[str]
    layer: int
    n_layers: int
    kind: str
    weights_HTT: Tensor
    block_size: int | None = None
    read_TIJ: Tensor | None = None
    selected_TI: Tensor | None = None
    best_TI: Tensor | None = None


@torch.no_grad()
def look(
    model: Decoder,
    tokenizer: Tokenizer,
    text: str,
    *,
    layer: int | None = None,
    max_tokens: int = 512,
) -> Look:
    """Run the model over the start of a text, and look into one layer.

    Args:
        model: any decoder.
        tokenizer: the model's.
        text: what it reads; at most ``max_tokens`` of it, and no more than its context.
        layer: from 0; None: the first that selects what it reads, else the first.

    Raises:
        ValueError: an empty text, no such layer, or a layer whose scores cannot be seen.
    """
    parts = attentions(model)
    require(max_tokens >= 1, f"max_tokens must be at least 1, got {max_tokens}")
    ids = tokenizer.encode(text)[: min(max_tokens, model.cfg.max_seq_len)]
    require(len(ids) > 0, "the text is empty: there is nothing to look at")
    require(
        layer is None or 0 <= layer < len(parts),
        f"layer must be from 0 to {len(parts) - 1}, got {layer}",
    )
    with attention_inputs(model) as inputs:
        model(torch.tensor([ids], device=model.embed.weight.device))
    selections = [part.selection(*seen) for part, seen in zip(parts, inputs, strict=True)]
    sparse = [at for at, selection in enumerate(selections) if selection is not None]
    at = layer if layer is not None else next(iter(sparse), 0)
    scores_BHTS, selection = parts[at].scores(*inputs[at]), selections[at]
    kind = vars(model.cfg.layers()[at].attention)["kind"]
    if scores_BHTS is None:
        raise ValueError(f"layer {at} ({kind}) does not show its scores, so nothing can be drawn")
    seen = Look(
        tokens=[tokenizer.piece(i).decode("utf-8", "replace") for i in ids],
        layer=at,
        n_layers=len(parts),
        kind=kind,
        weights_HTT=scores_BHTS[0].float().softmax(-1).cpu(),
    )
    if selection is None:
        return seen
    found = queries_shares(scores_BHTS, selection)
    return Look(
        **vars(seen)
        | {
            "block_size": selection.block_size,
            "read_TIJ": blocks_read(scores_BHTS, selection)[0].cpu(),
            "selected_TI": found.selected_BTI[0].cpu(),
            "best_TI": found.best_BTI[0].cpu(),
        }
    )
