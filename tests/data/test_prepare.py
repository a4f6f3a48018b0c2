import gzip
import json
import lzma
import os

import pytest

from fathom.data import assemble, sources
from fathom.data.assemble import BalancedSample, describe, text_hash
from fathom.data.config import DataConfig
from fathom.data.corpus import is_heldout
from fathom.data.dataset import Dataset, open_dataset
from fathom.data.prepare import Survey, prepare
from fathom.data.sources import SourceDocument, SourceReader, domain_name, find_files, needed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pyarrow")


def write_documents(folder, n, word="word"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{i:03}.txt").write_text(f"{word} number {i} says {word} {i * i}\n")


@pytest.fixture
def source(tmp_path):
    write_documents(tmp_path / "source" / "poems", 120, "rose")
    write_documents(tmp_path / "source" / "laws", 150, "article")
    return tmp_path / "source"


def read(*paths):
    reader = SourceReader(find_files(paths))
    return list(reader), reader.problems


def test_a_folder_becomes_a_dataset_with_its_subfolders_as_domains(source, tmp_path):
    stages = []
    statistics = prepare(
        [source], tmp_path / "out", vocab_size=300, progress=lambda *seen: stages.append(seen)
    )
    dataset = open_dataset(DataConfig(source=str(tmp_path / "out")))
    assert dataset.domains == ["laws", "poems"]
    assert dataset.statistics == json.loads(json.dumps(statistics))
    assert dataset.vocab_size <= 300
    for domain in dataset.domains:
        for split in ("train", "heldout"):
            for i, name in enumerate(dataset.document_names(split, domain)):
                text = (source / name).read_text()
                assert dataset.tokenizer.decode(dataset.document(split, domain, i)) == text
                assert is_heldout(name) == (split == "heldout")
    counts = [statistics["domains"][d][s]["documents"] for d in ("laws", "poems") for s in SPLITS]
    assert sum(counts) == 270
    assert {stage for stage, _, _ in stages} == {"reading", "tokenizing"}
    assert all(0 <= done <= total for _, done, total in stages)
    assert stages[-1][1] == stages[-1][2] == sum(f.stat().st_size for f in source.rglob("*.txt"))


SPLITS = ("train", "heldout")


def test_the_split_and_the_ids_do_not_depend_on_place_or_order(source, tmp_path):
    prepare([source / "poems", source / "laws"], tmp_path / "a", vocab_size=300)
    (source / "poems").rename(tmp_path / "elsewhere")
    prepare([source / "laws", tmp_path / "elsewhere"], tmp_path / "b", vocab_size=300)
    a, b = Dataset(tmp_path / "a"), Dataset(tmp_path / "b")
    for split in SPLITS:
        names = a.document_names(split, "text")
        assert sorted(names) == sorted(b.document_names(split, "text"))
    assert a.tokenizer.to_bytes() == b.tokenizer.to_bytes()


def test_preparing_twice_gives_the_same_fingerprint(source, tmp_path):
    prints = set()
    for name in ("a", "b"):
        prepare([source], tmp_path / name, vocab_size=300)
        prints.add(Dataset(tmp_path / name).fingerprint)
    assert len(prints) == 1


def test_a_given_tokenizer_is_used_as_it_is(source, tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    prepare([source], tmp_path / "out", tokenizer=tmp_path / "tokenizer.json")
    assert Dataset(tmp_path / "out").tokenizer.fingerprint() == tokenizer.fingerprint()


def test_equal_texts_are_kept_once_whatever_the_order_of_the_sources(source, tmp_path):
    twin = tmp_path / "twin" / "laws"
    write_documents(twin, 150, "article")
    for path in twin.iterdir():
        path.rename(path.with_name("z" + path.name))
        if path.name == "007.txt":
            (twin / ("z" + path.name)).write_text("article  number 7\n says article 49")
    for name, order in (("a", [source, tmp_path / "twin"]), ("b", [tmp_path / "twin", source])):
        statistics = prepare(order, tmp_path / name, vocab_size=300)
        assert statistics["duplicates"] == 150
        dataset = Dataset(tmp_path / name)
        names = [n for split in SPLITS for n in dataset.document_names(split, "laws")]
        assert sorted(names) == [f"laws/{i:03}.txt" for i in range(150)]


def test_a_domain_without_held_out_text_is_refused_and_nothing_is_written(source, tmp_path):
    (source / "single").mkdir()
    (source / "single" / "book.txt").write_text("one long text")
    with pytest.raises(ValueError, match="domain 'single' has no held-out text") as refused:
        prepare([source], tmp_path / "out")
    assert "it has 1 in all" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_domain_of_held_out_text_only_is_refused(tmp_path):
    name = next(f"{i}.txt" for i in range(1000) if is_heldout(f"{i}.txt"))
    (tmp_path / name).write_text("held out")
    with pytest.raises(ValueError, match="domain 'text' has no training text"):
        prepare([tmp_path / name], tmp_path / "out")


def test_sources_without_text_and_missing_sources_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="hold no usable text"):
        prepare([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        prepare([tmp_path / "missing"], tmp_path / "out")


def test_an_existing_folder_is_refused_before_anything_is_read(source, tmp_path):
    prepare([source], tmp_path / "out", vocab_size=300)
    with pytest.raises(ValueError, match="use --force"):
        prepare([tmp_path / "missing"], tmp_path / "out")
    prepare([source], tmp_path / "out", vocab_size=270, force=True)
    assert Dataset(tmp_path / "out").vocab_size == 270


def test_what_cannot_be_used_is_counted_and_named_and_the_rest_is_prepared(source, tmp_path):
    bad = source / "poems"
    (bad / "empty.txt").write_text("")
    (bad / "blank.md").write_text(" \n\t\n")
    (bad / "latin.txt").write_bytes("gruß".encode("latin-1"))
    (bad / "one.txt").write_text("a")
    (bad / "picture.png").write_bytes(b"\x89PNG")
    (bad / "broken.txt.gz").write_bytes(b"\x1f\x8b broken")
    (bad / "cut.txt.xz").write_bytes(lzma.compress(b"abc" * 1000)[:-20])
    (bad / "cut.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd nothing")
    (bad / "broken.parquet").write_bytes(b"PAR1")
    (bad / "lines.jsonl").write_text(
        '{"text": "a usable line"}\n{"text": \n\n[1]\n{"text": 3}\n{"a": 1}\n'
    )
    (bad / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n' + "[" * 100_000)
    (bad / ".hidden.txt").write_text("hidden")
    statistics = prepare([source], tmp_path / "out", vocab_size=300)
    left_out = statistics["left_out"]["examples"]
    assert {kind: sorted(names) for kind, names in left_out.items()} == {
        "empty": ["poems/blank.md", "poems/empty.txt"],
        "not UTF-8": ["poems/latin.txt", "poems/surrogate.jsonl#0"],
        "only one token": ["poems/one.txt"],
        "unknown kind of file": ["poems/picture.png"],
        "cannot be read or unpacked": [
            "poems/broken.parquet",
            "poems/broken.txt.gz",
            "poems/cut.txt.xz",
            "poems/cut.txt.zst",
        ],
        "not JSON": ["poems/lines.jsonl#1", "poems/surrogate.jsonl#1"],
        "no text field": ["poems/lines.jsonl#2", "poems/lines.jsonl#3", "poems/lines.jsonl#4"],
    }
    counts = statistics["left_out"]["counts"]
    assert counts == {kind: len(names) for kind, names in left_out.items()}
    table = describe(statistics)
    assert "1 left out, only one token: poems/one.txt" in table
    assert "poems/lines.jsonl#0" in [
        name
        for split in SPLITS
        for name in Dataset(tmp_path / "out").document_names(split, "poems")
    ]


def test_nothing_but_single_tokens_is_refused(tmp_path):
    heldout = next(f"{i}.txt" for i in range(1000) if is_heldout(f"{i}.txt"))
    for name, text in ((heldout, "a"), ("x.txt", "b"), ("y.txt", "c")):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    with pytest.raises(ValueError, match="no document has more than one token"):
        prepare([tmp_path / "in"], tmp_path / "out", vocab_size=258)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".zst"])
def test_a_text_file_is_one_document_packed_or_not(tmp_path, suffix, packing):
    zstandard = pytest.importorskip("zstandard")
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
    path = tmp_path / f"a.b{suffix}{packing}"
    path.write_bytes(pack[packing]("\ufeffgrüß\r\ndich".encode()))
    documents, problems = read(path)
    assert documents == [SourceDocument("text", path.name, "grüß\r\ndich")]
    assert problems.counts == {}


@pytest.mark.parametrize("packing", ["", ".zst"])
def test_json_lines_have_a_text_and_maybe_a_domain(tmp_path, packing):
    zstandard = pytest.importorskip("zstandard")
    lines = b'{"text": "a", "domain": "My Law!"}\n{"text": "b"}\n{"text": "c", "domain": null}'
    path = tmp_path / f"x.jsonl{packing}"
    path.write_bytes(zstandard.compress(lines) if packing else lines)
    documents, _ = read(path)
    assert [tuple(d) for d in documents] == [
        ("My-Law", f"{path.name}#0", "a"),
        ("text", f"{path.name}#1", "b"),
        ("text", f"{path.name}#2", "c"),
    ]


def test_parquet_rows_are_read_like_json_lines(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {"text": ["a", None, "c"], "domain": ["d", "d", None], "other": [1, 2, 3]}
    )
    (tmp_path / "in" / "folder").mkdir(parents=True)
    parquet.write_table(table, tmp_path / "in" / "folder" / "x.parquet")
    documents, problems = read(tmp_path / "in")
    assert [tuple(d) for d in documents] == [
        ("d", "folder/x.parquet#0", "a"),
        ("folder", "folder/x.parquet#2", "c"),
    ]
    assert problems.examples == {"no text field": ["folder/x.parquet#1"]}


def test_a_parquet_file_without_a_text_column_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"content": ["a"]}), tmp_path / "x.parquet"
    )
    documents, problems = read(tmp_path)
    assert documents == []
    assert problems.examples == {"no text field": ["x.parquet"]}


