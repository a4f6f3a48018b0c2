"""The one mechanism that reads configs: TOML and dotted ``key=value``, checked at the border.

``read_toml`` and ``override`` work on plain data; ``parse`` turns it into frozen dataclasses and
refuses what cannot be, one sentence per problem, before anything else has happened.
"""

import difflib
import json
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from fathom.layers.base import OneOf

T = TypeVar("T")
Data = dict[str, Any]


class ConfigError(ValueError):
    """A config that cannot be: one sentence per problem."""


def parse(cls: type[T], data: Mapping[str, Any]) -> T:
    """Check plain data against a config class and build it.

    Raises:
        ConfigError: unknown keys (with the nearest known one), wrong types, values out of bounds.
    """
    try:
        return _adapter(cls).validate_json(json.dumps(data))
    except ValidationError as error:
        lines = dict.fromkeys(_explain(item, cls) for item in error.errors(include_url=False))
        raise ConfigError("\n".join(lines)) from None


@cache
def _adapter(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)


def refresh() -> None:
    """Read the tables of kinds anew: called after a class has been registered."""
    _adapter.cache_clear()


def read_toml(path: Path) -> Data:
    """A TOML file as plain data.

    Raises:
        ConfigError: no such file, or not TOML (with the line).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def to_data(config: object) -> Data:
    """A config as plain data: tuples become lists, None an absent key. ``parse`` reads it back."""
    assert is_dataclass(config)
    assert not isinstance(config, type)
    return _plain(asdict(config))


def to_toml(config: object) -> str:
    """A config as TOML text, every key written out."""
    return tomli_w.dumps(to_data(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Data:
    """``over`` on top of ``base``: tables merge key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # pyright: ignore[reportArgumentType]
    return merged


def override(data: Mapping[str, Any], assignments: Iterable[str]) -> Data:
    """Apply ``a.b.0.c=value`` assignments; values are TOML, else a string; ``none`` unsets a key.

    A ``*`` in the place of a list index means every item. Missing tables are made.

    Raises:
        ConfigError: no ``=``, or a list index that does not exist.
    """
    result = json.loads(json.dumps(data))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip().removeprefix("--")
        if not equals or not key:
            raise ConfigError(f"expected key=value, got {assignment!r}: write train.lr=3e-4")
        _assign(result, key.split("."), _value(text.strip()), key)
    return result


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(node: Any, path: list[str], value: Any, key: str) -> None:
    head, *rest = path
    if isinstance(node, list):
        for index in range(len(node)) if head == "*" else [_index(head, node, key)]:
            if rest:
                _assign(node[index], rest, value, key)
            else:
                node[index] = value
    elif not isinstance(node, dict):
        raise ConfigError(f"{key} cannot be set: {head!r} lies inside a plain value")
    elif rest:
        if node.get(head) is None:
            node[head] = {}
        _assign(node[head], rest, value, key)
    else:
        node[head] = value


def _index(text: str, items: list[Any], key: str) -> int:
    if text.isdecimal() and int(text) < len(items):
        return int(text)
    allowed = f"0 to {len(items) - 1}, or * for all" if items else "nothing: the list is empty"
    raise ConfigError(f"{key} names list item {text!r}; allowed here is {allowed}")


def json_schema(cls: type) -> Data:
    """The JSON schema of a config class, for editors."""
    return _adapter(cls).json_schema()


def keys(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key of a config class as ``(dotted key, type, default)``; a kind stands in brackets."""
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        inner = [member for member in _members(hint) if is_dataclass(member)]
        if not inner:
            yield key, _type_name(hint), _default(field)
        for member in inner:
            tag = f"[{_kind(member)}]" if len(inner) > 1 else ""
            item = ".N" if _is_list(hint) else ""
            yield from keys(member, f"{key}{item}{tag}.")


def _default(field: Any) -> str:
    if field.default is not MISSING:
        return "none" if field.default is None else json.dumps(field.default)
    return "required" if field.default_factory is MISSING else json.dumps(field.default_factory())


def _type_name(hint: Any) -> str:
    return (
        str(hint).replace("typing.", "") if get_origin(hint) else getattr(hint, "__name__", "any")
    )


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is tuple or any(get_origin(arg) is tuple for arg in get_args(hint))


def _kind(cls: type) -> str:
    return str(getattr(cls, "kind", cls.__name__))


def _members(hint: Any) -> Iterator[type]:
    """The classes behind Annotated, Optional, unions, tuples and tables of kinds."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        table = next((mark.table for mark in args[1:] if isinstance(mark, OneOf)), None)
        if table is not None:
            yield from table.values()
        else:
            yield from _members(args[0])
    elif origin in (Union, types.UnionType, tuple):
        for arg in args:
            yield from _members(arg)
    elif isinstance(hint, type):
        yield hint


def _classes_at(cls: type, location: Iterable[int | str]) -> list[type]:
    """The dataclasses that may stand at an error's location."""
    here = [cls]
    for part in location:
        if isinstance(part, int):
            continue
        picked = [member for member in here if _kind(member) == part]
        hints = [get_type_hints(m, include_extras=True) for m in here if is_dataclass(m)]
        below = [child for hint in hints if part in hint for child in _members(hint[part])]
        here = picked or below
    return [member for member in here if is_dataclass(member)]


def _explain(error: ErrorDetails, cls: type) -> str:
    """One sentence: what, got, why, what is allowed."""
    location = _readable(error["loc"], cls)
    match error["type"]:
        case "unexpected_keyword_argument":
            return _unknown_key(location, error, cls)
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{location} is missing: it has no default"
        case "union_tag_invalid":
            expected = error.get("ctx", {}).get("expected_tags", "")
            tag = error.get("ctx", {}).get("tag", "")
            return f"{location}.kind cannot be {tag!r}: the kinds are {expected}"
        case "union_tag_not_found":
            return f"{location}.kind is missing: it picks what stands here"
        case "value_error":
            text = error["msg"].removeprefix("Value error, ")
            return f"{location}: {text}" if location else text
        case _:
            return f"{location} cannot be {error['input']!r}: {error['msg'].lower()}"


def _readable(location: tuple[int | str, ...], cls: type) -> str:
    """The dotted key, without the tags that pydantic puts in for a picked class."""
    parts, walked = [], []
    for part in location:
        here = _classes_at(cls, walked)
        is_field = any(part in get_type_hints(member) for member in here)
        tag = isinstance(part, str) and not is_field and part in {_kind(m) for m in here}
        if not tag:
            parts.append(str(part))
        walked.append(part)
    return ".".join(parts)


def _unknown_key(location: str, error: ErrorDetails, cls: type) -> str:
    owners = _classes_at(cls, error["loc"][:-1])
    known = sorted({field.name for owner in owners for field in fields(owner)})
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(known)}"
    return f"unknown key {location}: {hint}"
