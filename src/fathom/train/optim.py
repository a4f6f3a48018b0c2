"""AdamW, and Muon for hidden matrices, with one flat state of plain tensors.

Muon (Jordan et al. 2024; Liu et al., arXiv:2502.16982, section 2) replaces a matrix's momentum by
the nearest orthogonal matrix, found by Newton-Schulz iterations, so that every direction of the
update is equally long. Stacked experts ``[E, m, n]`` are E matrices.

``skip`` is a scalar tensor on the device, 1 where a step must change nothing (its gradients are not
finite) and else 0: the host need not wait to know which.
"""

import fnmatch
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fathom.ops import adamw
from fathom.parallel import ALONE, Layout, step
from fathom.parallel.mesh import local
from fathom.settings import ConfigError
from fathom.train.config import Rounding, TrainConfig

KINDS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW's state
NS_STEPS = 5
MAX_BATCH = 2**28  # numbers; a step holds a few bfloat16 copies of one batch
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class AdamW:
    """Decoupled weight decay and Adam's moments; its step is ``ops/adamw.py``'s.

    Args:
        params: by name.
        decay: weight decay of each, by name.
        rounding: see :class:`TrainConfig`.
        seed: of rounding by chance.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        decay: Mapping[str, float],
        *,
        betas: tuple[float, float],
        eps: float,
        rounding: Rounding = "nearest",
        seed: int = 0,
    ) -> None:
        self.params, self.decay, self.betas, self.eps = params, decay, betas, eps
        self.seed = seed if rounding == "stochastic" else None
        self.state = {
            **{f"exp_avg.{name}": torch.zeros_like(local(p)) for name, p in params.items()},
            **{f"exp_avg_sq.{name}": torch.zeros_like(local(p)) for name, p in params.items()},
            **{f"step.{name}": torch.zeros((), device=p.device) for name, p in params.items()},
        }
        if rounding == "master":
            zeros = {n: torch.zeros_like(local(p), dtype=torch.int16) for n, p in params.items()}
            self.state |= {f"low.{name}": halves for name, halves in zeros.items()}

    def step(self, lr: float | Tensor, skip: Tensor, scale: Tensor | None = None) -> None:
        """See :meth:`Optimizer.step`."""
        grads = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        adamw(
            [local(self.params[name]) for name in grads],
            [local(grad) for grad in grads.values()],
            *([self.state[f"{kind}.{name}"] for name in grads] for kind in KINDS),
            decays=[self.decay[name] for name in grads],
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            skip=skip,
            scale=scale,
            lows=[low for name in grads if (low := self.state.get(f"low.{name}")) is not None],
            seed=self.seed,
        )


class Muon:
    """Nesterov momentum, orthogonalised, times ``0.2 sqrt(max(m, n))``: an AdamW-sized update.

    So learning rate and weight decay of AdamW can be kept. On 2-D parameters this equals
    ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``. Matrices of one shape, the experts of all
    layers too, are updated as one batch ``[K, m, n]``, of about ``MAX_BATCH`` numbers at most.

    Args:
        params: by name, each ``[..., m, n]``.
        group: the ranks that share the rows of each matrix, if they do; stacks are never cut
            within a matrix.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        *,
        momentum: float,
        weight_decay: float,
        group: ProcessGroup | None = None,
    ) -> None:
        self.params, self.momentum, self.weight_decay = params, momentum, weight_decay
        self.group = group
        self.batches: list[tuple[list[str], Tensor]] = []  # names, their momentum [K, m, n]
        self.state: dict[str, Tensor] = {}
        for names in self._equal_shapes():
            shapes = [matrices(name, local(params[name])).shape for name in names]
            sizes, (m, n) = [shape[0] for shape in shapes], shapes[0][1:]
            batch = local(params[names[0]]).new_zeros(sum(sizes), m, n)
            self.batches.append((names, batch))
            for name, part in zip(names, batch.split(sizes), strict=True):
                self.state[f"momentum.{name}"] = part

    def _equal_shapes(self) -> list[list[str]]:
        groups: dict[object, list[str]] = defaultdict(list)
        numbers: dict[object, int] = defaultdict(int)
        for name, weight in self.params.items():
            alike = weight.ndim, whole_shape(name, weight)  # the same on every rank
            groups[alike, numbers[alike] // MAX_BATCH].append(name)
            numbers[alike] += weight.numel()
        return list(groups.values())

    def step(self, lr: float | Tensor, skip: Tensor, scale: Tensor | None = None) -> None:
        """See :meth:`Optimizer.step`."""
        live = 1 - skip
        for names, momentum_KMN in self.batches:
            grad_KMN = torch.cat([self._grad(name) for name in names])
            if scale is not None:
                grad_KMN.mul_(scale)
            grad_KMN = torch.where(live > 0, grad_KMN, 0)  # not grad * live: NaN * 0 is NaN
            momentum_KMN.lerp_(grad_KMN, (1 - self.momentum) * live.to(grad_KMN.dtype))
            sample = self.params[names[0]]
            height, width = whole_shape(names[0], sample)
            target_KMN = grad_KMN.lerp(momentum_KMN, self.momentum)
            if self.group is None or sample.ndim > 2:
                update_KMN = orthogonal(target_KMN)
            else:
                update_KMN = step.over_whole(orthogonal, target_KMN, height, self.group)
            rate = 0.2 * math.sqrt(max(height, width)) * lr
            update_KMN = update_KMN.to(grad_KMN.dtype) * (rate * live)
            sizes = [len(self.state[f"momentum.{name}"]) for name in names]
            parts = zip(names, update_KMN.split(sizes), strict=True)
            moved = [
                (weight := local(self.params[name]).data, part.reshape(weight.shape))
                for name, part in parts
                if self.params[name].grad is not None
            ]
            if moved:
                weights, updates = map(list, zip(*moved, strict=True))
                torch._foreach_mul_(weights, 1 - lr * self.weight_decay * live)  # pyright: ignore
                torch._foreach_sub_(weights, updates)  # pyright: ignore

    def _grad(self, name: str) -> Tensor:
        grad = self.params[name].grad
        return (
            torch.zeros_like(self.state[f"momentum.{name}"])
            if grad is None
            else matrices(name, local(grad))
        )


def matrices(name: str, weight: Tensor) -> Tensor:
    """``[..., m, n]`` as ``[batch, m, n]``; stacked gate and up projections are two matrices."""
    if name.endswith("w_gate_up"):
        weight = weight.unflatten(-2, (2, -1))
    return weight[None] if weight.ndim == 2 else weight.flatten(0, -3)


def whole_shape(name: str, weight: Tensor) -> tuple[int, int]:
    """Of one of its matrices, however many ranks share its rows."""
    m, n = weight.shape[-2:]
    return m // 2 if name.endswith("w_gate_up") else m, n


def orthogonal(x_KMN: Tensor) -> Tensor:
    """The nearest matrices whose singular values are all about 1, bfloat16, by Newton-Schulz.

    ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``, from ``X / |X|_F``.
    """
    a, b, c = NS_COEFFICIENTS
    tall = x_KMN.shape[-2] > x_KMN.shape[-1]
    x = x_KMN.mT.bfloat16() if tall else x_KMN.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizer:
    """The optimizer of a model: AdamW, or Muon for its hidden matrices and AdamW for the rest.

    The routing bias of experts is a buffer and never in it.
    """

    def __init__(self, model: nn.Module, cfg: TrainConfig, layout: Layout = ALONE) -> None:
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = {name for name, p in params.items() if is_hidden_matrix(name, p)}
        by_muon = hidden if cfg.optimizer == "muon" else set()
        rest = {name: p for name, p in params.items() if name not in by_muon}
        decay = {name: weight_decay(name, p, cfg) for name, p in rest.items()}
        first = AdamW(
            rest, decay, betas=cfg.betas, eps=cfg.eps, rounding=cfg.rounding, seed=cfg.seed
        )
        self.parts: list[AdamW | Muon] = [first]
        if by_muon:
            matrices = {name: p for name, p in params.items() if name in by_muon}
            decayed = {"momentum": cfg.muon_momentum, "weight_decay": cfg.weight_decay}
            self.parts.append(Muon(matrices, group=layout.shard_group, **decayed))

    @torch.no_grad()
    def step(self, lr: float | Tensor, skip: Tensor, scale: Tensor | None = None) -> None:
        """One update by ``scale`` times the gradients, which are of no use afterwards.

        Args:
            lr: rate.
            skip: scalar; 1: nothing changes, else 0.
            scale: scalar, see :func:`clip_factor`; None: 1.
        """
        for part in self.parts:
            part.step(lr, skip, scale)

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, by name: the live tensors, not copies."""
        return {name: tensor for part in self.parts for name, tensor in part.state.items()}


def freeze_all_but(model: nn.Module, patterns: Sequence[str]) -> None:
    """Train only the parameters whose names match one of ``patterns``; none given: all.

    Raises:
        ConfigError: a pattern that no parameter matches.
    """
    names = dict(model.named_parameters())
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"train.only: no parameter is called like {pattern!r}; "
                f"their names are like {next(reversed(names))!r}"
            )
    for name, parameter in names.items() if patterns else ():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, p) for p in patterns))


def gradient_norm(model: nn.Module, layout: Layout = ALONE) -> Tensor:
    """The norm of all gradients of all ranks together, a scalar on the device."""
    if layout.world > 1:
        return step.gradient_norm(model, layout)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads, foreach=True)


def clip_factor(norm: Tensor, highest: float) -> Tensor | None:
    """What gradients of this norm are multiplied by to have at most the ``highest`` (0: any)."""
    return (highest / (norm + 1e-6)).clamp(max=1.0) if highest else None


def is_hidden_matrix(name: str, weight: Tensor) -> bool:
    """Whether Muon takes it: a matrix of a block, the router (a classifier's head) excepted."""
    return weight.ndim >= 2 and name.startswith(("blocks.", "mtp.")) and "router" not in name


def weight_decay(name: str, weight: Tensor, cfg: TrainConfig) -> float:
    """None for norms and biases; for the embedding as configured."""
    spared = weight.ndim < 2 or (name == "embed.weight" and not cfg.decay_embeddings)
    return 0.0 if spared else cfg.weight_decay
