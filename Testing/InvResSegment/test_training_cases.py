"""Training cases: found in the scene, kept with it, mapped to labels, written as a data set that the backend reads."""

from __future__ import annotations

import importlib.util
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if importlib.util.find_spec("PySide6") is None:
    pytest.skip("PySide6 is not installed", allow_module_level=True)

from panel_driver import addSegmentation, addVolume, waitUntil
from small_models import MATRICES, add_transform, add_volume, matrix, rotation

from invres.cases import read_dataset, read_splits
from invres.config import AugmentationConfig, LossWeights, TrainingConfig
from invres.doctor import check_dataset
from invres.losses import segmentation_loss
from invres.preprocessing import make_plan, prepare
from invres.sampling import CaseBatches
from invres.volume import read_volume

from InvResSegmentLib import NodeConversion  # isort: skip
from InvResSegmentLib.CaseChannels import namedAs, usedChannels  # isort: skip
from InvResSegmentLib.CaseExport import CaseExport, directDataSet, stampOf  # isort: skip
from InvResSegmentLib.CaseFindings import findingsOf, labelsOf, patients, problems, summary  # isort: skip
from InvResSegmentLib.CaseFiles import CaseFiles, ImageFile  # isort: skip
from InvResSegmentLib.LabelMapping import UNKNOWN, LabelConflict, labelOf, labelTable  # isort: skip
from InvResSegmentLib.LabelMapping import undecided, unknownValue  # isort: skip
from InvResSegmentLib.SceneCases import casesOfScene  # isort: skip
from InvResSegmentLib.SegmentExport import labelArray, segmentationProblem  # isort: skip
from InvResSegmentLib.TrainingCases import (  # isort: skip
    LEFT_OUT,
    VALIDATION,
    DataSetOnDisk,
    Finding,
    TrainingCases,
    dataSetOf,
)

SHAPE = (10, 12, 14)
PARTS = ("spatial", "elastic", "gamma", "noise", "bias_field", "brightness", "low_resolution")
STILL = AugmentationConfig(**{f"{part}_probability": 0.0 for part in PARTS}, flip_axes=())


def model(*labels: str, channels=("T1",), regions=None):
    """What the panel knows of a model with the labels 2, 4, 6..."""
    names = [SimpleNamespace(name=name, value=2 * index + 2) for index, name in enumerate(labels)]
    scheme = {"regions": regions is not None, "labels": regions or []}
    channels = tuple(SimpleNamespace(name=name, modality="MR", optional=False) for name in channels)
    return SimpleNamespace(name="base", labels=tuple(names), channels=channels, manifest={"scheme": scheme})


def box(corner, size=4, shape=SHAPE):
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(start, start + size) for start in corner)] = 1
    return mask


def onDisk(name="set", labels=(("tumour", 1),), regions=False, **more):
    described = tuple(
        {"name": label, "values": [int(one) for one in np.atleast_1d(value)], "output_value": index + 1}
        for index, (label, value) in enumerate(labels)
    )
    return DataSetOnDisk(f"/data/{name}", name, ("T1",), described, 1, regions, **more)


@pytest.fixture
def cases(scene):
    """The list of a scene, with its parameter node."""
    node = scene.AddNewNodeByClass("vtkMRMLScriptedModuleNode", "InvResSegment")
    found = TrainingCases()
    found.setNode(node)
    return found


def addCase(cases, name="T1", masks=None, seed=0):
    volume = addVolume(name, shape=SHAPE, seed=seed)
    segmentation = addSegmentation(volume, masks or {"tumour": box((2, 3, 4))})
    return cases.add(name, {"T1": volume}, segmentation)


def exported(export, cases, base, into=None):
    """Runs an export, or a delivery, to its end: outcome and what was told on the way."""
    told, ended = [], []
    if into is None:
        export.start(cases, base, lambda *step: told.append(step), ended.append)
    else:
        export.deliver(base, into, lambda *step: told.append(step), ended.append)
    waitUntil(lambda: ended, 30)
    return ended[0], told


# ---------------------------------------------------------------- labels


def test_a_segment_is_the_label_of_its_name_whatever_its_spelling_and_a_person_wins():
    labels = ["Left Hippocampus", "tumour"]
    assert labelOf("left-hippocampus", labels, {}) == "Left Hippocampus"
    assert labelOf("left tumour", labels, {}) == labelOf("Right Tumour", labels, {}) == "tumour", "not told apart"
    assert labelOf("right hippocampus", labels, {}) is None
    assert labelOf("Segment_1", labels, {}) is None
    assert labelOf("segment 1", labels, {"Segment_1": "TUMOUR"}) == "tumour"
    assert labelOf("tumour", labels, {"tumour": ""}) == ""
    assert undecided(["x", "tumour", "x", "y"], labels, {"y": "new"}) == ["x"]
    assert labelOf("Ignore", labels, {}) == labelOf("x", labels, {"x": "IGNORE"}) == UNKNOWN


