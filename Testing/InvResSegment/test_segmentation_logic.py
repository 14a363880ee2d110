"""From volume nodes to a segmentation node on the real backend, and what happens when something goes wrong."""

from __future__ import annotations

import dataclasses
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import slicer
import standins
import vtk
from backends import RecordingBackend
from InvResSegmentLib import NodeConversion, SegmentationResult
from InvResSegmentLib.SegmentationLogic import SegmentationLogic, SegmentationRequest
from InvResSegmentLib.SegmentWays import SegmentWays
from InvResSegmentLib.UncertaintyMap import UNCERTAINTY_ROLE
from InvResSegmentLib.VolumeDescription import choosableImages
from scipy import ndimage
from small_models import (
    MATRICES,
    add_transform,
    add_volume,
    dice,
    example,
    matrix,
    model_info,
    remade,
    rotation,
    with_sides,
)

SHAPE = (22, 24, 26)


class Panel:
    """A logic with a folder of its own, and what it told the panel."""

    def __init__(self, backend, folder):
        self.folder = folder
        self.number = 0
        self.logic = SegmentationLogic(backend, self.temporary_folder)
        self.progress = []
        self.outcomes = []

    def temporary_folder(self):
        self.number += 1
        return str(self.folder / f"run {self.number}")

    def run(self, request, on_progress=None):
        self.begin(request, on_progress)
        standins.waitUntil(lambda: self.outcomes, 180)
        standins.pump(0.02)
        assert len(self.outcomes) == 1, "onDone is called once"
        assert not self.logic.running
        assert list(self.folder.iterdir()) == [], "no temporary file is left"
        return self.outcomes[0]

    def begin(self, request, on_progress=None):
        self.progress, self.outcomes = [], []

        def note(text, fraction, eta):
            self.progress.append((text, fraction, eta))
            if on_progress is not None:
                on_progress(text, fraction)

        self.logic.start(request, note, self.outcomes.append)


