"""SwiGLU against its formula, and its counts against the built module."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fathom.ffn import DenseConfig


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_output_is_the_formula_and_nothing_is_routed(build, inputs, step, bias):
    ffn = build(DenseConfig(inter_dim=7, bias=bias), 5)
    weights = dict(ffn.named_parameters())
    x = inputs(2, 3, 5)

    def product(name, value):
        return value @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    gate = product("w_gate", x)
    want = product("w_down", gate / (1 + (-gate).exp()) * product("w_up", x))
    got, routing = ffn(x, step)
    assert routing is None
    torch.testing.assert_close(got, want)


def test_gradients_agree_with_finite_differences(build, inputs, step):
    ffn = build(DenseConfig(inter_dim=4), 3)
    x = inputs(1, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ffn(x, step)[0], (x,))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_counts_equal_the_built_module(build, inputs, step, bias):
    cfg = DenseConfig(inter_dim=7, bias=bias)
    ffn = build(cfg, 5)
    built = sum(p.numel() for p in ffn.parameters())
    assert cfg.num_params(5) == cfg.num_active_params(5) == built
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ffn(inputs(2, 3, 5), step)
    assert counter.get_total_flops() == 6 * cfg.flops_per_token(5)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (1, 1, 5)])
def test_any_number_of_tokens_goes_through(build, inputs, step, shape):
    ffn = build(DenseConfig(inter_dim=7), 5)
    y, _ = ffn(inputs(*shape), step)
    assert y.shape == shape


@pytest.mark.parametrize("inter_dim", [0, -3, 2**20 + 1])
def test_a_width_that_cannot_be_is_refused(inter_dim):
    with pytest.raises(ValueError, match=f"inter_dim must be from 1 to 1048576, got {inter_dim}"):
        DenseConfig(inter_dim=inter_dim)
