"""The tokenizer of a folder: which tokens begin and end a text, and who says so."""

import json
from pathlib import Path

import pytest

from fathom.convert.hf_tokenizer import read_hf_tokenizer
from fathom.convert.run_folder import CheckpointError
from fathom.data.corpus import BUNDLED


def folder(path: Path, config: object = None) -> Path:
    (path / "tokenizer.json").write_bytes((BUNDLED / "tokenizer-1k.json").read_bytes())
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "bos", "eos", "begins"),
    [
        (None, 0, 1, [0]),
        ({}, 0, 1, [0]),
        ({"add_bos_token": False}, 0, 1, []),
        ({"bos_token": "<|eos|>", "eos_token": {"content": "<|bos|>"}}, 1, 0, [1]),
        ({"bos_token": None, "eos_token": 5, "add_bos_token": "yes"}, 0, 1, [0]),
    ],
)
def test_the_config_beside_it_names_its_tokens(tmp_path, config, bos, eos, begins) -> None:
    tokenizer = read_hf_tokenizer(folder(tmp_path, config))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.begin_ids) == (bos, eos, begins)


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        read_hf_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="none of the special tokens <x>"):
        read_hf_tokenizer(folder(tmp_path, {"bos_token": "<x>"}))
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_hf_tokenizer(folder(tmp_path, [1]))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="is a link"):
        read_hf_tokenizer(tmp_path)
