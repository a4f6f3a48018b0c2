"""Batches: rows of packed documents for training, and every held-out token once for evaluation.

A row holds one domain. Documents stand end to end in it; ``cu_seqlens`` marks their borders, so
that no attention crosses them. A document that does not fit goes on in its domain's next row.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fathom.data.config import DataConfig
from fathom.data.dataset import Dataset
from fathom.data.shards import Split
from fathom.data.stream import DomainStream, Mixture, Piece

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """``tokens`` and ``targets`` are ``[B, T]`` int64; ``cu_seqlens`` is ``[N + 1]`` int32.

    ``targets`` is the next token of the same document, IGNORE where the document ends; in the last
    column it is the token with which the domain's next row begins. ``cu_seqlens`` are the borders
    of the pieces over the B * T tokens, row after row: first 0, last B * T, and every row begins
    one.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class EvalBatch(Batch):
    """A batch of held-out text; ``documents`` ``[B, T]`` int64: whose token it is, -1 padding."""

    documents: Tensor


class Loader:
    """The training stream of a dataset, one batch after another.

    ``batch_size`` counts the rows of all ranks together; rank r gets rows r, r + world, ... of each
    batch, so the whole does not depend on ``world``. The stream is a function of the dataset, the
    weights, ``seq_len`` and the seed alone.
    """

    def __init__(
        self,
        dataset: Dataset,
        cfg: DataConfig,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank must be 0 to {world - 1}, got {rank}")
        self.dataset, self.cfg = dataset, cfg
        self._seed, self._rank, self._world = seed, rank, world
        shares = dataset.weights(cfg)
        self._mixture = Mixture(np.array([shares[d] for d in dataset.domains]), seed)
        self._streams = [
            DomainStream(domain, dataset.shard("train", domain).offsets, seed, cfg.seq_len)
            for domain in dataset.domains
        ]
        self._drawn = np.zeros(len(dataset.domains), np.int64)  # rows of each domain so far
        self._pool = ThreadPoolExecutor(cfg.workers) if cfg.workers else None
        self._ahead: deque[tuple[NDArray[np.int64], Future[Batch]]] = deque()
        self.set_batch_size(batch_size)

    def set_batch_size(self, batch_size: int) -> None:
        """Rows of all ranks in the batches from here on; the rows themselves stay the same."""
        if batch_size < 1 or batch_size % self._world:
            raise ValueError(
                f"batch_size must be a positive multiple of the {self._world} ranks, "
                f"got {batch_size}"
            )
        self._batch_size = batch_size
        self._ahead.clear()

    def next(self) -> Batch:
        """This rank's rows of the next batch."""
        if self._pool is None:
            rows, self._drawn = self._plan(self._drawn)
            return self._build(rows)
        while len(self._ahead) < self.cfg.workers:
            planned = self._ahead[-1][0] if self._ahead else self._drawn
            rows, after = self._plan(planned)
            self._ahead.append((after, self._pool.submit(self._build, rows)))
        self._drawn, batch = self._ahead.popleft()
        return batch.result()

    def peek(self, n: int = 0) -> Batch:
        """The batch that the n-th ``next`` from here would give (0: the very next)."""
        return self._build(self.peek_rows(n))

    def peek_rows(self, n: int = 0) -> list[list[Piece]]:
        """What stands in the rows of that batch."""
        rows, drawn = self._plan(self._drawn)
        for _ in range(n):
            rows, drawn = self._plan(drawn)
        return rows

    def epochs(self) -> dict[str, float]:
        """How often each domain's training tokens have been drawn."""
        return {
            stream.domain: int(drawn) * self.cfg.seq_len / stream.epoch_tokens
            for stream, drawn in zip(self._streams, self._drawn, strict=True)
        }

    def state(self) -> dict[str, Any]:
        """The position after the last ``next``, and what it is a position in; JSON."""
        rows = dict(zip(self.dataset.domains, self._drawn.tolist(), strict=True))
        return {"row": sum(rows.values()), "rows_by_domain": rows, **self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``.

        Raises:
            ValueError: the state is of another stream: other data, weights, seed or row length.
        """
        for key, ours in self._identity().items():
            if state.get(key) != ours:
                raise ValueError(
                    f"the saved position is of another stream: {key} was {state.get(key)}, "
                    f"now it is {ours}; start a new run or restore the old setting"
                )
        rows = [state["rows_by_domain"][domain] for domain in self.dataset.domains]
        self._drawn = np.array(rows, np.int64)
        self._ahead.clear()

    def close(self) -> None:
        """Stop the prefetch threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "seq_len": self.cfg.seq_len,
            "shares": self._mixture.shares.tolist(),
            "fingerprint": self.dataset.fingerprint,
        }

    def _plan(self, drawn: NDArray[np.int64]) -> tuple[list[list[Piece]], NDArray[np.int64]]:
        """This rank's rows of the batch after ``drawn``, and the counts after that batch."""
        chosen = self._mixture.choose(drawn, self._batch_size)
        taken = np.bincount([domain for domain, _ in chosen], minlength=len(drawn))
        mine = chosen[self._rank :: self._world]
        return [self._streams[domain].row(index) for domain, index in mine], drawn + taken

    def _build(self, rows: list[list[Piece]]) -> Batch:
        tokens, targets, starts = _fill(self.dataset, "train", rows, self.cfg.seq_len)
        return Batch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            cu_seqlens=torch.tensor([*starts, tokens.size], dtype=torch.int32),
        )


