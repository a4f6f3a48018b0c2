import numpy as np
import pytest

from fathom.data.dedupe import (
    WINDOW,
    minhash,
    near_duplicates,
    seen_shares,
    windows,
    word_hashes,
)


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def text(seed: int, n: int = 200) -> list[int]:
    return np.random.default_rng(seed).integers(0, 10**6, n).tolist()


def jaccard(a, b):
    a, b = (set(windows(word_hashes(words(*x)), 8).tolist()) for x in (a, b))
    return len(a & b) / len(a | b)


def test_a_han_character_is_a_word_and_punctuation_is_none():
    assert len(word_hashes("猫坐、on the_mat 3.5!")) == 2 + 2 + 2
    assert np.array_equal(word_hashes("a b"), word_hashes("a,  b."))
    assert len(word_hashes(" ... ")) == 0


def test_windows_depend_on_words_and_their_order_alone():
    numbers = text(0, 30)
    whole = windows(word_hashes(words(*numbers)), 5)
    assert len(whole) == 26
    assert windows(word_hashes(words(*numbers[7:12])), 5)[0] == whole[7]
    assert windows(word_hashes(words(*numbers[7:12][::-1])), 5)[0] != whole[7]
    assert len(set(whole.tolist())) == 26


@pytest.mark.parametrize(("length", "count"), [(0, 0), (1, 1), (4, 1), (5, 1), (6, 2)])
def test_a_short_text_is_one_window(length, count):
    assert len(windows(word_hashes(words(*range(length))), 5)) == count


def test_equal_minima_estimate_the_jaccard_similarity():
    errors = []
    for seed in range(40):
        a = text(seed, 300)
        b = a[: 300 - 6 * seed] + text(seed + 1000, 6 * seed)
        sketches = [minhash(word_hashes(words(*x))) for x in (a, b)]
        errors.append((sketches[0] == sketches[1]).mean() - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.02  # unbiased
    assert np.std(errors) < 0.08  # sqrt(J (1 - J) / 64) is 0.0625 at most


def test_sketches_do_not_depend_on_the_chunk(monkeypatch):
    hashed = word_hashes(words(*text(1, 500)))
    whole = minhash(hashed)
    monkeypatch.setattr("fathom.data.dedupe.CHUNK", 7)
    assert np.array_equal(minhash(hashed), whole)


def test_an_edited_copy_is_dropped_and_a_different_text_is_not():
    original = text(1)
    edited = [*original[:100], 7, *original[101:]]  # 8 of 193 shingles differ
    half = original[:100] + text(2)[:100]
    documents = [word_hashes(words(*x)) for x in (original, text(3), edited, half, original[::-1])]
    assert near_duplicates(documents) == {2}


def test_the_first_of_several_copies_stays():
    copies = [[*text(1), n] for n in range(5)]
    assert near_duplicates([word_hashes(words(*x)) for x in copies]) == {1, 2, 3, 4}


def test_short_and_empty_documents_are_compared_too():
    documents = [word_hashes(x) for x in ("a b", "", "a b", "b a", "")]
    assert near_duplicates(documents) == {2, 4}


def test_the_seen_share_counts_windows_of_13_words():
    train, fresh = text(1, 100), text(2, 100)
    mixed = train[20:53] + fresh[:33]  # 66 words: 54 windows, 21 of them within the first 33
    shares = seen_shares(
        [word_hashes(words(*x)) for x in (train[10:40], fresh, mixed, train[:12], [])],
        [word_hashes(words(*x)) for x in (text(9, 50), train)],
    )
    assert shares == pytest.approx([1.0, 0.0, 21 / 54, 0.0, 0.0])
    assert WINDOW == 13


def test_without_training_or_held_out_text_nothing_was_seen():
    assert seen_shares([], [word_hashes("a b")]) == []
    assert seen_shares([word_hashes("a b")], []) == [0.0]
    assert seen_shares([word_hashes("")], [word_hashes("a b")]) == [0.0]
