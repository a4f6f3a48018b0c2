"""What must hold for every attention and position: decode, causality, packing, counts."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fathom.attention import Attention, AttentionConfig
from fathom.layers.cache import Cache
from fathom.layers.step import Step
from fathom.model.init import rule_of
from kinds import DIM, DYNAMIC, KINDS, mha, mla

every_kind = pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
LENGTH = 11


def built(cfg: AttentionConfig, dtype: torch.dtype = torch.float64) -> Attention:
    torch.manual_seed(0)
    attention = cfg.build(DIM).to(dtype)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.normal_(1.0 if rule_of(name) == "ones" else 0.0, 0.3)
    return attention


def inputs(batch: int = 2, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, DIM, dtype=torch.float64, generator=generator)


def full(attention: Attention, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    return attention(x, Step.full(x[..., 0], cu_seqlens))


def new_cache(cfg: AttentionConfig, batch: int = 2) -> Cache:
    streams = [cfg.streams()]
    return Cache(streams, batch_size=batch, capacity=LENGTH + 2, dtype=torch.float64)


def in_chunks(
    attention: Attention, x: Tensor, cache: Cache, sizes: list[int], starts: Tensor | None = None
) -> Tensor:
    outputs = []
    for chunk in x.split(sizes, dim=1):
        step = Step.cached(chunk[..., 0], cache, starts)
        outputs.append(attention(chunk, step.at(cache.layers[0])))
        cache.length = step.total
        starts = None if starts is None else starts + chunk.shape[1]
    return torch.cat(outputs, dim=1)


@every_kind
@pytest.mark.parametrize(
    "sizes", [[1] * LENGTH, [4, 1, 1, 5], [LENGTH]], ids=["tokens", "chunks", "prefill"]
)
def test_cached_decode_equals_the_full_forward(cfg, sizes):
    attention, x = built(cfg), inputs()
    cached = in_chunks(attention, x, new_cache(cfg), sizes)
    torch.testing.assert_close(cached, full(attention, x), rtol=0, atol=1e-10)


@every_kind
def test_rows_of_unequal_length_decode_as_if_each_were_alone(cfg):
    attention, x = built(cfg), inputs()
    cache, lengths = new_cache(cfg), [3, 7]
    for row, length in enumerate(lengths):
        in_chunks(attention, x[row : row + 1, :length], cache.rows(row, row + 1), [length])
    cache.length = max(lengths)
    rows = [x[row, length : length + 3] for row, length in enumerate(lengths)]
    got = in_chunks(attention, torch.stack(rows), cache, [1, 1, 1], torch.tensor(lengths))
    for row, length in enumerate(lengths):
        want = full(attention, x[row : row + 1, : length + 3])[0, length:]
        torch.testing.assert_close(got[row], want, rtol=0, atol=1e-10)


@every_kind
def test_a_changed_future_token_changes_no_earlier_output(cfg):
    attention, x = built(cfg, torch.float32), inputs().float()
    changed = x.clone()
    changed[:, 6] += 1
    before, after = full(attention, x), full(attention, changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6], after[:, 6])


@every_kind
def test_packed_documents_equal_separate_runs(cfg):
    attention, x = built(cfg), inputs()
    borders = [0, 4, 5, LENGTH, LENGTH + 8, 2 * LENGTH]
    packed = full(attention, x, torch.tensor(borders, dtype=torch.int32)).flatten(0, 1)
    rows = x.flatten(0, 1)
    for start, end in pairwise(borders):
        alone = full(attention, rows[None, start:end])[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=0, atol=1e-12)


@every_kind
def test_parameters_are_counted_as_built(cfg):
    assert cfg.num_params(DIM) == sum(p.numel() for p in cfg.build(DIM).parameters())


@every_kind
def test_gradients_reach_every_parameter(cfg):
    attention, x = built(cfg), inputs()
    out, indexing = attention.attend(x, Step.full(x[..., 0]))
    loss = out.square().sum()
    if indexing is not None:
        loss = loss + indexing.loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attention.parameters())


def test_dynamic_rope_scales_with_the_length_in_use():
    attention, x = built(DYNAMIC), inputs()
    plain = built(mha())
    plain.load_state_dict(attention.state_dict())
    assert DYNAMIC.position.rope(6).frequencies(4).tolist() != (
        DYNAMIC.position.rope(6).frequencies(LENGTH).tolist()
    )
    assert torch.isfinite(full(attention, x)).all()


def per_head(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One head, one query at a time: ``softmax(scale q.k) v``. The definition."""
    rows = []
    for t in range(len(q)):
        weights = (scale * (k[: t + 1] @ q[t])).softmax(0)
        rows.append(weights @ v[: t + 1])
    return torch.stack(rows)


