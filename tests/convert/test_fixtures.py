"""Logits of Llama, DeepSeek-V2, V3, its MTP and V3.2 on filled weights, equal to transformers 5.23.

The fill rule needs no random numbers: tensor ``t`` (names sorted) and flat index ``n`` give
``0.35 sin(0.7n + 1.3t + 0.001n^2)``, norms ``1 + 0.1 cos(0.9n + 0.5t)``, routing biases
``0.2 sin(1.7n + 0.3t) - 0.1``. The expected values are those of transformers in float32, eager.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fathom.attention import DSAConfig, MHAConfig, MLAConfig
from fathom.config import LayerGroup, ModelConfig, MTPConfig
from fathom.convert.deepseek import deepseek_rules
from fathom.convert.llama import llama_rules
from fathom.convert.rules import Copy, Rule, filled_by
from fathom.ffn import DenseConfig, MoEConfig
from fathom.layers.position import RopeConfig
from fathom.layers.rope import Llama3Scaling, YarnScaling
from fathom.layers.step import Step
from fathom.model import Decoder, build_model
from fathom.ops.indexer import index_scores

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 41, 2]])
FRAME = {"vocab_size": 48, "dim": 32, "norm_eps": 1e-5}


def fill(name: str, shape: torch.Size, t: int) -> Tensor:
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    if "e_score" in name:
        values = 0.2 * torch.sin(1.7 * n + 0.3 * t) - 0.1
    elif "norm" in name:
        values = 1 + 0.1 * torch.cos(0.9 * n + 0.5 * t)
    else:
        values = 0.35 * torch.sin(0.7 * n + 1.3 * t + 0.001 * n**2)
    return values.view(shape).float()


def filled(cfg: ModelConfig, rules: list[Rule]) -> Decoder:
    """A model whose tensors, under their Hugging Face names, follow the fill rule."""
    model = build_model(cfg)
    parts = {
        name: (rule, part)
        for name, (rule, part) in filled_by(rules, model.state_dict()).items()
        if not isinstance(rule, Copy)
    }
    main = sorted(name for name in parts if not name.startswith("model.layers.2."))
    mtp = sorted(name for name in parts if name.startswith("model.layers.2."))
    for names, first in ((main, 0), (mtp, 100)):
        for t, name in enumerate(names, start=first):
            rule, part = parts[name]
            part.copy_(rule.load(fill(name, part.shape, t)))
    return model


def llama() -> tuple[ModelConfig, list[Rule]]:
    scaling = Llama3Scaling(factor=8.0, original_seq_len=64)
    attention = MHAConfig(
        n_heads=4, n_kv_heads=2, head_dim=12, position=RopeConfig(theta=1e4, scaling=scaling)
    )
    group = LayerGroup(count=2, attention=attention, ffn=DenseConfig(inter_dim=40))
    cfg = ModelConfig(groups=(group,), **FRAME)
    return cfg, llama_rules(cfg)


def deepseek(
    *, mscale: float, q_lora_rank: int | None, mtp: MTPConfig | None = None, **moe
) -> tuple[ModelConfig, list[Rule]]:
    scaling = YarnScaling(factor=40.0, original_seq_len=64, mscale=mscale, mscale_all_dim=mscale)
    attention = MLAConfig(
        n_heads=4,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        position=RopeConfig(theta=1e4, scaling=scaling),
    )
    experts = MoEConfig(
        n_routed_experts=8,
        n_shared_experts=2,
        top_k=3,
        inter_dim=24,
        n_expert_groups=4,
        n_limited_groups=2,
        **moe,
    )
    groups = (
        LayerGroup(count=1, attention=attention, ffn=DenseConfig(inter_dim=40)),
        LayerGroup(count=1, attention=attention, ffn=experts),
    )
    cfg = ModelConfig(groups=groups, mtp=mtp, **FRAME)
    return cfg, deepseek_rules(cfg)


def v2() -> tuple[ModelConfig, list[Rule]]:
    return deepseek(mscale=0.707, q_lora_rank=None, group_score="max", route_scale=2.0)


def v3(mtp: MTPConfig | None = None) -> tuple[ModelConfig, list[Rule]]:
    return deepseek(
        mscale=1.0,
        q_lora_rank=20,
        mtp=mtp,
        score_func="sigmoid",
        group_score="top2",
        norm_topk_prob=True,
        route_scale=2.5,
        expert_bias=True,
    )


def matches(logits: Tensor, last: list[float], third: list[float], best: str, total: float):
    torch.testing.assert_close(logits[0, -1, : len(last)], torch.tensor(last), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[0, 3, : len(third)], torch.tensor(third), rtol=0, atol=1e-4)
    assert logits[0].argmax(-1).tolist() == [int(token) for token in best.split()]
    assert logits.double().sum().item() == pytest.approx(total, abs=5e-3)


def test_llama_logits_equal_transformers():
    cfg, rules = llama()
    matches(
        filled(cfg, rules)(IDS),
        [-1.09434, -0.70241, 0.5531, -0.0942, 0.9135, -0.27742],
        [-1.13216, -1.10403, 0.13678, 0.7218],
        "14 5 6 18 36 5 6 15 5 11",
        -26.5049,
    )
    assert num_tensors(rules) == 21


def test_deepseek_v2_logits_and_routing_equal_transformers():
    cfg, rules = v2()
    model = filled(cfg, rules)
    matches(
        model(IDS),
        [0.77172, 3.38367, 1.68974, -1.51589, -0.07697, -1.87393],
        [3.12735, 3.69339, 2.37793, -1.41231],
        "38 38 38 1 38 44 15 38 38 30",
        38.1896,
    )
    assert num_tensors(rules) == 48
    assert load_of(model) == loads("013 045 145 245 013 012 012 015 345 245")


def test_deepseek_v3_logits_and_routing_equal_transformers():
    cfg, rules = v3()
    model = filled(cfg, rules)
    matches(
        model(IDS),
        [0.82882, 1.21978, 0.93302, 0.44029, 2.0298, 0.61912],
        [1.87856, -0.81209, 0.07094, 0.0699],
        "38 38 38 33 38 39 15 2 46 39",
        -5.4852,
    )
    assert num_tensors(rules) == 53
    assert load_of(model) == loads("012 235 012 145 145 015 567 367 015 167")


LONG_IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 41, 2, 44, 19, 7, 30, 11, 27]])


def v32() -> tuple[ModelConfig, list[Rule]]:
    cfg, _ = v3()
    groups = tuple(
        replace(
            group,
            attention=DSAConfig.beside(
                group.attention, index_n_heads=16, index_head_dim=16, index_topk=4
            ),
        )
        for group in cfg.groups
    )
    cfg = replace(cfg, groups=groups)
    return cfg, deepseek_rules(cfg)


def test_deepseek_v32_logits_and_selections_equal_transformers():
    cfg, rules = v32()
    model = filled(cfg, rules)
    assert num_tensors(rules) == 63
    selected: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda *call: selected.append(call[2].indexing.selected_BTN[0]))
        for block in model.blocks
    ]
    logits = model(LONG_IDS)
    for hook in hooks:
        hook.remove()
    for row, want in ((15, [1.81839, 1.35166, -0.62302]), (9, [-1.27784, 0.00136, 1.3071])):
        torch.testing.assert_close(logits[0, row, :3], torch.tensor(want), rtol=0, atol=1e-4)
    best = "38 38 0 12 38 46 6 39 39 21 21 5 21 22 33 35"
    assert logits[0].argmax(-1).tolist() == [int(token) for token in best.split()]
    assert logits.double().sum().item() == pytest.approx(-17.2255, abs=5e-3)
    assert logits.double().square().sum().item() == pytest.approx(1351.12, abs=0.05)
    chosen = [[set(layer[t].tolist()) for t in (5, 9, 12, 15)] for layer in selected]
    assert chosen == [
        [{1, 3, 4, 5}, {2, 6, 7, 9}, {0, 1, 11, 12}, {2, 4, 8, 12}],
        [{0, 1, 4, 5}, {3, 4, 6, 9}, {6, 7, 9, 12}, {0, 1, 9, 12}],
    ]


def test_deepseek_v32_index_scores_equal_transformers():
    cfg, rules = v32()
    block = filled(cfg, rules).blocks[0]
    attention, step = block.attention, Step.full(LONG_IDS)
    x = block.attention_norm(filled(cfg, rules).embed(LONG_IDS))
    angles = attention.rope.angles(step.positions_BT, step.total)
    scores = index_scores(*attention.indexer(x, attention.query_latent(x), angles))
    want = torch.tensor([-9.14211, -2.72431, -3.92522, -2.35358, -2.17915, -2.51369])
    torch.testing.assert_close(scores[0, 5, :6], want, rtol=0, atol=1e-4)


def test_deepseek_v32_gradients_equal_transformers():
    cfg, rules = v32()
    model = filled(cfg, rules)
    losses = model.loss(LONG_IDS, torch.cat([LONG_IDS[:, 1:], LONG_IDS.new_full((1, 1), -100)], 1))
    losses.main.backward()
    assert losses.main.item() == pytest.approx(5.27954, abs=1e-4)
    norms = {
        name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None
    }
    for name, want in (
        ("embed.weight", 13.64076),
        ("blocks.0.attention.wkv_a.weight", 10.83239),
        ("blocks.0.attention.wq_b.weight", 5.12870),
        ("blocks.1.attention.wkv_b.weight", 1.45080),
        ("blocks.1.ffn.router.weight", 0.47820),
    ):
        assert norms[name] == pytest.approx(want, rel=1e-4), name
    assert not any(".indexer." in name for name in norms)


def num_tensors(rules: list[Rule]) -> int:
    return sum(len(rule.theirs) for rule in rules)


def load_of(model: Decoder) -> list[int]:
    return model.hidden(IDS, Step.full(IDS)).routing[0].tokens_per_expert.tolist()


def loads(choices: str) -> list[int]:
    """Tokens per expert from the published choices, three experts a token."""
    chosen = choices.replace(" ", "")
    return [chosen.count(str(expert)) for expert in range(8)]


def test_v3_mtp_logits_equal_transformers():
    cfg, rules = v3(MTPConfig())
    matches(
        filled(cfg, rules).mtp_logits(IDS)[0],
        [0.47799, 2.47259, 2.27227, -2.14304, -1.31638, -1.38417],
        [-0.2274, 0.18177, 1.21535, -1.5036],
        "45 26 0 43 38 9 10 38 1",
        96.5867,
    )


def test_v3_mtp_from_the_hidden_state_before_the_norm():
    cfg, rules = v3(MTPConfig(post_norm_hidden=False))
    logits = filled(cfg, rules).mtp_logits(IDS)[0]
    want = torch.tensor([0.28495, 2.23158, 2.35257, -2.25463])
    torch.testing.assert_close(logits[0, -1, :4], want, rtol=0, atol=1e-4)
    assert logits.double().sum().item() == pytest.approx(82.7394, abs=5e-3)


@pytest.mark.parametrize("family", [llama, v2, v3, v32], ids=["llama", "v2", "v3", "v3.2"])
def test_load_and_save_are_inverse_and_fill_every_tensor(family):
    cfg, rules = family()
    state = build_model(cfg).state_dict()
    blank = {name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()}
    for rule in rules:
        theirs = [rule.save(part) for part in rule.parts(state[rule.ours])]
        for part, tensor in zip(rule.parts(blank[rule.ours]), theirs, strict=True):
            assert part.shape == tensor.shape
            part.copy_(rule.load(tensor))
    assert all(torch.equal(blank[name], state[name]) for name in state)


def test_unconverted_interleaved_rope_is_a_gross_error():
    cfg, rules = v3()
    model = filled(cfg, rules)
    right = model(IDS)
    theirs = {n: r.save(p) for n, (r, p) in filled_by(rules, model.state_dict()).items()}
    unconverted = filled_by(deepseek_rules(cfg, interleaved=False), model.state_dict())
    for name, (rule, part) in unconverted.items():
        part.copy_(rule.load(theirs[name]))
    assert (model(IDS) - right).abs().max() > 0.1
