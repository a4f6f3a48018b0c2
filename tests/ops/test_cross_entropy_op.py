"""The loss of a linear head: equal to torch's on whole logits, in any number of chunks."""

import weakref

import pytest
import torch
from torch.library import opcheck
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fathom.ops.cross_entropy import (
    CPU_ROWS,
    linear_cross_entropy,
    loss_and_gradients,
    rows_per_chunk,
    token_cross_entropy,
)

CASES = {"none": (0, 3, 5), "one": (1, 1, 1), "odd": (13, 7, 5), "wide": (130, 300, 8)}  # N, V, D
CHUNKS = {"one-row": 1, "some-rows": 40_000, "all": 2**30}


def head(case, device="cpu", dtype=torch.float32):
    tokens, vocab, width = case
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    w = torch.randn(vocab, width, device=device, dtype=dtype)
    targets = torch.randint(0, vocab, (tokens,), device=device)
    targets[1::4] = -100
    return x, w, targets


def whole(x, w, targets):
    return cross_entropy(x @ w.T, targets, reduction="sum")


@pytest.mark.parametrize("max_bytes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sum_and_gradients_are_those_of_whole_logits(case, max_bytes, agree, device):
    inputs = head(case, device)
    agree(
        lambda *a: 3 * linear_cross_entropy(*a, max_bytes=max_bytes),
        lambda *a: 3 * whole(*a),
        inputs,
    )


@pytest.mark.parametrize("max_bytes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_token_losses_are_those_of_whole_logits(case, max_bytes, device):
    x, w, targets = head(case, device)
    want = cross_entropy(x.double() @ w.double().T, targets, reduction="none")
    got = token_cross_entropy(x, w, targets, max_bytes=max_bytes)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_bytes", [1, 2**30])
def test_gradients_agree_with_finite_differences(max_bytes):
    x, w, targets = head(CASES["odd"], dtype=torch.float64)
    inputs = (x.requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, targets, max_bytes=max_bytes), inputs
    )


@pytest.mark.parametrize("size", [0.0, 1e3, 1e30])
def test_extreme_logits_neither_overflow_nor_lose_the_loss(size):
    x = torch.tensor([[size, -size], [-size, size]], requires_grad=True)
    w, targets = torch.eye(2).requires_grad_(), torch.tensor([0, 0])
    loss = linear_cross_entropy(x, w, targets)
    loss.backward()
    want = torch.log1p(torch.tensor(-2 * size).exp()) * 2 + 2 * size
    torch.testing.assert_close(loss.detach(), want)
    assert x.grad.isfinite().all()


def test_a_sure_tokens_gradient_keeps_its_digits_in_bfloat16():
    x = torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    w = torch.eye(2, dtype=torch.bfloat16)
    linear_cross_entropy(x, w, torch.tensor([0])).backward()
    doubt = torch.sigmoid(torch.tensor(-8.0, dtype=torch.float64))
    torch.testing.assert_close(x.grad[0, 0].double(), -doubt, rtol=2**-8, atol=0)


@pytest.mark.parametrize("max_bytes", [20_000, 2**30])
def test_bfloat16_is_close_to_float64(max_bytes, device):
    x, w, targets = head(CASES["wide"], device, torch.bfloat16)
    wide = [t.double().requires_grad_() for t in (x, w)]
    want = whole(*wide, targets)
    x.requires_grad_()
    w.requires_grad_()
    got = linear_cross_entropy(x, w, targets, max_bytes=max_bytes)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=2e-3)
    found, expected = torch.autograd.grad(got, (x, w)), torch.autograd.grad(want, wide)
    for a, b in zip(found, expected, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 1e-2


def test_the_incoming_gradient_is_not_rounded_to_bfloat16():
    x, w, targets = head(CASES["odd"], dtype=torch.bfloat16)
    x.requires_grad_()
    plain = torch.autograd.grad(linear_cross_entropy(x, w, targets), x)[0]
    factor = torch.tensor(1 / 3)
    scaled = torch.autograd.grad(linear_cross_entropy(x, w, targets) * factor, x)[0]
    assert torch.equal(scaled, (plain.float() * factor).bfloat16())


def test_ignored_rows_give_nothing_and_get_nothing():
    x, w, targets = head(CASES["odd"])
    x.requires_grad_()
    w.requires_grad_()
    loss = linear_cross_entropy(x, w, torch.full_like(targets, 9), ignore_index=9)
    loss.backward()
    assert loss == 0
    assert not x.grad.any()
    assert not w.grad.any()
    assert not token_cross_entropy(x, w, torch.full_like(targets, -100)).any()


class LargestLogits(TorchDispatchMode):
    """The most bytes that tensors of ``vocab`` columns held at one time."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.live, self.peak = vocab, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.dim() == 2 and t.shape[1] == self.vocab:
                storage = t.untyped_storage()
                self.live[storage.data_ptr()] = (weakref.ref(t), storage.nbytes())
        self.live = {key: value for key, value in self.live.items() if value[0]() is not None}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [False, True])
def test_no_more_logits_than_allowed_exist_at_a_time(dtype, train):
    x, w, targets = head((700, 97, 8), dtype=dtype)
    limit = 60_000
    assert limit < rows_per_chunk(x, w, 2**30, "torch") * 97 * dtype.itemsize  # the limit binds
    with LargestLogits(97) as seen:
        loss_and_gradients(x, w, targets, limit, -100, train, train, "torch")
    assert limit / 3 < seen.peak <= limit


def test_chunks_are_whole_tiles_and_on_the_cpu_stay_in_cache():
    x, w = torch.empty(10_000, 8, device="meta"), torch.empty(1000, 8, device="meta")
    assert rows_per_chunk(x, w, 2**20, "torch") == 256  # 262 rows fit
    assert rows_per_chunk(x, w, 400_000, "torch") == 100
    assert rows_per_chunk(x, w, 1, "torch") == 1
    assert rows_per_chunk(x.bfloat16(), w.bfloat16(), 2500 * 4096, "torch") == 4096
    assert rows_per_chunk(torch.empty(1, 8), torch.empty(1000, 8), 2**30, "torch") == CPU_ROWS


@pytest.mark.parametrize("train", ["neither", "x", "w", "both"])
def test_flops_are_one_matmul_and_one_for_each_gradient(train):
    x, w, targets = head(CASES["odd"])
    x.requires_grad_(train in ("x", "both"))
    w.requires_grad_(train in ("w", "both"))
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(x, w, targets, max_bytes=100)
        if train != "neither":
            loss.backward()
    matmuls = {"neither": 1, "x": 2, "w": 2, "both": 3}[train]
    assert counter.get_total_flops() == matmuls * 2 * 13 * 7 * 5
    with FlopCounterMode(display=False) as counter:
        token_cross_entropy(x, w, targets)
    assert counter.get_total_flops() == 2 * 13 * 7 * 5


def test_no_gradient_is_computed_under_no_grad():
    x, w, targets = head(CASES["odd"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert not linear_cross_entropy(x.requires_grad_(), w, targets).requires_grad
    assert counter.get_total_flops() == 2 * 13 * 7 * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_pass_opcheck(dtype):
    x, w, targets = head(CASES["odd"], dtype=dtype)
    opcheck(torch.ops.fathom.token_cross_entropy.default, (x, w, targets, 100, -100, "torch"))
    inputs = (x.requires_grad_(), w.requires_grad_(), targets, 100, -100, True, True, "torch")
    opcheck(torch.ops.fathom.linear_cross_entropy.default, inputs)


def test_autocast_makes_the_matmuls_bfloat16_and_the_loss_float32():
    x, w, targets = head(CASES["wide"])
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, w, targets)
    loss.backward()
    narrow = linear_cross_entropy(x.bfloat16(), w.bfloat16(), targets)
    assert loss.dtype == x.grad.dtype == torch.float32
    assert torch.equal(loss, narrow)


@pytest.mark.gpu
def test_cuda_does_not_wait():
    x, w, targets = head((1000, 5000, 64), "cuda", torch.bfloat16)
    x.requires_grad_()
    w.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(x, w, targets, max_bytes=2**20).backward()
        token_cross_entropy(x, w, targets, max_bytes=2**20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad.isfinite().all()
