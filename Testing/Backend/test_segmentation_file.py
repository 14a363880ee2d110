"""Slicer's own reader finds names, colours, terminology and voxels in our files, and we find them in Slicer's."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from invres import InvresError
from invres.config import Label, LabelScheme
from invres.events import Recorder
from invres.segmentation_file import DEFAULT_TERMINOLOGY, PALETTE
from invres.sides import Side, sided_scheme
from invres.volume import Geometry, Volume, read_geometry, read_volume, write_segmentation

COSINE, SINE = np.cos(0.4), np.sin(0.4)
TURN = np.array([[COSINE, -SINE, 0], [SINE, COSINE, 0], [0, 0, 1]])
CANONICAL = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]])
DIRECTIONS = {
    "canonical": CANONICAL,
    "flipped": CANONICAL * [-1, 1, -1],
    "sagittal": CANONICAL[:, [2, 0, 1]],
    "oblique": TURN @ CANONICAL,
    "oblique and mirrored": TURN @ CANONICAL * [1, 1, -1],
}
BRAIN = (
    "Segmentation category and type - 3D Slicer General Anatomy list~SCT^123037004^Anatomical Structure"
    "~SCT^12738006^Brain~^^~Anatomic codes - DICOM master list~^^~^^"
)
SCHEME = LabelScheme(
    (
        Label("white matter", (1,), 1, (255, 128, 3), BRAIN),
        Label("Ödem 浮腫", (4,), 4),
        Label("never drawn", (250,), 250, (0, 0, 0)),
    )
)


def label_volume(direction="oblique"):
    geometry = Geometry((5, 7, 9), (3.0, 1.25, 0.75), (-31.5, 12.25, 70.125), DIRECTIONS[direction])
    array = np.zeros(geometry.shape, np.uint8)
    array[1:4, 2:5, 3:8] = 1
    array[2, 3:6, 1:5] = 4
    return Volume(array, geometry)


# ---------------------------------------------------------------- without Slicer


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("ending", [".seg.nrrd", ".nii.gz", ".mha", ".nrrd"])
def test_a_segmentation_comes_back_on_its_own_grid(tmp_path, ending, direction):
    volume = label_volume(direction)
    write_segmentation(tmp_path / f"a{ending}", volume, SCHEME)
    report = Recorder()
    again = read_volume(tmp_path / f"a{ending}", kind="labels", report=report)
    assert np.array_equal(again.array, volume.array) and again.array.dtype == np.uint8
    assert again.geometry.difference(volume.geometry) == "" and report.events == []


def test_labels_without_colour_or_terminology_get_the_defaults(tmp_path):
    write_segmentation(tmp_path / "a.seg.nrrd", label_volume(), SCHEME)
    image = sitk.ReadImage(str(tmp_path / "a.seg.nrrd"))
    assert image.GetMetaData("Segment1_Tags") == f"TerminologyEntry:{DEFAULT_TERMINOLOGY}|"
    colour = [float(part) for part in image.GetMetaData("Segment1_Color").split()]
    assert np.allclose(colour, np.array(PALETTE[1]) / 255, atol=1e-5)
    assert len(set(PALETTE)) == len(PALETTE)


@pytest.mark.parametrize("value", [255, 300, 40000, 70000])
def test_large_label_values_are_kept(tmp_path, value):
    volume = label_volume()
    volume = Volume(np.where(volume.array == 4, value, 0).astype(np.int32), volume.geometry)
    write_segmentation(tmp_path / "a.seg.nrrd", volume, LabelScheme((Label("a", (1,), value),)))
    assert np.array_equal(read_volume(tmp_path / "a.seg.nrrd", kind="labels").array, volume.array)


def test_a_value_that_no_label_has_is_refused(tmp_path):
    with pytest.raises(InvresError, match="has the value 4, but its labels have 0, 1"):
        write_segmentation(tmp_path / "a.seg.nrrd", label_volume(), LabelScheme((Label("a", (1,), 1),)))
    assert list(tmp_path.iterdir()) == []


def layered_file(path, layers, segments, **fields):
    """A file with layers as the list axis, as Slicer writes overlapping segments: segments = (layer, value, name)."""
    image = sitk.GetImageFromArray(np.stack(layers, axis=-1), isVector=True)
    for index, (layer, value, name) in enumerate(segments):
        image.SetMetaData(f"Segment{index}_ID", f"S{index}")
        image.SetMetaData(f"Segment{index}_Name", name)
        if value is not None:
            image.SetMetaData(f"Segment{index}_Layer", str(layer))
            image.SetMetaData(f"Segment{index}_LabelValue", str(value))
    for key, value in fields.items():
        image.SetMetaData(key, value)
    sitk.WriteImage(image, str(path))


def two_layers():
    first, second = np.zeros((2, 5, 7, 9), np.uint8)
    first[1:3, 1:4, 1:4], first[4] = 1, 2
    second[2:4, 2:5, 2:5] = 1
    return first, second


def test_layers_with_equal_values_are_renumbered_in_order_and_that_is_said(tmp_path):
    first, second = two_layers()
    layered_file(tmp_path / "a.seg.nrrd", (first, second), [(0, 1, "left"), (1, 1, "right"), (0, 2, "base")])
    report = Recorder()
    labels = read_volume(tmp_path / "a.seg.nrrd", kind="labels", report=report).array
    expected = np.where(first == 1, 1, 0)
    expected[second == 1] = 2
    expected[first == 2] = 3
    assert np.array_equal(labels, expected)
    sentences = " ".join(event["message"] for event in report.events)
    assert "1 = left, 2 = right, 3 = base" in sentences
    assert f"{np.count_nonzero((first == 1) & (second == 1))} voxels belong to more than one segment" in sentences


def test_layers_with_different_values_keep_them(tmp_path):
    first, second = two_layers()
    second *= 7
    layered_file(tmp_path / "a.seg.nrrd", (first, second), [(0, 1, "a"), (0, 2, "b"), (1, 7, "c")])
    labels = read_volume(tmp_path / "a.seg.nrrd", kind="labels").array
    assert set(np.unique(labels)) == {0, 1, 2, 7} and (labels[second == 7] == 7).all()


def test_old_files_with_one_layer_per_segment_are_read(tmp_path):
    first, second = two_layers()
    layered_file(tmp_path / "a.seg.nrrd", (first % 2, second), [(0, None, "a"), (1, None, "b")])
    labels = read_volume(tmp_path / "a.seg.nrrd", kind="labels").array
    assert (labels[second == 1] == 2).all() and set(np.unique(labels)) == {0, 1, 2}


def test_a_segment_in_a_layer_that_is_not_there_is_refused(tmp_path):
    layered_file(tmp_path / "a.seg.nrrd", two_layers(), [(0, 1, "a"), (5, 1, "b")])
    with pytest.raises(InvresError, match="names a layer that it does not hold"):
        read_volume(tmp_path / "a.seg.nrrd", kind="labels")


OTHER_GRID = "Reference image geometry|2;0;0;0;0;2;0;0;0;0;2;0;0;0;0;1;0;9;0;9;0;9;|&"


@pytest.mark.parametrize("broken", ["", "Reference image geometry|", "Reference image geometry|1;2;x;|&", OTHER_GRID])
def test_a_broken_reference_geometry_leaves_the_files_own_grid(tmp_path, broken):
    layered_file(
        tmp_path / "a.seg.nrrd", two_layers(), [(0, 1, "a"), (1, 1, "b")], Segmentation_ConversionParameters=broken
    )
    assert read_volume(tmp_path / "a.seg.nrrd", kind="labels").array.shape == (5, 7, 9)


# ---------------------------------------------------------------- with Slicer's own code


@pytest.fixture(scope="module")
def slicer():
    return pytest.importorskip("slicer", reason="slicer-core is not installed: pip install slicer-core")


@pytest.fixture
def scene(slicer):
    scene = slicer.vtkMRMLScene()
    yield scene
    scene.Clear(1)


def slicer_reads(slicer, scene, path):
    node = slicer.vtkMRMLSegmentationNode()
    scene.AddNode(node)
    storage = slicer.vtkMRMLSegmentationStorageNode()
    scene.AddNode(storage)
    storage.SetFileName(str(path))
    assert storage.ReadData(node)
    return node


def labelmap_of(slicer, node, segment_id):
    """The segment's 0/1 voxels in its own extent, with the 4x4 (k, j, i, 1) -> RAS of that extent."""
    vtk = pytest.importorskip("vtk")
    from vtk.util.numpy_support import vtk_to_numpy

    image = slicer.vtkOrientedImageData()
    node.GetBinaryLabelmapRepresentation(segment_id, image)
    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    affine = np.array([[matrix.GetElement(i, j) for j in range(4)] for i in range(4)])
    array = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(image.GetDimensions()[::-1])
    affine[:3, 3] += affine[:3, :3] @ np.array(image.GetExtent()[::2])
    return array, affine[:, [2, 1, 0, 3]]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_slicer_reads_names_colours_terminology_and_voxels(slicer, scene, tmp_path, direction):
    volume = label_volume(direction)
    write_segmentation(tmp_path / "Läsion.seg.nrrd", volume, SCHEME)
    node = slicer_reads(slicer, scene, tmp_path / "Läsion.seg.nrrd")
    segmentation = node.GetSegmentation()
    assert segmentation.GetNumberOfSegments() == len(SCHEME.labels)
    assert segmentation.GetSourceRepresentationName() == "Binary labelmap"
    for index, label in enumerate(SCHEME.labels):
        segment_id = segmentation.GetNthSegmentID(index)
        segment = segmentation.GetSegment(segment_id)
        assert segment.GetName() == label.name and segment.GetLabelValue() == label.output_value
        assert np.allclose(segment.GetColor(), np.array(label.colour or PALETTE[index]) / 255, atol=1e-5)
        assert segment.GetTerminology().startswith(label.terminology or DEFAULT_TERMINOLOGY)
        array, affine = labelmap_of(slicer, node, segment_id)
        drawn = np.argwhere(array) if array.any() else np.empty((0, 3))
        expected = np.argwhere(volume.array == label.output_value)
        assert len(drawn) == len(expected)
        world = np.c_[drawn, np.ones(len(drawn))] @ affine.T
        assert np.allclose(world, np.c_[expected, np.ones(len(expected))] @ volume.geometry.affine.T, atol=1e-6)


