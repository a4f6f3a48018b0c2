"""The processes of a run and their places on the mesh: ``dp`` x ``ep``.

Rank ``d * ep + e`` is replica d and holds the e-th part of the experts. All ranks split the batch;
``ep`` is how the experts are spread, not another way to split work. A run in one process has the
layout ``ALONE``, which adds nothing to a step.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fathom.config import ParallelConfig
from fathom.convert.ranks import Ranks
from fathom.parallel.watch import Watch
from fathom.settings import ConfigError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # takes a second to import

Answer = TypeVar("Answer")


class Layout:
    """Where this process is among those of the run.

    Attributes:
        cfg: the sizes of the axes.
        rank: this process, from 0; rank 0 writes and speaks.
        mesh: named ``dp`` and ``ep``; None in one process.
        dense: the axes (``replicate``, ``shard``) over which all but the experts are spread.
        experts: the same for the experts of one place of ``ep``.
        ranks: all of them, for what they save together.
        adds_up: whether the next backward is a step's last, after which copies add up gradients.
    """

    def __init__(self, cfg: ParallelConfig, rank: int = 0, device_type: str = "cpu") -> None:
        self.cfg, self.rank, self.world = cfg, rank, cfg.world
        self.mesh: DeviceMesh | None = None
        self.dense: DeviceMesh | None = None
        self.experts: DeviceMesh | None = None
        self.ranks = Ranks()
        self.adds_up = True
        self.passed = 0  # exchanges that this rank has entered
        if self.world == 1:
            return
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self.ranks = Ranks(group)
        axes = ("replicate", "shard")
        self.mesh = init_device_mesh(device_type, (cfg.dp, cfg.ep), mesh_dim_names=("dp", "ep"))
        sizes = (self.world // cfg.shard, cfg.shard)
        self.dense = init_device_mesh(device_type, sizes, mesh_dim_names=axes)
        sizes = (cfg.dp // cfg.expert_shard, cfg.expert_shard, cfg.ep)
        self.experts = init_device_mesh(device_type, sizes, mesh_dim_names=(*axes, "ep"))[axes]

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def ep_rank(self) -> int:
        return self.rank % self.cfg.ep

    @property
    def ep_nodes(self) -> int:
        """Over how many nodes those are spread; torchrun says how many ranks a node has."""
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        return self.cfg.ep // math.gcd(self.cfg.ep, per_node)

    @property
    def ep_group(self) -> dist.ProcessGroup:
        """The ranks among which tokens travel."""
        assert self.mesh is not None
        return self.mesh.get_group("ep")

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks that share one copy of what is not an expert; None: each has its own."""
        return None if self.dense is None or self.cfg.shard == 1 else self.dense.get_group("shard")

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return bool(flag) if self.world == 1 else bool(self.sum(torch.tensor(int(flag))) > 0)

    def sum(self, x: Tensor) -> Tensor:
        """``x`` added up over all ranks, in place and without a gradient."""
        if self.world > 1:
            self.passed += 1
            dist.all_reduce(x)
        return x

    def lead(self, do: Callable[[], Answer]) -> Answer:
        """What rank 0 gets from ``do``, on every rank; the others do nothing but wait.

        The answer must be JSON. If rank 0 fails, all end: it with its error, the others silently.
        """
        if self.world == 1:
            return do()
        self.passed += 1
        if not self.leads:
            told = self._broadcast(None)
            if "failed" in told:
                raise SystemExit(1)
            return told["answer"]
        try:
            answer = do()
        except Exception:
            self._broadcast({"failed": True})
            raise
        self._broadcast({"answer": answer})
        return answer

    def _broadcast(self, message: Mapping[str, Any] | None) -> dict[str, Any]:
        """Rank 0's message, as JSON through CPU tensors: nothing of another rank is executed."""
        content = bytearray(json.dumps(message).encode())
        size = torch.tensor([len(content)])
        dist.broadcast(size, 0)
        body = torch.frombuffer(content, dtype=torch.uint8) if self.leads else None
        body = torch.empty(int(size), dtype=torch.uint8) if body is None else body
        dist.broadcast(body, 0)
        return json.loads(body.numpy().tobytes())


def is_expert(name: str, layout: Layout) -> bool:
    """Whether a tensor is cut over ``ep``."""
    return layout.cfg.ep > 1 and ".experts." in name


def is_spread(tensor: Tensor) -> bool:
    """Whether FSDP2 cares for this parameter, which is a ``DTensor`` then."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, in the same memory; a plain one is its own."""
    plain = tensor.detach()
    return cast("DTensor", plain).to_local() if is_spread(plain) else plain


ALONE = Layout(ParallelConfig())


@contextmanager
def started(cfg: ParallelConfig, device: str) -> Iterator[Layout]:
    """The layout of this process, and for as long its process group.

    A group that is there already is used; else ``torchrun``'s variables describe it.

    Args:
        cfg: the sizes of the axes.
        device: as in ``train.device``. On CUDA each process takes the GPU of its local rank and
            NCCL carries its tensors; gloo carries those of the CPU.

    Raises:
        ConfigError: other than ``dp * ep`` processes were started, or more than there are GPUs.
    """
    ready = dist.is_initialized()
    world = dist.get_world_size() if ready else int(os.environ.get("WORLD_SIZE", "1"))
    check_world(cfg, world)
    if world == 1:
        yield ALONE
        return
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if ready:
        yield Layout(cfg, dist.get_rank(), "cuda" if cuda else "cpu")
        return
    if cuda:
        take_gpu(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    store, rank, _ = next(rendezvous("env://"))
    hearts = PrefixStore("hearts", store.clone())  # pyright: ignore[reportAttributeAccessIssue]
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=cfg.timeout),
    )
    layout = Layout(cfg, rank, "cuda" if cuda else "cpu")
    watch = Watch(hearts, rank, world, lambda: layout.passed)
    watch.start()
    try:
        yield layout
        layout.any(False)  # nobody leaves before all are done
    except BaseException as error:
        watch.stop(None if isinstance(error, SystemExit) else error)
        raise
    watch.stop()
    dist.destroy_process_group()


def check_world(cfg: ParallelConfig, world: int) -> None:
    """Refuse another number of processes than the axes have places for."""
    if world != cfg.world:
        raise ConfigError(
            f"parallel.dp * parallel.ep is {cfg.dp} * {cfg.ep} = {cfg.world} processes and "
            f"{world} {'was' if world == 1 else 'were'} started: use fathom train --nproc "
            f"{cfg.world}, torchrun --nproc-per-node {cfg.world}, or other sizes"
        )


def take_gpu(number: int) -> None:
    """Make it this process's own."""
    there = torch.cuda.device_count()
    if number >= there:
        raise ConfigError(
            f"this machine has {there} GPUs and more processes were started on it: start at most "
            f"{there}, or train.device=cpu"
        )
    torch.cuda.set_device(number)
