"""The calculator of layouts: what a rank holds and sends, against counts made another way."""

from itertools import combinations

import pytest

from fathom.config import ParallelConfig
from fathom.ffn import MoEConfig
from fathom.presets import preset
from fathom.sizing import size
from fathom.sizing.parallel import expert_params, parallel_size, ranks_reached
from fathom.sizing.size import count

V3 = preset("deepseek-v3")
V3_EXPERT = 3 * 7168 * 2048


def sized(model=V3, *, n_tokens=4096, micro_batches=1, **layout):
    return parallel_size(
        model, ParallelConfig(**layout), n_tokens=n_tokens, micro_batches=micro_batches
    )


def test_one_process_holds_all_and_sends_nothing():
    alone = sized()
    assert alone["params_per_rank"] == count.num_params(V3) + count.num_mtp_params(V3)
    assert alone["wire"]["total"] == 0
    train = size(V3, seq_len=4096)["memory"]["train"]
    assert alone["memory"]["total"] == train


def test_experts_are_cut_over_ep_and_the_rest_over_shard():
    dense = count.num_params(V3) + count.num_mtp_params(V3) - (58 + 1) * 256 * V3_EXPERT
    by_ep = sized(ep=64)
    assert by_ep["experts_per_rank"] == 4
    assert by_ep["params_per_rank"] == dense + 59 * 4 * V3_EXPERT
    both = sized(dp=8, ep=64, shard=512)
    assert both["params_per_rank"] == pytest.approx(dense / 512 + 59 * V3_EXPERT / 2, abs=2)


def test_bytes_are_those_of_rings_and_of_even_routing():
    wire = sized(ep=64, n_tokens=64, micro_batches=3)["wire"]
    rows = round(64 * ranks_reached(V3.groups[-1].ffn, 64) * 63 / 64)
    assert wire["exchange"] == 3 * 59 * (rows * 4 * (7168 * 2 + 3 * 8) + 16 * 63)
    dense = count.num_params(V3) + count.num_mtp_params(V3) - expert_params(V3)
    assert wire["copies"] == round(4 * 2 * dense * 63 / 64)  # once a step
    assert wire["gather"] == wire["scatter"] == 0


def test_a_cut_copy_travels_in_every_micro_batch_and_among_copies_once():
    llama = preset("llama-3-8b")
    params, root = count.num_params(llama), 2 * 128256 * 4096 + 4096
    wire = sized(llama, dp=16, shard=8, micro_batches=2)["wire"]
    assert wire["gather"] == round(2 * 4 * (2 * (params - root) + root) * 7 / 8)
    assert wire["scatter"] == round(2 * 4 * params * 7 / 8)
    assert wire["copies"] == round(4 * 2 * params / 8 / 2)
    assert wire["exchange"] == 0


def test_fp8_halves_what_is_dispatched_but_for_its_scales():
    plain, fp8 = (sized(ep=64, dispatch=how)["wire"]["exchange"] for how in ("same", "fp8"))
    rows = round(4096 * ranks_reached(V3.groups[-1].ffn, 64) * 63 / 64)
    assert plain - fp8 == 59 * rows * (7168 * 2 - (7168 + 4 * 56))


def test_experts_that_cannot_be_spread_are_refused():
    with pytest.raises(ValueError, match=r"parallel.ep \(7\) must divide n_routed_experts"):
        sized(ep=7)
    with pytest.raises(ValueError, match="the model has no MoE layer"):
        sized(preset("llama-3-8b"), ep=2)
    with pytest.raises(ValueError, match="n_tokens must be at least 1"):
        sized(n_tokens=0)


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (2, 1), (4, 2), (4, 3), (8, 4)])
@pytest.mark.parametrize("ep", [1, 2, 4, 8])
def test_the_ranks_that_a_token_reaches_are_the_mean_over_all_its_choices(groups, kept, ep):
    moe = MoEConfig(
        n_routed_experts=8,
        top_k=2,
        inter_dim=1,
        n_expert_groups=groups,
        n_limited_groups=kept,
    )
    found = [
        len({expert // (8 // ep) for expert in chosen})
        for some in combinations(range(groups), kept)
        for chosen in combinations([e for e in range(8) if e // (8 // groups) in some], 2)
    ]
    if kept * 8 // groups >= 2:
        assert ranks_reached(moe, ep) == pytest.approx(sum(found) / len(found))
