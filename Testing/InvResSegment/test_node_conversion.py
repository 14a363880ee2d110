"""Volumes reach the backend voxel for voxel where they are, and results land on the tissue they were found in."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import slicer
import vtk
from InvResSegmentLib import NodeConversion, NodeFiles
from InvResSegmentLib.NodeConversion import ConversionError, SegmentLabel
from small_models import BRAIN, MATRICES, TWO, add_transform, add_volume, dice, matrix, rotation

from invres.config import Label, LabelScheme
from invres.volume import Geometry, Volume, read_volume, write_segmentation

SHAPE = (6, 8, 10)  # K, J, I
MOVED = matrix(rotation(40, (0, 1, 2)), origin=(100.0, -30.0, 12.0))


def classes(shape=SHAPE):
    """A box of class 1 and one of class 4, far from symmetric."""
    labels = np.zeros(shape, np.uint8)
    labels[1:3, 2:6, 1:4] = 1
    labels[3:5, 1:3, 5:9] = 4
    return labels


def write_result(path, volume_node, labels, scheme=TWO):
    """What the backend writes for this volume, by the backend's own hand."""
    affine = NodeConversion.volumeMatrix(volume_node)[:, [2, 1, 0, 3]]
    write_segmentation(path, Volume(labels, Geometry.from_affine(affine, labels.shape)), scheme)
    return path


def imported(scene, tmp_path, node, labels=None, target=None, origin="a" * 64):
    path = write_result(tmp_path / "r.seg.nrrd", node, classes() if labels is None else labels)
    segmentation = target or scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "result")
    result = NodeConversion.readResult(path, node)
    return segmentation, NodeConversion.importSegmentation(result, node, segmentation, origin)


def in_world(segmentation_node, segment_id):
    """Centre of a segment's voxels in the world, by Slicer's own export to a label map."""
    ids = vtk.vtkStringArray()
    ids.InsertNextValue(segment_id)
    labelmap = segmentation_node.GetScene().AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
    slicer.vtkSlicerSegmentationsModuleLogic.ExportSegmentsToLabelmapNode(segmentation_node, ids, labelmap)
    indices = np.argwhere(NodeConversion.volumeArray(labelmap))[:, ::-1].mean(axis=0)
    return world_point(labelmap, indices)


def world_point(volume_node, ijk):
    point = (NodeConversion.volumeMatrix(volume_node) @ [*ijk, 1])[:3]
    transform = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(volume_node.GetParentTransformNode(), None, transform)
    return np.array(transform.TransformPoint(point.tolist()))


