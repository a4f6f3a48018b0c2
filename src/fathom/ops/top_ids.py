"""The ids of the largest values, in an order that is always the same.

An op of its own, so that ``torch.compile`` leaves the sort to PyTorch: Triton is slow to compile
inductor's sort of a row (a block of 31 experts took 89 s on an H100, blocks without one 4 to 12).

Shapes: N rows, E values of a row, K of them chosen.
"""

import torch
from torch import Tensor

from fathom.ops.registry import op


def top_ids(values_NE: Tensor, k: int) -> Tensor:
    """Ids ``[N, k]`` of the largest values, the best first; of equal ones the lowest index.

    ``torch.topk`` promises no order among equals. A stable sort does, and is quick on a GPU. On the
    CPU it takes two to four times as long as the maximum ``k`` times over, of which
    ``Tensor.max`` promises the first.
    """
    return _top_ids(values_NE.detach(), k)


def _fake(values_NE: Tensor, k: int) -> Tensor:
    return values_NE.new_empty(values_NE.shape[0], k, dtype=torch.int64)


@op("top_ids", fake=_fake, flops=lambda *_: 0)
def _top_ids(values_NE: Tensor, k: int) -> Tensor:
    if values_NE.device.type != "cpu":
        order_NE = values_NE.argsort(dim=-1, descending=True, stable=True)
        return order_NE[:, :k].contiguous()
    left_NE = values_NE.clone()
    ids: list[Tensor] = []
    for _ in range(k):
        best_N1 = left_NE.max(-1, keepdim=True).indices
        ids.append(best_N1)
        left_NE.scatter_(-1, best_N1, -torch.inf)
    return torch.cat(ids, dim=-1)
