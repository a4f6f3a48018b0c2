"""What a text is generated with where a request does not say.

Four places may say it; the first that does wins: the request, the command line (the engine's
``defaults``), the model's ``generation_config.json``, and what is built in: greedy.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypedDict, cast

from fathom.convert.hf_tokenizer import GENERATION_CONFIG, object_in
from fathom.convert.run_folder import CheckpointError
from fathom.generate.sample import Sampling
from fathom.layers.base import require

MAX_NEW_TOKENS = 64
MAX_EOS_IDS = 1000
NUMBERS: dict[str, type[int] | type[float]] = {  # what a person can type
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_new_tokens": int,
}
UNSAID = ("presence_penalty", "frequency_penalty")  # these no generation_config.json has


class Settings(TypedDict, total=False):
    """The fields of :class:`Sampling` but the seed, and two more; absent or None: not said here.

    ``max_new_tokens``: at most so many tokens after a prompt. ``eos_ids``: each of these ends a
    text; not said: the tokenizer's end-of-text token.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    max_new_tokens: int | None
    eos_ids: tuple[int, ...] | None


def over(*places: Settings) -> Settings:
    """What the first place says, else what the second says, and so on."""
    said: dict[str, Any] = {}
    for place in reversed(places):
        said |= {name: value for name, value in place.items() if value is not None}
    return cast(Settings, said)


def sampling(settings: Settings) -> Sampling:
    """How to choose a token; what is not said is as :class:`Sampling` has it.

    Raises:
        ValueError: a value that cannot be.
    """
    own = {field.name for field in fields(Sampling)}
    said = cast(dict[str, Any], over(settings))
    return Sampling(**{name: value for name, value in said.items() if name in own})


def length(settings: Settings) -> int:
    """``max_new_tokens``, or the built-in one."""
    said = settings.get("max_new_tokens")
    return MAX_NEW_TOKENS if said is None else said


def check(settings: Settings) -> None:
    """``ValueError`` for a value that cannot be."""
    sampling(settings)
    tokens = length(settings)
    require(tokens >= 1, f"max_new_tokens must be at least 1, got {tokens}")


def read_defaults(files: Mapping[str, bytes], config: Mapping[str, Any], source: str) -> Settings:
    """What a Hugging Face checkpoint says: ``generation_config.json``, end ids also its config.

    As its own code understands them: a temperature counts only with ``do_sample``, and a ``top_k``
    of 0 is none.

    Args:
        files: name to content.
        config: its ``config.json``.
        source: where they lie, for messages.

    Raises:
        CheckpointError: a file that cannot be read, or a value that cannot be.
    """
    said = object_in(files, GENERATION_CONFIG, source)
    ends = said.get("eos_token_id", config.get("eos_token_id"))
    source = f"{source}/{GENERATION_CONFIG}"
    known: dict[str, Any] = {}
    for name in (name for name in NUMBERS if name not in UNSAID and said.get(name) is not None):
        value, kind = said[name], NUMBERS[name]
        if type(value) not in (int, kind) or not -1e9 < value < 1e9:
            raise CheckpointError(f"{source}: {name} is {value!r:.80}")
        known[name] = value
    if said.get("do_sample") is not True:
        known = {n: v for n, v in known.items() if n in ("repetition_penalty", "max_new_tokens")}
    else:
        known = {"temperature": 1.0, **known}
    if known.get("top_k") == 0:
        del known["top_k"]
    defaults = over(cast(Settings, {**known, "eos_ids": _ids(ends, source)}))
    try:
        check(defaults)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return defaults


def _ids(value: Any, source: str) -> tuple[int, ...] | None:
    """One id or a list of them."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > MAX_EOS_IDS or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise CheckpointError(f"{source}: eos_token_id must be an id or a list of ids")
    return tuple(ids) or None
