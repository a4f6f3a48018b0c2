"""The bytes that each token of a vocabulary stands for, in the two ways of writing them.

Byte-level BPE (GPT-2) writes every byte as a letter of its own alphabet. SentencePiece with byte
fallback (Llama 2) writes text as it is, a space as U+2581, and a byte that is in no piece as
``<0xAB>``; it may set a space before a text. Of any other vocabulary the bytes are not known.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SPACE = "\u2581"


@dataclass(frozen=True)
class Spelling:
    """How a vocabulary writes its tokens.

    Args:
        to_bytes: of a token's name; ``KeyError`` where it cannot be one.
        extra_bytes: how many bytes of an encoded text were not in it: the space set before it.
    """

    to_bytes: Callable[[str], bytes]
    extra_bytes: int = 0


def spelling(described: Mapping[str, Any]) -> Spelling:
    """How the content of a ``tokenizer.json`` writes its tokens.

    Raises:
        ValueError: in a way whose bytes are not known.
    """
    model = described["model"]
    if model.get("type", "BPE") == "BPE":
        if {step.get("type") for step in steps(described, "decoder")} == {"ByteLevel"}:
            letters = byte_letters()
            return Spelling(lambda name: bytes([letters[letter] for letter in name]))
        fallen = {fallback(byte): bytes([byte]) for byte in range(256)}
        begins = [
            _begins(step) for p in ("normalizer", "pre_tokenizer") for step in steps(described, p)
        ]
        known = model.get("byte_fallback") is True and fallen.keys() <= model["vocab"].keys()
        if known and None not in begins and begins.count(True) <= 1:
            return Spelling(
                lambda name: fallen.get(name) or name.replace(SPACE, " ").encode(),
                extra_bytes=begins.count(True),
            )
    raise ValueError(
        "it is neither byte-level BPE nor BPE with byte fallback, and bits per byte needs to know "
        "the bytes of every token; train one by leaving the tokenizer out"
    )


def fallback(byte: int) -> str:
    """SentencePiece's name for a byte that no piece holds."""
    return f"<0x{byte:02X}>"


def byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte stands for itself, others for letters from U+0100 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + n): b for n, b in enumerate(moved)}


def steps(described: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as the list of its steps."""
    found: dict[str, Any] | None = described.get(part)
    if found is None:
        return []
    if found.get("type") != "Sequence":
        return [found]
    return found.get("normalizers") or found.get("pretokenizers") or found.get("decoders") or []


def _begins(step: Mapping[str, Any]) -> bool | None:
    """Whether a step sets a space before a text; None: it may change the text otherwise."""
    match step:
        case {"type": "Prepend", "prepend": "\u2581"}:
            return True
        case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
            return False
        case {"type": "Metaspace", "replacement": "\u2581"}:
            return step.get("prepend_scheme", "always") != "never" and step.get(
                "add_prefix_space", True
            )
    return None
