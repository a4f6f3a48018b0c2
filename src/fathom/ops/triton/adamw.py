"""AdamW's step for many tensors at once: one pass over memory, one launch for all of a dtype.

The tensors' addresses stand in a table on the device, which small launches fill from their own
arguments: nothing is copied from the host, so a CUDA graph may hold the step. Each program takes
one chunk of one tensor, with loads of 16 bytes a thread where tensors are aligned for it.

Shapes: N tensors, C chunks.
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
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, STEP = range(5)  # rows of the table


@triton.jit
def _write(table_5N, at, codes, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(table_5N + at + i, codes[i] >> 1)


@triton.jit
def _begin(
    table_5N,
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
    at = tl.load(table_5N + 4 * tensors + n, mask=real, other=0).to(tl.pointer_type(tl.float32))
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
    chunks_3C,  # tensor, first element, elements
    table_5N,
    rates_3N,
    skip,
    scale,  # of gradients, or None
    param_0,  # the first tensors, for their dtypes
    grad_0,
    exp_avg_0,
    exp_avg_sq_0,
    chunks,
    tensors,
    beta1,
    beta2,
    eps,
    ALIGNED: tl.constexpr,  # what addresses and sizes are multiples of, or 1
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    n = tl.load(chunks_3C + chunk)
    first = tl.multiple_of(tl.load(chunks_3C + chunks + chunk), ALIGNED)
    size = tl.multiple_of(tl.load(chunks_3C + 2 * chunks + chunk), ALIGNED)
    param = _address(table_5N + n, param_0, ALIGNED) + first
    grad = _address(table_5N + tensors + n, grad_0, ALIGNED) + first
    exp_avg = _address(table_5N + 2 * tensors + n, exp_avg_0, ALIGNED) + first
    exp_avg_sq = _address(table_5N + 3 * tensors + n, exp_avg_sq_0, ALIGNED) + first
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
        p = tl.load(param + i, mask=inside, other=0.0).to(tl.float32)
        p -= shrink * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p -= rate * m / (tl.sqrt(v) * root + eps)
        tl.store(exp_avg + i, m.to(exp_avg_0.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq + i, v.to(exp_avg_sq_0.dtype.element_ty), mask=inside)
        tl.store(param + i, p.to(param_0.dtype.element_ty), mask=inside)


@triton.jit
def _address(entry, like, ALIGNED: tl.constexpr):
    return tl.multiple_of(tl.load(entry).to(like.dtype), ALIGNED)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    decays: Sequence[float],
    lr: Tensor,
    skip: Tensor,
    scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """See :func:`fathom.ops.adamw.adamw`; parameters and moments are contiguous."""
    groups: dict[object, list[int]] = defaultdict(list)
    columns = [params, [grad.contiguous() for grad in grads], exp_avgs, exp_avg_sqs]
    for n, tensors in enumerate(zip(*columns, strict=True)):
        alike = *(t.dtype for t in tensors), _is_aligned(tensors)
        groups[alike].append(n)
    scalars = (lr, skip, scale, beta1, beta2, eps)
    for chosen in groups.values():
        rows = [[column[n] for n in chosen] for column in (*columns, steps)]
        _step(rows, tuple(decays[n] for n in chosen), *scalars)


def _is_aligned(tensors: Sequence[Tensor]) -> bool:
    addresses = all(t.data_ptr() % ALIGNED == 0 for t in tensors)
    return addresses and tensors[0].numel() % ALIGNED == 0


def _step(
    rows: list[list[Tensor]],
    decays: tuple[float, ...],
    lr: Tensor,
    skip: Tensor,
    scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    device, tensors = lr.device, len(decays)
    sizes = tuple(p.numel() for p in rows[PARAM])
    chunks_3C, decays_N = _plan(sizes, decays, device)
    table_5N = _table([t.data_ptr() for row in rows for t in row], device)
    rates_3N = torch.empty(3, tensors, dtype=torch.float32, device=device)
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    _begin[(triton.cdiv(tensors, TENSORS),)](
        table_5N, decays_N, rates_3N, lr, skip, *logs, tensors, TENSORS=TENSORS
    )
    chunks = chunks_3C.shape[1]
    if chunks:
        _update[(chunks,)](
            *(chunks_3C, table_5N, rates_3N, skip, scale),
            *(row[0] for row in rows[:STEP]),
            *(chunks, tensors, beta1, beta2, eps),
            ALIGNED=ALIGNED if _is_aligned([row[0] for row in rows[:STEP]]) else 1,
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
    sizes: tuple[int, ...], decays: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Chunks ``[3, C]`` and decays ``[N]`` on the device, the same in every step."""
    sizes_N = torch.tensor(sizes)
    counts_N = (sizes_N + CHUNK - 1) // CHUNK
    tensor_C = torch.repeat_interleave(torch.arange(len(sizes)), counts_N)
    before_C = (counts_N.cumsum(0) - counts_N)[tensor_C]
    first_C = (torch.arange(len(tensor_C)) - before_C) * CHUNK
    size_C = (sizes_N[tensor_C] - first_C).clamp(max=CHUNK)
    plan = torch.stack([tensor_C, first_C, size_C]), torch.tensor(decays, dtype=torch.float32)
    if device.type == "cuda":
        plan = tuple(t.pin_memory() for t in plan)
    chunks_3C, decays_N = (t.to(device, non_blocking=True) for t in plan)
    return chunks_3C, decays_N
