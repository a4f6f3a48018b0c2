"""Probes on models whose answer is known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fathom.attention import AttentionConfig
from fathom.config import LayerGroup, ModelConfig, MTPConfig
from fathom.data.config import DataConfig
from fathom.data.dataset import Dataset, open_dataset
from fathom.ffn import DenseConfig, FFNConfig, MoEConfig
from fathom.layers.position import AlibiConfig, NoPositionConfig
from fathom.layers.rope import Rope
from fathom.layers.step import Step
from fathom.model import Decoder, build_model
from fathom.probes import PROBES, Context
from fathom.probes.reach import find_accuracy, mirror
from fathom.probes.retrieval import needle, recall
from fathom.probes.routing import divergence
from fathom.probes.score import position_share, shuffled
from fathom.probes.speed import mla_form
from fathom.sizing.count import cache_bytes_per_token
from kinds import mha, mla

CONTEXT = Context(seq_len=32, max_bytes=600, batch_size=8)
MOE = MoEConfig(n_routed_experts=4, top_k=2, inter_dim=8)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return open_dataset(DataConfig(seq_len=32))


def model_of(attention: AttentionConfig, ffn: FFNConfig | None = None) -> Decoder:
    group = LayerGroup(count=2, attention=attention, ffn=ffn or DenseConfig(inter_dim=16))
    return build_model(ModelConfig(vocab_size=1024, dim=24, groups=(group,)), seed=1)


@pytest.mark.parametrize("name", sorted(set(PROBES) - {"facts", "selection"}))
def test_every_probe_runs_on_a_deepseek_like_model_and_gives_json(name, dataset):
    cfg = replace(model_of(mla(), MOE).cfg, mtp=MTPConfig(), max_seq_len=64)
    record = PROBES[name].run(build_model(cfg, seed=1), dataset, CONTEXT)
    assert record == json.loads(json.dumps(record))
    assert record


@pytest.mark.parametrize("name", sorted(set(PROBES) - {"length", "mtp", "speed"}))
def test_a_probe_gives_the_same_record_twice(name, dataset):
    model = model_of(mha(), MOE)
    assert PROBES[name].run(model, dataset, CONTEXT) == PROBES[name].run(model, dataset, CONTEXT)


def test_routing_says_nothing_of_a_dense_model(dataset):
    assert PROBES["routing"].run(model_of(mha()), dataset, CONTEXT) == {}


def test_routing_counts_every_choice_of_real_tokens(dataset):
    record = PROBES["routing"].run(model_of(mha(), MOE), dataset, CONTEXT)
    assert [sum(layer) for layer in record["load"]] == pytest.approx([1.0, 1.0])
    assert 0 <= record["divergence"] <= math.log2(len(dataset.domains))


def test_divergence_is_log2_of_the_domains_when_no_expert_is_shared():
    counts = np.zeros((4, 1, 2), np.int64)
    counts[:2, 0, 0] = 10
    counts[2:, 0, 1] = 10
    assert divergence(counts, np.array([0, 0, 1, 1])) == pytest.approx(1.0)
    assert divergence(counts, np.array([0, 1, 0, 1])) == pytest.approx(0.0)


def test_loss_by_place_is_the_held_out_loss_split_up(dataset):
    record = PROBES["position"].run(model_of(mha()), dataset, CONTEXT)
    assert record["place"] == [0, 4, 8, 16]
    assert all(2 < bits < 8 for bits in record["bits_per_byte"])


def test_scores_that_are_distance_alone_have_a_position_share_of_one():
    places = torch.arange(16.0)
    scores = -(places[:, None] - places).expand(2, 3, 16, 16)
    hidden = places > places[:, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    assert position_share(scores) == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(0)
    assert position_share(shuffled(scores, generator)) < 0.5


def test_shuffling_keeps_each_querys_visible_scores():
    scores = torch.randn(1, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    mixed = shuffled(scores, torch.Generator().manual_seed(0))
    assert torch.equal(mixed.sort(-1).values, scores.sort(-1).values)
    assert torch.equal(torch.isfinite(mixed), torch.isfinite(scores))


def test_alibi_scores_are_mostly_position_and_no_positions_are_not(dataset):
    alibi = PROBES["score"].run(model_of(mha(AlibiConfig())), dataset, CONTEXT)
    none = PROBES["score"].run(model_of(mha(NoPositionConfig())), dataset, CONTEXT)
    assert alibi["mean"] > 0.9
    assert none["mean"] < 0.3


@pytest.mark.parametrize("attention", [mha(), mla()], ids=["gqa", "mla"])
def test_scores_seen_by_the_probe_are_those_of_the_forward(attention):
    layer = attention.build(24).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    step = Step.full(x[..., 0])
    weights = layer.scores(x, step).double().softmax(-1)
    if hasattr(layer, "keys_values"):
        angles = layer.rope.angles(step.positions_BT, step.total)
        values = layer.keys_values(*layer.latents(x, angles))[1]
    else:
        values = layer.wv(x).unflatten(-1, (2, -1)).repeat_interleave(2, dim=2)
    out = torch.einsum("bhts,bshv->bthv", weights, values)
    torch.testing.assert_close(layer.wo(out.flatten(-2)), layer(x, step), rtol=0, atol=1e-5)


def test_equal_keys_are_found_at_every_place():
    keys = torch.ones(256, 1, 16)
    assert find_accuracy(keys, Rope(16, 10000.0), 256, seed=0).item() == 1.0


def test_a_single_repeating_wave_points_worse_than_many():
    generator = torch.Generator().manual_seed(0)
    keys = 1 + 0.1 * torch.randn(1024, 1, 32, generator=generator)
    many = find_accuracy(keys, Rope(32, 10000.0), 1024, seed=0).item()
    one = find_accuracy(keys[..., :2], Rope(2, 10000.0), 1024, seed=0).item()
    assert many > 0.9
    assert one < 0.2  # it repeats every 2 pi tokens


def test_the_slowest_wave_alone_has_a_mirror_and_all_waves_together_have_none():
    rope = Rope(64, theta=10_000.0)
    slowest = torch.zeros(64)
    slowest[[31, 63]] = 1.0  # channels of the last pair
    alone, together = mirror(torch.stack([slowest, torch.ones(64)]), rope)
    assert alone == pytest.approx(1.0)
    assert abs(together) < 0.5


def test_without_rotation_no_place_can_be_pointed_at(dataset):
    record = PROBES["reach"].run(model_of(mha(NoPositionConfig())), dataset, CONTEXT)
    assert record["accuracy"] == [1 / n for n in record["context"]]


class Oracle(torch.nn.Module):
    """Goes on as the text did where its last token stood before."""

    embed = torch.nn.Embedding(1024, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 1024)
        for row, ids in enumerate(tokens.tolist()):
            logits[row, -1, ids[ids.index(ids[-1]) + 1]] = 1.0
        return logits


def test_a_model_that_copies_the_asked_value_recalls_everything():
    generator = torch.Generator().manual_seed(0)
    assert recall(Oracle(), 8, torch.arange(100), generator, batch_size=32) == 1.0


def test_a_model_that_copies_finds_every_needle_but_where_the_text_has_the_key_itself(dataset):
    found = needle(Oracle(), dataset, 64, torch.Generator().manual_seed(0), CONTEXT)
    assert found[0] == 1.0  # nothing stands before it
    assert all(share > 0.85 for share in found)


def test_a_random_model_recalls_at_chance(dataset):
    record = PROBES["retrieval"].run(model_of(mha()), dataset, CONTEXT)
    for accuracy, chance in zip(record["accuracy"], record["chance"], strict=True):
        assert abs(accuracy - chance) < 4 * math.sqrt(chance * (1 - chance) / 128)
    for found in record["needle"]["by_length"]["accuracy"]:
        assert abs(found - 1 / 16) < 4 * math.sqrt(15 / 16**2 / (32 * 5)) * 2  # texts are shared
    assert abs(record["repeat_bits_first"] - 10) < 0.2


def test_mla_is_timed_in_both_forms_and_left_as_it_was(dataset):
    model = model_of(mla())
    record = PROBES["speed"].run(model, dataset, CONTEXT)
    assert record["decode_tokens_per_second_absorbed"] > 0
    assert record["decode_tokens_per_second_expanded"] > 0
    with mla_form(model, "always"):
        assert model.blocks[0].attention.cfg.absorb == "always"
    assert model.blocks[0].attention.cfg.absorb == "auto"


def test_cache_bytes_are_those_of_a_real_cache():
    model = model_of(mla())
    cache = model.new_cache(1, 10, dtype=torch.bfloat16)
    assert cache_bytes_per_token(model.cfg) * 10 == cache.num_bytes