@pytest.fixture
def panel(backend, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    return Panel(backend, folder)


def ball(channels=1, shape=SHAPE, seed=3):
    images, classes = example(np.random.default_rng(seed), shape, channels)
    return images.astype(np.float32), classes


def one_request(scene, model, affine=None, seed=3, **fields):
    images, classes = ball(seed=seed)
    node = add_volume(scene, images[0], affine, "12: AX T1")
    return SegmentationRequest(model, {"T1": node}, "cpu", **fields), node, classes


def scene_state(scene):
    """All that must be the same after a run that did not succeed."""
    nodes = [scene.GetNthNode(index) for index in range(scene.GetNumberOfNodes())]
    segments = []
    for node in nodes:
        if node.IsA("vtkMRMLSegmentationNode"):
            inside = node.GetSegmentation()
            ids = [inside.GetNthSegmentID(index) for index in range(inside.GetNumberOfSegments())]
            voxels = [NodeConversion.segmentMask(node, one)[0].tobytes() for one in ids]
            segments.append((node.GetID(), ids, voxels, node.GetAttribute(SegmentationResult.PROVENANCE_ATTRIBUTE)))
    return (
        [(node.GetID(), node.GetName(), node.GetClassName()) for node in nodes],
        scene.GetNumberOfUndoLevels(),
        scene.GetNumberOfRedoLevels(),
        segments,
    )


def masks_in_world(segmentation, value_of_label, node):
    """Dice between a segment and the truth, both by where their voxels lie in the world."""
    inside = segmentation.GetSegmentation()
    mask, affine = NodeConversion.segmentMask(segmentation, inside.GetNthSegmentID(0))
    between = NodeConversion.linearTransformBetween(segmentation, None)
    wanted = NodeConversion.linearTransformBetween(node, None) @ NodeConversion.volumeMatrix(node)
    assert np.allclose(between @ affine, wanted, atol=1e-6)
    return dice(mask, value_of_label)


# ---------------------------------------------------------------- what works


@pytest.mark.parametrize("affine", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("moved", [False, True], ids=["in place", "rotated and shifted"])
def test_the_ball_is_found_where_it_lies(scene, panel, small_model, affine, moved):
    request, node, classes = one_request(scene, small_model, affine)
    if moved:
        transform = add_transform(scene, matrix(rotation(40, (0, 1, 2)), origin=(100, -30, 12)))
        node.SetAndObserveTransformNodeID(transform.GetID())
    outcome = panel.run(request)
    assert (outcome.state, outcome.message) == ("done", "")
    segmentation = outcome.segmentationNode
    assert segmentation.GetParentTransformNode() is node.GetParentTransformNode()
    assert masks_in_world(segmentation, classes == 1, node) > 0.85
    assert segmentation.GetSegmentation().GetNthSegment(0).GetName() == "ball"
    assert outcome.tableNode.GetNumberOfRows() == 1
    millilitres = outcome.tableNode.GetTable().GetValue(0, 1).ToDouble()
    assert millilitres == pytest.approx(np.count_nonzero(classes) * abs(np.linalg.det(affine[:3, :3])) / 1000, rel=0.3)
    assert outcome.measuredPeakBytes > 0 and outcome.seconds > 0


def test_the_record_names_model_inputs_settings_and_versions(scene, panel, small_model):
    request, node, _ = one_request(scene, small_model, window=(16, 16, 16))
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    hierarchy.SetItemUID(hierarchy.CreateItem(hierarchy.GetSceneItemID(), node), "DICOM", "1.2.3")
    found = SegmentationResult.readProvenance(panel.run(request).segmentationNode)[0]
    assert (found.model, found.modelSha256) == ("balls", small_model.sha256)
    assert found.inputs == (SegmentationResult.InputRecord("T1", "12: AX T1", node.GetID(), "1.2.3"),)
    assert found.settings["window"] == [16, 16, 16] and found.settings["device"] == "cpu"
    assert {"invres", "torch", "slicer", "slicerPython"} <= set(found.versions)
    assert found.measuredPeakBytes > 0 and found.seconds > 0


def test_progress_is_in_words_and_never_runs_backwards(scene, panel, small_model):
    request, _, _ = one_request(scene, small_model)
    panel.run(request)
    texts = [text for text, _, _ in panel.progress]
    fractions = [fraction for _, fraction, _ in panel.progress]
    assert texts[0] == "Handing the volumes over" and texts[-1] == "Adding the segments to the scene"
    assert "Segmenting" in texts and "Working" not in texts
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    assert all(eta is None or text == "Segmenting" for text, _, eta in panel.progress)


def test_an_unknown_stage_and_one_that_begins_anew_do_not_pull_the_bar_back(scene, panel, small_model):
    request, _, _ = one_request(scene, small_model)
    again = []

    def meddle(text, fraction):
        if text == "Segmenting" and not again:
            again.append(fraction)
            for stage, done in (("segment.tiles", 9), ("segment.tiles", 0), ("segment.someday", 1), ("start", 0)):
                panel.logic._onEvent({"event": "progress", "stage": stage, "done": done, "total": 10, "eta_s": 1})

    assert panel.run(request, meddle).state == "done"
    fractions = [fraction for _, fraction, _ in panel.progress]
    assert fractions == sorted(fractions)


def test_two_channels_make_two_segments(scene, panel, two_channel_package):
    model = model_info(two_channel_package)
    images, classes = ball(2, seed=5)
    nodes = [add_volume(scene, image, MATRICES["oblique"], name) for image, name in zip(images, "ab", strict=True)]
    outcome = panel.run(SegmentationRequest(model, {"FLAIR": nodes[1], "T1": nodes[0]}, "cpu"))
    assert outcome.state == "done"
    inside = outcome.segmentationNode.GetSegmentation()
    assert [inside.GetNthSegment(index).GetName() for index in range(2)] == ["Ödem", "core"]
    assert inside.GetNumberOfLayers() == 1
    for index, value in ((0, 1), (1, 2)):
        mask, _ = NodeConversion.segmentMask(outcome.segmentationNode, inside.GetNthSegmentID(index))
        assert dice(mask, classes == value) > 0.6
    assert inside.GetNthSegment(0).GetColor() == pytest.approx((90 / 255, 190 / 255, 90 / 255))
    entry = vtk.reference("")
    assert inside.GetNthSegment(0).GetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), entry)
    assert "12738006^Brain" in str(entry)


def test_a_structure_with_two_sides_becomes_two_segments(scene, panel, one_channel_package, tmp_path):
    package = with_sides(one_channel_package, tmp_path / "sided")
    # The ball lies on the right of where the scanner's axis has the middle, and the image on both sides of it.
    request, _, classes = one_request(scene, model_info(package), matrix(origin=(-11.4, 20, 5)))
    outcome = panel.run(request)
    inside = outcome.segmentationNode.GetSegmentation()
    names = [inside.GetNthSegment(index).GetName() for index in range(inside.GetNumberOfSegments())]
    assert outcome.state == "done" and names == ["left ball", "right ball"]
    masks = [NodeConversion.segmentMask(outcome.segmentationNode, inside.GetNthSegmentID(n))[0] for n in range(2)]
    assert not masks[0].any() and dice(masks[1], classes > 0) > 0.6
    assert any("scanner's axis" in warning for warning in outcome.warnings)


def test_channels_in_the_same_place_through_different_transforms_are_segmented(scene, panel, two_channel_package):
    images, classes = ball(2, seed=5)
    moved = matrix(rotation(20), origin=(3, 0, 0))
    first = add_volume(scene, images[0], matrix(), "T1")
    second = add_volume(scene, images[1], np.linalg.inv(moved) @ matrix(), "FLAIR")
    second.SetAndObserveTransformNodeID(add_transform(scene, moved).GetID())
    request = SegmentationRequest(model_info(two_channel_package), {"T1": first, "FLAIR": second}, "cpu")
    assert panel.logic.missing(request) == []
    outcome = panel.run(request)
    assert outcome.state == "done", outcome.message
    assert masks_in_world(outcome.segmentationNode, classes == 1, first) > 0.6


