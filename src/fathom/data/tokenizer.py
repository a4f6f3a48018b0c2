"""BPE of bytes: every text is encodable, and every token stands for a known number of bytes.

Bits per byte needs that number exactly, so only vocabularies whose bytes are known are accepted
(:mod:`fathom.data.pieces`); ours are byte-level. A ``tokenizer.json`` may come from a stranger: the
Rust library is called inside ``guarded``, because what it raises on bad input can be a panic, which
is no ``Exception``.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from fathom.data.images import BEGIN, GREYS
from fathom.data.pieces import Spelling, spelling, steps

BOS, EOS = "<|bos|>", "<|eos|>"
# Ours first, then those of Llama 3, DeepSeek, Llama-like and GPT-2-like vocabularies.
BOS_NAMES = (BOS, "<|begin_of_text|>", "<\uff5cbegin▁of▁sentence\uff5c>", "<s>", "<|endoftext|>")
EOS_NAMES = (EOS, "<|end_of_text|>", "<\uff5cend▁of▁sentence\uff5c>", "</s>", "<|endoftext|>")
MAX_FILE_BYTES = 64 * 2**20
MAX_VOCAB = 2**22


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turn whatever ``tokenizers`` raises into a ``ValueError`` of one sentence."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # PanicException is not an Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{what}: {reason[:200]}") from None


class Tokenizer:
    """Text to ids and back, with the number of UTF-8 bytes each id stands for.

    Attributes:
        vocab_size: number of ids, image ids included.
        text_vocab_size: number of ids before the first image id.
        bos_id, eos_id: what stands before and after every document.
        begin_ids: what stands before a prompt: ``bos_id``, or nothing for a model that was trained
            without.
        token_bytes: ``[vocab_size]`` int32, UTF-8 bytes of a token; 0 for special and image ids.
        is_symbol: ``[vocab_size]`` bool, True for the grey levels of images.
        extra_bytes: of the first token of a text, those that are not the text's: 1 where the
            vocabulary sets a space before every text (SentencePiece), else 0.
    """

    def __init__(
        self,
        content: bytes,
        source: str = "tokenizer.json",
        *,
        bos: str | None = None,
        eos: str | None = None,
        add_bos: bool | None = None,
    ) -> None:
        """Read the content of a ``tokenizer.json``; ``source`` names it in errors.

        Args:
            bos, eos: names of the tokens, where a file beside it says them; None: known names.
            add_bos: whether a prompt begins with ``bos``; None: as the content says.

        Raises:
            ValueError: damaged, of tokens whose bytes are not known, or without begin-of-text or
                end-of-text token.
        """
        with guarded(f"{source} is not a tokenizer.json that can be used"):
            described = json.loads(content)
            model, added = described["model"], described.get("added_tokens", [])
            vocab = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
            special = {token["content"]: bool(token.get("special")) for token in added}
            ids = [0, *map(int, vocab.values())]
            written = spelling(described)
        if min(ids) < 0 or max(ids) >= MAX_VOCAB:  # before the library makes a table of them
            raise ValueError(f"{source} has ids outside 0..{MAX_VOCAB - 1}")
        with guarded(f"{source} is not a tokenizer.json that can be used"):
            self._backend = _backend(content.decode())
            self._inner = _inner_backend(described) or self._backend
        self.vocab_size = max(ids) + 1
        self._pieces = _pieces(vocab, special, written, self.vocab_size, source)
        self.extra_bytes = written.extra_bytes
        self._ids = vocab
        self._names = {token_id: name for name, token_id in vocab.items()}
        self.bos_id = _first_known([bos] if bos else BOS_NAMES, vocab, source)
        self.eos_id = _first_known([eos] if eos else EOS_NAMES, vocab, source)
        if add_bos is None:
            with guarded(f"{source} is not a tokenizer.json that can be used"):
                begin = self._backend.encode("", add_special_tokens=True).ids
            add_bos = self.bos_id in begin or BOS in vocab  # ours need no rule to begin with it
        self.begin_ids = [self.bos_id] if add_bos else []
        names = sorted((name for name in special if special[name] and name), key=len, reverse=True)
        self._special_name = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self.text_vocab_size = vocab.get(BEGIN, self.vocab_size)
        self.token_bytes = np.array([len(piece) for piece in self._pieces], np.int32)
        self.is_symbol = np.zeros(self.vocab_size, np.bool_)
        self.is_symbol[[vocab[grey] for grey in GREYS if grey in vocab]] = True

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a ``tokenizer.json`` of at most 64 MB; ``ValueError`` if it cannot be used."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"tokenizer {path} is not a file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"tokenizer {path} is larger than {MAX_FILE_BYTES // 2**20} MB")
        return cls(path.read_bytes(), str(path))

    def save(self, path: str | Path) -> None:
        """Write a ``tokenizer.json`` that other libraries read too."""
        Path(path).write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of ``tokenizer.json``, equal for equal tokenizers."""
        return self._backend.to_str().encode()

    def fingerprint(self) -> str:
        """A hash of what every id stands for, the same under every version of the library."""
        digest = hashlib.sha256(f"{self.bos_id} {self.eos_id}".encode())
        for token_id, piece in enumerate(self._pieces):
            name = self._names.get(token_id, "") if not piece else piece.hex()
            digest.update(f" {name}".encode())
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; no special token is added or recognised."""
        return self._encode(text)

    def _encode(self, text: str, *, inner: bool = False) -> list[int]:
        """``inner``: the text stands behind a special token."""
        backend = self._inner if inner else self._backend
        with guarded("the text cannot be encoded"):
            return backend.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str, literal: str = "\0") -> list[int]:
        """Ids of a text in which names of special tokens mean the tokens, as in a chat template.

        Args:
            literal: a character that says that the name behind it is plain text; it is left out.
        """
        ids: list[int] = []
        start = 0
        for match in self._special_name.finditer(text):
            if text[max(match.start() - 1, 0)] == literal:
                continue
            ids += self._encode(text[start : match.start()].replace(literal, ""), inner=start > 0)
            ids.append(self._ids[match[0]])
            start = match.end()
        return ids + self._encode(text[start:].replace(literal, ""), inner=start > 0)

    def mark_literal(self, text: str, literal: str = "\0") -> str:
        """The text with ``literal`` before each name of a special token, and nowhere else."""
        return self._special_name.sub(lambda m: literal + m[0], text.replace(literal, ""))

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, on several threads."""
        with guarded("a text cannot be encoded"):
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, without special and image ids; a cut character becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of a text's ``ids``: exactly the UTF-8 of the text they were encoded from."""
        pieces = self._pieces
        joined = b"".join([pieces[i] for i in ids])
        return joined.removeprefix(b" ") if self.extra_bytes else joined

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token inside a text; none for special and image ids."""
        return self._pieces[token_id]

    def predicted_bytes(
        self, inputs: NDArray[np.int64], targets: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Bytes of the text that each target adds, where ``inputs`` are the ids before them."""
        begins = self.extra_bytes * (inputs == self.bos_id)
        return np.maximum(self.token_bytes[targets] - begins, 0).astype(np.int64)

    def token_id(self, name: str) -> int:
        """The id of a special token; ``ValueError`` where the vocabulary has none of that name."""
        token_id = self._backend.token_to_id(name)
        if token_id is None:
            raise ValueError(f"this tokenizer has no token {name}")
        return token_id

    def token_name(self, token_id: int) -> str:
        """How the vocabulary writes this id, for special and image ids too."""
        return self._names[token_id]

    def decode_stream(self) -> "DecodeStream":
        """A decoder to which ids are given one at a time."""
        return DecodeStream(self)


