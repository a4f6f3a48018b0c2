"""SentencePiece's ``tokenizer.model``: BPE with byte fallback, as Llama 2 has it.

The file is a protobuf message (github.com/google/sentencepiece, ``sentencepiece_model.proto``). Of
it only the few fields that decide are read, by a reader of the wire format that makes nothing but
numbers and slices. A model that would change the text before it is cut is refused by name.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fathom.convert.run_folder import CheckpointError
from fathom.convert.tokenizer_json import (
    MAX_TOKEN_CHARACTERS,
    Vocabulary,
    added_token,
    merges_of,
    sentence_piece,
)
from fathom.data.pieces import fallback

MAX_BYTES = 16 * 2**20
MAX_PIECES = 2**19
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds; GGUF's too
BPE = 2  # TrainerSpec.ModelType
Value = int | bytes


@dataclass(frozen=True)
class Piece:
    """A token: of two ways to join, the one to the higher ``score`` is taken."""

    name: str
    score: float
    kind: int


def read_sentencepiece(content: bytes, source: str) -> Vocabulary:
    """The vocabulary of a ``tokenizer.model``.

    Raises:
        CheckpointError: damaged, no BPE with byte fallback, or with a normalisation of its own.
    """
    if len(content) > MAX_BYTES:
        raise CheckpointError(f"{source} is larger than vocabularies are")
    try:
        pieces, trainer, normalizer = _message(content)
    except (ValueError, IndexError, struct.error):
        raise CheckpointError(f"{source} is neither tiktoken's nor SentencePiece's") from None
    for wrong, reason in (
        (trainer.get(3, 1) != BPE or not trainer.get(35, 0), "it is no BPE with byte fallback"),
        (trainer.get(24, 0), "spaces end its words"),
        (normalizer.get(2, b"") or normalizer.get(6, b""), "it replaces characters"),
        (normalizer.get(4, 1), "it removes spaces"),
        (not normalizer.get(5, 1), "it does not write spaces as U+2581"),
        (any(p.kind == USER_DEFINED for p in pieces), "it has tokens that its user defined"),
    ):
        if wrong:
            raise CheckpointError(f"{source} cannot be used: {reason}")
    begin, end = trainer.get(41, 1), trainer.get(42, 2)
    return vocabulary(pieces, begin, end, source, space_first=bool(normalizer.get(3, 1)))


def vocabulary(
    pieces: Sequence[Piece], begin: Value, end: Value, source: str, *, space_first: bool
) -> Vocabulary:
    """A vocabulary of these pieces, in the order of their ids.

    Args:
        begin, end: ids of the tokens around a text.
        space_first: a space is set before every text.

    Raises:
        CheckpointError: pieces that contradict each other.
    """
    vocab = {piece.name: i for i, piece in enumerate(pieces)}
    unknown = [piece.name for piece in pieces if piece.kind == UNKNOWN]
    ids = range(len(pieces))
    whole = vocab.keys() >= set(map(fallback, range(256))) and len(unknown) == 1
    if not whole or len(vocab) < len(pieces):
        raise CheckpointError(f"{source} is damaged: it does not hold each byte and token once")
    if begin not in ids or end not in ids:
        raise CheckpointError(f"{source} cannot be used: no token begins a text, or none ends one")
    if "" in vocab or max(map(len, vocab)) > MAX_TOKEN_CHARACTERS:
        raise CheckpointError(f"{source} is damaged: it holds a token that is empty or endless")
    ordered = sorted((p for p in pieces if p.kind == NORMAL), key=lambda piece: -piece.score)
    known = {piece.name: vocab[piece.name] for piece in pieces if piece.kind == NORMAL}
    described = sentence_piece(
        vocab,
        list(merges_of([piece.name for piece in ordered], known)),
        [
            added_token(i, piece.name, special=piece.kind != USER_DEFINED)
            for i, piece in enumerate(pieces)
            if piece.kind not in (NORMAL, BYTE)
        ],
        unknown=unknown[0],
        space_first=space_first,
    )
    assert isinstance(begin, int)
    assert isinstance(end, int)
    return Vocabulary(described, bos=pieces[begin].name, eos=pieces[end].name, add_bos=True)


def _message(content: bytes) -> tuple[list[Piece], dict[int, Value], dict[int, Value]]:
    """ModelProto: its pieces, TrainerSpec and NormalizerSpec.

    Raises:
        ValueError, IndexError, struct.error: it is none.
    """
    pieces, specs = [], {2: {}, 3: {}}
    for number, value in fields(content):
        if number == 1:
            pieces.append(_piece(dict(fields(value))))
        elif number in specs:
            specs[number] = dict(fields(value))
        if len(pieces) > MAX_PIECES:
            raise ValueError
    return pieces, specs[2], specs[3]


def _piece(said: dict[int, Value]) -> Piece:
    name, score, kind = said.get(1), said.get(2, bytes(4)), said.get(3, NORMAL)
    if not isinstance(name, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError
    return Piece(name.decode(), struct.unpack("<f", score)[0], kind)


def fields(message: Value) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a protobuf message: an int, or its bytes.

    Raises:
        ValueError, IndexError: it is no message.
    """
    if not isinstance(message, bytes):
        raise ValueError
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(key & 7, 0)
        if key & 7 == 2:
            size, at = _varint(message, at)
        if size > len(message) - at or key & 7 not in (1, 2, 5):
            raise ValueError
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    number = 0
    for place in range(10):
        number |= (message[at] & 127) << (7 * place)
        at += 1
        if message[at - 1] < 128:
            return number, at
    raise ValueError
