import hashlib
import lzma
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fathom.data import corpus
from fathom.data.bundle import training_texts
from fathom.data.config import DataConfig
from fathom.data.corpus import (
    BUNDLED,
    DOMAINS,
    TEXT_DOMAINS,
    bundled_folder,
    is_heldout,
    read_bundled,
    read_heldout,
)
from fathom.data.dataset import open_dataset
from fathom.data.images import pixels_to_ids, show_image


def test_every_bundled_file_has_the_size_and_hash_that_sources_states():
    sources = (BUNDLED / "SOURCES.md").read_text(encoding="utf-8")
    stated = re.findall(r"\| `([\w.-]+)` \| ([\d,]+) \| `(\w{64})` \|", sources)
    assert {name for name, _, _ in stated} == {
        path.name for path in BUNDLED.iterdir() if path.suffix not in (".md",)
    } - {"LICENSES.txt"}
    for name, size, digest in stated:
        content = (BUNDLED / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            int(size.replace(",", "")),
            digest,
        )
    for name, digest in re.findall(r"\| `(\w+\.xz)` \| `(\w{64})` \|", sources):
        content = lzma.decompress((BUNDLED / name).read_bytes())
        assert hashlib.sha256(content).hexdigest() == digest


@pytest.mark.parametrize("domain", TEXT_DOMAINS)
def test_a_text_domain_holds_out_at_least_eight_documents_and_60_kb(domain):
    by_id = {document.id: document.text for document in read_bundled(domain)}
    heldout = read_heldout()[domain]
    assert len(set(heldout)) == len(heldout) >= 8
    assert sum(len(by_id[name].encode()) for name in heldout) >= 60_000


def test_held_out_images_show_every_digit():
    heldout = read_heldout()["image"]
    assert len(set(heldout)) == 180
    assert {name.rsplit("/", 1)[1] for name in heldout} == set("0123456789")


@pytest.mark.parametrize("domain", TEXT_DOMAINS)
def test_the_opened_corpus_is_the_bundled_text_split_by_the_list(bundled, domain):
    texts = {document.id: document.text for document in read_bundled(domain)}
    heldout = read_heldout()[domain]
    assert bundled.document_names("heldout", domain) == heldout
    assert bundled.document_names("train", domain) == [n for n in texts if n not in heldout]
    for split in ("train", "heldout"):
        sizes = bundled.document_bytes(split, domain)
        for i, name in enumerate(bundled.document_names(split, domain)):
            ids = bundled.document(split, domain, i)
            assert (ids[0], ids[-1]) == (bundled.tokenizer.bos_id, bundled.tokenizer.eos_id)
            assert bundled.tokenizer.decode(ids.tolist()) == texts[name]
            assert sizes[i] == len(texts[name].encode()) == bundled.tokenizer.token_bytes[ids].sum()


def test_an_image_is_begin_64_grey_levels_and_end(bundled):
    assert bundled.kind("image") == "symbols"
    assert bundled.vocab_size == 1024
    ids = bundled.document("train", "image", 0)
    assert len(ids) == 66
    assert (ids[0], ids[-1]) == (1005, 1006)
    assert bundled.tokenizer.is_symbol[ids[1:-1]].all()
    assert bundled.document_bytes("train", "image")[0] == 64
    assert show_image((ids[1:-1] - 1007).tolist()).count("\n") == 7


def test_pixels_become_ids_in_order_and_any_other_character_is_an_error():
    assert pixels_to_ids("0g1", 100) == [100, 102, 118, 103, 101]
    with pytest.raises(ValueError, match="substring"):
        pixels_to_ids("h", 100)


def test_no_text_stands_on_both_sides_of_the_split():
    for domain in DOMAINS:
        heldout = set(read_heldout()[domain])
        texts = [{}, {}]
        for document in read_bundled(domain):
            texts[document.id in heldout][document.text] = document.id
        assert texts[0].keys().isdisjoint(texts[1].keys())


def test_the_tokenizers_are_trained_on_training_documents_only():
    heldout = {
        doc.text for d in TEXT_DOMAINS for doc in read_bundled(d) if doc.id in read_heldout()[d]
    }
    texts = training_texts()
    assert len(texts) > 100
    assert heldout.isdisjoint(texts)


def test_several_users_at_once_get_one_folder_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(corpus, "DOMAINS", ("image",))  # the quickest
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(bundled_folder, ["1k"] * 4))
    assert len(folders) == 1
    assert list((tmp_path / "fathom").iterdir()) == list(folders)


def test_an_unwritable_cache_is_replaced_by_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "DOMAINS", ("image",))
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    dataset = open_dataset(DataConfig())
    assert tmp_path not in dataset.folder.parents
    assert dataset.documents("train", "image") == 1617


def test_the_folder_depends_on_the_content(tmp_path, monkeypatch, bundled):
    before = corpus._content_hash("1k")
    assert before in bundled.folder.name
    assert before != corpus._content_hash("4k")
    monkeypatch.setattr(corpus, "FORMAT", corpus.FORMAT + 1)
    assert before != corpus._content_hash("1k")


def test_one_id_in_fifty_is_held_out_whatever_the_order():
    names = [f"folder/file-{i}.txt" for i in range(20_000)]
    share = np.mean([is_heldout(name) for name in names])
    assert 0.017 < share < 0.023
    assert is_heldout("a.txt") == is_heldout("a.txt")
