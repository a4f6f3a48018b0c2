"""AdamW's step for many tensors at once: one pass over memory, one launch for all of a dtype.

The tensors' addresses stand in a table on the device, which small launches fill from their own
arguments: nothing is copied from the host, so a CUDA graph may hold the step. Each program takes
one chunk of one tensor, with loads of 16 bytes a thread where tensors are aligned for it.

Shapes: N tensors, C chunks, R rows of the table: parameters, gradients, moments, step counts and,
if there are any, the lower halves of the parameters.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK, BLOCK, WARPS = 16384, 2048, 8  # elements of a program, and of one turn of its loop
PER_LAUNCH = 128  # addresses that one launch writes
ALIGNED = 16  # bytes of an address, and elements of a tensor, that 16-byte loads want
TENSORS = 128  # of a program that prepares their step
ROUNDING = tl.constexpr(8)  # elements for which one counter of Philox has chance
NAN = tl.constexpr(0x7FC00000)  # as in ops/rounding.py


@triton.jit
def _write(table_RN, at, codes, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(table_RN + at + i, codes[i] >> 1)


@triton.jit
def _begin(
    table_RN,
    decays_N,
    rates_3N,  # out: lr * decay, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    lr,
    skip,
    log_beta1,
    log_beta2,
    tensors,
    TENSORS: tl.constexpr,
):
    n = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    real = n < tensors
    at = tl.load(table_RN + 4 * tensors + n, mask=real, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(at, mask=real, other=0.0) + 1
    tl.store(at, step, mask=n < tl.where(tl.load(skip) == 0, tensors, 0))
    rate = tl.load(lr).to(tl.float32)
    decay = tl.load(decays_N + n, mask=real, other=0.0)
    correction1 = (1 - tl.exp(step.to(tl.float64) * log_beta1)).to(tl.float32)
    correction2 = (1 - tl.exp(step.to(tl.float64) * log_beta2)).to(tl.float32)
    tl.store(rates_3N + n, rate * decay, mask=real)
    tl.store(rates_3N + tensors + n, rate / correction1, mask=real)
    tl.store(rates_3N + 2 * tensors + n, 1 / tl.sqrt_rn(correction2), mask=real)


@triton.jit
def _update(
    chunks_4C,  # tensor, first element, elements, number of the tensor among all
    table_RN,
    rates_3N,
    skip,
    scale,  # of gradients, or None
    seed,  # of rounding by chance, or None
    param_0,  # the first tensors, for their dtypes
    grad_0,
    exp_avg_0,
    exp_avg_sq_0,
    low_0,  # or None
    chunks,
    tensors,
    beta1,
    beta2,
    new1,  # 1 - beta1, which float32 could not take from beta1 without losing digits
    new2,
    eps,
    ALIGNED: tl.constexpr,  # what addresses and sizes are multiples of, or 1
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    n = tl.load(chunks_4C + chunk)
    first = tl.multiple_of(tl.load(chunks_4C + chunks + chunk), ALIGNED)
    size = tl.multiple_of(tl.load(chunks_4C + 2 * chunks + chunk), ALIGNED)
    param = _address(table_RN + n, param_0, ALIGNED) + first
    grad = _address(table_RN + tensors + n, grad_0, ALIGNED) + first
    exp_avg = _address(table_RN + 2 * tensors + n, exp_avg_0, ALIGNED) + first
    exp_avg_sq = _address(table_RN + 3 * tensors + n, exp_avg_sq_0, ALIGNED) + first
    if low_0 is not None:
        low = _address(table_RN + 5 * tensors + n, low_0, ALIGNED) + first
    if seed is not None:
        number = tl.load(chunks_4C + 3 * chunks + chunk).to(tl.int32)
        step = tl.load(tl.load(table_RN + 4 * tensors + n).to(rates_3N.dtype)).to(tl.int32)
    shrink = tl.load(rates_3N + n)
    rate = tl.load(rates_3N + tensors + n)
    root = tl.load(rates_3N + 2 * tensors + n)
    factor = 1.0 if scale is None else tl.load(scale)
    for start in range(0, tl.where(tl.load(skip) == 0, size, 0), BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        g = tl.load(grad + i, mask=inside, other=0.0).to(tl.float32) * factor
        m = tl.load(exp_avg + i, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + i, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(param + i, mask=inside, other=0.0)
        if low_0 is not None:
            below = tl.load(low + i, mask=inside, other=0).to(tl.int32)
            above = p.to(tl.int16, bitcast=True).to(tl.int32)
            p = ((above << 16) + below).to(tl.float32, bitcast=True)
        p = p.to(tl.float32)
        p -= shrink * p
        m = beta1 * m + new1 * g
        v = beta2 * v + new2 * g * g
        p -= rate * m / (tl.sqrt(v) * root + eps)
        tl.store(exp_avg + i, m.to(exp_avg_0.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq + i, v.to(exp_avg_sq_0.dtype.element_ty), mask=inside)
        if low_0 is not None:
            bits = _bits(p)
            above = (bits + 0x8000) >> 16
            tl.store(low + i, (bits - (above << 16)).to(tl.int16), mask=inside)
            p = (above << 16).to(tl.float32, bitcast=True)
        elif seed is not None:
            chance = _chances((first + start).to(tl.int32), number, step, seed, BLOCK)
            p = ((_bits(p) + chance) & -65536).to(tl.float32, bitcast=True)
        tl.store(param + i, p.to(param_0.dtype.element_ty), mask=inside)


@triton.jit
def _address(entry, like, ALIGNED: tl.constexpr):
    return tl.multiple_of(tl.load(entry).to(like.dtype), ALIGNED)


@triton.jit
def _bits(x):
    return tl.where(x == x, x.to(tl.int32, bitcast=True), NAN)


@triton.jit
def _chances(first, number, step, seed, BLOCK: tl.constexpr):
    counter = first // ROUNDING + tl.arange(0, BLOCK // ROUNDING)
    rest = tl.zeros_like(counter)
    a, b, c, d = tl.philox(seed, counter, rest + number, rest + step, rest)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK,)).to(tl.int32)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lows: Sequence[Tensor],
    decays: Sequence[float],
    lr: Tensor,
    skip: Tensor,
    scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    seed: int | None,
) -> None:
    """See :func:`fathom.ops.adamw.adamw`; parameters and moments are contiguous."""
    columns = [params, [grad.contiguous() for grad in grads], exp_avgs, exp_avg_sqs]
    columns += [lows] if lows else []
    groups: dict[object, list[int]] = defaultdict(list)
    for n, tensors in enumerate(zip(*columns, strict=True)):
        alike = *(t.dtype for t in tensors), _is_aligned(tensors)
        groups[alike].append(n)
    for numbers in groups.values():
        chosen = [[column[n] for n in numbers] for column in columns]
        plan = _plan(
            tuple(params[n].numel() for n in numbers),
            tuple(decays[n] for n in numbers),
            tuple(numbers),
            lr.device,
        )
        counts = [steps[n] for n in numbers]
        _step(chosen, counts, *plan, lr, skip, scale, beta1, beta2, eps, seed)


def _is_aligned(tensors: Sequence[Tensor]) -> bool:
    addresses = all(t.data_ptr() % ALIGNED == 0 for t in tensors)
    return addresses and tensors[0].numel() % ALIGNED == 0


def _step(
    columns: list[list[Tensor]],
    steps: list[Tensor],
    chunks_4C: Tensor,
    decays_N: Tensor,
    lr: Tensor,
    skip: Tensor,
    scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    seed: int | None,
) -> None:
    rows = [*columns[:4], steps, *columns[4:]]
    table_RN = _table([t.data_ptr() for row in rows for t in row], lr.device)
    tensors, chunks = len(steps), chunks_4C.shape[1]
    rates_3N = torch.empty(3, tensors, dtype=torch.float32, device=lr.device)
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    _begin[(triton.cdiv(tensors, TENSORS),)](
        table_RN, decays_N, rates_3N, lr, skip, *logs, tensors, TENSORS=TENSORS
    )
    like = [column[0] for column in columns]
    by_chance = like[0].dtype == torch.bfloat16 and len(like) == 4
    if chunks:
        _update[(chunks,)](
            *(chunks_4C, table_RN, rates_3N, skip, scale, seed if by_chance else None),
            *(like if len(like) == 5 else [*like, None]),
            *(chunks, tensors, beta1, beta2, 1 - beta1, 1 - beta2, eps),
            ALIGNED=ALIGNED if _is_aligned(like) else 1,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def _table(addresses: list[int], device: torch.device) -> Tensor:
    """The addresses on the device. They travel as odd numbers: Triton makes a kernel for each
    pattern of arguments that are multiples of 16."""
    table = torch.empty(
        triton.cdiv(len(addresses), PER_LAUNCH) * PER_LAUNCH, dtype=torch.int64, device=device
    )
    codes = [2 * address + 1 for address in addresses]
    codes += codes[-1:] * (len(table) - len(codes))
    for at in range(0, len(codes), PER_LAUNCH):
        _write[(1,)](table, at, tuple(codes[at : at + PER_LAUNCH]), COUNT=PER_LAUNCH, num_warps=1)
    return table


@functools.lru_cache(maxsize=64)
def _plan(
    sizes: tuple[int, ...],
    decays: tuple[float, ...],
    numbers: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Chunks ``[4, C]`` and decays ``[N]`` on the device, the same in every step."""
    sizes_N = torch.tensor(sizes)
    counts_N = (sizes_N + CHUNK - 1) // CHUNK
    tensor_C = torch.repeat_interleave(torch.arange(len(sizes)), counts_N)
    before_C = (counts_N.cumsum(0) - counts_N)[tensor_C]
    first_C = (torch.arange(len(tensor_C)) - before_C) * CHUNK
    size_C = (sizes_N[tensor_C] - first_C).clamp(max=CHUNK)
    chunks_4C = torch.stack([tensor_C, first_C, size_C, torch.tensor(numbers)[tensor_C]])
    plan = chunks_4C, torch.tensor(decays, dtype=torch.float32)
    if device.type == "cuda":
        plan = tuple(t.pin_memory() for t in plan)
    chunks_4C, decays_N = (t.to(device, non_blocking=True) for t in plan)
    return chunks_4C, decays_N
