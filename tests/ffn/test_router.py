"""The routing rules against golden values, against a token-by-token second derivation, on ties."""

import math

import pytest
import torch
from torch import Tensor

from fathom.ffn.router import Router, RouterConfig, route, sqrt_softplus

LOGITS = torch.tensor([[1, -0.5, 0.2, 0.8, -1, 2, 0.5, 0.4]])
BIAS = torch.tensor([0, 0.1, 0, -0.1, 0.3, -0.6, 0, 0.05])


def config(**changes) -> RouterConfig:
    return RouterConfig(**({"n_routed_experts": 8, "top_k": 2} | changes))


V2 = config(n_expert_groups=4, n_limited_groups=2, route_scale=16.0)
V3 = config(
    score_func="sigmoid",
    n_expert_groups=4,
    n_limited_groups=2,
    group_score="top2",
    norm_topk_prob=True,
    route_scale=2.5,
)
PLAIN = config(top_k=3)
CASES = pytest.mark.parametrize("cfg", [V2, V3, PLAIN], ids=["v2", "v3", "plain"])


def logits_for(n_tokens: int, seed: int = 0, n_experts: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_tokens, n_experts, generator=generator)


def route_one(logits: list[float], bias: list[float], cfg: RouterConfig) -> dict[int, float]:
    """One token in plain Python floats: expert id to gate, in the order of choice."""
    if cfg.score_func == "softmax":
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(choice) // cfg.n_expert_groups
    members = [range(g * size, (g + 1) * size) for g in range(cfg.n_expert_groups)]
    n_best = 1 if cfg.group_score == "max" else 2
    worth = [sum(sorted((choice[e] for e in group), reverse=True)[:n_best]) for group in members]
    groups = sorted(range(len(members)), key=lambda g: -worth[g])[: cfg.n_limited_groups]
    allowed = [e for g in sorted(groups) for e in members[g]]
    chosen = sorted(allowed, key=lambda e: -choice[e])[: cfg.top_k]
    total = sum(scores[e] for e in chosen) if cfg.norm_topk_prob else 1.0
    return {e: scores[e] / total * cfg.route_scale for e in chosen}


def test_v3_golden_values():
    choice = route(LOGITS, BIAS, V3)
    assert choice.expert_ids_NK.tolist() == [[0, 7]]
    torch.testing.assert_close(choice.gates_NK, torch.tensor([[1.37443256, 1.12556744]]))


def test_v2_golden_values():
    choice = route(LOGITS, None, V2)
    assert choice.expert_ids_NK.tolist() == [[5, 0]]
    torch.testing.assert_close(choice.gates_NK, torch.tensor([[6.691002, 2.461482]]))


@CASES
def test_every_token_is_routed_as_plain_python_does_it(cfg):
    logits_NE = logits_for(300).double()
    bias_E = 0.2 * logits_for(1, seed=1)[0]
    choice = route(logits_NE, bias_E, cfg)
    for row, ids, gates in zip(logits_NE, choice.expert_ids_NK, choice.gates_NK, strict=True):
        want = route_one(row.tolist(), bias_E.tolist(), cfg)
        assert ids.tolist() == list(want)
        assert gates.tolist() == pytest.approx(list(want.values()), rel=1e-12)


