"""Splits for a fine-tuning: whole patients, each held out once, from one case up."""

from __future__ import annotations

from pathlib import Path

import pytest

from invres import InvresError
from invres.cases import Case
from invres.casesplits import parts_of_splits, plan_parts


def cases(patients, each=1):
    return [
        Case(f"p{patient:02d}_{visit}", (Path("x"),), Path("y"), patient=f"p{patient:02d}")
        for patient in range(patients)
        for visit in range(each)
    ]


def patients_of(names):
    return {name.split("_")[0] for name in names}


def test_one_patient_trains_on_all_and_holds_nothing_out():
    (part,) = plan_parts(cases(1, each=3), seed=0)
    assert len(part.train) == 3 and part.validation == part.held_out == ()


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("patients", [2, 3, 4, 5, 7, 10])
def test_few_patients_are_each_held_out_once_and_all_are_trained_on_in_the_end(patients, each):
    parts = plan_parts(cases(patients, each), seed=3)
    *folds, final = parts
    assert len(folds) == (patients if patients < 5 else 5)
    assert len(final.train) == patients * each and final.held_out == ()
    held = [name for fold in folds for name in fold.held_out]
    assert sorted(held) == sorted(final.train), "each case once"
    for fold in folds:
        assert not patients_of(fold.train) & patients_of(fold.held_out)
        assert sorted((*fold.train, *fold.held_out)) == sorted(final.train)
        assert fold.validation == (), "what is scored must not choose"


@pytest.mark.parametrize("patients", [11, 20, 60])
def test_many_patients_need_one_training_with_three_separate_groups(patients):
    (part,) = plan_parts(cases(patients, 2), seed=1)
    groups = [patients_of(part.train), patients_of(part.validation), patients_of(part.held_out)]
    assert all(groups) and len(set.union(*groups)) == sum(map(len, groups)) == patients
    assert len(groups[0]) > patients / 2


def test_folds_and_counts_may_be_chosen():
    assert len(plan_parts(cases(20), 0, folds=4)) == 5
    (part,) = plan_parts(cases(6, each=2), 0, validation_count=3)
    assert len(part.held_out) == 4, "whole patients"


def test_the_seed_decides():
    assert plan_parts(cases(9), 4) == plan_parts(cases(9)[::-1], 4)
    assert plan_parts(cases(9), 4) != plan_parts(cases(9), 5)


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ({"folds": 1}, "1 folds were asked for"),
        ({"folds": 5}, "the data have 4 patients"),
        ({"validation_count": 4}, "leave no patient of 4"),
        ({"validation_count": -2}, "-2 cases cannot be held out"),
        ({"folds": 2, "validation_count": 1}, "cannot be asked for together"),
    ],
)
def test_what_leaves_nothing_to_train_on_is_refused(wish, told):
    with pytest.raises(InvresError, match=told) as caught:
        plan_parts(cases(4), 0, **wish)
    assert caught.value.hint


def test_splits_that_somebody_chose_are_kept_to():
    some = cases(12)
    names = [case.name for case in some]
    (part,) = parts_of_splits([(tuple(names[:9]), (*names[9:11], "left out"))], some, 0)
    assert part.held_out == tuple(names[9:11]) and len(part.validation) == 1
    assert sorted((*part.train, *part.validation)) == names[:9], "what is in no split takes no part"
    (part,) = parts_of_splits([(tuple(names[:4]), tuple(names[4:]))], some, 0)
    assert part.validation == ()
    *folds, final = parts_of_splits(
        [(tuple(names[:6]), tuple(names[6:])), (tuple(names[6:]), tuple(names[:6]))], some, 0
    )
    assert [fold.held_out for fold in folds] == [tuple(names[6:]), tuple(names[:6])]
    assert final.train == tuple(names)
    with pytest.raises(InvresError, match="no usable case"):
        parts_of_splits([(tuple(names), ("left out",))], some, 0)
