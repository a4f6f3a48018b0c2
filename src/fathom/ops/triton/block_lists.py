"""Who selected each block: the inverse of a selection, built on the device without a host sync.

An *entry* is one selected block of one query: its index in the flattened ``starts_BTMN``. A *bin*
is a place where a block may begin, for one batch row and key head. A stable sort by bin makes the
entries of a bin one list in the order of the queries, and lists are cut into chunks of bounded
length, the units of work of a kernel. Sorting integers on the device is a counting sort for each
digit; its cost is linear in the number of entries.

Shapes: B batch, T queries, M pairs of key head and selection, N blocks, G key heads, S keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Lists(NamedTuple):
    """All entries by bin. Bin ``(b * G + g) * S + s`` is key s of head g in row b."""

    entries: Tensor  # int32 [B * T * M * N], sorted by bin, those of no block last
    ends: Tensor  # int32 [bins], where the list of a bin ends
    limits: Tensor  # int32 [bins], the first key of the next block that anyone selected


class Chunks(NamedTuple):
    """Lists in pieces. Only the first ``number`` rows of ``table`` are chunks."""

    table: Tensor  # int32 [bound, 5]: bin, first entry, end, limit, place in parts (-1: whole list)
    number: Tensor  # int32 [1]
    n_parts: int  # what pieces of cut lists number at most


def lists(starts_BTMN: Tensor, groups: int, n_keys: int) -> Lists:
    """Sort the entries of a selection by block."""
    batch, _, pairs, _ = starts_BTMN.shape
    bins = batch * groups * n_keys
    assert max(bins, starts_BTMN.numel()) < 2**31, "indices are int32"
    device = starts_BTMN.device
    row_B = torch.arange(batch, device=device, dtype=torch.int32)[:, None] * groups
    head_M = torch.arange(pairs, device=device, dtype=torch.int32) // (pairs // groups)
    base_B1M1 = ((row_B + head_M) * n_keys)[:, None, :, None]
    none = (starts_BTMN < 0) | (starts_BTMN >= n_keys)
    bin_BTMN = (starts_BTMN + base_B1M1).masked_fill(none, bins)
    order = bin_BTMN.flatten().sort(stable=True)
    every = torch.arange(bins, device=device, dtype=torch.int32)
    ends = torch.searchsorted(order.values, every, right=True, out_int32=True)
    used = (ends.diff(prepend=ends.new_zeros(1)) > 0).view(-1, n_keys)
    keys = torch.arange(n_keys, device=device)
    later = keys.masked_fill(~used, n_keys).flip(-1).cummin(-1).values.flip(-1)
    limits = torch.cat([later[:, 1:], torch.full_like(later[:, :1], n_keys)], dim=-1)
    return Lists(order.indices.to(torch.int32), ends, limits.flatten().to(torch.int32))


def chunks(made: Lists, length: int, longest: int) -> Chunks:
    """Cut lists into chunks of ``length`` entries.

    ``longest``: what a list may hold, if the chunks of a list are to be added up; 0 if not. If
    some may be cut, chunks stand largest first: programs that walk the table in equal steps then
    get about equal work.
    """
    entries, ends, limits = made
    firsts = torch.cat([ends.new_zeros(1), ends[:-1]])
    pieces = (ends - firsts + length - 1) // length
    until = pieces.cumsum(0)
    cut = longest > length
    # A list that is cut has less than 2 * count / length pieces.
    n_parts = 2 * len(entries) // length if cut else 0
    bound = len(entries) // length + min(len(entries), len(ends))
    slot = torch.arange(bound, device=ends.device)
    bins = torch.searchsorted(until, slot, right=True).clamp(max=len(ends) - 1)
    begin = firsts[bins] + (slot - until[bins] + pieces[bins]) * length
    end = torch.minimum(begin + length, ends[bins])
    parts = torch.full_like(slot, -1)
    if cut:
        of_cut = pieces.masked_fill(pieces < 2, 0)
        part = of_cut.cumsum(0)[bins] - until[bins] + slot
        parts = torch.where(pieces[bins] > 1, part, parts)
    table = torch.stack([bins, begin, end, limits[bins], parts], dim=1).to(torch.int32)
    if cut:
        sizes = (end - begin).masked_fill(slot >= until[-1], 0)
        table = table[sizes.argsort(descending=True, stable=True)]
    return Chunks(table, until[-1:].to(torch.int32), n_parts)
