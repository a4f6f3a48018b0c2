"""The lightning indexer: selection with its ties and borders, and the loss that trains it."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fathom.ops import chunks
from fathom.ops.indexer import hadamard, index_loss, index_scores, index_topk, quantise_rows

B, T, J, W, H, G, Q = 2, 13, 3, 6, 4, 2, 5
BEGINS = torch.tensor([[0] * 5 + [5] * 8, [0] * 1 + [1] * 12])  # two documents a row


def arrays(dtype=torch.float64, n_keys: int = T) -> tuple[Tensor, ...]:
    shapes = (B, T, J, W), (B, n_keys, W), (B, T, J), (B, T, H, Q), (B, n_keys, G, Q)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def places() -> Tensor:
    return torch.arange(T).expand(B, T)


def by_hand(scores: Tensor, place: int, begin: int, topk: int) -> set[int]:
    """The best of the visible tokens, the lower of equals."""
    seen = sorted(range(begin, place + 1), key=lambda s: (-scores[s].item(), s))
    return set(seen[:topk])


@pytest.mark.parametrize("numbers", [1, 10**9], ids=["a-query-a-chunk", "one-chunk"])
@pytest.mark.parametrize("shut", [False, True], ids=["scores", "all-scores-equal"])
@pytest.mark.parametrize("topk", [1, 4, 99])
def test_the_best_visible_tokens_are_selected_and_the_lower_of_equals(
    numbers, shut, topk, monkeypatch
):
    monkeypatch.setattr(chunks, "CHUNK_NUMBERS", numbers)
    q, k, weight, *_ = arrays()
    weight = weight * 0 if shut else weight
    selected = index_topk(q, k, weight, places(), BEGINS, topk=topk)
    assert selected.shape == (B, T, min(topk, T))
    assert selected.dtype == torch.int32
    scores = index_scores(q, k, weight)
    for b in range(B):
        for t in range(T):
            got = [s for s in selected[b, t].tolist() if s >= 0]
            assert set(got) == by_hand(scores[b, t], t, int(BEGINS[b, t]), topk)
            assert len(got) == len(set(got))


def test_scores_are_weighted_relus_of_dot_products():
    q, k, weight, *_ = arrays()
    want = torch.zeros(B, T, T, dtype=torch.float64)
    for j in range(J):
        for b in range(B):
            want[b] += weight[b, :, j, None] * (q[b, :, j] @ k[b].T).clamp(min=0)
    torch.testing.assert_close(index_scores(q, k, weight), want)


def test_the_hadamard_transform_keeps_dot_products_and_spreads_a_spike():
    a, b = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(hadamard(a) @ hadamard(b).T, a @ b.T)
    spike = torch.zeros(16)
    spike[3] = 8
    assert hadamard(spike).abs().tolist() == [2.0] * 16


def test_quantised_rows_differ_by_a_sixteenth_at_most_and_their_factors_are_powers_of_two():
    x = torch.randn(50, 32) * 10 ** torch.linspace(-2, 3, 50)[:, None]
    small, scale = quantise_rows(x)
    assert torch.equal(scale.log2(), scale.log2().round())
    back = small.float() * scale[:, None]
    largest = x.abs().amax(-1, keepdim=True)
    assert ((back - x).abs() <= x.abs() / 16 + largest * 2**-16).all()
    assert (small.float().abs().amax(-1) > 220).all()  # the range is used


def test_scores_in_fp8_select_nearly_the_same_tokens():
    torch.manual_seed(0)
    q, k, weight = torch.randn(1, 64, 16, 32), torch.randn(1, 64, 32), torch.randn(1, 64, 16)
    at = torch.arange(64)[None]
    want = index_topk(q, k, weight, at, at * 0, topk=16)
    (q8, q_scale), (k8, k_scale) = quantise_rows(hadamard(q)), quantise_rows(hadamard(k))
    found = index_topk(q8, k8, weight * q_scale, at, at * 0, topk=16, k_scale_BS=k_scale)
    same = (found[0, 16:, :, None] == want[0, 16:, None]).any(-1).float().mean().item()
    assert 0.9 < same < 1


def expected_loss(
    q: Tensor, k: Tensor, weight: Tensor, main_q: Tensor, main_k: Tensor, selected: Tensor | None
) -> Tensor:
    """KL, one query at a time, by autograd."""
    scores, total = index_scores(q, k, weight), torch.zeros((), dtype=q.dtype)
    for b in range(B):
        for t in range(T):
            keys = list(range(int(BEGINS[b, t]), t + 1))
            if selected is not None:
                keys = [s for s in selected[b, t].tolist() if s >= 0]
            logits = [0.7 * main_k[b, keys, h // (H // G)] @ main_q[b, t, h] for h in range(H)]
            target = torch.stack([row.softmax(0) for row in logits]).mean(0).detach()
            log = scores[b, t, keys].log_softmax(0)
            total = total + (target * (target.log() - log)).sum()
    return total / (B * T)


@pytest.mark.parametrize("numbers", [1, 10**9], ids=["a-query-a-chunk", "one-chunk"])
@pytest.mark.parametrize("sparse", [False, True], ids=["all", "selected"])
def test_the_loss_and_its_gradients_are_those_of_the_kl(sparse, numbers, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_NUMBERS", numbers)
    inputs = arrays()
    selected = index_topk(*inputs[:3], places(), BEGINS, topk=4) if sparse else None
    leaves = [t.clone().requires_grad_() for t in inputs]
    got = index_loss(*leaves, places(), BEGINS, scale=0.7, selected_BTN=selected)
    want = expected_loss(*leaves, selected)
    torch.testing.assert_close(got, want)
    found = torch.autograd.grad(3 * got, leaves, allow_unused=True)
    wanted = torch.autograd.grad(3 * want, leaves, allow_unused=True)
    assert found[3:] == wanted[3:] == (None, None)  # the target is fixed
    for a, b in zip(found[:3], wanted[:3], strict=True):
        torch.testing.assert_close(a, b)


def test_a_single_visible_token_costs_nothing():
    q, k, weight, main_q, main_k = (t.requires_grad_() for t in arrays())
    loss = index_loss(q, k, weight, main_q, main_k, places(), places(), scale=1.0)
    grads = torch.autograd.grad(loss, (q, k, weight))
    assert loss == 0
    assert not any(grad.abs().max() for grad in grads)


class Largest(TorchDispatchMode):
    """The most floating-point numbers that one tensor held."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.is_floating_point():
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("sparse", [False, True], ids=["all", "selected"])
def test_no_matrix_of_all_queries_and_keys_is_made(sparse, monkeypatch):
    """At 256 tokens such a matrix has 65,536 numbers; a chunk here may have 20,000."""
    monkeypatch.setattr(chunks, "CHUNK_NUMBERS", 20_000)
    n = 256
    q, k, weight = torch.randn(1, n, 2, 4), torch.randn(1, n, 4), torch.randn(1, n, 2)
    main_q, main_k, at = torch.randn(1, n, 2, 4), torch.randn(1, n, 1, 4), torch.arange(n)[None]
    q.requires_grad_()
    with Largest() as largest:
        selected = index_topk(q, k, weight, at, at * 0, topk=8)
        chosen = selected if sparse else None
        index_loss(q, k, weight, main_q, main_k, at, at * 0, scale=1.0, selected_BTN=chosen)
    assert largest.numel <= 20_000


def test_flops_are_those_of_the_scores():
    q, k, weight, main_q, main_k = arrays(torch.float32)
    with FlopCounterMode(display=False) as counter:
        selected = index_topk(q, k, weight, places(), BEGINS, topk=4)
    assert counter.get_total_flops() == 2 * B * T * T * J * (W + 1)
    with FlopCounterMode(display=False) as counter:
        index_loss(q, k, weight, main_q, main_k, places(), BEGINS, scale=1.0, selected_BTN=selected)
    assert counter.get_total_flops() == 2 * B * T * 4 * (J * W + H * Q)


def test_impossible_requests_are_refused():
    q, k, weight, *_ = arrays()
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        index_topk(q, k, weight, places(), BEGINS, topk=0)
    with pytest.raises(ValueError, match="impl='triton' cannot run"):
        index_topk(q, k, weight, places(), BEGINS, topk=1, impl="triton")
