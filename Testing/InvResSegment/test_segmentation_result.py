"""A result stands where its image stands, can be seen and measured, and says where it came from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import slicer
from InvResSegmentLib import NodeConversion, SegmentationResult
from InvResSegmentLib.ResultFile import ResultFile, SegmentLabel
from InvResSegmentLib.SegmentationResult import InputRecord, Provenance, SceneChange
from small_models import MATRICES, add_transform, add_volume, matrix, rotation

SHAPE = (6, 8, 10)


def labels():
    found = np.zeros(SHAPE, np.uint8)
    found[1:3, 2:6, 1:4] = 1  # 24 voxels
    found[3:5, 1:3, 5:9] = 4  # 16 voxels
    return found


def segmented(scene, node):
    change = SceneChange()
    segmentation = SegmentationResult.createSegmentationNode(scene, node, change)
    result = ResultFile(
        labels()[..., None], NodeConversion.volumeMatrix(node), (SegmentLabel("a", 1), SegmentLabel("b", 4))
    )
    change.target = segmentation.GetID()
    NodeConversion.importSegmentation(result, node, segmentation, "a" * 64, done=change.segments)
    return segmentation, change


def hierarchy_of(scene):
    return slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)


# ---------------------------------------------------------------- place


def test_the_segmentation_stands_in_the_study_of_its_image(scene):
    hierarchy = hierarchy_of(scene)
    patient = hierarchy.CreateSubjectItem(hierarchy.GetSceneItemID(), "patient")
    study = hierarchy.CreateStudyItem(patient, "study")
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    hierarchy.CreateItem(study, node)
    segmentation, _ = segmented(scene, node)
    SegmentationResult.placeBeside(segmentation, node)
    assert hierarchy.GetItemParent(hierarchy.GetItemByDataNode(segmentation)) == study
    elsewhere = hierarchy.CreateFolderItem(hierarchy.GetSceneItemID(), "folder")
    hierarchy.SetItemParent(hierarchy.GetItemByDataNode(node), elsewhere)
    SegmentationResult.placeBeside(segmentation, node)
    assert hierarchy.GetItemParent(hierarchy.GetItemByDataNode(segmentation)) == elsewhere


def test_an_image_that_the_hierarchy_does_not_know_is_no_obstacle(scene):
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    segmentation, _ = segmented(scene, node)
    SegmentationResult.placeBeside(segmentation, node)
    hierarchy = hierarchy_of(scene)
    assert hierarchy.GetItemParent(hierarchy.GetItemByDataNode(segmentation)) == hierarchy.GetSceneItemID()


def test_the_reference_volume_is_remembered(scene):
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    segmentation, _ = segmented(scene, node)
    role = slicer.vtkMRMLSegmentationNode.GetReferenceImageGeometryReferenceRole()
    assert segmentation.GetNodeReference(role) is node
    assert segmentation.GetName() == "volume segmentation"
    assert segmented(scene, node)[0].GetName() != segmentation.GetName()


# ---------------------------------------------------------------- display


def test_slices_show_the_voxels_and_3d_shows_surfaces_only_when_asked(scene):
    segmentation, _ = segmented(scene, add_volume(scene, np.zeros(SHAPE, np.int16)))
    SegmentationResult.showInSlices(segmentation)
    display = segmentation.GetDisplayNode()
    assert display.GetVisibility() and display.GetVisibility2D()
    assert not segmentation.GetSegmentation().ContainsRepresentation("Closed surface")
    assert SegmentationResult.showSurfaces(segmentation)
    assert display.GetVisibility3D() and segmentation.GetSegmentation().ContainsRepresentation("Closed surface")
    assert not SegmentationResult.showSurfaces(segmentation, False)
    assert not display.GetVisibility3D()
    assert not segmentation.GetSegmentation().ContainsRepresentation("Closed surface")
    assert segmentation.GetSegmentation().ContainsRepresentation("Binary labelmap")


# ---------------------------------------------------------------- volumes


SCALED = matrix(rotation(33), spacing=(2.0, 1.0, 1.5), origin=(4, 5, 6))


@pytest.mark.parametrize("affine", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("transform", [None, matrix(rotation(50)), SCALED], ids=["none", "turned", "scaled"])
def test_volumes_are_those_of_the_world(scene, affine, transform):
    node = add_volume(scene, np.zeros(SHAPE, np.int16), affine)
    factor = abs(np.linalg.det(affine[:3, :3])) / 1000
    if transform is not None:
        node.SetAndObserveTransformNodeID(add_transform(scene, transform).GetID())
        factor *= abs(np.linalg.det(transform[:3, :3]))
    segmentation, change = segmented(scene, node)
    measured = SegmentationResult.measureVolumes(segmentation, change.segments.segmentIds)
    assert [(one.name, one.voxels) for one in measured] == [("a", 24), ("b", 16)]
    assert [one.millilitres for one in measured] == pytest.approx([24 * factor, 16 * factor])


def test_the_table_has_a_row_for_each_segment_and_is_filled_anew(scene):
    hierarchy = hierarchy_of(scene)
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    study = hierarchy.CreateStudyItem(hierarchy.GetSceneItemID(), "study")
    hierarchy.CreateItem(study, node)
    segmentation, change = segmented(scene, node)
    table = SegmentationResult.volumesTableOf(segmentation, node, change)
    assert table.GetID() in change.created
    assert [table.GetColumnName(index) for index in range(3)] == ["Segment", "Volume [mL]", "Voxels"]
    assert [table.GetCellText(row, 0) for row in range(2)] == ["a", "b"]
    assert table.GetTable().GetValue(0, 1).ToDouble() == pytest.approx(0.024)
    assert hierarchy.GetItemParent(hierarchy.GetItemByDataNode(table)) == study
    segmentation.GetSegmentation().RemoveSegment(change.segments.segmentIds[0])
    again = SegmentationResult.volumesTableOf(segmentation, node, SceneChange())
    assert again is table and table.GetNumberOfRows() == 1


# ---------------------------------------------------------------- provenance


def record(**fields):
    values = {
        "model": "Größe 浮腫",
        "modelSha256": "a" * 64,
        "inputs": (InputRecord("T1", "12: AX T1", "vtkMRMLScalarVolumeNode1", "1.2.3"),),
        "settings": {"window": [16, 16, 16], "device": "cpu", "roi_mm": []},
        "versions": {"invres": "0.1.0"},
        "seconds": 1.5,
        "measuredPeakBytes": 123456789012,
        "warnings": ('a "quoted" | warning: yes',),
    }
    return Provenance(**{**values, **fields})


def test_provenance_is_read_back_as_it_was_stored(scene):
    segmentation, _ = segmented(scene, add_volume(scene, np.zeros(SHAPE, np.int16)))
    assert SegmentationResult.readProvenance(segmentation) == []
    first, second = record(), record(model="other")
    SegmentationResult.storeProvenance(segmentation, first)
    SegmentationResult.storeProvenance(segmentation, second)
    assert SegmentationResult.readProvenance(segmentation) == [first, second]
    assert first.date.endswith("+00:00")
    text = segmentation.GetAttribute(SegmentationResult.PROVENANCE_ATTRIBUTE)
    assert json.loads(text)["runs"][0]["inputs"][0]["seriesInstanceUid"] == "1.2.3"


def test_provenance_survives_the_scene_file(scene, tmp_path):
    segmentation, _ = segmented(scene, add_volume(scene, np.zeros(SHAPE, np.int16)))
    SegmentationResult.storeProvenance(segmentation, record())
    path = tmp_path / "scene.mrml"
    scene.SetURL(str(path))
    assert scene.Commit(str(path))
    again = slicer.vtkMRMLScene()
    again.SetURL(str(path))
    again.Import()
    node = again.GetFirstNodeByClass("vtkMRMLSegmentationNode")
    assert SegmentationResult.readProvenance(node) == SegmentationResult.readProvenance(segmentation) != []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"runs": [1, {"model": "x"}, {"inputs": 5}]}', "null"])
def test_what_is_no_provenance_is_left_out(scene, text):
    segmentation, _ = segmented(scene, add_volume(scene, np.zeros(SHAPE, np.int16)))
    segmentation.SetAttribute(SegmentationResult.PROVENANCE_ATTRIBUTE, text)
    assert SegmentationResult.readProvenance(segmentation) == []


def test_only_the_newest_runs_are_kept(scene):
    segmentation, _ = segmented(scene, add_volume(scene, np.zeros(SHAPE, np.int16)))
    for number in range(25):
        SegmentationResult.storeProvenance(segmentation, record(model=str(number)))
    kept = [one.model for one in SegmentationResult.readProvenance(segmentation)]
    assert kept == [str(number) for number in range(5, 25)]


def test_the_series_is_known_by_the_subject_hierarchy(scene):
    hierarchy = hierarchy_of(scene)
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    assert SegmentationResult.seriesUidOf(node) == ""
    item = hierarchy.CreateItem(hierarchy.GetSceneItemID(), node)
    hierarchy.SetItemUID(item, "DICOM", "1.2.840.5")
    assert SegmentationResult.seriesUidOf(node) == "1.2.840.5"


# ---------------------------------------------------------------- taking back


def test_taking_back_removes_what_was_made(scene):
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    before = {scene.GetNthNode(index).GetID() for index in range(scene.GetNumberOfNodes())}
    segmentation, change = segmented(scene, node)
    SegmentationResult.volumesTableOf(segmentation, node, change)
    change.revert(scene)
    assert {scene.GetNthNode(index).GetID() for index in range(scene.GetNumberOfNodes())} == before
