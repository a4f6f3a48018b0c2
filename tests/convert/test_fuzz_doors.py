"""A small run of ``benchmarks/fuzz_doors.py``; its large one is recorded."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_doors.py"
CASES = {"safetensors headers": 800, "GGUF headers": 80, "tokenizers": 40}


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_doors", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_doors"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_no_mutated_file_crashes_hangs_or_takes_much_memory(fuzzer, tmp_path):
    for name, door in fuzzer.doors(tmp_path).items():
        tally = fuzzer.fuzz(name, door, CASES.get(name, 200), seed=1)
        assert tally.refused > tally.loaded > 0, name  # neither all nonsense nor all harmless
        assert tally.loaded + tally.refused == tally.cases


def test_a_case_can_be_had_again(fuzzer, tmp_path):
    door = fuzzer.doors(tmp_path)["configs"]
    first, again, other = (fuzzer.mutated(door, random.Random(seed)) for seed in (5, 5, 6))
    assert first == again != other


def test_what_breaks_the_promise_is_named_with_its_number(fuzzer):
    def enter(content: bytes) -> None:
        if content != b"whole":
            raise KeyError("a bug")

    with pytest.raises(fuzzer.FuzzError, match=r"door, seed 3, case \d+: KeyError\('a bug'\)"):
        fuzzer.fuzz("door", fuzzer.Door([b"whole"], enter, None, 1), 9, seed=3)