def test_labels_that_no_case_has_are_not_trained_and_new_ones_get_values_of_their_own():
    table = labelTable(model("a", "b", "c"), ["B", "new", "?"], [], {"new": "new"})
    assert [(label.name, label.value, label.new) for label in table] == [("b", 4, False), ("new", 1, True)]


def test_values_of_label_files_are_kept_and_segments_of_the_scene_take_them():
    table = labelTable(model("a", "b"), ["b", "a"], [onDisk(labels=(("B", 2), ("extra", 7)))], {"extra": "extra"})
    assert {label.name: label.value for label in table} == {"a": 1, "b": 2, "extra": 7}
    assert [label.name for label in table if label.new] == ["extra"]


def test_no_label_gets_a_value_that_label_files_use_for_something_else():
    sets = [onDisk(labels=(("a", 3), ("left out", 1), ("open", 2)))]
    choices = {"left out": "", "open": UNKNOWN, "new": "new"}
    table = labelTable(model("b", "a"), ["b", "new"], sets, choices)
    assert {label.name: label.value for label in table} == {"a": 3, "b": 4, "new": 5}
    assert unknownValue(model("b", "a"), table, sets, choices) == (2, True)
    assert unknownValue(model("b", "a"), table, sets, {"open": ""} | choices | {"open": ""}) == (6, False)


@pytest.mark.parametrize(
    "sets, choices",
    [
        ([onDisk("x"), onDisk("y", labels=(("tumour", 3),))], {}),
        ([onDisk("x"), onDisk("y", labels=(("other", 1),))], {"other": "other"}),
        ([onDisk("x", labels=(("tumour", 1), ("rest", 2)))], {"rest": "tumour"}),
        ([onDisk("x"), onDisk("y", labels=(("whole", (1, 2)),), regions=True)], {"whole": "whole"}),
        ([onDisk("x", ignoreValue=9), onDisk("y", ignoreValue=255)], {}),
        ([onDisk("x"), onDisk("y", labels=(), ignoreValue=1)], {}),
        ([onDisk("x", labels=(("tumour", 1), ("p", 2), ("q", 3)))], {"p": "ignore", "q": "ignore"}),
        ([onDisk("x", labels=(("tumour", (1, 2)), ("core", 2)), regions=True)], {"core": "ignore"}),
    ],
)
def test_data_sets_that_contradict_each_other_are_refused(sets, choices):
    with pytest.raises(LabelConflict):
        labelTable(model("tumour"), [], sets, choices)


def test_labels_in_one_another_stay_as_the_model_has_them():
    regions = [
        {"name": "whole", "values": [1, 2], "output_value": 1},
        {"name": "core", "values": [2], "output_value": 2},
    ]
    base = model("whole", "core", regions=regions)
    assert [label.values for label in labelTable(base, ["core"], [], {})] == [(1, 2), (2,)]
    with pytest.raises(LabelConflict, match="new"):
        labelTable(base, ["core", "new"], [], {"new": "new"})


# ---------------------------------------------------------------- segments to label maps


@pytest.mark.parametrize("name", MATRICES)
def test_segments_come_onto_the_grid_of_the_image_voxel_for_voxel(scene, name):
    volume = add_volume(scene, np.zeros(SHAPE, np.float32), MATRICES[name])
    first, second = box((1, 2, 3)), box((3, 2, 3))
    node = addSegmentation(volume, {"a": first, "b": second})
    labels = labelArray(node, volume, {"Segment_0": 5, "Segment_1": 300})
    assert labels.dtype == np.uint16
    assert np.array_equal(labels, np.where(second, 300, 5 * first.astype(int)))


def test_segments_follow_their_transform_and_are_cut_at_the_border(scene):
    volume = add_volume(scene, np.zeros(SHAPE, np.float32), matrix())
    node = addSegmentation(volume, {"a": box((2, 3, 4))})
    node.SetAndObserveTransformNodeID(add_transform(scene, matrix(origin=(8.0, 1.0, -3.0))).GetID())
    wanted = np.zeros(SHAPE, np.uint8)
    wanted[0:3, 4:8, 12:14] = 1
    assert np.array_equal(labelArray(node, volume, {"Segment_0": 1}), wanted)


