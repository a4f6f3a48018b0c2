"""Balance losses against values worked out by hand, the loss-free bias against a published run."""

import math

import pytest
import torch
from torch import Tensor

from fathom.ffn.balance import (
    AuxLoss,
    AuxLossFree,
    NoBalance,
    SeqAuxLoss,
    ZLoss,
    dead_experts,
    load_entropy,
    max_violation,
    score_entropy,
)
from fathom.ffn.moe import MoEConfig
from fathom.ffn.router import Choice, RouterConfig, route
from fathom.settings import ConfigError, parse, to_data


def choice_of(scores: list[list[float]], ids: list[list[int]]) -> Choice:
    scores_NE = torch.tensor(scores, dtype=torch.float64)
    ids_NK = torch.tensor(ids)
    return Choice(ids_NK, scores_NE.gather(1, ids_NK), scores_NE, scores_NE.log())


# Two rows of two tokens, E = 3, K = 1. f = E/(K T) * counts.
# Row 0: ids 0, 0 -> f = (3, 0, 0);    P = (.55, .30, .15) -> 1.65
# Row 1: ids 1, 2 -> f = (0, 1.5, 1.5); P = (.15, .50, .35) -> 1.275
# Batch: counts (2, 1, 1) -> f = (1.5, .75, .75); P = (.35, .40, .25) -> .525 + .3 + .1875 = 1.0125
SCORES = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]
CHOICE = choice_of(SCORES, [[0], [0], [1], [2]])


def test_aux_loss_of_a_batch_by_hand():
    loss = AuxLoss(aux_loss_coeff=0.1).loss(CHOICE, batch_size=2)
    assert loss.item() == pytest.approx(0.10125, rel=1e-12)


def test_aux_loss_over_the_step_counts_the_micro_batches_before_by_hand():
    # counts (2, 1, 1) + (0, 4, 0) = (2, 5, 1), f = 3/8 of it; P = (.35, .40, .25)
    moe = MoEConfig(
        n_routed_experts=3,
        top_k=1,
        inter_dim=2,
        balance=(AuxLoss(aux_loss_coeff=1.0, over="step"), AuxLoss(aux_loss_coeff=1.0)),
    ).build(4)
    assert moe.balance_loss(CHOICE, 2).item() == pytest.approx(2 * 1.0125, rel=1e-12)
    moe.counts_before = torch.tensor([0, 4, 0])
    over_step = 3 / 8 * (2 * 0.35 + 5 * 0.40 + 0.25)
    assert moe.balance_loss(CHOICE, 2).item() == pytest.approx(over_step + 1.0125, rel=1e-12)


def test_sequence_wise_loss_of_two_rows_by_hand():
    loss = SeqAuxLoss(seq_aux_loss_coeff=0.1).loss(CHOICE, batch_size=2)
    assert loss.item() == pytest.approx(0.1 * (1.65 + 1.275) / 2, rel=1e-12)


def test_two_choices_per_token_count_half_each():
    # K = 2: counts (2, 2, 0), f = 3/(2*2) * counts = (1.5, 1.5, 0); P = (.55, .30, .15)
    loss = AuxLoss(aux_loss_coeff=1.0).loss(choice_of(SCORES[:2], [[0, 1], [1, 0]]), 1)
    assert loss.item() == pytest.approx(1.5 * 0.85, rel=1e-12)


def test_sigmoid_scores_count_by_their_share():
    # shares of (.9, .3) are (.75, .25); both tokens at expert 0: f = (2, 0)
    choice = choice_of([[0.9, 0.3], [0.6, 0.2]], [[0], [0]])
    for loss in (AuxLoss(aux_loss_coeff=1.0), SeqAuxLoss(seq_aux_loss_coeff=1.0)):
        assert loss.loss(choice, 1).item() == pytest.approx(1.5, rel=1e-12)


