"""AdamW and Muon: equal to torch's, each matrix of a stack on its own, and nothing when skipped."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from fathom.model import Decoder, build_model
from fathom.train import optim
from fathom.train.config import Rounding, TrainConfig
from fathom.train.optim import (
    Muon,
    Optimizer,
    clip_factor,
    gradient_norm,
    is_hidden_matrix,
    matrices,
    orthogonal,
)

KEEP, SKIP = torch.zeros(()), torch.ones(())


@pytest.fixture
def model(make_config) -> Decoder:
    return build_model(make_config().model, seed=1)


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def snapshot(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **optimizer.state()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_adamw_equals_torch_adamw_in_float64(model):
    model = model.double()
    twin = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    cfg = TrainConfig(steps=1, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    ours = Optimizer(model, cfg)
    decayed = [p for name, p in twin.items() if p.ndim >= 2 and name != "embed.weight"]
    spared = [p for name, p in twin.items() if p.ndim < 2 or name == "embed.weight"]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    for seed, lr in enumerate((1e-2, 5e-3, 2e-2)):
        fill_gradients(model, seed)
        for name, p in model.named_parameters():
            twin[name].grad = None if p.grad is None else p.grad.clone()
        for group in theirs.param_groups:
            group["lr"] = lr
        ours.step(lr, KEEP)
        theirs.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, twin[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_norms_never_decay_and_embeddings_as_configured(model, decay_embeddings):
    cfg = TrainConfig(steps=1, weight_decay=0.5, decay_embeddings=decay_embeddings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    Optimizer(model, cfg).step(0.1, KEEP)
    for name, p in model.named_parameters():
        spared = "norm" in name or (name == "embed.weight" and not decay_embeddings)
        torch.testing.assert_close(p, before[name] * (1.0 if spared else 0.95), msg=name)


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (7, 33)], ids=["square", "tall", "wide"])
def test_muon_equals_torch_muon_on_matrices(shape):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    muon = Muon({"w": ours}, momentum=0.95, weight_decay=0.1)
    torchs = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(6):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        with torch.no_grad():
            muon.step(0.02, KEEP)
        torchs.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_muon_updates_each_expert_as_a_matrix_of_its_own():
    stack = nn.Parameter(torch.zeros(3, 10, 6))
    alone = [nn.Parameter(torch.zeros(10, 6)) for _ in range(3)]
    stack.grad = torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(1))
    stack.grad[1] *= 1000  # another expert's gradient must not shrink its neighbours' updates
    for weight, grad in zip(alone, stack.grad, strict=True):
        weight.grad = grad.clone()
    with torch.no_grad():
        Muon({"w_down": stack}, momentum=0.9, weight_decay=0.0).step(1.0, KEEP)
        named = {f"{index}": weight for index, weight in enumerate(alone)}
        Muon(named, momentum=0.9, weight_decay=0.0).step(1.0, KEEP)
    torch.testing.assert_close(stack.data, torch.stack([w.data for w in alone]), rtol=0, atol=0)


def test_stacks_of_one_shape_are_one_batch_up_to_a_size(monkeypatch):
    params = {f"{i}.w_down": nn.Parameter(torch.randn(3, 4, 6)) for i in range(5)}
    params |= {"wide": nn.Parameter(torch.randn(4, 6)), "tall": nn.Parameter(torch.randn(6, 4))}
    found = []
    for limit in (1, 2 * 72, 2**28):  # every stack on its own, pairs of them, all
        monkeypatch.setattr(optim, "MAX_BATCH", limit)
        copies = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
        muon = Muon(copies, momentum=0.9, weight_decay=0.1)
        for copy in copies.values():
            copy.grad = copy.detach().cos()
        muon.step(0.1, KEEP)
        found.append((sorted(len(names) for names, _ in muon.batches), copies))
    assert [sizes for sizes, _ in found] == [[1] * 7, [1, 1, 1, 2, 2], [1, 1, 5]]
    for _, copies in found[1:]:
        for name, copy in copies.items():
            torch.testing.assert_close(copy, found[0][1][name])


def test_stacked_gate_and_up_projections_are_two_matrices():
    stack = torch.randn(3, 2 * 5, 4)
    parts = matrices("blocks.1.ffn.experts.w_gate_up", stack)
    assert parts.shape == (6, 5, 4)
    torch.testing.assert_close(parts[2], stack[1, :5])  # expert 1's gate
    torch.testing.assert_close(parts[3], stack[1, 5:])  # expert 1's up
    assert matrices("w_down", stack).shape == (3, 10, 4)


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 8, 40), (2, 40, 8)])
def test_newton_schulz_makes_all_singular_values_nearly_equal(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 1e-3
    values = torch.linalg.svdvals(orthogonal(x).float())
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_takes_hidden_matrices_and_adamw_the_rest(model):
    optimizer = Optimizer(model, TrainConfig(steps=1, optimizer="muon"))
    by_muon = {name.removeprefix("momentum.") for name in optimizer.parts[1].state}
    names = {name for name, _ in model.named_parameters()}
    assert {"blocks.0.attention.wq.weight", "mtp.0.eh_proj.weight"} <= by_muon
    assert "blocks.1.ffn.experts.w_gate_up" in by_muon
    left = names - by_muon
    assert {"embed.weight", "head.weight", "norm.weight", "blocks.1.ffn.router.weight"} <= left
    assert all(
        "norm" in name or name.startswith(("embed", "head")) or "router" in name for name in left
    )
    assert set(optimizer.parts[0].params) == left


def test_a_vector_is_no_hidden_matrix():
    assert not is_hidden_matrix("blocks.0.attention.wq.bias", torch.zeros(4))
    assert not is_hidden_matrix("head.weight", torch.zeros(4, 4))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_routing_bias_is_never_optimized(model, name):
    optimizer = Optimizer(model, TrainConfig(steps=1, optimizer=name))
    assert not [key for key in optimizer.state() if "expert_bias" in key]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_a_skipped_step_changes_neither_weights_nor_state(model, name, bad):
    optimizer = Optimizer(model, TrainConfig(steps=1, optimizer=name))
    fill_gradients(model, 0)
    optimizer.step(1e-2, KEEP)
    before = snapshot(model, optimizer)
    fill_gradients(model, 1)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.view(-1)[0] = bad
    optimizer.step(1e-2, SKIP)
    assert same(before, snapshot(model, optimizer))
    optimizer.step(1e-2, KEEP)
    assert not same(before, snapshot(model, optimizer))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_copied_state_goes_on_bit_by_bit(make_config, name, dtype):
    cfg = TrainConfig(steps=1, optimizer=name)

    def run(
        restart: Callable[[Decoder, Optimizer], tuple[Decoder, Optimizer]],
    ) -> dict[str, Tensor]:
        model = build_model(make_config().model, seed=1, dtype=dtype)
        optimizer = Optimizer(model, cfg)
        for step in range(4):
            if step == 2:
                model, optimizer = restart(model, optimizer)
            fill_gradients(model, step)
            optimizer.step(1e-2, KEEP)
        return snapshot(model, optimizer)

    def copied(model: Decoder, optimizer: Optimizer) -> tuple[Decoder, Optimizer]:
        twin = build_model(make_config().model, seed=9, dtype=dtype)
        twin.load_state_dict(model.state_dict())
        fresh = Optimizer(twin, cfg)
        for key, tensor in fresh.state().items():
            tensor.copy_(optimizer.state()[key])
        return twin, fresh

    assert same(run(lambda model, optimizer: (model, optimizer)), run(copied))


def after_two_small_steps(
    make_config, rounding: Rounding, seed: int = 5
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """How far bfloat16 weights went by two steps of 1e-5, and the optimizer's state."""
    model = build_model(make_config().model, seed=1, dtype=torch.bfloat16)
    before = {name: p.detach().float() for name, p in model.named_parameters()}
    cfg = TrainConfig(steps=1, dtype="bf16", rounding=rounding, seed=seed)
    optimizer = Optimizer(model, cfg)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(1e-5, KEEP)
    moved = {name: p.detach().float() - before[name] for name, p in model.named_parameters()}
    return moved, optimizer.state()


