"""A prepared corpus, opened: memory-mapped ids by split, domain and document."""

import difflib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathom.data.config import DataConfig
from fathom.data.corpus import bundled_folder
from fathom.data.shards import FORMAT, SPLITS, Kind, Split, check_domain_name
from fathom.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Shard:
    """One domain of one split: ids of all documents end to end, and where each begins.

    ``offsets`` is ``[documents + 1]``; ``bytes`` is ``[documents]``, the UTF-8 bytes of the text
    (for images: the number of pixels).
    """

    ids: NDArray[np.integer[Any]]
    offsets: NDArray[np.int64]
    bytes: NDArray[np.int64]
    names_file: Path

    @cached_property
    def names(self) -> list[str]:
        with self.names_file.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]


class Dataset:
    """The documents of a folder made by ``fathom data prepare``, or of the bundled corpus.

    Attributes:
        domains: names, in a fixed order.
        fingerprint: identifies the ids and the tokenizer; a run records it.
        statistics: what was counted when the folder was made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = _read_meta(folder)
        self.tokenizer = Tokenizer.load(folder / "tokenizer.json")
        self.vocab_size = self.tokenizer.vocab_size
        self.domains: list[str] = [domain["name"] for domain in meta["domains"]]
        counted = {domain["name"]: domain for domain in meta["domains"]}
        self.statistics: dict[str, Any] = {"domains": counted, **meta["statistics"]}
        self.fingerprint: str = meta["fingerprint"]
        self._kinds: dict[str, Kind] = {d["name"]: d["kind"] for d in meta["domains"]}
        self._shards = {
            (split, domain): _open_shard(folder / split, domain, np.dtype(meta["dtype"]))
            for split in SPLITS
            for domain in self.domains
        }

    def kind(self, domain: str) -> Kind:
        """``"text"``: losses are bits per byte; ``"symbols"``: bits per symbol."""
        return self._kinds[domain]

    def shard(self, split: Split, domain: str) -> Shard:
        """All documents of a domain in one split."""
        return self._shards[split, domain]

    def documents(self, split: Split, domain: str) -> int:
        """Number of documents."""
        return len(self.shard(split, domain).bytes)

    def tokens(self, split: Split, domain: str) -> int:
        """Number of ids, the special ones around each document included."""
        return int(self.shard(split, domain).offsets[-1])

    def document(self, split: Split, domain: str, index: int) -> NDArray[np.integer[Any]]:
        """Ids of one document: BOS, text, EOS; an image: BEGIN, pixels, END."""
        shard = self.shard(split, domain)
        return shard.ids[shard.offsets[index] : shard.offsets[index + 1]]

    def document_bytes(self, split: Split, domain: str) -> NDArray[np.int64]:
        """UTF-8 bytes of each document's text; an image: its pixels."""
        return self.shard(split, domain).bytes

    def document_names(self, split: Split, domain: str) -> list[str]:
        """The id each document was given when the corpus was prepared."""
        return self.shard(split, domain).names

    def weights(self, cfg: DataConfig) -> dict[str, float]:
        """Share of the tokens drawn for each domain, adding up to 1.

        Raises:
            ValueError: ``cfg.weights`` names a domain that this dataset does not have.
        """
        for domain in cfg.weights:
            if domain not in self.domains:
                near = difflib.get_close_matches(domain, self.domains, 1, 0.0)[0]
                raise ValueError(
                    f"data.weights.{domain}: no such domain; did you mean {near!r}? "
                    f"This dataset has {', '.join(self.domains)}"
                )
        by_size = {domain: float(self.tokens("train", domain)) for domain in self.domains}
        given = cfg.weights or by_size
        total = sum(given.values())
        return {domain: given.get(domain, 0.0) / total for domain in self.domains}


def open_dataset(cfg: DataConfig) -> Dataset:
    """Open what ``cfg.source`` names, and check that ``cfg.weights`` fits it.

    Raises:
        ValueError: not a prepared folder, a damaged one, or a configuration that does not fit it.
    """
    if cfg.source == "bundled":
        dataset = Dataset(bundled_folder(cfg.tokenizer))
    else:
        default = DataConfig.__dataclass_fields__["tokenizer"].default
        if cfg.tokenizer != default:
            raise ValueError(
                f"data.tokenizer={cfg.tokenizer} is for the bundled corpus, but data.source is "
                f"{cfg.source}, which brings its own: leave data.tokenizer out"
            )
        dataset = Dataset(Path(cfg.source))
    dataset.weights(cfg)
    return dataset


def _read_meta(folder: Path) -> dict[str, Any]:
    if not (folder / "meta.json").is_file():
        raise ValueError(
            f"data.source {folder} is not a prepared corpus (no meta.json in it): make one with "
            f"fathom data prepare SOURCE --out {folder}"
        )
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta["format"] != FORMAT:
            raise ValueError(
                f"{folder} has format {meta['format']}, but this version reads {FORMAT}: "
                "prepare it again"
            )
        for domain in meta["domains"]:
            check_domain_name(domain["name"])
        return meta
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{folder / 'meta.json'} is damaged: prepare the corpus again") from None


def _open_shard(folder: Path, domain: str, dtype: np.dtype) -> Shard:
    """Map the ids and check them against the index, so that a cut file is found at once."""
    file = folder / f"{domain}.bin"
    try:
        with np.load(folder / f"{domain}.npz", allow_pickle=False) as index:
            offsets, n_bytes = index["offsets"], index["bytes"]
        ids = np.memmap(file, dtype, "r")
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{file} or its index cannot be read: {error}") from None
    if len(ids) != offsets[-1] or len(offsets) != len(n_bytes) + 1 or (np.diff(offsets) < 2).any():
        raise ValueError(f"{file} does not fit its index: it is damaged, prepare the corpus again")
    return Shard(ids, offsets, n_bytes, folder / f"{domain}.names.jsonl")
