"""The contiguous cache: whole streams, rings, rows of unequal length."""

import torch

from fathom.layers.cache import Cache, Stream, Whole


def positions(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_a_whole_stream_returns_everything_so_far():
    cache = Cache([[Stream("k", 3)]], batch_size=1, capacity=8)
    first, second = torch.randn(1, 2, 3), torch.randn(1, 1, 3)
    cache.layers[0].append(positions([0, 1]), 2, [first])
    keys, (stored,) = cache.layers[0].append(positions([2]), 3, [second])
    assert keys.tolist() == [[0, 1, 2]]
    assert torch.equal(stored, torch.cat([first, second], dim=1))


def test_a_ring_returns_the_old_window_and_the_new_rows_with_their_positions():
    cache = Cache([[Stream("k", 1, window=3)]], batch_size=1, capacity=100)
    layer = cache.layers[0]
    for place in range(5):
        keys, (stored,) = layer.append(
            positions([place]), place + 1, [torch.full((1, 1, 1), place)]
        )
    seen = dict(zip(keys[0].tolist(), stored[0, :, 0].tolist(), strict=True))
    assert seen == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}


def test_a_chunk_longer_than_the_window_leaves_its_newest_tokens_in_the_ring():
    cache = Cache([[Stream("k", 1, window=3)]], batch_size=1, capacity=100)
    chunk = torch.arange(7.0).view(1, 7, 1)
    cache.layers[0].append(positions(list(range(7))), 7, [chunk])
    keys, _ = cache.layers[0].append(positions([7]), 8, [torch.tensor([[[7.0]]])])
    assert sorted(keys[0].tolist()) == [4, 5, 6, 7]


def test_a_window_as_long_as_the_capacity_is_kept_whole():
    cache = Cache([[Stream("k", 1, window=64)]], batch_size=1, capacity=16)
    store = cache.layers[0].stores["k"]
    assert isinstance(store, Whole)
    assert store.buffer.shape == (1, 16, 1)


def test_rows_views_write_into_the_whole_cache():
    cache = Cache([[Stream("k", 1)]], batch_size=2, capacity=4)
    part = cache.rows(1, 2)
    part.layers[0].append(positions([0]), 1, [torch.ones(1, 1, 1)])
    assert cache.layers[0].stores["k"].buffer[:, 0, 0].tolist() == [0.0, 1.0]
    assert (part.length, cache.length) == (0, 0)


def test_bytes_follow_the_declaration():
    streams = [Stream("k", 64), Stream("scale", 2, dtype="float32")]
    cache = Cache([streams, streams], batch_size=3, capacity=10, dtype=torch.bfloat16)
    declared = 2 * 3 * sum(stream.num_bytes(10) for stream in streams)
    assert cache.num_bytes == declared


def test_a_windowed_stream_costs_its_window_and_a_compressed_one_its_entries():
    assert Stream("k", 4, window=16).num_bytes(1000) == 16 * 4 * 2
    assert Stream("k", 4, window=16).num_bytes(10) == 10 * 4 * 2
    assert Stream("cmp", 4, tokens_per_entry=16).num_bytes(1000) == 62 * 4 * 2
    assert Stream("k", 4).num_bytes(10, "float8_e4m3fn") == 40
