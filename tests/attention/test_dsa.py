"""DSA beside MLA: equal where everything is read, its two losses apart, an indexer that learns."""

import pytest
import torch
from torch import Tensor

from fathom.attention.dsa import DSA
from fathom.config import LayerGroup, ModelConfig, MTPConfig
from fathom.ffn import DenseConfig
from fathom.layers.step import Step
from fathom.model import build_model
from fathom.model.init import rule_of
from fathom.ops.indexer import index_topk
from kinds import DIM, dsa, mla

LENGTH = 40


def built(length: int = LENGTH, **changes) -> tuple[DSA, Tensor, Step]:
    """A layer with random weights, an input and its step, in float64."""
    torch.manual_seed(0)
    attention = dsa(**changes).build(DIM).double()
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.normal_(1.0 if rule_of(name) == "ones" else 0.0, 0.3)
    x = torch.randn(2, length, DIM, dtype=torch.float64)
    return attention, x, Step.full(x[..., 0])


@pytest.mark.parametrize("changes", [{"index_topk": LENGTH}, {"index_warmup": True}])
def test_with_every_token_read_it_is_mla(changes):
    attention, x, step = built(**changes)
    plain = mla(q_lora_rank=20).build(DIM).double()
    missing = plain.load_state_dict(attention.state_dict(), strict=False)
    assert all(name.startswith("indexer.") for name in missing.unexpected_keys)
    assert torch.equal(attention(x, step), plain(x, step))


def test_it_reads_nothing_but_the_selected_tokens():
    """What was not selected may be anything; the selection itself is fixed here."""
    attention, x, step = built()
    out, indexing = attention.attend(x, step)
    chosen = indexing.selected_BTN[:, -1]
    angles = attention.rope.angles(step.positions_BT, step.total)
    q = attention.queries(attention.query_latent(x), angles)[:, -1:]
    latent, k_rope = attention.latents(x, angles)
    rows = torch.arange(2)[:, None], chosen.long()
    k, v = attention.keys_values(latent[rows], k_rope[rows])
    weights = torch.einsum("bthq,bshq->bhts", q, k).mul(attention.scale).softmax(-1)
    want = attention.wo(torch.einsum("bhts,bshv->bthv", weights, v).flatten(-2))
    torch.testing.assert_close(out[:, -1:], want, rtol=0, atol=1e-10)


def test_both_forms_agree_on_the_selected_tokens():
    absorbed, x, step = built()
    expanded, *_ = built(absorb="never")
    torch.testing.assert_close(absorbed(x, step), expanded(x, step), rtol=0, atol=1e-10)


@pytest.mark.parametrize("warmup", [True, False], ids=["warmup", "sparse"])
def test_each_loss_trains_its_own_part(warmup):
    attention, x, step = built(index_warmup=warmup)
    x.requires_grad_()
    out, indexing = attention.attend(x, step)
    parts = dict(attention.named_parameters())
    names = list(parts)
    own = torch.autograd.grad(indexing.loss, [*parts.values(), x], allow_unused=True)
    assert own[-1] is None
    for name, grad in zip(names, own, strict=False):
        assert (grad is not None) == name.startswith("indexer."), name
    main = torch.autograd.grad(out.sum(), list(parts.values()), allow_unused=True)
    for name, grad in zip(names, main, strict=True):
        assert (grad is None) == name.startswith("indexer."), name


def test_nothing_is_trained_where_nothing_is_to_be():
    attention, x, step = built()
    with torch.no_grad():
        assert attention.attend(x, step)[1].loss is None
    attention.indexer.requires_grad_(False)
    assert attention.attend(x, step)[1].loss is None
    assert built(index_loss_coeff=0.0)[0].attend(x, step)[1].loss is None


def test_where_all_scores_tie_the_oldest_tokens_are_read():
    attention, x, step = built()
    torch.nn.init.zeros_(attention.indexer.w_head.weight)
    selected = attention.attend(x, step)[1].selected_BTN
    assert selected[0, -1].sort().values.tolist() == [0, 1, 2, 3]
    assert selected[0, 1].tolist()[:2] == [0, 1]
    assert selected[0, 1].tolist()[2:] == [-1, -1]


def recall(attention: DSA, x: Tensor, step: Step, topk: int) -> float:
    """Share of the tokens with the highest true weights that the indexer ranks highest too."""
    weights = attention.scores(x, step).softmax(-1).mean(dim=1)[:, topk:]
    true = weights.topk(topk).indices
    angles = attention.rope.angles(step.positions_BT, step.total)
    indices = attention.indexer(x, attention.query_latent(x), angles)
    found = index_topk(*indices, *attention.interval(step), topk=topk)[:, topk:]
    return (found[..., None] == true[..., None, :]).any(-1).double().mean().item()