@pytest.mark.parametrize("moved", [False, True], ids=["in place", "moved"])
def test_a_region_restricts_what_is_found(scene, panel, small_model, moved):
    request, node, classes = one_request(scene, small_model)
    transform = matrix(rotation(90, (0, 0, 1)), origin=(30, 0, 0)) if moved else np.eye(4)
    node.SetAndObserveTransformNodeID(add_transform(scene, transform).GetID())
    middle = np.argwhere(classes == 1)[:, ::-1].mean(axis=0)
    centre = transform @ NodeConversion.volumeMatrix(node) @ [*middle, 1]
    roi = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "box")
    roi.SetCenter(*centre[:3])
    roi.SetSize(4, 4, 40)
    request = SegmentationRequest(small_model, request.channels, "cpu", roiNode=roi)
    assert panel.logic.missing(request) == []
    outcome = panel.run(request)
    assert outcome.state == "done", outcome.message
    inside = outcome.segmentationNode.GetSegmentation()
    mask, _ = NodeConversion.segmentMask(outcome.segmentationNode, inside.GetNthSegmentID(0))
    _, j, i = np.indices(SHAPE)
    box = (abs(i - middle[0]) <= 2) & (abs(j - middle[1]) <= 2)
    assert mask.any() and not (mask & ~box).any()
    assert dice(mask, (classes == 1) & box) > 0.8


def test_two_models_in_sequence_find_the_ball(scene, panel, backend, small_model, crop_model):
    request, node, classes = one_request(scene, crop_model, MATRICES["sagittal"], locator=small_model)
    assert panel.logic.missing(request) == []
    outcome = panel.run(request)
    assert outcome.state == "done", outcome.message
    assert masks_in_world(outcome.segmentationNode, classes == 1, node) > 0.8
    arguments = backend.requests[-1]
    assert arguments[arguments.index("--locate") + 1] == small_model.path
    assert "Finding the place to segment" in [text for text, _, _ in panel.progress]
    assert outcome.notes == ["balls found ball in 1 place."], "a note needs nothing done, but it is told"
    told = []
    panel.logic.plan(request, lambda plan, message: told.append((plan, message)))
    standins.waitUntil(lambda: told, 180)
    assert told[0][0].fits and told[0][0].sentence.startswith("To find the place: Needs ")
    assert " for each place" not in told[0][0].sentence, "now the number of windows is known"


@pytest.mark.parametrize("mirrored", [True, False])
def test_mirrored_images_are_left_out_where_that_is_wanted(scene, panel, backend, small_model, mirrored):
    request, _, _ = one_request(scene, small_model, ways=SegmentWays(mirrored=mirrored))
    told = []
    panel.logic.plan(request, lambda plan, message: told.append((plan, message)))
    standins.waitUntil(lambda: told, 180)
    assert told[0][0] is not None, told[0][1]
    outcome = panel.run(request)
    assert outcome.state == "done", outcome.message
    asked = [arguments for arguments in backend.requests if arguments[0] in ("plan", "segment")][-2:]
    assert [arguments[0] for arguments in asked] == ["plan", "segment"]
    assert all(("--mirror" in arguments) != mirrored for arguments in asked)


def test_a_model_of_crops_wants_a_place_in_a_whole_image(scene, panel, small_model, crop_model):
    request, node, _ = one_request(scene, crop_model)
    (sentence,) = panel.logic.missing(request)
    assert sentence.startswith("12: AX T1 is larger than the crops around the ball")
    roi = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "box")
    roi.SetCenter(*(NodeConversion.volumeMatrix(node) @ [13, 12, 11, 1])[:3])
    roi.SetSize(12, 12, 12)
    assert panel.logic.missing(dataclasses.replace(request, roiNode=roi)) == []
    assert not dataclasses.replace(request, roiNode=roi, locator=small_model).located, "the region goes first"
    small = add_volume(scene, ball(shape=(16, 18, 20))[0][0])
    assert panel.logic.missing(SegmentationRequest(crop_model, {"T1": small}, "cpu")) == []


def test_the_second_run_is_warm(scene, panel, backend, small_model):
    request, _, _ = one_request(scene, small_model)
    panel.run(request)
    panel.run(request)
    assert "Loading the model" not in [text for text, _, _ in panel.progress]


def test_the_memory_plan_is_a_sentence_with_figures(scene, panel, backend, small_model):
    roi = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "box")
    affine = MATRICES["sagittal"]
    request, node, _ = one_request(scene, small_model, affine)
    told = []
    panel.logic.plan(request, lambda *_: told.append("old"))
    panel.logic.plan(request, lambda plan, message: told.append((plan, message)))
    standins.waitUntil(lambda: told, 180)
    (plan, message) = told.pop()
    assert message == "" and plan.fits and plan.predictedBytes > 0 and plan.freeBytes > plan.predictedBytes
    assert plan.window == (16, 16, 16) and plan.seconds > 0
    assert plan.sentence.startswith("Needs ") and plan.sentence.endswith(".")
    arguments = backend.requests[-1]
    # i points right to superior and so on: the sizes go in the model's order, whatever the volume's.
    order = [int(np.abs(affine[world, :3]).argmax()) for world in (2, 1, 0)]
    size = node.GetImageData().GetDimensions()
    start = arguments.index("--shape") + 1
    assert arguments[start : start + 3] == [str(size[axis]) for axis in order]
    middle = affine @ [13, 12, 11, 1]
    roi.SetCenter(*middle[:3])
    roi.SetSize(6, 6, 6)
    panel.logic.plan(SegmentationRequest(small_model, request.channels, "cpu", roiNode=roi), lambda *_: told.append(_))
    assert "--roi-shape" in backend.requests[-1]
    standins.waitUntil(lambda: told, 180)
    assert told.pop()[0].fits
    panel.logic.plan(SegmentationRequest(None, {}), lambda plan, message: told.append((plan, message)))
    assert told == [(None, "Choose a model and its volumes to see what they need.")]


