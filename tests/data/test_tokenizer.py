import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from fathom.data import tokenizer as module
from fathom.data.corpus import BUNDLED
from fathom.data.images import BEGIN, END, GREYS, IMAGE_TOKENS
from fathom.data.tokenizer import BOS, EOS, Tokenizer, train_tokenizer

ONE_K = Tokenizer.load(BUNDLED / "tokenizer-1k.json")
TEXTS = ["the cat sat on the mat, the cat sat", "einst saß die Katze", "猫坐在垫子上", "🐈"]


@given(st.text())
def test_any_text_comes_back_and_its_tokens_stand_for_exactly_its_bytes(text):
    ids = ONE_K.encode(text)
    assert ONE_K.decode(ids) == text
    assert ONE_K.token_bytes[ids].sum() == len(text.encode())
    assert not np.isin(ids, [ONE_K.bos_id, ONE_K.eos_id]).any()


@given(st.text(min_size=1))
def test_streamed_text_is_the_decoded_text_and_never_a_half_character(text):
    stream = ONE_K.decode_stream()
    parts = [stream.add(token_id) for token_id in ONE_K.encode(text)]
    assert "".join(parts) == text
    assert stream.finish() == ""


def test_a_character_cut_off_by_the_end_becomes_a_replacement_character():
    stream = ONE_K.decode_stream()
    ids = ONE_K.encode("🐈")
    assert [stream.add(token_id) for token_id in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize(("name", "size"), [("1k", 1024), ("4k", 4096)])
def test_a_bundled_vocabulary_has_its_size_and_ends_with_the_image_ids(name, size):
    tokenizer = Tokenizer.load(BUNDLED / f"tokenizer-{name}.json")
    assert tokenizer.vocab_size == size
    assert tokenizer.text_vocab_size == size - 19
    last = [tokenizer.token_id(token) for token in IMAGE_TOKENS]
    assert last == list(range(size - 19, size))
    assert np.flatnonzero(tokenizer.is_symbol).tolist() == last[2:]
    assert tokenizer.token_bytes[last].sum() == 0
    single_bytes = {tokenizer.decode_bytes([i]) for i in np.flatnonzero(tokenizer.token_bytes == 1)}
    assert len(single_bytes) == 256


@pytest.mark.parametrize("special", [BOS, EOS, BEGIN, END, GREYS[3]])
def test_the_name_of_a_special_token_inside_a_text_is_plain_text(special):
    ids = ONE_K.encode(f"a{special}b")
    assert ONE_K.token_id(special) not in ids
    assert ONE_K.decode(ids) == f"a{special}b"


def test_special_and_image_ids_decode_to_nothing():
    ids = [ONE_K.bos_id, *ONE_K.encode("a"), ONE_K.token_id(GREYS[0]), ONE_K.eos_id]
    assert ONE_K.decode(ids) == "a"
    assert ONE_K.token_name(ONE_K.bos_id) == BOS


def test_encoding_many_texts_is_encoding_each():
    assert ONE_K.encode_many(TEXTS) == [ONE_K.encode(text) for text in TEXTS]
    assert ONE_K.encode_many([]) == []
    assert ONE_K.encode("") == []


def test_training_twice_gives_the_same_file_and_loading_it_the_same_ids(tmp_path):
    first, second = train_tokenizer(TEXTS, 280), train_tokenizer(TEXTS, 280)
    assert first.to_bytes() == second.to_bytes()
    assert first.vocab_size == 280
    first.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode_many(TEXTS) == first.encode_many(TEXTS)
    assert loaded.fingerprint() == first.fingerprint()


def test_a_different_vocabulary_has_a_different_fingerprint():
    assert train_tokenizer(TEXTS, 280).fingerprint() != train_tokenizer(TEXTS, 281).fingerprint()


def test_too_little_text_gives_a_smaller_vocabulary_that_still_knows_every_byte():
    tokenizer = train_tokenizer(["aa"], 1000, IMAGE_TOKENS)
    assert tokenizer.vocab_size == 258 + 1 + 19
    assert tokenizer.decode(tokenizer.encode("żółw 🐢")) == "żółw 🐢"


@pytest.mark.parametrize("size", [0, 257, module.MAX_VOCAB + 1])
def test_a_vocabulary_without_room_for_the_bytes_or_too_large_is_refused(size):
    with pytest.raises(ValueError, match="vocab_size must be 258"):
        train_tokenizer(TEXTS, size)


def changed(**changes: object) -> bytes:
    """The 1k tokenizer.json with other top-level entries."""
    return json.dumps(json.loads(ONE_K.to_bytes()) | changes).encode()


def added(*names: str) -> list[dict[str, object]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": i, "content": n, "special": True, **plain} for i, n in enumerate(names)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not a tokenizer.json"),
        (b"\xff\xfe", "is not a tokenizer.json"),
        (b'{"model": 3}', "is not a tokenizer.json"),
        (
            changed(decoder={"type": "Fuse"}),
            "it is neither byte-level BPE nor BPE with byte fallback",
        ),
        (changed(decoder=None), "it is neither byte-level BPE nor BPE with byte fallback"),
        (changed(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "byte-level"),
        (changed(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}), "ids outside"),
        (changed(model={"type": "BPE", "vocab": ["a"], "merges": []}), "is not a tokenizer.json"),
        (
            changed(model={"type": "BPE", "vocab": {"a": 2**31}, "merges": []}, added_tokens=[]),
            "has ids outside 0..4194303",
        ),
        (
            changed(model={"type": "BPE", "vocab": {"猫": 0}, "merges": []}, added_tokens=[]),
            "not written in byte-level letters",
        ),
        (
            changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": []}, added_tokens=[]),
            "has none of the special tokens <|bos|>",
        ),
    ],
)
def test_a_file_that_is_no_byte_level_tokenizer_is_refused_in_one_sentence(content, sentence):
    with pytest.raises(ValueError, match=r"stranger\.json") as refused:
        Tokenizer(content, "stranger.json")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_special_tokens_of_other_families_are_known():
    model = {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "merges": []}
    tokenizer = Tokenizer(changed(model=model, added_tokens=added("<s>", "</s>")))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.text_vocab_size == tokenizer.vocab_size == 3


