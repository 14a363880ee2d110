"""The recipes of published data sets, on tiny files in exactly their layouts, from training to scores."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from tiny_datasets import invres, leftovers, write_dataset
from tiny_layouts import brats, hcp, iseg, iseg_nifti, kits19, task01, task04

from invres import heldout
from invres.cases import read_dataset, split_by_count, split_cases
from invres.config import Label, LabelScheme, PreparationPlan, Recipe
from invres.events import Recorder
from invres.trainingrun import TrainOptions, choosing_names, write_run

RECIPES = Path(__file__).resolve().parents[2] / "Resources" / "Recipes"
TUMOUR = ("whole_tumour", "tumour_core", "enhancing_tumour")
LAYOUTS = {
    "iSeg, Analyze": (iseg, "iseg", ("T1", "T2"), ("CSF", "GM", "WM")),
    "iSeg, NIfTI": (iseg_nifti, "iseg", ("T1", "T2"), ("CSF", "GM", "WM")),
    "BraTS 2020": (brats, "brats", ("T1", "T1ce", "T2", "FLAIR"), TUMOUR),
    "KiTS19": (kits19, "kits19", ("CT",), ("kidney", "tumour")),
    "HCP": (hcp, "default", ("T1", "T2"), ("left white matter", "left cortex", "right white matter", "right cortex")),
    "Decathlon, Task01": (
        task01,
        "brats",
        ("FLAIR", "T1w", "t1gd", "T2w"),
        ("edema", "non-enhancing tumor", "enhancing tumour"),
    ),
    "Decathlon, Task04": (task04, "hippocampus-t1", ("MRI",), ("Anterior", "Posterior")),
}


def shrunk(name: str, path: Path, spacing_mm: float = 1.0, **training) -> Path:
    """The recipe as it is, but for a tiny network, patches of 16 voxels and two iterations."""
    recipe = json.loads((RECIPES / f"{name}.json").read_text(encoding="utf-8"))
    recipe["network"]["channels"] = [4, 16]
    recipe["spacing_mm"] = [spacing_mm] * 3
    recipe["training"] |= {"patch": [16, 16, 16], "iterations_per_epoch": 2, "epochs": 1, **training}
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def succeeded(*arguments):
    """The result of a command."""
    outcome = invres(*arguments, "--json")
    assert outcome.code == 0, outcome
    return outcome.events[-1]


def train_and_score(data: Path, recipe: Path, folder: Path):
    """Trains, scores what was held out, and segments and scores one of it by hand; the package's manifest."""
    run, device = folder / "run", ("--device", "cpu")
    succeeded("train", "--data", data, "--recipe", recipe, "--output", run, "--validation-count", 1, *device)
    scored = succeeded("evaluate", "--run", run, "--data", data, "--output", folder / "metrics.json", *device)
    dataset = read_dataset(data)
    (held_out,) = json.loads((run / "run.json").read_text(encoding="utf-8"))["split"]["validation"]
    case = dataset.case(held_out)
    names = [""] if dataset.channels_in_one_file else [f"{name}=" for name in dataset.channel_names]
    inputs = [part for name, path in zip(names, case.images, strict=True) for part in ("--input", f"{name}{path}")]
    mine = folder / "mine.seg.nrrd"
    succeeded("segment", "--model", run / "model", *inputs, "--output", mine, *device)
    by_hand = succeeded("evaluate", "-p", mine, "-r", case.label, "-d", data, "-o", folder / "one.json")
    assert scored["summary"] == by_hand["summary"]
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["epoch_chosen_on"] == [held_out]
    assert leftovers(folder / "run") == []
    return json.loads((run / "model" / "manifest.json").read_text(encoding="utf-8")), scored["summary"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_data_set_as_downloaded_is_trained_segmented_and_scored_by_the_documented_commands(tmp_path, layout):
    write, recipe, channels, labels = LAYOUTS[layout]
    data = write(tmp_path / "data")
    manifest, summary = train_and_score(data, shrunk(recipe, tmp_path / "recipe.json"), tmp_path)
    assert tuple(channel["name"] for channel in manifest["plan"]["channels"]) == channels
    assert tuple(summary) == labels
    assert all(summary[label]["Dice"]["n"] == 1 for label in labels)
    card = {label: manifest["metrics"][label]["Dice"]["mean"] for label in labels}
    assert card == pytest.approx({label: summary[label]["Dice"]["mean"] for label in labels}, abs=1e-9)
    assert manifest["training"]["training_cases"] == 2 and manifest["training"]["iterations"] == 2
    assert (manifest["network"]["vae"] is not None) == (recipe in ("iseg", "brats"))


@pytest.mark.parametrize(("name", "side"), [("iseg", 64), ("brats", 128)])
def test_the_papers_settings_are_those_of_its_recipes(name, side):
    """Sections 2 and 3.3 and 3.4 of arXiv 2103.09042, equation 2."""
    recipe = Recipe.read(RECIPES / f"{name}.json")
    assert recipe.network.name == "fully_invres" and recipe.network.vae is not None
    assert recipe.training.patch == (side,) * 3
    assert recipe.training.learning_rate == 2e-4 and recipe.training.weight_decay == 0
    loss = recipe.training.loss
    assert (loss.cross_entropy, loss.dice, loss.reconstruction, loss.kullback_leibler) == (1, 1, 0.1, 0.1)


def test_iseg_is_split_nine_to_one_and_brats_eighty_to_twenty(tmp_path):
    subjects, patients = tmp_path / "iseg", tmp_path / "brats"
    subjects.mkdir()
    for number in range(1, 11):
        for name in ("T1", "T2", "label"):
            (subjects / f"subject-{number}-{name}.hdr").touch()
    for number in range(1, 370):
        folder = patients / f"BraTS20_Training_{number:03d}"
        folder.mkdir(parents=True)
        for name in ("flair", "t1", "t1ce", "t2", "seg"):
            (folder / f"{folder.name}_{name}.nii").touch()
    nine, one = split_by_count(read_dataset(subjects), 1)
    assert (len(nine), len(one)) == (9, 1) and not set(nine) & set(one)
    assert (nine, one) == split_by_count(read_dataset(subjects), 1)
    eighty, twenty = split_cases(read_dataset(patients))
    assert (len(eighty), len(twenty)) == (295, 74) and not set(eighty) & set(twenty)
    assert (eighty, twenty) == split_cases(read_dataset(patients))


def test_the_branch_is_left_out_of_a_baseline(tmp_path):
    recipe = json.loads(shrunk("iseg", tmp_path / "recipe.json").read_text(encoding="utf-8"))
    del recipe["network"]["channels"]
    recipe["network"]["levels"] = 2
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    options = ("--recipe", tmp_path / "recipe.json", "--validation-count", 1, "--device", "cpu")
    data = iseg(tmp_path, cases=2)
    succeeded("train", "--data", data, *options, "--network", "unet3d", "--no-vae", "--output", tmp_path / "run")
    network = json.loads((tmp_path / "run" / "model" / "manifest.json").read_text(encoding="utf-8"))["network"]
    assert network["name"] == "unet3d" and network["vae"] is None


def test_what_cannot_be_scored_is_told(tmp_path):
    data, output = iseg(tmp_path, cases=2), tmp_path / "metrics.json"

    def told(*arguments):
        outcome = invres("evaluate", *arguments, "--output", output, "--json")
        assert outcome.code == 2 and not output.exists()
        return outcome.events[-1]["message"]

    assert "either" in told("--predictions", data)
    assert "either" in told("--run", data, "--predictions", data)
    assert "no training in" in told("--run", data)
    assert "no training in" in told("--run", data, "--data", data)
    run = tmp_path / "run"
    recipe = shrunk("iseg", tmp_path / "recipe.json")
    command = ("--data", data, "--recipe", recipe, "--output", run, "--device", "cpu")
    succeeded("train", *command, "--fold", "all")
    assert "held none out" in told("--run", run, "--data", data)


# --- real images, a few iterations each ------------------------------------------------------------------------------


def test_real_tumours_in_the_layout_of_task01_are_trained_on(data_dir, tmp_path):
    """Two cases of the Decathlon's Task01, slabs of the head, at 3 mm; its dataset.json is written as published."""
    source = data_dir / "brain_tumour_msd"
    if not (source / "imagesTr").is_dir():
        pytest.skip(f"no cases of Task01 in {source}")
    (data := tmp_path / "Task01_BrainTumour").mkdir()
    published = json.loads((task01(tmp_path / "form") / "dataset.json").read_text(encoding="utf-8"))
    names = sorted(path.name for path in (source / "imagesTr").glob("BRATS_*.nii.gz"))
    published["training"] = [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names]
    for folder in ("imagesTr", "labelsTr"):
        (data / folder).symlink_to(source / folder, target_is_directory=True)
    (data / "dataset.json").write_text(json.dumps(published), encoding="utf-8")
    recipe = shrunk("brats", tmp_path / "recipe.json", 3.0, patch=[32, 32, 32])
    manifest, summary = train_and_score(data, recipe, tmp_path)
    assert manifest["training"]["iterations"] == 2
    assert tuple(summary) == ("edema", "non-enhancing tumor", "enhancing tumour")


def test_real_t1_and_t2_in_the_layout_of_iseg_are_trained_on(data_dir, tmp_path):
    """Two real brains at 4 mm; their label maps are automatic ones, so the Dice says nothing."""
    source = data_dir / "brain_t1_t2_emsegment"
    first, second = source / "EMSeg-Brain-MRT1T2_small", source / "TutorialTest2"
    if not first.is_dir():
        pytest.skip(f"no T1 and T2 in {source}")
    targets = second / "VolumeData" / "Target"
    files = {
        1: (
            first / "VolumeData_Input" / "Target" / "t1_small.nhdr",
            first / "VolumeData_Input" / "Target" / "t2_small.nhdr",
            first / "VolumeData_Output" / "Segmentation-BrainTutorial-Defaults_small.nhdr",
        ),
        2: (targets / "spgr_med.nhdr", targets / "t2w_med.nhdr", second / "StandardData" / "Segmentation_med.nhdr"),
    }
    data = tmp_path / "iSeg-2019-Training"
    data.mkdir()
    for number, paths in files.items():
        t1 = sitk.ReadImage(str(paths[0]))
        for name, path in zip(("T1", "T2", "label"), paths, strict=True):
            image = sitk.ReadImage(str(path))
            nearest = sitk.sitkNearestNeighbor if name == "label" else sitk.sitkLinear
            image = sitk.Resample(image, t1, sitk.Transform(), nearest)
            if name == "label":
                found = sitk.GetArrayFromImage(image)
                values = sorted(set(np.unique(found).tolist()) - {0})[-3:]
                tissues = np.zeros(found.shape, np.uint8)
                for value, iseg_value in zip(values, (10, 150, 250), strict=False):
                    tissues[found == value] = iseg_value
                image = sitk.GetImageFromArray(tissues)
                image.CopyInformation(t1)
            sitk.WriteImage(image, str(data / f"subject-{number}-{name}.nii.gz"))
    recipe = shrunk("iseg", tmp_path / "recipe.json", 4.0, patch=[32, 32, 32])
    manifest, summary = train_and_score(data, recipe, tmp_path)
    assert manifest["training"]["iterations"] == 2 and tuple(summary) == ("CSF", "GM", "WM")


@pytest.mark.parametrize(
    ("training", "chosen"),
    [
        ({}, ("a", "b", "c")),
        ({"validation_cases": 2}, ("a", "b")),
        ({"epochs": 200, "validate_every": 200}, ()),
        ({"epochs": 200, "validate_every": 199}, ("a", "b", "c")),
    ],
)
def test_the_cases_that_chose_the_epoch_are_known(tmp_path, training, chosen):
    (tmp_path / "recipe.json").write_text(json.dumps({"name": "r", "training": training}), encoding="utf-8")
    recipe, labels = Recipe.read(tmp_path / "recipe.json"), LabelScheme((Label("organ", (1,), 1),))
    write_run(tmp_path, recipe, PreparationPlan(), (("t",), ("a", "b", "c")), labels, TrainOptions())
    assert choosing_names(tmp_path) == chosen


def test_a_warning_of_a_held_out_case_names_it(tmp_path, monkeypatch):
    dataset, report = read_dataset(write_dataset(tmp_path / "data", cases=2)), Recorder()

    def segmented(*_, report, **__):
        report.progress("segment.tiles", 1, 1)
        report.warning("Unusual volumes: core 9 mL.")

    (tmp_path / "model").mkdir()
    monkeypatch.setattr(heldout, "held_out_names", lambda _: ("patient01",))
    package = SimpleNamespace(manifest=SimpleNamespace(plan=PreparationPlan(), members=1))
    monkeypatch.setattr(heldout, "open_package", lambda _: package)
    monkeypatch.setattr(heldout, "segment", segmented)
    heldout.segment_held_out(tmp_path, dataset, "cpu", report)
    (warning,) = [event for event in report.events if event["event"] == "warning"]
    assert warning["message"] == "patient01: Unusual volumes: core 9 mL." and warning["case"] == "patient01"
    assert {event["stage"] for event in report.events if event["event"] == "progress"} == {"evaluate.segment"}
