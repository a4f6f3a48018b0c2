"""NSA: the portable fixture branch by branch, its edges, its compression, its decode."""

import pytest
import torch
from torch import Tensor

from fathom.attention import Attention
from fathom.layers.cache import Cache
from fathom.layers.position import NoPositionConfig
from fathom.layers.step import Step
from fathom.ops import attention as dense_attention
from kinds import DIM, nsa

NOWHERE = NoPositionConfig()
CMP, SLC, WIN = range(3)


def fill(shift: float, *shape: int) -> Tensor:
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (2 * torch.sin(0.7 * n + 1.3 * shift + 0.001 * n**2)).view(shape)


def built(cfg, dim: int = DIM) -> Attention:
    torch.manual_seed(0)
    attention = cfg.build(dim).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return attention


def step_of(x: Tensor) -> Step:
    return Step.full(x[..., 0])


def rows(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


FIXTURE = nsa(
    NOWHERE,
    head_dim=8,
    v_head_dim=8,
    cmp_block_size=4,
    cmp_stride=2,
    block_size=8,
    topk_blocks=5,
    window_size=6,
    share_kv=True,
    compression="mean",
)


def fixture_attention() -> tuple[Attention, Tensor]:
    """Its input holds queries, keys and values; its gates are 1; its output is the heads'."""
    attention = built(FIXTURE, 64)
    pieces = torch.eye(64, dtype=torch.float64).split([32, 16, 16])
    with torch.no_grad():
        for name, piece in zip(("wq", "wk", "wv"), pieces, strict=True):
            getattr(attention, name).weight.copy_(piece)
        attention.wo.weight.copy_(pieces[0].T)
        attention.gate.weight.zero_()
        attention.gate.bias.fill_(50.0)
    x = torch.cat([fill(s, 70, n, 8).flatten(1) for s, n in ((0, 4), (1, 2), (2, 2))], dim=1)
    return attention, x[None].requires_grad_()


def test_the_portable_fixture_has_its_values_in_every_branch():
    attention, x = fixture_attention()
    branches = attention.branches(x, step_of(x))
    last = torch.stack([branch[0, 69, 3, :4] for branch in branches])
    want = [
        [0.27674, 0.3397, 0.26942, -0.17665],
        [1.25119, 0.87708, -0.3262, -1.3077],
        [0.66259, -0.3572, 0.04564, 0.24565],
    ]
    torch.testing.assert_close(last, torch.tensor(want).double(), rtol=0, atol=1e-5)
    sums = [branch.sum().item() for branch in branches]
    squares = [branch.square().sum().item() for branch in branches]
    assert sums == pytest.approx([0.6077, -3.9891, -9.2407], abs=1e-4)
    assert squares == pytest.approx([675.263, 1849.322, 2218.326], abs=1e-3)


def test_the_portable_fixture_selects_its_blocks():
    attention, x = fixture_attention()
    starts = attention.selection(x, step_of(x)).starts_BTIN[0] // 8
    assert [sorted(row) for row in starts[69].tolist()] == [[0, 1, 2, 7, 8], [0, 1, 3, 7, 8]]
    assert [sorted(row) for row in starts[45].tolist()] == [[0, 2, 3, 4, 5]] * 2


def test_the_portable_fixture_has_its_gradients():
    attention, x = fixture_attention()
    out = attention(x, step_of(x))[0, :, :32].unflatten(1, (4, 8))
    (out * fill(3, 70, 4, 8)).sum().backward()
    assert x.grad is not None
    dq, dk, dv = (g.unflatten(1, (-1, 8)) for g in x.grad[0].split([32, 16, 16], dim=1))
    sums = [6017.7951, 8852.9650, 13620.7320]
    assert [g.square().sum().item() for g in (dq, dk, dv)] == pytest.approx(sums, abs=1e-3)
    got = torch.stack([g[35, 1, :3] for g in (dq, dk, dv)])
    want = [[-1.18275, -0.36741, 0.64363], [2.33152, -3.39216, 3.59249]]
    want += [[3.70508, -1.80407, 0.16183]]
    torch.testing.assert_close(got, torch.tensor(want).double(), rtol=0, atol=1e-5)


def causal(attention, x: Tensor, branch: int) -> Tensor:
    """A branch as plain causal attention over its own keys and values."""
    k, v = attention.keys_values(x, step_of(x))[branch]
    q = attention.queries(x, step_of(x))
    return dense_attention(q, k, v, scale=attention.scale, causal=True)


def test_where_every_block_is_selected_the_selected_branch_is_causal_attention():
    attention, x = built(nsa(block_size=4, topk_blocks=4)), rows(15)
    got = attention.branches(x, step_of(x))[SLC]
    torch.testing.assert_close(got, causal(attention, x, SLC), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window_size", [15, 16, 1000])
def test_a_window_as_long_as_the_text_is_causal_attention(window_size):
    attention, x = built(nsa(window_size=window_size)), rows(15)
    got = attention.branches(x, step_of(x))[WIN]
    torch.testing.assert_close(got, causal(attention, x, WIN), rtol=0, atol=1e-12)


def test_entries_of_one_token_make_the_compressed_branch_causal_attention():
    one = {"cmp_block_size": 1, "cmp_stride": 1, "compression": "mean"}
    attention, x = built(nsa(NOWHERE, **one)), rows(9)
    got = attention.branches(x, step_of(x))[CMP]
    torch.testing.assert_close(got, causal(attention, x, CMP), rtol=0, atol=1e-12)


def test_before_the_first_entry_the_compressed_branch_gives_zeros_and_finite_gradients():
    attention = built(nsa(cmp_block_size=4, cmp_stride=4, block_size=4, topk_blocks=3))
    x = rows(7).requires_grad_()
    out = attention.branches(x, step_of(x))[CMP]
    assert not out[:, :3].any()
    assert out[:, 3:].all()
    short = rows(3).requires_grad_()
    (attention(x, step_of(x)).sum() + attention(short, step_of(short)).sum()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert short.grad is not None
    assert short.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in attention.parameters())


def test_a_changed_token_changes_nothing_before_it_at_any_place_bit_for_bit():
    attention = built(nsa(cmp_block_size=4, cmp_stride=2, block_size=4, topk_blocks=3))
    x = rows(15, batch=1)
    before = attention.branches(x, step_of(x))
    for place in range(1, 15):
        changed = x.clone()
        changed[:, place] += 1
        after = attention.branches(changed, step_of(changed))
        for old, new in zip(before, after, strict=True):
            assert torch.equal(new[:, :place], old[:, :place])


@pytest.mark.parametrize(
    "changes",
    [{}, {"share_kv": True, "compression": "weighted"}, {"compress_rotated": True}],
    ids=["per-branch", "shared", "rotated-first"],
)
def test_decode_from_every_prefill_length_equals_the_full_forward(changes):
    sizes = {"cmp_block_size": 4, "cmp_stride": 2, "block_size": 4, "topk_blocks": 3}
    cfg = nsa(**sizes | changes)
    attention, x = built(cfg), rows(14)
    want = attention(x, step_of(x))
    for prefill in range(1, 14):
        cache = Cache([cfg.streams()], batch_size=2, capacity=14, dtype=torch.float64)
        outs = []
        for chunk in x.split([prefill] + [1] * (14 - prefill), dim=1):
            step = Step.cached(chunk[..., 0], cache)
            outs.append(attention(chunk, step.at(cache.layers[0])))
            cache.length = step.total
        torch.testing.assert_close(torch.cat(outs, dim=1), want, rtol=0, atol=1e-12)


def test_every_gate_opens_its_own_branch_of_its_own_head():
    for gate_per in ("head", "token"):
        attention, x = built(nsa(gate_per=gate_per)), rows(9)
        branches = attention.branches(x, step_of(x))
        with torch.no_grad():
            attention.gate.weight.zero_()
            heads = torch.full((4 if gate_per == "head" else 1, 3), -50.0)
            heads[-1, SLC] = 50.0
            attention.gate.bias.copy_(heads.flatten())
        open_heads = torch.zeros_like(branches[SLC])
        first = 3 if gate_per == "head" else 0
        open_heads[:, :, first:] = branches[SLC][:, :, first:]
        want = attention.wo(open_heads.flatten(-2))
        torch.testing.assert_close(attention(x, step_of(x)), want, rtol=0, atol=1e-12)


def test_the_mlp_adds_to_the_mean_and_knows_places():
    attention = built(nsa(cmp_block_size=4, cmp_stride=2))
    compressor, x = attention.cmp_k, torch.randn(1, 1, 4, 1, 6).double()
    placed = (x[0, 0, :, 0] + compressor.place_bias).flatten()
    hidden = torch.nn.functional.silu(compressor.up.weight @ placed)
    want = x.mean(2)[0, 0, 0] + compressor.down.weight @ hidden
    torch.testing.assert_close(compressor(x)[0, 0, 0], want)
    assert not torch.allclose(compressor(x), compressor(x.flip(2)))


def test_an_untrained_weighted_average_is_the_mean():
    compressor = built(nsa(compression="weighted")).cmp_v
    torch.nn.init.zeros_(compressor.weight_bias)
    x = torch.randn(2, 3, 2, 2, 5).double()
    torch.testing.assert_close(compressor(x), x.mean(2))


def test_a_compressed_key_is_turned_by_the_position_of_its_first_token():
    attention, x = built(nsa(cmp_block_size=4, cmp_stride=2, compression="mean")), rows(12)
    k, v = attention.keys_values(x, step_of(x))[CMP]
    _, got, _ = attention.compressed(k, v, step_of(x))
    means = k.unfold(1, 4, 2).mean(-1)
    places = torch.arange(0, 10, 2).expand(2, -1)
    step = Step(places, total=12)
    torch.testing.assert_close(got, attention.rotated(means, step))


def test_heads_of_a_group_select_together_and_groups_apart():
    attention, x = built(nsa(NOWHERE, block_size=2, topk_blocks=4)), rows(24)
    starts = attention.selection(x, step_of(x)).starts_BTIN
    assert starts.shape == (2, 24, 2, 4)
    assert not torch.equal(starts[:, :, 0], starts[:, :, 1])


def test_flops_count_what_each_query_reads():
    cfg = nsa(cmp_block_size=4, cmp_stride=2, block_size=4, topk_blocks=3, window_size=5)
    attention, x = built(cfg), rows(23, batch=1)
    starts = attention.selection(x, step_of(x)).starts_BTIN[0, :, 0]
    for t in range(23):
        entries = len([i for i in range(99) if 2 * i + 3 <= t])
        selected = sum(min(4, t + 1 - s) for s in starts[t].tolist() if s >= 0)
        read = entries + selected + min(t + 1, 5)
        assert cfg.core_flops(t + 1) == 2 * 4 * (11 * read + 6 * entries)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"n_kv_heads": 3}, "multiple of n_kv_heads"),
        ({"cmp_stride": 3}, "cmp_block_size must be a multiple of cmp_stride"),
        ({"block_size": 3, "cmp_stride": 2}, "block_size must be a multiple of cmp_stride"),
        ({"n_local_blocks": 0}, "n_local_blocks must be at least 1"),
        ({"topk_blocks": 2}, "topk_blocks must hold the 1 initial and 2 local"),
        ({"window_size": 0}, "window_size must be at least 1"),
        ({"head_dim": 5}, "head_dim must be even"),
    ],
)
def test_an_nsa_that_cannot_be_is_refused_by_name(changes, word):
    with pytest.raises(ValueError, match=word):
        nsa(**changes)
