"""Scoring what trainings held out: the folds of a cross-validation together, their data found again, refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from scipy import stats
from tiny_datasets import invres, write_dataset, write_recipe

from invres.config import LabelScheme, PreparationPlan
from invres.console import recipe_named
from invres.trainingrun import TrainOptions, write_run

DEVICE = ("--device", "cpu")


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """(data, runs): four cases of three patients, and a training of two steps for each fold."""
    folder = tmp_path_factory.mktemp("folds")
    data, recipe = write_dataset(folder / "data", cases=4), write_recipe(folder / "tiny.json", epochs=1)
    file = data / "dataset.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    for name in ("patient02", "patient03"):
        description["dataset"][name]["patient"] = "Anna"
    file.write_text(json.dumps(description), encoding="utf-8")
    runs = [folder / f"fold{fold}" for fold in range(3)]
    for fold, run in enumerate(runs):
        outcome = invres("train", "-d", data, "-r", recipe, "-o", run, "--fold", fold, *DEVICE)
        assert outcome.code == 0, outcome.err
    return data, runs


@pytest.fixture
def copies(folds, tmp_path):
    """Runs of the same folds that a test may change."""
    without = shutil.ignore_patterns("held_out")
    return [shutil.copytree(run, tmp_path / run.name, ignore=without) for run in folds[1]]


def changed(run, change):
    """run.json after `change` has worked on its content."""
    file = run / "run.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def scored(output, *arguments):
    outcome = invres("evaluate", *arguments, "--output", output, *DEVICE, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(output.read_text(encoding="utf-8")), outcome.events[-1]


def refused(output, *arguments):
    outcome = invres("evaluate", *arguments, "--output", output, *DEVICE, "--json")
    assert outcome.code == 2 and not output.exists(), outcome.out
    return outcome.events[-1]["message"], outcome.events[-1]["hint"]


def test_the_folds_of_a_cross_validation_are_scored_together(folds, tmp_path):
    _, runs = folds
    together, result = scored(tmp_path / "all.json", "--run", runs[0], "--run", *runs[1:])
    apart = [scored(tmp_path / "one.json", "--run", run)[0] for run in runs]
    cases = {case["name"]: case for case in together["metric_per_case"]}
    assert sorted(cases) == [f"patient{number:02d}" for number in range(4)] and len(together["metric_per_case"]) == 4
    for one in apart:
        for case in one["metric_per_case"]:
            assert cases[case["name"]] == case, "each case by the model that had not seen it"
    patients = [cases[name]["patient"] for name in sorted(cases)]
    assert patients == ["patient00", "patient01", "Anna", "Anna"]
    dice = together["summary"]["lower"]["Dice"]
    values = {name: case["metrics"]["2"]["Dice"] for name, case in cases.items()}
    assert (dice["n"], dice["n_patients"]) == (4, 3)
    of_patients = [values["patient00"], values["patient01"], (values["patient02"] + values["patient03"]) / 2]
    assert dice["mean"] == pytest.approx(np.mean(of_patients)) and dice["sd"] == pytest.approx(
        np.std(of_patients, ddof=1)
    )
    low, high = stats.t.interval(0.95, 2, np.mean(of_patients), stats.sem(of_patients))
    assert dice["ci95"] == pytest.approx([max(0, low), min(1, high)])
    assert sorted(together["epoch_chosen_on"]) == sorted(cases)
    assert result["event"] == "result" and result["summary"] == together["summary"]


def test_files_scored_with_their_data_set_know_its_patients(folds, tmp_path):
    data, runs = folds
    (predictions := tmp_path / "p").mkdir()
    for run in runs:
        scored(tmp_path / "m.json", "--run", run)
        for file in (run / "held_out").iterdir():
            shutil.copy(file, predictions)
    files = ("-p", predictions, "-r", data / "labelsTr")
    for more, patients in ((("-d", data), ["patient00", "patient01", "Anna", "Anna"]), ((), None)):
        cases = scored(tmp_path / "m.json", *files, *more)[0]["metric_per_case"]
        assert [case["patient"] for case in cases] == (patients or [case["name"] for case in cases])


def test_a_person_is_told_that_every_epoch_was_chosen_by_what_is_scored(folds, tmp_path):
    outcome = invres("evaluate", "--run", *folds[1], "--output", tmp_path / "m.json", *DEVICE)
    assert "The epoch of each training was chosen by the Dice of 4 of these cases" in outcome.out


def test_data_that_have_moved_are_asked_for(folds, copies, tmp_path):
    data, _ = folds
    moved = tmp_path / "gone"
    for run in copies:
        changed(run, lambda content: content.update(data=str(moved)))
    message, hint = refused(tmp_path / "m.json", "--run", *copies)
    assert message == f"The data set of the training in {copies[0]} is not at {moved} any more." and "--data" in hint
    assert scored(tmp_path / "m.json", "--run", *copies, "--data", data)[0]["summary"]["upper"]["Dice"]["n"] == 4


def test_a_run_of_an_earlier_version_asks_for_its_data_and_knows_them_once_resumed(folds, copies, tmp_path):
    data, run = folds[0], copies[0]
    changed(run, lambda content: content.pop("data"))
    message, hint = refused(tmp_path / "m.json", "--run", run)
    assert message.startswith(f"The training in {run} does not say where its data set is") and "--data" in hint
    known = scored(tmp_path / "given.json", "--run", run, "--data", data)[0]
    assert invres("train", "-d", data, "-o", run, "--resume", *DEVICE).code == 0
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["data"] == str(data)
    assert scored(tmp_path / "found.json", "--run", run)[0]["mean"] == known["mean"]


def test_a_relative_path_is_found_from_any_folder(folds, tmp_path, monkeypatch):
    data, runs = folds
    monkeypatch.chdir(data.parent)
    recipe = write_recipe(tmp_path / "tiny.json", epochs=1)
    assert invres("train", "-d", "data", "-r", recipe, "-o", tmp_path / "run", *DEVICE).code == 0
    monkeypatch.chdir(tmp_path)
    found, given = scored(tmp_path / "m.json", "--run", "run")[0], scored(tmp_path / "n.json", "--run", runs[0])[0]
    assert found["mean"] == given["mean"]


def test_a_case_that_two_runs_held_out_is_refused_before_anything_is_segmented(copies, tmp_path):
    for twice in ((copies[1], copies[1]), (copies[0], shutil.copytree(copies[0], tmp_path / "again"))):
        message, _ = refused(tmp_path / "m.json", "--run", *twice)
        assert f" was held out in {twice[0]} and in {twice[1]}, and can be scored only once." in message
    assert not any((run / "held_out").exists() for run in copies)


def test_runs_of_other_labels_are_refused_before_anything_is_segmented(copies, tmp_path):
    changed(copies[1], lambda content: content["scheme"]["labels"][2].update(name="middle"))
    message, _ = refused(tmp_path / "m.json", "--run", *copies)
    assert f"labels of {copies[1]} (upper = 1, lower = 2, middle = 3) are not those of {copies[0]} (upper" in message
    assert not (copies[0] / "held_out").exists()


def test_a_fold_that_is_not_finished_is_told_before_the_others_are_segmented(copies, tmp_path):
    shutil.rmtree(copies[2] / "model")
    assert refused(tmp_path / "m.json", "--run", *copies)[0] == f"The training in {copies[2]} is not finished."
    assert not (copies[0] / "held_out").exists()


@pytest.mark.parametrize(("recipe", "told"), [("brain-any-contrast", "label maps"), ("iqt", "enhances images")])
def test_a_training_without_images_to_segment_says_where_its_figures_are(recipe, told, tmp_path):
    write_run(tmp_path, recipe_named(recipe), PreparationPlan(), (("a",), ("b",)), LabelScheme(), TrainOptions())
    message, hint = refused(tmp_path / "m.json", "--run", tmp_path)
    assert told in message and f"{tmp_path / 'model'}" in hint
