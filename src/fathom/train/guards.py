"""What keeps a run from being spoilt: steps that must not count, and steps too many of them.

A step whose loss or gradients are not finite changes nothing. Nor does a *spike*: a loss or
gradient norm above ``exp(mean + 6 sigma)`` of the logarithms of the last 128 steps that counted.
That is the rule of OLMo-core's SkipStepOptimizer with three changes. Logarithms, because gradient
norms vary by factors. ``sigma`` from the differences of neighbours, ``sqrt(mean(d^2) / 2)``, which
a falling curve does not widen. And bounds: six sigma of losses are a factor of at least 1.35, so
that on a flat curve no wobble is a spike, and of at most 6, so that on a wild one tenfold still is;
of gradient norms they count as 7, for rows of an odd kind raise those sixfold while the loss falls
(``benchmarks/spikes.py``), and clipping takes care of them.

Both are judged on the device, and the host reads the verdict a step later: nothing waits.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fathom.settings import Data

WINDOW = 128  # steps that counted, from which spikes stand out
LEAST_RISE = (0.3, math.log(7))  # bounds of 6 sigma of losses and of norms, in logarithms
MOST_RISE = (math.log(6), math.log(7))
MAX_NOT_FINITE = 3  # in a row, after which training stops
SPAN, MAX_SPIKES = 50, 3  # more spikes in so many steps are no accident: go back
MAX_ROLLBACKS = 3
PATIENCE = 100  # steps over which the use of experts is judged
OVERLOAD = 8.0  # times its fair share, from which an expert is named


class SpikeGuard:
    """Judges losses and gradient norms on the device, by those of the steps before.

    Args:
        sigmas: how many standard deviations make a spike; 0: none is one.

    Attributes:
        window_2W: logarithms of the last losses and norms that counted, oldest first; NaN where
            there was none yet, and then nothing is a spike.
        spikes: which of the last steps were spikes, as far as the host knows.
        rollbacks: how often the run went back because of them.
    """

    def __init__(self, sigmas: float, device: torch.device) -> None:
        self.sigmas = sigmas
        self.window_2W = torch.full((2, WINDOW), math.nan, dtype=torch.float32, device=device)
        self.least_2, self.most_2 = torch.tensor([LEAST_RISE, MOST_RISE], device=device)
        self.spikes: list[int] = []
        self.rollbacks = 0

    def judge(self, loss: Tensor, grad_norm: Tensor) -> dict[str, Tensor]:
        """``not_finite`` and ``spike`` of a step, each 1 or 0 on the device; the step is recorded.

        Args:
            loss, grad_norm: scalars, the same on all ranks, so that all decide alike.
        """
        now_2 = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        finite = torch.isfinite(now_2).all()
        log_2 = now_2.clamp(min=1e-30).log()
        spike = finite & (log_2 > self._highest()).any()
        after_2W = torch.cat([self.window_2W[:, 1:], log_2[:, None]], dim=1)
        self.window_2W.copy_(torch.where(finite & ~spike, after_2W, self.window_2W))
        return {"not_finite": (~finite).float(), "spike": spike.float()}

    def _highest(self) -> Tensor:
        """The highest logarithms that are no spikes; NaN, which nothing exceeds, for no limit."""
        if self.sigmas == 0:
            return self.window_2W.new_full((2,), math.nan)
        sigma_2 = (self.window_2W.diff(dim=1).square().mean(dim=1) / 2).sqrt()
        rise_2 = (self.sigmas * sigma_2).clamp(self.least_2, self.most_2)
        return self.window_2W.mean(dim=1) + rise_2

    def heard(self, step: int) -> None:
        """The host has learnt that ``step`` was a spike."""
        self.spikes = [*(at for at in self.spikes if at > step - SPAN), step]

    def persists(self, step: int) -> bool:
        """Whether spikes go on, seen after ``step``, whose own verdict never counts yet.

        So the answer does not depend on whether somebody read the figures early.
        """
        return sum(step - SPAN <= at < step for at in self.spikes) > MAX_SPIKES

    def state(self) -> Data:
        """Everything as plain numbers, which float32 gets back exactly; None for NaN."""
        rows = self.window_2W.tolist()
        window = [[None if math.isnan(value) else value for value in row] for row in rows]
        return {"window": window, "spikes": self.spikes, "rollbacks": self.rollbacks}

    def restore(self, state: Data) -> None:
        """Undo :meth:`state`."""
        rows = [[math.nan if value is None else value for value in row] for row in state["window"]]
        self.window_2W.copy_(torch.tensor(rows, dtype=torch.float32))
        self.spikes, self.rollbacks = list(state["spikes"]), int(state["rollbacks"])


class ExpertWatch:
    """Says which experts are left out or overrun, once each. Works on counts that have arrived.

    Args:
        layers: the names of the MoE layers.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = layers
        self._sums: list[Tensor] = []
        self._steps = 0
        self._said: set[tuple[str, str, int]] = set()

    def add(self, counts: Sequence[Tensor]) -> list[str]:
        """Take in a step's tokens per expert ``[E]`` of each layer; sentences, if there are any."""
        self._sums = [a + b for a, b in zip(self._sums or counts, counts, strict=True)]
        self._steps += 1
        if self._steps < PATIENCE:
            return []
        sums, self._sums, self._steps = self._sums, [], 0
        return [
            line
            for name, sum_E in zip(self.layers, sums, strict=True)
            for line in self._judge(name, sum_E)
        ]

    def _judge(self, layer: str, sum_E: Tensor) -> list[str]:
        share_E = sum_E / sum_E.mean().clamp(min=1e-9)
        dead = self._new(layer, "dead", (sum_E == 0).nonzero().flatten().tolist())
        full = self._new(layer, "full", (share_E > OVERLOAD).nonzero().flatten().tolist())
        lines = [f"{layer}: no token reached {_experts(dead)} in {PATIENCE} steps"] if dead else []
        if full:
            most = f"{share_E.max():.0f} times the fair share"
            lines.append(f"{layer}: {_experts(full)} got up to {most} over {PATIENCE} steps")
        return [f"{line}; see model.groups.*.ffn.balance" for line in lines]

    def _new(self, layer: str, what: str, experts: list[int]) -> list[int]:
        found = [e for e in experts if (layer, what, e) not in self._said]
        self._said |= {(layer, what, e) for e in found}
        return found


def _experts(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:8]))
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    return f"expert{'s' * (len(ids) > 1)} {shown}{more}"


def bits(tensors: Sequence[Tensor]) -> Tensor:
    """A number for each tensor, int64, that changes with any single bit of it."""
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.stack(
        [t.detach().contiguous().view(views[t.element_size()]).sum() for t in tensors]
    )