def test_segments_drawn_on_a_finer_turned_grid_are_taken_by_their_nearest_voxel(scene):
    volume = add_volume(scene, np.zeros(SHAPE, np.float32), matrix(origin=(0, 0, 0)))
    fine = (40, 44, 48)
    turned = matrix(rotation(20), (0.5, 0.5, 0.5), origin=(-3.0, -2.0, -4.0))
    center, radius = np.array([7.0, 6.0, 5.0]), 4.0

    def ball(shape, affine):
        k, j, i = np.meshgrid(*(np.arange(length) for length in shape), indexing="ij")
        places = np.stack([i, j, k, np.ones(shape)], -1) @ affine.T
        return np.linalg.norm(places[..., :3] - center, axis=-1)

    other = add_volume(scene, np.zeros(fine, np.float32), turned, name="fine")
    node = addSegmentation(other, {"ball": ball(fine, turned) < radius})
    labels = labelArray(node, volume, {"Segment_0": 1})
    distance = ball(SHAPE, matrix(origin=(0, 0, 0)))
    assert labels[distance < radius - 0.5].all() and not labels[distance > radius + 0.5].any()


def test_what_is_no_label_map_is_told(scene):
    volume = add_volume(scene, np.zeros(SHAPE, np.float32))
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "empty")
    assert "no segments" in segmentationProblem(node, volume)
    node.GetSegmentation().SetSourceRepresentationName("Closed surface")
    node.GetSegmentation().AddEmptySegment("a", "a")
    assert "made of surfaces" in segmentationProblem(node, volume)
    with pytest.raises(NodeConversion.ConversionError):
        labelArray(node, volume, {"a": 1})


# ---------------------------------------------------------------- the scene


def test_each_segmentation_is_paired_with_its_own_image(scene):
    wanted = []
    for seed, name in enumerate(("first", "second")):
        volume = addVolume(name, shape=SHAPE, seed=seed)
        wanted.append((name, {"T1": volume}, addSegmentation(volume, {"a": box((1, 1, 1))})))
    scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "nothing in it")
    assert casesOfScene(scene, model("a").channels) == wanted


def test_further_channels_come_from_the_same_grid_and_by_their_names(scene):
    t1, flair = addVolume("T1 axial", shape=SHAPE), addVolume("FLAIR", shape=SHAPE, seed=1)
    addVolume("FLAIR of another", shape=(5, 5, 5))
    segmentation = addSegmentation(t1, {"a": box((1, 1, 1))})
    ((name, channels, node),) = casesOfScene(scene, model("a", channels=("T1", "FLAIR")).channels)
    assert (name, channels, node) == ("T1 axial", {"T1": t1, "FLAIR": flair}, segmentation)
    scene.RemoveNode(flair)
    assert casesOfScene(scene, model("a", channels=("T1", "FLAIR")).channels)[0][1] == {"T1": t1}


def test_the_list_is_saved_with_the_scene(cases, scene, tmp_path):
    told = []
    cases.changed.append(lambda: told.append(len(cases.rows)))
    second = (addCase(cases), addCase(cases, "other"))[1]
    cases.setRole(second, VALIDATION)
    cases.choose({"Segment: 1; %": "tumour"})
    cases.addDataSet(
        onDisk(ignoreValue=255),
        [{"name": "p1", "images": ["/data/a b.nii.gz"], "label": "/data/l.nii.gz", "patient": "p"}],
    )
    assert told == [1, 2, 2, 2, 3] and [row.code for row in cases.rows] == ["case01", "case02", "p1"]
    scene.SetURL(str(tmp_path / "scene.mrml"))
    assert scene.Commit()
    scene.Clear()
    addVolume("something else", shape=(3, 3, 3))  # the nodes come back with other ids
    scene.SetURL(str(tmp_path / "scene.mrml"))
    assert scene.Import()
    node = scene.GetFirstNodeByClass("vtkMRMLScriptedModuleNode")
    loaded = TrainingCases()
    loaded.setNode(node)
    assert [(row.key, row.role, row.files) for row in loaded.rows] == [
        (row.key, row.role, row.files) for row in cases.rows
    ]
    assert loaded.rows[0].channels["T1"].GetName() == "T1"
    assert loaded.rows[1].segmentation.GetName() == "other segmentation"
    assert loaded.choices == cases.choices and loaded.dataSets == cases.dataSets
    loaded.rows[0].findings = [Finding("note", "It is small.")]
    loaded.setNode(node)  # as whenever the module is entered
    assert loaded.rows[0].findings and len(loaded.rows) == 3
    loaded.setNode(None)
    assert not loaded.rows
    loaded.setNode(scene.AddNewNodeByClass("vtkMRMLScriptedModuleNode", "of the next scene"))
    assert [row.code for row in loaded.rows] == ["p1"] and loaded.dataSets, "what lies on disk outlives the scene"
    node.SetParameter("trainingCases", '{"rows": [1]}')  # of a version to come
    loaded.setNode(node)
    assert loaded.rows == []


def test_a_segmentation_is_one_case_however_often_it_is_added(cases):
    row = addCase(cases)
    other = addVolume("corrected", shape=SHAPE)
    assert cases.add("again", {"T1": other}, row.segmentation) is row
    assert len(cases.rows) == 1 and row.channels == {"T1": other}


