"""Before and after: paired scores, honest intervals, verdicts in words, and the worst place of each case."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from grids import RAS
from test_transfer import scheme
from tiny_datasets import invres

from invres import InvresError, casecomparison
from invres.casecomparison import CaseComparison, Contender, channels_for, compare_case
from invres.cases import Case, Dataset
from invres.comparison import comparison_table, summarise, write_comparison
from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan
from invres.intervals import interval, p_value, rejected, spread_over_patients
from invres.manifest import Manifest
from invres.metrics import EMPTY_DISTANCE_MM
from invres.modelpackage import ModelPackage
from invres.networkconfig import NetworkConfig
from invres.networks import NetworkOutput
from invres.volume import Geometry, Volume, write_volume

LABELS = scheme("upper", "lower")


def scores(**dice):
    return {
        name: {"Dice": value, "HD95_mm": 10 * (1 - value), "VolumeError_ml": 1 - value} for name, value in dice.items()
    }


def case(name, base, tuned, patient=""):
    of_base = {} if base is None else scores(upper=base, lower=base)
    return CaseComparison(name, patient or name, of_base, scores(upper=tuned, lower=tuned))


def cases(*pairs):
    return [case(f"c{place}", base, tuned) for place, (base, tuned) in enumerate(pairs)]


# --- what is claimed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "verdict", "promotable"),
    [
        ([(0.5, 0.7)], "not enough data to tell", True),
        ([(0.5, 0.7), (0.5, 0.7)], "not enough data to tell", True),
        ([(0.5, 0.4), (0.5, 0.4)], "not enough data to tell", False),
        ([(0.5, 0.70), (0.5, 0.71), (0.5, 0.72)], "better", True),
        ([(0.5, 0.30), (0.5, 0.31), (0.5, 0.32)], "worse", False),
        ([(0.5, 0.4), (0.5, 0.9), (0.5, 0.45)], "not enough data to tell", True),
        ([(0.5, 0.6)] * 4 + [(0.5, 0.58)] * 4, "better", True),
        ([(0.8, 0.7)] * 4 + [(0.8, 0.75)] * 4, "worse", False),
        ([(0.8, 0.8 + 0.001 * (i % 5 - 2)) for i in range(12)], "as good", True),
        ([(0.8, 0.8 + 0.1 * (i % 5 - 2)) for i in range(12)], "not enough data to tell", False),
        ([(None, 0.5)] * 3, "nothing to compare", True),
        ([(None, 0.0)] * 3, "nothing to compare", False),
    ],
)
def test_the_verdict_says_no_more_than_the_cases_do(pairs, verdict, promotable):
    found = summarise(cases(*pairs), True, LABELS)
    assert found["verdict"] == verdict
    expected = promotable if verdict != "not enough data to tell" else found["difference"]["mean"] >= 0
    assert found["promotable"] is expected
    told = {"better": "better than before", "worse": "worse than before", "as good": "as good as before"}
    assert told.get(verdict, verdict.split()[-1]) in found["sentence"]
    assert f"{len(pairs)} case" in found["sentence"]
    json.dumps(found, allow_nan=False)


def test_cases_that_were_trained_on_prove_nothing():
    found = summarise(cases(*[(0.5, 0.9)] * 8), False, LABELS)
    assert (found["verdict"], found["promotable"]) == ("not enough data to tell", False)
    assert "no case can be held out" in found["sentence"] and "not enough data to tell" in found["sentence"]


def test_no_case_at_all_is_said():
    assert "no proof" in summarise([], True, LABELS)["sentence"]


def test_several_cases_of_one_patient_are_one_observation():
    many = [case(f"c{i}", 0.5, 0.7, patient="one") for i in range(9)]
    found = summarise(many, True, LABELS)
    assert (found["n_cases"], found["n_patients"], found["difference"]["n"]) == (9, 1, 1)
    assert found["verdict"] == "not enough data to tell" and found["difference"]["ci95"] is None


def test_before_and_after_are_of_the_patients_that_the_difference_is_of():
    many = [case(f"a{i}", 0.5, 0.9, patient="Anna") for i in range(20)]
    found = summarise([*many, *cases((0.8, 0.7), (0.8, 0.7), (0.8, 0.69), (0.8, 0.68))], True, LABELS)
    base, tuned = (0.5 + 4 * 0.8) / 5, (0.9 + 0.7 + 0.7 + 0.69 + 0.68) / 5
    assert f"the Dice went from {base:.3f} to {tuned:.3f} (difference {tuned - base:+.3f}" in found["sentence"]
    dice = found["labels"]["upper"]["Dice"]
    assert (dice["base"]["mean"], dice["tuned"]["mean"]) == pytest.approx((base, tuned))
    assert dice["difference"]["mean"] == pytest.approx(tuned - base)
    assert (dice["tuned"]["n"], dice["tuned"]["n_patients"], dice["difference"]["n"]) == (24, 5, 5)
    assert "are over patients" in comparison_table(found)


def test_before_and_after_of_a_label_are_of_the_same_cases():
    found = summarise(cases((0.5, 0.6), (0.5, 0.6), (0.5, 0.6), (None, 0.1)), True, LABELS)["labels"]["upper"]["Dice"]
    assert (found["tuned"]["mean"], found["tuned"]["n"]) == (pytest.approx(0.6), 3)


def test_a_label_that_got_worse_is_named_though_the_mean_got_better():
    some = [
        CaseComparison(f"c{i}", f"c{i}", scores(upper=0.5, lower=0.6), scores(upper=0.9, lower=0.5 + 0.001 * i))
        for i in range(5)
    ]
    found = summarise(some, True, LABELS)
    assert found["verdict"] == "better" and found["worse_labels"] == ["lower"] and not found["promotable"]
    assert found["sentence"].endswith("Labels that got worse: lower.")


def test_a_better_model_that_has_given_up_labels_is_not_promotable():
    found = summarise(cases(*[(0.5, 0.7)] * 3), True, LABELS, dropped=("core", "hot"))
    assert (found["verdict"], found["promotable"], found["dropped_labels"]) == ("better", False, ["core", "hot"])
    assert found["sentence"].endswith(
        ": better than before. Labels of the base model that it no longer has: core, hot."
    )


def test_a_new_label_has_scores_but_no_difference_and_does_not_count_in_the_verdict():
    some = [CaseComparison(f"c{i}", f"c{i}", scores(upper=0.5), scores(upper=0.7, lower=0.1)) for i in range(3)]
    found = summarise(some, True, LABELS)
    assert found["difference"]["mean"] == pytest.approx(0.2)
    lower = found["labels"]["lower"]["Dice"]
    assert (lower["base"]["n"], lower["tuned"]["n"], lower["difference"]["n"]) == (0, 3, 0)


def test_the_worst_cases_come_first():
    found = summarise(cases((0.5, 0.6), (0.9, 0.5), (0.5, 0.55)), True, LABELS)
    assert [one["case"] for one in found["cases"]] == ["c1", "c2", "c0"]


@pytest.mark.parametrize(("n", "factor"), [(2, 12.706), (3, 4.303), (4, 3.182), (10, 2.262), (60, 2.001)])
def test_intervals_are_students(n, factor):
    values = [0.1 * i for i in range(n)]
    half = factor * np.std(values, ddof=1) / np.sqrt(n)
    assert interval(values) == pytest.approx((np.mean(values) - half, np.mean(values) + half), rel=1e-3)
    assert interval([0.3]) is None


@pytest.mark.parametrize("n", [5, 8, 20])
def test_an_interval_holds_the_true_mean_as_often_as_it_says(n):
    drawn = np.random.default_rng(n).normal(0.0, 0.03, (4000, n))
    bounds = np.array([interval(row) for row in drawn])
    assert np.mean((bounds[:, 0] <= 0) & (bounds[:, 1] >= 0)) == pytest.approx(0.95, abs=0.012)


def test_of_many_labels_hardly_any_gets_worse_by_chance():
    generator, names = np.random.default_rng(0), [f"l{i}" for i in range(17)]
    false = 0
    for _ in range(400):
        drawn = generator.normal(0.0, 0.02, (17, 6))
        p_values = {name: p_value(row) for name, row in zip(names, drawn, strict=True)}
        false += bool(rejected(p_values))
    assert false / 400 < 0.08
    assert rejected({"a": 0.001, "b": 0.03, "c": 0.5}) == {"a"} and rejected({"b": 0.03}) == {"b"}
    assert p_value([0.1]) == 1 and p_value([0.0, 0.0]) == 1 and p_value([0.1, 0.1]) == 0


def test_an_interval_does_not_go_beyond_what_values_can_be():
    assert spread_over_patients([0.1, 1.0], ["p", "q"], (0.0, 1.0))["ci95"] == [0.0, 1.0]
    low, high = spread_over_patients([0.1, 1.0], ["p", "q"])["ci95"]
    assert low < 0 and high > 1


def test_cases_of_one_patient_count_once():
    assert spread_over_patients([0.1, 0.3], ["p", "p"])["ci95"] is None
    found = spread_over_patients([0.1, 0.3, 0.4], ["p", "p", "q"])
    assert found["mean"] == pytest.approx(0.3) and found["ci95"] == pytest.approx(list(interval([0.2, 0.4])))


def test_the_table_and_both_files_are_for_people_and_programs(tmp_path):
    found = summarise(cases((0.5, 0.7), (0.9, 0.6), (0.5, 0.8)), True, LABELS)
    path = write_comparison(tmp_path, found)
    assert json.loads(path.read_text(encoding="utf-8")) == found
    text = (tmp_path / "comparison.txt").read_text(encoding="utf-8")
    assert text.strip() == comparison_table(found)
    lines = text.splitlines()
    assert lines[0] == found["sentence"]
    assert any(line.split()[:2] == ["upper", "Dice"] for line in lines)
    assert [line.split()[0] for line in lines[-3:]] == ["c1", "c0", "c2"]
    comparison_table(summarise(cases((None, 0.7)), True, LABELS))
    comparison_table(summarise([], True, LABELS))


def test_a_dice_of_1_for_what_is_nowhere_is_told():
    some = [
        CaseComparison(f"c{i}", f"c{i}", scores(upper=1, lower=0.5), scores(upper=1, lower=0.6), empty=empty)
        for i, empty in enumerate(({"tuned": {"upper": "both"}}, {"tuned": {"upper": "none"}}))
    ]
    told = "Cases that count as Dice 1 for being empty in reference and tuned result: upper 1."
    assert told in comparison_table(summarise(some, True, LABELS)).splitlines()
    assert "count as Dice 1" not in comparison_table(summarise(some[1:], True, LABELS))


def test_empty_masks_are_counted_where_their_penalty_is_averaged(one):
    dataset, *_ = one
    blind, good = contender(scheme("upper"), 1e6), contender(scheme("upper"), 1.0)
    first = compare_case(dataset, dataset.cases[0], blind, good)
    assert first.empty == {"base": {"Upper": "predicted"}, "tuned": {"Upper": "none"}}
    found = summarise([first, compare_case(dataset, dataset.cases[0], None, good)], True, dataset.scheme)
    upper = found["labels"]["Upper"]
    assert upper["HD95_mm"]["base"]["mean"] == EMPTY_DISTANCE_MM
    assert upper["empty"] == {
        "base": {"predicted": 1, "reference": 0, "both": 0},
        "tuned": {"predicted": 0, "reference": 0, "both": 0},
    }
    lines = comparison_table(found).splitlines()
    (of_distances,) = [line for line in lines if line.split()[:1] == ["HD95_mm"]]
    assert of_distances.split()[-1] == "1/0"
    assert any(line.startswith("empty: ") and "373.1287 mm" in line for line in lines)
    assert "373.1287" not in comparison_table(
        summarise([compare_case(dataset, dataset.cases[0], good, good)], True, dataset.scheme)
    )


# --- one case ------------------------------------------------------------------------------------------------------


GRID = Geometry((12, 14, 16), (2.0, 1.0, 1.5), (5.0, -3.0, 20.0), RAS * [-1, 1, -1])


class Thresholds(torch.nn.Module):
    """Logits that follow the z-scored image: label k above the k-th threshold."""

    def __init__(self, *thresholds):
        super().__init__()
        self.thresholds = thresholds
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        value = x[:, :1]
        return NetworkOutput(torch.cat([torch.zeros_like(value), *((value - t) * 1e3 for t in self.thresholds)], dim=1))


def contender(labels, *thresholds, channels=("T1",)):
    manifest = Manifest(
        name="M",
        id="0" * 32,
        created="",
        network=NetworkConfig(in_channels=len(channels), out_channels=labels.out_channels),
        plan=PreparationPlan(tuple(ChannelPlan(c) for c in channels), GRID.canonical().spacing_mm, False),
        scheme=labels,
        patch=(16, 16, 16),
        sha256="0" * 64,
        weights_bytes=0,
    )
    return Contender(ModelPackage(None, manifest), Thresholds(*thresholds))


@pytest.fixture
def one(tmp_path):
    """A data set of one case: a bright box of label 7 "upper" in a dark volume, on a flipped grid."""
    image = np.random.RandomState(0).normal(0, 0.01, GRID.shape).astype(np.float32)
    label = np.zeros(GRID.shape, np.uint8)
    label[2:8, 3:9, 4:12] = 7
    image[label == 7] += 10
    write_volume(tmp_path / "i.nii.gz", Volume(image, GRID))
    write_volume(tmp_path / "l.nii.gz", Volume(label, GRID))
    from invres.config import Label, LabelScheme

    labels = LabelScheme((Label("Upper", (7,), 7),), ignore_value=9)
    files = Case("one", (tmp_path / "i.nii.gz",), tmp_path / "l.nii.gz")
    return Dataset("D", ("T1",), ("MR",), labels, (files,), tmp_path, "test"), label, tmp_path


def test_a_case_is_scored_by_label_name_whatever_the_values_of_the_models_are(one):
    dataset, label, folder = one
    good, blind = contender(scheme("lower", "upper"), 1e6, 1.0), contender(scheme("upper"), 1e6)
    found = compare_case(dataset, dataset.cases[0], blind, good, folder / "out")
    assert found.tuned["Upper"] == {"Dice": 1.0, "HD95_mm": 0.0, "VolumeError_ml": 0.0}
    assert found.base["Upper"]["Dice"] == 0 and found.base["Upper"]["VolumeError_ml"] == pytest.approx(
        label.astype(bool).sum() * 3.0 / 1000
    )
    assert found.difference() == 1 and found.worst_point_mm is None
    from invres.volume import read_volume

    written = read_volume(found.files["tuned"], kind="labels")
    assert set(np.unique(written.canonical().array)) == {0, 2}, "the model's own values"


def test_the_worst_point_is_the_middle_of_the_largest_error_in_ras(one):
    dataset, label, _ = one
    found = compare_case(dataset, dataset.cases[0], None, contender(scheme("upper"), 1e6))
    index = np.linalg.inv(GRID.affine) @ [*found.worst_point_mm, 1]
    place = tuple(np.round(index[:3]).astype(int))
    # The box is 6, 6 and 8 voxels of 2, 1 and 1.5 mm: its middle is 3 mm from the nearest side, along the second axis.
    assert label[place] == 7 and place[1] in (5, 6) and 3 <= place[0] <= 6 and 5 <= place[2] <= 10
    assert found.base == {} and found.difference() is None


def test_voxels_to_ignore_count_for_nobody(one):
    dataset, label, folder = one
    label[9:] = 9
    label[2:4] = np.where(label[2:4] == 7, 9, label[2:4])
    write_volume(folder / "l.nii.gz", Volume(label, GRID))
    found = compare_case(dataset, dataset.cases[0], None, contender(scheme("upper"), 1.0))
    assert found.tuned["Upper"]["Dice"] == 1


def test_a_model_whose_channel_is_missing_is_told(one):
    dataset, *_ = one
    assert channels_for([ChannelPlan("T2"), ChannelPlan("t1")], ("T1", "T2")) == [1, 0]
    assert channels_for([ChannelPlan("T2"), ChannelPlan("PD")], ("T1", "T2")) is None
    with pytest.raises(InvresError, match="takes the channels T2, PD") as caught:
        compare_case(dataset, dataset.cases[0], None, contender(scheme("upper"), 1.0, channels=("T2", "PD")))
    assert caught.value.hint


def test_a_label_on_another_grid_is_told(one):
    dataset, label, folder = one
    other = Geometry(GRID.shape, (2.0, 1.0, 1.6), GRID.origin_mm, GRID.direction)
    write_volume(folder / "l.nii.gz", Volume(label, other))
    with pytest.raises(InvresError, match="another grid"):
        compare_case(dataset, dataset.cases[0], None, contender(scheme("upper"), 1.0))


def test_the_verb_explains_itself():
    told = " ".join(invres("finetune", "--help").out.split())
    assert "--check-base" in told and "in a run of a single training, on more than 5 patients" in told


def test_a_label_that_was_given_up_counts_as_forgotten():
    array = np.zeros((4, 4, 4), np.uint8)
    array[0], array[1] = 1, 2
    grid = Geometry((4, 4, 4), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), np.eye(3))
    both = LabelScheme((Label("kept", (1,), 1), Label("given up", (2,), 2)))
    kept = LabelScheme(both.labels[:1])
    found = Volume(np.where(array == 1, 1, 0).astype(np.uint8), grid)
    scores, empty, wrong = casecomparison._scores(found, Volume(array, grid), kept, both, {"kept": {}, "given up": {}})
    assert empty == {"kept": "none", "given up": "predicted"}
    assert (scores["kept"]["Dice"], scores["given up"]["Dice"]) == (1.0, 0.0) and wrong.any()
    scores, _, wrong = casecomparison._scores(found, Volume(array, grid), kept, both)
    assert set(scores) == {"kept"} and not wrong.any()
