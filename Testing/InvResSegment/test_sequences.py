"""All frames of a sequence on the real backend: a segmentation sequence in the same browser, or the scene as it was."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import slicer
from backends import RecordingBackend
from InvResSegmentLib import NodeConversion, SegmentationResult
from InvResSegmentLib.SegmentationLogic import SegmentationRequest
from InvResSegmentLib.SeriesResult import TABLE_BY_FRAME_ROLE
from InvResSegmentLib.Text import framesInWords
from InvResSegmentLib.VolumeSequence import sequenceOf
from small_models import MATRICES, add_transform, add_volume, dice, matrix, model_info, rotation, with_sides
from test_segmentation_logic import Panel, ball, scene_state

COUNT = 4


@pytest.fixture
def panel(backend, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    return Panel(backend, folder)


def volume_of(voxels, affine):
    """A volume in no scene."""
    scene = slicer.vtkMRMLScene()
    node = add_volume(scene, voxels, affine, "frame")
    found = slicer.vtkMRMLScalarVolumeNode()
    found.Copy(node)
    return found


def sequence_of(scene, frames, affines, name="cine", browser=None):
    """A browser at its first frame; the sequence, and the volume that shows it."""
    sequence = scene.AddNewNodeByClass("vtkMRMLSequenceNode", name)
    sequence.SetIndexName("time")
    sequence.SetIndexUnit("s")
    for number, (voxels, affine) in enumerate(zip(frames, affines, strict=True)):
        sequence.SetDataNodeAtValue(volume_of(voxels, affine), f"{0.04 * number:g}")
    if browser is None:
        browser = scene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode", "browser")
        browser.SetAndObserveMasterSequenceNodeID(sequence.GetID())
    else:
        browser.AddSynchronizedSequenceNode(sequence)
    browser.SetSelectedItemNumber(0)
    return browser, sequence, browser.GetProxyNode(sequence)


def cine(scene, affine=None, seed=3):
    """Balls in other places in every frame; the last frame lies elsewhere."""
    frames, classes = zip(*(ball(seed=seed + number) for number in range(COUNT)), strict=True)
    affine = matrix() if affine is None else affine
    moved = affine.copy()
    moved[:3, 3] += 5
    affines = [affine] * (COUNT - 1) + [moved]
    browser, sequence, shown = sequence_of(scene, [images[0] for images in frames], affines)
    return browser, sequence, shown, classes


def request_of(model, shown, **fields):
    return SegmentationRequest(model, {"T1": shown}, "cpu", series=sequenceOf([shown]), **fields)


def columns(table_node):
    table = table_node.GetTable()
    return {
        table.GetColumnName(index): [table.GetColumn(index).GetValue(row) for row in range(table.GetNumberOfRows())]
        for index in range(table.GetNumberOfColumns())
    }


@pytest.mark.parametrize("affine", [MATRICES["oblique"], matrix()], ids=["oblique", "straight"])
def test_every_frame_is_found_where_it_lies_and_the_browser_is_left_alone(scene, panel, small_model, affine):
    browser, sequence, shown, classes = cine(scene, affine)
    browser.SetSelectedItemNumber(1)
    transform = add_transform(scene, matrix(2 * rotation(30, (0, 1, 2)), origin=(10, -3, 2)))
    shown.SetAndObserveTransformNodeID(transform.GetID())
    seen = []
    outcome = panel.run(request_of(small_model, shown), lambda *_: seen.append(browser.GetSelectedItemNumber()))
    assert (outcome.state, outcome.message, outcome.frames) == ("done", "", COUNT)
    assert set(seen) == {1} and browser.GetMasterSequenceNode() is sequence
    node = outcome.segmentationNode
    found = browser.GetSequenceNode(node)
    assert [found.GetNthIndexValue(number) for number in range(COUNT)] == ["0", "0.04", "0.08", "0.12"]
    assert (found.GetIndexName(), found.GetIndexUnit()) == ("time", "s")
    assert node.GetName() == f"{shown.GetName()} segmentation" and node.GetParentTransformNode() is transform
    assert node.GetDisplayNode().GetVisibility() and browser.GetSaveChanges(found)
    assert len(slicer.util.getNodesByClass("vtkMRMLSegmentationNode")) == 1, "no node is left that nobody asked for"
    table = columns(outcome.tableNode)
    assert table["time [s]"] == ["0", "0.04", "0.08", "0.12"]
    for number in range(COUNT):
        data, image = found.GetNthDataNode(number), sequence.GetNthDataNode(number)
        inside = data.GetSegmentation()
        assert inside.GetNumberOfSegments() == 1 and inside.GetNthSegment(0).GetName() == "ball"
        assert inside.GetNthSegment(0).GetColor() == pytest.approx((250 / 255, 20 / 255, 40 / 255))
        mask, place = NodeConversion.segmentMask(data, inside.GetNthSegmentID(0))
        assert np.allclose(place, NodeConversion.volumeMatrix(image), atol=1e-6)
        assert dice(mask, classes[number] == 1) > 0.8
        voxel_ml = 8 * abs(np.linalg.det(affine[:3, :3])) / 1000  # the transform makes all twice as long
        assert table["ball [mL]"][number] == pytest.approx(np.count_nonzero(mask) * voxel_ml, rel=1e-4)
        (record,) = SegmentationResult.readProvenance(data)
        assert record.settings["frame"] == number + 1 and record.settings["frames"] == COUNT
        assert record.inputs[0].nodeId == shown.GetID() and record.seconds > 0
    assert outcome.confidence == pytest.approx(min(table["Confidence"]), abs=1e-4)
    shown_mask, _ = NodeConversion.segmentMask(node, node.GetSegmentation().GetNthSegmentID(0))
    assert dice(shown_mask, classes[1] == 1) > 0.8, "it shows the frame at which the browser is"
    browser.SetSelectedItemNumber(3)
    mask, place = NodeConversion.segmentMask(node, node.GetSegmentation().GetNthSegmentID(0))
    assert dice(mask, classes[3] == 1) > 0.8 and np.allclose(place, NodeConversion.volumeMatrix(shown), atol=1e-6)
    assert node.GetName() == f"{shown.GetName()} segmentation" and node.GetParentTransformNode() is transform
    assert SegmentationResult.readProvenance(node)[0].settings["frame"] == 4
    assert node.GetNodeReference(TABLE_BY_FRAME_ROLE) is outcome.tableNode
    node.GetSegmentation().GetNthSegment(0).SetName("corrected")
    node.Modified()
    browser.SetSelectedItemNumber(0)
    assert found.GetNthDataNode(3).GetSegmentation().GetNthSegment(0).GetName() == "corrected"


def test_undo_and_a_second_run(scene, panel, small_model):
    browser, _, shown, _ = cine(scene)
    before = scene_state(scene)
    for _ in range(2):
        outcome = panel.run(request_of(small_model, shown))
        assert outcome.state == "done" and browser.GetNumberOfSynchronizedSequenceNodes(True) == 2
        hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
        for node in (outcome.segmentationNode, outcome.tableNode):
            assert hierarchy.GetItemByDataNode(node) != hierarchy.GetInvalidItemID()
        assert panel.logic.canUndo()
        browser.SetSelectedItemNumber(2)
        browser.SetSelectedItemNumber(0)
        panel.logic.undo()
        assert browser.GetNumberOfSynchronizedSequenceNodes(True) == 1
        assert scene_state(scene)[0] == before[0]


def test_progress_is_that_of_all_frames(scene, panel, small_model):
    panel.run(request_of(small_model, cine(scene)[2]))
    fractions = [fraction for _, fraction, _ in panel.progress]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    assert any(0.3 < fraction < 0.45 for fraction in fractions)
    texts = [text for text, _, _ in panel.progress]
    assert texts[0] == "Frame 1 of 4: Handing the volumes over" and "Frame 3 of 4: Segmenting" in texts
    assert all(eta is None for text, _, eta in panel.progress if text.startswith("Frame 1 "))
    assert any(eta for _, _, eta in panel.progress)


@pytest.mark.parametrize("when", ["Frame 1 of 4: Segmenting", "Frame 3 of 4: Handing", "Frame 4 of 4: Adding"])
def test_a_run_that_is_cancelled_leaves_the_scene_as_it_was(scene, panel, small_model, when):
    _, _, shown, _ = cine(scene)
    before = scene_state(scene)
    outcome = panel.run(
        request_of(small_model, shown), lambda text, _: panel.logic.cancel() if text.startswith(when) else None
    )
    assert outcome.state == "cancelled" and scene_state(scene) == before


@pytest.mark.parametrize("what", ["frame", "sequence", "browser", "volume", "scene"])
def test_what_is_deleted_meanwhile_ends_the_run(scene, panel, small_model, what):
    browser, sequence, shown, _ = cine(scene)
    done = []

    def meddle(text, _):
        if not done and text == "Frame 2 of 4: Segmenting":
            done.append(what)
            if what == "frame":
                sequence.RemoveDataNodeAtValue("0.08")
            elif what == "scene":
                scene.Clear(False)
            else:
                scene.RemoveNode({"sequence": sequence, "browser": browser, "volume": shown}[what])

    outcome = panel.run(request_of(small_model, shown), meddle)
    assert outcome.state == ("cancelled" if what == "scene" else "failed")
    assert slicer.util.getNodesByClass("vtkMRMLSegmentationNode") == []
    if what == "frame":
        assert outcome.message.startswith("Frame 3: It is not in the sequence of cine any more")


def test_a_frame_that_shows_nothing_is_left_empty_and_said_once(scene, panel, small_model):
    images, _ = ball()
    blank = np.zeros_like(images[0])
    browser, _, shown = sequence_of(scene, [blank, images[0], blank, images[0]], [matrix()] * 4)
    outcome = panel.run(request_of(small_model, shown))
    assert outcome.state == "done" and outcome.confidence > 0.5
    assert [text for text in outcome.warnings if "nothing to segment" in text] == [
        text for text in outcome.warnings if text.startswith("Frames 1, 3: ") and text.endswith("was left empty.")
    ]
    found = browser.GetSequenceNode(outcome.segmentationNode)
    for number in range(4):
        inside = found.GetNthDataNode(number).GetSegmentation()
        assert [inside.GetNthSegment(0).GetName(), inside.GetNthSegmentID(0)] == ["ball", "InvResSegment_3"]
        mask, _ = NodeConversion.segmentMask(found.GetNthDataNode(number), inside.GetNthSegmentID(0))
        assert mask.any() == (number % 2 == 1) and mask.shape == blank.shape
    table = columns(outcome.tableNode)
    assert [math.isnan(value) for value in table["ball [mL]"]] == [True, False, True, False]


def test_left_and_right_are_apart_in_all_frames_or_in_none(scene, panel, one_channel_package, tmp_path):
    """Else a segment would stand for one side in one frame and for both in the next."""
    model = model_info(with_sides(one_channel_package, tmp_path / "sided"))
    images, classes = ball()
    told, untold = matrix(origin=(-11.4, 20, 5)), matrix(origin=(60, 20, 5))
    frames = [images[0], images[0], np.zeros_like(images[0]), images[0]]
    browser, _, shown = sequence_of(scene, frames, [told, untold, told, told])
    outcome = panel.run(request_of(model, shown))
    assert outcome.state == "done", outcome.message
    found = browser.GetSequenceNode(outcome.segmentationNode)
    volumes = columns(outcome.tableNode)
    assert list(volumes) == ["time [s]", "ball [mL]", "Confidence"]
    for number in range(4):
        data = found.GetNthDataNode(number)
        inside = data.GetSegmentation()
        names = [inside.GetNthSegment(index).GetName() for index in range(inside.GetNumberOfSegments())]
        assert names == ["ball"] and not NodeConversion.wasEdited(data)
        mask, _ = NodeConversion.segmentMask(data, inside.GetNthSegmentID(0))
        assert mask.any() if number != 2 else not mask.any()
        if number != 2:
            assert dice(mask, classes == 1) > 0.6
            assert volumes["ball [mL]"][number] == pytest.approx(np.count_nonzero(mask) / 1000)
    joined = "Left and right were put into one segment here, too, so that all frames are alike."
    assert f"Frames 1, 4: {joined}" in outcome.warnings
    assert joined in SegmentationResult.readProvenance(found.GetNthDataNode(3))[0].warnings
    # Where all frames have them, they stay apart.
    browser, _, shown = sequence_of(scene, frames[:1] * 2, [told, told], "sided")
    outcome = panel.run(request_of(model, shown))
    assert [*columns(outcome.tableNode)][1:3] == ["left ball [mL]", "right ball [mL]"]


def test_a_channel_is_called_as_its_volume_in_what_is_said(scene, panel, small_model):
    images, _ = ball()
    images[0][0, 0, 0] = np.nan
    _, _, shown = sequence_of(scene, [images[0]] * 2, [matrix()] * 2)
    shown.SetName("12: AX T1")
    outcome = panel.run(request_of(small_model, shown))
    (said,) = [text for text in outcome.warnings if "NaN" in text]
    assert said.startswith("All 2 frames: 12: AX T1: 1 voxels are NaN") and "channel0" not in said


def test_a_sequence_of_nothing_fails(scene, panel, small_model):
    blank = np.zeros((12, 13, 14), np.float32)
    _, _, shown = sequence_of(scene, [blank] * 2, [matrix()] * 2)
    before = scene_state(scene)
    outcome = panel.run(request_of(small_model, shown))
    assert outcome.state == "failed" and "nothing to segment" in outcome.message and scene_state(scene) == before


def test_a_frame_that_cannot_be_segmented_is_named(scene, panel, small_model):
    images, _ = ball()
    skewed = matrix()
    skewed[0, 1] = 0.4
    _, _, shown = sequence_of(scene, [images[0]] * 3, [matrix(), matrix(), skewed])
    outcome = panel.run(request_of(small_model, shown))
    assert outcome.state == "failed" and outcome.message.startswith("Frame 3: The axes of frame are not at right")


def test_a_channel_that_is_no_sequence_serves_every_frame(scene, panel, two_channel_package):
    model = model_info(two_channel_package)
    frames, classes = zip(*(ball(2, seed=5 + number) for number in range(3)), strict=True)
    browser, _, moving = sequence_of(scene, [images[1] for images in frames], [matrix()] * 3)
    still = add_volume(scene, frames[0][0], matrix(), "still")
    request = SegmentationRequest(model, {"T1": still, "FLAIR": moving}, "cpu", series=sequenceOf([still, moving]))
    outcome = panel.run(request)
    assert outcome.state == "done"
    found = browser.GetSequenceNode(outcome.segmentationNode)
    assert outcome.segmentationNode.GetName() == "still segmentation"
    for number in range(3):
        inside = found.GetNthDataNode(number)
        mask = sum(
            NodeConversion.segmentMask(inside, inside.GetSegmentation().GetNthSegmentID(one))[0] for one in range(2)
        )
        assert dice(mask > 0, classes[number] > 0) > 0.6, "of the moving channel"


def test_two_sequences_of_a_browser_go_together(scene, panel, two_channel_package):
    model = model_info(two_channel_package)
    frames, classes = zip(*(ball(2, seed=5 + number) for number in range(3)), strict=True)
    browser, _, one = sequence_of(scene, [images[0] for images in frames], [matrix()] * 3)
    _, _, other = sequence_of(scene, [images[1] for images in frames], [matrix()] * 3, "other", browser)
    request = SegmentationRequest(model, {"T1": one, "FLAIR": other}, "cpu", series=sequenceOf([one, other]))
    outcome = panel.run(request)
    assert outcome.state == "done"
    found = browser.GetSequenceNode(outcome.segmentationNode)
    for number in range(3):
        inside = found.GetNthDataNode(number)
        for index, value in ((0, 1), (1, 2)):
            mask, _ = NodeConversion.segmentMask(inside, inside.GetSegmentation().GetNthSegmentID(index))
            assert dice(mask, classes[number] == value) > 0.5


def test_a_channel_that_is_deleted_meanwhile_is_not_done_without(scene, panel, two_channel_package):
    model = model_info(two_channel_package)
    for channel in model.channels:
        channel.optional = True
    images, _ = ball(2, seed=5)
    _, _, moving = sequence_of(scene, [images[0]] * 3, [matrix()] * 3)
    still = add_volume(scene, images[1], matrix(), "still")

    def meddle(text, _):
        if text == "Frame 2 of 3: Segmenting" and still.GetScene() is not None:
            scene.RemoveNode(still)

    request = SegmentationRequest(model, {"T1": moving, "FLAIR": still}, "cpu", series=sequenceOf([moving]))
    outcome = panel.run(request, meddle)
    assert (outcome.state, outcome.message) == (
        "failed",
        "still was deleted during the segmentation; nothing was changed.",
    )


def test_a_region_is_the_same_in_all_frames(scene, panel, backend, small_model):
    _, _, shown, _ = cine(scene)
    roi = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    roi.SetSize(20, 20, 20)
    roi.SetCenter(*(matrix() @ [12, 12, 12, 1])[:3])
    number = len(backend.requests)
    outcome = panel.run(
        request_of(small_model, shown, roiNode=roi),
        lambda text, _: roi.SetCenter(50, 50, 50) if text == "Frame 1 of 4: Segmenting" else None,
    )
    assert outcome.state == "done"
    asked = [arguments[arguments.index("--roi") + 1 :][:6] for arguments in backend.requests[number:]]
    assert len(asked) == COUNT and all(bounds == asked[0] for bounds in asked)


def test_an_output_that_was_chosen_is_refused(scene, panel, small_model):
    _, _, shown, _ = cine(scene)
    output = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    missing = panel.logic.missing(request_of(small_model, shown, outputNode=output))
    assert missing == ["All frames go into a new segmentation sequence; choose no other output."]


def test_a_backend_that_dies_names_the_frame(scene, small_model, tmp_path):
    backend = RecordingBackend()
    (tmp_path / "t").mkdir()
    panel = Panel(backend, tmp_path / "t")
    _, _, shown, _ = cine(scene)
    before = scene_state(scene)

    def meddle(text, _):
        if text == "Frame 2 of 4: Segmenting" and backend.pid:
            os.kill(backend.pid, 9)

    outcome = panel.run(request_of(small_model, shown), meddle)
    backend.stop()
    assert outcome.state == "failed" and outcome.message.startswith("Frame 2: The backend ended unexpectedly")
    assert scene_state(scene) == before


def test_what_is_no_sequence_has_none(scene):
    images, _ = ball()
    alone = add_volume(scene, images[0], matrix(), "alone")
    _, _, single = sequence_of(scene, [images[0]], [matrix()], "single")
    assert sequenceOf([]) is None and sequenceOf([alone, single]) is None
    browser, sequence, shown, _ = cine(scene)
    series = sequenceOf([alone, shown])
    assert (series.browser, series.node, series.count) == (browser, sequence, COUNT)
    assert series.volumeAt(alone, 2) is alone
    sequence.RemoveDataNodeAtValue("0.08")
    assert series.volumeAt(shown, 2) is None


def test_frames_are_named_in_runs():
    assert framesInWords([2], 5) == "Frame 2"
    assert framesInWords([1, 2, 3], 3) == "All 3 frames"
    assert framesInWords([1, 3, 4, 7, 8, 9], 10) == "Frames 1, 3, 4, 7 to 9"