def test_slicer_reads_the_side_of_a_label_that_was_divided(slicer):
    term = (
        "Segmentation category and type - DICOM master list~SCT^123037004^Anatomical Structure~SCT^5366008^Hippocampus"
    )
    term += "~^^~Anatomic codes - DICOM master list~^^~^^"
    scheme = LabelScheme((Label("hippocampus", (17, 53), 17, terminology=term),))
    for label, word in zip(sided_scheme(scheme, [Side("hippocampus", 17, 53)]).labels, ("Left", "Right"), strict=True):
        entry = slicer.vtkSlicerTerminologyEntry()
        assert slicer.vtkSlicerTerminologiesModuleLogic().DeserializeTerminologyEntry(label.terminology, entry)
        assert entry.GetTypeObject().GetCodeMeaning() == "Hippocampus"
        assert entry.GetTypeModifierObject().GetCodeMeaning() == word


REGIONS = LabelScheme((Label("whole", (1, 2, 4), 2), Label("core", (1, 4), 1), Label("hot", (4,), 4)), regions=True)


def nested():
    """A label map of regions: the whole around the core around the hot spot."""
    volume = label_volume()
    array = np.zeros(volume.array.shape, np.uint8)
    array[1:4, 1:6, 1:7], array[1:4, 2:5, 2:6], array[2, 3, 3:5] = 2, 1, 4
    return Volume(array, volume.geometry)


