"""AdamW's kernel: float64's numbers, every size and place, and nothing where a step is skipped."""

from itertools import chain

import pytest
import torch

from fathom.ops.adamw import _adamw, adamw, adamw_reference
from fathom.ops.rounding import joined, split
from fathom.ops.triton import adamw as kernel
from ops.guards import Guards
from ops.hopper import Source, build

SIZES = [(1,), (0,), (16,), (15, 17), (4, 64), (2048,), (kernel.CHUNK + 1,), (2, kernel.CHUNK)]
RATES = (0.9, 0.99, 1e-8)


def rows(sizes, device, *dtypes, offset=0, seed=0):
    """``[params, grads, exp_avgs, exp_avg_sqs, steps]``: views, ``offset`` elements into more."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = dtypes or (torch.float32 if device.type == "cpu" else torch.bfloat16,) * 4
    found = []
    for column, dtype in enumerate(dtypes):
        whole = [torch.randn(offset + torch.Size(s).numel(), generator=generator) for s in sizes]
        parts = [t.to(device, dtype)[offset:].view(s) for t, s in zip(whole, sizes, strict=True)]
        found.append([t.abs_() * 0.1 if column == 3 else t for t in parts])
    steps = [torch.tensor(float(n), device=device) for n in range(len(sizes))]
    return [*found, steps]


def copied(columns, dtype=None):
    return [[t.clone() if dtype is None else t.to(dtype) for t in column] for column in columns]


def scalars(device, *values):
    return [torch.tensor(value, device=device) for value in values]


def decays(columns):
    return [0.1 * (n % 2) for n in range(len(columns[0]))]


def after(step, columns, *, lr=1e-2, skip=0.0, scale=None, times=3, lows=(), seed=None):
    device = columns[4][0].device
    rate, flag = scalars(device, lr, skip)
    factor = None if scale is None else torch.tensor(scale, device=device)
    for _ in range(times):
        step(*columns, decays(columns), rate, flag, factor, *RATES, list(lows), seed)
    return columns


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("offset", [0, 3], ids=["aligned", "offset"])
def test_every_size_gets_the_numbers_of_float64(device, offset, scale):
    start = rows(SIZES, device, offset=offset)
    found = after(_adamw, copied(start), scale=scale)
    plain = after(adamw_reference, copied(start), scale=scale)
    exact = after(adamw_reference, copied(start, torch.float64), scale=scale)
    for column, (got, same, want) in enumerate(zip(found, plain, exact, strict=True)):
        for a, b, c in zip(got, same, want, strict=True):
            error, plain_error = (t.double().sub(c).norm() for t in (a, b))
            assert error <= 2 * plain_error + 1e-6 * c.norm(), (column, a.shape)
    assert all(torch.equal(a, b) for a, b in zip(found[1], start[1], strict=True))


def test_gradients_parameters_and_moments_may_differ_in_dtype(device):
    dtypes = (torch.bfloat16, torch.float32, torch.float32, torch.float16)
    start = rows([(33,), (64,)], device, *dtypes)
    found = after(_adamw, copied(start))
    exact = after(adamw_reference, copied(start, torch.float64))
    for got, want, tolerance in zip(found, exact, (1e-2, 0, 1e-5, 1e-2, 0), strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_tensors_of_several_dtypes_are_stepped_together(device):
    wide, narrow = rows([(32,), (7,)], device, *[torch.float32] * 4), rows([(32,)], device)
    mixed = [a + b for a, b in zip(wide, narrow, strict=True)]
    apart = copied(mixed)
    after(_adamw, mixed)
    for n in range(3):
        alone = [[column[n]] for column in apart]
        rate, flag = scalars(device, 1e-2, 0.0)
        for _ in range(3):
            _adamw(*alone, [0.1 * (n % 2)], rate, flag, None, *RATES, [], None)
    assert all(
        torch.equal(a, b)
        for m, s in zip(mixed, apart, strict=True)
        for a, b in zip(m, s, strict=True)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_skipped_step_changes_no_bit(device, bad):
    start = rows(SIZES, device)
    for grad in start[1]:
        grad.fill_(bad)
    found = after(_adamw, copied(start), skip=1.0, scale=bad)
    for got, old in zip(found, start, strict=True):
        assert all(torch.equal(a, b) or a.isnan().all() for a, b in zip(got, old, strict=True))


def test_a_gradient_that_is_not_contiguous_is_read_in_its_order(device):
    start = rows([(6, 10)], device)
    turned = copied(start)
    turned[1] = [start[1][0].T.contiguous().T]
    assert not turned[1][0].is_contiguous()
    for a, b in zip(after(_adamw, copied(start)), after(_adamw, turned), strict=True):
        assert torch.equal(a[0], b[0])


def test_more_tensors_than_one_launch_has_addresses_for(device):
    start = rows([(n % 5 + 1,) for n in range(kernel.PER_LAUNCH + 3)], device)
    found = after(_adamw, copied(start), times=1)
    exact = after(adamw_reference, copied(start, torch.float64), times=1)
    tolerance = 1e-6 if device.type == "cpu" else 2e-2
    for a, b in zip(found[0], exact[0], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_nothing_outside_is_written_and_all_inside_is(device):
    with Guards() as guards:
        start = rows([(17,), (32,)], device)
        guarded = [[torch.empty_like(t).copy_(t) for t in column] for column in start]
        after(_adamw, guarded)
    guards.check()
    assert all(t.isfinite().all() for column in guarded for t in column)


@pytest.mark.parametrize("beta", [0.0, 0.9999])
def test_the_first_step_is_the_gradients_sign_times_the_rate(device, beta):
    p, g = torch.zeros(64, device=device), torch.linspace(-2, 2, 64, device=device)
    row = [[p], [g], [torch.zeros_like(p)], [torch.zeros_like(p)], [torch.zeros((), device=device)]]
    rate, flag = scalars(device, 0.5, 0.0)
    _adamw(*row, [0.0], rate, flag, None, beta, beta, 1e-12, [], None)
    torch.testing.assert_close(p, -0.5 * g.sign(), rtol=1e-5, atol=0)


def halved(columns):
    highs, lows = map(list, zip(*map(split, columns[0]), strict=True))
    return [highs, *columns[1:]], lows


@pytest.mark.parametrize("offset", [0, 3], ids=["aligned", "offset"])
def test_lower_halves_make_bfloat16_parameters_the_float32_ones(device, offset):
    start = rows(SIZES, device, *[torch.float32] * 4, offset=offset)
    (found, lows), scales = halved(copied(start)), {"scale": 0.5}
    after(_adamw, found, lows=lows, **scales)
    wide = after(_adamw, copied(start), **scales)
    for high, low, p in zip(found[0], lows, wide[0], strict=True):
        assert torch.equal(joined(high, low), p)
    for a, b in zip(chain(*found[1:]), chain(*wide[1:]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("offset", [0, 3], ids=["aligned", "offset"])
def test_chance_rounds_as_the_definition_does_and_to_a_neighbour(device, offset):
    start = rows(SIZES, device, torch.bfloat16, *[torch.float32] * 3, offset=offset)
    found = after(_adamw, copied(start), seed=2**31 - 1, times=1)
    again = after(_adamw, copied(start), seed=2**31 - 1, times=1)
    want = after(adamw_reference, copied(start), seed=2**31 - 1, times=1)
    exact = after(adamw_reference, copied(start, torch.float64), times=1)
    different = count = 0
    for a, b, c, d in zip(found[0], again[0], want[0], exact[0], strict=True):
        assert torch.equal(a, b)
        assert ((a.double() - d).abs() <= 2**-7 * d.abs() + 1e-7).all()
        different, count = different + int((a != c).sum()), count + a.numel()
    assert different <= 1e-3 * count  # where the last bit of float32 decides


def test_a_skipped_step_leaves_lower_halves_and_rounded_parameters_alone(device):
    start = rows(SIZES, device, *[torch.float32] * 4)
    (found, lows), (before, old) = halved(copied(start)), halved(copied(start))
    after(_adamw, found, lows=lows, skip=1.0)
    after(_adamw, found, seed=3, skip=1.0)
    for a, b in zip(chain(lows, *found), chain(old, *before), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_steps_as_torchs_fused_kernel_does_and_bit_by_bit_again(dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = [(1000, 1024), (64, 512, 96), (31, 7), (2048,)]
    start = rows(sizes, device, *[dtype] * 4)
    options = {
        "lr": 1e-2,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "skip": torch.zeros((), device=device),
    }
    results = []
    for impl in ("triton", "triton", "torch"):
        columns = copied(start)
        for _ in range(5):
            adamw(*columns, decays=decays(columns), scale=None, impl=impl, **options)
        results.append(columns)
    last_place = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    for a, b, c in zip(*map(chain.from_iterable, results), strict=True):
        assert torch.equal(a, b)
        apart = ~torch.isclose(a, c, rtol=last_place, atol=1e-6)
        assert apart.float().mean() <= (0.0 if dtype == torch.float32 else 0.005)  # ties round on
        assert (a.double() - c.double()).norm() <= last_place * c.double().norm()


@pytest.mark.gpu
def test_a_captured_step_goes_on_with_other_gradients_rates_and_flags_without_a_wait():
    device = torch.device("cuda", torch.cuda.current_device())
    columns = rows([(100, 96), (33,)], device)
    twin = copied(columns)
    lr, skip, scale = scalars(device, 1e-2, 0.0, 1.0)
    options = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "skip": skip, "scale": scale}
    graph = torch.cuda.CUDAGraph()
    adamw(*columns, decays=[0.1, 0.0], **options)
    adamw(*twin, decays=[0.1, 0.0], **options)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        adamw(*columns, decays=[0.1, 0.0], impl="triton", **options)
    for rate, flag, factor in (
        (1e-2, 0.0, 1.0),
        (3e-3, 0.0, 0.5),
        (1e-2, 1.0, 1.0),
        (1e-3, 0.0, 1.0),
    ):
        for column in (columns[1], twin[1]):
            for grad in column:
                grad.mul_(-0.5)
        for scalar, value in zip((lr, skip, scale), (rate, flag, factor), strict=True):
            scalar.fill_(value)
        torch.cuda.set_sync_debug_mode("error")
        graph.replay()
        adamw(*twin, decays=[0.1, 0.0], impl="triton", **options)
        torch.cuda.set_sync_debug_mode(0)
    for a, b in zip(*map(chain.from_iterable, (columns, twin)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_tensor_of_more_than_2_to_the_31_elements_is_stepped_to_its_end():
    device, size = torch.device("cuda"), 2**31 + 4096
    p, g, m, v = (torch.full((size,), 0.5, dtype=torch.bfloat16, device=device) for _ in range(4))
    rate, flag = scalars(device, 0.5, 0.0)
    _adamw(
        [p],
        [g],
        [m],
        [v],
        [torch.zeros((), device=device)],
        [0.0],
        rate,
        flag,
        None,
        *RATES,
        [],
        None,
    )
    assert (p[:8] == p[-8:]).all()
    assert (p == p[0]).all()


def test_nothing_spills_and_aligned_tensors_move_by_16_bytes():
    table = {"chunks_4C": "*i64", "table_RN": "*i64", "rates_3N": "*fp32", "skip": "*fp32"}
    rates = dict.fromkeys(("beta1", "beta2", "new1", "new2", "eps"), "fp32")
    types = table | rates | {"chunks": "i32", "tensors": "i32", "BLOCK": kernel.BLOCK}
    sources = []
    for dtype, aligned, more in (
        ("bf16", 16, {"scale": "*fp32"}),
        ("fp32", 16, {}),
        ("bf16", 16, {"low_0": "*i16"}),
        ("bf16", 16, {"seed": "i32"}),
        ("bf16", 1, {}),
    ):
        like = dict.fromkeys(("param_0", "grad_0", "exp_avg_0", "exp_avg_sq_0"), f"*{dtype}")
        options = dict.fromkeys(("scale", "low_0", "seed")) | more
        arguments = types | like | options | {"ALIGNED": aligned}
        sources.append(
            Source("fathom.ops.triton.adamw:_update", arguments, {"num_warps": kernel.WARPS})
        )
    begin = {"table_RN": "*i64", "decays_N": "*fp32", "rates_3N": "*fp32", "lr": "*fp32"}
    begin |= {"skip": "*fp32", "log_beta1": "fp32", "log_beta2": "fp32", "tensors": "i32"}
    sources.append(Source("fathom.ops.triton.adamw:_begin", begin | {"TENSORS": kernel.TENSORS}))
    write = {"table_RN": "*i64", "at": "i32:16", "codes": ("i64",) * kernel.PER_LAUNCH}
    sources.append(Source("fathom.ops.triton.adamw:_write", write | {"COUNT": kernel.PER_LAUNCH}))
    built = build(*sources)
    assert [b.spilled for b in built] == [0] * len(built)
    assert [b.widest for b in built[:5]] == [16, 16, 16, 16, 8]  # 8: the table's entries
    assert all(b.registers <= 64 for b in built[:4])
