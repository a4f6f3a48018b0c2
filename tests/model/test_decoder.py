"""The decoder: one forward for training, prefill and decode; losses; recomputation; init."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fathom.attention import AttentionConfig
from fathom.config import LayerGroup, ModelConfig, MTPConfig
from fathom.ffn import DenseConfig, FFNConfig, MoEConfig
from fathom.ffn.balance import AuxLoss, AuxLossFree, SeqAuxLoss, ZLoss
from fathom.layers.step import Step
from fathom.model import Decoder, build_model
from fathom.model.init import rule_of
from kinds import KINDS, dsa, mha, mla

DENSE = DenseConfig(inter_dim=40)
COARSE = MoEConfig(n_routed_experts=4, top_k=1, inter_dim=24)
FINE = MoEConfig(
    n_routed_experts=8,
    n_shared_experts=1,
    top_k=3,
    inter_dim=8,
    score_func="sigmoid",
    norm_topk_prob=True,
    balance=(AuxLossFree(), SeqAuxLoss(seq_aux_loss_coeff=0.01), ZLoss(z_loss_coeff=0.001)),
)
GROUPED = MoEConfig(
    n_routed_experts=8,
    top_k=2,
    inter_dim=8,
    score_func="sqrt_softplus",
    n_expert_groups=4,
    n_limited_groups=2,
    group_score="top2",
)
FFN_KINDS = {"dense": DENSE, "coarse": COARSE, "fine": FINE, "grouped": GROUPED}
every_ffn = pytest.mark.parametrize("ffn", FFN_KINDS.values(), ids=FFN_KINDS)


def config(
    attention: AttentionConfig | None = None, ffn: FFNConfig = DENSE, **changes
) -> ModelConfig:
    groups = (
        LayerGroup(count=1, attention=attention or mha(), ffn=DENSE),
        LayerGroup(count=2, attention=attention or mha(), ffn=ffn),
    )
    return ModelConfig(
        **{"vocab_size": 48, "dim": 24, "groups": groups, "init_std": 0.2, **changes}
    )


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 48, (batch, length), generator=generator)


def shifted(ids: Tensor) -> Tensor:
    """Next tokens, -100 at the end of each row."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)


def double(cfg: ModelConfig) -> Decoder:
    return build_model(cfg, seed=1, dtype=torch.float64)


@every_ffn
@pytest.mark.parametrize("attention", [mha(window_size=4), mla()], ids=["window", "mla"])
@pytest.mark.parametrize("sizes", [[1] * 12, [5, 1, 6]], ids=["tokens", "chunks"])
def test_cached_decode_equals_the_full_forward(attention, ffn, sizes):
    model, ids = double(config(attention, ffn)), tokens()
    cache = model.new_cache(2, 12)
    steps = [model(chunk, cache=cache) for chunk in ids.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(ids), rtol=0, atol=1e-10)
    assert cache.length == 12


def test_decode_in_float32_equals_the_full_forward():
    model, ids = build_model(config(mla(), FINE), seed=1), tokens()
    cache = model.new_cache(2, 12)
    steps = [model(ids[:, t : t + 1], cache=cache) for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(ids), rtol=0, atol=1e-5)


@every_ffn
def test_a_changed_future_token_changes_no_earlier_logit(ffn):
    model, ids = build_model(config(ffn=ffn), seed=1), tokens()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 48
    before, after = model(ids), model(changed)
    if ffn is DENSE:
        assert torch.equal(before[:, :7], after[:, :7])
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-5)
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@every_ffn
def test_packed_documents_equal_separate_runs(ffn):
    model, ids = double(config(mla(), ffn)), tokens()
    borders = torch.tensor([0, 5, 12, 20, 24], dtype=torch.int32)
    packed = model(ids, cu_seqlens=borders).flatten(0, 1)
    flat = ids.flatten()
    for start, end in ((0, 5), (5, 12), (12, 20), (20, 24)):
        alone = model(flat[None, start:end])[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=0, atol=1e-10)


