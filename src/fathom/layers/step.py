"""``Step``: what every forward receives beside ``x``. One forward serves training, prefill, decode.

Shapes: B batch, T new tokens, S all tokens so far.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from fathom.layers.cache import Cache, LayerCache, Whole
from fathom.layers.rope import Rope
from fathom.ops.packed_attention import same_document

Value = TypeVar("Value")

LONG_ROW = 2048  # tokens; from here on a causal kernel of its own is worth one more compiled graph


@dataclass(frozen=True)
class Step:
    """Positions, document borders, and the cache if there is one.

    Args:
        positions_BT: place of each token in its document, int64, from 0.
        total: positions in use after this step (equal to T without a cache); a host integer.
        cu_seqlens: int32 ``[N+1]``, borders of packed documents; None: a row is a document.
        cache: this layer's cache, or None.
        selected_BTN: what an indexer below chose for each query, for layers that share it.
        aligned: every row's tokens have the same positions, the last ones in use.
        shared: what the layers of this step have in common, see :meth:`once`.
    """

    positions_BT: Tensor
    total: int
    cu_seqlens: Tensor | None = None
    cache: LayerCache | None = None
    selected_BTN: Tensor | None = None
    aligned: bool = False
    shared: dict[Hashable, object] = field(default_factory=dict, compare=False, repr=False)

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
        one_each = cu_seqlens is not None and len(cu_seqlens) == batch + 1
        if cu_seqlens is None or (one_each and length >= LONG_ROW):
            return cls(places.expand(batch, -1), total=length, aligned=True)
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # no graph for each number of documents
        flat = torch.arange(batch * length, device=tokens_BT.device, dtype=cu_seqlens.dtype)
        starts = cu_seqlens[torch.searchsorted(cu_seqlens, flat, right=True) - 1]
        positions_BT = (flat - starts).to(torch.int64).view(batch, length)
        return cls(positions_BT, total=length, cu_seqlens=cu_seqlens)

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
        total = cache.length + length
        return cls(positions_BT, total, aligned=starts_B is None)

    def shorter(self, depth: int) -> "Step":
        """Whole sequences without the last ``depth`` tokens of each row."""
        length = self.positions_BT.shape[1]
        borders = self.cu_seqlens
        if borders is not None:
            kept = (borders % length).clamp(max=length - depth)
            borders = borders // length * (length - depth) + kept
        return Step(
            self.positions_BT[:, :-depth], self.total - depth, borders, aligned=self.aligned
        )

    def at(self, cache: LayerCache | None, selected_BTN: Tensor | None = None) -> "Step":
        """The same step as one layer sees it."""
        if cache is None and selected_BTN is None:
            return self
        return replace(self, cache=cache, selected_BTN=selected_BTN)

    def once(self, name: Hashable, make: Callable[[], Value]) -> Value:
        """What all layers share (angles, masks): made by the first that asks for ``name``."""
        if name in self.shared:
            return cast(Value, self.shared[name])
        value = make()
        if not torch.compiler.is_compiling():  # a graph's own values must not leave it
            self.shared[name] = value
        return value

    def angles(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """cos and sin of this step's positions under a rotation."""
        return self.once(rope.name, lambda: rope.angles(self.positions_BT, self.total))

    def append(
        self, *new: Tensor, names: Sequence[str] | None = None
    ) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Store new cache rows; return ``(key_positions_BS, streams)``, all tokens so far.

        Without a cache the rows come back as they are and ``key_positions`` is None: the keys are
        the queries' own tokens. ``names``: the streams, where a layer does not keep all alike.
        """
        if self.cache is None:
            return None, new
        names = list(self.cache.stores) if names is None else names
        keys_BS, streams = self.cache.append(
            self.positions_BT, self.total, new, names, aligned=self.aligned
        )
        if isinstance(self.cache.stores[names[0]], Whole):  # the same positions in every layer
            keys_BS = self.once("keys", lambda: keys_BS)
        return keys_BS, streams

    def places(self, name: str) -> Tensor:
        """Where the step's tokens stand among the rows that ``append`` gives of a stream.

        ``[B, T]``; the tokens of a document stand one after the other.
        """
        if self.cache is not None:
            return self.cache.stores[name].places(self.positions_BT)
        batch, length = self.positions_BT.shape
        return torch.arange(length, device=self.positions_BT.device).expand(batch, -1)

    def borders(self) -> Tensor:
        """``cu_seqlens`` of the step's tokens without a cache, also where a row is a document."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens
        batch, length = self.positions_BT.shape
        device = self.positions_BT.device

        def rows() -> Tensor:
            return torch.arange(batch + 1, dtype=torch.int32, device=device) * length

        return self.once("borders", rows)

    def visible(self) -> Tensor | None:
        """Which tokens of a row each sees, bool ``[B, T, T]``; None: all before it, and itself."""
        if self.cu_seqlens is None:
            return None
        batch, length = self.positions_BT.shape
        return self.once("visible", lambda: same_document(self.borders(), batch, length))

    def mask(
        self,
        key_positions_BS: Tensor | None,
        *,
        window_size: int | None = None,
        slopes_H: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor | None:
        """What each query sees: bool ``[B, 1, T, S]``, or an additive bias.

        None stands for plain causal, the last query on the last key: with a cache, where one new
        token sees all.

        Args:
            key_positions_BS: positions of the keys (-1: an empty slot), None for the step's own.
            window_size: see only the newest ``window_size`` tokens, oneself included.
            slopes_H: ALiBi's slopes; the result is then ``slope * (key - query)`` in ``dtype``,
                ``[B, H, T, S]``, with ``-inf`` where nothing may be seen.
        """
        in_common = key_positions_BS is None or key_positions_BS is self.shared.get("keys")
        if in_common and slopes_H is None:
            name = ("mask", key_positions_BS is None, window_size)
            return self.once(name, lambda: self._common_mask(key_positions_BS, window_size))
        return self._mask(key_positions_BS, window_size, slopes_H, dtype)

    def _common_mask(
        self, key_positions_BS: Tensor | None, window_size: int | None
    ) -> Tensor | None:
        """The mask over tokens that every layer sees, and none where none is needed."""
        if key_positions_BS is None and window_size is None:
            visible_BTT = self.visible()
            return None if visible_BTT is None else visible_BTT[:, None]
        unlimited = window_size is None or window_size >= self.total
        newest = self.aligned and self.positions_BT.shape[1] == 1
        if key_positions_BS is not None and newest and unlimited:
            return None
        return self._mask(key_positions_BS, window_size, None, torch.float32)

    def _mask(
        self,
        key_positions_BS: Tensor | None,
        window_size: int | None,
        slopes_H: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        keys_BS = self.positions_BT if key_positions_BS is None else key_positions_BS
        distance_BTS = self.positions_BT[:, :, None] - keys_BS[:, None, :]
        visible_BTS = distance_BTS >= 0
        if key_positions_BS is not None:
            visible_BTS &= keys_BS[:, None, :] >= 0
        elif (visible_BTT := self.visible()) is not None:
            visible_BTS &= visible_BTT
        if window_size is not None:
            visible_BTS &= distance_BTS < window_size
        if slopes_H is None:
            return visible_BTS[:, None]
        bias = -slopes_H[:, None, None] * distance_BTS[:, None].to(slopes_H.dtype)
        return bias.masked_fill(~visible_BTS[:, None], float("-inf")).to(dtype)