@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize("score_func", ["softmax", "sigmoid", "sqrt_softplus"])
def test_keeping_all_groups_is_no_limit(group_score, score_func):
    rule = {"score_func": score_func, "top_k": 3}
    grouped = config(n_expert_groups=4, n_limited_groups=4, group_score=group_score, **rule)
    for got, want in zip(
        route(logits_for(100), BIAS, grouped),
        route(logits_for(100), BIAS, config(**rule)),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_a_token_never_leaves_its_groups_however_negative_the_bias(group_score):
    cfg = config(top_k=4, n_expert_groups=4, n_limited_groups=2, group_score=group_score)
    ids_NK = route(logits_for(200), BIAS - 5, cfg).expert_ids_NK
    assert all(len({e // 2 for e in ids}) == 2 for ids in ids_NK.tolist())
    assert all(len(set(ids)) == 4 for ids in ids_NK.tolist())


def test_the_max_rule_gives_what_filling_with_zeros_gives():
    scores_NE = logits_for(500).softmax(-1)
    best_NG = scores_NE.view(500, 4, 2).amax(-1)
    outside = best_NG < best_NG.topk(2).values[:, -1:]
    filled_NE = scores_NE.view(500, 4, 2).masked_fill(outside[..., None], 0.0).flatten(1)
    want = filled_NE.topk(2)
    choice = route(logits_for(500), None, V2)
    assert torch.equal(choice.expert_ids_NK, want.indices)
    assert torch.equal(choice.gates_NK, want.values * 16)


@CASES
def test_equal_scores_go_to_the_lowest_index(cfg):
    ids_NK = route(torch.zeros(5, 8), None, cfg).expert_ids_NK
    assert ids_NK.tolist() == [list(range(cfg.top_k))] * 5


def test_the_bias_moves_the_choice_but_not_the_gates():
    bias_E = torch.zeros(8).index_fill(0, torch.tensor([4]), 10.0)
    choice = route(LOGITS, bias_E, config(score_func="sigmoid"))
    assert choice.expert_ids_NK.tolist() == [[4, 5]]
    assert torch.equal(choice.gates_NK, LOGITS.sigmoid()[:, [4, 5]])


def test_an_equal_bias_for_all_changes_nothing():
    for got, want in zip(
        route(logits_for(50), torch.full((8,), -3.0), V3),
        route(logits_for(50), None, V3),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid", "sqrt_softplus"])
def test_normalised_gates_sum_to_the_scale(score_func):
    cfg = config(score_func=score_func, norm_topk_prob=True, route_scale=2.5, top_k=3)
    gates_NK = route(logits_for(50), None, cfg).gates_NK
    torch.testing.assert_close(gates_NK.sum(-1), torch.full((50,), 2.5))


def test_the_gate_of_a_single_softmax_expert_is_exactly_one():
    choice = route(logits_for(9, n_experts=1), None, config(n_routed_experts=1, top_k=1))
    assert torch.equal(choice.gates_NK, torch.ones(9, 1))


@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("score_func", ["softmax", "sigmoid", "sqrt_softplus"])
def test_gradients_of_the_gates_agree_with_finite_differences(score_func, norm):
    cfg = config(score_func=score_func, norm_topk_prob=norm, route_scale=2.0, top_k=3)
    logits_NE = logits_for(4, seed=3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: route(x, BIAS, cfg)[1:], (logits_NE,))


def test_sqrt_softplus_and_its_slope_are_finite_everywhere():
    x = torch.tensor([-1e4, -200.0, -50.0, 0.0, 50.0, 1e4]).requires_grad_()
    y = sqrt_softplus(x)
    y.sum().backward()
    assert y[3].item() == pytest.approx(math.sqrt(math.log(2)))
    assert y[5].item() == pytest.approx(100.0)
    assert x.grad is not None
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


def built_router(dtype: torch.dtype = torch.float32, *, expert_bias: bool = True) -> Router:
    router = Router(V3, 16, expert_bias=expert_bias)
    with torch.no_grad():
        router.weight.copy_(torch.randn(8, 16, generator=torch.Generator().manual_seed(5)))
    return router.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_float32_products_whatever_the_dtype(dtype):
    router = built_router(dtype)
    x = logits_for(20, n_experts=16).to(dtype)
    choice = router(x)
    assert router.weight.dtype == dtype
    assert torch.equal(choice.logits_NE, x.float() @ router.weight.float().T)
    assert choice.gates_NK.dtype == torch.float32


def test_autocast_does_not_reach_the_router():
    router = built_router()
    x = logits_for(20, n_experts=16)
    want = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = router(x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_leaves_the_bias_in_float32_to_the_last_bit(dtype):
    router = built_router()
    assert router.expert_bias is not None
    router.expert_bias += torch.linspace(0.001, 0.1234567, 8)
    want = router.expert_bias.clone()
    router.to(dtype)
    assert router.weight.dtype == dtype
    assert router.expert_bias.dtype == torch.float32
    assert torch.equal(router.expert_bias, want)


def test_the_bias_follows_to_other_devices_and_back_from_meta():
    router = built_router().to("meta", torch.bfloat16)
    assert router.expert_bias is not None
    assert router.expert_bias.device.type == "meta"
    assert router.expert_bias.dtype == torch.float32
    router.to_empty(device="cpu")
    assert router.expert_bias.device.type == "cpu"
    assert router.expert_bias.dtype == torch.float32


def test_the_bias_is_saved_where_there_is_one():
    assert set(built_router().state_dict()) == {"weight", "expert_bias"}
    without = built_router(expert_bias=False)
    assert set(without.state_dict()) == {"weight"}
    assert without.expert_bias is None
    assert [name for name, _ in built_router().named_parameters()] == ["weight"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_routed_experts": 0}, "n_routed_experts must be at least 1, got 0"),
        ({"n_routed_experts": 4097}, "n_routed_experts must be at most 4096, got 4097"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": 9}, "top_k must be at most 8, got 9: a token may use 1 of 1 groups of 8"),
        ({"n_expert_groups": 3}, "n_expert_groups must divide n_routed_experts .8., got 3"),
        ({"n_limited_groups": 2}, "n_limited_groups must be at most n_expert_groups .1., got 2"),
        ({"n_expert_groups": 8, "group_score": "top2"}, "groups of at least 2 experts, got 1"),
        (
            {"n_expert_groups": 4, "n_limited_groups": 2, "top_k": 5},
            "top_k must be at most 4, got 5: a token may use 2 of 4 groups of 2 experts",
        ),
        ({"route_scale": 0.0}, "route_scale must be a positive number, got 0.0"),
        ({"route_scale": math.nan}, "route_scale must be a positive number, got nan"),
        ({"route_scale": math.inf}, "route_scale must be a positive number, got inf"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_rule_that_cannot_be_is_refused_with_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(**changes)