class DecodeStream:
    """Text of ids that come one by one: a character is given out once its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The text that became certain with this id, often one word, sometimes nothing."""
        return self._decoder.decode(self._tokenizer.piece(token_id))

    def finish(self) -> str:
        """What is left: nothing, or U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, extra_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Train byte-level BPE; all 256 bytes, BOS and EOS are in it, so no text is unknown.

    Args:
        texts: training documents only, in an order that does not change from run to run.
        vocab_size: ids in all; fewer come out when the texts hold fewer repeated pairs.
        extra_tokens: special tokens (of images) that take the last ids.
    """
    text_size = vocab_size - len(extra_tokens)
    if text_size < 258 or vocab_size > MAX_VOCAB:
        raise ValueError(
            f"vocab_size must be {258 + len(extra_tokens)} (256 bytes and the special tokens) "
            f"to {MAX_VOCAB}, got {vocab_size}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=text_size,
        special_tokens=[_special(BOS), _special(EOS)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with guarded("the tokenizer cannot be trained"):
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens([_special(token) for token in extra_tokens])
    return Tokenizer(backend.to_str().encode())


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def _backend(content: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(content)
    backend.encode_special_tokens = True  # "<|eos|>" inside a text is plain text
    backend.no_truncation()
    backend.no_padding()
    return backend


def _inner_backend(described: dict[str, Any]) -> tokenizers.Tokenizer | None:
    """For texts behind special tokens, where a space is set before the first text alone."""
    first = [s for s in steps(described, "pre_tokenizer") if s.get("prepend_scheme") == "first"]
    for step in first:
        step["prepend_scheme"] = "never"
    return _backend(json.dumps(described)) if first else None


def _pieces(
    vocab: dict[str, int], special: dict[str, bool], written: Spelling, size: int, source: str
) -> list[bytes]:
    """The bytes of every id; none for special tokens and gaps."""
    pieces = [b""] * size
    for name, i in vocab.items():
        if name in special:
            pieces[i] = b"" if special[name] else name.encode()
            continue
        try:
            pieces[i] = written.to_bytes(name)
        except KeyError:
            raise ValueError(
                f"{source}: token {name!r} is not written in byte-level letters"
            ) from None
    return pieces


def _first_known(names: Sequence[str], vocab: dict[str, int], source: str) -> int:
    for name in names:
        if name in vocab:
            return vocab[name]
    raise ValueError(f"{source} has none of the special tokens {', '.join(names)}")
