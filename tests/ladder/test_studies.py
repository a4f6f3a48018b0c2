"""The studies that ship, shortened: every arm trains, and every probe has an answer."""

import json

import pytest

from fathom.ladder.run import run_ladder
from fathom.ladder.study import list_studies, load_study

OWN_TESTS = ("demo", "facts", "facts-gpu")  # facts need their own data: tests/probes


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in list_studies() if name not in OWN_TESTS])
def test_a_shortened_study_trains_every_arm_and_answers_every_probe(name, corpus, tmp_path):
    study = load_study(
        name,
        [
            f"data.source={corpus}",
            "data.seq_len=64",
            *("train.device=cpu", "train.dtype=float32", "train.compile=false"),
            *("train.tokens_per_step=128", "train.micro_batch_size=none", "train.warmup_steps=1"),
            *("model.groups.*.count=1", "model.max_seq_len=4096"),
            *("budget.hold=tokens", "budget.value=256", "seeds=[1]", "lr={}"),
        ],
    )
    assert run_ladder(study, tmp_path, jobs=0).reason == "done"
    for arm in json.loads((tmp_path / "results.json").read_text())["arms"]:
        assert arm["failed"] is None
        assert arm["probes"].keys() >= set(study.probes)
        assert not any("failed" in record for record in arm["probes"].values()), arm["probes"]
