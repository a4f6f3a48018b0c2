"""The tokenizer of a checkpoint: ``tokenizer.json`` or another form, and what its neighbour says.

A vocabulary of another form (tiktoken's, SentencePiece's) is made into the ``tokenizer.json`` that
it would be, which is then read, and saved, as any other.
"""

from collections.abc import Mapping
from typing import Any

from fathom.convert.files import parse_object
from fathom.convert.run_folder import TOKENIZER, CheckpointError
from fathom.convert.sentencepiece import read_sentencepiece
from fathom.convert.tiktoken import is_tiktoken, read_llama3, read_moonshot
from fathom.convert.tokenizer_json import Vocabulary, begun_with, to_json
from fathom.data.tokenizer import MAX_FILE_BYTES, Tokenizer

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
MOONSHOT, MODEL = "tiktoken.model", "tokenizer.model"
MAX_CONFIG_BYTES = 16 * 2**20  # some describe each of a thousand added tokens


def read_hf_tokenizer(files: Mapping[str, bytes], source: str) -> Tokenizer:
    """The tokenizer, its begin- and end-of-text tokens, and whether a text begins with the first.

    Args:
        files: name to content.
        source: where they lie, for messages.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    files = {**files, **made_files(files, source)}
    content = files.get(TOKENIZER)
    if content is None or len(content) > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{source} has no {TOKENIZER} of at most {MAX_FILE_BYTES // 2**20} MB, {MOONSHOT} or "
            f"{MODEL}: other forms of vocabulary are not read"
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


def made_files(files: Mapping[str, bytes], source: str) -> dict[str, bytes]:
    """``tokenizer.json`` and its neighbours where the vocabulary came in another form; else none.

    Raises:
        CheckpointError: the vocabulary cannot be used.
    """
    if TOKENIZER in files:
        return {}
    config = object_in(files, TOKENIZER_CONFIG, source)
    if MOONSHOT in files:
        found = read_moonshot(files[MOONSHOT], config, f"{source}/{MOONSHOT}")
    elif MODEL in files:
        read = read_llama3 if is_tiktoken(files[MODEL]) else read_sentencepiece
        found = read(files[MODEL], f"{source}/{MODEL}")
    else:
        return {}
    return as_files(found, config, files)


def as_files(
    found: Vocabulary, config: Mapping[str, Any], files: Mapping[str, bytes]
) -> dict[str, bytes]:
    """A vocabulary as the files of a folder, which no code of the folder's is needed to read.

    Args:
        config: what its ``tokenizer_config.json`` says.
        files: what is there already.
    """
    said = {key: value for key, value in config.items() if key != "auto_map"}
    said["tokenizer_class"] = "PreTrainedTokenizerFast"
    bos, eos = (_name(said.get(f"{key}_token")) for key in ("bos", "eos"))
    said |= {"bos_token": bos or found.bos, "eos_token": eos or found.eos}
    described = found.described
    ids = {token["content"]: token["id"] for token in described["added_tokens"]}
    if said.setdefault("add_bos_token", found.add_bos) is True and said["bos_token"] in ids:
        begin = begun_with(said["bos_token"], ids[said["bos_token"]])
        described = {**described, "post_processor": begin}
    made = {TOKENIZER: to_json(described), TOKENIZER_CONFIG: to_json(said)}
    if found.ends and GENERATION_CONFIG not in files:
        made[GENERATION_CONFIG] = to_json({"eos_token_id": found.ends})
    return made


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
