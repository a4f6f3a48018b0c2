"""MoBA: the portable fixture, its formula in ten lines, its edges and its schedule."""

import pytest
import torch
from torch import Tensor

from fathom.attention import Attention
from fathom.config import LayerGroup, ModelConfig
from fathom.ffn import DenseConfig
from fathom.layers.cache import Cache
from fathom.layers.position import NoPositionConfig
from fathom.layers.step import Step
from fathom.model import build_model
from kinds import DIM, mha, moba

NOWHERE = NoPositionConfig()


def fill(shift: float, *shape: int) -> Tensor:
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (2 * torch.sin(0.7 * n + 1.3 * shift + 0.001 * n**2)).view(shape)


def built(cfg, dim: int = DIM) -> Attention:
    torch.manual_seed(0)
    attention = cfg.build(dim).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return attention


def full(attention: Attention, x: Tensor) -> Tensor:
    return attention(x, Step.full(x[..., 0]))


def rows(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def passing_through(cfg, widths: list[int]) -> Attention:
    """An attention whose input holds queries, keys and values, and whose output is the heads'."""
    attention = built(cfg, sum(widths))
    pieces = torch.eye(sum(widths), dtype=torch.float64).split(widths)
    with torch.no_grad():
        for name, piece in zip(("wq", "wk", "wv"), pieces, strict=True):
            getattr(attention, name).weight.copy_(piece)
        attention.wo.weight.copy_(pieces[0].T)
    return attention


def fixture_attention() -> tuple[Attention, Tensor]:
    cfg = moba(NOWHERE, n_heads=2, n_kv_heads=2, head_dim=8, block_size=8, topk_blocks=3)
    x = torch.cat([fill(shift, 70, 2, 8).flatten(1) for shift in (0, 1, 2)], dim=1)[None]
    return passing_through(cfg, [16, 16, 16]), x.requires_grad_()


def test_the_portable_fixture_has_its_values():
    attention, x = fixture_attention()
    out = full(attention, x)[0, :, :16].unflatten(1, (2, 8))
    close = {"rtol": 0, "atol": 1e-5}
    want = torch.tensor([0.63056, 0.12822, -0.71999, 1.26794]).double()
    torch.testing.assert_close(out[69, 1, :4], want, **close)
    want = torch.tensor([1.13025, -1.34761, -1.18017, 1.34858]).double()
    torch.testing.assert_close(out[30, 0, :4], want, **close)
    assert out.sum().item() == pytest.approx(-0.1734, abs=1e-4)
    assert out.square().sum().item() == pytest.approx(1526.696, abs=1e-3)


def test_the_portable_fixture_has_its_gradients():
    attention, x = fixture_attention()
    out = full(attention, x)[0, :, :16].unflatten(1, (2, 8))
    (out * fill(3, 70, 2, 8)).sum().backward()
    assert x.grad is not None
    grads = x.grad[0].unflatten(1, (3, 2, 8)).unbind(1)
    sums = [1186.8034, 1705.7101, 2043.1093]
    rows_35 = [[0.42818, 1.39409, -0.43617], [-0.22735, -0.10981, 0.26123]]
    rows_35 += [[0.06109, -0.07831, 0.03722]]
    for grad, total, row in zip(grads, sums, rows_35, strict=True):
        assert grad.square().sum().item() == pytest.approx(total, abs=1e-3)
        want = torch.tensor(row).double()
        torch.testing.assert_close(grad[35, 1, :3], want, rtol=0, atol=1e-5)


def in_ten_lines(q: Tensor, k: Tensor, v: Tensor, size: int, topk: int) -> Tensor:
    """One head: equations 1 to 6 of the paper, query by query."""
    out = []
    for t in range(len(q)):
        current = t // size
        scores = [(q[t] @ k[i * size : (i + 1) * size].mean(0)).item() for i in range(current)]
        best = sorted(range(current), key=lambda i: -scores[i])[: topk - 1]
        keys = [s for i in [*best, current] for s in range(i * size, min((i + 1) * size, t + 1))]
        out.append((q[t] @ k[keys].T * q.shape[1] ** -0.5).softmax(-1) @ v[keys])
    return torch.stack(out)


@pytest.mark.parametrize(("size", "topk"), [(5, 3), (4, 2), (1, 6), (7, 1), (30, 2)])
def test_every_head_is_the_formula(size, topk):
    cfg = moba(NOWHERE, block_size=size, topk_blocks=topk)
    attention, x = passing_through(cfg, [24, 12, 12]), torch.randn(1, 23, 48).double()
    q, k, v = (t.unflatten(1, (-1, 6)) for t in x[0].split([24, 12, 12], dim=1))
    heads = [in_ten_lines(q[:, h], k[:, h // 2], v[:, h // 2], size, topk) for h in range(4)]
    got = full(attention, x)[0, :, :24]
    torch.testing.assert_close(got, torch.cat(heads, dim=1))


@pytest.mark.parametrize(
    "changes",
    [{"topk_blocks": 7}, {"block_size": 14}, {"block_size": 99, "topk_blocks": 1}],
    ids=["all-blocks", "one-block", "shorter-than-a-block"],
)
def test_where_every_block_is_read_it_is_causal_attention(changes):
    sparse, dense, x = built(moba(**changes)), mha().build(DIM).double(), rows(14)
    dense.load_state_dict(sparse.state_dict())
    torch.testing.assert_close(full(sparse, x), full(dense, x), rtol=0, atol=1e-12)


def test_with_one_block_a_query_reads_the_block_it_stands_in_and_never_all():
    one, x = built(moba(NOWHERE, block_size=4, topk_blocks=1)), rows(10)
    blocks = [full(one, part) for part in x.split(4, dim=1)]
    torch.testing.assert_close(full(one, x), torch.cat(blocks, dim=1), rtol=0, atol=1e-12)


def test_a_changed_token_changes_nothing_before_it_at_any_place_bit_for_bit():
    attention, x = built(moba(block_size=3, topk_blocks=2, key_conv_size=3)), rows(13, batch=1)
    before = full(attention, x)
    for place in range(1, 13):
        changed = x.clone()
        changed[:, place] += 1
        after = full(attention, changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])


@pytest.mark.parametrize("key_conv_size", [None, 4])
def test_decode_from_every_prefill_length_equals_the_full_forward(key_conv_size):
    cfg = moba(block_size=4, topk_blocks=2, key_conv_size=key_conv_size)
    attention, x = built(cfg), rows(14)
    want = full(attention, x)
    for prefill in range(1, 14):
        cache = Cache([cfg.streams()], batch_size=2, capacity=14, dtype=torch.float64)
        outs = []
        for chunk in x.split([prefill] + [1] * (14 - prefill), dim=1):
            step = Step.cached(chunk[..., 0], cache)
            outs.append(attention(chunk, step.at(cache.layers[0])))
            cache.length = step.total
        torch.testing.assert_close(torch.cat(outs, dim=1), want, rtol=0, atol=1e-12)


def test_permuted_heads_give_permuted_outputs():
    cfg = moba(NOWHERE, n_kv_heads=4, block_size=3, topk_blocks=2)
    attention, x = passing_through(cfg, [24, 24, 24]), torch.randn(1, 17, 72).double()
    order = torch.tensor([2, 0, 3, 1])
    moved = x.unflatten(2, (3, 4, 6))[:, :, :, order].flatten(2)
    got = full(attention, moved)[..., :24].unflatten(2, (4, 6))
    want = full(attention, x)[..., :24].unflatten(2, (4, 6))[:, :, order]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_convolution_gathers_a_keys_own_past():
    attention, x = built(moba(NOWHERE, key_conv_size=3)), rows(6, batch=1)
    k, w = (x[0] @ attention.wk.weight.T).detach(), attention.key_conv.detach()
    padded = torch.cat([torch.zeros(2, 12).double(), k])
    mixed = sum(w[j] * padded[2 - j : 8 - j] for j in range(3))
    want = k + torch.nn.functional.silu(mixed)
    got = attention.unrotated_keys(x, Step.full(x[..., 0]))[0].flatten(1)
    torch.testing.assert_close(got, want)


def model_of(full_from: float | None) -> ModelConfig:
    group = LayerGroup(count=2, attention=moba(full_from=full_from), ffn=DenseConfig(inter_dim=32))
    return ModelConfig(vocab_size=40, dim=DIM, groups=(group,), max_seq_len=64)


def test_training_switches_to_full_attention_at_its_share_and_the_trained_model_is_full():
    tokens = torch.randint(40, (2, 20))
    sparse, switching = build_model(model_of(None), seed=0), build_model(model_of(0.9), seed=0)
    dense = switching(tokens)
    assert not torch.allclose(dense, sparse(tokens), atol=1e-6)
    for progress, same in ((0.0, sparse), (0.89, sparse), (0.9, switching), (1.0, switching)):
        got = switching.loss(tokens, tokens, progress=progress).main
        switching_now = [part.full for part in switching.attentions()]
        assert switching_now == [progress >= 0.9] * 2
        assert torch.equal(got, same.loss(tokens, tokens, progress=progress).main)
    assert torch.equal(switching(tokens), dense)


def test_flops_count_what_each_query_reads():
    cfg, length = moba(block_size=4, topk_blocks=3), 23
    attention = built(cfg)
    chosen = attention.selection(rows(length, batch=1), Step.full(torch.zeros(1, length)))
    starts = chosen.starts_BTIN[0, :, 0]
    for t in range(length):
        keys = sum(min(4, t + 1 - s) for s in starts[t].tolist() if s >= 0)
        assert cfg.core_flops(t + 1) == 2 * 4 * 6 * (2 * keys + t // 4)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"n_kv_heads": 3}, "multiple of n_kv_heads"),
        ({"topk_blocks": 0}, "topk_blocks must be at least 1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"key_conv_size": 1}, "key_conv_size must be at least 2"),
        ({"full_from": 1.5}, "full_from is a share"),
    ],
)
def test_a_moba_that_cannot_be_is_refused_by_name(changes, word):
    with pytest.raises(ValueError, match=word):
        moba(**changes)
