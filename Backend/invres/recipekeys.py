"""Single values of a recipe by their dotted keys, as the command line's `--set KEY=VALUE` gives them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from . import InvresError
from .config import Recipe
from .configjson import dotted_hint, dotted_keys, from_dict, to_dict

__all__ = ["check_said_once", "check_tunable", "given_keys", "tunable", "with_values"]

_OF_TUNING = {"spacing_mm": "--spacing", "network.vae": "--vae or --no-vae", "name": "--name"}
"""Keys of a recipe that are options of a fine-tuning."""


def with_values(recipe: Recipe, given: Sequence[str]) -> Recipe:
    """The recipe with each KEY=VALUE of `given` in it, in their order; checked as a recipe file is.

    An object is merged into the one that is there; a part that the recipe lacks (`crop`, `network.vae`) begins with its
    defaults. Another optimizer brings the weight decay that goes with it, unless that is given too. Raises InvresError
    for unknown keys, with the nearest one, and for wrong values.
    """
    data = to_dict(recipe)
    for text in given:
        key, value = _key_and_value(text)
        if key not in dotted_keys(Recipe):
            raise InvresError(f"--set: a recipe has no key {key!r}.", hint=dotted_hint(key, Recipe))
        for part in reversed(key.split(".")):
            value = {part: value}
        data = _merged(data, value)
    if not given:
        return recipe
    changed = from_dict(Recipe, data, "--set")
    if "training.weight_decay" in given_keys(given):
        return changed
    decay = recipe.training.with_optimizer(changed.training.optimizer).weight_decay
    return dataclasses.replace(changed, training=dataclasses.replace(changed.training, weight_decay=decay))


def given_keys(given: Sequence[str]) -> list[str]:
    """The dotted keys that `given` has values for, each KEY=VALUE; those in an object, too. Raises InvresError where
    one is not of this form.
    """
    return [key for text in given for key in _keys_in(*_key_and_value(text))]


def tunable(recipe: Recipe | None) -> Recipe:
    """What a fine-tuning takes of a recipe, or the defaults: all else is the model's."""
    return Recipe() if recipe is None else Recipe(training=recipe.training, augmentation=recipe.augmentation)


def check_tunable(given: Sequence[str], recipe: Recipe | None) -> None:
    """Raises InvresError where one of `given` is wrong in the recipe, or nothing that a fine-tuning takes from one."""
    for key in given_keys(given):
        if key in dotted_keys(Recipe) and key.partition(".")[0] not in ("training", "augmentation"):
            option = _OF_TUNING.get(key)
            raise InvresError(
                f"--set {key}: a fine-tuning takes that from its model, not from a recipe.",
                hint=f"Use {option}." if option else "Values of training and augmentation can be set.",
            )
    with_values(tunable(recipe), given)


def check_said_once(given: Sequence[str], options: Mapping[str, str]) -> None:
    """Raises InvresError where one of `given` and an option say the same. options: keys that an option has said, and
    how it is written.
    """
    for key in given_keys(given):
        for said, option in options.items():
            if key == said or key.startswith(f"{said}."):
                raise InvresError(f"--{option} and --set both give {said}.", hint="Give one of them.", code="usage")


def _keys_in(key: str, value: Any) -> Iterator[str]:
    yield key
    if isinstance(value, dict):
        for inner, of_inner in value.items():
            yield from _keys_in(f"{key}.{inner}", of_inner)


def _key_and_value(text: str) -> tuple[str, Any]:
    """KEY=VALUE; the value as JSON or, where it is none, as text. Raises InvresError where it is not of this form."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals):
        raise InvresError(
            f"--set needs a key and a value, got {text!r}.", hint="Write it as 'training.patch=[96,96,96]'."
        )
    try:
        return key, json.loads(value, parse_constant=_refused, parse_float=_finite)
    except ValueError:
        return key, value


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


def _refused(word: str) -> NoReturn:
    """NaN and Infinity, which JSON does not have and nothing can be trained with, stay words."""
    raise ValueError(word)


def _finite(word: str) -> float:
    """1e999, which is read as Infinity, stays a word, too."""
    value = float(word)
    return value if math.isfinite(value) else _refused(word)
