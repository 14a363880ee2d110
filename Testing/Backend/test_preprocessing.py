"""Preparation: what the network sees has the plan's grid, intensities and label numbers, or is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from grids import GRIDS, PLAIN, RAS, REGIONS, pair, plan_for, rotation

from invres import InvresError
from invres.cases import Case, Dataset
from invres.config import ChannelPlan, Label, LabelScheme
from invres.events import Recorder
from invres.preprocessing import make_plan, prepare, scheme_targets, with_dropout
from invres.volume import Geometry, Volume, write_volume


def test_regions_become_overlapping_targets_and_ignored_voxels_are_in_none():
    scheme = LabelScheme(REGIONS.labels, regions=True, ignore_value=9)
    grid = GRIDS["canonical"]
    label = np.zeros(grid.shape, np.uint8)
    label[0], label[1], label[2], label[3] = 1, 2, 4, 9
    image = Volume(np.random.default_rng(0).random(grid.shape) + 1, grid)
    prepared = prepare([image], Volume(label, grid), plan_for((1.0, 1.0, 1.0)), scheme)
    assert [int(prepared.label[d, 0, 0]) for d in range(5)] == [1, 2, 3, -1, 0]
    targets = scheme_targets(prepared.label, scheme)
    assert targets.dtype == bool
    assert targets[:, :5, 0, 0].T.tolist() == [
        [True, True, False],
        [True, False, False],
        [True, True, True],
        [False, False, False],
        [False, False, False],
    ]


def test_a_resampled_label_keeps_its_values_and_its_ignored_part():
    grid = Geometry((12, 14, 13), (1.0, 1.0, 1.0), (0, 0, 0), RAS)
    scheme = LabelScheme(PLAIN.labels, ignore_value=255)
    label = np.zeros(grid.shape, np.uint8)
    label[:4], label[4:8], label[8:] = 10, 250, 255
    image = Volume(np.random.default_rng(0).random(grid.shape) + 1, grid)
    prepared = prepare([image], Volume(label, grid), plan_for((0.5, 1.0, 1.4)), scheme)
    assert set(np.unique(prepared.label)) == {1, 3, -1}
    assert (prepared.label[:7] == 1).all() and (prepared.label[9:15] == 3).all() and (prepared.label[17:] == -1).all()


def test_unknown_label_values_become_background_with_a_warning():
    grid = GRIDS["flipped"]
    image, label = pair(grid, [10, 77])
    recorder = Recorder()
    prepared = prepare([image], label, plan_for(grid.canonical().spacing_mm), PLAIN, "eve", recorder)
    assert set(np.unique(prepared.label)) == {0, 1}
    assert ["77" in event["message"] and "eve" in event["message"] for event in recorder.events] == [True]


def test_mr_with_an_empty_background_is_scored_inside_its_mask_with_holes_closed():
    grid = Geometry((20, 20, 20), (1.0, 1.0, 1.0), (0, 0, 0), RAS)
    array = np.zeros(grid.shape, np.float32)
    inside = ((np.indices(grid.shape) - 9.5) ** 2).sum(axis=0) < 64
    array[inside] = np.random.default_rng(0).normal(500, 40, int(inside.sum()))
    array[9:11, 9:11, 9:11] = 0
    prepared = prepare([Volume(array, grid)], None, plan_for((1.0, 1.0, 1.0), crop=False), PLAIN)
    assert prepared.image[0][inside].mean() == pytest.approx(0, abs=1e-4)
    assert prepared.image[0][inside].std() == pytest.approx(1, abs=1e-4)
    assert (prepared.image[0][~inside] == -4).all()  # darker than any tissue, and bounded
    assert (prepared.image[0, 9:11, 9:11, 9:11] < -3).all()


def test_mr_without_an_empty_background_is_scored_over_all_voxels():
    grid = GRIDS["canonical"]
    array = np.random.default_rng(0).normal(500, 40, grid.shape)
    array[0, 0, 0] = 0
    prepared = prepare([Volume(array, grid)], None, plan_for((1.0, 1.0, 1.0)), PLAIN)
    assert prepared.image.mean() == pytest.approx(0, abs=1e-4) and prepared.image.std() == pytest.approx(1, abs=1e-4)


def test_an_image_with_one_value_inside_its_mask_stays_finite():
    grid = GRIDS["canonical"]
    array = np.zeros(grid.shape, np.uint8)
    array[3:5, 3:5, 3:5] = 1
    prepared = prepare([Volume(array, grid)], None, plan_for((1.0, 1.0, 1.0), crop=False), PLAIN)
    assert np.isfinite(prepared.image).all()


def test_ct_is_clipped_and_scaled_by_the_plan_and_not_cropped():
    grid = GRIDS["canonical"]
    array = np.zeros(grid.shape, np.int16)
    array[2, 2, 2], array[3, 3, 3] = -1000, 3000
    plan = plan_for((1.0, 1.0, 1.0), "CT", crop=False, clip=(-100.0, 300.0), mean=50.0, std=25.0)
    prepared = prepare([Volume(array, grid)], None, plan, PLAIN)
    assert prepared.image.shape == (1, *grid.shape)
    assert prepared.image.min() == -6 and prepared.image.max() == 10 and prepared.image[0, 0, 0, 0] == -2


def test_strong_downsampling_does_not_alias():
    """Stripes one voxel wide vanish at a quarter of the resolution; without smoothing they would survive."""
    grid = Geometry((40, 8, 8), (1.0, 1.0, 1.0), (0, 0, 0), RAS)
    array = np.full(grid.shape, 100.0, np.float32)
    array[::2] += 40
    array[:, :, :4] += 10
    plan = plan_for((5.0, 1.0, 1.0), "CT", crop=False)
    stripes = prepare([Volume(array, grid)], None, plan, PLAIN).image[0]
    assert stripes.shape == (8, 8, 8)
    assert np.ptp(stripes[1:-1], axis=0).max() < 3
    assert stripes[3, 4, 0] - stripes[3, 4, 7] == pytest.approx(10, abs=0.1)


def stripped_brain(spacing_mm, background=0.0):
    """A ball with a dark rim in an empty (or another) background, as a skull-stripped T1 of this spacing shows it."""
    shape = tuple(round(64 / size) for size in spacing_mm)
    place = [(np.arange(n) - (n - 1) / 2) * size for n, size in zip(shape, spacing_mm, strict=True)]
    radius = np.sqrt(sum(np.square(part) for part in np.ix_(*place)))
    array = np.where(radius < 22, 1000.0, np.where(radius < 27, 300.0, background)).astype(np.float32)
    return Volume(array, Geometry(shape, spacing_mm, (0, 0, 0), RAS))


def rim_value(spacing_mm, first):
    plan = dataclasses.replace(plan_for((2.0, 2.0, 2.0)), normalise_first=first)
    image = prepare([stripped_brain(spacing_mm)], None, plan, PLAIN).image[0]
    middle = [size // 2 for size in image.shape]
    along = image[:, middle[1], middle[2]]
    return float(np.median([along[1], along[-2]])), float(image[middle[0], middle[1], middle[2]])


def test_a_person_has_the_same_intensities_whatever_resolution_the_scan_has():
    """The mask is that of the files: what resampling adds around the brain is no part of it."""
    coarse, fine = rim_value((2.0, 2.0, 2.0), True), rim_value((0.5, 0.5, 0.5), True)
    assert fine == pytest.approx(coarse, abs=0.1)
    assert abs(rim_value((0.5, 0.5, 0.5), False)[1] - rim_value((2.0, 2.0, 2.0), False)[1]) > 0.15


@pytest.mark.parametrize(("modality", "ct"), [("MR", {}), ("CT", {"clip": (-9.0, 700.0), "mean": 50.0, "std": 25.0})])
def test_without_resampling_the_order_of_scaling_makes_no_difference(modality, ct):
    volume = stripped_brain((2.0, 2.0, 2.0))
    given = volume.array.copy()
    plan = plan_for((2.0, 2.0, 2.0), modality, **ct)
    later, first = (
        prepare([volume], None, dataclasses.replace(plan, normalise_first=value), PLAIN).image
        for value in (False, True)
    )
    assert np.array_equal(later, first) and np.array_equal(volume.array, given)


def test_metal_is_clipped_before_it_can_be_smeared_over_its_surroundings():
    grid = Geometry((24, 24, 24), (1.0, 1.0, 1.0), (0, 0, 0), RAS)
    array = np.zeros(grid.shape, np.int16)
    array[11:13, 11:13, 11:13] = 3000
    plan = plan_for((4.0, 4.0, 4.0), "CT", crop=False, clip=(-100.0, 300.0), mean=0.0, std=1.0)
    later, first = (
        prepare([Volume(array, grid)], None, dataclasses.replace(plan, normalise_first=value), PLAIN).image
        for value in (False, True)
    )
    assert later.max() > 3 * first.max() and 0 < first.max() < 60


def test_with_scaling_first_a_lacking_channel_stays_zero_and_the_mask_is_that_of_the_others():
    plan = with_dropout(plan_for((4.0, 3.0, 4.0), channels=2), 0.5)
    plan = dataclasses.replace(plan, normalise_first=True)
    volume = stripped_brain((2.0, 2.0, 2.0))
    alone = prepare([None, volume], None, plan, PLAIN)
    both = prepare([volume, volume], None, plan, PLAIN)
    assert not alone.image[0].any() and alone.absent == (0,)
    np.testing.assert_array_equal(alone.image[1], both.image[1])


@pytest.mark.parametrize("value", [0, 7])
def test_an_empty_or_constant_volume_is_refused(value):
    grid = GRIDS["canonical"]
    image, _ = pair(grid, [10])
    empty = Volume(np.full(grid.shape, value, np.int16), grid)
    with pytest.raises(InvresError, match="nothing to segment in the c1 volume of the case eve") as caught:
        prepare([image, empty], None, plan_for((1.0, 1.0, 1.0), channels=2), PLAIN, "eve")
    assert caught.value.hint


def test_a_wrong_number_of_volumes_is_refused():
    image, _ = pair(GRIDS["canonical"], [10])
    for volumes in ([], [image, image]):
        with pytest.raises(InvresError, match=rf"{len(volumes)} volumes, but 1 are wanted \(c0\)"):
            prepare(volumes, None, plan_for((1.0, 1.0, 1.0)), PLAIN)


def test_different_grids_are_refused_with_the_difference():
    grid = Geometry((9, 12, 7), (1.0, 1.0, 1.0), (0, 0, 0), RAS)
    thick = Geometry((9, 12, 7), (2.0, 1.0, 1.0), (0, 0, 0), RAS)
    image, label = pair(grid, [10])
    for name in ("eve", ""):
        with pytest.raises(InvresError, match=r"c0 and c1 .* different grids \(spacing") as caught:
            prepare([image, Volume(image.array, thick)], None, plan_for((1.0, 1.0, 1.0), channels=2), PLAIN, name)
        assert "Resample c1 to the grid of c0" in caught.value.hint
        assert ("invres check" in caught.value.hint) == bool(name), "without a data set there is nothing to check"
    with pytest.raises(InvresError, match=r"label .* another grid"):
        prepare([image], Volume(label.array, thick), plan_for((1.0, 1.0, 1.0)), PLAIN)


@pytest.mark.parametrize(("shift_mm", "accepted"), [(0.009, True), (0.02, False)])
def test_a_label_may_differ_by_a_hundredth_of_a_millimetre(shift_mm, accepted):
    grid = GRIDS["diagonal"]
    image, label = pair(grid, [10])
    moved = Geometry(grid.shape, grid.spacing_mm, tuple(np.add(grid.origin_mm, (shift_mm, 0, 0))), grid.direction)
    plan = plan_for(grid.canonical().spacing_mm)
    if accepted:
        prepare([image], Volume(label.array, moved), plan, PLAIN)
    else:
        with pytest.raises(InvresError, match="another grid"):
            prepare([image], Volume(label.array, moved), plan, PLAIN)


def test_a_label_header_rounded_across_the_diagonal_keeps_the_axis_order_of_its_image():
    """At 45 degrees the least difference of two headers would choose another canonical order of axes."""
    grid = GRIDS["diagonal"]
    other = Geometry(grid.shape, grid.spacing_mm, grid.origin_mm, rotation(45.01, (0, 0, 1)) @ RAS)
    assert grid.same_as(other, tolerance_mm=1e-2) and grid.canonical().shape != other.canonical().shape
    image, label = pair(grid, [10])
    plan = plan_for(grid.canonical().spacing_mm)
    expected = prepare([image], label, plan, PLAIN).label
    np.testing.assert_array_equal(prepare([image], Volume(label.array, other), plan, PLAIN).label, expected)


def test_channels_stored_with_other_axis_orders_are_one_grid():
    grid = GRIDS["canonical"]
    image, _ = pair(grid, [10])
    turned_grid = Geometry(
        (grid.shape[2], grid.shape[0], grid.shape[1]),
        (1.0, 1.0, 1.0),
        (0.0, 0.0, float(grid.shape[0] - 1)),
        np.stack([RAS[:, 2], -RAS[:, 0], RAS[:, 1]], axis=1),
    )
    turned = Volume(np.ascontiguousarray(image.array[::-1].transpose(2, 0, 1)), turned_grid)
    prepared = prepare([image, turned], None, plan_for((1.0, 1.0, 1.0), channels=2), PLAIN)
    np.testing.assert_array_equal(prepared.image[0], prepared.image[1])


def dataset_on_disk(folder, spacings, modality):
    cases = []
    for index, spacing in enumerate(spacings):
        grid = Geometry((6, 7, 8), spacing, (0, 0, 0), RAS)
        array = np.full(grid.shape, -1000, np.int16)
        label = np.zeros(grid.shape, np.uint8)
        label[2:5, 2:5, 2:5] = 1
        array[label == 1] = np.random.default_rng(index).integers(30, 71, 27)
        for name, voxels in (("image", array), ("label", label)):
            write_volume(folder / f"{index}_{name}.nii.gz", Volume(voxels, grid))
        cases.append(Case(str(index), (folder / f"{index}_image.nii.gz",), folder / f"{index}_label.nii.gz"))
    scheme = LabelScheme((Label("x", (1,), 1),))
    return Dataset("tiny", ("c",), (modality,), scheme, tuple(cases), folder, "test")


def test_the_plan_takes_the_median_spacing_and_the_ct_figures_of_the_labelled_voxels(tmp_path):
    spacings = [(5.0, 0.7, 0.7), (3.0, 0.8, 0.8), (2.0, 0.9, 0.9)]
    dataset = dataset_on_disk(tmp_path, spacings, "CT")
    plan = make_plan(dataset, dataset.cases)
    np.testing.assert_allclose(plan.spacing_mm, (3.0, 0.8, 0.8), atol=1e-5)
    channel = plan.channels[0]
    assert 30 <= channel.clip[0] < 33 and 68 < channel.clip[1] <= 70
    assert 40 < channel.mean < 60 and 8 < channel.std < 15 and not plan.crop_to_nonzero
    assert make_plan(dataset, ["0", "2"], spacing_mm=(1.0, 1.0, 1.0)).spacing_mm == (1.0, 1.0, 1.0)


def test_a_recipe_may_fix_what_ct_is_clipped_to_and_its_figures_are_those_after_clipping(tmp_path):
    dataset = dataset_on_disk(tmp_path, [(2.0, 0.9, 0.9)], "CT")
    plan = make_plan(dataset, dataset.cases, clip_hu=(45.0, 304.0))
    channel = plan.channels[0]
    assert channel.clip == (45.0, 304.0)
    assert 45 < make_plan(dataset, dataset.cases).channels[0].mean < channel.mean < 60
    volume, _ = dataset.load(dataset.cases[0])
    prepared = prepare(volume, None, plan, dataset.scheme)
    assert prepared.image.min() == pytest.approx((45 - channel.mean) / channel.std, rel=1e-5)


def test_the_plan_of_mr_reads_headers_alone_and_needs_a_case(tmp_path):
    dataset = dataset_on_disk(tmp_path, [(5.0, 0.7, 0.7)], "MR")
    plan = make_plan(dataset, dataset.cases)
    assert plan.channels == (ChannelPlan("c", "MR"),) and plan.crop_to_nonzero and plan.normalise_first
    with pytest.raises(InvresError, match="no training case"):
        make_plan(dataset, [])