def test_even_use_costs_exactly_the_coefficient():
    logits_NE = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids_NK = torch.arange(8)[:, None] % 4
    choice = Choice(ids_NK, ids_NK, logits_NE.softmax(-1), logits_NE)
    assert AuxLoss(aux_loss_coeff=0.01).loss(choice, 2).item() == pytest.approx(0.01, rel=1e-12)
    assert SeqAuxLoss(seq_aux_loss_coeff=0.01).loss(choice, 2).item() == pytest.approx(0.01)


def test_rows_that_use_different_experts_are_even_as_a_batch_but_not_each():
    one_hot = torch.eye(2).repeat_interleave(3, 0).tolist()
    choice = choice_of(one_hot, [[0]] * 3 + [[1]] * 3)
    assert AuxLoss(aux_loss_coeff=1.0).loss(choice, 2).item() == 1.0
    assert SeqAuxLoss(seq_aux_loss_coeff=1.0).loss(choice, 2).item() == 2.0


def test_the_gradient_goes_through_the_scores_alone():
    # d/ds_te of sum_e f_e mean_t s_te / sum_j s_tj, with sums 1: (f_e - sum_j f_j s_tj) / N
    scores_NE = CHOICE.scores_NE.clone().requires_grad_()
    AuxLoss(aux_loss_coeff=1.0).loss(CHOICE._replace(scores_NE=scores_NE), 1).backward()
    f_E = torch.tensor([1.5, 0.75, 0.75], dtype=torch.float64)
    want = (f_E - (CHOICE.scores_NE * f_E).sum(-1, keepdim=True)) / 4
    torch.testing.assert_close(scores_NE.grad, want)


def test_z_loss_by_hand():
    # logsumexp of two zeros is log 2; of (log 3, log 1) log 4
    logits_NE = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    loss = ZLoss(z_loss_coeff=0.5).loss(CHOICE._replace(logits_NE=logits_NE), 1)
    assert loss.item() == pytest.approx(0.25 * (math.log(2) ** 2 + math.log(4) ** 2), rel=1e-12)


@pytest.mark.parametrize("way", [NoBalance(), AuxLossFree()], ids=["none", "aux_loss_free"])
def test_no_loss_where_none_is_due(way):
    assert way.loss(CHOICE, 2).item() == 0.0


@pytest.mark.parametrize("way", [AuxLoss(), SeqAuxLoss(), ZLoss()], ids=lambda way: way.kind)
@pytest.mark.parametrize("batch_size", [0, 2])
def test_no_tokens_cost_nothing_and_can_be_differentiated(way, batch_size):
    logits_NE = torch.zeros(0, 3, requires_grad=True)
    choice = route(logits_NE, None, RouterConfig(n_routed_experts=3, top_k=2))
    loss = way.loss(choice, batch_size)
    loss.backward()
    assert loss.item() == 0.0


def test_one_bias_step_by_hand():
    step_E = AuxLossFree(bias_update_speed=0.01).bias_step(torch.tensor([3, 1, 2, 2]))
    torch.testing.assert_close(step_E, torch.tensor([-0.01, 0.01, 0.0, 0.0]))


def test_the_bias_step_is_exact_for_counts_beyond_float_precision():
    counts_E = torch.tensor([2**60 + 1, 2**60, 2**60 - 1])
    assert AuxLossFree(bias_update_speed=1.0).bias_step(counts_E).tolist() == [-1.0, 0.0, 1.0]


def published_run(steps: int) -> tuple[Tensor, Tensor]:
    """E 64, K 6, 8192 tokens a step, a Gaussian offset of 0.5 per expert, u = 1e-3."""
    cfg = RouterConfig(n_routed_experts=64, top_k=6, score_func="sigmoid")
    generator = torch.Generator().manual_seed(0)
    offset_E = 0.5 * torch.randn(64, generator=generator)
    bias_E, counts = torch.zeros(64), []
    for _ in range(steps):
        logits_NE = torch.randn(8192, 64, generator=generator) + offset_E
        ids_NK = route(logits_NE, bias_E, cfg).expert_ids_NK
        counts.append(torch.bincount(ids_NK.flatten(), minlength=64))
        bias_E += AuxLossFree().bias_step(counts[-1])
    return torch.stack(counts), bias_E


