import json

import numpy as np
import pytest

from fathom.data.config import DataConfig
from fathom.data.dataset import Dataset, open_dataset
from fathom.data.shards import (
    Encoded,
    ShardWriter,
    atomic_folder,
    check_domain_name,
    id_dtype,
    write_split,
)

TEXTS = ["one two three", "vier fünf", "六七八"]


def test_documents_come_back_as_they_were_written(make_dataset):
    dataset = make_dataset(a=(TEXTS, ["held out"]), b=(["b"], ["c", "d"]))
    assert dataset.domains == ["a", "b"]
    assert [dataset.documents(s, d) for s in ("train", "heldout") for d in "ab"] == [3, 1, 1, 2]
    for i, text in enumerate(TEXTS):
        assert dataset.tokenizer.decode(dataset.document("train", "a", i).tolist()) == text
    assert dataset.document_bytes("train", "a").tolist() == [len(t.encode()) for t in TEXTS]
    assert dataset.document_names("heldout", "b") == ["b/0", "b/1"]
    assert dataset.tokens("train", "a") == sum(
        len(dataset.document("train", "a", i)) for i in range(3)
    )
    assert dataset.statistics["domains"]["a"]["train"]["documents"] == 3


def test_the_fingerprint_follows_the_ids_and_not_the_folder(make_dataset, tmp_path):
    first = make_dataset(a=(TEXTS, ["x y"]))
    moved = first.folder.rename(tmp_path / "elsewhere")
    again = make_dataset(a=(TEXTS, ["x y"]))
    assert Dataset(moved).fingerprint == again.fingerprint
    again.folder.rename(tmp_path / "again")
    assert make_dataset(a=(TEXTS, ["x z"])).fingerprint != again.fingerprint


def test_ids_are_as_narrow_as_the_vocabulary_allows():
    assert id_dtype(65_536) == np.uint16
    assert id_dtype(65_537) == np.uint32


def test_wide_ids_survive_the_disk(tmp_path):
    counts = write_split(tmp_path / "train", "a", 100_000, [Encoded("x", [0, 99_999], 3)])
    assert (counts["documents"], counts["tokens"], counts["bytes"]) == (1, 2, 3)
    assert np.fromfile(tmp_path / "train" / "a.bin", "<u4").tolist() == [0, 99_999]


def test_an_id_that_does_not_fit_is_never_written_wrapped_around(tmp_path):
    writer = ShardWriter(tmp_path / "train", "a", 1024)
    with pytest.raises(OverflowError):
        writer.add([Encoded("x", [70_000, 1], 1)])


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".", "a b", "a.b", "x" * 65])
def test_a_domain_name_is_no_path_and_no_nested_key(name):
    with pytest.raises(ValueError, match="must be 1 to 64 letters"):
        check_domain_name(name)


def test_weights_default_to_the_training_tokens_and_add_up_to_one(make_dataset):
    dataset = make_dataset(a=(["x" * 30], ["y"]), b=(["z" * 7, "q"], ["y"]))
    sizes = {d: dataset.tokens("train", d) for d in "ab"}
    weights = dataset.weights(DataConfig())
    assert weights == {d: size / sum(sizes.values()) for d, size in sizes.items()}


def test_a_domain_left_out_of_the_weights_is_not_drawn(make_dataset):
    dataset = make_dataset(a=(["x"], ["y"]), b=(["z"], ["y"]), c=(["z"], ["y"]))
    weights = dataset.weights(DataConfig(weights={"a": 3.0, "c": 1.0}))
    assert weights == {"a": 0.75, "b": 0.0, "c": 0.25}


def test_an_unknown_domain_is_refused_with_the_nearest_known_one(bundled):
    with pytest.raises(ValueError, match=r"data.weights.math: .* did you mean 'maths'") as refused:
        open_dataset(DataConfig(source=str(bundled.folder), weights={"math": 1.0}))
    assert "prose, zh, code, maths, image" in str(refused.value)


def test_a_prepared_folder_brings_its_own_tokenizer(bundled):
    assert open_dataset(DataConfig(source=str(bundled.folder))).fingerprint == bundled.fingerprint
    with pytest.raises(ValueError, match=r"data.tokenizer=4k is for the bundled corpus"):
        open_dataset(DataConfig(source=str(bundled.folder), tokenizer="4k"))


def test_a_folder_that_was_not_prepared_says_how_to_prepare_one(tmp_path):
    with pytest.raises(ValueError, match="fathom data prepare SOURCE --out"):
        open_dataset(DataConfig(source=str(tmp_path / "missing")))


def break_meta(folder):
    (folder / "meta.json").write_text("{")


def lose_meta_keys(folder):
    (folder / "meta.json").write_text('{"format": 1, "domains": [{}]}')


def future_format(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"format": 99}))


def domain_is_a_path(folder):
    text = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(text.replace('"name": "a"', '"name": "../a"'))


def cut_ids(folder):
    content = (folder / "train" / "a.bin").read_bytes()
    (folder / "train" / "a.bin").write_bytes(content[:-2])


def empty_ids(folder):
    (folder / "train" / "a.bin").write_bytes(b"")


def break_index(folder):
    (folder / "heldout" / "a.npz").write_bytes(b"PK nothing")


def pickled_index(folder):
    np.save(folder / "heldout" / "a.npz", np.array([{}], object), allow_pickle=True)
    (folder / "heldout" / "a.npz.npy").rename(folder / "heldout" / "a.npz")


def lose_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (break_meta, "is damaged"),
        (lose_meta_keys, "is damaged"),
        (future_format, "has format 99, but this version reads 1"),
        (domain_is_a_path, "must be 1 to 64 letters"),
        (cut_ids, "does not fit its index"),
        (empty_ids, "cannot be read"),
        (break_index, "cannot be read"),
        (pickled_index, "cannot be read"),
        (lose_tokenizer, "is not a file"),
    ],
)
def test_a_damaged_folder_is_refused_in_a_sentence(make_dataset, damage, sentence):
    folder = make_dataset(a=(TEXTS, ["held out"])).folder
    damage(folder)
    with pytest.raises(ValueError, match=sentence):
        Dataset(folder)


def interrupted_half_way(out):
    with atomic_folder(out) as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupted_half_way(out)
    assert list(out.parent.iterdir()) == []
    with atomic_folder(out) as folder:
        (folder / "meta.json").write_text("1")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_only_a_prepared_corpus_is_replaced_and_only_when_forced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with atomic_folder(out) as folder:  # an empty folder may be filled
        (folder / "meta.json").write_text("old")
    with pytest.raises(ValueError, match="use --force"), atomic_folder(out):
        pass
    with atomic_folder(out, force=True) as folder:
        (folder / "meta.json").write_text("new")
    assert (out / "meta.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_never_removes_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    with (
        pytest.raises(ValueError, match="is not a prepared corpus"),
        atomic_folder(tmp_path, force=True),
    ):
        pass
    assert (tmp_path / "thesis.txt").exists()
