"""Configurations to and from JSON, with the nearest known word where one is unknown."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

from . import InvresError

__all__ = ["differing_keys", "dotted_hint", "dotted_keys", "from_dict", "nearest", "to_dict"]

T = TypeVar("T")


_SYNONYMS = {
    **dict.fromkeys(("width", "widths", "features", "filters"), "channels"),
    **{"lr": "learning_rate", "batch": "batch_size", "patch_size": "patch", "spacing": "spacing_mm"},
}


def nearest(word: str, known: Iterable[str]) -> str:
    """A question for the known word that one may have meant; "" where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


def dotted_keys(cls: type) -> list[str]:
    """The keys of a configuration and of the configurations in it, as "training" and "training.patch"."""
    keys = []
    for key, kind in typing.get_type_hints(cls).items():
        keys.append(key)
        parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
        for part in filter(dataclasses.is_dataclass, parts):
            keys += [f"{key}.{inner}" for inner in dotted_keys(typing.cast(type, part))]
    return keys


def dotted_hint(key: str, cls: type) -> str:
    """What to do about a key that is none of `dotted_keys`: the nearest one, or those that there are.

    Its last word counts most, so that "patch" leads to "training.patch".
    """
    known = dotted_keys(cls)
    *parents, word = key.split(".")
    last = {one: one.rpartition(".")[2] for one in known}
    near = difflib.get_close_matches(_SYNONYMS.get(word.lower(), word), last.values(), n=1)
    if alike := [one for one in known if last[one] in near]:
        best = min(alike, key=lambda one: (-len({*parents} & {*one.split(".")}), one.count(".")))
        return f"Did you mean {best!r}?"
    beside = [one for one in known if one.rpartition(".")[0] == ".".join(parents)]
    return f"Known keys: {', '.join(beside or [one for one in known if '.' not in one])}."


def differing_keys(one: Any, other: Any) -> list[str]:
    """The keys of two configurations, as "training.patch", whose values differ; names and descriptions do not count."""
    return list(_differing(to_dict(one), to_dict(other), ""))


def _differing(one: dict[str, Any], other: dict[str, Any], where: str) -> Iterator[str]:
    for key, value in one.items():
        if isinstance(value, dict) and isinstance(other.get(key), dict):
            yield from _differing(value, other[key], f"{where}{key}.")
        elif value != other.get(key) and key not in ("name", "description"):
            yield f"{where}{key}"


def to_dict(config: Any) -> Any:
    """A configuration as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Builds a configuration from plain JSON values.

    Raises InvresError naming the unknown key (with the nearest known one) or the value of a wrong type.
    """
    where = where or cls.__name__
    if not isinstance(data, dict):
        raise InvresError(f"{where} must be a JSON object, got {type(data).__name__}.")
    known = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in known:
            other = _SYNONYMS.get(str(key).lower(), "")
            hint = f"Did you mean {other!r}?" if other in known else nearest(str(key), known)
            hint = hint or f"Known keys: {', '.join(known)}."
            raise InvresError(f"{where} has the unknown key {key!r}.", hint=hint)
        values[key] = _convert(known[key], value, f"{where}: {key}")
    try:
        return cls(**values)
    except TypeError as error:
        raise InvresError(f"{where} is incomplete: {error}.") from None


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`, or an InvresError that says what was wanted."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise InvresError(f"{where} must be one of {', '.join(map(str, arguments))}, got {value!r}.")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InvresError(f"{where} must be a list, got {value!r}.")
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], item, where) for item in value)
        if len(value) != len(arguments):
            raise InvresError(f"{where} must have {len(arguments)} entries, got {len(value)}.")
        return tuple(_convert(a, item, where) for a, item in zip(arguments, value, strict=True))
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    wrong_bool = isinstance(value, bool) and kind is not bool
    if kind is float and isinstance(value, int) and not wrong_bool:
        return float(value)
    if not isinstance(value, kind) or wrong_bool:
        raise InvresError(f"{where} must be {_WORDS.get(kind, kind.__name__)}, got {value!r}.")
    return value


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
