"""Which cases a fine-tuning trains on, chooses by and is proved on, patient by patient, from one case up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import InvresError
from .cases import Case

__all__ = ["Part", "plan_parts"]

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
    # With few patients left to train on, none is spared for choosing: the last epoch is taken.
    choosing = round(CHOOSING_FRACTION * len(rest)) if len(rest) > 5 else 0
    names = [_names(cases, set(some)) for some in (rest[choosing:], rest[:choosing], patients[:held])]
    return Part(names[0], names[1], names[2])


def _names(cases: Sequence[Case], patients: set[str]) -> tuple[str, ...]:
    return tuple(sorted(case.name for case in cases if case.patient in patients))
