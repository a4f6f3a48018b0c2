"""A step carries what all layers share, and asks for a mask only where one is needed."""

import pytest
import torch

from fathom.layers.cache import Cache, Stream
from fathom.layers.rope import LinearScaling, Rope
from fathom.layers.step import Step


def cache_of(*windows: int | None, batch: int = 2) -> Cache:
    layers = [[Stream("k", 3, window=window)] for window in windows]
    return Cache(layers, batch_size=batch, capacity=9)


def decoded(length: int, starts: list[int] | None, window: int | None = None) -> list[object]:
    """Keys, streams and mask of one step behind four tokens."""
    cache, given = cache_of(window), torch.manual_seed(0)
    before = torch.randn(2, 4, 3, generator=given)
    Step.cached(torch.zeros(2, 4), cache).at(cache.layers[0]).append(before)
    cache.length = 4
    starts_B = None if starts is None else torch.tensor(starts)
    step = Step.cached(torch.zeros(2, length), cache, starts_B).at(cache.layers[0])
    keys_BS, (stored,) = step.append(torch.randn(2, length, 3, generator=given))
    return [keys_BS, stored, step.mask(keys_BS, window_size=window)]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("window", [None, 3])
def test_rows_known_to_be_equally_long_store_and_see_what_any_rows_do(length, window):
    keys, stored, mask = decoded(length, None, window)
    want_keys, want_stored, want_mask = decoded(length, [4, 4], window)
    assert torch.equal(keys, want_keys)  # pyright: ignore
    assert torch.equal(stored, want_stored)  # pyright: ignore
    if mask is None:
        assert (length, window) == (1, None)
        assert want_mask.all()  # pyright: ignore
    else:
        assert torch.equal(mask, want_mask)  # pyright: ignore


def test_a_window_that_holds_everything_needs_no_mask_either():
    cache = cache_of(None)
    step = Step.cached(torch.zeros(2, 1), cache).at(cache.layers[0])
    keys_BS, _ = step.append(torch.zeros(2, 1, 3))
    assert step.mask(keys_BS, window_size=1) is None
    assert step.mask(keys_BS.clone()) is not None  # keys of anybody's own are looked at


def test_layers_share_angles_and_masks_but_not_across_rotations_and_windows():
    cache = cache_of(None, None, 2)
    step = Step.cached(torch.zeros(2, 3), cache)
    first, second, ring = (step.at(layer) for layer in cache.layers)
    new = torch.zeros(2, 3, 3)
    keys = [each.append(new)[0] for each in (first, second, ring)]
    assert first.mask(keys[0]) is second.mask(keys[1])
    assert first.mask(keys[0], window_size=2) is not first.mask(keys[0])
    assert ring.mask(keys[2], window_size=2).shape == (2, 1, 3, 5)  # pyright: ignore
    rope, same, other = Rope(4, 100.0), Rope(4, 100.0), Rope(4, 100.0, LinearScaling(factor=2.0))
    assert first.angles(rope) is second.angles(same)
    assert not torch.equal(first.angles(rope)[0], first.angles(other)[0])


def test_the_next_step_shares_nothing_with_this_one():
    cache = cache_of(None)
    rope = Rope(4, 100.0)
    first = Step.cached(torch.zeros(2, 1), cache)
    angles = first.angles(rope)
    cache.length = 1
    assert not torch.equal(Step.cached(torch.zeros(2, 1), cache).angles(rope)[0], angles[0])