# ---------------------------------------------------------------- what is missing


def test_a_channel_that_the_model_can_do_without_may_stay_empty(scene, panel, two_channel_package, tmp_path):
    plan = two_channel_package.manifest.plan
    channels = tuple(dataclasses.replace(channel, optional=True) for channel in plan.channels)
    changed = dataclasses.replace(plan, channels=channels)
    package = remade(two_channel_package, tmp_path / "either", "either", plan=changed)
    model = model_info(package)
    images, _ = ball(2)
    flair = add_volume(scene, images[1], name="FLAIR")
    request = SegmentationRequest(model, {"FLAIR": flair}, "cpu")
    assert panel.logic.missing(request) == []
    outcome = panel.run(request)
    assert (outcome.state, outcome.message) == ("done", "")
    nothing = SegmentationRequest(model, {}, "cpu")
    assert panel.logic.missing(nothing) == ["Choose a volume for one channel at least."]


def test_what_is_missing_is_named(scene, panel, two_channel_package):
    model = model_info(two_channel_package)
    images, _ = ball(2)
    first = add_volume(scene, images[0], name="a")
    other = add_volume(scene, images[1], matrix(spacing=(1, 1, 1.5)), "b")
    labels = add_volume(scene, images[1].astype(np.uint8), name="c", kind="vtkMRMLLabelMapVolumeNode")
    missing = panel.logic.missing
    assert missing(SegmentationRequest(None, {})) == ["Choose a model."]
    assert missing(SegmentationRequest(model, {})) == [
        "Choose a volume for the channel T1.",
        "Choose a volume for the channel FLAIR.",
    ]
    assert missing(SegmentationRequest(model, {"T1": first})) == ["Choose a volume for the channel FLAIR."]
    assert "chosen for two channels" in missing(SegmentationRequest(model, {"T1": first, "FLAIR": first}))[0]
    assert missing(SegmentationRequest(model, {"T1": first, "FLAIR": labels})) == ["c is a label map; choose an image."]
    assert missing(SegmentationRequest(model, {"T1": first, "FLAIR": other})) == [
        "b has voxels of 1 x 1 x 1.5 mm, a of 1 x 1 x 1 mm. Align it to a."
    ]
    scene.RemoveNode(first)
    assert missing(SegmentationRequest(model, {"T1": first}))[0] == "Choose a volume for the channel T1."


def test_a_region_beside_the_volume_and_surfaces_as_output_are_refused(scene, panel, small_model):
    request, _, _ = one_request(scene, small_model)
    roi = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "box")
    roi.SetCenter(500, 0, 0)
    roi.SetSize(5, 5, 5)
    away = SegmentationRequest(small_model, request.channels, "cpu", roiNode=roi)
    assert panel.logic.missing(away) == ["The region box does not touch 12: AX T1; move it over the part to segment."]
    surfaces = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "contours")
    sphere = vtk.vtkSphereSource()
    sphere.Update()
    surfaces.GetSegmentation().SetSourceRepresentationName("Closed surface")
    surfaces.AddSegmentFromClosedSurfaceRepresentation(sphere.GetOutput(), "a")
    into = SegmentationRequest(small_model, request.channels, "cpu", outputNode=surfaces)
    assert "contours is made of surfaces" in panel.logic.missing(into)[0]


def test_apply_with_something_missing_fails_in_words_and_asks_nobody(scene, panel, backend, small_model):
    asked = len(backend.requests)
    outcome = panel.run(SegmentationRequest(small_model, {}, "cpu"))
    assert (outcome.state, outcome.message) == ("failed", "Choose a volume for the channel T1.")
    assert len(backend.requests) == asked


# ---------------------------------------------------------------- into a segmentation that is there


