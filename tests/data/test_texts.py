"""Texts under another tokenizer: the same bytes, each counted once, whoever prepared them."""

import math
from pathlib import Path

import numpy as np
import pytest

from fathom.data.corpus import BUNDLED, bundled_folder
from fathom.data.dataset import Dataset
from fathom.data.loader import IGNORE, heldout_batches
from fathom.data.texts import Texts, decoded, read_texts
from fathom.data.tokenizer import Tokenizer
from fathom.model import build_model
from fathom.presets import preset
from fathom.train.evaluate import evaluate

ONE_K, FOUR_K = (Tokenizer.load(BUNDLED / f"tokenizer-{name}.json") for name in ("1k", "4k"))
TEXTS = ["It is a truth universally acknowledged.", "漢字かな交じり文 🙂", "x"]


def no_bos(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(tokenizer.to_bytes(), add_bos=False)


def predicted_bytes(texts: Texts, domain: str, seq_len: int) -> int:
    batches = heldout_batches(texts, domain, seq_len=seq_len, batch_size=2)
    targets = np.concatenate([batch.targets.numpy().ravel() for batch in batches])
    return int(texts.tokenizer.token_bytes[targets[targets != IGNORE]].sum())


@pytest.mark.parametrize("seq_len", [4, 64])
def test_every_byte_counts_once_where_a_text_begins_with_bos(seq_len: int) -> None:
    texts = Texts(ONE_K, {"a": TEXTS, "b": TEXTS[:1]})
    assert texts.domains == ["a", "b"]
    assert predicted_bytes(texts, "a", seq_len) == sum(len(text.encode()) for text in TEXTS)
    assert texts.document_bytes("heldout", "b").tolist() == [len(TEXTS[0])]
    assert texts.documents("train", "a") == 0


def test_without_bos_the_first_token_is_given_and_not_predicted() -> None:
    tokenizer = no_bos(ONE_K)
    texts = Texts(tokenizer, {"a": TEXTS[:2]})
    given = sum(int(tokenizer.token_bytes[tokenizer.encode(text)[0]]) for text in TEXTS[:2])
    want = sum(len(text.encode()) for text in TEXTS[:2]) - given
    assert predicted_bytes(texts, "a", 8) == want
    assert tokenizer.bos_id not in texts.document("heldout", "a", 0)


def test_a_text_of_one_token_is_passed_over() -> None:
    assert Texts(no_bos(ONE_K), {"a": ["x", "x y z"]}).documents("heldout", "a") == 1
    with pytest.raises(ValueError, match="the domain a holds no text of two tokens"):
        Texts(no_bos(ONE_K), {"a": ["x"]})


def test_a_prepared_corpus_is_decoded_exactly() -> None:
    prepared = Dataset(bundled_folder("1k"))
    texts = decoded(prepared, FOUR_K)
    assert texts.domains == ["prose", "zh", "code", "maths"]
    for domain in texts.domains:
        want = prepared.document_bytes("heldout", domain)
        assert texts.document_bytes("heldout", domain).tolist() == want.tolist()
        own = prepared.tokenizer.decode(prepared.document("heldout", domain, 0))
        assert FOUR_K.decode(texts.document("heldout", domain, 0)) == own


def test_a_budget_decodes_no_more_documents_than_it_needs() -> None:
    prepared = Dataset(bundled_folder("1k"))
    assert decoded(prepared, FOUR_K, 1).documents("heldout", "zh") == 1
    first = int(prepared.document_bytes("heldout", "zh")[0])
    for budget, needed in ((first, 1), (first + 1, 2)):
        assert decoded(prepared, FOUR_K, budget).documents("heldout", "zh") == needed


def test_bits_per_byte_of_an_even_guess_are_its_tokens(tmp_path: Path) -> None:
    model = build_model(preset("tiny-gqa"), seed=0)
    model.embed.weight.data.zero_()
    if hasattr(model, "head"):
        model.head.weight.data.zero_()
    found = evaluate(model, Texts(ONE_K, {"a": TEXTS[:2]}), seq_len=32)
    tokens = sum(len(ONE_K.encode(text)) for text in TEXTS[:2])
    num_bytes = sum(len(text.encode()) for text in TEXTS[:2])
    assert found.by_domain["a"] == pytest.approx(tokens * math.log2(1024) / num_bytes, rel=1e-5)
    assert found.symbols == {}


def test_files_and_folders_are_read_as_prepare_reads_them(tmp_path: Path) -> None:
    (tmp_path / "law").mkdir()
    (tmp_path / "law/a.txt").write_text("one two")
    (tmp_path / "b.jsonl").write_text('{"text": "three four", "domain": "x"}\n')
    texts = read_texts([tmp_path], ONE_K)
    assert {d: texts.documents("heldout", d) for d in texts.domains} == {"law": 1, "x": 1}
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="there is no text to read: no files"):
        read_texts([tmp_path / "none"], ONE_K)
