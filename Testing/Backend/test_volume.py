"""Volumes come back from every format on their own grid; bad files are refused in one plain sentence."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

import invres
from invres import InvresError
from invres.events import Recorder
from invres.volume import Geometry, Volume, read_channels, read_geometry, read_volume, resample, write_volume

SHAPE, SPACING = (5, 7, 9), (3.0, 1.25, 0.75)


def rotation(z_degrees, x_degrees=0.0):
    z, x = np.deg2rad([z_degrees, x_degrees])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    return about_z @ about_x


CANONICAL = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]])
DIRECTIONS = {
    "canonical": CANONICAL,
    "flipped": CANONICAL * [-1, 1, -1],
    "lps": CANONICAL * [1, -1, -1],
    "sagittal": CANONICAL[:, [2, 0, 1]] * [1, -1, 1],
    "oblique": rotation(25, 14) @ CANONICAL,
    "oblique and mirrored": rotation(-160, 40) @ CANONICAL * [1, 1, -1],
}


def make_volume(direction="oblique", dtype=np.int16, shape=SHAPE):
    array = np.random.default_rng(3).integers(0, 200, shape).astype(dtype)
    return Volume(array, Geometry(shape, SPACING, (-31.5, 12.25, 70.125), DIRECTIONS[direction]))


def sitk_of(volume):
    """The reference conversion, written out by hand: array index (k, j, i) -> LPS."""
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.geometry.spacing_mm[::-1])
    lps = np.diag([-1, -1, 1]) @ volume.geometry.direction[:, ::-1]
    image.SetDirection(lps.ravel().tolist())
    r, a, s = volume.geometry.origin_mm
    image.SetOrigin((-r, -a, s))
    return image


def warnings_of(report):
    return [event["message"] for event in report.events if event["event"] == "warning"]


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_affine_maps_every_voxel_where_simpleitk_puts_it(direction):
    volume = make_volume(direction)
    x, y, z = sitk_of(volume).TransformIndexToPhysicalPoint((7, 4, 2))
    assert np.allclose(volume.geometry.affine @ [2, 4, 7, 1], [-x, -y, z, 1])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_canonical_keeps_every_voxel_at_its_place_and_faces_superior_anterior_right(direction):
    volume = make_volume(direction)
    canonical = volume.canonical()
    assert (np.diag(canonical.geometry.direction[::-1]) > 0.6).all()
    assert canonical.geometry.same_as(volume.geometry.canonical())
    index = np.linalg.solve(canonical.geometry.affine, volume.geometry.affine @ [2, 4, 7, 1])
    assert np.allclose(index, np.round(index))
    assert canonical.array[tuple(np.round(index[:3]).astype(int))] == volume.array[2, 4, 7]
    assert sorted(canonical.array.ravel()) == sorted(volume.array.ravel())


def test_a_canonical_volume_is_left_as_it_is():
    volume = make_volume("canonical")
    assert np.array_equal(volume.canonical().array, volume.array)
    assert volume.canonical().geometry.same_as(volume.geometry, tolerance_mm=1e-9)


def test_a_crop_starts_where_its_first_voxel_was():
    geometry = make_volume().geometry
    box = (slice(1, 4), slice(None), slice(3, 8))
    cropped = geometry.crop(box)
    assert cropped.shape == np.empty(SHAPE)[box].shape == (3, 7, 5)
    assert np.allclose(cropped.affine @ [0, 0, 0, 1], geometry.affine @ [1, 0, 3, 1])


def test_another_spacing_keeps_field_of_view_and_centre():
    geometry = make_volume().geometry
    finer = geometry.with_spacing((1.0, 1.0, 1.0))
    assert finer.shape == (15, 9, 7)
    middles = [g.affine @ [*((np.array(g.shape) - 1) / 2), 1] for g in (geometry, finer)]
    assert np.allclose(*middles)
    assert geometry.with_spacing((100, 100, 100)).shape == (1, 1, 1)


def test_a_difference_is_said_in_plain_words():
    geometry = Geometry((5, 6, 7), (1, 1, 1), (0, 0, 0), CANONICAL)
    assert geometry.difference(geometry) == ""
    assert geometry.difference(Geometry((5, 6, 7), (1, 1, 2), (0, 0, 0), CANONICAL)) == (
        "spacing 1x1x1 mm against 1x1x2 mm"
    )
    larger = Geometry((5, 6, 8), (1, 1, 1), (0, 0, 0), CANONICAL)
    assert geometry.difference(larger) == "size 5x6x7 against 5x6x8 voxels"
    assert "origin 3 mm apart" in geometry.difference(Geometry((5, 6, 7), (1, 1, 1), (0, 3, 0), CANONICAL))
    turned = Geometry((5, 6, 7), (1, 1, 1), (0, 0, 0), rotation(10) @ CANONICAL)
    assert "turned by up to 10 degrees" in geometry.difference(turned)


def test_grids_within_the_tolerance_are_the_same_and_others_are_not():
    geometry = make_volume().geometry
    near = Geometry(SHAPE, SPACING, np.add(geometry.origin_mm, 5e-4), geometry.direction)
    assert geometry.same_as(near) and not geometry.same_as(near, tolerance_mm=1e-4)
    assert not geometry.same_as(make_volume("canonical").geometry)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_a_volume_comes_back_on_its_own_grid(tmp_path, ending, direction):
    volume = make_volume(direction)
    write_volume(tmp_path / f"a{ending}", volume)
    again = read_volume(tmp_path / f"a{ending}")
    assert np.array_equal(again.array, volume.array) and again.array.dtype == volume.array.dtype
    assert again.geometry.difference(volume.geometry) == ""
    assert read_geometry(tmp_path / f"a{ending}").same_as(again.geometry, tolerance_mm=1e-9)
    assert [entry.name for entry in tmp_path.iterdir()] == [f"a{ending}"]


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha", ".nhdr", ".mhd", ".img"])
def test_a_file_of_other_software_lies_where_that_software_put_it(tmp_path, ending):
    volume = make_volume()
    sitk.WriteImage(sitk_of(volume), str(tmp_path / f"a{ending}"))
    again = read_volume(tmp_path / f"a{ending}")
    assert np.array_equal(again.array, volume.array)
    assert again.geometry.difference(volume.geometry) == ""


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nibabel_sees_the_same_world_position(tmp_path, direction):
    nibabel = pytest.importorskip("nibabel")
    volume = make_volume(direction)
    write_volume(tmp_path / "a.nii.gz", volume)
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert np.allclose(image.affine @ [7, 4, 2, 1], volume.geometry.affine @ [2, 4, 7, 1], atol=1e-4)
    assert image.get_fdata()[7, 4, 2] == volume.array[2, 4, 7]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.float16, np.float32, np.float64])
def test_every_kind_of_number_is_written(tmp_path, dtype):
    volume = make_volume(dtype=dtype)
    write_volume(tmp_path / "a.nii.gz", volume)
    assert np.array_equal(read_volume(tmp_path / "a.nii.gz").array, volume.array)


def test_an_analyze_pair_without_orientation_is_read(tmp_path):
    sitk.WriteImage(sitk_of(make_volume("canonical")), str(tmp_path / "a.img"))
    raw = bytearray((tmp_path / "a.hdr").read_bytes())
    raw[252:348] = bytes(96)  # Analyze 7.5: no sform, no qform, no magic
    (tmp_path / "a.hdr").write_bytes(raw)
    for name in ("a.img", "a.hdr"):
        volume = read_volume(tmp_path / name)
        assert np.allclose(volume.geometry.spacing_mm, SPACING)
        assert np.array_equal(volume.array, make_volume("canonical").array)


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1)])
def test_a_nifti_that_does_not_say_how_it_lies_is_read_with_a_warning(tmp_path, codes):
    write_volume(tmp_path / "a.nii", make_volume("canonical"))
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<2h", raw, 252, *codes)
    (tmp_path / "a.nii").write_bytes(raw)
    report = Recorder()
    volume = read_volume(tmp_path / "a.nii", report=report)
    assert np.allclose(volume.geometry.spacing_mm, SPACING)
    told = [sentence for sentence in warnings_of(report) if "left and right may be exchanged" in sentence]
    assert len(told) == (codes == (0, 0))


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (0.5, -3), (2, 0), (float("nan"), 0)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_scaled_nifti_values_are_those_that_itk_reads(tmp_path, slope, intercept, dtype):
    write_volume(tmp_path / "a.nii", make_volume(dtype=dtype))
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<2f", raw, 112, slope, intercept)
    (tmp_path / "a.nii").write_bytes(raw)
    image = read_volume(tmp_path / "a.nii").array
    assert np.allclose(image, sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii"))))


def test_a_nifti_slope_of_zero_means_no_scaling_as_the_standard_says(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    write_volume(tmp_path / "a.nii", make_volume())
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<2f", raw, 112, 0, 5)
    (tmp_path / "a.nii").write_bytes(raw)
    assert np.array_equal(read_volume(tmp_path / "a.nii").array, make_volume().array)
    assert np.array_equal(nibabel.load(tmp_path / "a.nii").get_fdata().T, make_volume().array)


def test_a_big_endian_nifti_is_read(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    volume = make_volume(dtype=np.float32)
    affine = volume.geometry.affine[:, [2, 1, 0, 3]]
    header = nibabel.Nifti1Header(endianness=">")
    nibabel.save(nibabel.Nifti1Image(volume.array.T, affine, header), tmp_path / "a.nii.gz")
    again = read_volume(tmp_path / "a.nii.gz")
    assert np.array_equal(again.array, volume.array) and again.array.dtype.isnative
    assert again.geometry.difference(volume.geometry) == ""


def test_a_4d_file_gives_its_channels_in_order(tmp_path):
    volume = make_volume()
    images = [sitk_of(Volume(volume.array + n, volume.geometry)) for n in range(3)]
    sitk.WriteImage(sitk.JoinSeries(images), str(tmp_path / "a.nii.gz"))
    channels = read_channels(tmp_path / "a.nii.gz")
    assert [np.array_equal(c.array, volume.array + n) for n, c in enumerate(channels)] == [True] * 3
    assert all(c.geometry.difference(volume.geometry) == "" for c in channels)
    assert read_geometry(tmp_path / "a.nii.gz").difference(volume.geometry) == ""


def test_a_3d_file_and_a_4d_file_of_one_volume_give_one_channel(tmp_path):
    volume = make_volume()
    write_volume(tmp_path / "three.nrrd", volume)
    sitk.WriteImage(sitk.JoinSeries([sitk_of(volume)]), str(tmp_path / "four.nii"))
    for name in ("three.nrrd", "four.nii"):
        (channel,) = read_channels(tmp_path / name)
        assert np.array_equal(channel.array, volume.array)


def test_non_ascii_long_and_linked_paths_work(tmp_path):
    folder = tmp_path / "Müller 脳" / ("d" * 200) / ("e" * 200)
    volume = make_volume()
    write_volume(folder / ("f" * 240 + ".nii.gz"), volume)  # the folder is made
    link = tmp_path / "link.nii.gz"
    try:
        link.symlink_to(folder / ("f" * 240 + ".nii.gz"))
    except OSError:
        pytest.skip("links are not allowed here")
    assert np.array_equal(read_volume(link).array, volume.array)


def test_writing_over_a_file_replaces_it_whole(tmp_path):
    write_volume(tmp_path / "a.nrrd", make_volume(shape=(9, 9, 9)))
    write_volume(tmp_path / "a.nrrd", make_volume(), compress=False)
    assert read_volume(tmp_path / "a.nrrd").array.shape == SHAPE


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("values", "dtype"), [((0, 3), np.uint8), ((0, 300), np.uint16), ((-1, 3), np.int16), ((-1, 70000), np.int32)]
)
@pytest.mark.parametrize("stored", [np.float32, np.int32])
def test_labels_are_whole_numbers_in_the_smallest_type(tmp_path, values, dtype, stored):
    volume = make_volume(dtype=stored)
    volume.array[:] = values[0]
    volume.array[1:3] = values[1]
    write_volume(tmp_path / "a.nii.gz", volume)
    labels = read_volume(tmp_path / "a.nii.gz", kind="labels").array
    assert labels.dtype == dtype and np.array_equal(labels, volume.array)


@pytest.mark.parametrize("odd", [1.5, np.nan, np.inf])
def test_labels_with_fractions_are_refused(tmp_path, odd):
    volume = make_volume(dtype=np.float32)
    volume.array[2, 3, 4] = odd
    write_volume(tmp_path / "a.nii", volume)
    with pytest.raises(InvresError, match="no label map: labels are whole numbers"):
        read_volume(tmp_path / "a.nii", kind="labels")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_nan_and_infinity_in_an_image_are_counted_located_and_replaced(tmp_path, ending):
    volume = make_volume(dtype=np.float32)
    volume.array[1, 2, 3], volume.array[3, 2, 6], volume.array[0, 0, 0] = np.nan, np.inf, -7
    write_volume(tmp_path / f"a{ending}", volume)
    report = Recorder()
    array = read_volume(tmp_path / f"a{ending}", report=report).array
    assert array[1, 2, 3] == array[3, 2, 6] == -7
    (sentence,) = warnings_of(report)
    assert "2 voxels" in sentence and "k 1 to 3, j 2 to 2, i 3 to 6" in sentence and "-7" in sentence


# ---------------------------------------------------------------- headers that need repair


def with_sform(path, matrix, *, qform_code=0):
    """Overwrites the sform (x, y, z -> RAS) of an uncompressed NIfTI file."""
    raw = bytearray(path.read_bytes())
    struct.pack_into("<2h", raw, 252, qform_code, 1)
    struct.pack_into("<12f", raw, 280, *np.asarray(matrix, dtype=float)[:3].ravel())
    path.write_bytes(raw)


def sheared_file(path, tangent):
    volume = make_volume("canonical")
    write_volume(path, volume)
    matrix = volume.geometry.affine[:, [2, 1, 0, 3]]
    matrix[0, 1] += tangent * matrix[1, 1]
    with_sform(path, matrix)
    return volume, matrix


@pytest.mark.parametrize(("tangent", "strong"), [(0.01, False), (0.3, True)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_sheared_nifti_is_turned_to_right_angles_and_that_is_said(tmp_path, tangent, strong, packed):
    path = tmp_path / "a.nii"
    volume, matrix = sheared_file(path, tangent)
    if packed:
        (tmp_path / "a.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "a.nii.gz"
    before = path.read_bytes()
    report = Recorder()
    again = read_volume(path, report=report)
    assert np.array_equal(again.array, volume.array)
    assert np.allclose(again.geometry.direction.T @ again.geometry.direction, np.eye(3), atol=1e-12)
    middle = (np.array(SHAPE) - 1) / 2
    assert np.allclose(again.geometry.affine @ [*middle, 1], matrix @ [*middle[::-1], 1], atol=1e-4)
    (sentence,) = warnings_of(report)
    assert "degrees" in sentence and "mm" in sentence and ("strongly sheared" in sentence) == strong
    assert f"{np.degrees(np.arctan(tangent)):.2g} degrees" in sentence
    assert read_geometry(path).same_as(again.geometry)
    assert path.read_bytes() == before


def test_a_sheared_analyze_style_pair_is_read_too(tmp_path):
    volume = make_volume("canonical")
    sitk.WriteImage(sitk_of(volume), str(tmp_path / "a.img"))
    matrix = volume.geometry.affine[:, [2, 1, 0, 3]]
    matrix[0, 1] += 0.02
    with_sform(tmp_path / "a.hdr", matrix)
    assert np.array_equal(read_volume(tmp_path / "a.img").array, volume.array)


def test_a_sheared_metaimage_is_turned_to_right_angles(tmp_path):
    write_volume(tmp_path / "a.mha", make_volume("lps"), compress=False)
    raw = (tmp_path / "a.mha").read_bytes()
    assert b"TransformMatrix = " in raw
    start = raw.index(b"TransformMatrix = ")
    end = raw.index(b"\n", start)
    (tmp_path / "a.mha").write_bytes(raw[:start] + b"TransformMatrix = 1 0 0 0.05 1 0 0 0 1" + raw[end:])
    report = Recorder()
    direction = read_volume(tmp_path / "a.mha", report=report).geometry.direction
    assert np.allclose(direction.T @ direction, np.eye(3), atol=1e-12)
    assert "degrees" in warnings_of(report)[0]


def test_rounding_noise_in_a_header_is_repaired_without_a_word(tmp_path):
    sheared_file(tmp_path / "a.nii", 1e-4)
    report = Recorder()
    read_volume(tmp_path / "a.nii", report=report)
    assert warnings_of(report) == []


@pytest.mark.parametrize("qform_code", [0, 1])
def test_an_sform_whose_scale_differs_from_pixdim_decides_and_that_is_said(tmp_path, qform_code):
    volume = make_volume("canonical")
    write_volume(tmp_path / "a.nii", volume)
    matrix = volume.geometry.affine[:, [2, 1, 0, 3]] @ np.diag([2, 2, 2, 1])
    with_sform(tmp_path / "a.nii", matrix, qform_code=qform_code)
    report = Recorder()
    geometry = read_volume(tmp_path / "a.nii", report=report).geometry
    if qform_code:  # the qform is whole and ITK, hence Slicer, takes it
        assert np.allclose(geometry.spacing_mm, SPACING)
        assert "sform and qform put its voxels up to" in warnings_of(report)[0]
    else:
        assert np.allclose(geometry.affine[:, [2, 1, 0, 3]], matrix, atol=1e-4)
        assert "sform" in warnings_of(report)[0]


@pytest.mark.parametrize(("unit", "millimetres"), [(0, 1.0), (1, 1000.0), (2, 1.0), (3, 0.001), (3 + 8, 0.001)])
def test_lengths_in_metres_and_micrometres_are_read_as_such(tmp_path, unit, millimetres):
    volume = make_volume()
    write_volume(tmp_path / "a.nii", volume)
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[123] = unit
    (tmp_path / "a.nii").write_bytes(raw)
    report = Recorder()
    found = read_volume(tmp_path / "a.nii", report=report)
    assert np.allclose(found.geometry.spacing_mm, np.array(SPACING) * millimetres) and warnings_of(report) == []
    assert np.allclose(found.geometry.origin_mm, np.array(volume.geometry.origin_mm) * millimetres, rtol=1e-4)
    assert np.array_equal(found.array, volume.array)


@pytest.mark.parametrize("ending", [".nhdr", ".mhd"])
@pytest.mark.parametrize("name", ["größe", "Åse", "脳"])
def test_headers_with_voxels_beside_them_may_have_any_name(tmp_path, ending, name):
    volume = make_volume()
    sitk.WriteImage(sitk_of(volume), str(tmp_path / f"{name}{ending}"))
    assert np.array_equal(read_volume(tmp_path / f"{name}{ending}").array, volume.array)


# ---------------------------------------------------------------- bad input


def test_nifti_2_is_called_by_its_name(tmp_path):
    (tmp_path / "a.nii").write_bytes(struct.pack("<i4s", 540, b"n+2\0") + bytes(600))
    assert "NIfTI-1" in refused(tmp_path / "a.nii", "is NIfTI-2").hint


def test_bits_that_contradict_the_type_are_damage(tmp_path):
    write_volume(tmp_path / "a.nii", make_volume())
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<h", raw, 72, 8)
    (tmp_path / "a.nii").write_bytes(raw)
    refused(tmp_path / "a.nii", "8 bits for a value of NIfTI type 4, which has 16")
    struct.pack_into("<h", raw, 72, 0)  # as some writers leave them
    (tmp_path / "a.nii").write_bytes(raw)
    assert np.array_equal(read_volume(tmp_path / "a.nii").array, make_volume().array)


def refused(path, pattern, **how):
    """The refusal is one sentence that names the file, for the header alone too where the header shows it."""
    with pytest.raises(InvresError, match=pattern) as caught:
        read_volume(path, **how)
    message = caught.value.message
    assert message.endswith(".") and "ITK" not in message and "\n" not in message
    return caught.value


def test_values_beyond_float32_are_set_like_infinite_ones(tmp_path):
    volume, report = make_volume(), Recorder()
    array = volume.array.astype(np.float64)
    array[1, 2, 3] = 1e39
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "a.nrrd"))
    found = read_volume(tmp_path / "a.nrrd", report=report).array
    assert (
        np.isfinite(found.astype(np.float32)).all() and found[1, 2, 3] == np.delete(array.ravel(), array.argmax()).min()
    )
    assert "1 voxels are NaN, infinite or beyond 3.4e38" in warnings_of(report)[0]


def test_a_missing_file_is_named(tmp_path):
    refused(tmp_path / "nothing.nii.gz", "There is no file .*nothing.nii.gz")


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.txt", "a"])
@pytest.mark.parametrize("content", [b"hello world\n" * 100, b""])
def test_a_text_or_empty_file_is_no_image(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "not an image" if content else "is empty")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha", "-raw.nrrd", "-raw.mha", ".img"])
@pytest.mark.parametrize("kept", [0.98, 0.5, 0.05])
def test_a_cut_short_file_is_refused(tmp_path, ending, kept):
    path = tmp_path / f"a{ending}"
    array = np.random.default_rng(0).integers(0, 1000, (31, 33, 35)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path), useCompression="raw" not in ending)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    refused(path, "damaged")


def test_a_compressed_file_with_a_flipped_byte_is_refused(tmp_path):
    write_volume(tmp_path / "a.nii.gz", make_volume(shape=(31, 33, 35)))
    raw = bytearray((tmp_path / "a.nii.gz").read_bytes())
    raw[len(raw) // 2] ^= 255
    (tmp_path / "a.nii.gz").write_bytes(raw)
    refused(tmp_path / "a.nii.gz", "damaged")


@pytest.mark.parametrize("name", ["a.png", "a.nii", "a.mha"])
def test_a_flat_image_is_refused(tmp_path, name):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((8, 9), np.uint8)), str(tmp_path / name))
    refused(tmp_path / name, r"flat \(2D\), but a 3D volume is wanted")


@pytest.mark.parametrize("kind", ["image", "labels"])
def test_a_4d_file_where_one_volume_is_wanted_says_how_many_it_has(tmp_path, kind):
    sitk.WriteImage(sitk.JoinSeries([sitk_of(make_volume())] * 4), str(tmp_path / "a.nii.gz"))
    assert "Split it" in refused(tmp_path / "a.nii.gz", "4D with 4 volumes of 9x7x5 voxels", kind=kind).hint


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_colour_and_vector_pixels_are_refused(tmp_path, ending, dtype):
    image = sitk.GetImageFromArray(np.zeros((5, 6, 7, 3), dtype), isVector=True)
    sitk.WriteImage(image, str(tmp_path / f"a{ending}"))
    refused(tmp_path / f"a{ending}", "3 values per voxel")
    with pytest.raises(InvresError, match="3 values per voxel"):
        read_channels(tmp_path / f"a{ending}")


def test_complex_values_are_refused(tmp_path):
    image = sitk.GetImageFromArray(np.zeros((5, 6, 7), np.complex64))
    sitk.WriteImage(image, str(tmp_path / "a.nii"))
    refused(tmp_path / "a.nii", "plain numbers are wanted")


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan")])
def test_a_voxel_size_that_is_not_above_zero_is_refused(tmp_path, size):
    write_volume(tmp_path / "a.nii", make_volume())
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<f", raw, 84, size)
    (tmp_path / "a.nii").write_bytes(raw)
    refused(tmp_path / "a.nii", "voxel size of .* must be above 0")


@pytest.mark.parametrize(
    ("ending", "old", "new"),
    [
        (".nrrd", b"(0.75,0,0)", b"(0,0,0)"),
        (".mha", b"ElementSpacing = 0.75", b"ElementSpacing = 0"),
        (".mha", b"ElementSpacing = 0.75", b"ElementSpacing = -1"),
    ],
)
def test_a_voxel_size_of_zero_is_refused_in_text_headers(tmp_path, ending, old, new):
    write_volume(tmp_path / f"a{ending}", make_volume("lps"), compress=False)
    raw = (tmp_path / f"a{ending}").read_bytes().replace(b"(0.75,-0,0)", b"(0.75,0,0)")
    assert old in raw
    (tmp_path / f"a{ending}").write_bytes(raw.replace(old, new))
    refused(tmp_path / f"a{ending}", "voxel size of .* must be above 0")


@pytest.mark.parametrize("packed", [False, True])
def test_a_nifti_header_that_claims_too_much_is_refused_before_it_is_believed(tmp_path, packed):
    write_volume(tmp_path / "a.nii", make_volume())
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<4h", raw, 40, 3, 30000, 30000, 30000)
    path = tmp_path / ("a.nii.gz" if packed else "a.nii")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    refused(path, r"claims 30000 x 30000 x 30000 voxels \(50291.42 GiB\)")
    with pytest.raises(InvresError, match="claims"):
        read_geometry(path)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("ending", "old", "new"),
    [(".nrrd", b"sizes: 9 7 5", b"sizes: 9000 7000 5000"), (".mha", b"= 9 7 5", b"= 9000 7000 5000")],
)
def test_a_text_header_that_claims_too_much_is_refused(tmp_path, ending, old, new, compress):
    write_volume(tmp_path / f"a{ending}", make_volume(), compress=compress)
    raw = (tmp_path / f"a{ending}").read_bytes()
    assert old in raw
    (tmp_path / f"a{ending}").write_bytes(raw.replace(old, new))
    refused(tmp_path / f"a{ending}", "claims 9000 x 7000 x 5000 voxels")


@pytest.mark.parametrize("size", [0, -3])
def test_a_header_with_an_impossible_size_is_refused(tmp_path, size):
    write_volume(tmp_path / "a.nii", make_volume())
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<h", raw, 42, size)
    (tmp_path / "a.nii").write_bytes(raw)
    refused(tmp_path / "a.nii", "every size must be 1 or more")


@pytest.mark.parametrize(("name", "data"), [("a.nhdr", "a.raw.gz"), ("a.mhd", "a.zraw"), ("a.hdr", "a.img")])
def test_a_header_without_its_data_file_says_which_file_is_missing(tmp_path, name, data):
    sitk.WriteImage(sitk_of(make_volume()), str(tmp_path / name), useCompression=True)
    (tmp_path / data).unlink()
    refused(tmp_path / name, f"{data}, which is not beside it")


def test_a_folder_without_dicom_is_refused_and_its_sub_folders_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    refused(tmp_path, "has no DICOM images")
    (tmp_path / "series 1").mkdir()
    assert "series 1" in refused(tmp_path, "has no DICOM images").hint


@pytest.mark.parametrize("name", ["a.jpg", "a.nii.zip", "a", "a.dcm"])
def test_an_ending_that_cannot_be_written_is_refused_with_the_allowed_ones(tmp_path, name):
    with pytest.raises(InvresError, match=r"\.nii, \.nii\.gz, \.nrrd, \.mha and \.seg\.nrrd"):
        write_volume(tmp_path / name, make_volume())
    assert list(tmp_path.iterdir()) == []


def test_writing_into_something_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvresError, match="could not be written"):
        write_volume(tmp_path / "file" / "a.nii", make_volume())
    (tmp_path / "a.nii").mkdir()
    with pytest.raises(InvresError, match="is a folder"):
        write_volume(tmp_path / "a.nii", make_volume())


FULL_DISK = """
import resource, signal, sys
import numpy as np
from invres import InvresError
from invres.volume import Geometry, Volume, write_volume
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
array = np.random.default_rng(0).integers(0, 1000, (31, 33, 35)).astype(np.int16)
volume = Volume(array, Geometry(array.shape, (1, 1, 1), (0, 0, 0), np.eye(3)))
try:
    write_volume(sys.argv[1], volume, compress=sys.argv[2] == "1")
