"""What the benchmarks compute besides times: ratios, limits, visible pairs; what was recorded."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECORDS = sorted((BENCHMARKS / "results").glob("*-h100-*.json"))


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def test_a_ratio_above_one_is_better_for_us_whatever_the_metric():
    from records import row

    speed = row("c", "m", "TFLOP/s", 600.0, {"a": 500.0, "b": 300.0})
    time = row("c", "m", "ms", 2.0, {"a": 5.0, "b": 3.0}, higher_is_better=False)
    assert speed["ratio_to_best_peer"] == pytest.approx(1.2)
    assert time["ratio_to_best_peer"] == pytest.approx(1.5)
    assert row("c", "m", "ms", 2.0, {})["ratio_to_best_peer"] is None


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_on_what_it_was_made_and_its_ratios_follow_from_its_values(path):
    record = json.loads(path.read_text())
    assert {"benchmark", "device", "versions", "commit", "date", "limits", "rows"} <= record.keys()
    assert "H100" in record["device"]
    for line in record["rows"]:
        peers = line["peers"].values()
        allowed = {line["ours"] / max(peers), min(peers) / line["ours"]} if peers else {None}
        assert any(line["ratio_to_best_peer"] == pytest.approx(ratio) for ratio in allowed)


def test_the_roofline_is_the_square_products_rate_until_the_bytes_bind():
    from moe_layer import roofline

    machine = {"gemm_tflops": 800.0, "copy_tb_per_s": 3.0}
    assert roofline((65536, 4096, 2048, 8, 8), machine) == pytest.approx(800)
    tokens, dim, inner = 16, 512, 256  # one expert a token: the weights are read and written thrice
    seconds = 3 * 2 * (3 * 16 * dim * inner + tokens * (3 * inner + 2 * dim)) / 3e12
    want = 18 * tokens * dim * inner / seconds / 1e12
    assert roofline((tokens, dim, inner, 16, 1), machine) == pytest.approx(want)


def test_a_sweep_changes_one_number_at_a_time():
    from moe_layer import BASE, SWEEP, swept

    cases = swept()
    assert len(cases) == sum(map(len, SWEEP.values()))
    for name, case in cases.items():
        differs = {key for key, value in zip(BASE, case, strict=True) if value != BASE[key]}
        assert differs <= ({"dim", "inner"} if name.startswith("dim") else {name.split("-")[0]})


def test_pairs_are_the_lower_triangles_of_the_documents():
    from attention import borders, pairs

    case = (192, 128, 1, 1000, True)
    at = borders(case)
    starts = [max(b for b in at if b <= query) for query in range(1000)]
    assert pairs(case) == sum(query - start + 1 for query, start in enumerate(starts))
    assert pairs((192, 128, 3, 10, False)) == 3 * 55


def test_a_plot_has_a_line_for_everyone_and_for_the_limit():
    from plots import growth

    rows = [
        {"case": f"t{2**i}", "metric": "fwd", "ours": 3.0 * i, "peers": {"other": 2.0 * i}}
        for i in range(10, 13)
    ]
    record = {"rows": rows, "limits": {"gemm_tflops": 7.0}, "roofline": {"t1024": 5.0}}
    (chart,) = growth(record, {"t": "tokens"}, "fwd", "TFLOP/s")["concat"]
    by_name: dict[str, list[float]] = {}
    for value in chart["data"]["values"]:
        by_name.setdefault(value["who"], []).append(value["value"])
    assert by_name == {"ours": [30, 33, 36], "other": [20, 22, 24], "roofline": [5, 7, 7]}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_poi_fused__to_copy_scaled_dot_product_cudnn_attention_3", "compiled passes"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void cutlass::device_kernel<GemmUniversal<GroupProblemShape<int>>>", "experts' products"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "other products"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor<c10::BFloat16>>", "optimizer"),
        ("_update", "optimizer"),
        ("_gather_sum", "kernels of ours"),
        ("Memcpy DtoD (Device -> Device)", "the rest"),
    ],
)
def test_a_kernels_name_says_its_kind(kernel, kind):
    from kernel_times import kind_of

    assert kind_of(kernel) == kind