def test_a_second_run_into_the_same_segmentation_keeps_a_hand_made_segment_and_can_be_undone(scene, panel, small_model):
    request, node, _ = one_request(scene, small_model)
    segmentation = panel.run(request).segmentationNode
    inside = segmentation.GetSegmentation()
    image = slicer.vtkOrientedImageData()
    image.DeepCopy(inside.GetNthSegment(0).GetRepresentation("Binary labelmap"))
    own = segmentation.AddSegmentFromBinaryLabelmapRepresentation(image, "by hand")
    mine = NodeConversion.segmentMask(segmentation, own)[0].copy()
    first = NodeConversion.segmentMask(segmentation, inside.GetNthSegmentID(0))[0].copy()
    before = scene_state(scene)

    images, other = ball(seed=8)
    NodeConversion.volumeArray(node)[:] = images[0]
    node.GetImageData().Modified()
    outcome = panel.run(SegmentationRequest(small_model, {"T1": node}, "cpu", outputNode=segmentation))
    assert outcome.state == "done" and outcome.segmentationNode is segmentation
    assert [inside.GetNthSegment(index).GetName() for index in range(inside.GetNumberOfSegments())] == [
        "ball",
        "by hand",
    ]
    second = NodeConversion.segmentMask(segmentation, inside.GetNthSegmentID(0))[0]
    assert dice(second, other == 1) > 0.85 and dice(second, first) < 0.9
    assert np.array_equal(NodeConversion.segmentMask(segmentation, own)[0], mine)
    assert len(SegmentationResult.readProvenance(segmentation)) == 2

    assert panel.logic.canUndo()
    panel.logic.undo()
    assert scene_state(scene) == before
    assert not panel.logic.canUndo()


def test_undo_takes_back_a_new_segmentation_with_its_table(scene, panel, small_model):
    request, _, _ = one_request(scene, small_model)
    before = [one[0] for one in scene_state(scene)[0]]
    panel.run(request)
    panel.logic.undo()
    assert [one[0] for one in scene_state(scene)[0]] == before


def test_the_scenes_own_undo_gets_a_state_where_it_is_in_use(scene, panel, small_model):
    scene.SetUndoOn()
    request, _, _ = one_request(scene, small_model)
    levels = scene.GetNumberOfUndoLevels()
    panel.run(request)
    assert scene.GetNumberOfUndoLevels() == levels + 1


# ---------------------------------------------------------------- where the model is unsure


def composite_of(scene, foreground=None):
    """The layers of a slice view."""
    composite = scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    composite.SetForegroundVolumeID(foreground)
    composite.SetForegroundOpacity(0.25)
    return composite


def layers_of(composite):
    return composite.GetForegroundVolumeID(), composite.GetForegroundOpacity()


@pytest.mark.parametrize("affine", MATRICES.values(), ids=MATRICES.keys())
def test_where_the_model_is_unsure_is_shown_over_the_image(scene, panel, small_model, affine):
    request, node, _ = one_request(scene, small_model, affine, uncertainty=True)
    node.SetAndObserveTransformNodeID(add_transform(scene, matrix(rotation(40, (0, 1, 2)), origin=(9, 1, 2))).GetID())
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    study = hierarchy.CreateStudyItem(hierarchy.GetSceneItemID(), "study")
    hierarchy.CreateItem(study, node)
    composite = composite_of(scene, node.GetID())
    before = scene_state(scene)
    outcome = panel.run(request)
    assert (outcome.state, outcome.message) == ("done", "")
    found = outcome.segmentationNode.GetNodeReference(UNCERTAINTY_ROLE)
    assert found.GetName() == "12: AX T1 uncertainty"
    assert found.GetParentTransformNode() is node.GetParentTransformNode() is not None
    assert np.allclose(NodeConversion.volumeMatrix(found), NodeConversion.volumeMatrix(node), atol=1e-9)
    assert hierarchy.GetItemParent(hierarchy.GetItemByDataNode(found)) == study
    values = NodeConversion.volumeArray(found)
    assert values.dtype == np.float32 and values.min() >= 0 and 0.1 < values.max() <= 0.5
    mask, _ = NodeConversion.segmentMask(
        outcome.segmentationNode, outcome.segmentationNode.GetSegmentation().GetNthSegmentID(0)
    )
    border = mask ^ ndimage.binary_erosion(mask)
    assert values[border].mean() > 2 * values.mean(), "it is unsure where its segment ends"
    display = found.GetDisplayNode()
    assert display.GetColorNodeID() == "vtkMRMLColorTableNodeIron"
    colours = display.GetColorNode().GetLookupTable()
    ends = [colours.GetTableValue(index)[:3] for index in (0, colours.GetNumberOfTableValues() - 1)]
    assert np.allclose(ends, [(1, 0, 0), (1, 0.9, 0)], atol=0.01), "from red to yellow, as README and tool tip say"
    assert (display.GetLowerThreshold(), display.GetApplyThreshold(), display.GetAutoThreshold()) == (0.1, 1, 0)
    assert (display.GetWindowLevelMin(), display.GetWindowLevelMax()) == (0.0, 0.5)
    assert layers_of(composite) == (found.GetID(), 0.6)
    assert choosableImages(scene) == [node], "it is no image to segment"
    panel.logic.undo()
    assert scene_state(scene)[0] == before[0] and layers_of(composite) == (node.GetID(), 0.25)


