"""A million tokens, read in one go or in pieces by changing workers and ranks, are the same."""

import hashlib
import random
from dataclasses import replace

import torch

from fathom.data.config import DataConfig
from fathom.data.dataset import Dataset
from fathom.data.loader import Loader

TOKENS, SEQ_LEN, ROWS = 1_000_000, 128, 60
BATCHES = TOKENS // (SEQ_LEN * ROWS) + 1
SEED = 5


def next_batch(loaders: list[Loader]) -> torch.Tensor:
    """The rows of all ranks in their order, tokens and targets."""
    parts = [loader.next() for loader in loaders]
    both = [torch.stack([part.tokens, part.targets], dim=1) for part in parts]
    whole = torch.empty(ROWS, 2, SEQ_LEN, dtype=torch.int64)
    for rank, part in enumerate(both):
        whole[rank :: len(both)] = part
    return whole


def loaders(dataset: Dataset, cfg: DataConfig, world: int) -> list[Loader]:
    return [
        Loader(dataset, cfg, batch_size=ROWS, seed=SEED, rank=rank, world=world)
        for rank in range(world)
    ]


def test_a_million_tokens_do_not_depend_on_stops_workers_or_ranks(dataset):
    cfg = DataConfig(source=str(dataset.folder), seq_len=SEQ_LEN)
    (alone,) = loaders(dataset, cfg, 1)
    unbroken, pieces = hashlib.sha256(), hashlib.sha256()
    for _ in range(BATCHES):
        unbroken.update(next_batch([alone]).numpy().tobytes())
    draw, done, state = random.Random(1), 0, None
    while done < BATCHES:
        several = loaders(
            dataset, replace(cfg, workers=draw.randrange(4)), draw.choice([1, 2, 3, 4])
        )
        for loader in several:
            if state is not None:
                loader.restore(state)
        for _ in range(min(draw.randrange(1, 30), BATCHES - done)):
            pieces.update(next_batch(several).numpy().tobytes())
            done += 1
        state = several[-1].state()
        for loader in several:
            loader.close()
    assert BATCHES * ROWS * SEQ_LEN >= TOKENS
    assert pieces.hexdigest() == unbroken.hexdigest()