def test_regions_overlap_in_layers_of_their_own(tmp_path):
    volume = nested()
    write_segmentation(tmp_path / "a.seg.nrrd", volume, REGIONS)
    write_segmentation(tmp_path / "a.nii.gz", volume, REGIONS)
    for name in ("a.seg.nrrd", "a.nii.gz"):
        assert np.array_equal(read_volume(tmp_path / name, kind="labels").array, volume.array)
    header = (tmp_path / "a.seg.nrrd").read_bytes().split(b"\n\n")[0].decode()
    assert "kinds: list domain domain domain" in header and "sizes: 3 " in header


def test_slicer_reads_regions_with_all_that_they_hold(slicer, scene, tmp_path):
    volume = nested()
    write_segmentation(tmp_path / "a.seg.nrrd", volume, REGIONS)
    node = slicer_reads(slicer, scene, tmp_path / "a.seg.nrrd")
    segmentation = node.GetSegmentation()
    for index, label in enumerate(REGIONS.labels):
        segment_id = segmentation.GetNthSegmentID(index)
        assert segmentation.GetSegment(segment_id).GetName() == label.name
        array, affine = labelmap_of(slicer, node, segment_id)
        drawn, expected = np.argwhere(array), np.argwhere(np.isin(volume.array, label.values))
        assert len(drawn) == len(expected) > 0
        world = np.c_[drawn, np.ones(len(drawn))] @ affine.T
        assert np.allclose(world, np.c_[expected, np.ones(len(expected))] @ volume.geometry.affine.T, atol=1e-6)


