"""The MoE layer against a loop over tokens, and what must hold whatever the load."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fathom.ffn import DenseConfig, MoEConfig
from fathom.ffn.balance import AuxLoss, AuxLossFree, SeqAuxLoss, ZLoss
from fathom.ffn.moe import MoE

DIM = 8  # 16-byte rows in float32 and bf16: the fast grouped product takes them


def config(**changes) -> MoEConfig:
    return MoEConfig(**({"n_routed_experts": 6, "top_k": 2, "inter_dim": 16} | changes))


V1 = config(n_shared_experts=2, balance=(AuxLoss(),))
V2 = config(n_shared_experts=1, n_expert_groups=3, n_limited_groups=2, route_scale=16.0)
V3 = config(
    n_shared_experts=1,
    score_func="sigmoid",
    n_expert_groups=3,
    n_limited_groups=2,
    group_score="top2",
    norm_topk_prob=True,
    route_scale=2.5,
    balance=(AuxLossFree(), SeqAuxLoss(), ZLoss()),
)
CASES = pytest.mark.parametrize("cfg", [V1, V2, V3], ids=["v1", "v2", "v3"])


def swiglu(x_D: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return w_down @ (silu(w_gate @ x_D) * (w_up @ x_D))


def token_by_token(moe: MoE, x_BTD: Tensor) -> Tensor:
    """The definition: every token asks its experts one after the other."""
    x_ND = x_BTD.flatten(0, 1)
    choice = moe.router(x_ND)
    rows = []
    for x_D, ids, gates in zip(x_ND, choice.expert_ids_NK, choice.gates_NK, strict=True):
        y_D = torch.zeros_like(x_D)
        for expert, gate in zip(ids.tolist(), gates, strict=True):
            w_gate, w_up = moe.experts.w_gate_up[expert].chunk(2)
            y_D = y_D + gate * swiglu(x_D, w_gate, w_up, moe.experts.w_down[expert])
        if moe.shared is not None:
            shared = (moe.shared.w_gate.weight, moe.shared.w_up.weight, moe.shared.w_down.weight)
            y_D = y_D + swiglu(x_D, *shared)
        rows.append(y_D)
    return torch.stack(rows).view_as(x_BTD)


def gradients(loss: Tensor, moe: MoE, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x, *moe.parameters()]))


@CASES
def test_output_and_gradients_match_a_loop_over_tokens_in_float64(build, inputs, step, cfg):
    moe = build(cfg, DIM)
    x = inputs(2, 5, DIM).requires_grad_()
    weight = inputs(2, 5, DIM, seed=2)
    want = token_by_token(moe, x)
    got, _ = moe(x, step)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    pairs = zip(
        gradients((got * weight).sum(), moe, x),
        gradients((want * weight).sum(), moe, x),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@CASES
def test_narrow_dtypes_agree_with_float64(build, inputs, step, cfg, dtype, tolerance):
    exact, narrow = build(cfg, DIM, std=0.1), build(cfg, DIM, dtype, std=0.1)
    exact.load_state_dict(narrow.state_dict())
    x = inputs(2, 5, DIM, dtype=dtype)
    got, routing = narrow(x, step)
    want, exact_routing = exact(x.double(), step)
    assert got.dtype == dtype
    assert routing.balance_loss.dtype == torch.float32
    assert torch.equal(routing.tokens_per_expert, exact_routing.tokens_per_expert)
    torch.testing.assert_close(
        got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item()
    )


def test_bf16_keeps_the_bias_in_float32(build):
    moe = build(V3, DIM, torch.bfloat16)
    moe.update_expert_bias(torch.tensor([9, 1, 1, 1, 1, 1]))
    assert moe.router.expert_bias.dtype == torch.float32
    want = torch.tensor([-0.001] + [0.001] * 5)
    assert torch.equal(moe.router.expert_bias, want)


def test_one_expert_is_a_dense_ffn(build, inputs, step):
    moe = build(config(n_routed_experts=1, top_k=1), DIM)
    dense = build(DenseConfig(inter_dim=16), DIM)
    with torch.no_grad():
        w_gate, w_up = moe.experts.w_gate_up[0].chunk(2)
        dense.w_gate.weight.copy_(w_gate)
        dense.w_up.weight.copy_(w_up)
        dense.w_down.weight.copy_(moe.experts.w_down[0])
    x = inputs(2, 5, DIM)
    torch.testing.assert_close(moe(x, step)[0], dense(x, step)[0], rtol=1e-13, atol=1e-13)


def test_no_token_is_lost_when_all_go_to_one_expert(build, inputs, step):
    moe = build(config(top_k=1, score_func="sigmoid", expert_bias=True), DIM)
    moe.router.expert_bias[3] = 100.0
    x = inputs(3, 7, DIM)
    y, routing = moe(x, step)
    assert routing.tokens_per_expert.tolist() == [0, 0, 0, 21, 0, 0]
    torch.testing.assert_close(y, token_by_token(moe, x))
    y.sum().backward()
    assert [bool(g.any()) for g in moe.experts.w_down.grad] == [e == 3 for e in range(6)]


@CASES
def test_counts_are_integers_that_sum_to_all_choices(build, inputs, step, cfg):
    routing = build(cfg, DIM)(inputs(3, 5, DIM), step)[1]
    assert routing.tokens_per_expert.dtype == torch.int64
    assert routing.tokens_per_expert.sum() == 3 * 5 * cfg.top_k


def test_permuting_the_experts_permutes_the_counts_and_leaves_the_output(build, inputs, step):
    moe = build(config(score_func="sigmoid", balance=(AuxLossFree(),)), DIM)
    moe.router.expert_bias += 0.1 * torch.arange(6)
    x = inputs(2, 9, DIM)
    y, routing = moe(x, step)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    with torch.no_grad():
        for tensor in (*moe.experts.parameters(), moe.router.weight, moe.router.expert_bias):
            tensor.copy_(tensor[order].clone())
    permuted, permuted_routing = moe(x, step)
    torch.testing.assert_close(permuted, y)
    assert torch.equal(permuted_routing.tokens_per_expert, routing.tokens_per_expert[order])


@CASES
def test_a_token_does_not_depend_on_the_others(build, inputs, step, cfg):
    moe = build(cfg, DIM)
    x = inputs(2, 6, DIM)
    whole = moe(x, step)[0]
    alone = torch.cat([moe(x[:, t : t + 1], step)[0] for t in range(6)], dim=1)
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 1)])
@CASES
def test_any_number_of_tokens_goes_through_and_back(build, inputs, step, cfg, shape):
    moe = build(cfg, DIM)
    x = inputs(*shape, DIM).requires_grad_()
    y, routing = moe(x, step)
    (y.sum() + routing.balance_loss).backward()
    assert y.shape == x.shape
    assert routing.tokens_per_expert.sum() == shape[0] * shape[1] * cfg.top_k
    assert routing.entropy.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_balance_losses_add_up_and_reach_the_router(build, inputs, step):
    x = inputs(2, 5, DIM)
    ways = (
        AuxLoss(aux_loss_coeff=0.3),
        SeqAuxLoss(seq_aux_loss_coeff=0.2),
        ZLoss(z_loss_coeff=0.1),
    )
    each = [build(config(balance=(way,)), DIM)(x, step)[1].balance_loss for way in ways]
    moe = build(config(balance=ways), DIM)
    total = moe(x, step)[1].balance_loss
    torch.testing.assert_close(total, sum(each))
    total.backward()
    assert moe.router.weight.grad.any()
    assert moe.experts.w_down.grad is None
    assert build(config(), DIM)(x, step)[1].balance_loss.item() == 0.0


def test_a_forward_changes_no_state_and_the_update_moves_the_bias_once(build, inputs, step):
    moe = build(V3, DIM)
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    moe(inputs(2, 5, DIM), step)
    assert all(torch.equal(before[name], value) for name, value in moe.state_dict().items())
    moe.update_expert_bias(torch.tensor([5, 0, 2, 2, 2, 1]))
    want = 0.001 * torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    assert torch.equal(moe.router.expert_bias, want)


def test_a_bias_that_is_only_held_is_never_moved(build):
    moe = build(config(score_func="sigmoid", expert_bias=True), DIM)
    moe.update_expert_bias(torch.tensor([9, 0, 0, 0, 0, 0]))
    assert not moe.router.expert_bias.any()
    assert build(config(score_func="sigmoid"), DIM).router.expert_bias is None


@CASES
def test_counts_of_the_config_equal_the_built_module(build, inputs, step, cfg):
    moe = build(cfg, DIM)
    one = 3 * DIM * cfg.inter_dim
    assert cfg.num_params(DIM) == sum(p.numel() for p in moe.parameters())
    idle = (cfg.n_routed_experts - cfg.top_k) * one
    assert cfg.num_active_params(DIM) == cfg.num_params(DIM) - idle
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        moe(inputs(2, 5, DIM), step)
    assert counter.get_total_flops() == 10 * cfg.flops_per_token(DIM)


def test_parameter_names_and_shapes_are_those_that_checkpoints_rely_on(build):
    shapes = {name: tuple(value.shape) for name, value in build(V3, DIM).state_dict().items()}
    assert shapes == {
        "router.weight": (6, DIM),
        "router.expert_bias": (6,),
        "experts.w_gate_up": (6, 32, DIM),
        "experts.w_down": (6, DIM, 16),
        "shared.w_gate.weight": (16, DIM),
        "shared.w_up.weight": (16, DIM),
        "shared.w_down.weight": (DIM, 16),
    }


def test_recomputation_gives_the_same_gradients_even_with_ties(build, inputs, step):
    moe = build(V3, DIM)
    with torch.no_grad():
        moe.router.weight[1::2] = moe.router.weight[::2]  # every score comes twice
    x = inputs(2, 5, DIM).requires_grad_()

    def loss(y, routing):
        return y.square().sum() + routing.balance_loss

    want = gradients(loss(*moe(x, step)), moe, x)
    again = loss(*checkpoint(moe, x, step, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(gradients(again, moe, x), want, strict=True))


def test_the_layer_compiles_as_one_graph_with_the_same_gradients(build, inputs, step):
    moe = build(V3, DIM, torch.float32)
    x = inputs(2, 5, DIM, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(lambda x: moe(x, step), fullgraph=True, backend="aot_eager")
    (want, routing), (got, compiled_routing) = moe(x, step), compiled(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled_routing, routing)
    pairs = zip(
        gradients(got.sum() + compiled_routing.balance_loss, moe, x),
        gradients(want.sum() + routing.balance_loss, moe, x),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_autocast_runs_the_experts_in_bf16_and_the_routing_in_float32(build, inputs, step):
    moe = build(V3, DIM, torch.float32, std=0.1)
    x = inputs(2, 5, DIM, dtype=torch.float32)
    want, routing = moe(x, step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, narrow_routing = moe(x, step)
    assert torch.equal(narrow_routing.tokens_per_expert, routing.tokens_per_expert)
    assert torch.equal(narrow_routing.balance_loss, routing.balance_loss)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=3e-2, atol=3e-2 * want.abs().max().item())


def test_shapes_are_known_without_computing(step):
    with FakeTensorMode() as fake, torch.device("cpu"):
        moe = config(n_shared_experts=1, balance=(AuxLossFree(), SeqAuxLoss())).build(DIM)
        x = torch.empty(2, 5, DIM)
        y, routing = moe(x, step)
    assert y.fake_mode is fake
    assert y.shape == x.shape
    assert routing.tokens_per_expert.shape == (6,)


def test_a_layer_can_be_built_on_meta_and_filled_later():
    with torch.device("meta"):
        moe = config(balance=(AuxLossFree(),)).build(DIM)
    moe = moe.to(torch.bfloat16).to_empty(device="cpu")
    assert {tensor.device.type for tensor in moe.state_dict().values()} == {"cpu"}
    assert moe.router.expert_bias.dtype == torch.float32
    assert moe.router.weight.dtype == torch.bfloat16


class Backwards:
    """Another dispatcher: experts work on the rows in the opposite order of tokens."""

    def __init__(self, inner):
        self.inner = inner

    def dispatch(self, x_ND, expert_ids_NK):
        return Backwards(self.inner.dispatch(x_ND.flip(0), expert_ids_NK.flip(0)))

    @property
    def tokens_per_expert(self):
        return self.inner.tokens_per_expert

    @property
    def reach(self):
        return self.inner.reach

    def through(self, experts, gates_NK):
        return self.inner.through(experts, gates_NK.flip(0)).flip(0)


def test_the_dispatcher_of_a_built_layer_can_be_replaced(build, inputs, step):
    moe = build(V3, DIM)
    x = inputs(2, 5, DIM)
    want, routing = moe(x, step)
    moe.dispatcher = Backwards(moe.dispatcher)
    got, other_routing = moe(x, step)
    torch.testing.assert_close(got, want)
    assert torch.equal(other_routing.tokens_per_expert, routing.tokens_per_expert)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"inter_dim": 0}, "inter_dim must be from 1 to 1048576, got 0"),
        ({"n_shared_experts": -1}, "n_shared_experts must be at least 0, got -1"),
        ({"top_k": 7}, "top_k must be at most 6, got 7"),
        ({"balance": (AuxLossFree(), AuxLossFree())}, "aux_loss_free once, got it 2 times"),
    ],
    ids=["inter_dim", "n_shared_experts", "top_k", "balance"],
)
def test_a_layer_that_cannot_be_is_refused_with_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(**changes)
