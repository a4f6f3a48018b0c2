"""Where every token of a long training stands, in one go and after stops, on one rank and on more.

The stream is followed by the arithmetic that gives a row its pieces of documents; no token is read.
One reader goes through it unbroken. Beside it a run is stopped at random batches, its position
written as JSON and taken up by another number of ranks. The hashes of all rows must be equal.

    python benchmarks/data_position.py [--tokens 1000000000]
"""

import argparse
import hashlib
import json
import random
from collections import Counter

import numpy as np
import torch
from records import limits, row, write

from fathom.data.config import DataConfig
from fathom.data.dataset import Dataset, open_dataset
from fathom.data.loader import Loader
from fathom.data.stream import Piece

SEQ_LEN, ROWS, SEED = 2048, 960, 7  # rows of a batch: whole for 1 to 6 and 8 ranks
RANKS = (1, 2, 3, 4, 5, 6, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10**9)
    args, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    cfg = DataConfig(seq_len=SEQ_LEN)
    dataset, batches = open_dataset(cfg), -(-args.tokens // (SEQ_LEN * ROWS))
    unbroken, broken = hashlib.sha256(), hashlib.sha256()
    alone = loaders(dataset, cfg, 1)
    for _ in range(batches):
        unbroken.update(passed(alone, dataset))
    draw, several, stops = random.Random(SEED), loaders(dataset, cfg, 1), 0
    for batch in range(batches):
        if batch and draw.random() < 0.1:
            position, stops = json.dumps(several[0].state()), stops + 1
            several = loaders(dataset, cfg, draw.choice(RANKS))
            for loader in several:
                loader.restore(json.loads(position))
        broken.update(passed(several, dataset))
    same = unbroken.hexdigest() == broken.hexdigest() and several[0].state() == alone[0].state()
    tokens = batches * SEQ_LEN * ROWS
    case = f"{stops} stops, {RANKS[0]} to {RANKS[-1]} ranks"
    metric = "tokens whose place does not depend on them"
    rows = [row(case, metric, "tokens", tokens if same else 0, {"all": tokens})]
    write("data_position", rows, limits(), sha256=unbroken.hexdigest())


def loaders(dataset: Dataset, cfg: DataConfig, world: int) -> list[Loader]:
    """Those of all ranks, at the beginning."""
    return [
        Loader(dataset, cfg, batch_size=ROWS, seed=SEED, rank=rank, world=world)
        for rank in range(world)
    ]


def passed(ranks: list[Loader], dataset: Dataset) -> bytes:
    """What stands in the rows of the next batch, in their order; all ranks then stand behind it."""
    rows: list[list[Piece]] = [[] for _ in range(ROWS)]
    for rank, loader in enumerate(ranks):
        rows[rank :: len(ranks)] = loader.peek_rows()
    drawn = Counter(pieces[0].domain for pieces in rows)
    for loader in ranks:
        state = loader.state()
        for domain in dataset.domains:
            state["rows_by_domain"][domain] += drawn[domain]
        loader.restore(state)
    places = [
        (number, dataset.domains.index(piece.domain), *piece[1:])
        for number, pieces in enumerate(rows)
        for piece in pieces
    ]
    return np.array(places, np.int64).tobytes()


if __name__ == "__main__":
    main()
