import numpy as np
import pytest

from fathom.data.stream import DomainStream, Mixture, counter_hash

OFFSETS = np.cumsum([0, 5, 2, 31, 7, 3])  # five documents, 48 tokens


def drawn_tokens(stream, rows):
    """(document, place in it) of every token of the first rows, in the order of drawing."""
    pieces = [piece for row in range(rows) for piece in stream.row(row)]
    return [(p.document, i) for p in pieces for i in range(p.start, p.stop)]


@pytest.mark.parametrize("seq_len", [1, 3, 16, 47, 48, 49, 101])
def test_every_token_is_drawn_exactly_once_in_each_epoch(seq_len):
    stream = DomainStream("a", OFFSETS, 7, seq_len)
    tokens = drawn_tokens(stream, -(-3 * 48 // seq_len))
    every = sorted((d, i) for d in range(5) for i in range(int(np.diff(OFFSETS)[d])))
    for epoch in range(3):
        assert sorted(tokens[epoch * 48 : (epoch + 1) * 48]) == every


def test_a_row_is_full_and_a_cut_document_goes_on_in_the_next_row():
    stream = DomainStream("a", OFFSETS, 7, 10)
    for row in range(20):
        pieces = stream.row(row)
        assert sum(piece.stop - piece.start for piece in pieces) == 10
        last, following = pieces[-1], stream.row(row + 1)[0]
        if last.stop < np.diff(OFFSETS)[last.document]:
            assert (following.document, following.start) == (last.document, last.stop)
        else:
            assert following.start == 0


def test_a_row_does_not_depend_on_the_rows_asked_for_before():
    ahead = DomainStream("a", OFFSETS, 7, 10)
    forward = [ahead.row(row) for row in range(30)]
    backward = [DomainStream("a", OFFSETS, 7, 10).row(row) for row in range(29, -1, -1)]
    assert forward == backward[::-1]
    assert ahead.row(3) == forward[3]


def test_order_changes_with_seed_epoch_and_domain():
    def order(domain, seed, epoch):
        stream = DomainStream(domain, np.arange(101) * 2, seed, 200)
        return [piece.document for piece in stream.row(epoch)]

    orders = [order("a", 0, 0), order("a", 1, 0), order("b", 0, 0), order("a", 0, 1)]
    assert all(sorted(each) == list(range(100)) for each in orders)
    assert len({tuple(each) for each in orders}) == 4


def splitmix(x):
    """The same mixing with Python's integers."""
    mask = 2**64 - 1
    x = (x * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_the_hash_is_splitmix64_in_plain_integers():
    hashed = counter_hash(np.arange(5, dtype=np.uint64), 42, -1)
    state = splitmix(splitmix(42) + 2**64 - 1 & 2**64 - 1)
    assert hashed.tolist() == [splitmix((i + state) & 2**64 - 1) for i in range(5)]
    assert counter_hash(np.zeros(1, np.uint64)).tolist() == [0xE220A8397B1DCDAF]  # published


def test_hashed_numbers_are_spread_evenly():
    uniform = counter_hash(np.arange(100_000, dtype=np.uint64), 3) / 2.0**64
    counts, _ = np.histogram(uniform, 100, (0, 1))
    assert abs(uniform.mean() - 0.5) < 0.005
    assert counts.min() > 850
    assert counts.max() < 1150


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [0.97, 0.01, 0.02], [1 / 3] * 3, [1.0]])
def test_rows_of_a_domain_stay_within_two_of_its_share_at_every_moment(shares):
    chosen = Mixture(np.array(shares), 1).choose(np.zeros(len(shares), np.int64), 3000)
    counts = np.cumsum(np.eye(len(shares))[[domain for domain, _ in chosen]], axis=0)
    wanted = np.outer(np.arange(1, 3001), shares)
    assert np.abs(counts - wanted).max() < 2


def test_a_domain_without_share_is_never_drawn():
    chosen = Mixture(np.array([0.0, 0.4, 0.6]), 1).choose(np.zeros(3, np.int64), 500)
    assert {domain for domain, _ in chosen} == {1, 2}


def test_rows_are_numbered_within_their_domain_and_a_stop_changes_nothing():
    mixture = Mixture(np.array([0.2, 0.8]), 9)
    whole = mixture.choose(np.zeros(2, np.int64), 100)
    for domain in (0, 1):
        numbers = [row for drawn, row in whole if drawn == domain]
        assert numbers == list(range(len(numbers)))
    first = mixture.choose(np.zeros(2, np.int64), 37)
    drawn = np.bincount([domain for domain, _ in first], minlength=2)
    assert first + mixture.choose(drawn, 63) == whole


def test_no_rank_of_four_meets_only_one_of_four_equal_domains():
    chosen = Mixture(np.full(4, 0.25), 0).choose(np.zeros(4, np.int64), 400)
    for rank in range(4):
        assert len({domain for domain, _ in chosen[rank::4]}) == 4
