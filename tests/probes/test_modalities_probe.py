"""Parts taken away from models where it is known who needs them."""

import pytest
import torch
from torch import nn

from fathom.config import ModelConfig
from fathom.data.config import DataConfig
from fathom.data.dataset import open_dataset
from fathom.model import build_model
from fathom.presets import preset
from fathom.probes import PROBES, Context
from fathom.probes.modalities import own_parts, parts, usage, without
from fathom.settings import override, parse, to_data

CONTEXT = Context(seq_len=64, batch_size=8, max_bytes=400)


@pytest.fixture(scope="module")
def dataset():
    return open_dataset(DataConfig())


def planted(dataset):
    """One layer, a router that sends image ids to expert 7 and text to the others."""
    moe = 'model.groups.0.ffn={ kind = "moe", n_routed_experts = 8, top_k = 1, inter_dim = 16 }'
    data = {"model": to_data(preset("tiny-llama"))}
    changed = override(data, [moe, "model.groups.0.count=1"])["model"]
    model = build_model(parse(ModelConfig, changed), seed=0).eval()
    image = torch.arange(model.cfg.vocab_size) >= dataset.tokenizer.text_vocab_size
    with torch.no_grad():
        model.embed.weight[:, 0] = torch.where(image, 50.0, -50.0)  # the channel that says so
        model.blocks[0].attention.wo.weight.zero_()
        model.blocks[0].ffn.router.weight.zero_()
        model.blocks[0].ffn.router.weight[7, 0] = 10.0
    return model


def test_a_planted_router_separates_images_from_text(dataset):
    model = planted(dataset)
    used = {domain: usage(model, dataset, domain, CONTEXT) for domain in ("image", "prose")}
    assert used["image"][0].argmax() == 7
    assert used["prose"][0][7] < 0.05
    assert own_parts(used, "image")[0].tolist() == [7]


def test_a_dense_layer_is_measured_by_its_activations_and_cut_by_the_same_share(dataset):
    model = build_model(preset("tiny-llama"), seed=0).eval()
    used = {domain: usage(model, dataset, domain, CONTEXT) for domain in ("prose", "zh")}
    width = model.blocks[0].ffn.w_down.weight.shape[1]
    assert all(layer.shape == (width,) for layer in used["prose"])
    assert used["prose"][0].sum().item() == pytest.approx(1)
    assert len(own_parts(used, "zh")[0]) == round(width / 8)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-moe"])
def test_what_is_taken_away_is_silent_and_comes_back_bitwise(name):
    model = build_model(preset(name), seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with without(model, [torch.tensor([1, 3]) for _ in model.blocks]):
        for block in model.blocks:
            weights = parts(block.ffn)
            assert not weights[[1, 3]].any()
            assert weights[[0, 2]].any()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_that_does_not_use_its_ffn_loses_nothing(dataset):
    model = build_model(preset("tiny-moe"), seed=0).eval()
    for block in model.blocks:
        nn.init.zeros_(block.ffn.experts.w_down)
    record = PROBES["modalities"].run(model, dataset, CONTEXT)
    assert record["own_loss_rise"] == record["other_loss_rise"] == record["chance_loss_rise"] == 0
    assert set(record["loss_rise"]) == set(dataset.domains)