except InvresError as error:
    print(error.code, error.message)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes to stand for a full disk")
@pytest.mark.parametrize(
    ("ending", "compress"), [(".nii", 0), (".nii.gz", 1), (".nrrd", 0), (".nrrd", 1), (".mha", 0), (".mha", 1)]
)
def test_a_full_disk_leaves_nothing_half_written(tmp_path, ending, compress):
    path = tmp_path / f"a{ending}"
    write_volume(path, make_volume())
    before = path.read_bytes()
    package_parent = os.path.dirname(os.path.dirname(invres.__file__))
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), str(compress)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": package_parent},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("write_failed ") and "could not be written" in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_itk_keeps_quiet_about_odd_headers(tmp_path, capfd):
    sheared_file(tmp_path / "a.nii", 0.3)
    read_volume(tmp_path / "a.nii")
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- DICOM


def write_series(folder, volume, *, uid="1.2.3.4", description="T1 axial", extension=".dcm", skip=(), tilt_mm=0.0):
    """A minimal MR series, one file a slice, file names in an order that is not the order of the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    image = sitk_of(volume)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction = np.reshape(image.GetDirection(), (3, 3))
    for k in range(image.GetSize()[2]):
        if k in skip:
            continue
        part = image[:, :, k]
        position = np.array(image.TransformIndexToPhysicalPoint((0, 0, k))) + direction[:, 1] * tilt_mm * k
        tags = {
            "0008|0060": "MR",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.4",
            "0008|0018": f"{uid}.{k + 1}",
            "0020|000d": "1.2.3",
            "0020|000e": uid,
            "0008|103e": description,
            "0020|0013": str(k),
            "0020|0032": "\\".join(f"{v:.8g}" for v in position),
            "0020|0037": "\\".join(f"{v:.10g}" for v in [*direction[:, 0], *direction[:, 1]]),
            "0018|0050": str(volume.geometry.spacing_mm[0]),
        }
        part = sitk.JoinSeries(part)
        part.SetSpacing(image.GetSpacing())
        for tag, value in tags.items():
            part.SetMetaData(tag, value)
        name = folder / f"{(k * 3) % 7}_{uid[-1]}.dcm"
        writer.SetFileName(str(name))
        writer.Execute(part)
        name.rename(name.with_suffix(extension))
    return folder


def right_handed(direction="oblique"):
    volume = make_volume(direction)
    if np.linalg.det(volume.geometry.direction[:, ::-1]) < 0:  # DICOM slices are stacked along their normal
        geometry = volume.geometry
        volume = Volume(volume.array, Geometry(SHAPE, SPACING, geometry.origin_mm, geometry.direction * [-1, 1, 1]))
    return volume


@pytest.mark.parametrize("extension", [".dcm", ""])
@pytest.mark.parametrize("direction", ["lps", "oblique", "sagittal"])
def test_a_dicom_folder_is_one_volume_in_the_order_of_its_positions(tmp_path, extension, direction):
    volume = right_handed(direction)
    report = Recorder()
    folder = write_series(tmp_path / "series", volume, extension=extension)
    again = read_volume(folder, report=report)
    assert np.array_equal(again.array, volume.array)
    assert again.geometry.difference(volume.geometry) == "" and warnings_of(report) == []
    assert read_geometry(folder).same_as(again.geometry)


def test_several_series_are_listed_and_a_file_of_one_names_it(tmp_path):
    first, second = right_handed(), right_handed("lps")
    write_series(tmp_path, first, uid="1.2.3.4", description="T1 axial")
    write_series(tmp_path, second, uid="1.2.3.5", description="FLAIR")
    error = refused(tmp_path, r"2 DICOM series, but one is wanted")
    assert "'T1 axial' (5 files)" in error.message and "'FLAIR' (5 files)" in error.message
    assert "sub-folder" in error.hint and "one file of the series" in error.hint
    assert np.array_equal(read_volume(tmp_path / "0_5.dcm").array, second.array)
    assert read_volume(tmp_path / "0_5.dcm").geometry.difference(second.geometry) == ""
    assert read_geometry(tmp_path / "3_4.dcm").difference(first.geometry) == ""


def test_a_missing_slice_is_noticed(tmp_path):
    report = Recorder()
    read_volume(write_series(tmp_path / "s", right_handed(), skip=(2,)), report=report)
    assert "not evenly spaced (3 to 6 mm)" in warnings_of(report)[0]


def test_a_tilted_gantry_is_noticed(tmp_path):
    report = Recorder()
    read_volume(write_series(tmp_path / "s", right_handed(), tilt_mm=0.6), report=report)
    assert "strongly sheared" in warnings_of(report)[0]


def test_two_slices_at_one_position_are_not_one_volume(tmp_path):
    folder = write_series(tmp_path / "s", right_handed())
    shutil.copy(folder / "0_4.dcm", folder / "copy.dcm")
    refused(folder, "several slices at one position")


def changed(file, **tags):
    """A DICOM file with other values of these elements."""
    data = pydicom.dcmread(file)
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(file)


def test_slices_at_an_angle_are_not_one_volume(tmp_path):
    """Stacks along the discs of a spine, say, in one series."""
    folder = write_series(tmp_path / "s", right_handed("lps"))
    changed(folder / "0_4.dcm", ImageOrientationPatient=[1, 0, 0, 0, np.cos(0.1), np.sin(0.1)])
    refused(folder, "do not lie parallel")


def test_each_slice_has_its_own_scale(tmp_path):
    volume = right_handed()
    folder = write_series(tmp_path / "s", volume)
    slopes = {}
    for place, file in enumerate(sorted(folder.iterdir())):
        slopes[pydicom.dcmread(file).InstanceNumber] = slope = (1, 2, 20, 400, 0.5)[place]
        changed(file, SOPClassUID="1.2.840.10008.5.1.4.1.1.2", Modality="CT", RescaleSlope=slope, RescaleIntercept=-100)
    wanted = volume.array * np.array([slopes[k] for k in range(5)])[:, None, None] - 100
    assert wanted.max() > 32767, "more than the type of the first slice holds"
    assert np.allclose(read_volume(folder).array, wanted)


def write_frames(path, volume, order=None, tags=None, groups=None):
    """An enhanced MR file with the slices of a volume, in this order. groups: changes to the functional groups."""
    image, order = sitk_of(volume), order or range(len(volume.array))
    axes = np.reshape(image.GetDirection(), (3, 3))
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3.9"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = "1.2.3", "1.2.3.4", "MR"
    data.NumberOfFrames, data.Rows, data.Columns = len(order), *volume.array.shape[1:]
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 1
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelData = volume.array[list(order)].astype("<i2").tobytes()

    def item(**elements):
        found = pydicom.Dataset()
        for name, value in elements.items():
            setattr(found, name, value)
        return pydicom.Sequence([found])

    depth, height, width = volume.geometry.spacing_mm
    cosines = [f"{v:.10g}" for v in [*axes[:, 0], *axes[:, 1]]]
    shared = pydicom.Dataset()
    shared.PixelMeasuresSequence = item(PixelSpacing=[height, width], SliceThickness=depth)
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=cosines)
    data.SharedFunctionalGroupsSequence = pydicom.Sequence([shared])
    frames = []
    for k in order:
        frame = pydicom.Dataset()
        place = image.TransformIndexToPhysicalPoint((0, 0, int(k)))
        frame.PlanePositionSequence = item(ImagePositionPatient=[f"{v:.8g}" for v in place])
        for name, values in (groups or {}).get(len(frames), {}).items():
            setattr(frame, name, item(**values))
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
    for name, value in (tags or {}).items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("direction", ["lps", "oblique", "sagittal"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3)], ids=["up", "down", "shuffled"])
def test_frames_of_one_file_are_put_where_they_lie(tmp_path, direction, order):
    volume, report = right_handed(direction), Recorder()
    path = write_frames(tmp_path / "s" / "a.dcm", volume, order)
    for source in (path, path.parent):
        again = read_volume(source, report=report)
        assert np.array_equal(again.array, volume.array)
        assert again.geometry.difference(volume.geometry) == "" and warnings_of(report) == []
    assert read_geometry(path).same_as(again.geometry)


def test_frames_that_are_no_volume_are_refused_and_a_gap_is_told(tmp_path):
    volume, report = right_handed("lps"), Recorder()
    refused(write_frames(tmp_path / "twice.dcm", volume, (0, 1, 2, 0, 1, 2)), "several slices at one position")
    read_volume(write_frames(tmp_path / "gap.dcm", volume, (0, 1, 3, 4)), report=report)
    assert "not evenly spaced (3 to 6 mm)" in warnings_of(report)[0]
    tilted = {1: {"PlaneOrientationSequence": {"ImageOrientationPatient": [1, 0, 0, 0, np.cos(0.1), np.sin(0.1)]}}}
    refused(write_frames(tmp_path / "tilted.dcm", volume, groups=tilted), "do not lie parallel")
    scaled = {2: {"PixelValueTransformationSequence": {"RescaleSlope": 2, "RescaleIntercept": 0}}}
    refused(write_frames(tmp_path / "scaled.dcm", volume, groups=scaled), "scales of their own")
    empty = pydicom.Sequence([])
    lost = write_frames(tmp_path / "lost.dcm", volume, tags={"PerFrameFunctionalGroupsSequence": empty})
    refused(lost, "frames, but not where each")
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        data = pydicom.dcmread(lost)
        data.PerFrameFunctionalGroupsSequence = [pydicom.Dataset() for _ in volume.array]
        setattr(data, name, empty)
        data.save_as(tmp_path / "bare.dcm", enforce_file_format=True)
        refused(tmp_path / "bare.dcm", "frames, but not where each")
    bare = {k: {"PixelValueTransformationSequence": {"RescaleIntercept": 0}} for k in range(len(volume.array))}
    read_volume(write_frames(tmp_path / "without slope.dcm", volume, groups=bare))


def test_two_files_with_frames_are_not_joined(tmp_path):
    volume = right_handed("lps")
    for name in ("a", "b"):
        uid = {"SOPInstanceUID": f"1.2.3.{ord(name)}"}
        write_frames(tmp_path / "s" / f"{name}.dcm", volume, tags=uid)
    refused(tmp_path / "s", "2 files with several frames each")


def test_without_pydicom_frames_are_not_taken_on_trust(tmp_path, monkeypatch):
    path = write_frames(tmp_path / "a.dcm", right_handed())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "pip install pydicom" in refused(path, "pydicom, which tells where they lie, is not installed").hint


# ---------------------------------------------------------------- resampling


@pytest.mark.parametrize("interpolation", ["linear", "nearest", "label"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, bool])
def test_resampling_to_the_same_grid_changes_nothing(interpolation, dtype):
    volume = make_volume(dtype=dtype)
    again = resample(volume, make_volume().geometry, interpolation=interpolation)
    assert np.array_equal(again.array, volume.array) and again.array.dtype == dtype


def test_linear_resampling_is_exact_for_a_linear_ramp_in_the_world():
    source = Geometry((21, 23, 25), (2.0, 1.5, 1.0), (-20, -15, -25), DIRECTIONS["oblique"])
    target = Geometry((5, 6, 7), (1.3, 0.7, 0.9), (0, 0, 0), DIRECTIONS["flipped"])
    target = Geometry(target.shape, target.spacing_mm, _centre(source) - _centre(target), target.direction)

    def ramp(geometry):
        index = np.indices(geometry.shape).reshape(3, -1)
        world = geometry.affine @ np.vstack([index, np.ones(index.shape[1])])
        return (world[0] + 2 * world[1] - 3 * world[2]).reshape(geometry.shape)

    resampled = resample(Volume(ramp(source), source), target)
    assert resampled.array.dtype == np.float64 and resampled.geometry is target
    assert np.allclose(resampled.array, ramp(target), atol=1e-4)


def _centre(geometry):
    return (geometry.affine @ [*((np.array(geometry.shape) - 1) / 2), 1])[:3]


@pytest.mark.parametrize("interpolation", ["nearest", "label"])
def test_label_resampling_invents_no_label_and_keeps_volume(interpolation):
    index = np.indices((17, 19, 21)) - np.array([8, 9, 10])[:, None, None, None]
    radius = np.sqrt((index**2).sum(0))
    labels = np.where(radius < 4, 250, np.where(radius < 7, 10, 0)).astype(np.uint8)
    volume = Volume(labels, Geometry(labels.shape, (1, 1, 1), (3, 4, 5), DIRECTIONS["oblique"]))
    finer = resample(volume, volume.geometry.with_spacing((0.7, 0.6, 0.55)), interpolation=interpolation)
    assert finer.array.dtype == np.uint8 and set(np.unique(finer.array)) == {0, 10, 250}
    for value in (10, 250):
        before_mm3 = np.count_nonzero(labels == value)
        assert np.count_nonzero(finer.array == value) * 0.7 * 0.6 * 0.55 == pytest.approx(before_mm3, rel=0.08)


def test_outside_of_the_volume_has_the_value_asked_for():
    volume = make_volume(dtype=np.int16)
    far = Geometry((3, 4, 5), (1, 1, 1), (500, 500, 500), np.eye(3))
    assert (resample(volume, far, outside=-1000).array == -1000).all()


def test_an_unknown_interpolation_is_refused():
    with pytest.raises(InvresError, match="linear, nearest, label"):
        resample(make_volume(), make_volume("flipped").geometry, interpolation="cubic")


# ---------------------------------------------------------------- real files


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("brain_templates_spm12/avg152T1.nii.gz", (91, 109, 91)),
        ("brain_t1_t2_emsegment/EMSeg-Brain-MRT1T2_small/VolumeData_Input/Target/t1_small.nhdr", None),
        ("dicom_gbm/Study1/12-T1post-05670", (22, 512, 512)),
        ("dicom_gbm/Study1/13_HCropVolume", (32, 51, 35)),
        ("ct_abdomen/example_ct_dicom", (20, 512, 512)),
    ],
)
def test_real_files_are_read_where_itk_puts_them(data_dir, path, shape):
    path = data_dir / path
    if not path.exists():
        pytest.skip(f"{path} is not here")
    volume = read_volume(path)
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)) if path.is_dir() else str(path)
    image = sitk.ReadImage(files)
    x, y, z = image.TransformContinuousIndexToPhysicalPoint((3.0, 4.0, 5.0))
    assert np.allclose(volume.geometry.affine @ [5, 4, 3, 1], [-x, -y, z, 1], atol=1e-2)
    assert np.array_equal(volume.array, sitk.GetArrayViewFromImage(image))
    assert shape is None or volume.array.shape == shape


def test_a_real_4d_tumour_case_has_four_channels_on_the_grid_of_its_label(data_dir):
    folder = data_dir / "brain_tumour_msd"
    channels = read_channels(folder / "imagesTr" / "BRATS_119.nii.gz")
    label = read_volume(folder / "labelsTr" / "BRATS_119.nii.gz", kind="labels")
    assert len(channels) == 4 and all(c.geometry.difference(label.geometry) == "" for c in channels)
    assert set(np.unique(label.array)) <= {0, 1, 2, 3} and label.array.dtype == np.uint8
    assert os.path.getsize(folder / "imagesTr" / "BRATS_119.nii.gz") < sum(c.array.nbytes for c in channels)