def test_the_next_run_into_the_same_segmentation_takes_the_place_of_the_map(scene, panel, small_model):
    request, node, _ = one_request(scene, small_model, uncertainty=True)
    composite = composite_of(scene)
    segmentation = panel.run(request).segmentationNode
    found = segmentation.GetNodeReference(UNCERTAINTY_ROLE)
    found.GetDisplayNode().SetAndObserveColorNodeID("vtkMRMLColorTableNodeRainbow")
    first, state = NodeConversion.volumeArray(found).copy(), scene_state(scene)

    other = add_volume(scene, ball(seed=8)[0][0], MATRICES["oblique"], "other")
    again = dataclasses.replace(request, channels={"T1": other}, outputNode=segmentation)
    count = scene.GetNumberOfNodes()
    assert panel.run(again).state == "done"
    assert segmentation.GetNodeReference(UNCERTAINTY_ROLE) is found and scene.GetNumberOfNodes() == count
    assert not np.array_equal(NodeConversion.volumeArray(found), first)
    assert np.allclose(NodeConversion.volumeMatrix(found), NodeConversion.volumeMatrix(other), atol=1e-9)
    assert found.GetName() == "other uncertainty" and layers_of(composite)[0] == found.GetID()
    assert found.GetDisplayNode().GetColorNodeID() == "vtkMRMLColorTableNodeRainbow", "a person has chosen it"
    panel.logic.undo()
    assert np.array_equal(NodeConversion.volumeArray(found), first) and found.GetName() == "12: AX T1 uncertainty"
    assert np.allclose(NodeConversion.volumeMatrix(found), NodeConversion.volumeMatrix(node), atol=1e-9)
    assert scene_state(scene)[3] == state[3]

    # The name is the panel's again, and changes with the image, until a person gives it another one.
    assert panel.run(again).state == "done" and found.GetName().startswith("other uncertainty")
    found.SetName("reviewed by me")
    assert panel.run(dataclasses.replace(request, outputNode=segmentation)).state == "done"
    assert found.GetName() == "reviewed by me"
    panel.logic.undo()
    assert found.GetName() == "reviewed by me"

    # What the map says is not of the segments that a run without one has made.
    assert panel.run(dataclasses.replace(again, uncertainty=False)).state == "done"
    assert found.GetScene() is scene and layers_of(composite)[0] is None
    panel.logic.undo()
    assert layers_of(composite)[0] == found.GetID()


def test_a_run_without_a_map_takes_any_map_away_and_gives_each_view_its_own_foreground_back(scene, panel, small_model):
    request, node, _ = one_request(scene, small_model, uncertainty=True)
    flair, passing = (add_volume(scene, ball(seed=8)[0][0], name=name) for name in ("FLAIR", "passing"))
    views = [composite_of(scene, one) for one in (flair.GetID(), None, passing.GetID())]
    without = dataclasses.replace(request, uncertainty=False)
    mine = [layers_of(view) for view in views]
    first = panel.run(request).segmentationNode
    second = panel.run(request).segmentationNode
    older, newer = (one.GetNodeReferenceID(UNCERTAINTY_ROLE) for one in (first, second))
    assert older != newer and [layers_of(view) for view in views] == [(newer, 0.6)] * 3
    panel.run(without)
    assert [layers_of(view) for view in views] == mine, "the result is in a new segmentation, which has no map"
    panel.logic.undo()
    assert [layers_of(view) for view in views] == [(newer, 0.6)] * 3

    views[1].SetForegroundOpacity(0.3)
    views[2].SetForegroundVolumeID(older)
    scene.RemoveNode(first)
    scene.RemoveNode(second)
    scene.RemoveNode(passing)
    panel.run(without)
    assert [layers_of(view) for view in views] == [*mine[:2], (None, 0.25)]
    panel.run(request)
    views[0].SetForegroundVolumeID(node.GetID())
    views[0].SetForegroundOpacity(0.7)
    panel.run(without)
    assert [layers_of(view) for view in views] == [(node.GetID(), 0.7), mine[1], (None, 0.25)], "it was chosen since"


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_no_map_is_left_of_a_run_that_failed(scene, panel, small_model, monkeypatch, existing):
    request, _, _ = one_request(scene, small_model, uncertainty=True)
    composite = composite_of(scene, add_volume(scene, ball(seed=8)[0][0], name="FLAIR").GetID())
    output = panel.run(request).segmentationNode if existing else None
    shown = layers_of(composite)
    found = output.GetNodeReference(UNCERTAINTY_ROLE) if existing else None
    values = NodeConversion.volumeArray(found).copy() if existing else None
    before = scene_state(scene)
    again = dataclasses.replace(request, outputNode=output)
    monkeypatch.setattr(SegmentationResult, "storeProvenance", lambda *_: 1 / 0)
    assert panel.run(again).state == "failed"
    assert scene_state(scene) == before and layers_of(composite) == shown

    def remove(text, _fraction):
        if text == "Adding the segments to the scene":
            (panel.folder / f"run {panel.number}" / "uncertainty.nrrd").unlink(missing_ok=True)

    outcome = panel.run(again, remove)
    assert outcome.state == "failed" and "uncertainty.nrrd" in outcome.message
    assert scene_state(scene) == before and layers_of(composite) == shown
    assert panel.run(again, cancel_at("Segmenting", panel)).state == "cancelled"
    assert scene_state(scene) == before and layers_of(composite) == shown
    assert found is None or np.array_equal(NodeConversion.volumeArray(found), values)