def test_pipes_and_broken_links_in_a_folder_are_passed_over(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "missing.txt")
    (tmp_path / "a.txt").write_text("text")
    documents, problems = read(tmp_path)
    assert [document.id for document in documents] == ["a.txt"]
    assert problems.counts == {}


def test_a_missing_library_names_the_extra_to_install(tmp_path):
    with pytest.raises(ValueError, match=r"needs nosuchlibrary: pip install 'fathom-lm\[data\]'"):
        needed("nosuchlibrary.part", tmp_path / "x.parquet")


def test_a_document_beyond_the_limit_is_left_out_however_small_it_was_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "bomb.txt.xz").write_bytes(lzma.compress(b"a" * 10**6))
    line = b'{"text": "' + b"b" * 1500 + b'"}\n'
    (tmp_path / "bomb.jsonl").write_bytes(line)
    documents, problems = read(tmp_path)
    assert documents == []
    assert problems.counts["longer than 256 MiB"] == 1
    assert problems.counts["not JSON"] == 2  # the line in two halves


def test_reading_reports_how_far_it_is_within_a_file(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "word"}\n' * 10_000)
    reader = SourceReader(find_files([tmp_path]))
    seen = [reader.bytes_read for _ in reader]
    assert seen == sorted(seen)
    assert len(set(seen)) > 5
    assert reader.bytes_read == reader.total_bytes == os.path.getsize(tmp_path / "x.jsonl")


