"""Records: files in which no step stands twice, routing figures, sums over micro-batches."""

import json
import math
import os
import subprocess
from contextlib import suppress

import pytest
import torch

from fathom.ffn import Routing
from fathom.model import Losses
from fathom.train import device as device_module
from fathom.train.device import environment, memory_bytes, peak_flops, pick_device, reproducible
from fathom.train.metrics import (
    Figures,
    JsonLines,
    Sums,
    finite,
    read_lines,
    replace_text,
    routing_figures,
)


def losses(scale: float, counts: list[int], entropy: float) -> Losses:
    values = [torch.tensor(scale * i, requires_grad=True) for i in (1.0, 2.0, 3.0, 4.0, 5.0)]
    routing = Routing(torch.zeros(()), torch.tensor(counts), torch.tensor(entropy))
    return Losses(*values, [routing])


def test_losses_and_counts_add_up_over_micro_batches_and_entropies_average():
    sums = Sums()
    sums.add(losses(1.0, [1, 2, 3], 0.5))
    sums.add(losses(10.0, [4, 0, 1], 1.5))
    values = {name: value.item() for name, value in sums.losses.items()}
    assert values == {
        "total_loss": 11,
        "loss": 22,
        "mtp_loss": 33,
        "balance_loss": 44,
        "index_loss": 55,
    }
    assert [count.tolist() for count in sums.counts] == [[5, 2, 4]]
    assert sums.counts[0].dtype == torch.int64
    assert sums.vectors()[-1].tolist() == [1.0]
    assert not any(value.requires_grad for value in sums.losses.values())


def test_what_tokens_reach_is_a_mean_beside_the_entropy():
    sums = Sums()
    for entropy, reach in ((0.5, [2.0, 1.0]), (1.5, [3.0, 2.0])):
        one = losses(1.0, [1, 2], entropy)
        one.routing[0] = one.routing[0]._replace(reach=torch.tensor(reach))
        sums.add(one)
    assert sums.vectors()[-1].tolist() == [1.0, 2.5, 1.5]


def test_figures_arrive_as_they_were_sent(device):
    scalars = {"a": torch.tensor(1.5, device=device), "b": torch.tensor(2.0, device=device)}
    vectors = [torch.arange(3, device=device), torch.tensor([7.5], device=device)]
    values, read = Figures(scalars, vectors).read()
    assert values == {"a": 1.5, "b": 2.0}
    assert [vector.tolist() for vector in read] == [[0, 1, 2], [7.5]]
    assert Figures(scalars, []).read() == (values, [])


def test_routing_figures_of_a_layer_that_is_even_and_one_that_is_not():
    counts = [torch.tensor([5.0, 5.0, 5.0, 5.0]), torch.tensor([20.0, 0.0, 0.0, 0.0])]
    figures = routing_figures(counts, [[1.0], [0.5]], log_load=True)
    assert figures["max_violation"] == pytest.approx((0 + 3) / 2)
    assert figures["dead_experts"] == 3
    assert figures["load_entropy"] == pytest.approx(math.log(4) / 2)
    assert [layer["load"] for layer in figures["layers"]] == [[1, 1, 1, 1], [4, 0, 0, 0]]
    assert [layer["router_entropy"] for layer in figures["layers"]] == [1.0, 0.5]
    assert "load" not in routing_figures(counts, [[1.0], [0.5]], log_load=False)["layers"][0]


def test_ranks_that_share_the_experts_have_loads_of_their_own_and_tokens_reach_some():
    counts = [torch.tensor([5.0, 3.0, 2.0, 2.0])]
    figures = routing_figures(counts, [[1.0, 1.75, 1.5]], log_load=False, ranks=2)
    assert figures["rank_max_violation"] == pytest.approx(8 / 6 - 1)
    assert (figures["ranks_per_token"], figures["nodes_per_token"]) == (1.75, 1.5)
    assert figures["layers"][0]["ranks_per_token"] == 1.75


def test_layers_with_other_numbers_of_experts_stand_side_by_side():
    figures = routing_figures([torch.ones(4), torch.ones(8)], [[0.0], [0.0]], log_load=False)
    assert [layer["load_entropy"] for layer in figures["layers"]] == pytest.approx(
        [math.log(4), math.log(8)]
    )


def test_lines_after_the_resumed_step_and_torn_ones_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "loss": 1.25}\n{"step": 3}\n{"step": 4, "lo')
    lines = JsonLines(path, upto=2)
    lines.write({"step": 3, "loss": 0.1})
    lines.sync()
    lines.close()
    assert read_lines(path) == [{"step": 1}, {"step": 2, "loss": 1.25}, {"step": 3, "loss": 0.1}]


def test_a_line_is_on_the_disk_as_soon_as_it_is_written(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl", upto=0)
    lines.write({"step": 1})
    assert read_lines(tmp_path / "m.jsonl") == [{"step": 1}]
    lines.close()


def test_numbers_that_json_lacks_become_null_however_deep():
    record = {"a": float("nan"), "b": [float("inf"), {"c": -math.inf}], "d": 1, "e": "x", "f": 0.5}
    assert finite(record) == {"a": None, "b": [None, {"c": None}], "d": 1, "e": "x", "f": 0.5}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    replace_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="killed"):
            replace_text(path, "new")
    assert path.read_text() == "old"
    replace_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


def test_memory_and_peak_are_known_where_they_can_be():
    cpu = torch.device("cpu")
    assert peak_flops(cpu) is None
    used = memory_bytes(cpu)
    assert used is None or 50e6 < used < 1e12


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 9.89e14),
        ("NVIDIA H100 PCIe", 7.56e14),
        ("NVIDIA H200", 9.89e14),
        ("NVIDIA A100-SXM4-80GB", 3.12e14),
        ("Some Other GPU", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda")) == flops


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"train\.device=cuda"):
        pick_device("cuda")


def test_determinism_is_put_back_even_after_an_error():
    seen = []
    with suppress(KeyError), reproducible(True):
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise KeyError
    with reproducible(False):
        seen.append(torch.are_deterministic_algorithms_enabled())
    assert seen == [True, False]


def test_determinism_that_comes_too_late_is_refused(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="comes too late"), reproducible(True):
        pass
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_environment_is_json_and_has_no_host_name():
    found = environment(torch.device("cpu"))
    text = json.dumps(found)
    assert found["torch"] == torch.__version__
    assert os.uname().nodename not in text


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 1)])
def test_without_git_the_commit_is_unknown(monkeypatch, error):
    def run(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(device_module.subprocess, "run", run)
    assert environment(torch.device("cpu"))["commit"] is None