# ---------------------------------------------------------------- what goes wrong


def cancel_at(stage, panel):
    def meddle(text, _fraction):
        if text == stage:
            panel.logic.cancel()

    return meddle


@pytest.mark.parametrize("stage", ["Starting the backend", "Reading the volumes", "Segmenting"])
def test_cancelling_leaves_the_scene_as_it_was(scene, panel, backend, small_model, stage):
    scene.SetUndoOn()
    request, _, _ = one_request(scene, small_model)
    chosen = panel.run(request).segmentationNode
    before = scene_state(scene)
    again = SegmentationRequest(small_model, request.channels, "cpu", outputNode=chosen)
    pressed, cancels = [], len(backend.cancelled)

    def cancel(text, _fraction):
        if text == stage and not pressed:
            pressed.append(time.monotonic())
            panel.logic.cancel()

    outcome = panel.run(again, cancel)
    assert time.monotonic() - pressed[0] < 2 and len(backend.cancelled) == cancels + 1
    assert (outcome.state, outcome.message) == ("cancelled", "The segmentation was cancelled.")
    assert scene_state(scene) == before
    assert scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode").GetID() == "vtkMRMLScalarVolumeNode2", "no id was used up"


def test_cancelling_while_volumes_are_handed_over_asks_the_backend_for_nothing(scene, panel, backend, small_model):
    request, _, _ = one_request(scene, small_model)
    before, asked = scene_state(scene), len(backend.requests)
    assert panel.run(request, cancel_at("Handing the volumes over", panel)).state == "cancelled"
    assert scene_state(scene) == before and len(backend.requests) == asked


def test_a_backend_that_dies_is_a_failure_in_words_and_the_next_run_works(scene, panel, backend, small_model):
    request, _, _ = one_request(scene, small_model)
    before, crashed = scene_state(scene), []

    def crash(text, _fraction):
        if text == "Segmenting" and not crashed:
            crashed.append(backend.pid)
            backend.crash()

    outcome = panel.run(request, crash)
    assert outcome.state == "failed" and outcome.message.endswith(".") and outcome.hint
    assert scene_state(scene) == before
    assert panel.run(request).state == "done"


def test_an_error_of_the_backend_arrives_with_its_hint(scene, panel, small_model, tmp_path):
    request, _, _ = one_request(scene, SimpleNamespace(**{**vars(small_model), "path": str(tmp_path / "gone")}))
    before = scene_state(scene)
    outcome = panel.run(request)
    assert outcome.state == "failed" and "gone" in outcome.message and outcome.hint
    assert scene_state(scene) == before


def test_a_backend_that_cannot_be_asked_ends_the_run(scene, tmp_path, small_model):
    class Broken:
        def request(self, *_arguments):
            raise RuntimeError("no Python")

    request, _, _ = one_request(scene, small_model)
    (tmp_path / "t").mkdir()
    outcome = Panel(Broken(), tmp_path / "t").run(request)
    assert (outcome.state, outcome.message, outcome.hint) == (
        "failed",
        "The backend could not be started.",
        "no Python",
    )


def test_a_disk_that_is_full_before_the_run(scene, panel, backend, small_model):
    from tiny_datasets import files_up_to

    request, _, _ = one_request(scene, small_model)
    before, asked = scene_state(scene), len(backend.requests)
    with files_up_to(1000):
        outcome = panel.run(request)
    assert outcome.state == "failed" and "could not be written to the temporary folder" in outcome.message
    assert "Free some space" in outcome.hint
    assert scene_state(scene) == before and len(backend.requests) == asked


def test_a_disk_that_is_full_when_the_result_is_written(scene, tmp_path, small_model):
    pytest.importorskip("resource")
    backend = RecordingBackend(file_bytes=64)
    (tmp_path / "t").mkdir()
    request, _, _ = one_request(scene, small_model)
    before = scene_state(scene)
    try:
        outcome = Panel(backend, tmp_path / "t").run(request)
    finally:
        backend.stop()
    assert outcome.state == "failed" and "isk" in outcome.message and outcome.hint
    assert scene_state(scene) == before


def test_a_folder_that_cannot_be_made(scene, backend, tmp_path, small_model):
    (tmp_path / "file").write_text("")
    told = []
    logic = SegmentationLogic(backend, lambda: str(tmp_path / "file" / "run"))
    logic.start(one_request(scene, small_model)[0], lambda *_: None, told.append)
    assert told[0].state == "failed" and "temporary folder" in told[0].message and not logic.running