def test_gqa_heads_read_contiguous_groups():
    cfg = KINDS["no-position"]
    attention, x = built(cfg), inputs(batch=1)
    row = x[0]
    q = (row @ attention.wq.weight.T).view(LENGTH, 4, 6)
    k = (row @ attention.wk.weight.T).view(LENGTH, 2, 6)
    v = (row @ attention.wv.weight.T).view(LENGTH, 2, 6)
    heads = [per_head(q[:, h], k[:, h // 2], v[:, h // 2], 6**-0.5) for h in range(4)]
    want = torch.cat(heads, dim=-1) @ attention.wo.weight.T
    torch.testing.assert_close(full(attention, x)[0], want, rtol=0, atol=1e-10)


def test_a_shared_query_asks_every_key_head_the_same():
    cfg = mha(KINDS["no-position"].position, n_kv_heads=4, shared_query=True)
    attention, x = built(cfg), inputs(batch=1)
    row = x[0]
    q = row @ attention.wq.weight.T
    k = (row @ attention.wk.weight.T).view(LENGTH, 4, 6)
    v = (row @ attention.wv.weight.T).view(LENGTH, 4, 6)
    heads = [per_head(q, k[:, h], v[:, h], 6**-0.5) for h in range(4)]
    want = torch.cat(heads, dim=-1) @ attention.wo.weight.T
    torch.testing.assert_close(full(attention, x)[0], want, rtol=0, atol=1e-10)


def test_alibi_subtracts_a_slope_times_the_distance():
    cfg = KINDS["alibi"]
    assert cfg.position.slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert cfg.position.slopes(3).tolist() == [2**-4, 2**-8, 2**-2]
    attention, x = built(mha(cfg.position, n_kv_heads=4)), inputs(batch=1)
    row = x[0]
    q, k, v = (
        (row @ w.weight.T).view(LENGTH, 4, 6) for w in (attention.wq, attention.wk, attention.wv)
    )
    places = torch.arange(LENGTH)
    heads = []
    for h, slope in enumerate(cfg.position.slopes(4).double()):
        scores = 6**-0.5 * q[:, h] @ k[:, h].T - slope * (places[:, None] - places)
        scores = scores.masked_fill(places > places[:, None], -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, h])
    want = torch.cat(heads, dim=-1) @ attention.wo.weight.T
    torch.testing.assert_close(full(attention, x)[0], want, rtol=0, atol=1e-10)


def test_decoupled_rope_is_an_added_bias_on_content_scores():
    cfg = mha(KINDS["decoupled"].position, n_kv_heads=4)
    attention, x = built(cfg), inputs(batch=1)
    q_all, k, v, k_rope = attention.queries_keys_values(x, Step.full(x[..., 0]))
    q, q_rope = q_all[0].split([6, 4], dim=-1)
    k, v = k[0].view(LENGTH, 4, 6), v[0].view(LENGTH, 4, 6)
    places = torch.arange(LENGTH)
    heads = []
    for h in range(4):
        bias = 10**-0.5 * q_rope[:, h] @ k_rope[0].T
        scores = 10**-0.5 * q[:, h] @ k[:, h].T + bias
        scores = scores.masked_fill(places > places[:, None], -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, h])
    want = torch.cat(heads, dim=-1) @ attention.wo.weight.T
    torch.testing.assert_close(full(attention, x)[0], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mla", "mla-compressed", "mla-bias", "mla-yarn"])
def test_absorbed_equals_expanded(name):
    cfg = KINDS[name]
    expanded, x = built(cfg), inputs()
    absorbed = mla(cfg.position, cfg.q_lora_rank, bias=cfg.bias, absorb="always").build(DIM)
    absorbed.double().load_state_dict(expanded.state_dict())
    torch.testing.assert_close(full(absorbed, x), full(expanded, x), rtol=0, atol=1e-10)


def test_absorption_starts_where_few_queries_read_a_long_cache():
    """The break-even of DeepSeek-V3's shape: T < 170.7 for a long cache, 73 at S = 128."""
    v3 = mla().__class__(
        n_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        position=KINDS["mla"].position,
    )
    for total, limit in ((128, 73), (1024, 146), (4096, 163)):
        assert v3.use_absorbed(limit, total, cached=True)
        assert not v3.use_absorbed(limit + 1, total, cached=True)
    assert not v3.use_absorbed(1, 4096, cached=False)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"n_kv_heads": 3}, "multiple of n_kv_heads"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"n_heads": 0}, "n_heads must be at least 1"),
        ({"window_size": 0}, "window_size"),
    ],
)
def test_an_mha_that_cannot_be_is_refused_by_name(changes, word):
    fields = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "position": KINDS["gqa"].position}
    with pytest.raises(ValueError, match=word):
        mha().__class__(**{**fields, **changes})


def test_an_mla_with_an_odd_rope_width_is_refused_by_name():
    sizes = {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "v_head_dim": 10}
    with pytest.raises(ValueError, match="qk_rope_head_dim must be even"):
        mla().__class__(n_heads=4, qk_rope_head_dim=7, position=KINDS["mla"].position, **sizes)
