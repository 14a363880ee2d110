"""Which cases a fine-tuning trains on, chooses by and is proved on, patient by patient, from one case up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import InvresError
from .cases import Case

__all__ = ["Part", "parts_of_splits", "plan_parts"]

Split = tuple[tuple[str, ...], tuple[str, ...]]

FEW = 10  # patients up to which every one is held out once
FOLDS = 5
HELD_OUT_FRACTION = 0.25  # of the patients where there are more than that
CHOOSING_FRACTION = 0.15  # of the remaining ones


@dataclass(frozen=True)
class Part:
    """One training, by case names.

    validation: they choose the best epoch. held_out: they are scored afterwards and chose nothing; no patient of
    theirs is among the other two.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()


def plan_parts(cases: Sequence[Case], seed: int, folds: int = 0, validation_count: int = 0) -> tuple[Part, ...]:
    """The trainings of a run; the last one gives the model.

    One patient: a single training without proof. Up to 10: each patient is held out once, one by one up to 4 and in 5
    groups from 5 on, then a training on all cases. More: a quarter is held out from a single training, and some of
    the rest choose its best epoch. folds, where not 0: that many groups instead, whatever the number of patients.
    validation_count, where not 0: a single training, with whole patients of that many cases held out.
    Raises InvresError for numbers that leave nothing to train on.
    """
    patients = sorted({case.patient for case in cases})
    np.random.RandomState(seed).shuffle(patients)
    if validation_count < 0:
        raise InvresError(
            f"{validation_count} cases cannot be held out.", hint="Give 1 or more, or 0 to have the cases split."
        )
    if folds and validation_count:
        raise InvresError("Folds and a validation count cannot be asked for together.", hint="Give one of them.")
    if folds and not 2 <= folds <= len(patients):
        raise InvresError(
            f"{folds} folds were asked for, but the data have {len(patients)} patients.",
            hint="Give 2 or more folds, and no more than patients; or leave --folds out.",
        )
    everything = tuple(sorted(case.name for case in cases))
    if validation_count or (not folds and len(patients) > FEW):
        return (_single(cases, patients, validation_count),)
    if len(patients) == 1:
        return (Part(everything),)
    count = folds or (len(patients) if len(patients) < FOLDS else FOLDS)
    groups = [{patients[place] for place in group} for group in np.array_split(np.arange(len(patients)), count)]
    return (
        *(Part(_names(cases, set(patients) - group), (), _names(cases, group)) for group in groups),
        Part(everything),
    )


def parts_of_splits(splits: Sequence[Split], cases: Sequence[Case], seed: int) -> tuple[Part, ...]:
    """The trainings of a split that somebody chose: (training, held out) by name for each.

    Names that are not among `cases` are passed over. One split gives one training, of whose cases some may choose the
    best epoch as in `plan_parts`; after several a training on all cases follows.
    Raises InvresError where one side of a split has no case left.
    """
    usable = {case.name for case in cases}
    sides = [tuple(tuple(sorted(name for name in side if name in usable)) for side in split) for split in splits]
    if not all(all(split) for split in sides):
        raise InvresError(
            "A split of splits_final.json has no usable case to train on, or none to hold out.",
            hint="Correct it, or remove it to have the cases split anew.",
        )
    if len(sides) > 1:
        return (*(Part(train, (), held) for train, held in sides), Part(tuple(sorted(usable))))
    ((train, held),) = sides
    rest = sorted({case.patient for case in cases if case.name in train})
    np.random.RandomState(seed).shuffle(rest)
    choosing = set(rest[: _choosing(rest)])
    validation = tuple(case.name for case in cases if case.name in train and case.patient in choosing)
    return (Part(tuple(name for name in train if name not in validation), tuple(sorted(validation)), held),)


def _choosing(patients: Sequence[str]) -> int:
    """How many of these are spared for choosing the epoch; with few, none is: the last epoch is taken."""
    return round(CHOOSING_FRACTION * len(patients)) if len(patients) > 5 else 0


def _single(cases: Sequence[Case], patients: list[str], count: int) -> Part:
    if count:
        sizes = [len(_names(cases, {patient})) for patient in patients]
        held = int(np.searchsorted(np.cumsum(sizes), count)) + 1
        if held >= len(patients):
            raise InvresError(
                f"{count} held-out cases of whole patients leave no patient of {len(patients)} to train on.",
                hint="Give a smaller --validation-count.",
            )
    else:
        held = round(HELD_OUT_FRACTION * len(patients))
    rest = patients[held:]
    choosing = _choosing(rest)
    names = [_names(cases, set(some)) for some in (rest[choosing:], rest[:choosing], patients[:held])]
    return Part(names[0], names[1], names[2])


def _names(cases: Sequence[Case], patients: set[str]) -> tuple[str, ...]:
    return tuple(sorted(case.name for case in cases if case.patient in patients))