def test_nodes_that_go_leave_a_case_that_says_so(cases, scene):
    row, base = addCase(cases), model("tumour")
    assert not findingsOf(cases, row, base)
    volume, segmentation = row.channels["T1"], row.segmentation
    scene.RemoveNode(volume)
    cases.nodeRemoved(volume)
    assert "No volume is chosen for the channel T1" in findingsOf(cases, row, base)[0].sentence
    scene.RemoveNode(segmentation)
    cases.nodeRemoved(segmentation)
    assert "not in the scene any more" in findingsOf(cases, row, base)[0].sentence


def test_what_keeps_cases_from_being_learned_is_said_in_words(cases, scene):
    base = model("tumour", "edema")

    def now():
        return problems(cases, base, {row.key: findingsOf(cases, row, base) for row in cases.rows})

    assert "at least one case" in now()[0]
    row = addCase(cases, masks={"tumour": box((1, 1, 1)), "Segment_1": box((5, 5, 5))})
    assert "Segment_1" in now()[0] and "Labels" in now()[0]
    cases.choose({"Segment_1": ""})
    assert not now()
    severity, sentences, proof = summary(cases, base, {})
    assert severity == "warning" and "edema" in sentences[-1] and "prove nothing" in proof[1]
    cases.choose({"segment 1": ""})
    assert cases.choices == {"segment 1": ""}, "one word for each name, however it is spelt"
    twin = cases.add("twin", row.channels, addSegmentation(row.channels["T1"], {"tumour": box((1, 1, 1))}))
    assert len(set(patients(cases).values())) == 1
    cases.setRole(twin, VALIDATION)
    assert "one patient" in now()[0]
    cases.setRole(row, LEFT_OUT)
    assert "role training" in now()[0]
    moved = addVolume("moved", shape=SHAPE, origin=(3, 0, 0))
    two = model("tumour", channels=("T1", "T2"))
    cases.setChannels(row, {"T1": row.channels["T1"], "T2": moved})
    cases.setRole(row, "training")
    cases.remove([twin])
    assert "Align" in findingsOf(cases, row, two)[0].sentence
    cases.setChannels(row, {"T1": row.channels["T1"]})
    assert "do without the channel T2" in " ".join(summary(cases, two, {})[1])


def test_a_case_that_lacks_a_segment_of_others_says_that_it_teaches_its_absence(cases):
    base = model("tumour", "edema")
    both = addCase(cases, "both", {"tumour": box((1, 1, 1)), "edema": box((5, 5, 5))})
    one = addCase(cases, "one", {"tumour": box((1, 1, 1)), "?": box((5, 5, 5))})
    assert all("background" not in finding.sentence for finding in findingsOf(cases, one, base)), "nothing is decided"
    cases.choose({"?": ""})
    (finding,) = findingsOf(cases, one, base)
    assert finding.severity == "warning" and "It has no edema, which other cases have" in finding.sentence
    assert "say under Labels that this segment is not known" in finding.sentence
    assert not findingsOf(cases, both, base)
    cases.choose({"?": UNKNOWN})
    (finding,) = findingsOf(cases, one, base)
    assert finding.severity == "note" and "outside of what is not known" in finding.sentence
    cases.choose({"?": ""})
    one.findings = [Finding("warning", "one has no edema, which other cases have.", "missing_label_value")]
    assert findingsOf(cases, one, base) == one.findings, "the doctor says so, too, and knows more"
    one.findings = []
    cases.choose({"?": "edema"})
    assert not findingsOf(cases, one, base), "called otherwise, and learned as the same"
    cases.choose({"?": ""})
    cases.setRole(both, LEFT_OUT)
    assert not findingsOf(cases, one, base), "no case that takes part has it"


