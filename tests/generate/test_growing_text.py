"""Text that grows token by token: whole characters, and nothing at or past a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data.corpus import BUNDLED
from fathom.data.tokenizer import Tokenizer
from fathom.generate.text import GrowingText, longest_overlap

TOKENIZER = Tokenizer.load(BUNDLED / "tokenizer-1k.json")


BYTE_IDS = {
    TOKENIZER.decode_bytes([i]): i
    for i in range(TOKENIZER.text_vocab_size)
    if TOKENIZER.token_bytes[i] == 1
}


def byte_ids(text: str, n_bytes: int | None = None) -> list[int]:
    """A token for each byte of the text, or for the first ``n_bytes``."""
    return [BYTE_IDS[bytes([byte])] for byte in text.encode()[:n_bytes]]


def grow(ids: list[int], stop: list[str]) -> tuple[list[str], GrowingText]:
    text = GrowingText(TOKENIZER, stop)
    return [*(text.add(i) for i in ids), text.finish()], text


def test_without_a_stop_string_each_token_gives_its_text_at_once() -> None:
    ids = TOKENIZER.encode("the cat sat on the mat")
    pieces, text = grow(ids, [])
    assert "".join(pieces) == text.text == "the cat sat on the mat"
    assert all(pieces[:-1])


def test_a_character_of_many_bytes_comes_whole() -> None:
    ids = byte_ids("é漢🙂")
    pieces, text = grow(ids, [])
    assert [piece for piece in pieces if piece] == ["é", "漢", "🙂"]
    assert text.text == "é漢🙂"


def test_a_character_cut_off_becomes_one_replacement() -> None:
    _, text = grow(byte_ids("漢", 2), [])
    assert text.text == "\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_over_several_tokens_is_never_shown() -> None:
    ids = byte_ids("say stop now")
    pieces, text = grow(ids, ["stop"])
    assert "".join(pieces) == text.text == "say "
    assert text.stopped


def test_what_only_looked_like_a_stop_string_is_given_out_later() -> None:
    ids = byte_ids("a sto, a stork")
    pieces, text = grow(ids, ["stop", "storm"])
    held = ["", "", ""]
    assert pieces == ["a", " ", *held, "sto,", " ", "a", " ", *held, "", "stork", ""]
    assert text.text == "a sto, a stork"
    assert not text.stopped


def test_text_held_back_comes_at_the_end() -> None:
    ids = byte_ids("ends in sto")
    pieces, text = grow(ids, ["stop"])
    assert pieces[-1] == "sto"
    assert text.text == "ends in sto"


def test_the_first_of_several_stop_strings_wins() -> None:
    _, text = grow(TOKENIZER.encode("one two three"), ["three", " two"])
    assert text.text == "one"


def test_nothing_comes_after_a_stop() -> None:
    text = GrowingText(TOKENIZER, ["x"])
    assert [text.add(i) for i in byte_ids("abxcd")] == ["a", "b", "", "", ""]
    assert text.text == "ab"
    assert text.finish() == ""


@pytest.mark.parametrize(
    ("text", "stop", "length"),
    [
        ("", ["stop"], 0),
        ("xs", ["stop"], 1),
        ("xsto", ["stop"], 3),
        ("stop", ["stop"], 0),
        ("aaa", ["aaaab"], 3),
        ("ab\n", ["\n\n", "b\nc"], 2),
        ("abc", [], 0),
    ],
)
def test_overlap_is_the_longest_begun_stop_string(text, stop, length) -> None:
    assert longest_overlap(text, stop) == length


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="ab\néz漢", max_size=30),
    stop=st.lists(st.text(alphabet="ab\né", min_size=1, max_size=4), max_size=3),
)
def test_streamed_text_is_what_cutting_the_whole_text_gives(text: str, stop: list[str]) -> None:
    pieces, grown = grow(TOKENIZER.encode(text), stop)
    cuts = [at for s in stop if (at := text.find(s)) >= 0]
    # The first stop string to be *completed* ends the text, as it would end a conversation.
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert "".join(pieces) == grown.text
    assert grown.stopped == bool(cuts)
    assert text.startswith(grown.text)
    if not cuts:
        assert grown.text == text
    else:
        assert len(grown.text) <= min(ends)
        assert not any(s in grown.text for s in stop)
