"""Probes of sparse attention: what it selects, its time against length, its cache."""

import json

import pytest
import torch

from fathom.attention import AttentionConfig
from fathom.attention.base import Selection
from fathom.config import LayerGroup, ModelConfig
from fathom.data.config import DataConfig
from fathom.data.dataset import Dataset, open_dataset
from fathom.ffn import DenseConfig
from fathom.model import Decoder, build_model
from fathom.probes import PROBES, Context
from fathom.probes.selection import Shares, shares
from fathom.sizing.count import cache_bytes_per_token
from kinds import dsa, mha, moba, nsa

CONTEXT = Context(seq_len=32, max_bytes=600, batch_size=8)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return open_dataset(DataConfig(seq_len=32))


def model_of(attention: AttentionConfig) -> Decoder:
    group = LayerGroup(count=2, attention=attention, ffn=DenseConfig(inter_dim=16))
    return build_model(ModelConfig(vocab_size=1024, dim=24, groups=(group,)), seed=1)


@pytest.mark.parametrize("attention", [dsa(), moba(), nsa()], ids=["dsa", "moba", "nsa"])
def test_a_selection_gives_the_same_json_twice(attention, dataset):
    records = [PROBES["selection"].run(model_of(attention), dataset, CONTEXT) for _ in range(2)]
    assert records[0] == json.loads(json.dumps(records[1]))
    assert records[0]


def test_an_attention_that_reads_everything_selects_nothing(dataset):
    assert PROBES["selection"].run(model_of(mha()), dataset, CONTEXT) == {}


@pytest.mark.parametrize("attention", [moba(), nsa()], ids=["moba", "nsa"])
def test_what_is_selected_holds_no_more_than_the_best_blocks_could(attention, dataset):
    record = PROBES["selection"].run(model_of(attention), dataset, CONTEXT)
    assert record["layer"] == [0, 1]
    for selected, best, chance in zip(
        record["selected"], record["best"], record["chance"], strict=True
    ):
        assert 0 < selected <= best <= 1
        assert 0 < chance <= best


def test_time_is_measured_at_every_length_up_to_the_context(dataset):
    record = PROBES["length"].run(model_of(nsa()), dataset, CONTEXT)
    assert record["tokens"] == [4, 8, 16, 32]
    for forward, both in zip(record["ms_forward"], record["ms_forward_and_backward"], strict=True):
        assert forward > 0
        assert both > 0


def test_the_cache_of_a_sparse_attention_is_counted_with_its_entries(dataset):
    record = PROBES["speed"].run(model_of(nsa()), dataset, CONTEXT)
    assert record["cache_bytes_per_token"] == cache_bytes_per_token(model_of(nsa()).cfg)


def test_selection_is_measured_against_the_true_mass():
    """Eight tokens, blocks of two: queries 0 to 5 read everything, 6 and 7 blocks 3 and 1."""
    weights = torch.ones(8, 8).tril()
    weights[6, :7] = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.05, 0.1, 0.2])  # 0.15, 0.5, 0.15, 0.2
    weights[7, :8] = torch.tensor([0.5, 0.1, 0.1, 0.0, 0.1, 0.1, 0.0, 0.1])  # 0.6, 0.1, 0.2, 0.1
    blocks = [[*range(t // 2 + 1)] for t in range(6)] + [[3, 1], [3, 1]]
    starts = torch.tensor([[2 * j for j in row] + [-1] * (4 - len(row)) for row in blocks])
    got = shares(weights.log()[None, None], Selection(starts[None, :, None].int(), 2))
    assert got is not None
    want = Shares(
        selected=(0.7 + 0.2) / 2,
        best=(0.7 + 0.8) / 2,
        chance=(0.2 + 0.8 / 3 + 0.1 + 0.9 / 3) / 2,
        recall=(1 + 0) / 2,
    )
    assert tuple(got) == pytest.approx(tuple(want))
    assert (
        shares(weights[:6, :6].log()[None, None], Selection(starts[None, :6, None].int(), 2))
        is None
    )