def test_a_channel_that_the_model_can_do_without_may_be_missing_and_is_written_as_nothing(cases, tmp_path):
    base = model("tumour", channels=("T1", "T2"))
    volumes = {name: addVolume(name, shape=SHAPE, seed=seed) for seed, name in enumerate(("T1", "T2"))}
    cases.add("both", volumes, addSegmentation(volumes["T1"], {"tumour": box((1, 2, 3))}))
    alone = addVolume("T2 alone", shape=SHAPE, seed=7)
    lacking = cases.add("one", {"T2": alone}, addSegmentation(alone, {"tumour": box((1, 2, 3))}))
    label = tmp_path / "label.seg.nrrd"
    image = ImageFile(str(tmp_path / "image.nrrd"), SHAPE[::-1], tuple(map(tuple, np.eye(4).tolist())))
    stored = cases.addFiles("accepted", CaseFiles({"T1": image}, str(label), ("tumour",)))
    assert [findingsOf(cases, row, base)[0].severity for row in (lacking, stored)] == ["error", "error"]
    for channel in base.channels:
        channel.optional = True
    (finding,) = findingsOf(cases, lacking, base)
    assert finding.severity == "note" and "It has no T1; the model learns to do without" in finding.sentence
    assert [one.severity for one in findingsOf(cases, stored, base)] == ["note"]
    cases.setChannels(lacking, {})
    assert [one.severity for one in findingsOf(cases, lacking, base)] == ["error", "error"], "some image there must be"
    cases.setChannels(lacking, {"T2": alone})
    cases.remove([stored])
    assert not problems(cases, base, {row.key: findingsOf(cases, row, base) for row in cases.rows})
    outcome, _told = exported(CaseExport(lambda: str(tmp_path / "staged")), cases, base)
    content = json.loads(outcome.dataset.read_text(encoding="utf-8"))["dataset"]
    assert content["case02"]["images"] == [None, "case02/0001.nrrd"] and content["case01"]["images"][0]
    dataset = read_dataset(outcome.dataset, partial=True)
    (nothing, found), mask = dataset.load(dataset.case("case02"))
    assert nothing is None and np.array_equal(found.array, NodeConversion.volumeArray(alone)) and mask.array.any()
    delivered, _told = exported(CaseExport(lambda: ""), None, outcome.dataset, into=tmp_path / "run")
    assert delivered.state == "done" and read_dataset(delivered.dataset, partial=True).cases


def test_images_that_a_data_set_lacks_count_as_channels_to_do_without(cases, tmp_path):
    base = model("tumour", channels=("T1", "T2"))
    found = described(tmp_path)
    found["contents"]["channels"] = [{"name": name, "modality": "MR"} for name in ("T2", "T1")]
    for case in found["contents"]["cases"]:
        (tmp_path / f"{case['name']}.nrrd").touch()
        case["images"].append(str(tmp_path / f"{case['name']}.nrrd"))
    found["contents"]["cases"][1]["images"][0] = str(tmp_path / "gone.nrrd")
    found["findings"] = [{"case": "b", "severity": "error", "code": "missing_channel", "message": "The image is gone."}]
    whole, lacking = cases.addDataSet(*dataSetOf(str(tmp_path), found))
    assert lacking.files["images"][0] is None and None not in whole.files["images"]
    assert "It has no image of the channel T2" in findingsOf(cases, lacking, base)[0].sentence
    base.channels[1].optional = True
    (finding,) = findingsOf(cases, lacking, base)
    assert finding.severity == "note" and "T2" in finding.sentence and not findingsOf(cases, whole, base)
    other = described(tmp_path)
    (row, _second) = cases.addDataSet(*dataSetOf(str(tmp_path / "other"), other))
    assert [one.severity for one in findingsOf(cases, row, base)] == ["note"], "a data set of T1 alone goes with it"
    outcome, _told = exported(CaseExport(lambda: str(tmp_path / "staged")), cases, base)
    content = json.loads(outcome.dataset.read_text(encoding="utf-8"))
    assert content["channel_names"] == {"0": "T2", "1": "T1"}
    assert [content["dataset"][name]["images"][0] for name in ("b", row.code)] == [None, None]
    base.channels[1].optional = False
    assert "but the other cases have" in findingsOf(cases, row, base)[0].sentence


# ---------------------------------------------------------------- the data set


def test_the_cases_of_a_scene_become_a_data_set_without_names(cases, tmp_path):
    base = model("edema", "tumour")
    rows = [
        addCase(cases, f"Jane Doe {seed}", {"Tumour": box((1, 2, 3)), "x": box((6, 6, 6))}, seed) for seed in range(3)
    ]
    cases.choose({"x": "necrosis"})
    cases.setRole(rows[2], VALIDATION)
    export = CaseExport(lambda: str(tmp_path / "staged"))
    outcome, told = exported(export, cases, base)
    assert (outcome.state, outcome.written) == ("done", 3)
    assert [done for done, _total, _name in told] == list(range(7)), "one step for each image or label map"
    dataset = read_dataset(outcome.dataset)
    assert dataset.scheme.names == ("necrosis", "tumour") and dataset.channel_names == ("T1",)
    assert [case.patient for case in dataset.cases] == ["patient01", "patient02", "patient03"]
    assert not [found for found in check_dataset(dataset) if found.severity == "error"]
    values = {label.name: label.values[0] for label in dataset.scheme.labels}
    images, label = dataset.load(dataset.cases[1])
    wanted = values["tumour"] * box((1, 2, 3)) + values["necrosis"] * box((6, 6, 6))
    assert np.array_equal(label.array, wanted) and label.geometry.same_as(images[0].geometry)
    assert np.array_equal(images[0].array, NodeConversion.volumeArray(rows[1].channels["T1"]))
    splits = read_splits(outcome.dataset.parent / "splits_final.json", dataset)
    assert splits == [(("case01", "case02"), ("case03",))]
    texts = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in texts if "Jane" in str(path) or b"Jane" in path.read_bytes()]


