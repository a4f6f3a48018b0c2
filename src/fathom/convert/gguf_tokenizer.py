"""The tokenizer of a GGUF file as the files of a Hugging Face folder, and back.

GGUF stores the vocabulary and merges of byte-level BPE ("gpt2"), and how text is cut before by a
name alone (``tokenizer.ggml.pre``), which is looked up here: without one of those names a file has
no tokenizer here, for text cut otherwise would get other ids. Of SentencePiece BPE ("llama") it
stores the pieces and their scores.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fathom.convert import sentencepiece
from fathom.convert.hf_tokenizer import as_files, object_in, read_hf_tokenizer
from fathom.convert.run_folder import TOKENIZER, CheckpointError
from fathom.convert.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
)
from fathom.convert.tiktoken import KIMI_CUTS, LLAMA3_CUTS
from fathom.convert.tokenizer_json import BYTES, added_token, byte_level, split, to_json
from fathom.data.pieces import fallback, steps
from fathom.layers.base import require

PREFIX = "tokenizer.ggml."
DIGITS = {"type": "Digits", "individual_digits": True}
CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTES],
    "smollm": [DIGITS, BYTES],
    "llama-bpe": split(LLAMA3_CUTS),
    "kimi-k2": split(KIMI_CUTS),
    "deepseek-v3": split(
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
        "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
        "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ),
}
# DeepSeek-LLM's and V2's cuts: of the second only how the class of cased letters begins.
DEEPSEEK_LLM = ("[\r\n]", "\\s?[A-Za-z\u00b5", r"\s?[!-/:-~", r"\s+$", "[\u4e00-\u9fa5\u0800-")


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


def tokenizer_fields(files: Mapping[str, bytes], vocab_size: int) -> dict[str, Any]:
    """``tokenizer.ggml.*`` and the chat template, from a Hugging Face folder's files.

    Args:
        vocab_size: rows of the embedding; those without a token get a name that no text holds.

    Raises:
        ValueError: a way of cutting text that GGUF has no name for here.
    """
    if TOKENIZER not in files:
        return {}
    tokenizer = read_hf_tokenizer(files, "the model")
    described = json.loads(files[TOKENIZER])
    names = [tokenizer.token_name(i) for i in range(tokenizer.vocab_size)]
    pieces = described["model"].get("byte_fallback") is True
    said = _pieces_said(described, names) if pieces else _byte_level_said(described)
    unused = range(len(names), vocab_size)
    said |= {
        "tokens": names + [f"[unused{i}]" for i in unused],
        "token_type": _kinds(described, names) + [CONTROL for _ in unused],
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "add_bos_token": bool(tokenizer.begin_ids),
    }
    if pieces:
        said["scores"] += [0.0 for _ in unused]
        said["add_space_prefix"] = bool(tokenizer.extra_bytes)
    found = {PREFIX + name: value for name, value in said.items()}
    template = files.get("chat_template.jinja", b"").decode()
    template = template or object_in(files, "tokenizer_config.json", "").get("chat_template")
    return {**found, "tokenizer.chat_template": template} if isinstance(template, str) else found


def _byte_level_said(described: Mapping[str, Any]) -> dict[str, Any]:
    cut = steps(described, "pre_tokenizer")
    names = [name for name, known in CUTS.items() if _bare(known) == _bare(cut)]
    patterns = [str(step.get("pattern", {}).get("Regex")) for step in cut[: len(DEEPSEEK_LLM)]]
    if [step.get("type") for step in cut[len(DEEPSEEK_LLM) :]] == ["Digits", "ByteLevel"]:
        same = map(str.startswith, patterns, DEEPSEEK_LLM)
        names += ["deepseek-llm"] if all(same) else []
    require(bool(names), f"GGUF has no name here for the pre-tokenizer {str(cut)[:100]}")
    merges = [" ".join(merge) for merge in _merges(described)]
    return {"model": "gpt2", "pre": names[0], "merges": merges}


def _pieces_said(described: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Scores that order the pieces as the merges do: a whole's first merge decides."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(_merges(described)):
        ranks.setdefault("".join(merge), rank)
    scores = [-float(ranks.get(name, len(ranks))) for name in names]
    return {"model": "llama", "pre": "default", "scores": scores}


def _kinds(described: Mapping[str, Any], names: Sequence[str]) -> list[int]:
    """The token types."""
    model = described["model"]
    special = {token["id"]: token["special"] for token in described.get("added_tokens", [])}
    fallen = {fallback(byte) for byte in range(256)} if model.get("byte_fallback") else set()

    def kind(i: int, name: str) -> int:
        if name in fallen:
            return BYTE
        if i not in special:
            return NORMAL
        unknown = bool(fallen) and name == model.get("unk_token")
        return UNKNOWN if unknown else CONTROL if special[i] else USER_DEFINED

    return [kind(i, name) for i, name in enumerate(names)]


def _merges(described: Mapping[str, Any]) -> list[Sequence[str]]:
    merges = described["model"]["merges"]
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]


def _bare(cut: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """What of a pre-tokenizer decides where text is cut."""
    keys = ("type", "individual_digits", "add_prefix_space", "use_regex", "pattern", "behavior")
    return [tuple(str(step.get(key)) for key in keys) for step in cut]
