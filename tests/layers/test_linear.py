"""Linear and Embedding leave their values to ``fathom.model.init``."""

import torch

from fathom.layers.linear import Embedding, Linear


def test_building_layers_draws_no_random_number():
    before = torch.get_rng_state()
    Linear(64, 32, bias=True)
    Embedding(100, 16)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_out_by_in_and_a_bias_must_be_asked_for():
    assert {name: p.shape for name, p in Linear(3, 5).named_parameters()} == {"weight": (5, 3)}
    assert Linear(3, 5, bias=True).bias.shape == (5,)
    assert Embedding(7, 2).weight.shape == (7, 2)


def test_a_linear_is_the_product_with_the_transposed_weight():
    layer = Linear(3, 2, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]]))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
    assert layer(torch.tensor([1.0, 1.0, 2.0])).tolist() == [19.0, 21.0]
