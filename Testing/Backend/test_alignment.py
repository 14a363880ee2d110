"""Channels on different grids: refused unless asked for, then brought to one grid wherever they are read."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import SimpleITK as sitk
from grids import RAS, rotation
from test_inference import package_of
from tiny_datasets import invres, write_dataset, write_recipe

from invres import InvresError
from invres.alignment import align_channels, overlap, resampled_sentence
from invres.cases import aligned_as_begun, read_dataset
from invres.events import Recorder
from invres.modelpackage import open_package
from invres.prepared import prepare_cases
from invres.preprocessing import make_plan
from invres.volume import Geometry, Volume, read_volume, resample, write_volume

GRID = Geometry((20, 17, 23), (2.5, 1.1, 0.8), (3.0, -7.5, 11.0), rotation(9) @ RAS)


def around(grid, factor=1.4, turn=None, axes=(0, 1, 2), size=1.6):
    """A coarser grid with the same middle, turned and with its axes in another order; of 1.6 times the size, so that it
    covers the whole of it."""
    direction = (rotation(17) if turn is None else turn) @ grid.direction
    spacing = np.multiply(grid.spacing_mm, factor)
    shape = np.ceil(np.multiply(grid.shape, grid.spacing_mm) * size / spacing).astype(int)
    middle = grid.affine[:3, :3] @ ((np.array(grid.shape) - 1) / 2) + grid.origin_mm
    origin = middle - direction @ (spacing * (shape - 1) / 2)
    return Geometry(shape[list(axes)], spacing[list(axes)], origin, direction[:, list(axes)])


def image(grid, seed=0, lowest=0.0):
    array = np.random.default_rng(seed).uniform(lowest, 300, grid.shape).astype(np.float32)
    return Volume(array, grid)


def by_simpleitk(moving, fixed, target):
    """What a person does beforehand: the file on the other one's grid."""
    volume, wanted = sitk.ReadImage(str(moving), sitk.sitkFloat32), sitk.ReadImage(str(fixed))
    lowest = float(sitk.GetArrayViewFromImage(volume).min())
    sitk.WriteImage(sitk.Resample(volume, wanted, sitk.Transform(), sitk.sitkLinear, lowest), str(target))


# --- one case -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("turn", "axes"), [(np.eye(3), (0, 1, 2)), (None, (0, 1, 2)), (None, (2, 0, 1))])
def test_a_channel_comes_to_the_first_ones_grid_as_with_simpleitk(tmp_path, turn, axes):
    first, second = image(GRID), image(around(GRID, turn=turn, axes=axes), 1)
    aligned, moved = align_channels([first, None, second], ["T1", "FLAIR", "T2"])
    assert moved == ["T2"] and aligned[0] is first and aligned[1] is None
    write_volume(tmp_path / "t1.nrrd", first)
    write_volume(tmp_path / "t2.nrrd", second)
    by_simpleitk(tmp_path / "t2.nrrd", tmp_path / "t1.nrrd", tmp_path / "wanted.nrrd")
    wanted = read_volume(tmp_path / "wanted.nrrd")
    assert aligned[2].geometry.same_as(GRID)
    assert np.allclose(aligned[2].array, wanted.array, atol=1e-3)