def middle_of(labels, value):
    return np.argwhere(labels == value)[:, ::-1].mean(axis=0)


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("affine", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"])
def test_a_volume_is_written_voxel_for_voxel_in_its_place(scene, tmp_path, affine, dtype):
    array = np.random.default_rng(1).integers(-100 if dtype[0] != "u" else 0, 100, SHAPE).astype(dtype)
    node = add_volume(scene, array, affine)
    NodeConversion.exportVolume(node, tmp_path / "a.nrrd")
    image = sitk.ReadImage(str(tmp_path / "a.nrrd"))
    assert np.array_equal(sitk.GetArrayFromImage(image), array)
    assert sitk.GetArrayFromImage(image).dtype == dtype
    for ijk in ((0, 0, 0), (9, 0, 0), (3, 7, 5)):
        lps = image.TransformContinuousIndexToPhysicalPoint([float(n) for n in ijk])
        assert np.allclose(np.array(lps) * [-1, -1, 1], (affine @ [*ijk, 1])[:3], atol=1e-9)


@pytest.mark.parametrize("affine", MATRICES.values(), ids=MATRICES.keys())
def test_the_backend_reads_what_was_written(scene, tmp_path, affine):
    array = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    NodeConversion.exportVolume(add_volume(scene, array, affine), tmp_path / "a.nrrd")
    volume = read_volume(tmp_path / "a.nrrd")
    assert np.array_equal(volume.array, array)
    assert np.allclose(volume.geometry.affine[:, [2, 1, 0, 3]], affine, atol=1e-6)


def test_slicer_itself_reads_what_was_written(scene, tmp_path):
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    NodeConversion.exportVolume(add_volume(scene, array, MATRICES["oblique"]), tmp_path / "a.nrrd")
    storage = scene.AddNewNodeByClass("vtkMRMLVolumeArchetypeStorageNode")
    storage.SetFileName(str(tmp_path / "a.nrrd"))
    again = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode")
    assert storage.ReadData(again)
    assert np.array_equal(NodeConversion.volumeArray(again), array)
    assert np.allclose(NodeConversion.volumeMatrix(again), MATRICES["oblique"], atol=1e-5)


def test_the_parent_transform_is_left_out_and_another_volumes_frame_is_entered(scene, tmp_path):
    array = np.zeros(SHAPE, np.int16)
    node, other = add_volume(scene, array), add_volume(scene, array)
    node.SetAndObserveTransformNodeID(add_transform(scene, MOVED).GetID())
    NodeConversion.exportVolume(node, tmp_path / "own.nrrd")
    assert np.allclose(read_volume(tmp_path / "own.nrrd").geometry.affine[:, [2, 1, 0, 3]], matrix())
    NodeConversion.exportVolume(node, tmp_path / "other.nrrd", other)
    assert np.allclose(read_volume(tmp_path / "other.nrrd").geometry.affine[:, [2, 1, 0, 3]], MOVED @ matrix())


def test_a_part_of_a_larger_array_is_written_as_it_is_shown(scene, tmp_path):
    node = add_volume(scene, np.asfortranarray(np.random.default_rng(0).normal(size=SHAPE)))
    NodeConversion.exportVolume(node, tmp_path / "a.nrrd")
    assert np.array_equal(read_volume(tmp_path / "a.nrrd").array, NodeConversion.volumeArray(node))


def test_what_is_no_grey_value_volume_is_refused_in_a_sentence(scene, tmp_path):
    colour = add_volume(scene, np.zeros((*SHAPE, 3), np.uint8), name="photo", kind="vtkMRMLVectorVolumeNode")
    labels = add_volume(scene, np.zeros(SHAPE, np.uint8), name="labels", kind="vtkMRMLLabelMapVolumeNode")
    empty = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "empty")
    skewed = matrix()
    skewed[0, 1] = 0.3
    tilted = add_volume(scene, np.zeros(SHAPE, np.uint8), skewed, "tilted")
    for node, words in (
        (colour, "photo has 3 values per voxel"),
        (labels, "labels is a label map"),
        (empty, "empty holds no voxels"),
        (tilted, "The axes of tilted are not at right angles"),
    ):
        with pytest.raises(ConversionError, match=words) as caught:
            NodeConversion.exportVolume(node, tmp_path / "a.nrrd")
        assert caught.value.message.endswith(".")
    assert list(tmp_path.iterdir()) == []
    assert NodeConversion.exportProblem(None) == "No volume is chosen."


def test_a_region_is_told_in_the_volumes_own_frame(scene):
    node = add_volume(scene, np.zeros(SHAPE, np.uint8))
    node.SetAndObserveTransformNodeID(add_transform(scene, matrix(rotation(90, (0, 0, 1)), origin=(5, 0, 0))).GetID())
    roi = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    roi.SetCenter(5, 10, 7)
    roi.SetSize(2, 4, 6)
    # 90 degrees about S: world = (-a + 5, r, s), so r = A, a = 5 - R.
    assert np.allclose(NodeConversion.regionInVolume(roi, node), (8, 12, -1, 1, 4, 10))


# ---------------------------------------------------------------- import


