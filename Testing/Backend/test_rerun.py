"""`invres rerun`: a segmentation made again from its record, refused where model or inputs are others, and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from grids import RAS, REGIONS
from test_inference import package_of, steps_volume
from test_locating import CROP, HEAD, PARTS, image, saved
from tiny_datasets import GRIDS, invres, leftovers, phantom

from invres import load_model
from invres.provenance import FIELD, LATER, read_provenance
from invres.volume import Geometry, Volume, read_volume, write_volume

PATCH = (24, 20, 16)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, its inputs, and two segmentations of them with their records."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(3)
    package_of(folder / "model", channels=("T1", "T2"), patch=PATCH)
    for name, volume in zip(("t1", "t2"), phantom(GRIDS[0], 2)[0], strict=True):
        write_volume(folder / f"{name}.nii.gz", volume)
    inputs = ("-i", f"T1={folder / 't1.nii.gz'}", "-i", f"T2={folder / 't2.nii.gz'}")
    options = ("--overlap", 0.25, "--mirror", 1, "--window", 16, 16, 20, "--keep-pieces", "--no-sides")
    command = ("segment", "-m", folder / "model", *inputs, "--device", "cpu")
    assert invres(*command, "-o", folder / "a.seg.nrrd", *options).code == 0
    box = ("--roi", -8, 6, -9, 9, -12, 14, "--align")
    assert invres(*command, "-o", folder / "b.nii.gz", "--provenance", folder / "b.json", *box).code == 0
    return folder


@pytest.fixture
def published(place, tmp_path):
    """What somebody gets who wants to see whether it is so: records, results and inputs in a folder below."""
    for name in ("a.seg.nrrd", "b.nii.gz", "b.json"):
        shutil.copy(place / name, tmp_path)
    (tmp_path / "scans" / "raw").mkdir(parents=True)
    for old, new in (("t1", "scans/raw/x17"), ("t2", "scans/x18")):
        shutil.copy(place / f"{old}.nii.gz", tmp_path / f"{new}.nii.gz")
    write_volume(tmp_path / "scans" / "t1.nii.gz", phantom(GRIDS[1])[0][0])  # of that name, but another image
    return tmp_path


def rerun(place, record, *more, model="model"):
    outcome = invres("rerun", record, "--model", place / model, *more, "--json")
    return outcome, outcome.events[-1]


def changed(path, change, target=None):
    """The file with another record in its header."""
    image = sitk.ReadImage(str(path))
    record = json.loads(image.GetMetaData(FIELD))
    change(record)
    image.SetMetaData(FIELD, json.dumps(record))
    sitk.WriteImage(image, str(target or path), useCompression=True)


@pytest.mark.parametrize("name", ["a.seg.nrrd", "b.json"])
def test_the_same_comes_out_with_the_recorded_settings(place, published, name):
    output = published / f"again{'.seg.nrrd' if name == 'a.seg.nrrd' else '.nii.gz'}"
    outcome, result = rerun(place, published / name, "-i", published / "scans", "-o", output)
    assert outcome.code == 0, outcome.out
    (case,) = result["cases"]
    stored = published / name.replace(".json", ".nii.gz")
    assert result["same"] is case["same"] is True and case["different_voxels"] == 0
    assert case["stored"] == str(stored) and set(case["dice"].values()) == {1.0}
    assert not [event for event in outcome.of("warning") if "Voxels may differ" in event["message"]]
    assert (read_volume(output, kind="labels").array == read_volume(stored, kind="labels").array).all()
    assert read_volume(output, kind="labels").array.any()
    wanted = read_provenance(stored) if name == "a.seg.nrrd" else json.loads((place / name).read_text())
    for key in ("settings", "software", "device", "threads", "precision"):
        assert case[key] == wanted[key], key
    told = invres("rerun", published / name, "--model", place / "model", "-i", published / "scans").out
    assert told == f"{stored.name}: the same, in each of {case['voxels']} voxels.\n"


def test_where_it_differs_it_says_in_how_many_voxels_and_with_what_dice(place, published):
    path = published / "b.nii.gz"
    volume = read_volume(path, kind="labels")
    names = {10: "a", 150: "b", 250: "c"}
    counts = {value: int((volume.array == value).sum()) for value in names}
    largest, other, third = sorted(names, key=lambda value: -counts[value])
    array = volume.array.copy()
    array[tuple(np.argwhere(array == largest)[:3].T)] = other
    write_volume(path, Volume(array, volume.geometry))
    outcome, result = rerun(place, published / "b.json", "-i", published / "scans")
    assert outcome.code == 0, "a finding is no failure"
    (case,) = result["cases"]
    assert result["same"] is False and case["different_voxels"] == 3
    count = counts[largest]
    assert case["dice"][names[largest]] == pytest.approx(2 * (count - 3) / (2 * count - 3))
    assert case["dice"][names[third]] == 1 > case["dice"][names[other]]
    told = invres("rerun", published / "b.json", "--model", place / "model", "-i", published / "scans").out
    assert (
        f"NOT the same: other labels in 3 of {array.size} voxels. Dice: " in told and f" {names[third]} 1" not in told
    )
    moved = Geometry(volume.geometry.shape, volume.geometry.spacing_mm, (0, 0, 0), volume.geometry.direction)
    write_volume(path, Volume(volume.array, moved))
    (case,) = rerun(place, published / "b.json", "-i", published / "scans")[1]["cases"]
    assert case["same"] is False and "apart" in case["other_grid"] and case["different_voxels"] is None
    path.unlink()
    outcome, result = rerun(place, published / "b.json", "-i", published / "scans")
    assert outcome.code == 0 and result["same"] is None and result["cases"][0]["stored"] is None


def test_other_inputs_are_refused_in_one_sentence(place, published):
    (published / "scans" / "x18.nii.gz").unlink()
    outcome, error = rerun(place, published / "a.seg.nrrd", "-i", published / "scans")
    assert outcome.code == 2 and error["code"] == "other_input"
    assert error["message"].startswith(f"Nothing in {published / 'scans'} has the content of t2.nii.gz (T2), sha256 ")
    (published / "scans" / "raw" / "x17.nii.gz").unlink()
    error = rerun(place, published / "a.seg.nrrd", "-i", published / "scans")[1]
    assert f"{published / 'scans' / 't1.nii.gz'} (T1) is not what it was: its sha256 is " in error["message"]
    assert "; Nothing in" in error["message"] and "\n" not in error["message"]
    error = rerun(place, published / "a.seg.nrrd")[1]
    assert f"Nothing in {published} has the content of t1.nii.gz" in error["message"], "the record's folder alone"
    error = rerun(place, published / "a.seg.nrrd", "-i", f"T1={place / 't1.nii.gz'}")[1]
    assert "There is no file or folder T1=" in error["message"] and "without channels" in error["hint"]
    found = rerun(place, published / "a.seg.nrrd", "-i", place / "t1.nii.gz", "-i", place / "t2.nii.gz")[1]
    assert found["same"] is True, "files as well as folders"


def test_an_image_that_was_in_memory_cannot_be_found(place, tmp_path):
    images = {"T1": sitk.ReadImage(str(place / "t1.nii.gz")), "T2": place / "t2.nii.gz"}
    with pytest.warns(UserWarning):
        load_model(place / "model", device="cpu").segment(images).save(tmp_path / "a.seg.nrrd")
    error = rerun(place, tmp_path / "a.seg.nrrd", "-i", place)[1]
    assert error["message"] == "The input (T1) was an image in memory, which no file is known to be."


def test_another_model_is_refused_and_another_manifest_told(place, published, monkeypatch, tmp_path):
    torch.manual_seed(5)
    package_of(tmp_path / "other", channels=("T1", "T2"), patch=PATCH)
    record = published / "a.seg.nrrd"
    outcome, error = rerun(tmp_path, record, "-i", published / "scans", model="other")
    assert outcome.code == 2 and error["code"] == "other_model"
    assert (
        error["message"].startswith("The weights of known 1.0.0 (sha256 ")
        and "not those of the record" in error["message"]
    )
    monkeypatch.setattr("invres.rerun_command.user_models_dir", lambda: tmp_path / "models")
    error = invres("rerun", record, "-i", published / "scans", "--json").events[-1]
    assert error["message"].startswith("No installed model has the weights of the record, known 1.0.0 (sha256 ")
    shutil.copytree(tmp_path / "other", tmp_path / "models" / "other")
    error = invres("rerun", record, "-i", published / "scans", "--json").events[-1]
    assert "installed of that name is 1.0.0, with other weights" in error["message"]
    shutil.copytree(place / "model", tmp_path / "models" / "mine")
    manifest = tmp_path / "models" / "mine" / "manifest.json"
    assert invres("rerun", record, "-i", published / "scans", "--json").events[-1]["same"] is True, "by its weights"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('"1.0.0"', '"1.0.1"'), encoding="utf-8")
    outcome = invres("rerun", record, "-i", published / "scans", "--json")
    assert outcome.code == 0 and "its manifest is another one" in outcome.of("warning")[0]["message"]


def test_other_software_and_devices_are_told(place, published):
    def change(record):
        record["software"] |= {"torch": "2.1.0", "numpy": "1.0"}
        record["device_title"], record["device"] = "NVIDIA X", "cuda:3"

    changed(published / "a.seg.nrrd", change)
    outcome, result = rerun(place, published / "a.seg.nrrd", "-i", published / "scans", "--device", "cpu")
    told = " ".join(event["message"] for event in outcome.of("warning"))
    assert f"Other software than then: torch {torch.__version__} (then 2.1.0), numpy" in told
    assert "Another device than then: CPU" in told and "(then NVIDIA X)" in told
    assert outcome.code == 0 and result["cases"][0]["software"]["torch"] == torch.__version__
    if not torch.cuda.is_available():
        outcome, result = rerun(place, published / "a.seg.nrrd", "-i", published / "scans")
        assert "The record is of a graphics card, which is not here" in outcome.of("warning")[0]["message"]
        assert result["cases"][0]["device"] == "cpu"


def test_records_of_earlier_versions_are_read_and_run(place, published):
    def earlier(record):
        for key in LATER:
            del record[key]
        record["software"] = {"invres": "0.1.0", "torch": torch.__version__, "python": "3.9"}

    changed(published / "a.seg.nrrd", earlier)
    record = read_provenance(published / "a.seg.nrrd")
    assert all(record[key] is None for key in LATER)
    assert invres("describe", published / "a.seg.nrrd").code == 0
    outcome, result = rerun(place, published / "a.seg.nrrd", "-i", published / "scans")
    assert outcome.code == 0 and result["same"] is True
    told = outcome.of("warning")[-1]["message"]
    assert "python" in told and "numpy" not in told, "nothing is said of what the record does not say"


def test_the_threads_of_then_are_taken_and_given_back(place, published):
    before = torch.get_num_threads()
    changed(published / "a.seg.nrrd", lambda record: record.update(threads=before + 1))
    _, result = rerun(place, published / "a.seg.nrrd", "-i", published / "scans")
    assert result["cases"][0]["threads"] == before + 1 and torch.get_num_threads() == before


def test_regions_that_overlap_are_compared_as_wholes(tmp_path):
    package_of(tmp_path / "model", REGIONS, patch=PATCH)
    volume, _ = steps_volume(Geometry((20, 22, 24), (1, 1, 1), (0, 0, 0), RAS))
    write_volume(tmp_path / "ct.nii.gz", volume)
    command = ("segment", "-m", tmp_path / "model", "-i", tmp_path / "ct.nii.gz", "--device", "cpu")
    assert invres(*command, "-o", tmp_path / "a.seg.nrrd").code == 0
    (case,) = rerun(tmp_path, tmp_path / "a.seg.nrrd")[1]["cases"]
    assert case["same"] is True and [*case["dice"]] == ["whole", "core", "hot"]


def test_the_model_that_found_the_place_is_asked_again(tmp_path, monkeypatch):
    """Of an earlier record, which does not name it, the boxes are taken."""
    head, _ = saved(tmp_path / "head", HEAD, "CT"), saved(tmp_path / "parts", PARTS, "MR", CROP)
    write_volume(tmp_path / "mr.nii.gz", image(Geometry((30, 28, 32), (1, 1, 1), (3, 4, 5), RAS)))
    boxes = [(4.0, 18.0, 6.0, 17.0, 8.0, 18.0), (20.0, 30.0, 6.0, 24.0, 8.0, 26.0)]
    asked = []

    def found(package, *_):
        asked.append(package.id)
        return boxes, 0

    monkeypatch.setattr("invres.locating.locate", found)  # random weights find nothing that could be relied on
    command = ("segment", "-m", tmp_path / "parts", "-i", tmp_path / "mr.nii.gz", "--locate", tmp_path / "head")
    window = ("--window", 24, 24, 24)  # more than either box has, so that each gets another one
    outcome = invres(*command, "-o", tmp_path / "a.seg.nrrd", "--device", "cpu", "--json", *window)
    assert outcome.code == 0, outcome.out
    record = read_provenance(tmp_path / "a.seg.nrrd")
    assert record["settings"]["window"] == [19, 19, 15]
    assert record["locator"]["model_id"] == head.id and record["settings"]["boxes_mm"] == [list(box) for box in boxes]
    outcome, error = rerun(tmp_path, tmp_path / "a.seg.nrrd", model="parts")
    assert error["code"] == "other_model" and "--locate" in error["hint"]
    outcome, result = rerun(tmp_path, tmp_path / "a.seg.nrrd", "--locate", tmp_path / "head", model="parts")
    assert outcome.code == 0 and result["same"] is True and asked == [head.id] * 2
    changed(tmp_path / "a.seg.nrrd", lambda record: record.pop("locator"))
    outcome, result = rerun(tmp_path, tmp_path / "a.seg.nrrd", model="parts")
    assert result["same"] is True and len(asked) == 2
    assert "does not say which model found the place" in outcome.of("note")[0]["message"]


def test_all_cases_of_a_folder_are_made_again_and_one_that_cannot_be_does_not_end_the_rest(tmp_path):
    package = package_of(tmp_path / "model", patch=PATCH)
    for number, name in enumerate("abc"):
        write_volume(tmp_path / "scans" / f"{name}.nii.gz", phantom(GRIDS[number])[0][0])
    command = ("segment", "-m", package.path, "-d", tmp_path / "scans", "-o", tmp_path / "out", "--device", "cpu")
    assert invres(*command).code == 0
    record = tmp_path / "out" / "segmentations.json"
    outcome, result = rerun(tmp_path, record, "-i", tmp_path / "scans", "-o", tmp_path / "again")
    assert outcome.code == 0 and result["same"] is True
    assert [case["name"] for case in result["cases"]] == ["a", "b", "c"]
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    (tmp_path / "scans" / "b.nii.gz").unlink()
    outcome, error = rerun(tmp_path, record, "-i", tmp_path / "scans", "-o", tmp_path / "third")
    assert (
        outcome.code == 2
        and error["code"] == "cases_failed"
        and "1 of 3 cases could not be made again: b." in error["message"]
    )
    assert outcome.of("warning")[0]["message"].startswith("b: Nothing in")
    assert sorted(path.name for path in (tmp_path / "third").iterdir()) == ["a.nii.gz", "c.nii.gz"]
    _, result = rerun(tmp_path, record, "-i", tmp_path / "scans", "--case", "c", "-o", tmp_path / "c.mha")
    assert result["same"] is True and Path(result["cases"][0]["output"]).is_file()
    assert "has no case x; it has a, b, c" in rerun(tmp_path, record, "--case", "x")[1]["message"]
    content = json.loads(record.read_text(encoding="utf-8"))
    del content["cases"]["a"]["inputs"]  # as an earlier version left it
    record.write_text(json.dumps(content), encoding="utf-8")
    assert "did not note the sha256 of the inputs of a." in rerun(tmp_path, record)[1]["message"]
    assert rerun(tmp_path, record, "-i", tmp_path / "scans", "--case", "c")[1]["same"] is True
    record.write_text(json.dumps({**content, "cases": {}}), encoding="utf-8")
    assert "has no case that is done" in rerun(tmp_path, record)[1]["message"]


def test_a_dicom_folder_is_known_by_its_files(tmp_path):
    """As any other folder is: by names and contents."""
    from invres.files import digest_of
    from invres.rerunrecord import InputFinder

    series = tmp_path / "now" / "elsewhere"
    series.mkdir(parents=True)
    for name in ("1", "2"):
        (series / name).write_bytes(name.encode())
    wanted = {"inputs": [{"channel": "CT", "file": "series", "sha256": digest_of(series)}]}
    assert InputFinder([tmp_path], deep=True).inputs_of(wanted) == {"CT": series}
    assert InputFinder([tmp_path / "now"], deep=False).inputs_of(wanted) == {"CT": series}


def test_what_is_no_record_is_refused_and_nothing_is_overwritten(place, published):
    (published / "x.json").write_text("{}", encoding="utf-8")
    for name, told in (
        ("x.json", "does not say how"),
        ("none.json", "cannot be read"),
        ("b.nii.gz", "does not say how"),
    ):
        error = rerun(place, published / name)[1]
        assert told in error["message"], name
    for output in ("a.seg.nrrd", "scans/x18.nii.gz"):
        error = rerun(place, published / "a.seg.nrrd", "-i", published / "scans", "-o", published / output)[1]
        assert error["code"] == "output_is_input"
    error = rerun(place, published / "a.seg.nrrd", "-i", published / "scans", "-o", published / "x.png")[1]
    assert "cannot be written" in error["message"]
    for damage in (
        lambda record: record["inputs"][0].pop("sha256"),
        lambda record: record.update(locator={"model": 1}),
    ):
        changed(place / "a.seg.nrrd", damage, published / "c.seg.nrrd")
        assert "does not say how" in rerun(place, published / "c.seg.nrrd")[1]["message"]
    changed(published / "a.seg.nrrd", lambda record: record["settings"].pop("overlap"))
    assert "damaged or incomplete" in rerun(place, published / "a.seg.nrrd", "-i", published / "scans")[1]["message"]
    assert leftovers(published) == []
