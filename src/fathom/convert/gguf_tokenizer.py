"""The tokenizer of a GGUF file as the files of a Hugging Face folder.

GGUF stores the vocabulary and merges of byte-level BPE ("gpt2"), and how text is cut before by a
name alone (``tokenizer.ggml.pre``), which is looked up here. Without one of those names a file has
no tokenizer here, for text cut otherwise would get other ids.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fathom.convert.run_folder import TOKENIZER, CheckpointError

PREFIX = "tokenizer.ggml."
NORMAL, CONTROL, UNUSED = 1, 3, 5  # token_type; others are added, but plain text
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTES],
    "smollm": [DIGITS, BYTES],
    "llama-bpe": [SPLIT, {**BYTES, "use_regex": False}],
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
    cut = said.get("pre")
    if said.get("model") != "gpt2" or not isinstance(cut, str) or cut not in CUTS:
        return files
    tokens = _texts(said, "tokens", source)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": said.get("add_bos_token", cut == "llama-bpe") is True,
    }
    ends = [i for key in ("eos_token_id", "eot_token_id") if (i := said.get(key)) is not None]
    for key in ("bos", "eos"):
        token_id = said.get(f"{key}_token_id")
        if type(token_id) is int and token_id < len(tokens):
            config[f"{key}_token"] = tokens[token_id]
    files[TOKENIZER] = to_json(_tokenizer(said, tokens, cut, source))
    files["tokenizer_config.json"] = to_json(config)
    files["generation_config.json"] = to_json({"eos_token_id": ends or None})
    return files


def _tokenizer(
    said: Mapping[str, Any], tokens: Sequence[str], cut: str, source: str
) -> dict[str, Any]:
    """The content of ``tokenizer.json``."""
    vocab = {token: i for i, token in enumerate(tokens)}
    kinds = said.get("token_type", [NORMAL] * len(tokens))
    if len(vocab) < len(tokens) or not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError(f"{source} cannot be used: its tokens are damaged, or not of a kind")
    merges = [merge.split(" ", 1) for merge in _texts(said, "merges", source)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": kind in (CONTROL, UNUSED)}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != NORMAL
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": cut == "llama-bpe",
        "vocab": vocab,
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[cut]},
        "post_processor": None,
        "decoder": BYTES,
        "model": model,
    }


def _texts(said: Mapping[str, Any], name: str, source: str) -> list[str]:
    found = said.get(name)
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise CheckpointError(f"{source} cannot be used: {PREFIX}{name} is no list of texts")
    return found


def to_json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, indent=1).encode()