@pytest.mark.parametrize("affine", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("transform", [None, MOVED, np.diag([2.0, 1.0, 1.0, 1.0])], ids=["none", "moved", "scaled"])
def test_labels_land_on_the_tissue_they_were_found_in(scene, tmp_path, affine, transform):
    node = add_volume(scene, np.zeros(SHAPE, np.int16), affine)
    if transform is not None:
        node.SetAndObserveTransformNodeID(add_transform(scene, transform).GetID())
    segmentation, done = imported(scene, tmp_path, node)
    assert segmentation.GetParentTransformNode() is node.GetParentTransformNode()
    for segment_id, value in zip(done.segmentIds, (1, 4), strict=True):
        expected = world_point(node, middle_of(classes(), value))
        assert np.allclose(in_world(segmentation, segment_id), expected, atol=1e-3)
        mask, place = NodeConversion.segmentMask(segmentation, segment_id)
        assert np.array_equal(mask, classes() == value)
        assert np.allclose(place, affine, atol=1e-9)


def test_the_reference_geometry_is_that_of_the_volume_under_its_transform(scene, tmp_path):
    node = add_volume(scene, np.zeros(SHAPE, np.int16), MATRICES["oblique"])
    node.SetAndObserveTransformNodeID(add_transform(scene, MOVED).GetID())
    segmentation, _ = imported(scene, tmp_path, node)
    labelmap = scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
    slicer.vtkSlicerSegmentationsModuleLogic.ExportAllSegmentsToLabelmapNode(
        segmentation, labelmap, slicer.vtkSegmentation.EXTENT_REFERENCE_GEOMETRY
    )
    assert NodeConversion.volumeArray(labelmap).shape == SHAPE
    assert np.allclose(NodeConversion.volumeMatrix(labelmap), MATRICES["oblique"], atol=1e-4)
    assert np.array_equal(NodeConversion.volumeArray(labelmap) > 0, classes() > 0)


def test_the_naive_order_would_put_them_elsewhere(scene, tmp_path):
    """Slicer's own import with segment ids moves labels twice if only the volume is transformed; ours does not."""
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    node.SetAndObserveTransformNodeID(add_transform(scene, matrix(origin=(100, 0, 0))).GetID())
    naive = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    naive.SetReferenceImageGeometryParameterFromVolumeNode(node)
    segment_id = naive.GetSegmentation().AddEmptySegment("a")
    labelmap = add_volume(scene, (classes() == 1).astype(np.uint8), kind="vtkMRMLLabelMapVolumeNode")
    labelmap.SetAndObserveTransformNodeID(node.GetTransformNodeID())
    ids = vtk.vtkStringArray()
    ids.InsertNextValue(segment_id)
    slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(labelmap, naive, ids)
    expected = world_point(node, middle_of(classes(), 1))
    assert abs(in_world(naive, segment_id) - expected)[0] == pytest.approx(100, abs=1)

    segmentation, done = imported(scene, tmp_path, node)
    assert np.allclose(in_world(segmentation, done.segmentIds[0]), expected, atol=1e-3)


def test_names_colours_and_terminology_arrive_and_one_image_serves_all(scene, tmp_path):
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    segmentation, done = imported(scene, tmp_path, node)
    inside = segmentation.GetSegmentation()
    found = [inside.GetSegment(segment_id) for segment_id in done.segmentIds]
    assert [segment.GetName() for segment in found] == ["Ödem", "core"]
    assert np.allclose(found[0].GetColor(), np.array((90, 190, 90)) / 255, atol=1e-3)
    assert all(0 <= part <= 1 for segment in found for part in segment.GetColor())
    entry = vtk.reference("")
    assert found[1].GetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), entry) and str(entry) == BRAIN
    assert inside.GetNumberOfLayers() == 1
    assert inside.GetSourceRepresentationName() == NodeConversion.BINARY_LABELMAP


def test_what_the_model_says_wins_over_the_file(scene, tmp_path):
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    result = NodeConversion.readResult(write_result(tmp_path / "r.seg.nrrd", node, classes()), node)
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    stated = [SegmentLabel("lesion", 4, (255, 0, 0))]
    NodeConversion.importSegmentation(result, node, segmentation, "a", stated)
    segment = segmentation.GetSegmentation().GetNthSegment(1)
    assert segment.GetName() == "lesion" and segment.GetColor() == (1, 0, 0)


def test_an_empty_segment_stays_in_the_list(scene, tmp_path):
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    segmentation, done = imported(scene, tmp_path, node, np.zeros(SHAPE, np.uint8))
    assert len(done.segmentIds) == 2
    assert not NodeConversion.segmentMask(segmentation, done.segmentIds[0])[0].any()


def test_a_result_on_another_grid_is_refused_and_leaves_nothing(scene, tmp_path):
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    path = write_result(tmp_path / "r.seg.nrrd", node, classes())
    count = scene.GetNumberOfNodes()
    node.SetOrigin(0, 0, 0.5)
    with pytest.raises(ConversionError, match="does not lie on the grid of volume; nothing was changed"):
        NodeConversion.readResult(path, node)
    with pytest.raises(ConversionError, match="could not be read"):
        NodeConversion.readResult(tmp_path / "none.seg.nrrd", node)
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 97), len(whole) - 1):
        (tmp_path / "broken.seg.nrrd").write_bytes(whole[:length])
        with pytest.raises(ConversionError, match="could not be read"):
            NodeConversion.readResult(tmp_path / "broken.seg.nrrd", node)
    assert scene.GetNumberOfNodes() == count


