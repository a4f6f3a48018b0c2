"""The layout for decoding: other strides, the same model."""

from pathlib import Path

import pytest
import torch

from fathom import api
from fathom.config import ModelConfig
from fathom.generate import Engine
from fathom.generate.layout import lay_out_for_decoding
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
