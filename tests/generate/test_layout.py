"""The layout for decoding: other strides, the same model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fathom import api
from fathom.attention.mha import MHA
from fathom.config import ModelConfig
from fathom.ffn.dense import SwiGLU
from fathom.generate import Engine
from fathom.generate.layout import lay_out_for_decoding
from fathom.layers.linear import each_of
from fathom.model import Decoder, build_model
from fathom.presets import preset


def model_of(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> Decoder:
    cfg = preset("tiny-deepseek")
    cfg = ModelConfig(
        vocab_size=1024, dim=cfg.dim, groups=cfg.groups, max_seq_len=64, tie_embeddings=tied
    )
    return build_model(cfg, seed=2, dtype=dtype)


@pytest.mark.parametrize("tied", [False, True])
def test_tall_weights_lie_columns_first_and_give_the_same(tied: bool, tmp_path: Path) -> None:
    model = model_of(tied=tied)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tokens = torch.arange(20)[None]
    want = model(tokens)
    texts = Engine(model).generate(["Emma", "x"], max_new_tokens=6)
    lay_out_for_decoding(model)
    head = model.embed.weight if tied else model.head.weight
    assert head.stride() == (1, 1024)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    torch.testing.assert_close(model(tokens), want, rtol=1e-4, atol=1e-5)
    again = Engine(model).generate(["Emma", "x"], max_new_tokens=6)
    assert [text.tokens for text in again] == [text.tokens for text in texts]
    lay_out_for_decoding(model)  # a second time changes nothing
    assert head.stride() == (1, 1024)
    api.save(model, tmp_path / "out")
    stored = api.load(tmp_path / "out").state_dict()
    assert all(torch.equal(stored[name], weight) for name, weight in before.items())


def test_weights_of_one_input_lie_in_one_and_are_read_in_one_product() -> None:
    model = build_model(preset("tiny-gqa"), seed=2)
    attention, ffn = (
        model.blocks[0].get_submodule("attention"),
        model.blocks[0].get_submodule("ffn"),
    )
    assert isinstance(attention, MHA)
    assert isinstance(ffn, SwiGLU)
    x = torch.randn(1, 3, model.cfg.dim, generator=torch.Generator().manual_seed(0))
    groups = [(attention.wq, attention.wk, attention.wv), (ffn.w_gate, ffn.w_up)]
    with torch.no_grad():
        for layers in groups:
            want = [layer(x) for layer in layers]
            lay_out_for_decoding(model)
            storages = {layer.weight.untyped_storage().data_ptr() for layer in layers}
            assert len(storages) == 1
            for got, each in zip(each_of(x, *layers), want, strict=True):
                torch.testing.assert_close(got, each, rtol=1e-4, atol=1e-6)


def test_a_model_that_was_laid_out_and_then_moved_computes_with_what_it_has_now() -> None:
    model, plain = build_model(preset("tiny-gqa"), seed=2), build_model(preset("tiny-gqa"), seed=2)
    lay_out_for_decoding(model)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.double()(tokens), plain.double()(tokens))
        model.load_state_dict(build_model(preset("tiny-gqa"), seed=3).double().state_dict())
        other = build_model(preset("tiny-gqa"), seed=3).double()(tokens)
        torch.testing.assert_close(model(tokens), other)


def test_biases_keep_their_products_apart() -> None:
    cfg = preset("tiny-gqa")
    group = replace(cfg.groups[0], attention=replace(cfg.groups[0].attention, qkv_bias=True))
    model = build_model(replace(cfg, groups=(group,)), seed=2)
    torch.nn.init.ones_(model.get_parameter("blocks.0.attention.wq.bias"))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        want = model(tokens)
        lay_out_for_decoding(model)
        torch.testing.assert_close(model(tokens), want, rtol=1e-4, atol=1e-5)


def test_wide_weights_and_other_types_stay_as_they_are() -> None:
    model = model_of()
    lay_out_for_decoding(model)
    down = model.get_submodule("blocks.0.ffn.w_down").weight
    assert isinstance(down, torch.Tensor)
    assert down.shape[0] <= down.shape[1]
    assert down.is_contiguous()
    assert model.embed.weight.is_contiguous()
    half = model_of(dtype=torch.bfloat16)
    lay_out_for_decoding(half)
    assert all(weight.is_contiguous() for weight in half.parameters())
