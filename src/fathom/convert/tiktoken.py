"""tiktoken's vocabularies: lines of a token in base64 and its rank.

The file says neither where text is cut nor what the special tokens are called. Both are known for
the two families that come with such a file: Moonshot's ``tiktoken.model`` (Kimi-K2, Moonlight),
whose ``tokenizer_config.json`` names special tokens, and Meta's ``tokenizer.model`` (Llama 3).

Ranks decide as merges do (github.com/openai/tiktoken, "BPE"); a text between two cuts that is a
token is that token.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from fathom.convert.run_folder import CheckpointError
from fathom.convert.tokenizer_json import (
    MAX_TOKEN_CHARACTERS,
    Vocabulary,
    added_token,
    byte_level,
    merges_of,
    split,
)
from fathom.data.pieces import byte_letters

MAX_BYTES = 16 * 2**20  # Kimi's file has 2.8 MB
MAX_RANKS = 2**19
RESERVED = 256  # ids for special tokens after the ranks, in both families
LLAMA3_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_CUTS = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NAMES = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    5: "step_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}
LLAMA3_ENDS = (1, 8, 9)  # of a text, of a message to a tool, of a turn


def is_tiktoken(content: bytes) -> bool:
    """Whether a file begins as one of tiktoken's: base64 and the rank 0."""
    token, _, rank = content[:1024].partition(b"\n")[0].partition(b" ")
    return rank.strip() == b"0" and token.isascii()


def read_llama3(content: bytes, source: str) -> Vocabulary:
    """Meta's ``tokenizer.model`` of Llama 3.

    Raises:
        CheckpointError: damaged.
    """
    ranks = read_ranks(content, source)
    unused = [at for at in range(RESERVED) if at not in LLAMA3_NAMES]
    names = {at: f"reserved_special_token_{n}" for n, at in enumerate(unused)} | LLAMA3_NAMES
    special = [(f"<|{names[at]}|>", True) for at in range(RESERVED)]
    return Vocabulary(
        _described(ranks, special, LLAMA3_CUTS, source),
        bos=special[0][0],
        eos=special[1][0],
        add_bos=True,
        ends=tuple(len(ranks) + at for at in LLAMA3_ENDS),
    )


def read_moonshot(content: bytes, config: Mapping[str, Any], source: str) -> Vocabulary:
    """Moonshot's ``tiktoken.model``; special tokens without a name are called by their id.

    Args:
        config: its ``tokenizer_config.json``.

    Raises:
        CheckpointError: damaged, or of another family, whose cuts are not known.
    """
    if config.get("tokenizer_class") != "TikTokenTokenizer":
        raise CheckpointError(
            f"{source} cannot be used: where Moonshot's tokenizer cuts text is known, and its "
            f"config names {config.get('tokenizer_class')!r:.80}"
        )
    ranks = read_ranks(content, source)
    said = config.get("added_tokens_decoder")
    said = said if isinstance(said, dict) else {}
    special = []
    for token_id in range(len(ranks), len(ranks) + RESERVED):
        token = said.get(str(token_id), {"content": f"<|reserved_token_{token_id}|>"})
        name = token.get("content") if isinstance(token, dict) else None
        if not isinstance(name, str) or not 0 < len(name) <= MAX_TOKEN_CHARACTERS:
            raise CheckpointError(f"{source} cannot be used: its token {token_id} has no name")
        special.append((name, token.get("special") is not False))
    described = _described(ranks, special, KIMI_CUTS, source)
    return Vocabulary(described, bos="[BOS]", eos="[EOS]", add_bos=False)


def read_ranks(content: bytes, source: str) -> list[bytes]:
    """The tokens in the order of their ranks.

    Raises:
        CheckpointError: a line that is none, ranks with gaps, a token twice, a byte that is none.
    """
    lines = content.split()
    tokens: list[bytes] = []
    if len(content) > MAX_BYTES or len(lines) > 2 * MAX_RANKS:
        raise CheckpointError(f"{source} is larger than vocabularies are")
    for encoded, rank in zip(lines[::2], lines[1::2], strict=False):
        try:
            token = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            token = b""
        if rank != b"%d" % len(tokens) or not 0 < len(token) <= MAX_TOKEN_CHARACTERS:
            raise CheckpointError(f"{source} is damaged at the token of rank {len(tokens)}")
        tokens.append(token)
    known = set(tokens)
    if len(lines) % 2 or len(known) < len(tokens) or not known.issuperset(map(_byte, range(256))):
        raise CheckpointError(f"{source} is damaged: it does not hold each byte and token once")
    return tokens


def _byte(value: int) -> bytes:
    return bytes([value])


def _described(
    ranks: Sequence[bytes], special: Sequence[tuple[str, bool]], cut: str, source: str
) -> dict[str, Any]:
    """``tokenizer.json``; ``special`` are the names behind the ranks, and whether each is text."""
    letters = {byte: letter for letter, byte in byte_letters().items()}
    tokens = ["".join(map(letters.__getitem__, token)) for token in ranks]
    vocab = {token: rank for rank, token in enumerate(tokens)}
    added = [
        added_token(at, name, special=hidden)
        for at, (name, hidden) in enumerate(special, len(ranks))
    ]
    if len(vocab | {token["content"]: 0 for token in added}) < len(ranks) + len(special):
        raise CheckpointError(f"{source} cannot be used: two of its tokens have one name")
    merges = list(merges_of(tokens, vocab))
    return byte_level(vocab, merges, added, split(cut), ignore_merges=True)