def test_a_file_that_broke_off_counts_as_read(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-9])
    reader = SourceReader(find_files([tmp_path]))
    assert list(reader) == []
    assert reader.bytes_read == reader.total_bytes > 0


@pytest.mark.parametrize(
    ("given", "name"),
    [("a b/c", "a-b-c"), ("日本", "日本"), ("../..", "text"), ("", "text"), ("x" * 99, "x" * 64)],
)
def test_any_name_becomes_a_domain_name(given, name):
    assert domain_name(given) == name


def test_the_tokenizer_never_sees_held_out_text():
    survey = Survey()
    name = next(str(i) for i in range(1000) if is_heldout(str(i)))
    survey.add(SourceDocument("a", "z", "seen first under a training id"))
    survey.add(SourceDocument("a", name, "seen first under a training id"))
    survey.add(SourceDocument("a", "y", "training text"))
    assert min("z", name) == name
    assert survey.sample() == ["training text"]


def test_the_sample_is_balanced_and_does_not_depend_on_the_order():
    documents = [("big", f"text {i} " * 10) for i in range(300)]
    documents += [("small", f"word {i} " * 10) for i in range(30)]
    samples = []
    for order in (documents, documents[::-1]):
        sample = BalancedSample(2000)
        for domain, text in order:
            sample.add(domain, text_hash(text), text)
        samples.append(list(sample.texts()))
    assert samples[0] == samples[1]
    sizes = [sum(len(t) for _, t in samples[0] if t.startswith(w)) for w in ("text", "word")]
    assert all(900 <= size <= 1000 for size in sizes)


def test_a_strangers_name_cannot_steer_the_terminal():
    statistics = {
        "domains": {},
        "left_out": {"counts": {"empty": 1}, "examples": {"empty": ["\x1b[2Jx\n"]}},
    }
    assert "\x1b" not in describe(statistics)
    assert "?[2Jx?" in describe(statistics)


def test_batches_of_any_size_write_the_same_corpus(source, tmp_path, monkeypatch):
    prepare([source], tmp_path / "a", vocab_size=300)
    monkeypatch.setattr(assemble, "BATCH_BYTES", 100)
    prepare([source], tmp_path / "b", vocab_size=300)
    assert Dataset(tmp_path / "a").fingerprint == Dataset(tmp_path / "b").fingerprint