def test_stochastic_rounding_moves_bfloat16_weights_right_on_average(make_config):
    moved, _ = after_two_small_steps(make_config, "stochastic")
    assert moved["embed.weight"].mean().item() == pytest.approx(-2e-5, rel=0.1)
    other, _ = after_two_small_steps(make_config, "stochastic", seed=6)
    assert not torch.equal(moved["embed.weight"], other["embed.weight"])


def test_master_weights_hold_what_bfloat16_ones_cannot(make_config):
    moved, state = after_two_small_steps(make_config, "master")
    assert not moved["norm.weight"].any()  # 1, whose lower neighbour is 2**-8 away
    below = state["low.norm.weight"].float() * 2**-24
    assert {key.removeprefix("low.") for key in state if key.startswith("low.")} == set(moved)
    torch.testing.assert_close(below, torch.full_like(below, -2e-5), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_parameter_without_a_gradient_stays(model, name):
    optimizer = Optimizer(model, TrainConfig(steps=1, optimizer=name))
    fill_gradients(model, 0)
    weight = model.blocks[0].get_parameter("attention.wq.weight")
    weight.grad, before = None, weight.detach().clone()
    optimizer.step(1e-2, KEEP)
    assert torch.equal(weight, before)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_clipped_step_is_that_of_gradients_which_were_clipped_before(model, name):
    twin = deepcopy(model)
    cfg = TrainConfig(steps=1, optimizer=name, eps=1e-3)  # so that the gradients' size matters
    ours, theirs = Optimizer(model, cfg), Optimizer(twin, cfg)
    fill_gradients(model, 0)
    fill_gradients(twin, 0)
    norm = gradient_norm(model)
    before = torch.nn.utils.clip_grad_norm_(twin.parameters(), 2.0, foreach=True)
    assert torch.equal(norm, before)
    ours.step(1e-2, KEEP, clip_factor(norm, 2.0))
    theirs.step(1e-2, KEEP)
    assert same(snapshot(model, ours), snapshot(twin, theirs))


def test_small_gradients_are_not_scaled_up_and_nothing_is_without_clipping():
    assert clip_factor(torch.tensor(0.5), 1.0) == 1
    assert clip_factor(torch.tensor(4.0), 1.0) == pytest.approx(0.25)
    assert clip_factor(torch.tensor(4.0), 0) is None


def test_the_norm_is_that_of_all_gradients_together(model):
    fill_gradients(model, 0)
    flat = torch.cat([grad.flatten() for grad in gradients(model)])
    torch.testing.assert_close(gradient_norm(model), flat.norm())