@pytest.mark.parametrize("regions", [False, True])
def test_what_is_not_known_takes_no_part_in_the_training(cases, tmp_path, regions):
    described = [
        {"name": "tumour", "values": [1], "output_value": 1},
        {"name": "all", "values": [1, 4], "output_value": 4},
    ]
    base = model("tumour", "all", regions=described if regions else None)
    open_ = np.zeros(SHAPE, np.uint8)
    open_[5:] = 1
    row = addCase(cases, "partly", {"tumour": box((3, 3, 3)), "not looked at": open_})
    addCase(cases, "whole", {"tumour": box((1, 1, 1)), "all": box((5, 5, 5))}, seed=1)
    cases.choose({"not looked at": UNKNOWN})
    assert not problems(cases, base, {one.key: findingsOf(cases, one, base) for one in cases.rows})
    assert "not looked at" not in " ".join(summary(cases, base, {})[1])
    export = CaseExport(lambda: str(tmp_path / "staged"))
    outcome, _told = exported(export, cases, base)
    dataset = read_dataset(outcome.dataset)
    assert dataset.scheme.ignore_value == 5 and dataset.scheme.regions == regions
    assert not [one for one in check_dataset(dataset) if one.case == row.code and one.severity != "note"]
    # As the training takes it: a patch of the whole case, moved nowhere.
    plan = make_plan(dataset, dataset.cases)
    prepared = prepare(*dataset.load(dataset.cases[0]), plan, dataset.scheme)
    config = TrainingConfig(patch=prepared.image.shape[1:], batch_size=1, foreground_fraction=0.0)
    batches = CaseBatches([prepared], dataset.scheme, config, STILL, torch.device("cpu"), plan)
    image, target = batches.batch(0)
    logits = torch.zeros((1, dataset.scheme.out_channels, *image.shape[2:]), requires_grad=True)
    segmentation_loss(logits, target, regions, LossWeights()).total.backward()
    counts = np.flip(logits.grad[0].abs().sum(0).numpy() > 0, (1, 2))  # to RAS and back
    assert np.array_equal(counts, open_ == 0)
    cases.choose({"not looked at": ""})
    outcome, _told = exported(export, cases, base)
    assert read_dataset(outcome.dataset).scheme.ignore_value is None and outcome.written == 1


def test_only_what_has_changed_is_written_again(cases, tmp_path):
    base, rows = model("tumour"), [addCase(cases, seed=seed) for seed in range(2)]
    export = CaseExport(lambda: str(tmp_path / "staged"))
    assert exported(export, cases, base)[0].written == 2
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "staged").rglob("*.nrrd")}
    assert exported(export, cases, base)[0].written == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    before = stampOf(cases, rows[0], base)
    image = rows[0].segmentation.GetSegmentation().GetNthSegment(0).GetRepresentation("Binary labelmap")
    image.GetPointData().GetScalars().Fill(1)
    image.Modified()
    assert stampOf(cases, rows[0], base) != before
    outcome, _told = exported(export, cases, base)
    assert outcome.written == 1 and read_volume(tmp_path / "staged" / "case01" / "label.nrrd").array.all()
    rows[1].channels["T1"].SetOrigin(5, 0, 0)
    rows[1].segmentation.SetAndObserveTransformNodeID(None)
    assert exported(export, cases, base)[0].written == 1
    cases.choose({"tumour": "another"})
    assert exported(export, cases, base)[0].written == 2, "a new label has another value"
    cases.remove([rows[0]])
    exported(export, cases, base)
    assert not (tmp_path / "staged" / "case01").exists()
    export.cleanup()
    assert not (tmp_path / "staged").exists()


def test_the_channels_are_those_of_the_model_in_its_order(cases, tmp_path):
    volumes = {name: addVolume(name, shape=SHAPE, seed=seed) for seed, name in enumerate(("T1", "T2"))}
    cases.add("both", volumes, addSegmentation(volumes["T1"], {"tumour": box((1, 2, 3))}))
    export = CaseExport(lambda: str(tmp_path / "staged"))
    for channels in (("T1", "T2"), ("T2", "T1"), ("T2",)):
        outcome, _told = exported(export, cases, model("tumour", channels=channels))
        dataset = read_dataset(outcome.dataset)
        assert dataset.channel_names == channels and outcome.written == 1
        for name, image in zip(channels, dataset.load(dataset.cases[0])[0], strict=True):
            assert np.array_equal(image.array, NodeConversion.volumeArray(volumes[name])), name


