"""A model spread over the ranks of a layout: experts by ``ep``, the rest whole or by FSDP2.

FSDP2 (``torch.distributed.fsdp.fully_shard``) cares for what is cut: it gathers a block's
parameters before it runs and scatters its gradients. Of what a rank holds whole the gradients are
added up by ``copies.py``. They are sums, never means: a rank's loss is divided by the whole step's
count of targets.

Every cut is along dim 0: a rank's part of a tensor is a range of its rows.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from fathom.config import ModelConfig
from fathom.convert.parts import Part, whole
from fathom.ffn.experts import Experts
from fathom.model import Decoder, uninitialised
from fathom.model.init import fill
from fathom.parallel.copies import Copies
from fathom.parallel.ep import ExpertParallel
from fathom.parallel.mesh import Layout, is_expert, is_spread, local


def build_part(
    cfg: ModelConfig, layout: Layout, *, seed: int, device: torch.device, dtype: torch.dtype
) -> Decoder:
    """This rank's part of ``build_model``: of every initial value the same bits in every layout.

    No more than one whole tensor is in memory at a time.
    """
    model = uninitialised(cfg, torch.device("meta"), dtype)
    distribute(model, layout)
    model.to_empty(device=device)
    Copies(layout, held_whole(model, layout))
    for name, part in model_parts(model, layout).items():
        everything = torch.empty(part.shape, device=device, dtype=part.tensor.dtype)
        fill(name, everything, cfg, seed)
        with torch.no_grad():
            part.tensor.copy_(of_whole(everything, part))
    return model


def distribute(model: Decoder, layout: Layout) -> None:
    """Cut a model that has no memory yet (on the meta device) to this rank's part."""
    moes = [moe for _, moe in model.moe_layers()]
    for moe in moes:
        moe.sum_over_ranks = layout.sum
        if layout.cfg.ep > 1:
            fp8, n_experts = layout.cfg.dispatch == "fp8", moe.cfg.n_routed_experts
            how = {"fp8": fp8, "nodes": layout.ep_nodes}
            moe.dispatcher = ExpertParallel(n_experts, layout.ep_group, **how)
            keep_some(moe.experts, n_experts // layout.cfg.ep)
    if layout.cfg.shard == 1:
        return
    assert layout.dense is not None
    assert layout.experts is not None
    whole: set[nn.Parameter] = set()
    if layout.cfg.ep > 1:
        for moe in moes:
            if layout.cfg.expert_shard > 1:
                _shard(moe.experts, layout.experts)
            else:
                whole |= set(moe.experts.parameters())
    for module in (*model.blocks, *model.mtp, model):
        _shard(module, layout.dense, whole)
    for method in ("loss", "token_losses"):
        register_fsdp_forward_method(model, method)


def held_whole(model: Decoder, layout: Layout) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
    """The parameters that lie whole on several ranks, each with these."""
    assert layout.dense is not None
    assert layout.experts is not None
    found = []
    for name, param in model.named_parameters():
        ranks = (layout.experts if is_expert(name, layout) else layout.dense)["replicate"]
        if not is_spread(param) and ranks.size() > 1:
            found.append((param, ranks.get_group()))
    return found


def keep_some(experts: Experts, n_experts: int) -> None:
    """Leave ``n_experts`` of them, without values."""
    for name, weight in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(weight.new_empty(n_experts, *weight.shape[1:])))


def _shard(module: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter] | None = None) -> None:
    axes = mesh["shard"] if mesh["replicate"].size() == 1 else mesh
    sharded = fully_shard(module, mesh=axes, ignored_params=ignored)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def model_parts(model: Decoder, layout: Layout) -> dict[str, Part]:
    """What this rank holds of every parameter and saved buffer, by its name in one process."""
    state = model.state_dict(keep_vars=True)
    return {name: part_of(name, tensor, layout) for name, tensor in state.items()}


def part_of(name: str, tensor: Tensor, layout: Layout) -> Part:
    """What this rank holds of the tensor called ``name``; of equal parts the first rank's is saved.

    ``tensor`` is a parameter, as FSDP2 left it or plain, or a buffer.
    """
    assert layout.dense is not None
    assert layout.experts is not None
    rows = tensor.shape[0] if tensor.ndim else 0  # of all ranks of a shard axis together
    expert = is_expert(name, layout)
    mesh, first = layout.experts if expert else layout.dense, 0
    copies_before = mesh["replicate"].get_local_rank()
    if is_spread(tensor):
        shards, index = mesh["shard"].size(), mesh["shard"].get_local_rank()
        first = min(-(-rows // shards) * index, rows)
    else:
        copies_before += mesh["shard"].get_local_rank()
    shape = list(tensor.shape)
    if expert:
        first += rows * layout.ep_rank
        shape[0] = rows * layout.cfg.ep
    start = [first, *[0] * (tensor.ndim - 1)] if tensor.ndim else []
    return Part(local(tensor), tuple(shape), tuple(start), write=copies_before == 0)


def of_whole(whole: Tensor, part: Part) -> Tensor:
    """The numbers of a whole tensor that ``part`` stands for."""
    spans = zip(part.start, part.tensor.shape, strict=True)
    return whole[tuple(slice(start, start + size) for start, size in spans)]


def placing(model: Decoder, layout: Layout) -> Callable[[str, Tensor], Part]:
    """Where this rank's part of each tensor of a checkpoint lies in the whole, by its name.

    The names are those of the model, and ``kind.name`` for the optimizer's state of a parameter.
    """
    params = model_parts(model, layout)

    def place(name: str, tensor: Tensor) -> Part:
        if name in params:
            return part_of(name, tensor, layout)
        return state_part(tensor, params[name.partition(".")[2]], write=layout.leads)

    return place


def state_part(tensor: Tensor, param: Part, *, write: bool) -> Part:
    """The place of an optimizer's state: as its parameter's, or a scalar, which ``write`` saves.

    Muon's momentum is a stack of matrices: a parameter of one matrix is a stack of one, and gate
    and up projection of each expert are two.
    """
    if tensor.ndim == 0:
        return whole(tensor, write=write)
    shape, start = param.shape, param.start
    if len(shape) < tensor.ndim:
        return Part(tensor, (1, *shape), (0, *start), param.write)
    if tensor.shape[1:] != param.tensor.shape[1:]:
        each = shape[1] // tensor.shape[1]
        shape, start = (each * shape[0], tensor.shape[1], shape[2]), (each * start[0], 0, 0)
    return Part(tensor, shape, start, param.write)
