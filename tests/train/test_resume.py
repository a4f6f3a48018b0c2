"""A chain of five stops at random steps is, to the bit, the run that never stopped."""

import random
from pathlib import Path

import pytest

import fathom.parallel.shard  # noqa: F401  here, so that no forked rank has to import it
from fathom.convert.run_folder import committed
from fathom.data.dataset import Dataset
from fathom.train.config import RunConfig
from fathom.train.loop import train
from ranks import on_ranks
from runs import files, records

STEPS, STOPS = 40, 5
LLAMA = ["model.mtp=none", "model.groups.1.ffn={kind='dense', inter_dim=16}"]
MLA = (
    "{kind='mla', n_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, "
    "v_head_dim=8, position={kind='rope'}}"
)
DEEPSEEK = [f"model.groups.*.attention={MLA}"]  # the second layer is MoE, loss-free; then MTP
CASES = {
    "llama-adamw": LLAMA,
    "llama-muon-async": [*LLAMA, "train.optimizer=muon", "train.async_save=true"],
    "deepseek-adamw-async-accumulated": [
        *(*DEEPSEEK, "train.async_save=true", "train.micro_batch_size=2")
    ],
    "llama-bf16-stochastic": [*LLAMA, "train.dtype=bf16", "train.rounding=stochastic"],
    "llama-bf16-master-async": [
        *(*LLAMA, "train.dtype=bf16", "train.rounding=master", "train.async_save=true")
    ],
    "deepseek-muon": [*DEEPSEEK, "train.optimizer=muon"],
}


def chain(cfg: RunConfig, folder: Path, dataset: Dataset, stops: list[int | None]) -> None:
    """The run that never stops in ``whole``; in ``parts`` the one that is stopped so often."""
    for name, after in [("whole", None), *(("parts", stop) for stop in stops)]:
        calls = iter(range(1, 10**6))
        train(
            cfg,
            folder / name,
            dataset=dataset,
            should_stop=lambda calls=calls, after=after: next(calls) == after,
        )


def five_stops(seed: str) -> list[int | None]:
    """After how many steps each start ends, the last one never."""
    at = sorted(random.Random(seed).sample(range(1, STEPS), STOPS))
    return [b - a for a, b in zip([0, *at], at, strict=False)] + [None]


def assert_same(folder: Path) -> None:
    assert records(folder / "parts") == records(folder / "whole")
    assert len(records(folder / "whole")) == STEPS
    ends = [committed(folder / part)[-1] for part in ("parts", "whole")]
    assert files(ends[0]) == files(ends[1])


@pytest.mark.parametrize("case", CASES)
def test_a_chain_of_five_random_stops_in_one_process(case, make_config, dataset, tmp_path):
    cfg = make_config(f"train.steps={STEPS}", "train.save_every=7", *CASES[case])
    chain(cfg, tmp_path, dataset, five_stops(case))
    assert_same(tmp_path)


def test_a_chain_of_five_random_stops_on_two_ranks(make_config, dataset, tmp_path):
    """Experts on both, the rest sharded, saves in the background."""
    cfg = make_config(
        *(f"train.steps={STEPS}", "train.save_every=7", "train.async_save=true"),
        *("parallel.ep=2", "parallel.shard=2"),
        *DEEPSEEK,
    )
    assert on_ranks(2, chain, cfg, tmp_path, dataset, five_stops("two")) == ["", ""]
    assert_same(tmp_path)