@pytest.mark.parametrize(
    "names, wanted, called",
    [
        (("t1",), ("T1",), ("T1",)),
        (("mri",), ("T1",), ("T1",)),
        (("image",), ("CT",), ("CT",)),
        (("CT",), ("T1",), ("CT",)),
        (("mr",), ("T1", "T2"), ("mr",)),
        (("flair", "T1w"), ("T1", "FLAIR"), ("FLAIR", "T1")),
        (("T1ce", "t1"), ("T1", "T1Gd"), ("T1Gd", "T1")),
        (("T1", "T1w"), ("T1", "T2"), ("T1", "T1w")),
        (("t1w", "t1weighted"), ("T1", "T2"), ("t1w", "t1weighted")),
    ],
)
def test_a_channel_is_the_same_whatever_it_is_called(names, wanted, called):
    base = model("tumour", channels=wanted)
    base.channels[0].modality = "CT" if wanted == ("CT",) else "MR"
    assert namedAs(names, base) == called


def test_cases_on_disk_whose_channels_are_called_otherwise_go_with_those_of_the_scene(cases, tmp_path):
    base = model("tumour", channels=("T1", "FLAIR"))
    volumes = {name: addVolume(name, shape=SHAPE, seed=seed) for seed, name in enumerate(("t1", "FLAIR"))}
    row = cases.add("scene", volumes, addSegmentation(volumes["t1"], {"tumour": box((1, 2, 3))}))
    for number, names in enumerate((("FLAIR", "T1w"), ("t1", "flair"))):
        found = described(tmp_path)
        found["contents"]["channels"] = [{"name": name, "modality": "MR"} for name in names]
        found["contents"]["cases"] = [
            {"name": f"on disk {number}", "images": [f"/{name}" for name in names], "label": "/label", "patient": ""}
        ]
        cases.addDataSet(*dataSetOf(str(tmp_path / str(number)), found))
    assert not problems(cases, base, {row.key: findingsOf(cases, row, base) for row in cases.rows})
    assert usedChannels(cases, base) == ("FLAIR", "T1") and "begins anew" not in " ".join(summary(cases, base, {})[1])
    outcome, _told = exported(CaseExport(lambda: str(tmp_path / "staged")), cases, base)
    content = json.loads(outcome.dataset.read_text(encoding="utf-8"))
    assert content["channel_names"] == {"0": "FLAIR", "1": "T1"}
    assert content["dataset"]["on disk 0"]["images"] == ["/FLAIR", "/T1w"]
    assert content["dataset"]["on disk 1"]["images"] == ["/flair", "/t1"]
    for name, file in zip(("FLAIR", "t1"), content["dataset"][row.code]["images"], strict=True):
        image = read_volume(outcome.dataset.parent / file)
        assert np.array_equal(image.array, NodeConversion.volumeArray(volumes[name])), name


def test_a_data_set_is_used_as_it_lies_there_where_the_backend_knows_its_channels(cases, tmp_path):
    found = described(tmp_path)
    found["contents"]["channels"] = [{"name": "T1w", "modality": "MR"}]
    found["contents"]["channels_in_one_file"] = True
    cases.addDataSet(*dataSetOf(str(tmp_path), found))
    assert directDataSet(cases, model("tumour"))
    assert not directDataSet(cases, model("tumour", channels=("T1", "T2"))), "T1w would be a new channel to it"
    addCase(cases)
    assert not problems(cases, model("tumour"), {}), "one channel in one file is a file for each channel"


def test_a_run_keeps_its_files_when_the_cases_change(cases, tmp_path):
    base, row = model("tumour"), addCase(cases)
    export = CaseExport(lambda: str(tmp_path / "staged"))
    outcome, _told = exported(export, cases, base)
    delivered, _told = exported(export, cases, outcome.dataset, tmp_path / "run" / "data")
    kept = {path: path.read_bytes() for path in (tmp_path / "run" / "data").rglob("*") if path.is_file()}
    assert delivered.dataset in kept and len(kept) == 3
    row.channels["T1"].GetImageData().GetPointData().GetScalars().Fill(7)
    row.channels["T1"].GetImageData().Modified()
    assert exported(export, cases, base)[0].written == 1
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_cancelled_export_leaves_whole_cases_only(cases, tmp_path):
    base = model("tumour")
    for seed in range(3):
        addCase(cases, seed=seed)
    export, ended = CaseExport(lambda: str(tmp_path / "staged")), []
    export.start(cases, base, lambda done, total, name: export.cancel() if done == 3 else None, ended.append)
    waitUntil(lambda: ended, 10)
    assert ended[0].state == "cancelled" and not export.running
    left = [path.relative_to(tmp_path / "staged").as_posix() for path in (tmp_path / "staged").rglob("*")]
    assert sorted(left) == ["case01", "case01/0000.nrrd", "case01/label.nrrd"]
    assert exported(export, cases, base)[0].written == 2


