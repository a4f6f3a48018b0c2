"""The tokenizer of a GGUF file as the files of a Hugging Face folder.

GGUF stores the vocabulary and merges of byte-level BPE ("gpt2"), and how text is cut before by a
name alone (``tokenizer.ggml.pre``), which is looked up here: without one of those names a file has
no tokenizer here, for text cut otherwise would get other ids. Of SentencePiece BPE ("llama") it
stores the pieces and their scores.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fathom.convert import sentencepiece
from fathom.convert.hf_tokenizer import as_files
from fathom.convert.run_folder import TOKENIZER, CheckpointError
from fathom.convert.sentencepiece import CONTROL, NORMAL, UNUSED, Piece
from fathom.convert.tiktoken import LLAMA3_CUTS
from fathom.convert.tokenizer_json import BYTES, added_token, byte_level, split, to_json

PREFIX = "tokenizer.ggml."
DIGITS = {"type": "Digits", "individual_digits": True}
CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTES],
    "smollm": [DIGITS, BYTES],
    "llama-bpe": split(LLAMA3_CUTS),
}


def tokenizer_files(fields: Mapping[str, Any], source: str) -> dict[str, bytes]:
    """``tokenizer.json``, ``tokenizer_config.json``, the chat template; nothing of another kind.

    Raises:
        CheckpointError: fields that contradict each other.
    """
    said = {
        name.removeprefix(PREFIX): value
        for name, value in fields.items()
        if name.startswith(PREFIX)
    }
    files: dict[str, bytes] = {}
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    model, cut = said.get("model"), said.get("pre")
    ends = [i for key in ("eos_token_id", "eot_token_id") if (i := said.get(key)) is not None]
    if model == "llama" or (model == "gpt2" and isinstance(cut, str) and cut in CUTS):
        make = _sentencepiece if model == "llama" else _byte_level
        files |= make(said, _texts(said, "tokens", source), source)
        files["generation_config.json"] = to_json({"eos_token_id": ends or None})
    return files


def _byte_level(said: Mapping[str, Any], tokens: Sequence[str], source: str) -> dict[str, bytes]:
    cut = said["pre"]
    vocab = {token: i for i, token in enumerate(tokens)}
    kinds = said.get("token_type", [NORMAL] * len(tokens))
    if len(vocab) < len(tokens) or not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError(f"{source} cannot be used: its tokens are damaged, or not of a kind")
    merges = [merge.split(" ", 1) for merge in _texts(said, "merges", source)]
    added = [
        added_token(i, token, special=kind in (CONTROL, UNUSED))
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != NORMAL
    ]
    described = byte_level(vocab, merges, added, CUTS[cut], ignore_merges=cut == "llama-bpe")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": said.get("add_bos_token", cut == "llama-bpe") is True,
    }
    for key in ("bos", "eos"):
        token_id = said.get(f"{key}_token_id")
        if type(token_id) is int and token_id < len(tokens):
            config[f"{key}_token"] = tokens[token_id]
    return {TOKENIZER: to_json(described), "tokenizer_config.json": to_json(config)}


def _sentencepiece(said: Mapping[str, Any], tokens: Sequence[str], source: str) -> dict[str, bytes]:
    scores, kinds = said.get("scores"), said.get("token_type")
    for each in (scores, kinds):
        if not isinstance(each, list) or len(each) != len(tokens):
            raise CheckpointError(f"{source} cannot be used: not every token has a score and kind")
    assert isinstance(scores, list)
    assert isinstance(kinds, list)
    found = sentencepiece.vocabulary(
        [Piece(*piece) for piece in zip(tokens, scores, kinds, strict=True)],
        said.get("bos_token_id", 1),
        said.get("eos_token_id", 2),
        source,
        space_first=said.get("add_space_prefix", True) is True,
    )
    return as_files(found, {"add_bos_token": said.get("add_bos_token", True) is True}, {})


def _texts(said: Mapping[str, Any], name: str, source: str) -> list[str]:
    found = said.get(name)
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise CheckpointError(f"{source} cannot be used: {PREFIX}{name} is no list of texts")
    return found
