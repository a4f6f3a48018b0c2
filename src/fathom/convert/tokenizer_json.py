"""BPE vocabularies of other forms as the ``tokenizer.json`` that the library ``tokenizers`` reads.

tiktoken and SentencePiece both join the pair whose whole stands first in the vocabulary's order.
``tokenizers`` wants the pairs themselves, so every way of cutting a token in two of the vocabulary
is a merge, in the order of the wholes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fathom.data.pieces import SPACE

MAX_TOKEN_CHARACTERS = 256
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary that came in another form.

    Args:
        described: the content of its ``tokenizer.json``.
        bos, eos: names of the tokens that begin and end a text.
        add_bos: whether a prompt begins with ``bos``, where nothing else says so.
        ends: the ids that end a text, if there are more than ``eos``.
    """

    described: dict[str, Any]
    bos: str
    eos: str
    add_bos: bool
    ends: tuple[int, ...] = ()


def split(*patterns: str) -> list[dict[str, Any]]:
    """A pre-tokenizer that cuts text by regular expressions, for byte-level vocabularies."""
    cut = {"type": "Split", "behavior": "Isolated", "invert": False}
    cuts = [{**cut, "pattern": {"Regex": pattern}} for pattern in patterns]
    return [*cuts, {**BYTES, "use_regex": False}]


def byte_level(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    added: Iterable[dict[str, Any]],
    cut: Sequence[dict[str, Any]],
    *,
    ignore_merges: bool,
) -> dict[str, Any]:
    """The content of ``tokenizer.json`` for byte-level BPE.

    Args:
        added: tokens that are no result of merges, by :func:`added_token`.
        cut: the steps of the pre-tokenizer.
        ignore_merges: a word that is a token is that token, however merges would build it.
    """
    return {
        **_described(vocab, merges, added, ignore_merges=ignore_merges),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(cut)},
        "decoder": BYTES,
    }


def sentence_piece(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    added: Iterable[dict[str, Any]],
    *,
    unknown: str,
    space_first: bool,
) -> dict[str, Any]:
    """The same for SentencePiece BPE with byte fallback.

    Args:
        unknown: its token for what it cannot write, which byte fallback never needs.
        space_first: a space is set before every text.
    """
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    first = [{"type": "Prepend", "prepend": SPACE}] if space_first else []
    back = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    last = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space_first else []
    described = _described(vocab, merges, added, unk_token=unknown, fuse_unk=True)
    described["model"]["byte_fallback"] = True
    return {
        **described,
        "normalizer": {"type": "Sequence", "normalizers": [*first, spaces]},
        "decoder": {"type": "Sequence", "decoders": [*back, *last]},
    }


def _described(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    added: Iterable[dict[str, Any]],
    **model: Any,
) -> dict[str, Any]:
    plain = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "model": {**plain, **model, "vocab": dict(vocab), "merges": list(merges)},
    }


def added_token(token_id: int, name: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": name, **flags, "special": special}


def merges_of(tokens: Sequence[str], vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Every way to cut each of the tokens, given in their order, into two of the vocabulary."""
    for token in tokens:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
        yield from sorted(known, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))


def begun_with(token: str, token_id: int) -> dict[str, Any]:
    """The post-processor that sets a token before every text."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": at}} for at, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [special, text[0]],
        "pair": [special, text[0], {"SpecialToken": {"id": token, "type_id": 1}}, text[1]],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def to_json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode()
