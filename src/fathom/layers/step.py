"""``Step``: what every forward receives beside ``x``. One forward serves training, prefill, decode.

Shapes: B batch, T new tokens, S all tokens so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fathom.layers.cache import Cache, LayerCache


@dataclass(frozen=True)
class Step:
    """Positions, document borders, and the cache if there is one.

    Args:
        positions_BT: place of each token in its document, int64, from 0.
        total: positions in use after this step (equal to T without a cache); a host integer.
        visible_BTT: True where the token of a row may see the other; None: plain causal.
        cache: this layer's cache, or None.
        selected_BTN: what an indexer below chose for each query, for layers that share it.
    """

    positions_BT: Tensor
    total: int
    visible_BTT: Tensor | None = None
    cache: LayerCache | None = None
    selected_BTN: Tensor | None = None

    @classmethod
    def full(cls, tokens_BT: Tensor, cu_seqlens: Tensor | None = None) -> "Step":
        """Whole sequences: training, evaluation, a prefill without a cache.

        Args:
            tokens_BT: the tokens, for their shape and device.
            cu_seqlens: int32 ``[N+1]`` borders of packed documents over the flattened ``B*T``
                tokens, from 0 to ``B*T``; each row starts a document. None: a row is a document.
        """
        batch, length = tokens_BT.shape
        places = torch.arange(length, device=tokens_BT.device)
        if cu_seqlens is None:
            return cls(places.expand(batch, -1), total=length)
        flat = torch.arange(batch * length, device=tokens_BT.device, dtype=cu_seqlens.dtype)
        document = torch.searchsorted(cu_seqlens, flat, right=True) - 1
        starts = cu_seqlens[document]
        positions_BT = (flat - starts).to(torch.int64).view(batch, length)
        document_BT = document.view(batch, length)
        same = document_BT[:, :, None] == document_BT[:, None, :]
        return cls(positions_BT, total=length, visible_BTT=same & (places[:, None] >= places))

    @classmethod
    def cached(cls, tokens_BT: Tensor, cache: Cache, starts_B: Tensor | None = None) -> "Step":
        """New tokens behind those in ``cache``: prefill, a chunk of it, or decode.

        Args:
            tokens_BT: the new tokens.
            cache: what came before; its ``length`` is moved by the decoder after the forward.
            starts_B: position of each row's first new token where rows have unequal lengths;
                None: ``cache.length`` for all.
        """
        batch, length = tokens_BT.shape
        places = torch.arange(length, device=tokens_BT.device)
        if starts_B is None:
            positions_BT = (places + cache.length).expand(batch, -1)
        else:
            positions_BT = starts_B[:, None] + places
        return cls(positions_BT, total=cache.length + length)

    def at(self, cache: LayerCache | None, selected_BTN: Tensor | None = None) -> "Step":
        """The same step as one layer sees it."""
        if cache is None and selected_BTN is None:
            return self
        return replace(self, cache=cache, selected_BTN=selected_BTN)

    def append(
        self, *new: Tensor, names: Sequence[str] | None = None
    ) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Store new cache rows; return ``(key_positions_BS, streams)``, all tokens so far.

        Without a cache the rows come back as they are and ``key_positions`` is None: the keys are
        the queries' own tokens. ``names``: the streams, where a layer does not keep all alike.
        """
        if self.cache is None:
            return None, new
        return self.cache.append(self.positions_BT, self.total, new, names)

    def places(self, name: str) -> Tensor:
        """Where the step's tokens stand among the rows that ``append`` gives of a stream.

        ``[B, T]``; the tokens of a document stand one after the other.
        """
        if self.cache is not None:
            return self.cache.stores[name].places(self.positions_BT)
        batch, length = self.positions_BT.shape
        return torch.arange(length, device=self.positions_BT.device).expand(batch, -1)

    def mask(
        self,
        key_positions_BS: Tensor | None,
        *,
        window_size: int | None = None,
        slopes_H: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor | None:
        """What each query sees: None for plain causal, bool ``[B, 1, T, S]``, or an additive bias.

        Args:
            key_positions_BS: positions of the keys (-1: an empty slot), None for the step's own.
            window_size: see only the newest ``window_size`` tokens, oneself included.
            slopes_H: ALiBi's slopes; the result is then ``slope * (key - query)`` in ``dtype``,
                ``[B, H, T, S]``, with ``-inf`` where nothing may be seen.
        """
        keys_BS = self.positions_BT if key_positions_BS is None else key_positions_BS
        if key_positions_BS is None and window_size is None and slopes_H is None:
            return None if self.visible_BTT is None else self.visible_BTT[:, None]
        distance_BTS = self.positions_BT[:, :, None] - keys_BS[:, None, :]
        visible_BTS = distance_BTS >= 0
        if key_positions_BS is not None:
            visible_BTS &= keys_BS[:, None, :] >= 0
        elif self.visible_BTT is not None:
            visible_BTS &= self.visible_BTT
        if window_size is not None:
            visible_BTS &= distance_BTS < window_size
        if slopes_H is None:
            return visible_BTS[:, None]
        bias = -slopes_H[:, None, None] * distance_BTS[:, None].to(slopes_H.dtype)
        return bias.masked_fill(~visible_BTS[:, None], float("-inf")).to(dtype)