def test_a_full_disk_is_told_and_leaves_nothing_half(cases, tmp_path, monkeypatch):
    addCase(cases)
    export = CaseExport(lambda: str(tmp_path / "staged"))

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("InvResSegmentLib.CaseExport.writeLabels", full)
    outcome, _told = exported(export, cases, model("tumour"))
    assert outcome.state == "failed" and "No space left" in outcome.message and "space" in outcome.hint
    assert list((tmp_path / "staged").iterdir()) == []


def test_a_segmentation_that_is_taken_away_meanwhile_ends_the_export_in_words(cases, tmp_path):
    row, base = addCase(cases), model("tumour")
    export, ended = CaseExport(lambda: str(tmp_path / "staged")), []

    def takeAway(done, _total, _name):
        if done == 1:
            cases.nodeRemoved(row.segmentation)

    export.start(cases, base, takeAway, ended.append)
    waitUntil(lambda: ended, 10)
    assert ended[0].state == "failed" and "could not be written" in ended[0].message
    assert not list((tmp_path / "staged").iterdir())


def test_an_export_gives_the_window_back_after_each_image(cases, tmp_path):
    channels = ("T1", "T2", "FLAIR")
    volumes = {name: addVolume(name, shape=(48, 48, 48), seed=seed) for seed, name in enumerate(channels)}
    cases.add("big", volumes, addSegmentation(volumes["T1"], {"tumour": box((1, 1, 1), 30, (48, 48, 48))}))
    export, gaps, ended = CaseExport(lambda: str(tmp_path / "staged")), [time.monotonic()], []
    base = model("tumour", channels=channels)
    export.start(cases, base, lambda *step: gaps.append(time.monotonic()), ended.append)
    assert not ended and not (tmp_path / "staged").exists(), "nothing is done before the event loop runs"
    waitUntil(lambda: ended, 20)
    assert len(gaps) == 6 and ended[0].state == "done"


# ---------------------------------------------------------------- on disk


def described(tmp_path, splits=()):
    """What `check` says of a data set with two cases and one without a label."""
    entries = [
        {"name": name, "images": [str(tmp_path / f"{name}.nrrd")], "label": label, "patient": name}
        for name, label in (("a", str(tmp_path / "la.nrrd")), ("b", str(tmp_path / "lb.nrrd")), ("c", None))
    ]
    contents = {
        "channels": [{"name": "T1", "modality": "MR"}],
        "labels": [{"name": "tumour", "values": [3], "output_value": 3}],
        "regions": False,
        "ignore_value": 9,
        "channels_in_one_file": False,
        "splits": list(splits),
        "cases": entries,
    }
    return {"dataset": "disk", "contents": contents, "findings": []}


def test_cases_on_disk_stay_where_they_are_beside_those_of_the_scene(cases, tmp_path):
    base = model("tumour")
    rows = cases.addDataSet(*dataSetOf(str(tmp_path), described(tmp_path)))
    assert [row.name for row in rows] == ["a", "b"]
    assert directDataSet(cases, base) == str(tmp_path), "alone it is used as it lies there"
    addCase(cases)
    assert directDataSet(cases, base) == ""
    assert {label.name: label.value for label in labelsOf(cases, base)} == {"tumour": 3}
    outcome, _told = exported(CaseExport(lambda: str(tmp_path / "staged")), cases, base)
    content = json.loads(outcome.dataset.read_text(encoding="utf-8"))
    assert content["labels"] == {"background": 0, "tumour": 3, "ignore": 9}
    assert content["dataset"]["a"]["images"] == [str(tmp_path / "a.nrrd")]
    assert content["dataset"]["case01"]["label"] == "case01/label.nrrd"
    assert len({entry["patient"] for entry in content["dataset"].values()}) == 3


def test_a_data_set_is_not_used_as_it_lies_there_once_anything_is_asked_otherwise(cases, tmp_path):
    split = [{"train": ["a"], "val": ["b"]}]
    first, second = cases.addDataSet(*dataSetOf(str(tmp_path), described(tmp_path, split)))
    base = model("tumour")
    assert second.role == VALIDATION and directDataSet(cases, base)
    cases.setRole(second, "training")
    assert not directDataSet(cases, base)
    cases.setRole(second, VALIDATION)
    cases.choose({"tumour": "lesion"})
    assert not directDataSet(cases, base)
    cases.choose({"tumour": "Tumour"})
    assert directDataSet(cases, base)
    first.findings = [Finding("error", "It is empty.")]
    assert problems(cases, base, {row.key: findingsOf(cases, row, base) for row in cases.rows}) == ["a: It is empty."]
    cases.remove([first])
    assert not directDataSet(cases, base)


def test_a_name_that_a_data_set_has_taken_is_not_given_to_files_of_the_scene(cases, tmp_path):
    addCase(cases)
    entry = {"name": "case01", "images": ["x"], "label": "y", "patient": ""}
    cases.addDataSet(onDisk(), [entry])
    addCase(cases)
    assert len({row.code for row in cases.rows}) == 3
