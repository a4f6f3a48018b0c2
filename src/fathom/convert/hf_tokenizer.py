"""The tokenizer of a Hugging Face checkpoint: ``tokenizer.json``, and what its neighbour says."""

from collections.abc import Mapping
from typing import Any

from fathom.convert.files import parse_object
from fathom.convert.run_folder import TOKENIZER, CheckpointError
from fathom.data.tokenizer import MAX_FILE_BYTES, Tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_CONFIG_BYTES = 16 * 2**20  # some describe each of a thousand added tokens


def read_hf_tokenizer(files: Mapping[str, bytes], source: str) -> Tokenizer:
    """The tokenizer, its begin- and end-of-text tokens, and whether a text begins with the first.

    Args:
        files: name to content.
        source: where they lie, for messages.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    content = files.get(TOKENIZER)
    if content is None or len(content) > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{source} has no {TOKENIZER} of at most {MAX_FILE_BYTES // 2**20} MB: other forms of "
            "vocabulary are not read"
        )
    said = object_in(files, TOKENIZER_CONFIG, source)
    add_bos = said.get("add_bos_token")
    try:
        return Tokenizer(
            content,
            f"{source}/{TOKENIZER}",
            bos=_name(said.get("bos_token")),
            eos=_name(said.get("eos_token")),
            add_bos=add_bos if isinstance(add_bos, bool) else None,
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def object_in(files: Mapping[str, bytes], name: str, source: str) -> dict[str, Any]:
    """The JSON object of one of the files; empty where there is none.

    Raises:
        CheckpointError: it is no JSON object, or too large.
    """
    if len(files.get(name, b"")) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{source}/{name} is larger than {MAX_CONFIG_BYTES // 2**20} MB")
    return parse_object(files[name], f"{source}/{name}") if name in files else {}


def _name(token: object) -> str | None:
    """The name of a token, written as a text or as an object with a ``content``."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None
