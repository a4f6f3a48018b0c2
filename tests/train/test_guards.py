"""The judges of a step: what is a spike and what is none, which experts are named, what hangs."""

import math
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor

from fathom.train.guards import MAX_SPIKES, SPAN, WINDOW, ExpertWatch, SpikeGuard, bits
from fathom.train.watchdog import Watchdog

CPU = torch.device("cpu")
CLEAN_STEPS = 10_000


def trend(steps: int) -> Tensor:
    """A run's losses and gradient norms ``[steps, 2]`` without any noise: power laws."""
    at = torch.arange(steps)
    return torch.stack([2 + 8 * (1 + at / 20) ** -0.5, 0.3 + 2 * (1 + at / 50) ** -0.7], dim=1)


def curve(steps: int, seed: int) -> Tensor:
    """The same with noise that scales with it.

    Gradient norms are log-normal, as wide as those of the demo's runs (0.18 to 0.26).
    """
    noise_2 = torch.randn(steps, 2, generator=torch.Generator().manual_seed(seed))
    return trend(steps) * torch.exp(noise_2 * torch.tensor([0.02, 0.25]))


def verdicts(guard: SpikeGuard, figures: Tensor) -> list[dict[str, float]]:
    found = [guard.judge(loss, norm) for loss, norm in figures]
    return [{name: value.item() for name, value in one.items()} for one in found]


def test_ten_thousand_clean_steps_have_at_most_one_false_skip():
    found = verdicts(SpikeGuard(6.0, CPU), curve(CLEAN_STEPS, seed=0))
    assert sum(one["spike"] for one in found) <= 1
    assert not any(one["not_finite"] for one in found)


@pytest.mark.parametrize("column", [0, 1], ids=["loss", "grad-norm"])
def test_every_injected_tenfold_spike_is_caught(column):
    figures = curve(2000, seed=1)
    spikes = list(range(WINDOW, 2000, 37))
    figures[spikes, column] = 10 * trend(2000)[spikes, column]
    found = verdicts(SpikeGuard(6.0, CPU), figures)
    assert [step for step, one in enumerate(found) if one["spike"]] == spikes


def test_nothing_is_a_spike_before_the_window_is_full():
    figures = curve(WINDOW + 1, seed=2)
    figures[WINDOW - 1, 1] *= 10
    assert not any(one["spike"] for one in verdicts(SpikeGuard(6.0, CPU), figures))
    figures = curve(WINDOW + 1, seed=2)
    figures[WINDOW, 1] *= 10
    assert verdicts(SpikeGuard(6.0, CPU), figures)[-1]["spike"] == 1


def test_wobbles_of_a_flat_curve_are_no_spikes():
    figures = torch.full((300, 2), 2.0)
    figures[200:, 0] = 2.6  # less than exp(0.3) times
    assert not any(one["spike"] for one in verdicts(SpikeGuard(6.0, CPU), figures))