def test_long_and_foreign_paths_are_read(scene, tmp_path):
    folder = tmp_path / ("Größe 浮腫 " + "x" * 120) / ("y" * 120)
    folder.mkdir(parents=True)
    node = add_volume(scene, np.ones(SHAPE, np.int16))
    NodeConversion.exportVolume(node, folder / "a.nrrd")
    path = write_result(folder / "r.seg.nrrd", node, classes())
    assert np.array_equal(NodeConversion.readResult(path, node).labels, classes())


@pytest.mark.parametrize("how", ["import", "outline"])
def test_regions_that_overlap_are_whole_segments(scene, tmp_path, how):
    """As of a tumour: the whole holds its core, though a label map has room for one of them in each voxel."""
    regions = LabelScheme((Label("whole", (1, 2), 2), Label("core", (1,), 1)), regions=True)
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:9, 3:12, 4:15], labels[4:7, 5:9, 6:11] = 2, 1
    node = add_volume(scene, np.ones(SHAPE, np.int16), MATRICES["oblique"])
    path = write_result(tmp_path / "r.seg.nrrd", node, labels, regions)
    if how == "import":
        segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "result")
        NodeConversion.importSegmentation(NodeConversion.readResult(path, node), node, segmentation, "a" * 64)
    else:
        segmentation = NodeFiles.newSegmentation(NodeFiles.readLabels(path), "outline")
    inside = segmentation.GetSegmentation()
    for index, label in enumerate(regions.labels):
        assert inside.GetNthSegment(index).GetName() == label.name
        mask, _ = NodeConversion.segmentMask(segmentation, inside.GetNthSegmentID(index))
        assert np.array_equal(mask, np.isin(labels, label.values))


# ---------------------------------------------------------------- into a segmentation that has segments


def hand_made(segmentation_node, labels, name, node):
    """A segment as the Segment Editor makes it: sharing the image of those that are there."""
    image = slicer.vtkOrientedImageData()
    image.SetDimensions(*labels.shape[::-1])
    image.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 1)
    vtk.util.numpy_support.vtk_to_numpy(image.GetPointData().GetScalars())[:] = labels.astype(np.uint8).ravel()
    image.SetImageToWorldMatrix(NodeConversion.toVtkMatrix(NodeConversion.volumeMatrix(node)))
    segment_id = segmentation_node.AddSegmentFromBinaryLabelmapRepresentation(image, name)
    segmentation_node.GetSegmentation().CollapseBinaryLabelmaps(False)
    return segment_id


def names_of(segmentation_node):
    inside = segmentation_node.GetSegmentation()
    return [inside.GetNthSegment(index).GetName() for index in range(inside.GetNumberOfSegments())]


def test_a_second_run_replaces_its_own_segments_and_no_others(scene, tmp_path):
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    segmentation, first = imported(scene, tmp_path, node)
    mine = np.zeros(SHAPE, bool)
    mine[5, 6:, 6:] = True
    own = hand_made(segmentation, mine, "by hand", node)
    assert segmentation.GetSegmentation().GetNumberOfLayers() == 1, "all share one image"
    segmentation.GetSegmentation().GetSegment(first.segmentIds[0]).SetColor(0.1, 0.2, 0.3)
    labels = np.roll(classes(), 1, axis=2)
    _, second = imported(scene, tmp_path, node, labels, segmentation)
    assert second.segmentIds == first.segmentIds and second.added == []
    assert names_of(segmentation) == ["Ödem", "core", "by hand"]
    assert np.array_equal(NodeConversion.segmentMask(segmentation, own)[0], mine)
    image = segmentation.GetSegmentation().GetSegment(own).GetRepresentation(NodeConversion.BINARY_LABELMAP)
    left = np.unique(vtk.util.numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()))
    assert len(left) == 2, "no voxel of the old segments is left in the image that they shared"
    for segment_id, value in zip(second.segmentIds, (1, 4), strict=True):
        assert np.array_equal(NodeConversion.segmentMask(segmentation, segment_id)[0], labels == value)
    assert segmentation.GetSegmentation().GetSegment(first.segmentIds[0]).GetColor() == (0.1, 0.2, 0.3)

    second.revert(segmentation)
    for segment_id, value in zip(first.segmentIds, (1, 4), strict=True):
        assert np.array_equal(NodeConversion.segmentMask(segmentation, segment_id)[0], classes() == value)
    assert np.array_equal(NodeConversion.segmentMask(segmentation, own)[0], mine)


