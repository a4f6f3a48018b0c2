"""CUDA graphs of a step, as far as a CPU shows: the borders they read, and what they are told."""

import pytest
import torch

from fathom.ops.packed_attention import same_document
from fathom.settings import ConfigError
from fathom.train.graph import rounded
from fathom.train.loop import train
from fathom.train.metrics import read_lines
from fathom.train.progress import Reporter


def test_borders_are_rounded_up_with_documents_that_are_empty():
    borders = torch.tensor([0, 3, 8, 12, 16, 20], dtype=torch.int32)
    padded = rounded(borders, rows=2)
    assert padded.tolist() == [0, 3, 8, 12, 16, 20, 20, 20]
    assert torch.equal(same_document(padded, 2, 10), same_document(borders, 2, 10))


def test_a_document_a_row_stays_so():
    borders = torch.tensor([0, 10, 20], dtype=torch.int32)
    assert rounded(borders, rows=2) is borders


def test_without_a_gpu_a_run_goes_on_and_says_so(make_config, dataset, tmp_path):
    heard: list[str] = []
    reporter = Reporter()
    reporter.notice = heard.append
    for graph in ("false", "true"):
        cfg = make_config("train.steps=2", f"train.cuda_graph={graph}")
        train(cfg, tmp_path / graph, dataset=dataset, reporter=reporter)
    assert heard == [
        "train.cuda_graph=true cannot be had here (there is no GPU); going on without it"
    ]
    first, second = (
        [line["loss"] for line in read_lines(tmp_path / graph / "metrics.jsonl")]
        for graph in ("false", "true")
    )
    assert first == second


def test_several_processes_are_refused(make_config):
    with pytest.raises(ConfigError, match="cuda_graph=true is for one process"):
        make_config("train.cuda_graph=true", "parallel.dp=2")