def test_where_a_channel_ends_it_has_its_smallest_value():
    half = Geometry((GRID.shape[0] * 2 // 3, *GRID.shape[1:]), GRID.spacing_mm, GRID.origin_mm, GRID.direction)
    (_, aligned), _ = align_channels([image(GRID), image(half, 1, lowest=-1000)], ["MR", "CT"])
    assert (aligned.array[half.shape[0] + 1 :] == image(half, 1, lowest=-1000).array.min()).all()


def test_what_lies_on_the_same_voxels_is_left_as_it_is_however_it_is_stored():
    first = image(GRID)
    other = first.canonical()
    flipped = Geometry.from_affine(other.geometry.affine @ np.diag([-1, 1, 1, 1]), other.geometry.shape)
    origin = other.geometry.affine @ [other.geometry.shape[0] - 1, 0, 0, 1]
    flipped = dataclasses.replace(flipped, origin_mm=tuple(origin[:3]))
    stored = Volume(other.array[::-1], flipped)
    aligned, moved = align_channels([first, stored], ["T1", "T2"])
    assert moved == [] and aligned[1] is stored
    assert resampled_sentence([moved]) == ""


@pytest.mark.parametrize(
    ("shift", "told"),
    [((0, 0, 500), "T2 of the case eve does not overlap T1"), ((0, 0, 0.7), r"covers only 3\d % of T1")],
)
def test_what_covers_less_than_half_of_the_first_is_refused(shift, told):
    wide = Geometry((20, 20, 20), (1.0, 1.0, 1.0), (0, 0, 0), RAS)
    moved = RAS @ np.multiply(shift, 20)
    apart = Geometry(wide.shape, wide.spacing_mm, tuple(moved), RAS)
    with pytest.raises(InvresError, match=told) as caught:
        align_channels([image(wide), image(apart)], ["T1", "T2"], "eve")
    assert caught.value.code == "grid_mismatch" and "registered" in caught.value.hint
    near = Geometry(wide.shape, wide.spacing_mm, tuple(RAS @ np.array([0, 0, 8.0])), RAS)
    assert overlap(wide, near) == pytest.approx(0.6, abs=0.04)
    assert align_channels([image(wide), image(near)], ["T1", "T2"])[1] == ["T2"]


# --- a data set -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two data sets of the same patients: in `mixed` the T2 of two of three lies on other grids; in `plain` all is on
    the grid of T1, as SimpleITK brings it there."""
    folder = tmp_path_factory.mktemp("sets")
    mixed, plain = (write_dataset(folder / name) for name in ("mixed", "plain"))
    for case, axes in (("patient00", (0, 1, 2)), ("patient02", (2, 0, 1))):
        t1, t2 = (mixed / f"imagesTr/{case}_000{number}.nii.gz" for number in (0, 1))
        volume = read_volume(t2)
        write_volume(t2, resample(volume, around(volume.geometry, factor=0.8, axes=axes)))
        by_simpleitk(t2, t1, plain / f"imagesTr/{t2.name}")
    return mixed, plain


@pytest.fixture(scope="module")
def trained(sets, tmp_path_factory):
    """Both, trained on: the runs, and what the first command said."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = write_recipe(folder / "recipe.json", epochs=1)
    common = ("train", "-r", recipe, "--validation-count", "1", "--device", "cpu", "--json")
    aligned = invres(*common, "-d", sets[0], "-o", folder / "mixed", "--align")
    assert aligned.code == 0, aligned.out
    assert invres(*common, "-d", sets[1], "-o", folder / "plain").code == 0
    return folder / "mixed", folder / "plain", aligned


def notes(outcome):
    return [event["message"] for event in outcome.of("note")]


def test_without_the_option_they_are_refused_with_its_name(sets, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.json", epochs=1)
    outcome = invres("train", "-d", sets[0], "-r", recipe, "-o", tmp_path / "run", "--device", "cpu", "--json")
    (error,) = outcome.of("error")
    assert outcome.code == 2 and "T1 and T2 of the case patient00 lie on different grids" in error["message"]
    assert "--align" in error["hint"]


def test_the_doctor_says_what_will_be_done_with_and_without(sets):
    for more, severity, words in (((), "error", "--align"), (("--align",), "note", "nothing is registered")):
        findings = invres("check", "-d", sets[0], *more, "--json").of("result")[0]["findings"]
        assert [(one["case"], one["severity"], one["code"]) for one in findings] == [
            ("patient00", severity, "grid_mismatch"),
            ("patient02", severity, "grid_mismatch"),
        ]
        assert all(words in one["action"] for one in findings)


def test_a_training_is_the_one_of_images_that_were_resampled_beforehand(trained):
    mixed, plain, outcome = trained
    one, other = (open_package(run / "model").manifest for run in (mixed, plain))
    assert one.sha256 == other.sha256 and one.metrics == other.metrics
    assert one.plan.aligned and not other.plan.aligned
    said = [note for note in notes(outcome) if note.startswith("Resampled")]
    assert len(said) == 1 and said[0].endswith("without registration: T2 in 2 of 3 cases.")


def test_a_run_goes_on_as_it_was_begun(sets, trained, tmp_path):
    mixed, plain, _ = trained
    content = json.loads((mixed / "run.json").read_text(encoding="utf-8"))
    assert content["plan"]["aligned"] is True
    prepared = {path.name for path in (mixed / "prepared").iterdir()}
    for run, data, more in ((mixed, sets[0], ()), (plain, sets[1], ("--align",))):
        command = ("train", "-d", data, "-o", run, "--resume", "--epochs", "2", "--device", "cpu", "--json")
        outcome = invres(*command, "-r", run.parent / "recipe.json", *more)
        assert outcome.code == 0, outcome.out
        assert any("as it was started, without --align" in one["message"] for one in outcome.of("warning")) == bool(
            more
        )
    assert {path.name for path in (mixed / "prepared").iterdir()} == prepared, "nothing is prepared otherwise"
    one, other = (open_package(run / "model").manifest for run in (mixed, plain))
    assert one.sha256 == other.sha256 and one.training.epochs == 2 and one.plan.aligned


def test_what_a_run_held_out_is_scored_as_it_was_trained(sets, trained, tmp_path):
    scores = []
    for run, data in zip(trained[:2], sets, strict=True):
        outcome = invres("evaluate", "--run", run, "-d", data, "-o", tmp_path / f"{run.name}.json", "--json")
        assert outcome.code == 0, outcome.out
        scores.append(outcome.of("result")[0]["summary"])
    assert scores[0] == scores[1]


def test_segmenting_gives_what_resampling_beforehand_gives(sets, trained, tmp_path):
    model = trained[0] / "model"

    def command(folder, case, output):
        files = [f"{name}={folder}/imagesTr/{case}_000{place}.nii.gz" for place, name in enumerate(("T1", "T2"))]
        return ("segment", "-m", model, "-i", files[0], "-i", files[1], "-o", output, "--device", "cpu", "--json")

    refused = invres(*command(sets[0], "patient00", tmp_path / "a.nii.gz"))
    assert refused.code == 2 and "--align" in refused.of("error")[0]["hint"]
    aligned = invres(*command(sets[0], "patient00", tmp_path / "a.nii.gz"), "--align")
    assert aligned.code == 0, aligned.out
    assert invres(*command(sets[1], "patient00", tmp_path / "b.nii.gz")).code == 0
    one, other = (read_volume(tmp_path / name, kind="labels") for name in ("a.nii.gz", "b.nii.gz"))
    assert np.array_equal(one.array, other.array) and one.geometry.same_as(other.geometry)
    result = aligned.of("result")[0]
    assert result["resampled_channels"] == ["T2"] and result["settings"]["align"] is True
    assert sum("without registration: T2." in note for note in notes(aligned)) == 1
    same = invres(*command(sets[0], "patient01", tmp_path / "c.nii.gz"), "--align")
    assert same.of("result")[0]["resampled_channels"] == [] and not any("Resampled" in note for note in notes(same))


def test_many_cases_are_aligned_with_one_note_and_a_record_that_says_so(sets, trained, tmp_path):
    command = (
        "segment",
        "-m",
        trained[0] / "model",
        "-d",
        sets[0],
        "-o",
        tmp_path / "out",
        "--device",
        "cpu",
        "--json",
    )
    outcome = invres(*command, "--align")
    assert outcome.code == 0, outcome.out
    assert next(note for note in notes(outcome) if "Resampled" in note).endswith("T2 in 2 of 3 cases.")
    record = json.loads((tmp_path / "out" / "segmentations.json").read_text(encoding="utf-8"))
    assert record["settings"]["align"] is True
    assert {name: entry["resampled_channels"] for name, entry in record["cases"].items()} == {
        **{"patient00": ["T2"], "patient01": [], "patient02": ["T2"]}
    }
    again = invres(*command)
    assert again.code == 2 and "with other settings" in again.of("error")[0]["message"]


def test_a_model_of_aligned_channels_is_fine_tuned_and_proved_on_them(sets, trained, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.json", epochs=1)
    common = ("finetune", "-d", sets[0], "-r", recipe, "--promote", "--device", "cpu", "--json")
    one_part = ("--validation-count", "1")
    child = invres(*common, "-m", trained[0] / "model", "-o", tmp_path / "child", *one_part, "--check-base", sets[0])
    assert child.code == 0, child.out
    result = child.of("result")[0]
    assert result["skipped_cases"] == [] and open_package(result["model"]).manifest.plan.aligned
    assert result["base_check"] is not None
    (case,) = json.loads((tmp_path / "child" / "comparison.json").read_text(encoding="utf-8"))["cases"]
    assert case["base"] and case["tuned"]
    again = invres(*common, "-m", trained[0] / "model", "-o", tmp_path / "child", "--resume")
    assert again.code == 0, again.out

    other = invres(*common, "-m", trained[1] / "model", "-o", tmp_path / "other")
    assert [one["case"] for one in other.of("result")[0]["skipped_cases"]] == ["patient00", "patient02"]
    asked = invres(*common, "-m", trained[1] / "model", "-o", tmp_path / "asked", *one_part, "--align")
    assert asked.of("result")[0]["skipped_cases"] == []


def test_what_was_prepared_aligned_is_kept_apart(sets, tmp_path):
    names = ["patient01"]
    dataset = read_dataset(sets[0])
    plan = make_plan(dataset, names)
    for one in (dataset, dataclasses.replace(dataset, aligned=True), dataset):
        prepare_cases(one, names, plan, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_label_drawn_on_another_channel_is_refused_with_what_to_do(sets, tmp_path):
    data = write_dataset(tmp_path / "data", cases=1)
    label, t2 = data / "labelsTr/patient00.nii.gz", data / "imagesTr/patient00_0001.nii.gz"
    grid = around(read_volume(t2).geometry, factor=0.8, size=1.0)
    write_volume(t2, resample(read_volume(t2), grid))
    write_volume(label, resample(read_volume(label, kind="labels"), grid, interpolation="nearest"))
    dataset = read_dataset(data, aligned=True)
    with pytest.raises(InvresError, match="The label of the case patient00 lies on the grid of T2") as caught:
        dataset.load(dataset.cases[0])
    assert "name T2 first" in caught.value.hint and caught.value.code == "label_grid_mismatch"
    findings = invres("check", "-d", data, "--align", "--json").of("result")[0]["findings"]
    assert ("error", "label_grid_mismatch") in [(one["severity"], one["code"]) for one in findings]
    # Named first, it is the grid that all else comes to.
    description = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    description["channel_names"] = {"0": "T2", "1": "T1"}
    description["dataset"]["patient00"]["images"].reverse()
    (data / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    dataset = read_dataset(data, aligned=True)
    volumes, found = dataset.load(dataset.cases[0])
    assert all(volume.geometry.same_as(found.geometry, 1e-2) for volume in volumes)


def test_an_image_far_from_the_first_stops_a_training_and_is_an_error_to_the_doctor(tmp_path):
    data = write_dataset(tmp_path / "data", cases=2)
    t2 = data / "imagesTr/patient01_0001.nii.gz"
    volume = read_volume(t2)
    far = dataclasses.replace(volume.geometry, origin_mm=tuple(np.add(volume.geometry.origin_mm, (900, 0, 0))))
    write_volume(t2, Volume(volume.array, far))
    recipe = write_recipe(tmp_path / "recipe.json", epochs=1)
    command = ("train", "-d", data, "-r", recipe, "-o", tmp_path / "run", "--device", "cpu", "--align", "--json")
    outcome = invres(*command)
    assert outcome.code == 2 and "T2 of the case patient01 does not overlap T1" in outcome.of("error")[0]["message"]
    findings = invres("check", "-d", data, "--align", "--json").of("result")[0]["findings"]
    (found,) = [one for one in findings if one["code"] == "grid_mismatch"]
    assert found["severity"] == "error" and "They do not overlap" in found["action"]


def test_a_run_that_nobody_can_read_changes_nothing_and_a_recipe_without_channels_refuses_the_option(sets, tmp_path):
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    dataset, report = read_dataset(sets[0], aligned=True), Recorder()
    assert aligned_as_begun(dataset, tmp_path, report) is dataset and report.events == []
    outcome = invres("train", "-d", sets[0], "-r", "iqt-t1", "-o", tmp_path / "iqt", "--align", "--json")
    assert outcome.code == 2 and "--align is for images of several channels" in outcome.of("error")[0]["message"]


def test_a_single_file_of_all_channels_is_read_as_ever(tmp_path):
    package = package_of(tmp_path / "model", channels=("a", "b"))
    images = [image(GRID, seed) for seed in (0, 1)]
    for name, volume in zip("ab", images, strict=True):
        write_volume(tmp_path / f"{name}.nii.gz", volume)
    joined = sitk.JoinSeries([sitk.ReadImage(str(tmp_path / f"{name}.nii.gz")) for name in "ab"])
    sitk.WriteImage(joined, str(tmp_path / "both.nii.gz"))
    command = ("segment", "-m", package.path, "-i", tmp_path / "both.nii.gz", "-o", tmp_path / "o.nii.gz", "--align")
    outcome = invres(*command, "--device", "cpu", "--json")
    assert outcome.code == 0 and outcome.of("result")[0]["resampled_channels"] == []
