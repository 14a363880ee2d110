"""Volumes that do not lie on each other are noticed, explained in plain sentences, and aligned where that is right."""

from __future__ import annotations

import numpy as np
import pytest
import slicer
import vtk
from InvResSegmentLib import GeometryDoctor, NodeConversion
from InvResSegmentLib.GeometryDoctor import VolumeGeometry
from small_models import MATRICES, add_transform, add_volume, matrix, rotation

SIZE = (10, 8, 6)


def geometry(name, affine=None, size=SIZE, **fields):
    affine = matrix() if affine is None else affine
    return VolumeGeometry(name, size, affine, affine, **fields)


def compared(affine=None, size=SIZE, reference=None, **fields):
    findings = GeometryDoctor.compare(reference or geometry("T1"), [geometry("T2", affine, size, **fields)])
    assert all(finding.sentence.endswith(".") and "{" not in finding.sentence for finding in findings)
    return {finding.code: finding for finding in findings}


# ---------------------------------------------------------------- findings


def test_volumes_on_one_grid_are_fine():
    assert compared()["same"].severity == "ok"
    assert GeometryDoctor.compare(geometry("T1"), [])[0].severity == "ok"


def test_rounding_of_a_file_is_no_difference():
    near = matrix()
    near[:3, 3] += 4e-4
    assert set(compared(near)) == {"same"}


@pytest.mark.parametrize(
    "code, affine, size, words",
    [
        ("extent", None, (10, 8, 7), "T2 has 10 x 8 x 7 voxels, T1 has 10 x 8 x 6."),
        ("spacing", matrix(spacing=(1, 1, 2.5)), SIZE, "T2 has voxels of 1 x 1 x 2.5 mm, T1 of 1 x 1 x 1 mm."),
        ("axes", matrix(rotation(7)), SIZE, "turned by up to"),
        ("axes", matrix(np.diag([-1.0, -1.0, 1.0])), SIZE, "run in other directions than those of T1 (LPS / RAS)."),
        ("origin", matrix(origin=(-7.0, 24.0, 5.0)), SIZE, "The first voxel of T2 lies 5 mm from that of T1."),
    ],
)
def test_each_difference_has_its_sentence(code, affine, size, words):
    finding = compared(affine, size)[code]
    assert words in finding.sentence and finding.severity == "error" and finding.volume == "T2"


def test_a_tiny_spacing_error_is_found_by_where_the_far_corner_lies():
    found = compared(matrix(spacing=(1.00005, 1, 1)), (300, 8, 6), geometry("T1", size=(300, 8, 6)))
    assert "The voxels of T2 lie up to 0.015 mm from those of T1." in found["origin"].sentence


def test_overlap_is_measured():
    assert compared(matrix(origin=(200.0, 20.0, 5.0)))["overlap"].sentence == "T2 does not overlap T1 at all."
    half = compared(matrix(origin=(-2.0, 20.0, 5.0)))["overlap"]
    assert half.severity == "warning" and half.sentence == "T2 covers only 19 % of T1."
    assert "overlap" not in compared(matrix(spacing=(1, 1, 1.1)))
    assert GeometryDoctor.overlapFraction(SIZE, matrix(), SIZE, matrix(origin=(-5, 20, 5))) == pytest.approx(0.5)


def test_frames_of_reference_that_differ_are_a_warning_even_on_one_grid():
    reference = geometry("T1", frameOfReference="1.2.3")
    assert compared(reference=reference, frameOfReference="1.2.3")["same"]
    assert compared(reference=reference, frameOfReference="1.2.4")["frame_of_reference"].severity == "warning"


def test_parent_transforms_count(scene):
    first, second = (add_volume(scene, np.zeros(SIZE[::-1], np.int16), name=name) for name in ("T1", "T2"))
    transform = add_transform(scene, matrix(rotation(20), origin=(3, 0, 0)), "head moved")
    for node in (first, second):
        node.SetAndObserveTransformNodeID(transform.GetID())
    assert [finding.code for finding in GeometryDoctor.examine([first, second])] == ["same"]
    first.SetAndObserveTransformNodeID(None)
    found = {finding.code: finding for finding in GeometryDoctor.examine([first, second])}
    assert found["axes"].severity == "error"
    assert "T2 is under head moved, T1 under no transform" in found["transform"].sentence
    second.HardenTransform()
    assert "transform" not in {finding.code for finding in GeometryDoctor.examine([first, second])}


