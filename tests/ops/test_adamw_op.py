"""AdamW's step by definition is torch's; what keeps the kernel from it is said."""

import re

import pytest
import torch

from fathom.ops.adamw import ADAMW, _adamw, adamw
from fathom.ops.rounding import joined, split

BETAS = (0.8, 0.95)


def columns(dtype=torch.float64, sizes=((5, 3), (7,))):
    generator = torch.Generator().manual_seed(3)
    draw = [[torch.randn(s, generator=generator, dtype=dtype) for s in sizes] for _ in range(2)]
    moments = [[torch.zeros(s, dtype=dtype) for s in sizes] for _ in range(2)]
    return [*draw, *moments, [torch.zeros(()) for _ in sizes]]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_three_steps_are_those_of_torchs_optimizer(impl, scale):
    ours = columns()
    theirs = [torch.nn.Parameter(p.clone()) for p in ours[0]]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(theirs, (0.1, 0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=BETAS, eps=1e-6, foreach=False)
    for step in range(3):
        for grad, twin in zip(ours[1], theirs, strict=True):
            grad.copy_((grad + step).sin())
            twin.grad = grad * (1 if scale is None else scale)
        adamw(
            *ours,
            decays=[0.1, 0.0],
            lr=0.02,
            betas=BETAS,
            eps=1e-6,
            skip=torch.zeros(()),
            scale=None if scale is None else torch.tensor(scale),
            impl=impl,
        )
        optimizer.step()
    for p, twin, step in zip(ours[0], theirs, ours[4], strict=True):
        torch.testing.assert_close(p, twin.data, rtol=1e-12, atol=1e-14)
        assert step == 3


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_skipped_step_changes_nothing_even_by_gradients_that_are_no_numbers(impl):
    ours, before = columns(torch.float32), columns(torch.float32)
    for grad in ours[1]:
        grad.fill_(torch.nan)
    options = {"lr": 0.1, "betas": BETAS, "eps": 1e-6, "skip": torch.ones(()), "impl": impl}
    adamw(*ours, decays=[0.1, 0.1], scale=torch.tensor(torch.nan), **options)
    for row in (0, 2, 3, 4):
        assert all(torch.equal(a, b) for a, b in zip(ours[row], before[row], strict=True))


def test_no_tensors_are_no_work():
    options = {"lr": 0.1, "betas": BETAS, "eps": 1e-6, "skip": torch.zeros(())}
    adamw([], [], [], [], [], decays=[], **options)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(2, dtype=torch.float64), "needs bfloat16, float16 or float32, got .*float64"),
        (torch.zeros(2, 3).T, "needs contiguous parameters and moments"),
    ],
)
def test_the_kernel_says_what_it_needs(tensor, words):
    pytest.importorskip("triton")
    reason = ADAMW.why_not("triton", "cuda", torch.float32, torch.zeros(2), tensor)
    assert re.search(words, reason)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is interpreted without CUDA")
def test_the_op_says_what_it_changes():
    pytest.importorskip("triton")
    state = columns(torch.float32)
    scalars = torch.tensor(0.1), torch.zeros(()), None, *BETAS, 1e-6, [], None
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(_adamw, (*state, [0.1, 0.0], *scalars), test_utils=checks)


def narrow(times, **how):
    """bfloat16 parameters near 1 after steps of 1e-5, which is far below half of 2**-8."""
    p = torch.linspace(1, 1.9, 4096).bfloat16()
    state = [[p], [-torch.ones_like(p)], [torch.zeros_like(p)], [torch.zeros_like(p)]]
    options = {"lr": 1e-5, "betas": BETAS, "eps": 1e-8, "skip": torch.zeros(())}
    count = torch.zeros(())
    for _ in range(times):
        adamw(*state, [count], decays=[0.0], **options, **how)
    return p.float() - torch.linspace(1, 1.9, 4096).bfloat16().float()


def test_small_steps_are_lost_to_the_nearest_and_kept_by_chance_or_in_lower_halves():
    lows = [torch.zeros(4096, dtype=torch.int16)]
    assert narrow(100).abs().max() == 0
    assert narrow(100, seed=1).mean() == pytest.approx(1e-3, rel=0.1)
    assert narrow(1000, lows=lows).mean() == pytest.approx(1e-2, abs=2**-8)


def test_chance_is_that_of_seed_parameter_and_step_alone():
    assert torch.equal(narrow(20, seed=1), narrow(20, seed=1))
    assert not torch.equal(narrow(20, seed=1), narrow(20, seed=2))


def test_parameters_with_lower_halves_are_float32_parameters_bit_by_bit():
    wide, halves = columns(torch.float32), columns(torch.float32)
    halves[0], lows = map(list, zip(*map(split, wide[0]), strict=True))
    options = {"lr": 1e-3, "betas": BETAS, "eps": 1e-6, "skip": torch.zeros(())}
    for _ in range(5):
        adamw(*wide, decays=[0.1, 0.0], impl="reference", **options)
        adamw(*halves, decays=[0.1, 0.0], lows=lows, **options)
    for p, high, low in zip(wide[0], halves[0], lows, strict=True):
        assert torch.equal(p, joined(high, low))
        assert (p - high.float()).abs().max() <= p.abs().max() * 2**-8


def test_pytorchs_step_is_refused_where_it_cannot_round_so():
    with pytest.raises(ValueError, match="impl='torch' is not known to adamw"):
        narrow(1, seed=0, impl="torch")