def test_the_loss_free_bias_evens_out_an_unbalanced_router():
    counts_SE, bias_E = published_run(220)
    violations = max_violation(counts_SE)  # published: 5.09, then 2.40, then about 0.08
    assert violations[0].item() == pytest.approx(5.09, abs=0.1)
    assert violations[100].item() == pytest.approx(2.40, abs=0.1)
    assert violations[200:].mean() < 0.1
    assert max_violation(counts_SE[200:].sum(0)) < 0.05  # the rest is each batch's own noise
    assert -0.2 < bias_E.min() < bias_E.max() < 0.27


def test_metrics_by_hand():
    counts_E = torch.tensor([6, 0, 2, 0])
    assert max_violation(counts_E).item() == 2.0
    assert dead_experts(counts_E).item() == 2
    want = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert load_entropy(counts_E).item() == pytest.approx(want)


def test_metrics_of_even_use_and_of_no_use():
    counts_LE = torch.tensor([[5, 5, 5], [0, 0, 0]])
    assert max_violation(counts_LE).tolist() == [0.0, 0.0]
    assert dead_experts(counts_LE).tolist() == [0, 3]
    assert load_entropy(counts_LE).tolist() == pytest.approx([math.log(3), 0.0])


def test_score_entropy_is_of_the_shares():
    assert score_entropy(torch.full((5, 4), 0.7)).item() == pytest.approx(math.log(4))
    assert score_entropy(torch.eye(3)).item() == 0.0
    assert score_entropy(torch.zeros(0, 4)).item() == 0.0
    mixed = score_entropy(torch.tensor([[1.0, 1.0], [1.0, 0.0]])).item()
    assert mixed == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize(
    ("cls", "field"),
    [
        (AuxLoss, "aux_loss_coeff"),
        (SeqAuxLoss, "seq_aux_loss_coeff"),
        (AuxLossFree, "bias_update_speed"),
        (ZLoss, "z_loss_coeff"),
    ],
)
def test_a_negative_or_endless_coefficient_is_refused(cls, field):
    for value in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"{field} must be a number of at least 0, got"):
            cls(**{field: value})
    assert getattr(cls(**{field: 0.0}), field) == 0.0


def moe_data(*balance: dict[str, object]) -> dict[str, object]:
    sizes = {"n_routed_experts": 4, "top_k": 2, "inter_dim": 8}
    return {"kind": "moe", **sizes, "balance": list(balance)}


def test_a_config_file_may_combine_ways_by_their_kind():
    data = moe_data({"kind": "seq_aux_loss", "seq_aux_loss_coeff": 0.01}, {"kind": "aux_loss_free"})
    cfg = parse(MoEConfig, data)
    assert cfg.balance == (SeqAuxLoss(seq_aux_loss_coeff=0.01), AuxLossFree())
    assert parse(MoEConfig, to_data(cfg)) == cfg


@pytest.mark.parametrize(
    ("balance", "sentence"),
    [
        ([{"kind": "aux_losss"}], "kind cannot be 'aux_losss': the kinds are 'none', 'aux_loss'"),
        ([{"kind": "z_loss", "z_loss_coef": 1.0}], "did you mean z_loss_coeff"),
        ([{"kind": "aux_loss_free"}] * 2, "may hold aux_loss_free once, got it 2 times"),
        ([{"kind": "aux_loss", "aux_loss_coeff": -1.0}], "aux_loss_coeff must be a number of at"),
    ],
)
def test_a_balance_that_cannot_be_is_refused_with_a_sentence(balance, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse(MoEConfig, moe_data(*balance))
