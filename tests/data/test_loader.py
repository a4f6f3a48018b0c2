import json

import numpy as np
import pytest
import torch

from fathom.data.config import DataConfig
from fathom.data.loader import IGNORE, Batch, Loader

CFG = DataConfig(seq_len=16)


@pytest.fixture
def dataset(make_dataset):
    """Short and long documents; domain b is smaller than one row."""
    words = [f"word {i} " * (1 + i % 9) for i in range(40)]
    return make_dataset(
        a=(words, ["held"]), b=(["x"], ["held"]), c=(["一二三四五六七"] * 9, ["八"])
    )


def loader(dataset, cfg=CFG, **changes):
    return Loader(dataset, cfg, **({"batch_size": 4, "seed": 0} | changes))


def take(source: Loader, n: int) -> list[Batch]:
    return [source.next() for _ in range(n)]


def rows(batches: list[Batch]) -> list[list[int]]:
    return torch.cat([batch.tokens for batch in batches]).tolist()


def assert_equal(got: list[Batch], want: list[Batch]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.cu_seqlens, b.cu_seqlens)


def test_shapes_and_types_are_the_contract(dataset):
    batch = loader(dataset).next()
    assert batch.tokens.shape == batch.targets.shape == (4, 16)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (0, 64)
    assert (batch.cu_seqlens.diff() > 0).all()
    assert {0, 16, 32, 48, 64} <= set(batch.cu_seqlens.tolist())


def test_borders_and_targets_follow_the_documents(dataset):
    source = loader(dataset)
    for n in range(20):
        pieces = [piece for row in source.peek_rows(n) for piece in row]
        batch = source.peek(n)
        lengths = [piece.stop - piece.start for piece in pieces]
        assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths)]
        tokens, targets = batch.tokens.flatten(), batch.targets.flatten()
        for piece, a in zip(pieces, batch.cu_seqlens.tolist(), strict=False):
            ids = [*dataset.document("train", piece.domain, piece.document).tolist(), IGNORE]
            b = a + piece.stop - piece.start
            assert tokens[a:b].tolist() == ids[piece.start : piece.stop]
            assert targets[a:b].tolist() == ids[piece.start + 1 : piece.stop + 1]


def test_no_target_crosses_into_another_document(dataset):
    eos, bos = dataset.tokenizer.eos_id, dataset.tokenizer.bos_id
    for batch in take(loader(dataset), 20):
        assert ((batch.targets == IGNORE) == (batch.tokens == eos)).all()
        assert not (batch.targets == bos).any()


def test_the_same_seed_gives_the_same_stream_and_another_seed_another(dataset):
    assert_equal(take(loader(dataset), 10), take(loader(dataset), 10))
    assert rows(take(loader(dataset, seed=1), 10)) != rows(take(loader(dataset), 10))


@pytest.mark.parametrize("workers", [1, 3])
def test_prefetch_threads_do_not_change_the_stream(dataset, workers):
    threaded = loader(dataset, DataConfig(seq_len=16, workers=workers))
    assert_equal(take(threaded, 10), take(loader(dataset), 10))
    assert threaded.state() == {**after(dataset, 10)}
    threaded.set_batch_size(2)  # drops what was fetched ahead
    plain = loader(dataset)
    take(plain, 10)
    plain.set_batch_size(2)
    assert_equal(take(threaded, 5), take(plain, 5))
    threaded.close()


def after(dataset, n: int) -> dict:
    source = loader(dataset)
    take(source, n)
    return source.state()


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_together_draw_what_one_rank_draws(dataset, world):
    alone = take(loader(dataset), 6)
    ranks = [take(loader(dataset, rank=rank, world=world), 6) for rank in range(world)]
    for n, whole in enumerate(alone):
        for rank in range(world):
            assert torch.equal(ranks[rank][n].tokens, whole.tokens[rank::world])


def test_the_rows_do_not_depend_on_how_they_are_batched(dataset):
    source = loader(dataset, batch_size=1)
    ramp = take(source, 3)
    source.set_batch_size(5)
    ramp += take(source, 3)
    assert rows(ramp) == rows(take(loader(dataset, batch_size=9), 2))


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_restored_position_goes_on_to_the_token(dataset, stop):
    whole = take(loader(dataset), 12)
    state = json.loads(json.dumps(after(dataset, stop)))
    resumed = loader(dataset, DataConfig(seq_len=16, workers=2))
    take(resumed, 3)
    resumed.restore(state)
    assert_equal(take(resumed, 12 - stop), whole[stop:])
    assert resumed.state() == after(dataset, 12)
    resumed.close()


def test_a_position_fits_in_a_few_hundred_bytes(dataset):
    state = after(dataset, 50)
    assert state["row"] == 200 == sum(state["rows_by_domain"].values())
    assert len(json.dumps(state)) < 500


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"cfg": DataConfig(seq_len=8)}, "seq_len"),
        ({"cfg": DataConfig(seq_len=16, weights={"a": 1.0})}, "shares"),
    ],
)
def test_a_position_in_another_stream_is_refused_by_name(dataset, changes, key):
    with pytest.raises(ValueError, match=f"another stream: {key} was"):
        loader(dataset, **changes).restore(after(dataset, 2))


def test_a_position_in_other_data_is_refused(dataset):
    with pytest.raises(ValueError, match="fingerprint was other"):
        loader(dataset).restore({**after(dataset, 2), "fingerprint": "other"})


def test_peeking_moves_nothing_and_sees_what_comes(dataset):
    source = loader(dataset)
    ahead = [source.peek(n) for n in range(4)]
    assert source.state()["row"] == 0
    assert_equal(take(source, 4), ahead)


def test_an_epoch_draws_every_training_token_once(bundled):
    """Over the real corpus: a row is 66 tokens, one image, so epochs of images end at rows."""
    cfg = DataConfig(seq_len=66, weights={"image": 1.0})
    source = Loader(bundled, cfg, batch_size=33, seed=5)
    batches = take(source, 49)  # 1617 images
    assert source.epochs() == {"prose": 0, "zh": 0, "code": 0, "maths": 0, "image": 1.0}
    drawn = sorted(map(tuple, rows(batches)))
    n = bundled.documents("train", "image")
    assert drawn == sorted(tuple(bundled.document("train", "image", i).tolist()) for i in range(n))


def test_tokens_drawn_follow_the_weights(bundled):
    cfg = DataConfig(seq_len=32, weights={"zh": 3.0, "code": 1.0})
    source = Loader(bundled, cfg, batch_size=40, seed=0)
    take(source, 10)
    drawn = source.state()["rows_by_domain"]
    assert drawn["prose"] == drawn["maths"] == drawn["image"] == 0
    assert abs(drawn["zh"] - 300) <= 2
    assert abs(drawn["code"] - 100) <= 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be a positive multiple of the 1 ranks, got 0"),
        ({"batch_size": 6, "world": 4}, "positive multiple of the 4 ranks, got 6"),
        ({"rank": 2, "world": 2}, "rank must be 0 to 1, got 2"),
        ({"rank": -1}, "rank must be 0 to 0, got -1"),
    ],
)
def test_impossible_layouts_are_refused(dataset, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        loader(dataset, **changes)


def test_the_stream_of_the_bundled_corpus_is_the_one_recorded(bundled):
    """Guards published runs: a change here changes every run's data."""
    batch = Loader(bundled, DataConfig(), batch_size=8, seed=0).peek(100)
    assert batch.tokens.sum(1).tolist() == RECORDED


RECORDED = [73118, 91174, 259172, 85670, 77419, 72347, 75785, 88541]
