"""Which label of the model a segment stands for: told by its name, and by a person where that says nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slicer.i18n import tr as _

__all__ = [
    "BACKGROUND",
    "UNKNOWN",
    "LabelConflict",
    "TrainedLabel",
    "isLearned",
    "labelOf",
    "labelTable",
    "plainName",
    "undecided",
    "unknownValue",
]

BACKGROUND = ""
"""The choice for a segment that is left out: its voxels are learned as background."""
UNKNOWN = "ignore"
"""The choice for a segment of which nobody knows what it is: its voxels take no part. A data set calls them so, too."""


class LabelConflict(Exception):
    """Cases whose labels cannot be learned together; a plain sentence."""


@dataclass(frozen=True)
class TrainedLabel:
    """A label of the data set that is trained on. values: of its label files; more than one makes it a region.

    value: what is written for it. new: whether the model does not know it.
    """

    name: str
    values: tuple[int, ...]
    value: int
    new: bool = False


def plainName(name: str) -> str:
    """The name as the backend compares it: whatever its case, spaces and dashes."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def labelOf(name: str, labels: Sequence[str], choices: Mapping[str, str]) -> str | None:
    """The label that a segment of this name stands for; BACKGROUND, UNKNOWN, or None while nobody has decided.

    labels: the model's. choices: segment name -> label, as decided by a person; they win. The left or right side of a
    label that the model does not tell apart stands for that label. A segment called "ignore" is UNKNOWN.
    """
    wanted = plainName(name)
    for segment, label in choices.items():
        if plainName(segment) == wanted:
            return _known(label, labels)
    both = wanted.removeprefix("left ").removeprefix("right ")
    known = {UNKNOWN: UNKNOWN} | {plainName(label): label for label in reversed(labels)}
    return known.get(wanted, known.get(both))


def isLearned(label: str | None) -> bool:
    """Whether this is the name of a label, and no other choice."""
    return label not in (None, BACKGROUND, UNKNOWN)


def undecided(names: Iterable[str], labels: Sequence[str], choices: Mapping[str, str]) -> list[str]:
    """The names that stand for no label yet, each once."""
    return list(dict.fromkeys(name for name in names if labelOf(name, labels, choices) is None))


def labelTable(
    model: Any, segments: Iterable[str], dataSets: Iterable[Any], choices: Mapping[str, str]
) -> tuple[TrainedLabel, ...]:
    """The labels that are trained on: those that a case has, the model's in its order before new ones.

    model: a ModelInfo. segments: names of all segments of the scene's cases. dataSets: `DataSetOnDisk`s of other cases.
    Names that are not decided are left out. Raises LabelConflict where the cases contradict each other.
    """
    known = [label.name for label in model.labels]
    ofSegments = {label for name in segments if isLearned(label := labelOf(name, known, choices))}
    sets = list(dataSets)
    unknown = _unknownOnDisk(sets, known, choices)
    if any(each.regions for each in sets) or (_regions(model) and not sets):
        return _regionTable(model, ofSegments, sets, choices)
    values = _valuesOnDisk(sets, known, choices)
    if unknown in values.values():
        raise LabelConflict(
            _(
                "What is not known has the value {value} in one data set, which is a label in another; train on them "
                "one after the other."
            ).format(value=unknown)
        )
    names = [name for name in known if name in ofSegments or name in values]
    names += [name for name in dict.fromkeys([*values, *sorted(ofSegments)]) if name not in names]
    taken = _takenOnDisk(sets)
    for label in model.labels:
        if label.name in ofSegments and label.name not in values and label.value not in taken:
            values[label.name] = label.value
            taken.add(label.value)
    free = (number for number in range(1, 65536) if number not in taken)
    for name in names:
        if name not in values:
            values[name] = next(free)
    return tuple(TrainedLabel(name, (values[name],), values[name], name not in known) for name in names)