@pytest.mark.parametrize(("times", "spike"), [(6.5, False), (7.5, True)])
def test_only_a_sevenfold_gradient_norm_is_a_spike(times, spike):
    """Rows of an odd kind raise it sixfold in real runs, while the loss falls."""
    figures = torch.full((200, 2), 2.0)
    figures[150, 1] *= times
    found = verdicts(SpikeGuard(6.0, CPU), figures)
    assert [one["spike"] > 0 for one in found] == [spike and step == 150 for step in range(200)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("column", [0, 1])
def test_what_is_not_finite_is_no_spike_and_leaves_no_mark(bad, column):
    guard = SpikeGuard(6.0, CPU)
    verdicts(guard, curve(WINDOW + 5, seed=3))
    before = guard.window_2W.clone()
    figures = torch.tensor([2.5, 0.4])
    figures[column] = bad
    assert guard.judge(*figures) == {"not_finite": 1, "spike": 0}
    assert torch.equal(guard.window_2W, before)


def test_a_spike_leaves_no_mark_either_so_the_next_is_caught_too():
    guard = SpikeGuard(6.0, CPU)
    verdicts(guard, curve(WINDOW, seed=4))
    before = guard.window_2W.clone()
    assert all(guard.judge(torch.tensor(90.0), torch.tensor(0.5))["spike"] for _ in range(20))
    assert torch.equal(guard.window_2W, before)


def test_without_sigmas_nothing_is_a_spike():
    guard = SpikeGuard(0.0, CPU)
    verdicts(guard, curve(WINDOW, seed=5))
    assert guard.judge(torch.tensor(1e9), torch.tensor(1e9)) == {"not_finite": 0, "spike": 0}


def test_its_state_is_plain_and_comes_back_to_the_bit():
    for steps in (3, WINDOW + 50):
        guard, again = SpikeGuard(6.0, CPU), SpikeGuard(6.0, CPU)
        verdicts(guard, curve(steps, seed=6))
        guard.heard(7)
        guard.rollbacks = 2
        again.restore(guard.state())
        assert again.window_2W.numpy().tobytes() == guard.window_2W.numpy().tobytes()
        assert (again.spikes, again.rollbacks) == ([7], 2)


def test_spikes_persist_when_there_are_too_many_in_a_span_and_the_last_step_does_not_count():
    guard = SpikeGuard(6.0, CPU)
    for step in range(10, 10 + MAX_SPIKES):
        guard.heard(step)
        assert not guard.persists(step + 1)
    guard.heard(30)
    assert not guard.persists(30)
    assert guard.persists(31)
    assert guard.persists(10 + SPAN)
    assert not guard.persists(11 + SPAN)


def test_experts_that_get_nothing_or_too_much_are_named_once():
    watch = ExpertWatch(["blocks.1.ffn", "mtp.0.block.ffn"])
    fair = torch.ones(16)
    uneven = torch.cat([torch.tensor([0.0, 90.0]), torch.ones(14)])
    said = [line for _ in range(250) for line in watch.add([fair, uneven])]
    assert [line.partition(";")[0] for line in said] == [
        "mtp.0.block.ffn: no token reached expert 0 in 100 steps",
        "mtp.0.block.ffn: expert 1 got up to 14 times the fair share over 100 steps",
    ]


def test_many_experts_are_counted_and_not_listed():
    watch = ExpertWatch(["ffn"])
    said = [line for _ in range(100) for line in watch.add([torch.eye(1, 64).flatten()])]
    assert said[0].startswith("ffn: no token reached experts 1, 2, 3, 4, 5, 6, 7, 8 and 55 more in")


def test_an_expert_that_one_step_left_out_is_not_named():
    watch = ExpertWatch(["ffn"])
    said = [watch.add([torch.tensor([float(step % 50 == 0), 3.0])]) for step in range(100)]
    assert said[-1] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_single_bit_changes_the_bits(dtype):
    tensor = torch.randn(5, 3, dtype=torch.float64).to(dtype)
    before = bits([tensor, tensor[0]])
    raw = tensor.view(torch.uint8)
    for byte, bit in ((0, 0), (7, 3), (raw.numel() - 1, 7)):
        raw.view(-1)[byte] ^= 1 << bit
        assert bits([tensor])[0] != before[0]
        raw.view(-1)[byte] ^= 1 << bit
    assert torch.equal(bits([tensor, tensor[0]]), before)


HANG = """
import sys, time
from fathom.train.watchdog import Watchdog
def stuck():
    time.sleep(60)
with Watchdog(0.2, who="rank 3: ") as watch:
    watch.begin(1); watch.end()
    watch.begin(2)
    stuck()
"""


def test_a_step_that_hangs_shows_where_and_ends_the_process():
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=50)
    assert time.monotonic() - begun < 40
    assert done.returncode == 1
    assert "in stuck" in done.stderr
    assert "rank 3: step 2 has not ended for" in done.stderr.splitlines()[-1]


def test_what_is_no_step_and_the_first_step_may_take_any_time():
    with Watchdog(0.05) as watch:
        watch.begin(1)
        time.sleep(0.2)
        watch.end()
        time.sleep(0.2)


def test_a_slow_run_has_longer_limits():
    watch = Watchdog(0.001)
    for step in range(3):
        watch.begin(step)
        time.sleep(0.02)
        watch.end()
    assert 0.2 <= watch.limit < 5