def test_another_models_segments_and_a_persons_keep_their_names(scene, tmp_path):
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(node)
    hand_made(segmentation, classes() == 0, "core", node)
    _, first = imported(scene, tmp_path, node, target=segmentation)
    _, second = imported(scene, tmp_path, node, target=segmentation, origin="b" * 64)
    assert names_of(segmentation) == ["core", "Ödem", "core 2", "Ödem 2", "core 3"]
    assert "The segment core was kept; the new one is called core 2." in first.warnings
    _, third = imported(scene, tmp_path, node, target=segmentation)
    assert third.segmentIds == first.segmentIds
    second.revert(segmentation)
    assert names_of(segmentation) == ["core", "Ödem", "core 2"]


def test_no_segment_is_compared_without_need(scene, tmp_path, monkeypatch):
    """Comparing means looking at all voxels: with thirty segments, each with each, that would be seconds."""
    node, looked = add_volume(scene, np.zeros(SHAPE, np.int16)), []
    real = NodeConversion._digest
    monkeypatch.setattr(NodeConversion, "_digest", lambda segment: looked.append(segment.GetName()) or real(segment))
    segmentation, _ = imported(scene, tmp_path, node)
    assert sorted(looked) == ["core", "Ödem"], "each once, when it is written"
    looked.clear()
    imported(scene, tmp_path, node, target=segmentation)
    assert sorted(looked) == ["core", "core", "Ödem", "Ödem"]


def test_a_segment_that_was_corrected_by_hand_is_kept(scene, tmp_path):
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    segmentation, first = imported(scene, tmp_path, node)
    segment = segmentation.GetSegmentation().GetSegment(first.segmentIds[1])
    image = segment.GetRepresentation(NodeConversion.BINARY_LABELMAP)
    voxels = vtk.util.numpy_support.vtk_to_numpy(image.GetPointData().GetScalars())
    voxels[:40] = segment.GetLabelValue()
    corrected = NodeConversion.segmentMask(segmentation, first.segmentIds[1])[0].copy()
    _, second = imported(scene, tmp_path, node, target=segmentation)
    assert names_of(segmentation) == ["Ödem", "core", "core 2"]
    assert "The segment core was edited after an earlier run and is kept as it is." in second.warnings
    assert np.array_equal(NodeConversion.segmentMask(segmentation, first.segmentIds[1])[0], corrected)


@pytest.mark.parametrize("transform", [MOVED, np.diag([2.0, 1.0, 1.0, 1.0]), "skew"], ids=["moved", "scaled", "skew"])
def test_a_chosen_segmentation_under_another_transform_keeps_its_own(scene, tmp_path, transform):
    if isinstance(transform, str):
        transform = np.eye(4)
        transform[0, 1] = 0.5
    shape = (24, 24, 24)
    labels = np.zeros(shape, np.uint8)
    labels[4:12, 6:18, 4:16] = 1
    labels[14:20, 4:16, 6:20] = 4
    node = add_volume(scene, np.zeros(shape, np.int16), MATRICES["oblique"])
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    other = add_transform(scene, transform)
    segmentation.SetAndObserveTransformNodeID(other.GetID())
    hand_made(segmentation, labels == 0, "mine", node)
    _, done = imported(scene, tmp_path, node, labels, segmentation)
    assert segmentation.GetParentTransformNode() is other
    for segment_id, value in zip(done.segmentIds, (1, 4), strict=True):
        expected = world_point(node, middle_of(labels, value))
        assert np.allclose(in_world(segmentation, segment_id), expected, atol=0.3)


def test_surfaces_follow_the_new_voxels(scene, tmp_path):
    node = add_volume(scene, np.zeros(SHAPE, np.int16))
    segmentation, _ = imported(scene, tmp_path, node)
    assert segmentation.CreateClosedSurfaceRepresentation()
    labels = np.zeros(SHAPE, np.uint8)
    labels[3:5, 4:7, 6:9] = 1
    _, done = imported(scene, tmp_path, node, labels, segmentation)
    bounds = segmentation.GetClosedSurfaceInternalRepresentation(done.segmentIds[0]).GetBounds()
    middle = np.array(bounds).reshape(3, 2).mean(axis=1)
    assert np.allclose(middle, world_point(node, middle_of(labels, 1)), atol=0.6)
    assert dice(labels == 1, NodeConversion.segmentMask(segmentation, done.segmentIds[0])[0]) == 1
