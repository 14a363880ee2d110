"""Labels that have a left and a right side: which, what is written for each, and how both are called."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from . import InvresError
from .config import Label, LabelScheme, Recipe

__all__ = [
    "SIDES",
    "Side",
    "check_sides",
    "is_of_one_side",
    "possible_sides",
    "side_pairs",
    "sided_scheme",
    "sides_of_recipe",
]

SIDES = ("left ", "right ")
"""What names of labels of one side begin with, in any case of letters."""

_SIDE_OF = {"left": "left", "l": "left", "lh": "left", "right": "right", "r": "right", "rh": "right"}
DARKER = 0.8  # the right side's colour, so that both can be told apart
LEFT, RIGHT = "SCT^7771000^Left", "SCT^24028007^Right"
TYPE_MODIFIER, REGION, REGION_MODIFIER = 3, 5, 6  # places in category~type~modifier..., counted as in TERMS
TERMS = 7  # context, category, type, modifier, context, region, region modifier
NONE = ("", "^^")


def is_of_one_side(name: str) -> bool:
    """Whether the name of a label says of which side it is, in any of the usual ways: "left kidney",
    "Left-Hippocampus", "hippocampus_R", "ctx-lh-insula", "LeftKidney"."""
    return not _SIDE_OF.keys().isdisjoint(_words(name))


def side_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """(left, right) of the labels that are one structure's two sides by their names."""
    sides: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        words = _words(name)
        said = [word for word in words if word in _SIDE_OF]
        if len(said) == 1:
            structure = tuple(word for word in words if word and word not in _SIDE_OF)
            sides.setdefault(structure, {}).setdefault(_SIDE_OF[said[0]], name)
    return [(found["left"], found["right"]) for found in sides.values() if len(found) == 2]


def _words(name: str) -> list[str]:
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.split(r"[^a-z0-9]+", apart.casefold())


@dataclass(frozen=True)
class Side:
    """A label that the network finds on both sides of the head without telling them apart.

    left_value, right_value: written for its voxels on either side.
    """

    label: str
    left_value: int
    right_value: int


def check_sides(scheme: LabelScheme, sides: Sequence[Side]) -> None:
    """Raises InvresError where sides name no label, are said twice, or have values that are taken."""
    if sides and scheme.regions:
        raise InvresError("sides are for labels that exclude one another, but scheme.regions is true.")
    names = [side.label for side in sides]
    for number, name in enumerate(names):
        if name not in scheme.names:
            raise InvresError(f"sides has the entry {name!r}, which is no label of scheme.")
        if name in names[:number]:
            raise InvresError(f"sides has two entries for {name!r}.")
        if {f"left {name}", f"right {name}"} & set(scheme.names):
            raise InvresError(f"sides has the entry {name!r}, but scheme has its left or right side already.")
    taken: set[int] = set()
    for side in sides:
        others = taken | {label.output_value for label in scheme.labels if label.name != side.label}
        for value in (side.left_value, side.right_value):
            if value < 1 or value in others:
                raise InvresError(
                    f"sides has the value {value} for {side.label}; a value is above 0 and stands for one thing."
                )
            others.add(value)
        taken |= {side.left_value, side.right_value}


def sided_scheme(scheme: LabelScheme, sides: Sequence[Side]) -> LabelScheme:
    """The labels of a divided label map: "left NAME" and "right NAME" instead of each that has sides, in its place."""
    by_name = {side.label: side for side in sides}
    labels: list[Label] = []
    for label in scheme.labels:
        side = by_name.get(label.name)
        if side is None:
            labels.append(label)
            continue
        darker = label.colour
        if darker is not None:
            red, green, blue = (round(DARKER * part) for part in darker)
            darker = red, green, blue
        left, right = (_with_side(label.terminology, code) for code in (LEFT, RIGHT))
        labels.append(Label(f"left {label.name}", (side.left_value,), side.left_value, label.colour, left))
        labels.append(Label(f"right {label.name}", (side.right_value,), side.right_value, darker, right))
    return dataclasses.replace(scheme, labels=tuple(labels))


def sides_of_recipe(recipe: Recipe) -> tuple[Side, ...]:
    """The sides of a recipe with label maps: of each label that holds both partners of a mirrored pair.

    The pair is the one that has the label's output value; its first partner is the left one.
    """
    if recipe.label_maps is None:
        return ()
    pairs = {value: pair for pair in recipe.label_maps.mirrored for value in pair}
    wanted = []
    for label in recipe.labels:
        pair = pairs.get(label.output_value)
        if pair is not None and set(pair) <= set(label.values):
            wanted.append(Side(label.name, *pair))
    return possible_sides(LabelScheme(recipe.labels), wanted)


def possible_sides(scheme: LabelScheme, wanted: Sequence[Side]) -> tuple[Side, ...]:
    """Those that `check_sides` would not refuse with these labels."""
    found: tuple[Side, ...] = ()
    for side in wanted:
        try:
            check_sides(scheme, (*found, side))
        except InvresError:
            continue
        found = (*found, side)
    return found


def _with_side(terminology: str, side: str) -> str:
    """Slicer's terminology entry with its side said, where it has a place for it that is free: behind the region, or
    the type where that is what is on this side."""
    terms = terminology.split("~")
    if len(terms) != TERMS:
        return terminology
    place = REGION_MODIFIER if terms[REGION] not in NONE else TYPE_MODIFIER
    if terms[place] not in NONE:
        return terminology
    terms[place] = side
    return "~".join(terms)
