"""Training batches: a pure function of the iteration, every case in turn, labels on their images."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from grids import RAS

from invres.config import AugmentationConfig, ChannelPlan, Label, LabelScheme, PreparationPlan, TrainingConfig
from invres.preprocessing import PreparedCase
from invres.sampling import CaseBatches, seeded_generator
from invres.volume import Geometry

SCHEME = LabelScheme((Label("a", (1,), 1), Label("b", (2,), 2)))
REGIONS = LabelScheme(
    (Label("whole", (1, 2, 4), 1), Label("core", (2, 4), 2), Label("hot", (4,), 3)), regions=True, ignore_value=9
)
STILL = AugmentationConfig(
    **dict.fromkeys(
        (
            *("spatial_probability", "elastic_probability", "gamma_probability", "noise_probability"),
            *("bias_field_probability", "brightness_probability", "low_resolution_probability"),
        ),
        0.0,
    )
)
MOVING = AugmentationConfig(
    spatial_probability=1.0,
    elastic_probability=0.5,
    flip_axes=(0, 2),
    gamma_probability=0.0,
    noise_probability=0.0,
    bias_field_probability=0.0,
    brightness_probability=0.0,
    low_resolution_probability=0.0,
)


PLAN = PreparationPlan(spacing_mm=(2.5, 1.1, 0.8))


def prepared(name, image, label):
    grid = Geometry(image.shape[1:], PLAN.spacing_mm, (0, 0, 0), RAS)
    return PreparedCase(name, image.astype(np.float32), None if label is None else label.astype(np.int16), grid, grid)


def random_cases(count=3, seed=0):
    rng = np.random.default_rng(seed)
    cases = []
    for index in range(count):
        shape = (20 + index, 17, 23 - index)
        label = rng.choice([-1, 0, 1, 2], shape, p=[0.05, 0.55, 0.3, 0.1])
        cases.append(prepared(f"case{index}", rng.normal(size=(2, *shape)), label))
    return cases


def numbered(shape):
    """A case whose image holds the place (D, H, W) of each voxel and whose label holds its number, from 1."""
    place = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    return prepared("numbered", place, np.arange(1, np.prod(shape) + 1).reshape(shape))


def source(cases, augmentation=STILL, scheme=SCHEME, plan=PLAN, **config):
    config = TrainingConfig(**{"patch": (12, 10, 14), "batch_size": 2, **config})
    return CaseBatches(cases, scheme, config, augmentation, torch.device("cpu"), plan)


def test_an_iteration_always_gives_the_same_batch_in_whatever_order_it_is_asked_for():
    cases = random_cases()
    first, second = source(cases, AugmentationConfig()), source(cases, AugmentationConfig())
    in_order = [first.batch(iteration) for iteration in range(6)]
    for iteration in (3, 0, 5, 5, 4, 1, 2, 3):
        image, target = second.batch(iteration)
        assert torch.equal(image, in_order[iteration][0]), iteration
        assert torch.equal(target, in_order[iteration][1]), iteration


def test_other_iterations_and_other_seeds_give_other_batches():
    cases = random_cases(1)
    batches = [source(cases, MOVING).batch(iteration)[0] for iteration in range(5)]
    batches += [source(cases, MOVING, seed=seed).batch(0)[0] for seed in (1, 2, 2**31, 2**32 - 1)]
    for index, batch in enumerate(batches):
        assert not any(torch.equal(batch, other) for other in batches[index + 1 :])


def test_drawing_batches_leaves_the_random_state_of_torch_and_numpy_alone():
    batches = source(random_cases(), AugmentationConfig())
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches.batch(0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize(("count", "batch_size"), [(5, 2), (3, 4), (1, 3)])
def test_every_case_is_used_once_before_any_is_used_again(count, batch_size):
    cases = [prepared(f"{i}", np.full((1, 16, 16, 16), float(i)), np.ones((16, 16, 16))) for i in range(count)]
    batches = source(cases, batch_size=batch_size)
    used = [int(image[0, 0, 0, 0]) for iteration in range(4 * count) for image in batches.batch(iteration)[0]]
    turns = [tuple(used[start : start + count]) for start in range(0, len(used), count)]
    assert all(sorted(turn) == list(range(count)) for turn in turns)
    assert count < 3 or len(set(turns)) > 1, "the order changes from turn to turn"


@pytest.mark.parametrize("augmentation", [STILL, MOVING], ids=["still", "moving"])
@pytest.mark.parametrize("shape", [(20, 17, 23), (9, 30, 11), (4, 5, 40)])
def test_labels_stay_on_their_voxels(augmentation, shape):
    batches = source([numbered(shape)], augmentation)
    seen = 0
    for iteration in range(6):
        image, target = batches.batch(iteration)
        assert image.shape == (2, 3, 12, 10, 14) and image.dtype == torch.float32
        assert target.shape == (2, 12, 10, 14) and target.dtype == torch.int16
        inside = target.numpy() > 0
        place = np.stack(np.unravel_index(np.maximum(target.numpy() - 1, 0), shape), axis=1)
        apart = np.abs(image.numpy() - place)
        # The nearest voxel's label belongs to a place at most half a voxel off (the image is interpolated).
        limit = 0.5 + 1e-3 if augmentation is MOVING else 0
        assert apart.transpose(0, 2, 3, 4, 1)[inside].max() <= limit
        seen += inside.sum()
    assert seen > 500


def test_the_plan_says_which_channels_have_no_bias_field():
    case = prepared("both", np.random.default_rng(0).normal(size=(2, 20, 20, 20)), np.ones((20, 20, 20)))
    plan = PreparationPlan((ChannelPlan("CT", "CT"), ChannelPlan("T1")), (1.0, 1.0, 1.0))
    biased = dataclasses.replace(STILL, bias_field_probability=1.0)
    still, found = (source([case], augmentation, plan=plan).batch(0)[0] for augmentation in (STILL, biased))
    assert torch.equal(found[:, 0], still[:, 0]) and not torch.equal(found[:, 1], still[:, 1])


def test_patches_are_turned_in_the_millimetres_of_the_plan():
    """The image holds places in mm: turned, each voxel is still as far from the middle of the patch."""
    shape = (41, 41, 41)
    place = (np.indices(shape) - 20.0) * np.array([2.0, 1.0, 1.0]).reshape(3, 1, 1, 1)
    case = prepared("turned", place, np.ones(shape))
    turning = dataclasses.replace(STILL, spatial_probability=1.0, rotation_degrees=(0.0, 30.0, 0.0), scale=(1.0, 1.0))
    plan = PreparationPlan(spacing_mm=(2.0, 1.0, 1.0))
    image, _ = source([case], turning, plan=plan, patch=(12, 12, 12), batch_size=1).batch(1)
    inner = image[0, :, 3:9, 3:9, 3:9].numpy()  # further out the border of the volume may be repeated
    centred = (np.indices((6, 6, 6)) - 2.5) * np.array([2.0, 1.0, 1.0]).reshape(3, 1, 1, 1)
    lengths = np.linalg.norm(inner - inner.mean(axis=(1, 2, 3), keepdims=True), axis=0)
    np.testing.assert_allclose(lengths, np.linalg.norm(centred, axis=0), atol=1e-3)
    assert np.ptp(inner[0, 3, 3]) > 0.3, "or it was not turned at all"
    assert source([case], turning, plan=plan).patch_in != source([case], turning, plan=PreparationPlan()).patch_in


@pytest.mark.parametrize("shape", [(5, 7, 30), (12, 10, 6), (3, 3, 3)])
def test_beyond_a_small_volume_the_border_is_repeated_and_the_target_ignored(shape):
    case = numbered(shape)
    image, target = source([case], batch_size=1).batch(0)
    patch = (12, 10, 14)
    overlap = [min(n, p) for n, p in zip(shape, patch, strict=True)]
    assert int((target >= 0).sum()) == np.prod(overlap)
    assert set(np.unique(target.numpy()[target.numpy() <= 0])) == ({-1} if overlap != list(patch) else set())
    for axis, (size, wanted) in enumerate(zip(shape, patch, strict=True)):
        along = image[0, axis].movedim(axis, 0)[:, 0, 0].numpy()
        if size < wanted:
            before = (wanted - size + 1) // 2
            assert along.tolist() == np.clip(np.arange(wanted) - before, 0, size - 1).tolist()
        else:
            assert along.tolist() == list(range(int(along[0]), int(along[0]) + wanted))


def test_the_margin_for_rotations_is_cut_from_the_volume_and_the_patch_itself_stays_inside():
    # Practically never turned, but cut with the margin that turning would need.
    rare = AugmentationConfig(**{**STILL.__dict__, "spatial_probability": 1e-12})
    batches = source([numbered((20, 17, 23))], rare)
    assert all(outer > inner for outer, inner in zip(batches.patch_in, (12, 10, 14), strict=True))
    corners = set()
    for iteration in range(30):
        target = batches.batch(iteration)[1]
        assert int(target.min()) > 0
        corners |= {tuple(np.unravel_index(int(t[0, 0, 0]) - 1, (20, 17, 23))) for t in target}
    for axis, last in enumerate((20 - 12, 17 - 10, 23 - 14)):
        assert {corner[axis] for corner in corners} >= {0, last}, "patches reach both ends of the volume"


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_the_foreground_fraction_is_the_part_of_patches_around_labels(fraction):
    label = np.zeros((60, 50, 70))
    label[30:32, 20:22, 40:42] = 1
    batches = source([prepared("one", label[None], label)], patch=(8, 8, 8), foreground_fraction=fraction)
    found = [bool((target == 1).any()) for iteration in range(150) for target in batches.batch(iteration)[1]]
    # By chance a patch of 8 voxels meets the label in about 0.3 % of draws.
    assert abs(np.mean(found) - fraction) < (0.1 if fraction == 0.5 else 0.03)


def test_a_rare_label_is_centred_on_as_often_as_a_common_one():
    label = np.zeros((40, 40, 120))
    label[:, :, :60] = 1
    label[20, 20, 110] = 2
    batches = source([prepared("one", label[None], label)], patch=(8, 8, 8), foreground_fraction=1.0)
    rare = [bool((target == 2).any()) for iteration in range(150) for target in batches.batch(iteration)[1]]
    assert 0.4 < np.mean(rare) < 0.6


def test_regions_become_one_mask_each_and_ignored_voxels_are_minus_one_in_all():
    rng = np.random.default_rng(3)
    label = rng.choice([-1, 0, 1, 2, 3], (14, 13, 15))  # inside numbers of the file values ignore, 0, 1, 2, 4
    batches = source([prepared("one", label[None], label)], scheme=REGIONS)
    image, target = batches.batch(0)
    assert target.shape == (2, 3, 12, 10, 14) and target.dtype == torch.int8
    values = image[:, 0].numpy().round().astype(int)
    for index, members in enumerate(({1, 2, 3}, {2, 3}, {3})):
        wanted = np.where(values < 0, -1, np.isin(values, list(members)))
        assert np.array_equal(target[:, index].numpy(), wanted)
    assert set(np.unique(target)) == {-1, 0, 1}


def test_cases_without_a_labelled_voxel_are_named_and_still_drawn_from():
    empty = prepared("empty", np.full((1, 16, 16, 16), 7.0), np.zeros((16, 16, 16)))
    ignored = prepared("ignored", np.full((1, 16, 16, 16), 8.0), np.full((16, 16, 16), -1))
    full = prepared("full", np.full((1, 16, 16, 16), 9.0), np.ones((16, 16, 16)))
    batches = source([empty, full, ignored], batch_size=3)
    assert batches.unlabelled == ["empty", "ignored"]
    assert sorted(float(image.mean()) for image in batches.batch(0)[0]) == [7.0, 8.0, 9.0]


def test_memory_maps_serve_as_arrays(tmp_path):
    case = random_cases(1)[0]
    np.save(tmp_path / "image.npy", case.image)
    np.save(tmp_path / "label.npy", case.label)
    mapped = [np.load(tmp_path / name, mmap_mode="r") for name in ("image.npy", "label.npy")]
    on_disk = PreparedCase(case.name, *mapped, case.geometry, case.original)
    for one, other in zip(source([case]).batch(4), source([on_disk]).batch(4), strict=True):
        assert torch.equal(one, other)


def test_a_seeded_generator_depends_on_every_part_of_its_place():
    places = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 1), (0, 1, 3), (2**32 - 1, 1, 2)]
    draws = [tuple(torch.rand(4, generator=seeded_generator(*place)).tolist()) for place in places]
    assert len(set(draws)) == len(places)
    assert draws[0] == tuple(torch.rand(4, generator=seeded_generator(0, 1, 2)).tolist())