def test_the_indexer_learns_which_tokens_the_attention_reads():
    """Recall of the true top 4 rises in warm-up, and further on the selected set alone."""
    attention, *_ = built(index_warmup=True, qk_rope_head_dim=2)
    sparse, *_ = built(qk_rope_head_dim=2)
    with torch.no_grad():
        attention.wq_b.weight *= 4  # a few tokens then have most of the weight
    train = [torch.randn(4, LENGTH, DIM, dtype=torch.float64) for _ in range(60)]
    test = torch.randn(16, LENGTH, DIM, dtype=torch.float64)
    step, test_step = Step.full(train[0][..., 0]), Step.full(test[..., 0])
    before = recall(attention, test, test_step, 4)
    learn(attention, train, step)
    between = recall(attention, test, test_step, 4)
    sparse.load_state_dict(attention.state_dict())
    learn(sparse, train, step)
    assert between > before + 0.08
    assert recall(sparse, test, test_step, 4) > between + 0.04


def learn(attention: DSA, batches: list[Tensor], step: Step) -> None:
    optimizer = torch.optim.Adam(attention.indexer.parameters(), lr=3e-2)
    for x in batches:
        optimizer.zero_grad()
        attention.attend(x, step)[1].loss.backward()
        optimizer.step()


def hybrid(*attentions, mtp: MTPConfig | None = None) -> ModelConfig:
    groups = tuple(
        LayerGroup(count=1, attention=attention, ffn=DenseConfig(inter_dim=16))
        for attention in attentions
    )
    return ModelConfig(vocab_size=48, dim=DIM, groups=groups, init_std=0.3, mtp=mtp)


SHARING = hybrid(mla(), dsa(), dsa(index_shared=True), mla(), dsa(index_shared=True))


def test_layers_share_the_selection_of_the_indexer_below():
    model = build_model(SHARING, dtype=torch.float64)
    ids = torch.arange(24).view(2, 12)
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda *call: seen.append(call[2].indexing.selected_BTN))
        for index, block in enumerate(model.blocks)
        if index in (1, 2, 4)
    ]
    whole = model(ids)
    for hook in hooks:
        hook.remove()
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    cache = model.new_cache(2, 12)
    chunks = [model(part, cache=cache) for part in ids.split([3, 1, 6, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole, rtol=0, atol=1e-10)


def test_a_layer_that_shares_has_no_indexer_and_keeps_no_index_keys():
    own, shared = dsa(), dsa(index_shared=True)
    assert [stream.name for stream in shared.streams()] == ["latent", "k_rope"]
    assert [stream.name for stream in own.streams()] == ["latent", "k_rope", "index_k"]
    assert shared.num_params(DIM) == mla(q_lora_rank=20).num_params(DIM)
    assert sum(p.numel() for p in shared.build(DIM).parameters()) == shared.num_params(DIM)
    assert own.core_flops(100) - shared.core_flops(100) == 2 * 16 * 10 * 100


@pytest.mark.parametrize(
    ("attentions", "mtp", "words"),
    [
        ([dsa(index_shared=True)], None, "needs a dsa layer below"),
        ([dsa(), dsa(index_shared=True, index_topk=5)], None, "those that it shares"),
        ([dsa(), dsa(index_shared=True)], MTPConfig(), "cannot be in the last group with mtp"),
    ],
    ids=["nothing-below", "other-topk", "mtp"],
)
def test_a_selection_that_cannot_be_shared_is_refused(attentions, mtp, words):
    with pytest.raises(ValueError, match=words):
        hybrid(*attentions, mtp=mtp)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"index_head_dim": 6}, "index_head_dim must be at least qk_rope_head_dim"),
        ({"index_fp8": True}, "index_head_dim that is a power of two, got 10"),
        ({"index_topk": 0}, "index_topk must be at least 1"),
        ({"index_loss_coeff": -1.0}, "index_loss_coeff must be at least 0"),
    ],
)
def test_a_dsa_that_cannot_be_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        dsa(**changes)


def test_index_keys_in_fp8_take_132_bytes_at_a_width_of_128():
    cfg = dsa(index_head_dim=128, index_fp8=True)
    streams = {stream.name: stream.num_bytes(1000) for stream in cfg.streams()}
    assert streams["index_k"] + streams["index_k_scale"] == 132 * 1000


def test_flops_stop_growing_with_the_selected_tokens_but_for_the_indexer():
    cfg = dsa(index_topk=16)
    assert cfg.core_flops(16) == mla().core_flops(16)
    pair = 2 * 4 * (2 * 16 + 8)
    assert cfg.core_flops(17) == 16 * pair + 17 * 2 * 16 * 10
    assert cfg.core_flops(1000) - cfg.core_flops(999) == 2 * 16 * 10
