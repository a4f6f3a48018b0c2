"""The studies that ship, shortened: every arm trains, every probe has an answer; how to record."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from fathom.data.facts import prepare_facts
from fathom.ladder.run import run_ladder
from fathom.ladder.study import list_studies, load_study

WHOLE = "demo"  # `make demo` runs it as it is
RECORD = Path(__file__).parents[2] / "studies" / "record.sh"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in list_studies() if name != WHOLE])
def test_a_shortened_study_trains_every_arm_and_answers_every_probe(name, corpus, tmp_path):
    if name.startswith("facts"):
        corpus = tmp_path / "facts"
        prepare_facts(corpus, people=300, vocab_size=400)
    study = load_study(
        name,
        [
            f"data.source={corpus}",
            *("data.weights={}", "data.seq_len=128"),
            *("train.device=cpu", "train.dtype=float32", "train.compile=false"),
            *("train.tokens_per_step=256", "train.micro_batch_size=none", "train.warmup_steps=1"),
            *("model.dim=128", "model.groups.*.count=1", "model.max_seq_len=4096"),
            *("budget.hold=tokens", "budget.value=512", "seeds=[1]", "lr={}"),
        ],
    )
    assert run_ladder(study, tmp_path / "out", jobs=0).reason == "done"
    for arm in json.loads((tmp_path / "out" / "results.json").read_text())["arms"]:
        assert arm["failed"] is None
        assert arm["probes"].keys() >= set(study.probes)
        assert not any("failed" in record for record in arm["probes"].values()), arm["probes"]


STAND_IN = """#!/bin/sh
echo "$CUDA_VISIBLE_DEVICES $*" >> "$FOLDER/asked"
mkdir -p "$FOLDER/$4/runs/checkpoints"
touch "$FOLDER/$4/results.json" "$FOLDER/$4/runs/checkpoints/weights"
"""


def test_the_recording_script_gives_every_gpu_its_studies_and_every_study_its_time(tmp_path):
    stand_in, folder = tmp_path / "python", tmp_path / "runs"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    env = {**os.environ, "PYTHON": str(stand_in), "FOLDER": str(folder), "SETTINGS": "a=1 b=2"}
    lists = ("share-kv=60 position=0", "experts=120")
    subprocess.run([RECORD, "DATA", tmp_path / "out", *lists], env=env, check=True)
    asked = sorted(line.split() for line in (folder / "asked").read_text().splitlines())
    assert [line[4] for line in asked] == ["position", "share-kv", "experts"]
    assert [line[0] for line in asked] == ["0", "0", "1"]
    minutes = [float(line[line.index("--minutes") + 1]) for line in asked]
    assert minutes[0] == 0
    assert 0.5 < minutes[1] <= 1 < minutes[2] <= 2
    assert all(line[-3:] == ["data.source=DATA", "a=1", "b=2"] for line in asked)
    for study in ("share-kv", "position", "experts"):
        with tarfile.open(tmp_path / "out" / f"{study}.tar.gz") as archive:
            assert set(archive.getnames()) == {study, f"{study}/results.json", f"{study}/runs"}
