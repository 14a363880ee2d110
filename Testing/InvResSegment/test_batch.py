"""The batch on the real backend: where cases come from, the run, what fails, what is remembered, and the review."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import shutil
import struct
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

if importlib.util.find_spec("PySide6") is None:  # asked for without importing it: `standins` has to come first
    pytest.skip("PySide6 is not installed", allow_module_level=True)

import qt
import slicer
import standins
import vtk
from InvResSegmentLib import BatchSources, NodeFiles
from InvResSegmentLib.BatchCase import (
    ACCEPTED,
    DONE,
    EDITED,
    FAILED,
    WAITING,
    BatchCase,
    correctedPath,
)
from InvResSegmentLib.BatchQueue import BatchQueue
from InvResSegmentLib.BatchRecord import BatchSettings, readBatch, readSettings, readTable
from InvResSegmentLib.BatchTab import BatchTab
from InvResSegmentLib.BatchTable import writeTable
from InvResSegmentLib.CaseExport import CaseExport, stampOf
from InvResSegmentLib.CaseFiles import CaseFiles, ImageFile
from InvResSegmentLib.CaseFindings import findingsOf, patients, problems
from InvResSegmentLib.Models import ModelCatalogue
from InvResSegmentLib.NodeConversion import ConversionError, segmentMask
from InvResSegmentLib.ResultFile import SegmentLabel, readMasks, readResultFile
from InvResSegmentLib.ResultNames import ResultNames
from InvResSegmentLib.ReviewQueue import ReviewQueue
from InvResSegmentLib.SegmentWays import SegmentWays
from InvResSegmentLib.TrainingCases import Finding, TrainingCases
from small_models import add_volume, dice, example, model_info, with_sides
from standins import pythonqt, qtclasses, waitUntil
from tiny_datasets import invres
from tiny_run import SHAPE, write_balls
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from invres.cases import read_dataset
from invres.doctor import check_dataset
from invres.volume import read_volume

T1 = (SimpleNamespace(name="T1", modality="MR", optional=False),)
TWO = (
    SimpleNamespace(name="T1", modality="MR", optional=False),
    SimpleNamespace(name="FLAIR", modality="MR", optional=False),
)


@pytest.fixture
def data(tmp_path):
    return write_balls(tmp_path / "data", cases=3, labelled=False)


@pytest.fixture
def images(data):
    return sorted((data / "imagesTr").iterdir())


@pytest.fixture
def queue(scene, backend, tmp_path):
    pythonqt.slotErrors.clear()
    queue = BatchQueue(backend, lambda: str(tmp_path / "exchange"))
    yield queue
    queue.cancel()
    waitUntil(lambda: not queue.running, 30)
    assert not pythonqt.slotErrors


def cases_of(images):
    return [BatchCase(f"case {index}", files={"T1": path}) for index, path in enumerate(images)]


def ran(queue, model, locator=None):
    queue.start(model, "cpu", locator)
    waitUntil(lambda: not queue.running, 120)
    return [case.state for case in queue.cases]


def made_by(*models):
    """Which of these models made the result of a case, as the tab looks it up."""
    return lambda case: next((model for model in models if model.sha256 == case.model), None)


def remembered(folder):
    content = json.loads((folder / "batch.json").read_text(encoding="utf-8"))
    return {case["name"]: (case["state"], case["review"]) for case in content["cases"]}


def paint(node, count=40):
    """What a person does in the Segment Editor: other voxels in the first segment, and a new time stamp."""
    image = node.GetSegmentation().GetNthSegment(0).GetRepresentation("Binary labelmap")
    voxels = vtk_to_numpy(image.GetPointData().GetScalars())
    voxels[:count] = node.GetSegmentation().GetNthSegment(0).GetLabelValue()
    image.Modified()


# ---------------------------------------------------------------- where cases come from


def test_each_volume_of_the_scene_is_a_case_of_a_model_of_one_channel(scene):
    first = add_volume(scene, np.zeros((4, 4, 4), np.float32), name="first")
    add_volume(scene, np.zeros((4, 4, 4), np.uint8), name="labels", kind="vtkMRMLLabelMapVolumeNode")
    add_volume(scene, np.zeros((4, 4, 4), np.float32), name="hidden").SetHideFromEditors(True)
    (case,) = BatchSources.casesOfScene(T1)
    assert case.name == "first" and case.nodes == {"T1": first} and case.inScene


def test_the_studies_of_the_scene_are_cases_of_a_model_of_two_channels(scene):
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    for study in ("Monday", "Tuesday"):
        item = hierarchy.CreateStudyItem(hierarchy.GetSceneItemID(), study)
        for contrast in ("T1 MPRAGE", "FLAIR") if study == "Monday" else ("T1 MPRAGE",):
            noise = np.random.default_rng(0).normal(100, 10, (8, 8, 8)).astype(np.float32)
            volume = add_volume(scene, noise, name=f"{contrast} {study}")
            hierarchy.CreateItem(item, volume)
    monday, tuesday = BatchSources.casesOfScene(TWO)
    assert (monday.name, monday.state, set(monday.nodes)) == ("Monday", WAITING, {"T1", "FLAIR"})
    assert (tuesday.state, set(tuesday.nodes)) == (FAILED, {"T1"}) and "FLAIR" in tuesday.message


def test_a_data_set_is_read_by_the_backend(backend, data):
    found = []
    backend.request(["check", "--data", str(data)], None, found.append)
    waitUntil(lambda: found, 60)
    contents = found[0].result["contents"]
    cases = BatchSources.casesOfDataset(contents, (SimpleNamespace(name="t1", modality="MR", optional=False),))
    assert [case.name for case in cases] == ["case0", "case1", "case2"]
    assert all(case.files["t1"].is_file() for case in cases)
    assert len({case.patient for case in cases}) == 3 and "case" not in cases[0].patient
    contents["channels"] = [{"name": "T1w"}, {"name": "flair"}]
    contents["cases"] = [{"name": "a", "images": ["/t1.nii", "/flair.nii"], "patient": "Anna"}]
    (case,) = BatchSources.casesOfDataset(contents, TWO)
    assert case.files == {"T1": Path("/t1.nii"), "FLAIR": Path("/flair.nii")}, "the same channels, called otherwise"
    contents["channels"] = [{"name": "T1w"}]
    with pytest.raises(ConversionError, match="no channel FLAIR"):
        BatchSources.casesOfDataset(contents, TWO)


def test_a_plain_folder_of_images_is_a_batch(images, tmp_path):
    folder = images[0].parent
    (folder / "old.seg.nrrd").write_bytes(b"")
    assert [case.name for case in BatchSources.casesOfFolder(folder, T1)] == ["case0_0000", "case1_0000", "case2_0000"]
    patient = tmp_path / "patients" / "anna"
    patient.mkdir(parents=True)
    for name in ("t1.nii.gz", "flair.nii.gz", "notes.txt"):
        (patient / name).write_bytes(b"")
    (case,) = BatchSources.casesOfFolder(patient.parent, TWO)
    assert case.name == "anna" and {k: v.name for k, v in case.files.items()} == {
        "T1": "t1.nii.gz",
        "FLAIR": "flair.nii.gz",
    }


class Database:
    """What the panel asks of ctkDICOMDatabase, over the files of one patient with a study of several series."""

    databaseFilename = "/home/anna/ctkDICOM.sql"

    def __init__(self, series, studies=("1.2",)):
        self.series, self.studies = series, list(studies)

    def patients(self):
        return ["1"]

    def displayedNameForPatient(self, patient):
        return "Anna"

    def studiesForPatient(self, patient):
        return self.studies

    def descriptionForStudy(self, study):
        return "head"

    def seriesForStudy(self, study):
        return list(self.series)

    def descriptionForSeries(self, series):
        return sitk.ReadImage(self.series[series][0]).GetMetaData("0008|103e").strip()

    def filesForSeries(self, series):
        return self.series[series]

    def fileValue(self, file, tag):
        image = sitk.ReadImage(file)
        key = tag.replace(",", "|")
        return image.GetMetaData(key).strip() if image.HasMetaDataKey(key) else ""


def write_series(folder, array, uid, description):
    """A series of slices as a scanner writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index, plane in enumerate(array.astype(np.int16)):
        image = sitk.GetImageFromArray(plane[None])
        tags = {
            "0008|0060": "MR",
            "0008|103e": description,
            "0020|000d": "1.2",
            "0020|000e": uid,
            "0020|0052": "1.2.9",
            "0020|0013": str(index + 1),
            "0020|0032": f"-10\\5\\{index}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0018|0050": "1",
            "0028|0030": "1\\1",
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        files.append(str(folder / f"{uid}.{index}.dcm"))
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(files[-1])
        writer.Execute(image)
    return files


def test_a_dicom_study_is_segmented_and_reviewed(queue, small_model, tmp_path):
    array = example(np.random.default_rng(8), SHAPE, 1)[0][0]
    series = {
        "1.2.3": write_series(tmp_path / "dicom", array, "1.2.3", "T1 MPRAGE"),
        "1.2.4": write_series(tmp_path / "dicom", array[:5], "1.2.4", "localizer"),
    }
    ((_done, _count, case),) = BatchSources.casesOfDatabase(Database(series), T1)
    assert case.name == "Anna, head" and str(case.files["T1"]) == series["1.2.3"][0]
    queue.add([case])
    queue.setFolder(tmp_path / "results")
    assert ran(queue, small_model) == [DONE], case.message
    review = ReviewQueue(queue, TrainingCases(), made_by(small_model))
    assert review.step(True)
    assert review.background.GetImageData().GetDimensions() == SHAPE[::-1]
    assert np.count_nonzero(segmentMask(review.segmentation, segment_id(review))[0]) > 100
    review.accept()
    review.leave()
    assert review._trainingCases.rows[0].stored.patient == case.patient != "", "who it is of is known to the split"
    dataset = read_dataset(exported(review._trainingCases, small_model, tmp_path).dataset)
    assert not [found for found in check_dataset(dataset) if found.severity == "error"], "it can be learned from"


def test_what_else_lies_in_the_folder_of_a_series_does_not_keep_it_from_being_reviewed(scene, tmp_path):
    array = example(np.random.default_rng(3), SHAPE, 1)[0][0]
    folder = tmp_path / "anna"
    write_series(folder, array, "1.2.3", "T1 MPRAGE")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "0readme.txt").write_text("head", encoding="utf-8")
    (folder / "0DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    sitk.WriteImage(sitk.Image(8, 8, sitk.sitkUInt8), str(folder / "0preview.png"))
    volume = NodeFiles.loadVolume(folder, "anna")
    assert volume.GetImageData().GetDimensions() == SHAPE[::-1]
    scene.RemoveNode(volume)
    for file in folder.iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(ConversionError, match="anna could not be read as a volume"):
        NodeFiles.loadVolume(folder, "anna")
    assert in_scene() == []


def test_two_studies_of_one_patient_are_held_out_together(queue, small_model, tmp_path):
    series = {"1.2.3": write_series(tmp_path / "dicom", np.ones((2, 4, 4)), "1.2.3", "T1 MPRAGE")}
    studies = list(BatchSources.casesOfDatabase(Database(series, ("1.2", "1.3")), T1))
    queue.folder = tmp_path
    queue.cases = [case for _done, _count, case in studies]
    queue.cases[0].state = FAILED
    queue.tell()
    unit = tuple(map(tuple, np.eye(4).tolist()))
    cases = TrainingCases()
    for index, case in enumerate([*readBatch(tmp_path), BatchCase("of nobody")]):
        image = ImageFile(str(tmp_path / f"{index}.nrrd"), (4, 4, 4), unit)
        row = cases.addFiles(case.name, CaseFiles({"T1": image}, "label", ("ball",), case.patient))
        assert CaseFiles.fromJson(json.loads(json.dumps(asdict(row.stored)))) == row.stored
    assert [*patients(cases).values()] == ["patient01", "patient01", "patient02"]
    assert "Anna" not in queue.cases[0].patient and len(queue.cases[0].patient) > 10


def exported(cases, model, folder):
    """How it ends when the training cases are written for the backend."""
    model.manifest = {"scheme": {"regions": False}}
    export, ended = CaseExport(lambda: str(folder / "staged")), []
    export.start(cases, model, lambda *step: None, ended.append)
    waitUntil(lambda: ended, 30)
    return ended[0]


def segment_id(review):
    return review.segmentation.GetSegmentation().GetNthSegmentID(0)


# ---------------------------------------------------------------- the run


def test_a_case_that_fails_does_not_keep_the_others(queue, small_model, images, tmp_path):
    images[1].write_bytes(images[1].read_bytes()[:200])
    queue.add([*cases_of(images), BatchCase("gone", files={"T1": tmp_path / "gone.nii"})])
    assert queue.missing(small_model) == ["Choose a folder for the results."]
    queue.setFolder(tmp_path / "results")
    assert queue.missing(small_model) == []
    assert ran(queue, small_model) == [DONE, FAILED, DONE, FAILED]
    assert queue.cases[1].message and "gone.nii is not there" in queue.cases[3].message
    files = sorted(path.name for path in queue.folder.iterdir())
    assert files == ["batch.json", "case_0.seg.nrrd", "case_2.seg.nrrd", "volumes.csv"]
    result = readResultFile(queue.folder / "case_0.seg.nrrd")
    assert result.labels.shape == SHAPE and (result.labels == 3).sum() > 100
    assert remembered(queue.folder)["case 1"] == (FAILED, "")
    assert queue.missing(small_model) == [], "what failed can be tried again"


def test_another_model_finds_the_place_for_a_model_of_crops(queue, scene, small_model, crop_model, images, tmp_path):
    queue.setFolder(tmp_path / "results")
    voxels, classes = example(np.random.default_rng(5), (22, 24, 26), 1)
    node = add_volume(scene, voxels[0].astype(np.float32))
    queue.add([*cases_of(images[:1]), BatchCase("loaded", nodes={"T1": node})])
    assert ran(queue, crop_model) == [FAILED, FAILED]
    assert all("crops around the ball" in case.message for case in queue.cases)
    logged = []
    queue.log = logged.append
    assert ran(queue, crop_model, small_model) == [DONE, DONE]
    assert all("balls found ball in 1 place." in case.notes and not case.message for case in queue.cases)
    assert [case.notes for case in readBatch(queue.folder)] == [queue.cases[0].notes], "kept until tomorrow"
    assert {line.partition(":")[0] for line in logged} == {"case 0", "loaded"}
    found = queue.cases[1].segmentation
    mask, _ = segmentMask(found, found.GetSegmentation().GetNthSegmentID(0))
    assert dice(mask, classes == 1) > 0.8


def test_a_thousand_lost_files_are_told_one_by_one(queue, small_model, tmp_path):
    queue.add(BatchCase(str(index), files={"T1": tmp_path / f"{index}.nii"}) for index in range(300))
    assert set(ran(queue, small_model)) == {WAITING}, "no folder, no run"
    queue.changed.clear()
    queue._model = small_model
    queue.folder = tmp_path / "results"
    assert set(ran(queue, small_model)) == {FAILED}


def test_cancelling_keeps_what_is_done_and_tomorrow_does_the_rest(queue, small_model, images, backend, tmp_path):
    queue.add(cases_of(images))
    queue.setFolder(tmp_path / "results")
    queue.changed.append(lambda: queue.cancel() if queue.cases[0].state == DONE else None)
    assert ran(queue, small_model) == [DONE, WAITING, WAITING]
    before = (queue.folder / "case_0.seg.nrrd").stat().st_mtime_ns
    tomorrow = BatchQueue(backend, lambda: str(tmp_path / "exchange"))
    tomorrow.setFolder(tmp_path / "results")
    assert [case.state for case in tomorrow.cases] == [DONE, WAITING, WAITING]
    assert tomorrow.add(cases_of(images)) == 0, "the same files are the same cases"
    assert ran(tomorrow, small_model) == [DONE] * 3
    assert (queue.folder / "case_0.seg.nrrd").stat().st_mtime_ns == before
    assert tomorrow.missing(small_model) == ["All cases are done with this model."]


def test_a_result_that_was_deleted_is_made_again_and_a_damaged_entry_is_left_out(queue, images, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    entry = {"name": "a", "files": {"T1": str(images[0])}, "state": DONE, "result": "../a.seg.nrrd"}
    entry["review"] = ACCEPTED
    (folder / "batch.json").write_text(json.dumps({"cases": [entry, {"name": "b"}, 7]}), encoding="utf-8")
    queue.setFolder(folder)
    (case,) = queue.cases
    assert (case.state, case.review, case.fileName) == (WAITING, "", "a.seg.nrrd")


@pytest.mark.parametrize("content", [b'{"cases": [', b"[]", b'{"cases": 7}', b"\xff"])
def test_a_record_that_cannot_be_read_is_told_and_never_written_over(
    queue, small_model, images, scene, tmp_path, content
):
    results, record = tmp_path / "results", tmp_path / "results" / "batch.json"
    queue.add(cases_of(images[:1]))
    queue.setFolder(results)
    assert ran(queue, small_model) == [DONE] and queue.problem == ""
    whole = record.read_bytes()
    queue.setFolder(None)
    record.write_bytes(content)
    (results / "volumes.csv").write_bytes(b"mine")
    queue.setFolder(results)
    assert f"cannot be read from {record} (it is damaged)" in queue.problem
    queue.add(cases_of(images))
    queue.cases[0].state = FAILED
    queue.tell()
    assert queue.missing(small_model) == [queue.problem], "nothing is begun where it is not known what is there"
    queue.cases[0].waitAgain()
    kept = {path.name: path.read_bytes() for path in results.iterdir() if path.name != "case_0.seg.nrrd"}
    assert kept == {"batch.json": content, "volumes.csv": b"mine"}
    record.write_bytes(whole)
    queue.tell()
    assert record.read_bytes() == whole, "what it remembers is not in the list yet"
    queue.setFolder(results)
    assert queue.problem == "" and [case.state for case in queue.cases] == [DONE, WAITING, WAITING]
    record.write_bytes(content)
    queue.tell()
    assert "cannot be read" in queue.problem and record.read_bytes() == content, "nor is one that was damaged since"


def test_cases_that_only_a_folder_remembered_stay_with_it(queue, images, tmp_path):
    mistyped, meant = tmp_path / "mistyped", tmp_path / "meant"
    for folder in (mistyped, meant):
        folder.mkdir()
    entries = [{"name": path.name, "files": {"T1": str(path)}, "state": WAITING, "result": ""} for path in images]
    (mistyped / "batch.json").write_text(json.dumps({"cases": entries}), encoding="utf-8")
    added = BatchCase("added", files={"T1": tmp_path / "added.nii"})
    queue.add([added])
    queue.setFolder(mistyped)
    assert len(queue.cases) == 4
    assert queue.add(cases_of(images[:1])) == 0, "it is there, and by now a person has asked for it"
    queue.cases[1].state = FAILED  # tried here
    queue.setFolder(meant)
    assert [case.name for case in queue.cases] == [images[0].name, images[1].name, "added"]
    assert queue.cases[2] is added and {case.state for case in queue.cases} == {WAITING}
    queue.setFolder(mistyped)
    assert {case.name for case in queue.cases} == {*(path.name for path in images), "added"}


def test_a_folder_that_was_only_chosen_is_left_alone(queue, images, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    queue.setFolder(folder)
    queue.add(cases_of(images))
    assert list(folder.iterdir()) == []


def test_a_segmentation_that_no_batch_has_made_is_never_written_over(queue, small_model, images, tmp_path):
    mine = tmp_path / "case_0.seg.nrrd"
    mine.write_bytes(b"drawn by hand")
    queue.add(cases_of(images[:1]))
    queue.setFolder(tmp_path)
    assert ran(queue, small_model) == [DONE]
    assert mine.read_bytes() == b"drawn by hand" and queue.cases[0].fileName == "case_0_2.seg.nrrd"


def test_a_corrected_case_that_is_taken_off_and_added_again_keeps_its_correction(queue, small_model, images, tmp_path):
    queue.add(cases_of(images[:1]))
    queue.setFolder(tmp_path / "results")
    assert ran(queue, small_model) == [DONE]
    correctedPath(queue.folder, queue.cases[0]).write_bytes(b"corrected")
    queue.remove(list(queue.cases))
    queue.add(cases_of(images[:1]))
    (case,) = queue.cases
    assert (case.fileName, case.state, case.review) == ("case_0.seg.nrrd", DONE, EDITED)
    assert not case.pending("another model")


def test_another_patients_image_of_the_same_name_gets_nothing_of_the_first(queue, small_model, images, tmp_path):
    anna, bert = ({"T1": path} for path in images[:2])
    queue.setFolder(tmp_path / "results")
    queue.add([BatchCase("T1", files=anna)])
    assert ran(queue, small_model) == [DONE]
    review = ReviewQueue(queue, TrainingCases(), made_by(small_model))
    review.step(True)
    paint(review.segmentation)
    review.leave()
    before = {path.name: path.read_bytes() for path in queue.folder.glob("T1*")}
    assert set(before) == {"T1.seg.nrrd", "T1.corrected.seg.nrrd"}
    queue.remove(list(queue.cases))
    queue.add([BatchCase("t1", files=bert)])
    (case,) = queue.cases
    assert (case.fileName, case.state, case.review) == ("t1_2.seg.nrrd", WAITING, "")
    queue.start(small_model, "cpu", ending=".nii.gz")
    waitUntil(lambda: not queue.running, 120)
    assert (case.fileName, case.state) == ("t1_2.nii.gz", DONE), "T1.nii.gz would be corrected as T1.corrected.seg.nrrd"
    assert {name: (queue.folder / name).read_bytes() for name in before} == before
    queue.setFolder(None)
    queue.cases = []
    queue.add([BatchCase("T1", files=anna)])
    queue.setFolder(tmp_path / "results")
    found = {one.name: (one.fileName, one.state, one.review) for one in queue.cases}
    assert found == {"t1": ("t1_2.nii.gz", DONE, ""), "T1": ("T1.seg.nrrd", DONE, EDITED)}, "to each their own"


def test_results_of_which_the_record_does_not_say_what_they_were_made_of_are_left_alone(queue, images, tmp_path):
    (tmp_path / "T1.seg.nrrd").write_bytes(b"of somebody")
    (tmp_path / "T1.corrected.seg.nrrd").write_bytes(b"corrected")
    (tmp_path / "batch.json").write_text(json.dumps({"cases": [], "made": ["T1.seg.nrrd"]}), encoding="utf-8")
    queue.setFolder(tmp_path)
    queue.add([BatchCase("T1", files={"T1": images[0]})])
    assert [(case.fileName, case.state) for case in queue.cases] == [("T1_2.seg.nrrd", WAITING)]


def test_a_file_whose_name_is_written_large_is_the_same_file_on_many_disks(images, tmp_path):
    for name in ("CASE.NII.GZ", "Case_2.Corrected.SEG.NRRD"):
        (tmp_path / name).write_bytes(b"of somebody")
    case = BatchCase("case", files={"T1": images[0]})
    ResultNames(tmp_path, {}, []).take(case, ".nii.gz")
    assert case.fileName == "case_3.nii.gz"
    ResultNames(tmp_path, {"case.nii.gz": case.identity}, []).take(case, ".nii.gz")
    assert case.fileName == "case.nii.gz", "it made that one"


def test_names_of_files_are_safe_and_differ():
    names, cases = ResultNames(None, {}, []), []
    for number, name in enumerate(("A/b: c", "a_b_c", "..", "Ödem", "x" * 300)):
        cases.append(BatchCase(name, files={"T1": Path(f"{number}.nii")}))
        names.take(cases[-1], ".seg.nrrd")
    found = [case.fileName for case in cases]
    assert found[:4] == ["A_b_c.seg.nrrd", "a_b_c_2.seg.nrrd", "case.seg.nrrd", "Ödem.seg.nrrd"]
    assert len(found[4]) < 80


def test_cases_of_the_scene_get_segmentations_there(queue, small_model, scene):
    images = [example(np.random.default_rng(seed), SHAPE, 1)[0][0].astype(np.float32) for seed in (1, 2)]
    volumes = [add_volume(scene, image, name=f"scan {index}") for index, image in enumerate(images)]
    queue.add(BatchSources.casesOfScene(T1))
    assert queue.missing(small_model) == [], "no folder is needed"
    assert ran(queue, small_model) == [DONE, DONE]
    for case, volume in zip(queue.cases, volumes, strict=True):
        assert case.nodes == {"T1": volume} and case.segmentation.GetSegmentation().GetNumberOfSegments() == 1
        assert volume.GetName() in case.segmentation.GetName()
    review = ReviewQueue(queue, TrainingCases(), made_by(small_model))
    review.open(queue.cases[1])
    assert review.accept()
    (row,) = review._trainingCases.rows
    assert row.inScene and row.segmentation is queue.cases[1].segmentation and row.channels == {"T1": volumes[1]}
    review.leave()
    assert volumes[1].GetScene() is not None and row.segmentation.GetScene() is not None, "they are not the review's"
    scene.RemoveNode(volumes[0])
    queue.cases[0].state = WAITING
    assert ran(queue, small_model)[0] == FAILED and "T1" in queue.cases[0].message


# ---------------------------------------------------------------- what is known of a result


def table_of(folder, name="volumes.csv"):
    with open(folder / name, encoding="utf-8-sig", newline="") as stream:
        return {row["case"]: row for row in csv.DictReader(stream)}


def test_volumes_and_confidence_are_kept_and_stand_in_a_table(queue, small_model, images, tmp_path):
    images[1].write_bytes(images[1].read_bytes()[:200])
    queue.add(cases_of(images))
    queue.setFolder(tmp_path / "results")
    assert ran(queue, small_model) == [DONE, FAILED, DONE]
    rows, again = table_of(queue.folder), readBatch(queue.folder)
    for case, kept in zip(queue.cases, again, strict=True):
        assert (kept.confidence, kept.volumesMl) == (case.confidence, case.volumesMl)
    array = readResultFile(queue.folder / "case_0.seg.nrrd").labels
    voxel_mm3 = np.prod(read_volume(images[0]).geometry.spacing_mm)
    assert float(rows["case 0"]["ball (mL)"]) == pytest.approx((array == 3).sum() * voxel_mm3 / 1000, abs=1e-3)
    assert 0.5 < float(rows["case 0"]["confidence"]) <= 1
    assert rows["case 1"] == {"case": "case 1", "ball (mL)": "", "confidence": "", "remarks": queue.cases[1].message}
    shutil.copytree(images[0].parent, tmp_path / "scans")
    (tmp_path / "scans" / images[1].name).unlink()
    line = ["-m", small_model.path, "-d", tmp_path / "scans", "-o", tmp_path / "by the command line", "--device", "cpu"]
    assert invres("segment", *line).code == 0
    theirs = table_of(tmp_path / "by the command line")
    assert list(theirs["case0"]) == list(rows["case 0"]), "the same columns"
    assert {**theirs["case0"], "case": ""} == {**rows["case 0"], "case": ""}, "and the same figures"


def test_a_batch_of_the_time_before_is_still_read(queue, small_model, images, tmp_path):
    queue.add(cases_of(images[:1]))
    queue.setFolder(tmp_path / "results")
    assert ran(queue, small_model) == [DONE]
    content = json.loads((queue.folder / "batch.json").read_text(encoding="utf-8"))
    for name in ("settings", "table"):
        del content[name]
    for name in ("confidence", "volumes_ml", "ways"):
        del content["cases"][0][name]
    (tmp_path / "old").mkdir()
    shutil.copyfile(queue.folder / "case_0.seg.nrrd", tmp_path / "old" / "case_0.seg.nrrd")
    (tmp_path / "old" / "batch.json").write_text(json.dumps(content), encoding="utf-8")
    queue.setFolder(tmp_path / "old")
    (case,) = queue.cases
    assert (case.state, case.confidence, case.volumesMl, queue.settings) == (DONE, None, {}, None)
    assert queue.missing(small_model) == ["All cases are done with this model."]
    content["settings"], content["table"] = {"ending": ".exe", "ways": 7}, "../elsewhere.csv"
    content["cases"][0].update(confidence="much", volumes_ml={"ball": "large", "core": 2})
    (tmp_path / "old" / "batch.json").write_text(json.dumps(content), encoding="utf-8")
    assert [(case.confidence, case.volumesMl) for case in readBatch(tmp_path / "old")] == [(None, {"core": 2.0})]
    assert readSettings(tmp_path / "old") == BatchSettings() and readTable(tmp_path / "old") == "elsewhere.csv"


def test_a_table_that_no_batch_wrote_is_left_alone_and_one_that_cannot_be_written_is_told(
    queue, small_model, images, tmp_path
):
    (tmp_path / "volumes.csv").write_text("mine", encoding="utf-8")
    queue.add(cases_of(images[:1]))
    queue.setFolder(tmp_path)
    assert ran(queue, small_model) == [DONE]
    assert (tmp_path / "volumes.csv").read_text(encoding="utf-8") == "mine"
    assert set(table_of(tmp_path, "volumes_2.csv")) == {"case 0"}
    (tmp_path / "volumes_2.csv").unlink()
    (tmp_path / "volumes_2.csv").mkdir()  # what cannot be replaced, as a file that another program holds
    queue.cases[0].review = EDITED
    queue.tell()
    assert "volumes_2.csv could not be written" in queue.problem
    assert remembered(tmp_path)["case 0"] == (DONE, EDITED), "the batch itself is remembered"
    (tmp_path / "volumes_2.csv").rmdir()
    queue.tell()
    assert queue.problem == "" and table_of(tmp_path, "volumes_2.csv")["case 0"]["remarks"] == "Corrected by hand."


def test_two_cases_of_one_name_are_told_apart_by_their_results(tmp_path):
    done = [BatchCase("a", fileName=name, state=DONE, confidence=0.5) for name in ("a.seg.nrrd", "a_2.nii.gz")]
    writeTable(tmp_path / "volumes.csv", done)
    assert set(table_of(tmp_path)) == {"a", "a_2"}
    assert (tmp_path / "volumes.csv").read_bytes().startswith(b"\xef\xbb\xbfcase,"), "so that spreadsheets read umlauts"


def test_what_a_person_corrected_is_what_the_table_says(reviewed, small_model, tmp_path):
    reviewed.step(True)
    before = reviewed.current.volumesMl["ball"]
    paint(reviewed.segmentation, 400)
    reviewed.accept()
    mask, matrix = segmentMask(reviewed.segmentation, segment_id(reviewed))
    row = table_of(tmp_path / "results")["case 0"]
    wanted = np.count_nonzero(mask) * abs(np.linalg.det(matrix[:3, :3])) / 1000
    assert float(row["ball (mL)"]) == pytest.approx(wanted, abs=1e-3) and float(row["ball (mL)"]) > before
    assert row["remarks"].endswith("Accepted in the review.")


def test_a_second_correction_reaches_the_table_and_the_record_as_well(reviewed, small_model, tmp_path):
    case, told = reviewed._queue.cases[0], []
    for count in (400, 2000):
        reviewed.open(case)
        paint(reviewed.segmentation, count)
        reviewed.leave()
        assert (float(table_of(tmp_path / "results")["case 0"]["ball (mL)"]), case.review) == (
            case.volumesMl["ball"],
            EDITED,
        )
        told.append(readBatch(tmp_path / "results")[0].volumesMl["ball"])
    assert told[1] == case.volumesMl["ball"] > told[0]


# ---------------------------------------------------------------- choices


def test_other_ways_are_asked_for_and_make_anew_what_was_made_otherwise(queue, small_model, images, scene, tmp_path):
    voxels = example(np.random.default_rng(5), SHAPE, 1)[0][0].astype(np.float32)
    queue.add([*cases_of(images[:2]), BatchCase("loaded", nodes={"T1": add_volume(scene, voxels)})])
    queue.setFolder(tmp_path / "results")
    assert ran(queue, small_model) == [DONE] * 3
    queue.cases[1].review = ACCEPTED
    ways = SegmentWays(mirrored=False, keepPieces=True)
    assert queue.missing(small_model) == ["All cases are done with this model."]
    assert queue.missing(small_model, ways) == []
    count = len(queue._backend.requests)
    queue.start(small_model, "cpu", None, ways)
    waitUntil(lambda: not queue.running, 120)
    asked = queue._backend.requests[count:]
    assert len(asked) == 2, "what was accepted is not made anew"
    assert all("--mirror" in one and "--keep-pieces" in one for one in asked)
    assert queue.missing(small_model, ways) == ["All cases are done with this model."]
    assert readSettings(queue.folder) == BatchSettings(small_model.sha256, ways, ".seg.nrrd")
    assert [case.ways for case in readBatch(queue.folder)] == [ways, SegmentWays()]


def test_results_are_there_until_another_model_makes_them_anew(queue, small_model, images, tmp_path):
    queue.add(cases_of(images))
    queue.setFolder(tmp_path / "results")
    assert ran(queue, small_model) == [DONE] * 3
    known = [(case.confidence, dict(case.volumesMl), case.fileName) for case in queue.cases]
    rows, states = table_of(queue.folder), []
    other = SimpleNamespace(**{**vars(small_model), "sha256": "other"})
    assert (queue.anew(small_model), queue.anew(other)) == (0, 3)
    queue.changed.append(lambda: states.append([case.state for case in queue.cases]))
    queue.start(other, "cpu", ending=".nii.gz")
    assert set(ReviewQueue(queue, TrainingCases(), made_by(small_model)).cases) == set(queue.cases[1:]), (
        "those that are not begun can be reviewed"
    )
    queue.cancel()
    waitUntil(lambda: not queue.running, 60)
    assert states[0] == ["running", DONE, DONE] and states[-1] == [DONE] * 3 and queue.left == 3
    assert [(case.confidence, case.volumesMl, case.fileName) for case in queue.cases] == known
    assert table_of(queue.folder) == rows and not list(queue.folder.glob("*.nii.gz"))
    assert [case.state for case in readBatch(queue.folder)] == [DONE] * 3
    queue.cases[2].review = EDITED
    queue.changed.append(lambda: queue.cancel() if queue.cases[0].model == "other" else None)
    queue.start(other, "cpu")
    waitUntil(lambda: not queue.running, 60)
    assert [case.model == "other" for case in queue.cases] == [True, False, False] and queue.left == 1
    assert queue.missing(other) == [] and queue.anew(other) == 1, "it can be gone on with"


def test_what_is_corrected_while_it_is_made_anew_stays(queue, small_model, images, tmp_path):
    queue.add(cases_of(images[:1]))
    queue.setFolder(tmp_path / "results")
    assert ran(queue, small_model) == [DONE]
    review = ReviewQueue(queue, TrainingCases(), made_by(small_model))
    review.step(True)
    queue.start(SimpleNamespace(**{**vars(small_model), "sha256": "other"}), "cpu")
    paint(review.segmentation, 400)
    review.leave()
    (case,) = queue.cases
    corrected = case.volumesMl["ball"]
    waitUntil(lambda: not queue.running, 60)
    assert (case.state, case.review, case.volumesMl["ball"]) == (DONE, EDITED, corrected)
    assert float(table_of(queue.folder)["case 0"]["ball (mL)"]) == corrected


def test_results_as_label_maps_are_reviewed_with_the_names_of_the_model(queue, small_model, images, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "case_1.nii.gz").write_bytes(b"mine")
    queue.add(cases_of(images))
    queue.setFolder(results)
    assert ran(queue, small_model)[0] == DONE
    queue.cases[2].review = ACCEPTED
    queue.start(small_model, "cpu", ending=".nii.gz")
    waitUntil(lambda: not queue.running, 120)
    names = [case.fileName for case in queue.cases]
    assert names == ["case_0.nii.gz", "case_1_2.nii.gz", "case_2.seg.nrrd"], "nothing of another is written over"
    assert (results / "case_1.nii.gz").read_bytes() == b"mine"
    assert queue.missing(small_model, ending=".nii.gz") == ["All cases are done with this model."]
    assert queue.cases[0].notes == "case_0.seg.nrrd beside it was made earlier, with other settings."
    assert "case_1.seg.nrrd" in readBatch(results)[1].notes and not queue.cases[2].notes, "nor of what is of nobody"
    labels = read_volume(results / "case_0.nii.gz", kind="labels").array
    review = ReviewQueue(queue, TrainingCases(), made_by(small_model))
    review.open(queue.cases[0])
    segment = review.segmentation.GetSegmentation().GetNthSegment(0)
    assert segment.GetName() == "ball" and segment.GetColor() == pytest.approx((250 / 255, 20 / 255, 40 / 255))
    assert np.count_nonzero(segmentMask(review.segmentation, segment_id(review))[0]) == (labels == 3).sum() > 100
    paint(review.segmentation)
    review.leave()
    assert (results / "case_0.corrected.seg.nrrd").is_file() and in_scene() == []
    other = SimpleNamespace(**{**vars(small_model), "sha256": "other"})
    with pytest.raises(ConversionError, match=r"case_1_2\.nii\.gz has the value 3") as refused:
        ReviewQueue(queue, TrainingCases(), made_by(other)).open(queue.cases[1])
    assert refused.value.hint == "In the tab Models, import the model that made it." and in_scene() == []
    queue.folder = images[0].parent
    assert "Choose another folder for the results" in queue.missing(small_model, ending=".nii.gz")[0]
    assert queue.missing(small_model) == [], "a .seg.nrrd is never taken for an image"


def turn_left_handed(path):
    """The same NIfTI image with its first axis the other way round, as many scanners' converters write it."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    size, offset = struct.unpack_from("<3h", content, 42), int(struct.unpack_from("<f", content, 108)[0])
    voxels = np.frombuffer(bytes(content[offset:]), np.uint8).reshape(*size[::-1], -1)
    matrix = np.array([struct.unpack_from("<4f", content, 280 + 16 * row) for row in range(3)])
    assert struct.unpack_from("<h", content, 254)[0] > 0 and np.linalg.det(matrix[:, :3]) > 0
    matrix[:, 3] += matrix[:, 0] * (size[0] - 1)
    matrix[:, 0] *= -1
    struct.pack_into("<2h", content, 252, 0, 1)  # only the matrix holds, no quaternion
    for row in range(3):
        struct.pack_into("<4f", content, 280 + 16 * row, *matrix[row])
    path.write_bytes(gzip.compress(bytes(content[:offset]) + np.ascontiguousarray(voxels[:, :, ::-1]).tobytes()))


@pytest.mark.parametrize("ending", [".seg.nrrd", ".nii.gz"])
def test_results_of_left_handed_images_are_reviewed_and_learned_from(queue, small_model, images, tmp_path, ending):
    for path in images:
        turn_left_handed(path)
    # The backend's axes are those of the file in reverse, and so is the sign.
    assert np.linalg.det(read_volume(images[0]).geometry.affine[:3, :3]) > 0
    queue.add(cases_of(images))
    queue.setFolder(tmp_path / "results")
    queue.start(small_model, "cpu", ending=ending)
    waitUntil(lambda: not queue.running, 120)
    made = read_volume(tmp_path / "results" / f"case_0{ending}", kind="labels")
    assert np.linalg.det(made.geometry.affine[:3, :3]) > 0, "on the grid of the file"
    review = ReviewQueue(queue, TrainingCases(), made_by(small_model))
    review.open(queue.cases[0])
    mask, matrix = segmentMask(review.segmentation, segment_id(review))
    assert np.linalg.det(matrix[:3, :3]) > 0, "Slicer has turned the image when it loaded it"
    here, there = np.argwhere(mask)[:, ::-1], np.argwhere(made.array == 3)
    assert len(here) == len(there) > 100
    centre = matrix[:3, :3] @ here.mean(0) + matrix[:3, 3]
    assert centre == pytest.approx(made.geometry.affine[:3, :3] @ there.mean(0) + made.geometry.affine[:3, 3], abs=1e-3)
    review.accept()
    review.leave()
    dataset = read_dataset(exported(review._trainingCases, small_model, tmp_path).dataset)
    assert not [found for found in check_dataset(dataset) if found.severity == "error"]
    (image,), label = dataset.load(dataset.case("case01"))
    learned, wanted = label.canonical(), made.canonical()
    assert np.array_equal(learned.array > 0, wanted.array == 3), "the voxels that the model found, and no mirror image"
    assert image.canonical().geometry.same_as(learned.geometry)


def test_a_label_map_with_sides_is_reviewed_with_both(queue, one_channel_package, images, tmp_path):
    package = with_sides(one_channel_package, tmp_path / "sided")
    model = model_info(package)
    # A ball to one side of the scanner's middle, which tells the side where no head does. No wider than this, as the
    # model takes noise for a ball in a window that shows none.
    voxels, classes = example(np.random.default_rng(3), (18, 20, 30), 1)
    image = sitk.GetImageFromArray(voxels[0].astype(np.float32))
    assert np.flatnonzero(classes.any((0, 1)))[0] > 11
    image.SetOrigin((-11.0, 0.0, 0.0))
    sitk.WriteImage(image, str(images[0]))
    queue.add(cases_of(images))
    queue.setFolder(tmp_path / "results")
    queue.start(model, "cpu", ending=".nii.gz")
    waitUntil(lambda: not queue.running, 120)
    review = ReviewQueue(queue, TrainingCases(), made_by(model))
    seen = set()
    for case in queue.cases:
        review.open(case)
        inside = review.segmentation.GetSegmentation()
        names = [inside.GetNthSegment(index).GetName() for index in range(inside.GetNumberOfSegments())]
        assert names == list(case.volumesMl)
        for index, name in enumerate(names):
            mask, matrix = segmentMask(review.segmentation, inside.GetNthSegmentID(index))
            volume = np.count_nonzero(mask) * abs(np.linalg.det(matrix[:3, :3])) / 1000
            assert volume == pytest.approx(case.volumesMl[name], abs=1e-3)
        seen |= set(names)
    assert seen == {"left ball", "right ball", "ball"}, "in the others they cannot be told apart"
    review.leave()


def test_regions_of_a_label_map_are_whole(scene, tmp_path):
    array = np.zeros((4, 5, 6), np.uint8)
    array[1:3, 1:4, 1:5] = 2
    array[2, 2, 2:4] = 3
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "tumour.nii.gz"))
    labels = [SegmentLabel("whole", 2), SegmentLabel("core", 3)]
    found = NodeFiles.readLabelMap(tmp_path / "tumour.nii.gz", labels, {"whole": (2, 3), "core": (3,)})
    assert np.array_equal(found.mask(0), array > 0), "what lies in the core lies in the whole as well"
    assert np.array_equal(found.mask(1), array == 3) and scene.GetNumberOfNodesByClass("vtkMRMLVolumeNode") == 0


# ---------------------------------------------------------------- the review


@pytest.fixture
def reviewed(queue, small_model, images, tmp_path):
    """A batch of three that is done, and its review; the model is as sure of one as of the other."""
    queue.add(cases_of(images))
    queue.setFolder(tmp_path / "results")
    assert ran(queue, small_model) == [DONE] * 3
    for case in queue.cases:
        case.confidence = 0.9
    return ReviewQueue(queue, TrainingCases(), made_by(small_model))


def in_scene():
    kinds = ("vtkMRMLScalarVolumeNode", "vtkMRMLSegmentationNode")
    return sorted(node.GetName() for kind in kinds for node in slicer.util.getNodesByClass(kind))


def test_stepping_through_leaves_no_nodes_behind(reviewed, small_model, scene):
    assert reviewed.step(True)
    assert in_scene() == ["case 0", "case 0 segmentation"]
    segment = reviewed.segmentation.GetSegmentation().GetNthSegment(0)
    assert segment.GetName() == "ball" and segment.GetColor() == pytest.approx((250 / 255, 20 / 255, 40 / 255))
    result = readResultFile(reviewed._queue.folder / "case_0.seg.nrrd")
    assert np.count_nonzero(segmentMask(reviewed.segmentation, segment_id(reviewed))[0]) == (result.labels == 3).sum()
    assert not reviewed.step(False)
    assert reviewed.step(True) and reviewed.step(True)
    assert not reviewed.step(True) and in_scene() == ["case 2", "case 2 segmentation"]
    count = scene.GetNumberOfNodes()
    reviewed.step(False)
    assert scene.GetNumberOfNodes() == count, "display and storage nodes go as well"
    reviewed.leave()
    assert in_scene() == [] and remembered(reviewed._queue.folder)["case 0"] == (DONE, "")
    assert not list(reviewed._queue.folder.glob("*corrected*"))


def test_the_least_sure_case_comes_first_and_the_way_back_is_the_way_that_was_come(reviewed, small_model):
    cases = reviewed._queue.cases
    for case, confidence in zip(cases, (0.9, 0.7, 0.8), strict=True):
        case.confidence = confidence
    assert [case.name for case in reviewed.cases] == ["case 1", "case 2", "case 0"]
    reviewed.step(True)
    reviewed.accept()
    assert reviewed.current is cases[1] and reviewed.cases[0] is cases[1], "it keeps its place"
    cases[0].confidence = 0.0  # as if it had just been done: nothing was found
    reviewed.step(True)
    assert reviewed.current is cases[0]
    reviewed.step(False)
    assert reviewed.current is cases[1]
    reviewed.leave()
    cases[2].confidence, cases[0].review = None, EDITED
    again = ReviewQueue(reviewed._queue, TrainingCases(), made_by(small_model))
    assert again.cases == [cases[2], cases[0], cases[1]], "looked at by nobody, not accepted yet, accepted"


def test_what_was_changed_is_there_again_tomorrow(reviewed, small_model, backend, scene, tmp_path):
    reviewed.step(True)
    paint(reviewed.segmentation)
    voxels = np.count_nonzero(segmentMask(reviewed.segmentation, segment_id(reviewed))[0])
    reviewed.step(True)
    assert remembered(tmp_path / "results")["case 0"] == (DONE, EDITED)
    tomorrow = BatchQueue(backend, lambda: str(tmp_path / "exchange"))
    tomorrow.setFolder(tmp_path / "results")
    review = ReviewQueue(tomorrow, TrainingCases(), made_by(small_model))
    reviewed.leave()
    review.open(tomorrow.cases[0])
    assert np.count_nonzero(segmentMask(review.segmentation, segment_id(review))[0]) == voxels
    untouched = readResultFile(tmp_path / "results" / "case_0.seg.nrrd")
    assert (untouched.labels == 3).sum() < voxels, "what the model found is kept beside it"
    assert not tomorrow.cases[0].pending("another model"), "work of a person is never overwritten"
    review.leave()


def test_what_is_accepted_becomes_a_training_case_of_files_and_its_nodes_go(reviewed, small_model, images, tmp_path):
    reviewed.step(True)
    paint(reviewed.segmentation)
    reviewed.accept()
    (row,) = reviewed._trainingCases.rows
    label = correctedPath(tmp_path / "results", reviewed.current)
    assert row.name == "case 0" and not row.inScene and row.stored.paths == {"T1": str(images[0])}
    assert row.stored.label == str(label) and label.is_file() and row.stored.segments == ("ball",)
    assert remembered(tmp_path / "results")["case 0"] == (DONE, ACCEPTED)
    reviewed.step(True)
    assert in_scene() == ["case 1", "case 1 segmentation"]
    reviewed.accept()
    untouched = correctedPath(tmp_path / "results", reviewed.current)
    assert untouched.is_file(), "what was right as it is, too: the next model's result takes the place of this one's"
    reviewed.step(False)
    row.findings = [Finding("note", "It is small.")]
    reviewed.segmentation.GetSegmentation().RemoveSegment(segment_id(reviewed))
    reviewed.leave()
    assert in_scene() == [] and len(reviewed._trainingCases.rows) == 2
    assert not row.findings and row.stored.segments == (), "what is corrected after all is what is learned"
    reviewed.step(True)
    reviewed.step(True)
    assert reviewed.current.name == "case 2", "the first that is not accepted"


def test_accepted_cases_outlive_the_scene_and_are_what_the_backend_learns_from(
    reviewed, small_model, scene, images, tmp_path
):
    cases = reviewed._trainingCases
    cases.setNode(scene.AddNewNodeByClass("vtkMRMLScriptedModuleNode", "InvResSegment"))
    reviewed.step(True)
    ball = segmentMask(reviewed.segmentation, segment_id(reviewed))[0]
    # Drawn with overlap, in a box of its own that looks out of the image: Slicer keeps layers then.
    box, matrix = np.ones((10, 12, 16), np.uint8), vtk.vtkMatrix4x4()
    reviewed.background.GetIJKToRASMatrix(matrix)
    corner = matrix.MultiplyPoint((-2, 3, 2, 1))
    for axis in range(3):
        matrix.SetElement(axis, 3, corner[axis])
    drawn = slicer.vtkOrientedImageData()
    drawn.SetDimensions(*box.shape[::-1])
    drawn.GetPointData().SetScalars(numpy_to_vtk(box.ravel(), deep=True))
    drawn.SetGeometryFromImageToWorldMatrix(matrix)
    segment = slicer.vtkSegment()
    segment.SetName("Läsion")
    segment.AddRepresentation("Binary labelmap", drawn)
    reviewed.segmentation.GetSegmentation().AddSegment(segment, "drawn")
    reviewed.accept()
    assert readMasks(cases.rows[0].stored.label).layers.shape[3] == 2
    for _again in range(2):
        reviewed.step(True)
        reviewed.accept()
    reviewed.leave()
    scene.SetURL(str(tmp_path / "scene.mrml"))
    assert scene.Commit()
    reviewed.forget()
    cases.setNode(None)
    scene.Clear(False)
    scene.SetURL(str(tmp_path / "scene.mrml"))
    assert scene.Import() and in_scene() == [] and cases.rows == []
    wanted = [(f"case {number}", f"case0{number + 1}") for number in range(3)]
    cases.setNode(scene.GetFirstNodeByClass("vtkMRMLScriptedModuleNode"))
    assert [(row.name, row.code) for row in cases.rows] == wanted, "saved with the scene"
    cases.setNode(None)
    scene.Clear(False)
    cases.setNode(scene.AddNewNodeByClass("vtkMRMLScriptedModuleNode", "InvResSegment"))
    assert [(row.name, row.code) for row in cases.rows] == wanted, "and there when it is closed unsaved"
    cases.choose({"läsion": "lesion"})
    small_model.manifest = {"scheme": {"regions": False}}
    assert not problems(cases, small_model, {row.key: findingsOf(cases, row, small_model) for row in cases.rows})
    dataset = read_dataset(exported(cases, small_model, tmp_path).dataset)
    assert not [found for found in check_dataset(dataset) if found.severity == "error"]
    (image,), label = dataset.load(dataset.case("case01"))
    assert np.array_equal(image.array, read_volume(images[0]).array)
    value = {one.name: one.values[0] for one in dataset.scheme.labels}
    wanted = value["ball"] * ball.astype(int)
    wanted[2:12, 3:15, 0:14] = value["lesion"]
    assert np.array_equal(label.array, wanted)
    before = stampOf(cases, cases.rows[0], small_model)
    shutil.copyfile(tmp_path / "results" / "case_1.corrected.seg.nrrd", cases.rows[0].stored.label)
    assert stampOf(cases, cases.rows[0], small_model) != before
    outcome = exported(cases, small_model, tmp_path)
    assert outcome.state == "failed" and "Accept the case again" in outcome.hint, "its segments are others"


def test_a_deleted_segment_is_a_change(reviewed, small_model, tmp_path):
    reviewed.step(True)
    reviewed.segmentation.GetSegmentation().RemoveSegment(segment_id(reviewed))
    new = reviewed.segmentation.GetSegmentation()
    assert new.GetNumberOfSegments() == 0
    reviewed.leave()
    assert remembered(tmp_path / "results")["case 0"] == (DONE, EDITED)


def test_a_case_with_nothing_in_it_is_saved_left_and_opened_again(reviewed, small_model, tmp_path):
    reviewed.step(True)
    segmentation = reviewed.segmentation.GetSegmentation()
    segmentation.RemoveSegment(segment_id(reviewed))
    segmentation.SetSourceRepresentationName("Closed surface")  # Slicer's own writer refuses it then, whole
    assert not reviewed.accept() and reviewed._trainingCases.rows == [], "there is nothing to learn from"
    reviewed.step(True)
    assert remembered(tmp_path / "results")["case 0"] == (DONE, ACCEPTED)
    corrected = tmp_path / "results" / "case_0.corrected.seg.nrrd"
    empty, result = read_volume(corrected, kind="labels"), read_volume(tmp_path / "results" / "case_0.seg.nrrd")
    assert not empty.array.any() and empty.geometry.same_as(result.geometry), "on the grid of the image"
    reviewed.step(False)
    again = reviewed.segmentation
    assert again.GetSegmentation().GetNumberOfSegments() == 0 and not reviewed.save(), "nothing has changed since"
    role = again.GetReferenceImageGeometryReferenceRole()
    assert again.GetNodeReference(role) is reviewed.background, "so that segments can be drawn in it after all"
    again.GetSegmentation().AddEmptySegment("drawn", "drawn")
    assert reviewed.save()


def test_a_case_that_cannot_be_loaded_is_told_and_skipped(reviewed, small_model, images):
    images[1].unlink()
    reviewed.step(True)
    with pytest.raises(ConversionError, match="is not there any more"):
        reviewed.open(reviewed.cases[1])
    assert in_scene() == [] and reviewed.current is None
    result = reviewed._queue.folder / "case_2.seg.nrrd"
    result.write_bytes(result.read_bytes()[:-20])
    with pytest.raises(ConversionError, match="could not be read"):
        reviewed.open(reviewed.cases[2])
    assert in_scene() == []


def test_changes_that_cannot_be_saved_keep_the_case_open(reviewed, small_model, monkeypatch):
    from InvResSegmentLib import NodeFiles

    reviewed.step(True)
    paint(reviewed.segmentation)

    def full(*_arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(NodeFiles, "saveSegmentation", full)
    with pytest.raises(OSError, match="No space"):
        reviewed.step(True)
    assert reviewed.current.name == "case 0" and in_scene() == ["case 0", "case 0 segmentation"]


# ---------------------------------------------------------------- the tab


@pytest.fixture
def tab(scene, backend, one_channel_package, tmp_path):
    resources = Path(BatchSources.__file__).parents[1] / "Resources"
    services = SimpleNamespace(
        log=lambda text: None,
        resourcePath=lambda name: str(resources / name),
        backend=backend,
        cases=TrainingCases(),
        problem=lambda: "",
    )
    pythonqt.slotErrors.clear()
    qtclasses.answers.clear()
    qt.QSettings().setValue("InvResSegment/Device", "cpu")
    tab = BatchTab(services)
    tab.widget.show()
    catalogue, found = ModelCatalogue(backend, one_channel_package.path.parent), []
    catalogue.refresh(lambda models, error: found.append(models))
    waitUntil(lambda: found, 60)
    tab.setModels([model for model in found[0] if model.name == "balls"][:1], "")
    yield tab
    tab.cancel()
    waitUntil(lambda: not tab.queue.running, 30)
    tab.cleanup()
    tab.widget.hide()
    assert not pythonqt.slotErrors and not qtclasses.answers


def test_from_a_folder_to_accepted_cases_with_the_mouse_alone(tab, data, tmp_path):
    assert "Add cases." in tab.ui.startButton.toolTip and not tab.ui.startButton.enabled
    assert not tab.ui.dicomButton.enabled, "no database is open"
    qtclasses.answers.append(str(data))
    tab.ui.datasetButton.click()
    waitUntil(lambda: tab.ui.casesTable.rowCount == 3, 60)
    assert "Choose a folder for the results." in tab.ui.startButton.toolTip
    (tmp_path / "results").mkdir()
    tab.ui.folderEdit.currentPath = str(tmp_path / "results")
    assert tab.ui.startButton.enabled and tab.ui.reviewButton.isHidden()
    tab.ui.startButton.click()
    assert tab.ui.startButton.text == "Cancel" and not tab.ui.batchProgress.isHidden()
    waitUntil(lambda: not tab.queue.running, 120)
    assert [tab.ui.casesTable.item(row, 2).text() for row in range(3)] == ["done"] * 3
    assert "All cases are done" in tab.ui.batchNoticeText.text
    assert not tab.ui.reviewButton.isHidden() and not tab.ui.acceptButton.enabled
    sure = [float(tab.ui.casesTable.item(row, 3).text()) for row in range(3)]
    order = sorted(range(3), key=lambda row: tab.queue.cases[row].confidence)
    assert sure == [round(case.confidence, 2) for case in tab.queue.cases] and 0 < min(sure) <= 1
    told = tab.ui.casesTable.item(0, 0).toolTip()
    assert f"Confidence {sure[0]:.2f} of 1." in told and f"ball: {tab.queue.cases[0].volumesMl['ball']:.2f} mL" in told
    tab.ui.nextButton.click()
    assert f"case{order[0]}" in tab.ui.reviewText.text and tab.ui.acceptButton.enabled, "the least sure one"
    tab.ui.acceptButton.click()
    assert tab.ui.casesTable.item(order[0], 4).text() == "accepted" and "1 of 3 accepted" in tab.ui.reviewText.text
    assert [row.name for row in tab._services.cases.rows] == [f"case{order[0]}"]
    tab.ui.nextButton.click()
    tab.ui.casesTable.selectRow(order[1])
    tab.ui.removeButton.click()
    assert in_scene() == [] and tab.ui.casesTable.rowCount == 2


def test_a_plain_folder_and_a_wrong_one(tab, images, tmp_path):
    (tmp_path / "plain").mkdir()
    images[0].rename(tmp_path / "plain" / images[0].name)
    qtclasses.answers.append(str(tmp_path / "plain"))
    tab.ui.datasetButton.click()
    waitUntil(lambda: tab.ui.casesTable.rowCount == 1, 60)
    qtclasses.answers.append(str(tmp_path / "nothing.json"))
    tab.ui.jsonButton.click()
    waitUntil(lambda: "Reading" not in tab.ui.batchNoticeText.text, 60)
    assert "nothing.json" in tab.ui.batchNoticeText.text and tab.ui.casesTable.rowCount == 1
    tab.queue.cases[0].files["T1"].unlink()
    (tmp_path / "results").mkdir()
    tab.ui.folderEdit.currentPath = str(tmp_path / "results")
    tab.ui.startButton.click()
    waitUntil(lambda: not tab.queue.running, 60)
    assert "is not there any more" in tab.ui.batchNoticeText.text, "a failure is told, not hidden in a tool tip"


def test_the_dicom_database_is_read_study_by_study(tab, tmp_path, monkeypatch):
    array = example(np.random.default_rng(8), SHAPE, 1)[0][0][:4]
    series = {"1.2.3": write_series(tmp_path, array, "1.2.3", "T1 MPRAGE")}
    monkeypatch.setattr(slicer, "dicomDatabase", Database(series), raising=False)
    tab.setupChanged()
    tab.ui.dicomButton.click()
    assert tab.ui.startButton.text == "Cancel" and not tab.ui.sceneButton.enabled
    tab.ui.startButton.click()
    standins.pump(0.1)
    assert tab.ui.casesTable.rowCount == 0 and tab.ui.batchNotice.isHidden()
    tab.ui.dicomButton.click()
    waitUntil(lambda: tab.ui.casesTable.rowCount == 1, 10)
    assert tab.ui.casesTable.item(0, 0).text() == "Anna, head" and tab.ui.startButton.text == "Start"


def test_closing_the_scene_saves_what_was_changed_in_the_open_case(tab, images, small_model, scene, tmp_path):
    tab.queue.add(cases_of(images[:1]))
    tab.queue.setFolder(tmp_path / "results")
    ran(tab.queue, small_model)
    tab.ui.nextButton.click()
    paint(tab.review.segmentation)
    tab.setParameterNode(None)
    scene.Clear(False)
    assert remembered(tmp_path / "results")["case 0"] == (DONE, EDITED)
    assert (tmp_path / "results" / "case_0.corrected.seg.nrrd").is_file() and tab.review.current is None


def test_the_version_that_takes_over_is_chosen_and_another_choice_stays(tab):
    (model,) = tab._models
    tuned = replace(model, sha256="b", version="1.1.0", active=True)
    tab.setModels([replace(model, active=False), tuned], "")
    assert tab.model is tuned
    other = replace(model, sha256="c", name="other", active=True)
    tab.setModels([other, replace(tuned, active=True)], "")
    assert tab.model.sha256 == "b"
    tab.setModels([], "")
    assert tab.model is None


def test_cases_of_the_scene_go_with_the_scene(tab, scene):
    add_volume(scene, np.zeros((8, 8, 8), np.float32), name="scan")
    tab.ui.sceneButton.click()
    assert tab.ui.casesTable.rowCount == 1
    tab.ui.sceneButton.click()
    assert "in the list already" in tab.ui.batchNoticeText.text
    tab.setParameterNode(None)
    scene.Clear(False)
    assert tab.ui.casesTable.rowCount == 0


def test_folders_of_dicom_series_are_cases(tab, small_model, tmp_path):
    for number, name in enumerate(("anna", "bert")):
        array = example(np.random.default_rng(number), SHAPE, 1)[0][0]
        write_series(tmp_path / "scans" / name, array, f"1.2.{number}", "T1 MPRAGE")
    (tmp_path / "scans" / "notes").mkdir()
    qtclasses.answers.append(str(tmp_path / "scans"))
    tab.ui.datasetButton.click()
    waitUntil(lambda: tab.ui.casesTable.rowCount == 2, 60)
    assert [case.files for case in tab.queue.cases] == [{"T1": tmp_path / "scans" / name} for name in ("anna", "bert")]
    (tmp_path / "results").mkdir()
    tab.ui.folderEdit.currentPath = str(tmp_path / "results")
    tab.ui.startButton.click()
    waitUntil(lambda: not tab.queue.running, 120)
    assert [case.state for case in tab.queue.cases] == [DONE, DONE], tab.queue.cases[0].message
    tab.ui.nextButton.click()
    assert tab.review.background.GetImageData().GetDimensions() == SHAPE[::-1]
    tab.ui.acceptButton.click()
    tab.review.leave()
    dataset = read_dataset(exported(tab._services.cases, small_model, tmp_path).dataset)
    assert not [found for found in check_dataset(dataset) if found.severity == "error"], "it can be learned from"


def test_a_folder_is_read_as_the_command_line_reads_it(tab, images, tmp_path):
    (tmp_path / "imagesTs").mkdir()
    for path in images:
        path.rename(tmp_path / "imagesTs" / path.name)
    (tmp_path / "imagesTs" / "case0_seg.nii.gz").write_bytes(b"")
    qtclasses.answers.append(str(tmp_path / "imagesTs"))
    tab.ui.datasetButton.click()
    waitUntil(lambda: tab.ui.casesTable.rowCount == 3, 60)
    assert [case.name for case in tab.queue.cases] == ["case0", "case1", "case2"], "numbered, and no label map"


def test_a_batch_that_is_gone_on_with_keeps_its_model_and_settings(tab, data, tmp_path):
    (model,) = tab._models
    able = replace(model, mirrored=2, onePiece=True)
    other = replace(able, sha256="other", name="other")
    tab.setModels([able, other], "")
    assert not tab.ui.mirrorBox.isHidden() and not tab.ui.piecesBox.isHidden()
    qtclasses.answers.append(str(data))
    tab.ui.datasetButton.click()
    waitUntil(lambda: tab.ui.casesTable.rowCount == 3, 60)
    (tmp_path / "results").mkdir()
    tab.ui.folderEdit.currentPath = str(tmp_path / "results")
    tab.ui.mirrorBox.checked = tab.ui.piecesBox.checked = False
    tab.ui.endingBox.currentIndex = 1
    tab.ui.startButton.click()
    assert not tab.ui.optionsRow.enabled
    waitUntil(lambda: not tab.queue.running, 120)
    assert sorted(path.name for path in (tmp_path / "results").glob("case*")) == [f"case{n}.nii.gz" for n in range(3)]
    request = tab._services.backend.requests[-1]
    assert "--mirror" in request and "--keep-pieces" in request
    assert "All cases are done with this model." in tab.ui.startButton.toolTip
    tab.ui.piecesBox.checked = True
    assert tab.ui.startButton.enabled, "they can be made otherwise"
    tab.ui.mirrorBox.checked = True
    tab.ui.endingBox.currentIndex, tab.ui.modelBox.currentIndex = 0, 1
    (tmp_path / "elsewhere").mkdir()
    for folder in ("elsewhere", "results"):
        tab.ui.folderEdit.currentPath = str(tmp_path / folder)
    assert tab.model is able and tab.ui.endingBox.currentIndex == 1
    assert not tab.ui.mirrorBox.checked and not tab.ui.piecesBox.checked
    assert "All cases are done with this model." in tab.ui.startButton.toolTip
    tab.setModels([replace(model, sha256="plain")], "")
    assert tab.ui.mirrorBox.isHidden() and tab.ui.piecesBox.isHidden(), "where they mean nothing they are not there"
    assert tab._ways.ways(tab.model) == SegmentWays(), "nor do they change anything"


def test_results_of_a_model_that_is_gone_are_not_made_anew_without_a_word(tab, images, tmp_path):
    (model,) = tab._models
    (tmp_path / "results").mkdir()
    (tmp_path / "elsewhere").mkdir()
    tab.queue.add(cases_of(images))
    tab.ui.folderEdit.currentPath = str(tmp_path / "results")
    tab.ui.startButton.click()
    waitUntil(lambda: not tab.queue.running, 60)
    tab.queue.cases[0].review = ACCEPTED
    tab.queue.tell()
    tab.setModels([], "")
    tab.setModels([replace(model, sha256="z", name="quite <another>")], "")
    said = tab.ui.batchNoticeText.text
    assert "Start makes 2 of them anew with quite &lt;another&gt;" in said, said
    assert "2 results were made by another model" in tab.ui.startButton.toolTip and tab.ui.startButton.enabled
    tab.ui.folderEdit.currentPath = str(tmp_path / "elsewhere")
    assert tab.ui.batchNotice.isHidden()
    tab.ui.folderEdit.currentPath = str(tmp_path / "results")
    assert tab.ui.batchNoticeText.text == said
    tab.ui.startButton.click()
    tab.ui.startButton.click()
    waitUntil(lambda: not tab.queue.running, 60)
    assert "Stopped: 1 of 3 cases are done." in tab.ui.batchNoticeText.text


def test_a_label_map_is_reviewed_when_another_version_has_taken_over(tab, images, tmp_path):
    (model,) = tab._models
    (tmp_path / "results").mkdir()
    tab.queue.add(cases_of(images[:1]))
    tab.ui.folderEdit.currentPath = str(tmp_path / "results")
    tab.ui.endingBox.currentIndex = 1
    tab.ui.startButton.click()
    waitUntil(lambda: not tab.queue.running, 60)
    heir = replace(model, sha256="b", version="1.1.0", active=True, labels=())
    tab.setModels([replace(model, active=False), heir], "")
    assert tab.model is heir
    tab.ui.nextButton.click()
    assert tab.review.current is tab.queue.cases[0], tab.ui.reviewNoticeText.text
    assert tab.review.segmentation.GetSegmentation().GetNthSegment(0).GetName() == "ball"
    tab.review.leave()
    tab.setModels([heir], "")
    tab._review.open(tab.queue.cases[0])
    assert "import the model that made it" in tab.ui.reviewNoticeText.text and tab.review.current is None


def test_of_a_thousand_cases_only_what_has_changed_is_shown_and_written_anew(tab, tmp_path, monkeypatch):
    queue, filled = tab.queue, []
    volumes = {f"segment {number}": 1.5 for number in range(20)}
    queue.folder = tmp_path
    queue.cases = [
        BatchCase(f"case {number}", {"T1": Path(f"{number}.nii")}, state=DONE, confidence=0.9, volumesMl=volumes)
        for number in range(1000)
    ]
    fill = tab._fillRow
    monkeypatch.setattr(tab, "_fillRow", lambda table, row, case: (filled.append(row), fill(table, row, case)))
    queue.tell()
    assert filled == list(range(1000))
    for change in ({"state": FAILED}, {"message": "Look."}, {"confidence": 0.1}, {"volumesMl": {}}, {"review": EDITED}):
        filled.clear()
        vars(queue.cases[500]).update(change)
        queue.tell()
        assert filled == [500], change
    cells = [tab.ui.casesTable.item(500, column) for column in range(5)]
    assert [cell.text() for cell in cells] == ["case 500", "T1", "failed", "0.10", "edited"]
    assert all(cell.toolTip().startswith("Look.") for cell in cells)
    filled.clear()
    queue.remove(queue.cases[:999])
    queue.cases.append(BatchCase("another", {"T1": Path("x.nii")}))
    queue.tell()
    assert set(filled) == {0, 1} and tab.ui.casesTable.item(1, 0).text() == "another"

    queue._current = queue.cases[0]  # as if it was running
    before = (tmp_path / "batch.json").read_bytes()
    monkeypatch.setattr(queue, "_keptUntil", 0.0)
    keep = queue._keep
    monkeypatch.setattr(queue, "_keep", lambda: (time.sleep(0.2), keep()))  # as long as a thousand take
    queue.cases[0].message = "first"
    queue.tell()
    queue.cases[0].message = "second"
    queue.tell()
    written = json.loads((tmp_path / "batch.json").read_bytes())["cases"][0]["message"]
    assert written == "first" and (tmp_path / "batch.json").read_bytes() != before
    assert queue._keptUntil - time.monotonic() > 3, "for a twentieth of the time at most"
    queue.tell(atOnce=True)
    assert json.loads((tmp_path / "batch.json").read_bytes())["cases"][0]["message"] == "second", "work of a person"
    queue._current = None