def test_slicer_takes_the_reference_geometry(slicer, scene, tmp_path):
    volume = label_volume()
    write_segmentation(tmp_path / "a.seg.nrrd", volume, SCHEME)
    node = slicer_reads(slicer, scene, tmp_path / "a.seg.nrrd")
    converter = slicer.vtkSegmentationConverter
    image = slicer.vtkOrientedImageData()
    text = node.GetSegmentation().GetConversionParameter(converter.GetReferenceImageGeometryParameterName())
    assert converter.DeserializeImageGeometry(text, image, False)
    assert image.GetDimensions() == volume.geometry.shape[::-1]
    assert np.allclose(image.GetSpacing(), volume.geometry.spacing_mm[::-1])
    assert np.allclose(image.GetOrigin(), volume.geometry.origin_mm)


def slicer_writes(slicer, scene, path, volume, masks, *, crop, reference=True):
    """A segmentation drawn in Slicer on `volume`'s grid, saved by Slicer; overlapping masks make layers."""
    vtk = pytest.importorskip("vtk")
    from vtk.util.numpy_support import numpy_to_vtk

    def oriented(array):
        image = slicer.vtkOrientedImageData()
        image.SetDimensions(array.shape[::-1])
        image.GetPointData().SetScalars(numpy_to_vtk(array.ravel().astype(np.uint8), deep=1))
        matrix = vtk.vtkMatrix4x4()
        affine = volume.geometry.affine[:, [2, 1, 0, 3]]
        for i in range(4):
            for j in range(4):
                matrix.SetElement(i, j, float(affine[i, j]))
        image.SetGeometryFromImageToWorldMatrix(matrix)
        return image

    node = slicer.vtkMRMLSegmentationNode()
    scene.AddNode(node)
    if reference:
        converter = slicer.vtkSegmentationConverter
        text = converter.SerializeImageGeometry(oriented(volume.array))
        node.GetSegmentation().SetConversionParameter(converter.GetReferenceImageGeometryParameterName(), text)
    for index, mask in enumerate(masks):
        node.AddSegmentFromBinaryLabelmapRepresentation(oriented(mask), f"segment {index}", [1.0, 0.5, 0.2])
    node.GetSegmentation().CollapseBinaryLabelmaps(False)
    storage = slicer.vtkMRMLSegmentationStorageNode()
    scene.AddNode(storage)
    storage.SetCropToMinimumExtent(crop)
    storage.SetFileName(str(path))
    assert storage.WriteData(node)


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("direction", ["flipped", "oblique and mirrored"])
def test_what_slicer_writes_comes_back_on_the_grid_of_its_image(slicer, scene, tmp_path, direction, overlapping, crop):
    volume = label_volume(direction)
    masks = [np.zeros(volume.array.shape, bool) for _ in range(3)]
    masks[0][1:4, 2:5, 3:8] = True
    masks[1][2:5, 3:6, 5:8] = overlapping
    masks[1][0, 1, 1] = True
    masks[2][4, 6, 1] = True
    slicer_writes(slicer, scene, tmp_path / "a.seg.nrrd", volume, masks, crop=crop)
    report = Recorder()
    again = read_volume(tmp_path / "a.seg.nrrd", kind="labels", report=report)
    assert again.geometry.difference(volume.geometry) == ""
    assert read_geometry(tmp_path / "a.seg.nrrd").same_as(again.geometry)
    expected = np.zeros(volume.array.shape, int)
    for index, mask in enumerate(masks):
        expected[mask] = index + 1
    assert np.array_equal(again.array, expected)
    assert any("more than one segment" in event["message"] for event in report.events) == overlapping


def test_a_slicer_file_without_a_reference_keeps_its_place(slicer, scene, tmp_path):
    volume = label_volume()
    slicer_writes(slicer, scene, tmp_path / "a.seg.nrrd", volume, [volume.array == 1], crop=True, reference=False)
    again = read_volume(tmp_path / "a.seg.nrrd", kind="labels")
    assert again.array.shape == (3, 3, 5) and (again.array == 1).sum() == (volume.array == 1).sum()
    assert np.allclose(again.geometry.origin_mm, (volume.geometry.affine @ [1, 2, 3, 1])[:3], atol=1e-6)
