"""Every initial value, as a table: the first pattern found in a parameter's name decides.

Each tensor has a random stream of its own, seeded by the run's seed and its name, so an initial
value depends neither on the order of layers, nor on what else is built, nor on global state.
"""

import math
import zlib

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig

ONES, ZEROS, NORMAL, OUTPUT = "ones", "zeros", "normal", "output"

TABLE = (  # pattern in the name -> rule
    ("norm.weight", ONES),
    ("bias", ZEROS),  # biases of projections, and the routing-only bias of experts
    (".wo.", OUTPUT),  # the two projections that write into the residual
    ("w_down", OUTPUT),
    ("", NORMAL),  # embedding, head, router and every other matrix
)


def rule_of(name: str) -> str:
    """The table's rule for a parameter or buffer."""
    return next(rule for pattern, rule in TABLE if pattern in name)


def std_of(rule: str, cfg: ModelConfig) -> float:
    """Standard deviation of a random rule."""
    shrink = rule == OUTPUT and cfg.depth_scaled_init
    return cfg.init_std / math.sqrt(2 * cfg.n_layers) if shrink else cfg.init_std


def init_weights(model: nn.Module, cfg: ModelConfig, seed: int) -> None:
    """Fill every parameter and saved buffer in place, on whatever device it lies."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        fill(name, tensor, cfg, seed)


@torch.no_grad()
def fill(name: str, tensor: Tensor, cfg: ModelConfig, seed: int) -> None:
    """Give the whole tensor called ``name`` its initial value, in place."""
    rule = rule_of(name)
    if rule == ONES:
        tensor.fill_(1)
    elif rule == ZEROS:
        tensor.zero_()
    else:
        generator = torch.Generator(tensor.device).manual_seed(_seed_of(name, seed))
        tensor.normal_(0, std_of(rule, cfg), generator=generator)


def _seed_of(name: str, seed: int) -> int:
    return zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1 % 2**32) << 16