def test_a_result_that_was_cut_off_changes_nothing(scene, panel, backend, small_model, monkeypatch):
    request, _, _ = one_request(scene, small_model)
    before = scene_state(scene)

    def cut(text, _fraction):
        if text == "Adding the segments to the scene":
            path = panel.folder / f"run {panel.number}" / "result.seg.nrrd"
            os.truncate(path, path.stat().st_size - 20)

    outcome = panel.run(request, cut)
    assert (
        outcome.state == "failed"
        and "could not be read" in outcome.message
        and "nothing was changed" in outcome.message
    )
    assert scene_state(scene) == before


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_fault_in_the_middle_of_the_import_is_taken_back(scene, panel, small_model, monkeypatch, existing):
    request, _, _ = one_request(scene, small_model)
    output = panel.run(request).segmentationNode if existing else None
    before = scene_state(scene)
    monkeypatch.setattr(SegmentationResult, "storeProvenance", lambda *_: 1 / 0)
    outcome = panel.run(SegmentationRequest(small_model, request.channels, "cpu", outputNode=output))
    assert outcome.state == "failed" and "division by zero" in outcome.message
    assert scene_state(scene) == before


def test_closing_the_scene_cancels_the_run(scene, panel, small_model):
    request, _, _ = one_request(scene, small_model)

    tags = []

    def close(text, _fraction):
        if text == "Segmenting" and not tags:
            tags.extend(tag for _, tag in panel.logic._run.observers)
            scene.Clear(False)

    outcome = panel.run(request, close)
    assert (outcome.state, outcome.message) == (
        "cancelled",
        "The scene was closed, so the segmentation was cancelled.",
    )
    assert scene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode") == 0
    assert len(tags) == 2 and not any(scene.GetCommand(tag) for tag in tags), "nothing is observed any more"
    assert not panel.logic.canUndo()


def remove_at_segmenting(scene, node):
    def meddle(text, _fraction):
        if text == "Segmenting" and node.GetScene() is not None:
            scene.RemoveNode(node)

    return meddle


def test_deleting_the_reference_volume_ends_the_run_in_a_sentence(scene, panel, small_model):
    request, node, _ = one_request(scene, small_model)
    outcome = panel.run(request, remove_at_segmenting(scene, node))
    assert outcome.state == "failed"
    assert outcome.message == "12: AX T1 was deleted during the segmentation; nothing was changed."
    assert scene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode") == 0


def test_deleting_another_channel_does_not_matter_any_more(scene, panel, two_channel_package):
    images, _ = ball(2, seed=5)
    nodes = [add_volume(scene, image, name=name) for image, name in zip(images, "ab", strict=True)]
    request = SegmentationRequest(model_info(two_channel_package), {"T1": nodes[0], "FLAIR": nodes[1]}, "cpu")
    outcome = panel.run(request, remove_at_segmenting(scene, nodes[1]))
    assert outcome.state == "done"
    assert SegmentationResult.readProvenance(outcome.segmentationNode)[0].inputs[1].name == "b"


def test_deleting_the_chosen_output_gives_a_new_one_and_says_so(scene, panel, small_model):
    chosen = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "chosen")
    request, _, _ = one_request(scene, small_model, outputNode=chosen)
    outcome = panel.run(request, remove_at_segmenting(scene, chosen))
    assert outcome.state == "done" and outcome.segmentationNode is not chosen
    assert "The chosen segmentation was deleted during the run; the result is in a new one." in outcome.warnings


def test_changing_the_volumes_geometry_meanwhile_changes_nothing(scene, panel, small_model):
    request, node, _ = one_request(scene, small_model)

    def shift(text, _fraction):
        if text == "Segmenting":
            node.SetOrigin(0, 0, 0)

    outcome = panel.run(request, shift)
    assert outcome.state == "failed" and "does not lie on the grid of 12: AX T1; nothing was changed" in outcome.message


def test_a_transform_that_is_applied_meanwhile_moves_the_result_with_the_volume(scene, panel, small_model):
    request, node, classes = one_request(scene, small_model)
    transform = add_transform(scene, matrix(rotation(30), origin=(9, 9, 9)))

    def move(text, _fraction):
        if text == "Segmenting":
            node.SetAndObserveTransformNodeID(transform.GetID())

    outcome = panel.run(request, move)
    assert outcome.segmentationNode.GetParentTransformNode() is transform
    assert masks_in_world(outcome.segmentationNode, classes == 1, node) > 0.85


def test_only_one_run_at_a_time(scene, panel, small_model):
    request, _, _ = one_request(scene, small_model)
    told = []

    def again(text, _fraction):
        if text == "Segmenting" and not told:
            assert panel.logic.missing(request) == ["A segmentation is running; wait for it or cancel it."]
            panel.logic.start(request, lambda *_: None, told.append)

    assert panel.run(request, again).state == "done"
    assert told[0].state == "failed" and "is running" in told[0].message


def test_foreign_and_long_paths(scene, backend, tmp_path, one_channel_package):
    import shutil

    folder = tmp_path / ("Größe 浮腫 'x' = y " + "z" * 100) / ("ä" * 60)
    folder.mkdir(parents=True)
    shutil.copytree(one_channel_package.path, folder / "modèle")
    temporary = folder / "vorläufig"
    temporary.mkdir()
    info = model_info(one_channel_package)
    info.path = str(folder / "modèle")
    request, node, classes = one_request(scene, info)
    node.SetName("../ü: a/b\\c\n'\"")
    outcome = Panel(backend, temporary).run(request)
    assert outcome.state == "done", outcome.message
    assert masks_in_world(outcome.segmentationNode, classes == 1, node) > 0.85
