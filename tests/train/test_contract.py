"""What a change of the code must not change: losses of three families, and what old files mean.

The stored losses are written by ``python tests/train/test_contract.py`` from the project's root. A
change of numerics is a commit that says so and brings new ones.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fathom.convert.run_folder import committed, load_model
from fathom.data.dataset import Dataset
from fathom.train.changes import read_config
from fathom.train.config import RunConfig, read_run_config
from fathom.train.loop import train
from fathom.train.metrics import read_lines

HERE = Path(__file__).parent
STORED, FIRST_FORMAT = HERE / "losses.json", HERE / "format-1"
MHA = {"kind": "mha", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "position": {"kind": "rope"}}
MLA = {
    **{"kind": "mla", "n_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8},
    **{"qk_rope_head_dim": 4, "v_head_dim": 8, "position": {"kind": "rope"}},
}
DENSE = {"kind": "dense", "inter_dim": 24}
MOE = {
    **{"kind": "moe", "n_routed_experts": 6, "n_shared_experts": 1, "top_k": 2, "inter_dim": 8},
    **{"score_func": "sigmoid", "norm_topk_prob": True},
    "balance": [{"kind": "aux_loss_free"}, {"kind": "seq_aux_loss"}],
}
FAMILIES = {
    "llama": ([MHA, MHA], [DENSE, DENSE], {}, {}),
    "mla-moe": ([MLA, MLA], [DENSE, MOE], {}, {}),
    "deepseek-muon": (
        *([MLA, MLA], [DENSE, MOE]),
        *({"mtp": {"n_mtp_modules": 1}}, {"optimizer": "muon", "micro_batch_size": 2}),
    ),
}
STEPS = 12


def config(family: str) -> RunConfig:
    attentions, ffns, model, recipe = FAMILIES[family]
    groups = [
        {"count": 1, "attention": attention, "ffn": ffn}
        for attention, ffn in zip(attentions, ffns, strict=True)
    ]
    return read_run_config(
        {
            "model": {"vocab_size": 1024, "dim": 16, "max_seq_len": 64, "groups": groups, **model},
            "data": {"seq_len": 64},
            "train": {
                **{"steps": STEPS, "tokens_per_step": 256, "eval_every": 0, "lr": 0.01},
                **recipe,
            },
        }
    )


def losses(cfg: RunConfig, out: Path, dataset: Dataset | None = None) -> list[float]:
    """Of every step of the run in ``out``, which is trained to its end."""
    train(cfg, out, dataset=dataset, should_stop=lambda: False)
    return [line["total_loss"] for line in read_lines(out / "metrics.jsonl")]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_losses_of_a_family_repeat_to_the_bit_and_are_those_stored(family, tmp_path):
    """Bitwise on one machine; to 1e-4 against the file, whose machine may have been another."""
    found = [losses(config(family), tmp_path / str(run)) for run in (1, 2)]
    assert found[0] == found[1]
    ends = [(committed(tmp_path / str(run))[-1] / "model.safetensors") for run in (1, 2)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    assert found[0] == pytest.approx(json.loads(STORED.read_text())[family], rel=1e-4)


def test_a_checkpoint_of_the_first_version_goes_on_with_the_losses_it_had_then(tmp_path):
    step = FIRST_FORMAT / "step-00000004"
    shutil.copytree(step, tmp_path / "run" / "checkpoints" / step.name)
    shutil.copy(step / "config.toml", tmp_path / "run" / "config.toml")
    then = json.loads((FIRST_FORMAT / "losses.json").read_text())
    now = losses(read_config(step), tmp_path / "run")
    assert now == pytest.approx(then, rel=1e-4)


def test_a_checkpoint_of_the_first_version_is_a_model():
    model, tokenizer = load_model(FIRST_FORMAT / "step-00000004")
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 1024)
    assert tokenizer.vocab_size == 1024


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {family: losses(config(family), Path(folder) / family) for family in FAMILIES}
    STORED.write_text(json.dumps(found, indent=1) + "\n")