def unknownValue(
    model: Any, table: Iterable[TrainedLabel], dataSets: Iterable[Any], choices: Mapping[str, str]
) -> tuple[int, bool]:
    """The value of voxels that take no part, and whether label files on disk have set it.

    table: what `labelTable` gives. One that is not set is above all others, as nnU-Net wants it. Raises LabelConflict
    where the label files have several.
    """
    sets = list(dataSets)
    found = _unknownOnDisk(sets, [label.name for label in model.labels], choices)
    if found is not None:
        return found, True
    taken = {value for label in table for value in (*label.values, label.value)} | _takenOnDisk(sets)
    return max(taken, default=0) + 1, False


def _unknownOnDisk(sets: Sequence[Any], known: Sequence[str], choices: Mapping[str, str]) -> int | None:
    values = {each.ignoreValue for each in sets} - {None}
    for each in sets:
        for label in each.labels:
            if labelOf(label["name"], known, choices) != UNKNOWN:
                continue
            if each.regions:
                raise LabelConflict(
                    _(
                        "The labels of {data} lie in one another, so {label} alone cannot be not known; choose "
                        "something else for it under Labels."
                    ).format(data=each.name, label=label["name"])
                )
            values.add(int(label["values"][0]))
    if len(values) > 1:
        raise LabelConflict(
            _(
                "What is not known has the values {values} in the label files, and may have only one; choose something "
                "else under Labels, or train on the data sets one after the other."
            ).format(values=", ".join(map(str, sorted(values))))
        )
    return next(iter(values), None)


def _takenOnDisk(sets: Sequence[Any]) -> set[int]:
    """All values of the label files, also those that are not learned: they must not become those of another label."""
    values = {int(value) for each in sets for label in each.labels for value in label["values"]}
    return values | {each.ignoreValue for each in sets if each.ignoreValue is not None}


def _valuesOnDisk(sets: Sequence[Any], known: Sequence[str], choices: Mapping[str, str]) -> dict[str, int]:
    """Label -> value in the label files, which are taken as they are."""
    values: dict[str, int] = {}
    for each in sets:
        seen: set[str] = set()
        for label in each.labels:
            name = labelOf(label["name"], known, choices)
            if name is None or not isLearned(name):
                continue
            if name in seen:
                raise LabelConflict(
                    _("Two labels of {data} are both {label}; only segments in the scene can be joined.").format(
                        data=each.name, label=name
                    )
                )
            seen.add(name)
            value = int(label["values"][0])
            if values.setdefault(name, value) != value or [n for n, v in values.items() if v == value] != [name]:
                raise LabelConflict(
                    _("The data sets give {label} different values; train on them one after the other.").format(
                        label=name
                    )
                )
    return values


def _regionTable(
    model: Any, ofSegments: set[str], sets: Sequence[Any], choices: Mapping[str, str]
) -> tuple[TrainedLabel, ...]:
    """Labels that lie in one another: those of the model, or of one data set, as a whole."""
    known = [label.name for label in model.labels]
    if len(sets) > 1 or (sets and ofSegments):
        raise LabelConflict(
            _("{data} has labels that lie in one another, and cannot be mixed with other cases.").format(
                data=next(each for each in sets if each.regions).name
            )
        )
    if sets:
        return tuple(
            TrainedLabel(name, tuple(label["values"]), int(label["output_value"]), name not in known)
            for label in sets[0].labels
            if (name := labelOf(label["name"], known, choices)) is not None and isLearned(name)
        )
    if new := sorted(ofSegments - set(known)):
        raise LabelConflict(
            _("The labels of {model} lie in one another, so {label} cannot be added to them.").format(
                model=model.name, label=new[0]
            )
        )
    return tuple(
        TrainedLabel(label["name"], tuple(label["values"]), int(label["output_value"]))
        for label in model.manifest["scheme"]["labels"]
        if ofSegments
    )


def _regions(model: Any) -> bool:
    return bool((model.manifest.get("scheme") or {}).get("regions"))


def _known(label: str, labels: Sequence[str]) -> str:
    """The model's own spelling of a label, or the label itself where it is a new one."""
    if plainName(label) == UNKNOWN:
        return UNKNOWN
    return next((each for each in labels if label and plainName(each) == plainName(label)), label)
