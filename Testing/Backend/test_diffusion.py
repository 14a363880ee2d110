"""Diffusion scans: gradient tables, the tensor fit on signals that are known, and frames that grids are turned in."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from grids import RAS, rotation

from invres import InvresError
from invres.diffusion import (
    COMPONENTS,
    file_frame,
    fit_tensor,
    gradient_files,
    head_mask,
    mean_diffusivity,
    read_gradients,
    turned,
)
from invres.scans import find_scans, read_scan
from invres.volume import Geometry

DIRECTIONS = np.array(
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, -1, 0.5], [-0.3, 1, 1], [0, 0, 0], [0, 0, 0]]
)
DIRECTIONS = DIRECTIONS / np.maximum(np.linalg.norm(DIRECTIONS, axis=1, keepdims=True), 1e-9)
B_VALUES = np.array([1000.0] * 8 + [0, 5])


def random_tensors(shape):
    """Symmetric positive tensors of the size of the brain's, (6, ...) and as matrices (..., 3, 3)."""
    root = np.random.default_rng(0).normal(size=(*shape, 3, 3))
    matrices = 0.4e-3 * root @ np.swapaxes(root, -1, -2) + 0.2e-3 * np.eye(3)
    rows = [matrices[..., i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))]
    return np.stack(rows), matrices


def signal_of(matrices, b_values=B_VALUES, directions=DIRECTIONS, s0=800.0):
    exponents = np.einsum("ni,...ij,nj->n...", directions, matrices, directions)
    return s0 * np.exp(-b_values.reshape(-1, *[1] * (matrices.ndim - 2)) * exponents)