def test_what_a_prompt_begins_with_is_what_the_file_or_its_neighbour_says():
    model = {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "merges": []}
    plain = changed(model=model, added_tokens=added("<s>", "</s>"))
    rule = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    ruled = changed(model=model, added_tokens=added("<s>", "</s>"), post_processor=rule)
    assert Tokenizer(plain).begin_ids == []
    assert Tokenizer(plain, add_bos=True).begin_ids == [0]
    assert Tokenizer(ruled).begin_ids == [0]
    assert Tokenizer(ruled, add_bos=False).begin_ids == []
    assert Tokenizer(ruled, bos="</s>", eos="<s>").begin_ids == []
    assert Tokenizer(SMALL).begin_ids == [0]
    with pytest.raises(ValueError, match="none of the special tokens <x>"):
        Tokenizer(plain, bos="<x>")


def test_names_of_special_tokens_mean_them_where_asked_but_not_behind_a_mark():
    tokenizer = Tokenizer(SMALL)
    word = tokenizer.encode("the cat")
    assert tokenizer.encode_marked("<|bos|>the cat<|eos|>") == [0, *word, 1]
    assert tokenizer.encode_marked("the cat") == word
    assert tokenizer.encode_marked("") == []
    text = "a <|eos|>\0 b<|bos|>"
    hidden = tokenizer.mark_literal(text)
    assert not {0, 1} & set(tokenizer.encode_marked(hidden))
    assert tokenizer.decode(tokenizer.encode_marked(hidden)) == "a <|eos|> b<|bos|>"
    whole = tokenizer.encode_marked(f"<|bos|>{hidden}<|eos|>")
    assert whole == [0, *tokenizer.encode_marked(hidden), 1]


SMALL = train_tokenizer(TEXTS, 270).to_bytes()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.sampled_from(["BPE", "ByteLevel", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "vocab", "merges", "id", "content"]), inner)
    ),
    max_leaves=6,
)


@given(st.sampled_from(sorted(json.loads(SMALL))), st.sampled_from([None, "vocab", "merges"]), JSON)
def test_any_damage_is_a_value_error_or_harmless(key, inner, value):
    content = json.loads(SMALL)
    if inner and key == "model":
        content["model"][inner] = value
    else:
        content[key] = value
    try:
        tokenizer = Tokenizer(json.dumps(content).encode())
    except ValueError:
        return
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)


def test_a_model_that_does_not_name_its_type_is_bpe():
    content = json.loads(SMALL)
    del content["model"]["type"]
    assert Tokenizer(json.dumps(content).encode()).encode("the cat") == train_tokenizer(
        TEXTS, 270
    ).encode("the cat")


class PanicException(BaseException):
    pass


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(PanicException("boom"), ValueError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_panic_becomes_a_value_error_and_ctrl_c_stays_itself(monkeypatch, raised, expected):
    class Backend:
        @staticmethod
        def from_str(_: str) -> None:
            raise raised

    monkeypatch.setattr(tokenizers, "Tokenizer", Backend)
    with pytest.raises(expected):
        Tokenizer(ONE_K.to_bytes())


def test_a_missing_and_an_oversized_file_are_refused_before_reading(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is not a file"):
        Tokenizer.load(tmp_path)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10)
    Path(tmp_path / "large.json").write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="larger than"):
        Tokenizer.load(tmp_path / "large.json")


def test_a_lone_surrogate_cannot_be_encoded_and_says_so():
    with pytest.raises(ValueError, match="cannot be encoded"):
        ONE_K.encode("\ud800")


def test_an_unknown_special_token_is_a_value_error():
    with pytest.raises(ValueError, match=r"has no token <\|nothing\|>"):
        ONE_K.token_id("<|nothing|>")
