"""Results return on the file's own grid: exactly where the spacing is the same, in the same place where it is not."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from grids import GRIDS, PLAIN, RAS, REGIONS, pair, plan_for

from invres import restoration
from invres.cases import read_dataset
from invres.config import Label, LabelScheme
from invres.preprocessing import inside_values, make_plan, prepare, scheme_targets
from invres.restoration import restore_probabilities, restore_uncertainty, restore_volume
from invres.volume import Geometry, Volume


def one_hot(prepared, scheme):
    if scheme.regions:
        return scheme_targets(prepared.label, scheme).astype(np.float32)
    return np.stack([prepared.label == k for k in range(scheme.out_channels)]).astype(np.float32)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("scheme", [PLAIN, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("crop", [True, False])
def test_labels_prepared_and_restored_are_the_same_bit_for_bit(name, scheme, crop):
    grid = GRIDS[name]
    image, label = pair(grid, [v for values in inside_values(scheme) for v in values])
    plan = plan_for(grid.canonical().spacing_mm, crop=crop)
    prepared = prepare([image], label, plan, scheme)
    assert prepared.image.dtype == np.float32 and prepared.label.dtype == np.int16
    assert prepared.image.shape[1:] == prepared.label.shape == prepared.geometry.shape
    assert prepared.label.size < label.array.size if crop else prepared.label.size == label.array.size
    restored = restore_probabilities(one_hot(prepared, scheme), prepared.geometry, prepared.original, scheme)
    assert restored.dtype == np.uint8 and restored.flags.c_contiguous
    np.testing.assert_array_equal(restored, label.array)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("spacing", [(0.8, 0.8, 0.8), (1.7, 1.3, 0.6), (3.1, 2.2, 2.7)])
def test_another_spacing_returns_on_the_original_grid_at_the_same_place(name, spacing):
    """A map that is linear in world coordinates survives linear interpolation, wherever both grids have voxels."""
    grid = replace(GRIDS[name], shape=tuple(3 * size + 1 for size in GRIDS[name].shape))
    image, _ = pair(grid, [1])
    prepared = prepare([image], None, plan_for(spacing), PLAIN)
    np.testing.assert_allclose(prepared.geometry.spacing_mm, spacing)
    slope = np.array([0.3, -0.2, 0.5])

    def ramp(geometry):
        index = np.moveaxis(np.indices(geometry.shape), 0, -1)
        return ((index @ geometry.affine[:3, :3].T + geometry.affine[:3, 3]) @ slope).astype(np.float32)

    restored = restore_volume(ramp(prepared.geometry), prepared.geometry, grid, outside=np.nan)
    assert restored.shape == grid.shape
    crop = image.array != 0
    assert np.isfinite(restored[crop]).all(), "a voxel of the crop was lost"
    centres = np.moveaxis(np.indices(grid.shape), 0, -1) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    inner = (centres - prepared.geometry.affine[:3, 3]) @ np.linalg.inv(prepared.geometry.affine[:3, :3]).T
    inside = ((inner >= 0) & (inner <= np.array(prepared.geometry.shape) - 1)).all(axis=-1)
    assert inside.any()
    np.testing.assert_allclose(restored[inside], ramp(grid)[inside], atol=2e-4)


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (1.0, 1.0, 1.0), (1.2, 1.1, 0.9), (2.0, 2.0, 2.0)])
def test_outside_the_crop_is_background(spacing):
    grid = Geometry((15, 17, 13), (1.0, 1.0, 1.0), (0, 0, 0), RAS * [1, -1, 1])
    image, _ = pair(grid, [10], margin=4)
    prepared = prepare([image], None, plan_for(spacing), PLAIN)
    probabilities = np.zeros((4, *prepared.geometry.shape), dtype=np.float32)
    probabilities[2] = 1
    restored = restore_probabilities(probabilities, prepared.geometry, grid, PLAIN)
    np.testing.assert_array_equal(restored, np.where(image.array != 0, 150, 0))


@pytest.mark.parametrize("name", GRIDS)
def test_equal_spacing_restores_every_value_exactly(name):
    """Zeros beside huge values: the least rounding of a voxel position would show."""
    grid = GRIDS[name]
    image, _ = pair(grid, [10])
    prepared = prepare([image], None, plan_for(grid.canonical().spacing_mm), PLAIN)
    values = np.where(np.indices(prepared.geometry.shape).sum(axis=0) % 2, np.float32(1e30), np.float32(0))
    restored = Volume(restore_volume(values, prepared.geometry, grid, outside=-1), grid).canonical().array
    start = np.argwhere(restored != -1).min(axis=0)
    box = tuple(slice(first, first + size) for first, size in zip(start, values.shape, strict=True))
    np.testing.assert_array_equal(restored[box], values)
    assert (restored == -1).sum() == restored.size - values.size


def test_restoring_in_slabs_changes_nothing(monkeypatch):
    grid = GRIDS["oblique"]
    image, _ = pair(grid, [10])
    prepared = prepare([image], None, plan_for((1.1, 0.9, 0.7)), PLAIN)
    probabilities = np.random.default_rng(0).random((4, *prepared.geometry.shape), dtype=np.float32)
    whole = restore_probabilities(probabilities, prepared.geometry, grid, PLAIN)
    monkeypatch.setattr(restoration, "SLAB_VOXELS", 1)
    np.testing.assert_array_equal(restore_probabilities(probabilities, prepared.geometry, grid, PLAIN), whole)


@pytest.mark.parametrize("name", GRIDS)
def test_a_label_that_was_cleared_is_as_unsure_as_background_is_there(name, monkeypatch):
    grid = GRIDS[name]
    image, _ = pair(grid, [10])
    prepared = prepare([image], None, plan_for((1.1, 0.9, 0.7)), PLAIN)
    probabilities = np.random.default_rng(0).random((4, *prepared.geometry.shape), dtype=np.float32)
    probabilities /= probabilities.sum(axis=0)
    labels = restore_probabilities(probabilities, prepared.geometry, grid, PLAIN)
    cleared = (labels != 0) & (np.random.default_rng(1).random(labels.shape) < 0.3)
    labels[cleared] = 0
    maps = [restore_volume(one, prepared.geometry, grid, float(k == 0)) for k, one in enumerate(probabilities)]
    wanted = 1 - np.where(cleared, maps[0], np.max(maps, axis=0))
    monkeypatch.setattr(restoration, "SLAB_VOXELS", 1)
    found = restore_uncertainty(probabilities, labels, prepared.geometry, grid, False)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert cleared.any() and found.dtype == np.float32


def test_restoring_needs_little_memory():
    """NumPy reports its arrays to tracemalloc: the result and slabs, not one map of each class on the fine grid."""
    grid = Geometry((128, 128, 128), (1.0, 1.0, 1.0), (0, 0, 0), RAS)
    small = grid.with_spacing((4.0, 4.0, 4.0))
    scheme = LabelScheme(tuple(Label(f"l{i}", (i,), i) for i in range(1, 20)))
    probabilities = np.random.default_rng(0).random((20, *small.shape), dtype=np.float32)
    tracemalloc.start()
    labels = restore_probabilities(probabilities, small, grid, scheme)
    restore_uncertainty(probabilities, labels, small, grid, False)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 4 * 4 * np.prod(grid.shape)


@pytest.mark.parametrize(("highest", "dtype"), [(255, np.uint8), (256, np.uint16), (70000, np.uint32)])
def test_the_result_type_holds_the_output_values(highest, dtype):
    grid = GRIDS["canonical"]
    scheme = LabelScheme((Label("x", (highest,), highest),))
    probabilities = np.zeros((2, *grid.shape), np.float32)
    probabilities[1] = 1
    restored = restore_probabilities(probabilities, grid, grid, scheme)
    assert restored.dtype == dtype and (restored == highest).all()


def test_later_regions_overwrite_earlier_ones_above_a_half():
    grid = GRIDS["canonical"]
    probabilities = np.zeros((3, *grid.shape), np.float32)
    probabilities[0] = 0.9
    probabilities[1, :4] = 0.6
    probabilities[2, :2] = 0.51
    probabilities[2, 2:4] = 0.5
    restored = restore_probabilities(probabilities, grid, grid, REGIONS)
    assert (restored[:2] == 4).all() and (restored[2:4] == 1).all() and (restored[4:] == 2).all()


def test_a_real_hippocampus_label_survives_its_plan(data_dir):
    dataset = read_dataset(data_dir / "hippocampus_msd")
    case = dataset.cases[0]
    volumes, label = dataset.load(case)
    plan = make_plan(dataset, dataset.cases[:3])
    prepared = prepare(volumes, label, plan, dataset.scheme, case.name)
    probabilities = one_hot(prepared, dataset.scheme)
    restored = restore_probabilities(probabilities, prepared.geometry, prepared.original, dataset.scheme)
    np.testing.assert_array_equal(restored, label.array)