def test_the_same_place_in_the_world_through_different_transforms_is_the_same_grid(scene):
    moved = matrix(rotation(20), origin=(3, 0, 0))
    first = add_volume(scene, np.zeros(SIZE[::-1], np.int16), matrix())
    second = add_volume(scene, np.zeros(SIZE[::-1], np.int16), np.linalg.inv(moved) @ matrix())
    second.SetAndObserveTransformNodeID(add_transform(scene, moved).GetID())
    assert GeometryDoctor.sameGrid(*map(GeometryDoctor.describeGeometry, (first, second)))


# ---------------------------------------------------------------- alignment


def blob_array(shape, affine, centre):
    """A smooth ball around a point of the world."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)[..., ::-1]
    points = index @ affine[:3, :3].T + affine[:3, 3]
    return np.exp(-(((points - centre) / 6) ** 2).sum(-1)).astype(np.float32) * 1000


def centre_in_world(node):
    array = NodeConversion.volumeArray(node).astype(float)
    array[array < 0.2 * array.max()] = 0
    ijk = np.array([(index * array).sum() for index in np.indices(array.shape)])[::-1] / array.sum()
    between = NodeConversion.linearTransformBetween(node, None)
    return (between @ NodeConversion.volumeMatrix(node) @ [*ijk, 1])[:3]


@pytest.mark.parametrize("reference_affine", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("moved_side", ["volume", "reference", "both"])
def test_aligning_keeps_tissue_where_it_is_in_the_world(scene, reference_affine, moved_side):
    shape = (28, 30, 32)
    reference = add_volume(scene, np.zeros(shape, np.int16), reference_affine, "T1")
    volume_affine = matrix(rotation(11), (1.3, 1.1, 1.2))
    middle_of_reference = (reference_affine @ [16, 15, 14, 1])[:3]
    centre = volume_affine[:3, :3] @ np.array([16, 15, 14]) + volume_affine[:3, 3]
    volume_affine[:3, 3] += middle_of_reference - centre
    volume = add_volume(scene, blob_array(shape, volume_affine, middle_of_reference), volume_affine, "T2")
    moved = matrix(rotation(15, (1, 0, 1)), origin=(0, 0, 0))
    moved[:3, 3] = middle_of_reference - moved[:3, :3] @ middle_of_reference + (1, -2, 1)
    transform = add_transform(scene, moved)
    if moved_side != "reference":
        volume.SetAndObserveTransformNodeID(transform.GetID())
    if moved_side != "volume":
        reference.SetAndObserveTransformNodeID(transform.GetID())
    before = NodeConversion.volumeArray(volume).copy()
    where = centre_in_world(volume)
    aligned = GeometryDoctor.align(volume, reference)
    assert aligned.GetName() == "T2 on T1"
    assert aligned.GetParentTransformNode() is reference.GetParentTransformNode()
    assert GeometryDoctor.sameGrid(*map(GeometryDoctor.describeGeometry, (reference, aligned)))
    assert np.allclose(centre_in_world(aligned), where, atol=0.3)
    assert NodeConversion.volumeArray(aligned).max() > 900
    assert np.array_equal(NodeConversion.volumeArray(volume), before)
    assert aligned.GetAttribute(GeometryDoctor.ALIGNED_FROM) == "T2"
    assert aligned.GetNodeReference(GeometryDoctor.SOURCE_ROLE) is volume


def test_values_outside_are_the_smallest_and_the_type_stays(scene):
    reference = add_volume(scene, np.zeros((8, 8, 8), np.uint8), matrix(), "T1")
    ct = add_volume(scene, np.full((8, 8, 8), -1000, np.int16), matrix(origin=(-6, 20, 5)), "CT")
    NodeConversion.volumeArray(ct)[4:] = 50
    aligned = NodeConversion.volumeArray(GeometryDoctor.align(ct, reference))
    assert aligned.dtype == np.int16
    assert (aligned[:, :, :4] == -1000).all() and (aligned[5:, :, 5:] == 50).all()


def bent_transform(scene, displacement):
    """A grid transform whose displacement at x is `displacement(x)`."""
    node = scene.AddNewNodeByClass("vtkMRMLGridTransformNode", "bent")
    image = vtk.vtkImageData()
    image.SetDimensions(20, 20, 20)
    image.SetOrigin(-40, -40, -40)
    image.SetSpacing(5, 5, 5)
    image.AllocateScalars(vtk.VTK_DOUBLE, 3)
    points = np.array([image.GetPoint(index) for index in range(image.GetNumberOfPoints())])
    vtk.util.numpy_support.vtk_to_numpy(image.GetPointData().GetScalars())[:] = displacement(points)
    grid = slicer.vtkOrientedGridTransform()
    grid.SetDisplacementGridData(image)
    grid.SetInterpolationModeToLinear()
    node.SetAndObserveTransformToParent(grid)
    return node


def test_a_bent_volume_is_aligned_through_its_transform(scene):
    shape, centre = (20, 20, 20), (0.0, 30.0, 14.0)
    reference = add_volume(scene, np.zeros(shape, np.int16), matrix(), "T1")
    volume = add_volume(scene, blob_array(shape, matrix(), centre), matrix(), "T2")
    bent = bent_transform(scene, lambda points: np.c_[3 + 0 * points[:, 0], 0 * points[:, 0], 0 * points[:, 0]])
    volume.SetAndObserveTransformNodeID(bent.GetID())
    found = {finding.code for finding in GeometryDoctor.examine([reference, volume])}
    assert found == {"transform"}
    assert GeometryDoctor.canAlign(volume, reference).possible
    aligned = GeometryDoctor.align(volume, reference)
    assert np.allclose(centre_in_world(aligned), np.add(centre, (3, 0, 0)), atol=0.3)
    other = add_volume(scene, np.zeros(shape, np.int16), matrix(), "FLAIR")
    other.SetAndObserveTransformNodeID(bent.GetID())
    assert [finding.code for finding in GeometryDoctor.examine([volume, other])] == ["same"]


def test_what_cannot_be_aligned_says_why(scene):
    shape = (12, 12, 12)
    reference = add_volume(scene, np.zeros(shape, np.int16), matrix(), "T1")
    far = add_volume(scene, np.zeros(shape, np.int16), matrix(origin=(500, 0, 0)), "far")
    flat = add_volume(scene, np.zeros(shape, np.int16), matrix(), "flat")
    flat.SetAndObserveTransformNodeID(add_transform(scene, np.diag([1.0, 1.0, 0.0, 1.0])).GetID())
    folded = add_volume(scene, np.zeros(shape, np.int16), matrix(), "folded")
    fold = bent_transform(scene, lambda points: -2 * points)
    folded.SetAndObserveTransformNodeID(fold.GetID())
    for node, words in (
        (far, "far does not overlap T1; register them first"),
        (flat, "flat is under a transform that cannot be inverted"),
        (reference, "T1 is the reference itself"),
    ):
        check = GeometryDoctor.canAlign(node, reference)
        assert not check.possible and words in check.sentence
        count = scene.GetNumberOfNodes()
        with pytest.raises(NodeConversion.ConversionError, match=words):
            GeometryDoctor.align(node, reference)
        assert scene.GetNumberOfNodes() == count


def test_volumes_of_different_examinations_need_a_persons_word(scene):
    first, second = (add_volume(scene, np.zeros((8, 8, 8), np.int16), name=name) for name in ("T1", "T2"))
    assert not GeometryDoctor.canAlign(second, first).needsConsent
    check = GeometryDoctor.canAlign(second, first, ("1.2.3", "1.2.4"))
    assert check.possible and check.needsConsent and "different examinations" in check.sentence


def test_a_second_alignment_gets_a_name_of_its_own_and_the_first_original(scene):
    first, second = (add_volume(scene, np.zeros((8, 8, 8), np.int16), name=name) for name in ("T1", "T2"))
    once = GeometryDoctor.align(second, first)
    twice = GeometryDoctor.align(once, add_volume(scene, np.zeros((9, 9, 9), np.int16), name="PD"))
    again = GeometryDoctor.align(second, first)
    assert len({once.GetName(), again.GetName()}) == 2
    assert twice.GetAttribute(GeometryDoctor.ALIGNED_FROM) == "T2"
