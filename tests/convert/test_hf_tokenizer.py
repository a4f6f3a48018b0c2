"""The tokenizer of a folder: which tokens begin and end a text, and who says so."""

import json

import pytest

from fathom.convert.hf_tokenizer import read_hf_tokenizer
from fathom.convert.run_folder import CheckpointError
from fathom.data.corpus import BUNDLED


def files(config: object = None) -> dict[str, bytes]:
    found = {"tokenizer.json": (BUNDLED / "tokenizer-1k.json").read_bytes()}
    if config is not None:
        found["tokenizer_config.json"] = json.dumps(config).encode()
    return found


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
def test_the_config_beside_it_names_its_tokens(config, bos, eos, begins) -> None:
    tokenizer = read_hf_tokenizer(files(config), "m")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.begin_ids) == (bos, eos, begins)


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"m has no tokenizer\.json"):
        read_hf_tokenizer({}, "m")
    with pytest.raises(CheckpointError, match=r"m/tokenizer\.json has none of the .* <x>"):
        read_hf_tokenizer(files({"bos_token": "<x>"}), "m")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_hf_tokenizer(files([1]), "m")
    with pytest.raises(CheckpointError, match="of at most 64 MB"):
        read_hf_tokenizer({"tokenizer.json": bytes(64 * 2**20 + 1)}, "m")
    with pytest.raises(CheckpointError, match="larger than 16 MB"):
        read_hf_tokenizer({**files(), "tokenizer_config.json": bytes(16 * 2**20 + 1)}, "m")