def heldout_batches(
    dataset: Dataset,
    domain: str,
    *,
    seq_len: int,
    batch_size: int,
    max_bytes: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[EvalBatch]:
    """Every held-out token of a domain as a target exactly once, in the fixed order of documents.

    A document is cut every ``seq_len`` tokens from its own start, so its loss depends neither on
    its neighbours nor on ``batch_size``. Short pieces share a row; the rest of a row is padding
    (BOS, IGNORE). The last batch may have fewer rows.

    Args:
        max_bytes: measure the first documents only, until they have this many bytes of text
            (images: pixels). The last of them is cut where the budget ends; at least one token is
            predicted.
        rank, world: give this rank's rows of each batch; all ranks have as many batches, and for
            want of a row one of padding alone.
    """
    pieces = _heldout_pieces(dataset, domain, seq_len, max_bytes)
    rows = _pack(pieces, seq_len)
    for at in range(0, len(rows), batch_size):
        mine = rows[at : at + batch_size][rank::world]
        yield _eval_batch(dataset, mine or [[]], seq_len)


def _heldout_pieces(
    dataset: Dataset, domain: str, seq_len: int, max_bytes: int | None
) -> Iterator[Piece]:
    sizes = dataset.tokenizer.token_bytes + dataset.tokenizer.is_symbol
    left = max_bytes
    for document in range(dataset.documents("heldout", domain)):
        ids = dataset.document("heldout", domain, document)
        predicted = len(ids) - 1  # the first token has nothing to be predicted from
        if left is not None:
            spent = np.cumsum(sizes[ids[1:]])
            predicted = max(int(np.searchsorted(spent, left, side="right")), 1)
            left -= int(spent[-1])
        for start in range(0, predicted, seq_len):
            yield Piece(domain, document, start, min(start + seq_len, predicted))
        if left is not None and left <= 0:
            return


def _pack(pieces: Iterator[Piece], seq_len: int) -> list[list[Piece]]:
    """Pieces in their order, each in the current row if it fits whole, else in a new one."""
    rows: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        length = piece.stop - piece.start
        if length > room:
            rows.append([])
            room = seq_len
        rows[-1].append(piece)
        room -= length
    return rows


def _eval_batch(dataset: Dataset, rows: list[list[Piece]], seq_len: int) -> EvalBatch:
    tokens, targets, starts = _fill(dataset, "heldout", rows, seq_len)
    documents = np.full(tokens.shape, -1, np.int64)
    for row, pieces in enumerate(rows):
        lengths = [piece.stop - piece.start for piece in pieces]
        documents[row, : sum(lengths)] = np.repeat([piece.document for piece in pieces], lengths)
    return EvalBatch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        cu_seqlens=torch.tensor([*starts, tokens.size], dtype=torch.int32),
        documents=torch.from_numpy(documents),
    )


def _fill(
    dataset: Dataset, split: Split, rows: list[list[Piece]], seq_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Tokens and targets ``[rows, seq_len]``, and where pieces (and padding) start in them."""
    tokens = np.full((len(rows), seq_len), dataset.tokenizer.bos_id, np.int64)
    targets = np.full((len(rows), seq_len), IGNORE, np.int64)
    starts = []
    for row, pieces in enumerate(rows):
        at = 0
        for domain, document, start, stop in pieces:
            starts.append(row * seq_len + at)
            ids = dataset.document(split, domain, document)[start : stop + 1]
            tokens[row, at : at + stop - start] = ids[: stop - start]
            targets[row, at : at + len(ids) - 1] = ids[1:]
            at += stop - start
        if at < seq_len:
            starts.append(row * seq_len + at)
    return tokens, targets, starts