def test_the_fit_gives_the_tensor_that_made_the_signal():
    tensors, matrices = random_tensors((3, 4, 2))
    found = fit_tensor(signal_of(matrices), B_VALUES, DIRECTIONS)
    assert found.shape == (6, 3, 4, 2) and found.dtype == np.float32 and len(COMPONENTS) == 6
    np.testing.assert_allclose(found, tensors, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(mean_diffusivity(found), np.trace(matrices, axis1=-2, axis2=-1) / 3, rtol=1e-5)


def test_voxels_without_signal_have_no_tensor_and_a_lost_image_gives_finite_values():
    _, matrices = random_tensors((2,))
    signal = signal_of(matrices)
    signal[:, 0] = 0
    signal[3, 1] = 0
    found = fit_tensor(signal, B_VALUES, DIRECTIONS)
    assert not found[:, 0].any() and np.isfinite(found).all() and found[:, 1].any()


def test_the_fit_is_dipys_ordinary_least_squares():
    gradients = pytest.importorskip("dipy.core.gradients", reason="dipy is not installed")
    dti = pytest.importorskip("dipy.reconst.dti")
    _, matrices = random_tensors((3, 3, 2))
    signal = signal_of(matrices) * np.random.default_rng(1).normal(1, 0.05, (len(B_VALUES), 3, 3, 2))
    table = gradients.gradient_table(B_VALUES, bvecs=DIRECTIONS, b0_threshold=50)
    wanted = dti.TensorModel(table, fit_method="OLS").fit(np.moveaxis(signal, 0, -1)).quadratic_form
    rows = np.stack([wanted[..., i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))])
    np.testing.assert_allclose(fit_tensor(signal, B_VALUES, DIRECTIONS), rows, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("kept", [slice(0, 6), slice(0, 8), [0, 1, 3, 3, 0, 1, 8, 9]])
def test_images_that_do_not_determine_a_tensor_are_refused(kept):
    _, matrices = random_tensors((2,))
    with pytest.raises(InvresError, match="do not determine a diffusion tensor"):
        fit_tensor(signal_of(matrices)[kept], B_VALUES[kept], DIRECTIONS[kept])


def test_one_tensor_in_the_world_whatever_way_the_voxel_axes_run():
    """The frame of a file is FSL's: along its axes, with x turned round where the grid is right-handed."""
    tensors, matrices = random_tensors((2,))
    for direction in (RAS, RAS * [1, 1, -1], RAS[:, [1, 2, 0]] * [-1, 1, 1], rotation(25) @ RAS):
        grid = Geometry((4, 5, 6), (1, 1, 1), (0, 0, 0), direction)
        frame = file_frame(grid)
        np.testing.assert_allclose(frame @ frame.T, np.eye(3), atol=1e-12)
        axes = grid.direction[:, ::-1]  # x, y, z of the file
        x = frame[:, 0] @ axes[:, 0]
        assert x == pytest.approx(-1 if np.linalg.det(axes) > 0 else 1)
        np.testing.assert_allclose(frame[:, 1:], axes[:, 1:])
        # What is measured along directions of the file is fitted in its frame, or in the world with turned directions.
        directions = DIRECTIONS @ frame  # of the world, as the file writes them
        in_file = fit_tensor(signal_of(matrices), B_VALUES, directions)
        np.testing.assert_allclose(turned(in_file, frame), tensors, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(turned(turned(tensors, frame.T), frame), tensors, rtol=1e-9, atol=1e-15)


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("lying", [True, False])
def test_tables_are_read_lying_and_standing_and_made_unit_vectors(tmp_path, lying):
    table = DIRECTIONS * 1.02
    bval = write(tmp_path, "a.bval", " ".join(f"{b:g}" for b in B_VALUES))
    rows = table.T if lying else table
    bvec = write(tmp_path, "a.bvec", "\n".join(" ".join(f"{v:.6f}" for v in row) for row in rows))
    values, vectors = read_gradients(bval, bvec)
    np.testing.assert_allclose(values, B_VALUES)
    np.testing.assert_allclose(vectors, DIRECTIONS, atol=1e-5)


@pytest.mark.parametrize(
    ("bval", "bvec", "words"),
    [
        ("0 1000", "1 0\n0 1", "must hold three numbers for each of the 2 b-values"),
        ("0 1000", "0 0.4\n0 0\n0 0", "Direction 2 of a.bvec has the length 0.4"),
        ("0 -5", "0 1\n0 0\n0 0", "has a b-value below 0"),
        ("zero", "1 0\n0 1\n0 0", "is not a table of numbers"),
        ("", "1 0\n0 1\n0 0", "is not a table of numbers"),
        ("0 nan", "1 0\n0 1\n0 0", "is not a table of numbers"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path, bval, bvec, words):
    files = write(tmp_path, "a.bval", bval), write(tmp_path, "a.bvec", bvec)
    with pytest.raises(InvresError, match=words):
        read_gradients(*files)
    with pytest.raises(InvresError, match="There is no file"):
        read_gradients(tmp_path / "b.bval", files[1])


def test_tables_lie_beside_a_scan_by_name_or_as_hcp_calls_them(tmp_path):
    assert gradient_files(tmp_path / "dwi.nii.gz") is None
    hcp = write(tmp_path, "bvals", "0"), write(tmp_path, "bvecs", "0")
    assert gradient_files(tmp_path / "data.nii.gz") == hcp
    own = write(tmp_path, "data.bval", "0"), write(tmp_path, "data.bvec", "0")
    assert gradient_files(tmp_path / "data.nii.gz") == own and gradient_files(tmp_path / "other.nii") == hcp


def test_the_head_is_the_largest_bright_part_without_holes():
    image = np.random.default_rng(0).normal(10, 2, (20, 20, 20))
    image[4:16, 4:16, 4:16] += 200
    image[8:12, 8:12, 8:12] -= 200  # a dark hole
    image[0:3, 0:3, 17:20] += 200  # something else
    mask = head_mask(image)
    inside = np.zeros(image.shape, bool)
    inside[4:16, 4:16, 4:16] = True
    assert mask[9, 9, 9] and not mask[1, 1, 18] and (mask == inside).mean() > 0.97
    with pytest.raises(InvresError, match="same value everywhere"):
        head_mask(np.zeros((4, 4, 4)))


def test_a_real_scan_has_the_diffusivity_of_a_brain(data_dir):
    """A grown brain's grey and white matter have about 0.7 to 0.9e-3 mm2/s, and no tensor a negative eigenvalue."""
    if not (data_dir / "dwi_philips").is_dir():
        pytest.skip("the scan dwi_philips is not among the real volumes")
    scan = read_scan(find_scans(data_dir / "dwi_philips", "tensor")[0], "tensor", 1500)
    middle = slice(14, 18)
    mask = scan.mask[middle]
    tensor = dataclasses.replace(scan, signal=scan.signal[:, middle], mask=mask).channels()
    assert 0.65e-3 < np.median(mean_diffusivity(tensor)[mask]) < 0.95e-3
    rows = tensor[:, mask]
    matrices = np.stack([rows[[0, 1, 2]], rows[[1, 3, 4]], rows[[2, 4, 5]]]).transpose(2, 0, 1)
    assert (np.linalg.eigvalsh(matrices)[:, 0] > 0).mean() > 0.97
    assert 0.2 < mask.mean() < 0.6
