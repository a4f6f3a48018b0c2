import gzip
import json
import struct
import zlib

import pytest

from fathom.data import bundle
from fathom.data.bundle import choose_heldout, digits, middle_out, shuffled, up_to
from fathom.data.corpus import Document
from fathom.data.extract import austen, metamath, poems, python_modules


def r_vector(strings):
    """What R writes for a character vector (serialization version 3, XDR)."""
    raw = b"X\n" + struct.pack(">iii", 3, 0x040201, 0x030500) + struct.pack(">i", 5) + b"UTF-8"
    raw += struct.pack(">ii", 16, len(strings))
    for string in strings:
        encoded = string.encode()
        raw += struct.pack(">ii", 0x40009, len(encoded)) + encoded
    return struct.pack(">i", len(raw)) + zlib.compress(raw)


def test_novels_are_cut_into_chapters(tmp_path):
    folder = tmp_path / "usr" / "janeaustenr" / "data"
    folder.mkdir(parents=True)
    first = ["EMMA", "", "VOLUME I", "", "CHAPTER I", "", "Emma, café", "", "CHAPTER II", "end", ""]
    second = ["Persuasion", "by", "Chapter 1", "Sir", "Chapter 12", "Anne"]
    (folder / "Rdata.rdb").write_bytes(r_vector(first) + r_vector(second))
    assert list(austen(tmp_path)) == [
        Document("austen/emma/01", "CHAPTER I\n\nEmma, café\n"),
        Document("austen/emma/02", "CHAPTER II\nend\n"),
        Document("austen/persuasion/01", "Chapter 1\nSir\n"),
        Document("austen/persuasion/02", "Chapter 12\nAnne\n"),
    ]


def test_set_mm_is_cut_at_section_headers_and_nothing_is_lost(tmp_path):
    parts = [
        "$c wff $.",
        "  $(\n#*#*#\n Logic\n#*#*#\n$)\n\n$p a $.",
        "$(\n=-=-=\n Sets\n$)\n$( no. $)",
    ]
    (tmp_path / "set.mm").write_text("\n".join(parts) + "\n")
    assert [d.text for d in metamath(tmp_path)] == [part.strip("\n") + "\n" for part in parts]
    assert [d.id for d in metamath(tmp_path)] == ["set.mm/0000", "set.mm/0001", "set.mm/0002"]


@pytest.fixture
def poetry(tmp_path):
    dist = tmp_path / "package" / "dist"
    files = {
        "a/nested.json": {
            "title": "書",
            "content": [
                {"type": "x", "content": [{"chapter": "一", "paragraphs": ["天地玄黃", "宇宙"]}]}
            ],
        },
        "b/list.json": [
            {"rhythmic": "詞", "paragraphs": ["春眠不覺曉"], "author": "某"},
            {"title": "重複", "content": ["天地、玄黃。", "宇宙"]},  # the same characters as above
            {"title": "無"},
        ],
        "b/authors.json": [{"title": "誰", "paragraphs": ["不是詩"]}],
        "rank/x.json": [{"title": "排", "paragraphs": ["不是詩"]}],
    }
    for name, content in files.items():
        (dist / name).parent.mkdir(parents=True, exist_ok=True)
        (dist / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return tmp_path


def test_poems_are_found_in_any_nesting_and_repeated_ones_dropped(poetry):
    assert list(poems(poetry)) == [
        Document("a/nested/0000", "一\n天地玄黃\n宇宙\n"),
        Document("b/list/0000", "詞\n春眠不覺曉\n"),
    ]
    assert [d.id for d in poems(poetry, ["b"])] == ["b/list/0000"]


def test_poems_are_blocked_to_about_four_kilobytes(tmp_path):
    folder = tmp_path / "package" / "dist" / "c"
    folder.mkdir(parents=True)
    content = [{"title": "詩", "paragraphs": [chr(0x4E00 + i) * 30]} for i in range(100)]
    (folder / "x.json").write_text(json.dumps(content))
    blocks = list(poems(tmp_path))
    assert [b.id for b in blocks] == ["c/x/0000", "c/x/0001", "c/x/0002"]
    sizes = [len(block.text.encode()) for block in blocks]
    assert all(4000 <= size < 4200 for size in sizes[:-1])
    assert sum(b.text.count("詩\n") for b in blocks) == 100


def test_modules_that_are_skipped_empty_or_not_utf8_are_left_out(tmp_path):
    for name, content in {
        "a.py": b"x = 1\n",
        "test/b.py": b"y",
        "c.py": b"",
        "d.py": b"\xff",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gone.py").symlink_to(tmp_path / "missing.py")
    assert list(python_modules(tmp_path, ["test"])) == [Document("a.py", "x = 1\n")]


def test_digits_keep_every_pixel_and_the_label(tmp_path):
    row = ["0.0", "16.0", "10.0", *["1.0"] * 61, "7.0"]
    (tmp_path / "digits.csv.gz").write_bytes(gzip.compress((",".join(row) + "\n").encode()))
    assert digits(tmp_path / "digits.csv.gz") == [Document("digit/0000/7", "0ga" + "1" * 61)]


def test_sections_start_in_the_middle_and_small_and_huge_ones_are_passed_over():
    sizes = [5000] * 8 + [1000, 3000, 25_000, 4000]  # the middle is in the eighth
    sections = [Document(str(i), "x" * size) for i, size in enumerate(sizes)]
    assert [d.id for d in middle_out(sections)] == ["7", "9", "11"]


def test_documents_are_taken_until_the_bytes_are_reached():
    documents = [Document(str(i), "é" * 50) for i in range(10)]
    assert len(list(up_to(250, documents))) == 3
    assert len(list(up_to(10_000, documents))) == 10


@pytest.mark.parametrize(("size", "expected"), [(1_000, 60), (30_000, 8)])
def test_held_out_is_at_least_eight_documents_and_60_kb(size, expected):
    documents = [Document(str(i), "x" * size) for i in range(100)]
    heldout = choose_heldout("prose", documents)
    assert heldout == shuffled(documents)[:expected]
    assert choose_heldout("prose", documents[::-1]) == heldout


def test_every_tokenizer_domain_counts_equally():
    texts = bundle.training_texts()
    smallest = 329_130  # bytes of training text in the smallest domain, maths
    total = sum(len(text.encode()) for text in texts)
    assert 4 * smallest <= total < 4 * smallest + 3 * 60_000
