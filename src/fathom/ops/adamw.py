"""AdamW's step of many tensors: Adam's moments, and a decay that is not part of the gradient.

Kingma & Ba (arXiv:1412.6980, algorithm 1); Loshchilov & Hutter (arXiv:1711.05101, algorithm 2).
There is little to compute and all of the optimizer's state to read and write: 14 bytes for each
parameter in bfloat16. So everything else that would pass over the gradients is part of it: the
factor that clips them, and the flag of a step that must not count.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_step

from fathom.ops.proof import PROVEN, random, settle
from fathom.ops.registry import (
    Impl,
    Implementations,
    choose,
    needs_triton,
    op,
    takes_all,
    wide,
)
from fathom.ops.rounding import chances, joined, rounded, split

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_refusal(device: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """What the kernel needs: contiguous parameters and moments of at most float32, on CUDA."""
    if reason := needs_triton(device, dtype):
        return reason
    if wrong := {dtype, *(t.dtype for t in tensors)}.difference(KERNEL_DTYPES):
        return f"it needs bfloat16, float16 or float32, got {wrong.pop()}"
    if not all(t.is_contiguous() for t in tensors):
        return "it needs contiguous parameters and moments"
    return ""


ADAMW = Implementations(
    op="adamw",
    refusals={"triton": triton_refusal, "torch": takes_all, "reference": takes_all},
)
OWN_ROUNDING = Implementations(
    op="adamw", refusals={"triton": triton_refusal, "reference": takes_all}
)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    decays: Sequence[float],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    skip: Tensor,
    scale: Tensor | None = None,
    lows: Sequence[Tensor] = (),
    seed: int | None = None,
    impl: Impl = "auto",
) -> None:
    """One step, in place: parameters, both moments and step counts; all on one device.

    In at least float32, ``m = beta1 m + (1 - beta1) g``, ``v = beta2 v + (1 - beta2) g^2``,
    ``p = (1 - lr decay) p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)``.

    Nothing waits for the device, and a captured CUDA graph may be replayed: what changes from step
    to step is then in tensors. The first call on a device, and the first with new shapes, must
    come before the capture.

    Args:
        params: with moments of the same shapes.
        grads: of the same shapes; ``torch`` overwrites them by ``scale`` times themselves.
        steps: scalars, float32: how many steps each has had.
        decays: weight decay of each.
        lr: rate; a scalar on the device, if it is to change under a CUDA graph.
        skip: scalar, float32; not 0: nothing changes.
        scale: scalar that gradients are multiplied by; None: 1.
        lows: int16, for each of the parameters, which are bfloat16 then: the 16 bits that make
            float32 numbers of them (``ops/rounding.py``).
        seed: of the chance by which bfloat16 parameters are rounded; None: to the nearest.
            PyTorch's implementation knows neither this nor ``lows``.
    """
    if not params:
        return
    offered = ADAMW if seed is None and not lows else OWN_ROUNDING
    chosen = choose(offered, impl, *params, *exp_avgs, *exp_avg_sqs)
    if (impl, chosen) == ("auto", "triton"):
        check = _check if offered is ADAMW else _check_rounding
        chosen = settle(PROVEN, check, params[0].device)
        chosen = chosen if chosen in offered.refusals else "reference"
    moments = list(exp_avgs), list(exp_avg_sqs)
    columns = list(params), list(grads), *moments, list(steps), list(decays)
    if chosen == "triton":
        rate = lr if isinstance(lr, Tensor) else torch.full_like(skip, lr)
        factor = None if scale is None else scale.float()
        _adamw(*columns, rate, skip, factor, *betas, eps, list(lows), seed)
    elif chosen == "torch":
        _torch_adamw(*columns, lr, skip, scale, *betas, eps)
    else:
        adamw_reference(*columns, lr, skip, scale, *betas, eps, lows, seed)


@op(
    "adamw",
    fake=lambda *_: None,
    flops=lambda *_: 0,
    mutates=("params", "exp_avgs", "exp_avg_sqs", "steps", "lows"),
)
def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    decays: list[float],
    lr: Tensor,
    skip: Tensor,
    scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    lows: list[Tensor],
    seed: int | None,
) -> None:
    from fathom.ops.triton.adamw import adamw as kernel

    state = params, grads, exp_avgs, exp_avg_sqs, steps, lows
    kernel(*state, decays, lr, skip, scale, beta1, beta2, eps, seed)


def _torch_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    decays: list[float],
    lr: float | Tensor,
    skip: Tensor,
    scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    if scale is not None:
        torch._foreach_mul_(grads, scale)  # pyright: ignore
    by_decay: dict[float, list[int]] = defaultdict(list)
    for n, decay in enumerate(decays):
        by_decay[decay].append(n)
    for decay, chosen in by_decay.items():
        torch_step(
            [params[n] for n in chosen],
            [grads[n] for n in chosen],
            [exp_avgs[n] for n in chosen],
            [exp_avg_sqs[n] for n in chosen],
            [],
            [steps[n] for n in chosen],
            fused=True,
            found_inf=skip,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=decay,
            eps=eps,
            maximize=False,
        )


def adamw_reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    decays: list[float],
    lr: float | Tensor,
    skip: Tensor,
    scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    lows: Sequence[Tensor] = (),
    seed: int | None = None,
) -> None:
    """The definition, one tensor at a time, on any device and dtype."""
    live = skip == 0
    columns = zip(params, grads, exp_avgs, exp_avg_sqs, steps, decays, strict=True)
    for n, (*tensors, step, decay) in enumerate(columns):
        p, g, m, v = (t.to(wide(t.dtype)) for t in tensors)
        p = joined(tensors[0], lows[n]) if lows else p
        g = g if scale is None else g * scale
        t = step.double() + 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        root = (v / (1 - beta2**t)).sqrt()
        p = (1 - lr * decay) * p - lr / (1 - beta1**t) * m / (root + eps)
        old, new = [tensors[0], *tensors[2:], step], [p, m, v, t]
        if lows:
            old.append(lows[n])
            new[0], low = split(p)
            new.append(low)
        elif seed is not None and tensors[0].dtype == torch.bfloat16:
            new[0] = rounded(p, chances(p.numel(), seed, n, t).view(p.shape))
        for there, value in zip(old, new, strict=True):
            there.copy_(torch.where(live, value.to(there.dtype), there))


def _check(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """What the kernel makes of two tensors in two steps on ``device``, and float64."""
    shapes, scales = ((96, 128), (33,)), (1e-3, 1.0, 1.0, 1.0)  # updates as large as parameters
    found = [[random(*shape, device=device) * scale for shape in shapes] for scale in scales]
    found[3] = [v.abs() for v in found[3]]
    exact = [[t.double() for t in column] for column in found]
    steps, exact_steps = ([torch.zeros((), device=device) for _ in shapes] for _ in range(2))
    zero, half, rate = (torch.full((), value, device=device) for value in (0.0, 0.5, 1e-3))
    for _ in range(2):
        rest = [0.1, 0.0], rate, zero, half, 0.9, 0.99, 1e-8
        _adamw(found[0], found[1], found[2], found[3], steps, *rest, [], None)
        adamw_reference(exact[0], exact[1], exact[2], exact[3], exact_steps, *rest)
    for got, want in zip(found, exact, strict=True):
        yield from zip(got, want, strict=True)
    yield torch.stack(steps), torch.stack(exact_steps).double()


def _check_rounding(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """How far parameters go with lower halves and by chance: the kernel's, the definition's."""
    start = [random(96, 128, device=device), random(33, device=device)]
    zero, rate = (torch.full((), value, device=device) for value in (0.0, 2e-3))
    for seed in (None, 3):
        moved = []
        for run in (_adamw, adamw_reference):
            params, grads = [p.clone() for p in start], [p.sign() for p in start]
            moments = [[torch.zeros_like(p) for p in start] for _ in range(2)]
            steps = [torch.zeros((), device=device) for _ in start]
            lows = [torch.zeros_like(p, dtype=torch.int16) for p in start] if seed is None else []
            rest = [0.0, 0.1], rate, zero, None, 0.9, 0.99, 1e-8, lows, seed
            run(params, grads, moments[0], moments[1], steps, *rest)
            ends = [joined(*pair) for pair in zip(params, lows, strict=True)] if lows else params
            pairs = zip(ends, start, strict=True)
            moved.append(torch.cat([(end.double() - p.double()).flatten() for end, p in pairs]))
        yield moved[0], moved[1]
