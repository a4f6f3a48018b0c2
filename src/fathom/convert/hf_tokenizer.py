"""The tokenizer of a Hugging Face folder: ``tokenizer.json``, and what its neighbour says of it."""

from pathlib import Path
from typing import Any

from fathom.convert.files import exists, read_bytes, read_object
from fathom.convert.run_folder import TOKENIZER, CheckpointError
from fathom.data.tokenizer import MAX_FILE_BYTES, Tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_CONFIG_BYTES = 16 * 2**20  # some describe each of a thousand added tokens


def read_hf_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer, its begin- and end-of-text tokens, and whether a text begins with the first.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    if not exists(folder, TOKENIZER):
        raise CheckpointError(
            f"{folder} has no {TOKENIZER}: other forms of vocabulary are not read"
        )
    content = read_bytes(folder, TOKENIZER, MAX_FILE_BYTES)
    said: dict[str, Any] = {}
    if exists(folder, TOKENIZER_CONFIG):
        said = read_object(folder, TOKENIZER_CONFIG, MAX_CONFIG_BYTES)
    add_bos = said.get("add_bos_token")
    try:
        return Tokenizer(
            content,
            str(folder / TOKENIZER),
            bos=_name(said.get("bos_token")),
            eos=_name(said.get("eos_token")),
            add_bos=add_bos if isinstance(add_bos, bool) else None,
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _name(token: object) -> str | None:
    """The name of a token, written as a text or as an object with a ``content``."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None