def test_the_loss_is_the_mean_cross_entropy_of_valid_targets():
    model, ids = double(config()), tokens()
    targets = shifted(ids)
    log_probs = model(ids).log_softmax(-1)
    picked = log_probs[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    losses = model.loss(ids, targets)
    assert losses.main.item() == pytest.approx(-picked.mean().item(), abs=1e-10)
    assert losses.total.item() == losses.main.item()
    each = model.token_losses(ids, targets)
    torch.testing.assert_close(each[:, :-1].double(), -picked, rtol=0, atol=1e-6)
    assert (each[:, -1] == 0).all()


def test_micro_batches_add_up_to_the_whole_batch():
    model, ids = double(config(mla(), COARSE, mtp=MTPConfig())), tokens(batch=4)
    targets = shifted(ids)
    targets[0, :6] = -100  # unequal numbers of targets a micro-batch
    count = int((targets != -100).sum())
    whole = model.loss(ids, targets)
    parts = [model.loss(ids[i : i + 2], targets[i : i + 2], denominator=count) for i in (0, 2)]
    for name in ("total", "main", "mtp"):
        total = sum(getattr(part, name).item() for part in parts)
        assert total == pytest.approx(getattr(whole, name).item(), abs=1e-10)


@every_ffn
@pytest.mark.parametrize("attention", [mla(), dsa()], ids=["mla", "dsa"])
def test_recomputing_blocks_changes_neither_loss_nor_gradients_nor_counts(attention, ffn):
    model, ids = build_model(config(attention, ffn), seed=1), tokens()
    results = []
    for recompute in (False, True):
        model.checkpoint_blocks = recompute
        model.zero_grad()
        losses = model.loss(ids, shifted(ids))
        losses.total.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        counts = [routed.tokens_per_expert for routed in losses.routing]
        results.append((losses.total.detach(), *grads, *counts))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("attention", "ffn"),
    [(mha(), DENSE), (mla(), FINE), (dsa(), FINE)],
    ids=["llama-like", "deepseek-like", "deepseek-v3.2-like"],
)
def test_a_block_compiles_as_one_graph(attention, ffn):
    torch.compiler.reset()
    model, ids = build_model(config(attention, ffn), seed=1), tokens()
    step = Step.full(ids, torch.tensor([0, 5, 12, 24], dtype=torch.int32))
    x = model.embed(ids).detach()
    compiled = torch.compile(model.blocks[1], fullgraph=True, backend="aot_eager")
    got, want = compiled(x, step), model.blocks[1](x, step)
    torch.testing.assert_close(got.x_BTD, want.x_BTD, rtol=0, atol=1e-6)


def test_mtp_predicts_the_token_after_next_within_its_document():
    model, ids = double(config(mtp=MTPConfig(n_mtp_modules=2))), tokens(batch=1)
    borders = torch.tensor([0, 5, 12], dtype=torch.int32)
    targets = shifted(ids)
    targets[0, 4] = -100  # the last token of the first document
    total = 0.0
    for depth, logits in enumerate(model.mtp_logits(ids, borders), start=1):
        log_probs = logits[0].log_softmax(-1)
        inside = [i for i in range(12 - depth - 1) if not (i < 5 <= i + depth + 1)]
        total -= sum(log_probs[i, ids[0, i + depth + 1]].item() for i in inside)
    count = int((targets != -100).sum())
    losses = model.loss(ids, targets, borders)
    assert losses.mtp.item() == pytest.approx(total / 2 / count, abs=1e-9)
    weighted = losses.main + 0.3 * losses.mtp
    assert losses.total.item() == pytest.approx(weighted.item(), abs=1e-12)


def test_mtp_at_the_end_of_a_document_sees_no_other_document():
    model = double(config(mtp=MTPConfig()))
    ids, borders = tokens(batch=1), torch.tensor([0, 5, 12], dtype=torch.int32)
    targets = shifted(ids)
    targets[0, 4] = -100
    first_only = targets.clone()
    first_only[0, 5:] = -100
    changed = ids.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 48
    losses = [model.loss(x, first_only, borders).mtp.item() for x in (ids, changed)]
    assert losses[0] == losses[1]


def test_mtps_weight_follows_its_schedule():
    cfg = MTPConfig(mtp_loss_coeff=0.3, late_mtp_loss_coeff=0.1, late_from=0.5)
    assert [cfg.loss_coeff(p) for p in (0.0, 0.49, 0.5, 1.0)] == [0.3, 0.3, 0.1, 0.1]
    model, ids = double(config(mtp=cfg)), tokens()
    late = model.loss(ids, shifted(ids), progress=0.9)
    assert late.total.item() == pytest.approx((late.main + 0.1 * late.mtp).item(), abs=1e-12)


