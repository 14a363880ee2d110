"""Whole images for a model of crops: the same voxels in the same place, by patient, and a fine-tuning on them."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest
from scipy.ndimage import binary_dilation
from test_locating import saved
from tiny_datasets import invres, places, tiny_recipe, write_dataset

from invres import Cancelled, InvresError, cropping
from invres.cases import SPLITS, Dataset, read_dataset
from invres.config import CropPlan, Label, LabelScheme
from invres.cropping import cropped
from invres.events import Recorder
from invres.finetuning import finetune
from invres.fingerprints import fingerprints
from invres.inference import is_crop
from invres.training import train
from invres.trainingrun import TrainOptions
from invres.tuningplan import TuningOptions
from invres.volume import Geometry, Volume, read_volume, resample, write_volume

LABELS = {"background": 0, "upper": 1, "lower": 2, "core": 3}
CROP = CropPlan(("ball",), (2.0, 2.0, 2.0), (8.0, 8.0, 8.0))


def two_places(folder, **options):
    """A data set whose labels lie in two places, above and below."""
    data = write_dataset(folder, labels=LABELS, **options)
    for path in (data / "labelsTr").iterdir():
        label = read_volume(path, kind="labels")
        apart = np.abs(places(label.geometry)[0]) > 0.15
        write_volume(path, Volume(np.where(apart, label.array, 0), label.geometry))
    return data


def label_one_voxel_more(path):
    """Of those that touch a labelled one, the one that lies nearest to the middle between the two places."""
    label = read_volume(path, kind="labels")
    beside = np.argwhere(binary_dilation(label.array > 0) & (label.array == 0))
    distance = np.linalg.norm(beside - np.array(label.array.shape) / 2, axis=1)
    label.array[tuple(beside[distance.argmin()])] = 1
    write_volume(path, label)


@pytest.fixture
def data(tmp_path):
    return two_places(tmp_path / "data", cases=3, empty=(2,))


def test_each_labelled_place_is_a_case_with_its_voxels_where_they_were(data, tmp_path):
    dataset, report = read_dataset(data), Recorder()
    found = cropped(dataset, CROP, tmp_path / "crops", report)
    names = [case.name for case in found.cases]
    assert names == ["patient00-1", "patient00-2", "patient01-1", "patient01-2", "patient02"], (
        "nothing is labelled in 02"
    )
    assert [case.patient for case in found.cases] == [name[:9] for name in names]
    for whole in dataset.cases[:2]:
        images, label = dataset.load(whole)
        seen = np.zeros(label.array.shape, int)
        for case in (case for case in found.cases if case.patient == whole.name):
            parts, truth = found.load(case)
            back = resample(truth, label.geometry, interpolation="label").array
            assert ((back == 0) | (back == label.array)).all()
            seen += back
            for part, image in zip(parts, images, strict=True):
                moved = resample(part, image.geometry, interpolation="label", outside=-1)
                inside = moved.array != -1
                assert inside.sum() == part.array.size and np.array_equal(moved.array[inside], image.array[inside])
        assert np.array_equal(seen > 0, label.array > 0)
    assert "around the labels of patient00, patient01" in report.events[-1]["message"]


def test_crops_stay_and_files_are_written_once(data, tmp_path):
    wide = CropPlan(("ball",), largest_mm=(80.0, 80.0, 80.0))
    dataset = read_dataset(data)
    assert cropped(dataset, wide, tmp_path / "crops") is dataset
    assert [path.name for path in (tmp_path / "crops").iterdir()] == ["crops.json"]
    first = cropped(dataset, CROP, tmp_path / "crops")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "crops").iterdir()}
    assert cropped(dataset, CROP, tmp_path / "crops") == first
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "crops").iterdir()}


def test_going_on_reads_only_what_has_changed_and_tells_how_far_it_is(data, tmp_path, monkeypatch):
    first, read, report = cropped(read_dataset(data), CROP, tmp_path / "crops"), [], Recorder()
    real = Dataset.load
    monkeypatch.setattr(Dataset, "load", lambda self, case, *rest: read.append(case.name) or real(self, case, *rest))
    dataset = read_dataset(data)
    assert cropped(dataset, CROP, tmp_path / "crops", report) == first and read == []
    progress = [(event["done"], event["total"]) for event in report.events if event["event"] == "progress"]
    assert progress == [(0, 3), (1, 3), (2, 3), (3, 3)]
    os.utime(dataset.cases[0].label, (0, 0))
    next(iter(first.case("patient01-1").images)).unlink()
    assert cropped(dataset, CROP, tmp_path / "crops") == first and read == ["patient00", "patient01"]
    read.clear()
    (tmp_path / "crops" / "crops.json").write_text('{"patient00": {"stamp": 5}, "patient01": []}', encoding="utf-8")
    assert cropped(dataset, CROP, tmp_path / "crops") == first and len(read) == 3


def test_crops_have_the_fingerprints_of_the_whole_images_whatever_is_labelled(data, tmp_path):
    dataset = read_dataset(data)
    whole = {case.name: fingerprints(dataset.load(case)[0]) for case in dataset.cases}
    first = cropped(dataset, CROP, tmp_path / "crops")
    for case in first.cases[:4]:
        assert case.fingerprints == whole[case.patient] and len(case.fingerprints) == 2
        assert {*fingerprints(first.load(case)[0])}.isdisjoint(case.fingerprints)
    assert first.cases[4].fingerprints == (), "it stays whole"
    before = fingerprints(first.load(first.case("patient00-1"))[0] + first.load(first.case("patient00-2"))[0])
    label_one_voxel_more(data / "labelsTr" / "patient00.nii.gz")
    again = cropped(read_dataset(data), CROP, tmp_path / "crops")
    parts = [case for case in again.cases if case.patient == "patient00"]
    assert {case.fingerprints for case in parts} == {whole["patient00"]}
    after = fingerprints(again.load(parts[0])[0] + again.load(parts[1])[0])
    assert before != after, "the crop itself has changed with the label"


def test_crops_of_an_earlier_version_are_made_anew_once(data, tmp_path, monkeypatch):
    first, read = cropped(read_dataset(data), CROP, tmp_path / "crops"), []
    path = tmp_path / "crops" / "crops.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    earlier = {name: {key: entry[key] for key in ("stamp", "parts")} for name, entry in entries.items()}
    path.write_text(json.dumps(earlier), encoding="utf-8")
    real = Dataset.load
    monkeypatch.setattr(Dataset, "load", lambda self, case, *rest: read.append(case.name) or real(self, case, *rest))
    for _ in range(2):
        assert cropped(read_dataset(data), CROP, tmp_path / "crops") == first
    assert read == ["patient00", "patient01"], "a case that stayed whole has nothing to be made anew"


def test_however_a_label_is_stored_the_crop_shows_what_is_labelled(data, tmp_path):
    """Backwards and in another order of axes than the image, as some tools write labels."""
    wanted = cropped(read_dataset(data), CROP, tmp_path / "wanted")
    for path in (data / "labelsTr").iterdir():
        label = read_volume(path, kind="labels").canonical()
        turned = np.ascontiguousarray(np.flip(label.array, 2).transpose(1, 0, 2))
        affine = label.geometry.affine
        affine[:3, 3] += affine[:3, 2] * (label.geometry.shape[2] - 1)
        affine[:3, 2] *= -1
        affine[:3, [0, 1]] = affine[:3, [1, 0]]
        write_volume(path, Volume(turned, Geometry.from_affine(affine, turned.shape)))
    second = data / "imagesTr" / "patient00_0001.nii.gz"
    image = read_volume(second)
    flipped = image.geometry.affine
    flipped[:3, 3] += flipped[:3, 1] * (image.geometry.shape[1] - 1)
    flipped[:3, 1] *= -1
    write_volume(second, Volume(np.flip(image.array, 1).copy(), Geometry.from_affine(flipped, image.array.shape)))
    found = cropped(read_dataset(data), CROP, tmp_path / "found")
    assert [case.name for case in found.cases] == [case.name for case in wanted.cases] and len(found.cases) == 5
    for one, other in zip(found.cases[:4], wanted.cases[:4], strict=True):
        (*images, label), (*expected, truth) = ([*case[0], case[1]] for case in (found.load(one), wanted.load(other)))
        for part, whole in zip((*images, label), (*expected, truth), strict=True):
            assert part.geometry.same_as(whole.geometry, tolerance_mm=1e-3) and np.array_equal(part.array, whole.array)


def test_a_label_beside_its_image_is_not_cropped_but_refused_later(data, tmp_path):
    path = data / "labelsTr" / "patient00.nii.gz"
    label = read_volume(path, kind="labels")
    affine = label.geometry.affine
    affine[:3, 3] += 15
    write_volume(path, Volume(label.array, Geometry.from_affine(affine, label.array.shape)))
    names = [case.name for case in cropped(read_dataset(data, checked=False), CROP, tmp_path / "crops").cases]
    assert names == ["patient00", "patient01-1", "patient01-2", "patient02"]


def test_a_corrected_label_is_cut_out_anew(data, tmp_path):
    first = cropped(read_dataset(data), CROP, tmp_path / "crops")
    before = {case.name: first.load(case)[1] for case in first.cases if case.patient == "patient00"}
    path = data / "labelsTr" / "patient00.nii.gz"
    label = read_volume(path, kind="labels")
    changed = np.where(label.array == 2, 0, label.array)
    write_volume(path, Volume(changed, label.geometry))
    again = cropped(read_dataset(data), CROP, tmp_path / "crops")
    for case in (case for case in again.cases if case.patient == "patient00"):
        _, found = again.load(case)
        back = resample(found, label.geometry, interpolation="label").array
        assert ((back == 0) | (back == changed)).all() and back.any()
        assert not found.geometry.same_as(before[case.name].geometry) or (found.array != before[case.name].array).any()


def test_cropping_stops_between_two_cases(data, tmp_path):
    asked = iter((False, True))
    with pytest.raises(Cancelled):
        cropped(read_dataset(data), CROP, tmp_path / "crops", stopped=lambda: next(asked))
    known = json.loads((tmp_path / "crops" / "crops.json").read_text(encoding="utf-8"))
    assert list(known) == ["patient00"]


def test_a_full_disk_leaves_no_case_whole_that_was_to_be_cropped(data, tmp_path, monkeypatch):
    def full(path, *_):
        raise InvresError(f"{path} could not be written.", code="write_failed")

    monkeypatch.setattr(cropping, "write_volume", full)
    with pytest.raises(InvresError) as caught:
        cropped(read_dataset(data), CROP, tmp_path / "crops")
    assert caught.value.code == "write_failed"


def test_the_split_follows(data, tmp_path):
    (data / SPLITS).write_text(json.dumps([{"train": ["patient01", "patient02"], "val": ["patient00"]}]))
    found = cropped(read_dataset(data), CROP, tmp_path / "crops")
    (split,) = json.loads((found.root / SPLITS).read_text(encoding="utf-8"))
    assert split == {"train": ["patient01-1", "patient01-2", "patient02"], "val": ["patient00-1", "patient00-2"]}


def test_a_recipe_of_crops_trains_on_whole_images_and_is_scored_on_crops(tmp_path):
    data = two_places(tmp_path / "data", cases=3, channels=("T1",))
    recipe = dataclasses.replace(tiny_recipe(patch=(8, 8, 8), iterations_per_epoch=2, epochs=1), crop=CROP)
    run = tmp_path / "run"
    package = train(read_dataset(data), recipe, run, TrainOptions(device="cpu"))
    assert package.manifest.plan.crop == CROP and package.manifest.training.training_cases == 4
    again = train(read_dataset(data), recipe, run, TrainOptions(device="cpu", resume=True))
    assert again.id == package.id
    outcome = invres("evaluate", "--run", run, "--data", data, "--output", tmp_path / "metrics.json", "--device", "cpu")
    assert outcome.code == 0, outcome
    scored = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["metric_per_case"]
    assert len(scored) == 2 and all("-1" in one["prediction_file"] or "-2" in one["prediction_file"] for one in scored)


def test_a_model_of_crops_is_fine_tuned_on_whole_images(tmp_path):
    data = two_places(tmp_path / "data", cases=2, channels=("T1",))
    scheme = LabelScheme(tuple(Label(name, (value,), value) for name, value in LABELS.items() if value))
    base = saved(tmp_path / "base", scheme, "MR", CROP)
    options = TuningOptions(
        device="cpu", wishes={"epochs": 1, "iterations_per_epoch": 2, "patch": (12, 12, 12)}, promote=True
    )
    options = dataclasses.replace(options, check_base=data)
    found = finetune(base, read_dataset(data), tmp_path / "run", options)
    proof = json.loads((tmp_path / "run" / "comparison.json").read_text(encoding="utf-8"))["base_check"]
    assert proof["n_cases"] == 4, "the base model learned from crops, and is asked about crops"
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run" / "crops").iterdir()}
    with pytest.raises(InvresError, match="already a fine-tuning"):
        finetune(base, read_dataset(two_places(tmp_path / "other", cases=2)), tmp_path / "run", options)
    assert before == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run" / "crops").iterdir()}
    compared = json.loads((tmp_path / "run" / "comparison.json").read_text(encoding="utf-8"))["cases"]
    held_out = sorted(case["case"] for case in compared)
    assert held_out == ["patient00-1", "patient00-2", "patient01-1", "patient01-2"]
    assert found["training"]["training_cases"] == 4
    record = json.loads((tmp_path / "run" / "model" / "manifest.json").read_text(encoding="utf-8"))
    assert record["plan"]["crop"]["around"] == ["ball"]
    dataset = read_dataset(data)
    assert not is_crop(CROP, dataset.load(dataset.cases[0])[0])


def test_a_model_of_crops_knows_an_image_again_whose_label_was_corrected(tmp_path):
    data = two_places(tmp_path / "data", cases=2, channels=("T1",))
    recipe = dataclasses.replace(tiny_recipe(patch=(8, 8, 8), iterations_per_epoch=2, epochs=1), crop=CROP)
    base = train(read_dataset(data), recipe, tmp_path / "run", TrainOptions(device="cpu"))
    dataset = read_dataset(data)
    learned = {
        case.name for case in dataset.cases if {*fingerprints(dataset.load(case)[0])} <= {*base.manifest.trained_on}
    }
    assert len(learned) == 1 == len(base.manifest.trained_on), "the other case was held out"
    for path in (data / "labelsTr").iterdir():
        label_one_voxel_more(path)
    wishes = {"epochs": 1, "iterations_per_epoch": 2, "patch": (8, 8, 8)}
    finetune(base, read_dataset(data), tmp_path / "tuned", TuningOptions(device="cpu", wishes=wishes))
    compared = json.loads((tmp_path / "tuned" / "comparison.json").read_text(encoding="utf-8"))["cases"]
    assert {one["patient"] for one in compared if one["base_knows"]} == learned
    assert {one["patient"] for one in compared} == {"patient00", "patient01"}
