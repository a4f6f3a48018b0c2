"""Defaults of generation: what a folder says, and who goes before whom."""

import json
from dataclasses import fields

import pytest

from fathom.cli.options import GENERATION
from fathom.convert.run_folder import CheckpointError
from fathom.generate.defaults import (
    NUMBERS,
    Settings,
    length,
    over,
    read_defaults,
    sampling,
)
from fathom.generate.sample import Sampling


def read(said: object = None, config: dict | None = None) -> Settings:
    files = {} if said is None else {"generation_config.json": json.dumps(said).encode()}
    return read_defaults(files, config or {}, "m")


def test_the_first_who_says_something_wins() -> None:
    request = Settings(temperature=0.0, top_k=5)
    line = Settings(temperature=0.5, top_p=0.9)
    file = Settings(temperature=0.7, top_p=0.8, max_new_tokens=9, eos_ids=(4,))
    got = over(request, line, file)
    assert got == Settings(temperature=0.0, top_k=5, top_p=0.9, max_new_tokens=9, eos_ids=(4,))
    assert sampling(got) == Sampling(temperature=0.0, top_k=5, top_p=0.9)
    assert length(got) == 9


def test_the_command_line_can_say_every_number() -> None:
    assert {name: kind for name, (kind, _) in GENERATION.items()} == NUMBERS
    others = Settings.__annotations__.keys() - NUMBERS.keys()
    assert others == {"logit_bias", "eos_ids"}
    assert Settings.__annotations__.keys() - {"max_new_tokens", "eos_ids"} == {
        field.name for field in fields(Sampling)
    } - {"seed"}


def test_what_nobody_says_is_greedy() -> None:
    assert sampling({}) == Sampling()
    assert length({}) == 64


def test_a_file_that_samples() -> None:
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": [1, 2], "x": {}}
    want = Settings(temperature=0.6, top_p=0.95, eos_ids=(1, 2))
    assert read(said) == want


def test_a_file_that_samples_without_a_temperature_means_1() -> None:
    got = read({"do_sample": True, "top_k": 0})
    assert got == Settings(temperature=1.0)


def test_without_do_sample_the_likeliest_token_is_taken() -> None:
    said = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 7}
    got = read(said)
    assert got == Settings(repetition_penalty=1.1, max_new_tokens=7)


def test_end_ids_stand_in_the_config_where_the_other_file_has_none() -> None:
    assert read({}, {"eos_token_id": 5}) == {"eos_ids": (5,)}
    assert read({"eos_token_id": 6}) == {"eos_ids": (6,)}


def test_a_folder_that_says_nothing() -> None:
    assert read() == Settings()


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot'"),
        ({"do_sample": True, "temperature": -1}, "temperature must be at least 0"),
        ({"do_sample": True, "top_p": 3.0}, "top_p must be from 0 to 1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_k": True}, "top_k is True"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"repetition_penalty": 10**400}, "repetition_penalty is"),
        ({"eos_token_id": ["a"]}, "eos_token_id must be an id or a list of ids"),
        ({"eos_token_id": [1] * 1001}, "eos_token_id must be"),
        ({"eos_token_id": True}, "eos_token_id must be"),
        ([], "is not a JSON object"),
    ],
)
def test_what_cannot_be_is_refused_by_name(said, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        read(said)