def test_mtp_is_not_run_at_inference():
    cfg = config(mtp=MTPConfig())
    with_mtp, without = double(cfg), double(config())
    assert torch.equal(with_mtp(tokens()), without(tokens()))


def test_routing_is_reported_for_every_moe_layer_and_moves_its_bias():
    model, ids = build_model(config(ffn=FINE, mtp=MTPConfig()), seed=1), tokens()
    losses = model.loss(ids, shifted(ids))
    assert [name for name, _ in model.moe_layers()] == [
        "blocks.1.ffn",
        "blocks.2.ffn",
        "mtp.0.block.ffn",
    ]
    counts = [routed.tokens_per_expert for routed in losses.routing]
    assert [int(c.sum()) for c in counts] == [24 * 3, 24 * 3, 22 * 3]
    model.update_expert_bias(counts)
    for (_, moe), c in zip(model.moe_layers(), counts, strict=True):
        want = 0.001 * torch.sign(c.float().mean() - c.float())
        torch.testing.assert_close(moe.router.expert_bias, want)


def test_a_loss_over_the_step_counts_its_earlier_micro_batches_and_no_others():
    balance = (AuxLoss(aux_loss_coeff=0.1, over="step"),)
    model = double(config(ffn=replace(FINE, balance=balance)))
    ids = tokens()
    first = model.loss(ids, shifted(ids))
    counts = [routed.tokens_per_expert for routed in first.routing]
    again = model.loss(ids, shifted(ids), counts_before=counts)  # twice the same: f is as it was
    torch.testing.assert_close(again.balance, first.balance)
    full = [torch.eye(8, dtype=torch.int64)[0] * 10**6 for _ in counts]  # all went to one expert
    skewed = model.loss(ids, shifted(ids), counts_before=full)
    assert (skewed.balance - first.balance).abs() > 1e-3
    assert model.loss(ids, shifted(ids)).balance == first.balance


def test_a_tied_head_is_the_embedding():
    tied = build_model(config(tie_embeddings=True))
    assert "head.weight" not in tied.state_dict()
    assert tied(tokens()).shape == (2, 12, 48)
    assert tied.head_weight is tied.embed.weight


def test_a_full_cache_is_refused_before_anything_is_stored():
    model = double(config())
    cache = model.new_cache(2, 10)
    with pytest.raises(ValueError, match="the cache holds 10 tokens and 12 are needed"):
        model(tokens(), cache=cache)
    assert cache.length == 0
    with pytest.raises(ValueError, match="one document a row"):
        model(tokens(), cache=cache, cu_seqlens=torch.tensor([0, 24]))


def test_initial_values_depend_on_seed_and_name_alone():
    small, deep = config(), config()
    deep = ModelConfig(**{**deep.__dict__, "groups": (*deep.groups, deep.groups[1])})
    torch.manual_seed(7)
    first = build_model(small, seed=3).state_dict()
    torch.manual_seed(8)
    again = build_model(deep, seed=3).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = build_model(small, seed=4).state_dict()
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert not torch.equal(first["blocks.0.attention.wq.weight"], other["embed.weight"][:24])


def test_initial_values_follow_the_table():
    cfg = config(mla(), FINE, depth_scaled_init=True, mtp=MTPConfig(), dim=96)
    scaled = 0.2 / math.sqrt(2 * 3)
    for name, tensor in build_model(cfg).state_dict().items():
        rule = rule_of(name)
        if rule in ("ones", "zeros"):
            assert (tensor == (rule == "ones")).all(), name
        else:
            want = scaled if name.endswith(("wo.weight", "w_down.weight", "w_down")) else 0.2
            assert tensor.std().item() == pytest.approx(want, rel=0.2), name


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    build_model(config())
    assert torch.equal(torch.rand(1), want)


@pytest.mark.parametrize("name", KINDS)
def test_every_attention_runs_in_a_model(name):
    model, ids = build_model(config(KINDS[name], FINE)), tokens()
    losses = model.loss(ids, shifted(ids))
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_routing_bias_stays_float32(dtype):
    model = build_model(config(ffn=FINE), dtype=dtype)
    assert model.blocks[1].ffn.router.expert_bias.dtype == torch.float32
    assert model.embed.weight.dtype == dtype
    assert model(tokens()).dtype == dtype
