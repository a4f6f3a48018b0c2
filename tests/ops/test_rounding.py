"""Philox's known answers; halves that join to the same bits; chance that is right on average."""

import pytest
import torch

from fathom.ops.rounding import chances, joined, philox, rounded, split

ANSWERS = [  # of Random123's test vectors, philox4x32 with 10 rounds: counter, key, result
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
]
NUMBERS = [0.0, -0.0, 1.0, -1.5, 3.14159265, 1e-38, 1e-45, 3e38, torch.inf, -torch.inf, 2.0**-130]


@pytest.mark.parametrize(("counter", "key", "result"), ANSWERS)
def test_philox_gives_the_published_words(counter, key, result):
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in words) == result


def test_halves_join_to_the_same_bits_and_the_upper_is_the_nearest():
    x = torch.cat([torch.tensor(NUMBERS), torch.randn(1000).exp(), -torch.randn(1000) * 1e-30])
    high, low = split(x)
    assert torch.equal(joined(high, low).view(torch.int32), x.view(torch.int32))
    finite = x.abs() < 3e38
    nearest = (x.bfloat16().float() - x).abs()[finite]
    assert torch.equal((high.float() - x).abs()[finite], nearest)


def test_what_is_no_number_stays_none():
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    most = torch.full((3,), 2**16 - 1)
    assert rounded(nan, most).isnan().all()
    assert split(nan)[0].isnan().all()
    assert joined(*split(nan)).isnan().all()


def test_a_number_is_rounded_up_as_often_as_it_is_near_the_upper_one():
    low, high = 1.0, 1.0 + 2**-7
    x = torch.full((2**16,), low + 0.3 * (high - low))
    found = rounded(x, torch.arange(2**16)).double()
    assert set(found.unique().tolist()) == {low, high}
    assert found.mean() == pytest.approx(x[0].item(), abs=2**-16 * 2**-7)
    assert torch.equal(rounded(-x, torch.arange(2**16)), -rounded(x, torch.arange(2**16)))


def test_bfloat16_numbers_are_never_moved():
    x = torch.tensor(NUMBERS).bfloat16()
    assert torch.equal(rounded(x.float(), torch.full(x.shape, 2**16 - 1)), x)


@pytest.mark.parametrize("count", [0, 1, 8, 9, 100_001])
def test_chances_are_16_bits_evenly_and_of_parameter_and_step(count):
    found = chances(count, 7, 3, torch.tensor(5.0))
    assert found.shape == (count,)
    assert torch.equal(found[:9], chances(9, 7, 3, torch.tensor(5.0))[:count])
    if count > 1000:
        assert found.min() >= 0
        assert found.max() < 2**16
        assert found.double().mean() == pytest.approx(2**15, rel=0.01)
        for other in (
            chances(count, 7, 4, torch.tensor(5.0)),
            chances(count, 7, 3, torch.tensor(6)),
        ):
            assert (found == other).double().mean() < 1e-3
