"""Augmentation: repeatable, registered, one interpolation, and every switch does what it says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from invres import InvresError
from invres.augmentation import (
    apply_bias_field,
    apply_gamma,
    apply_low_resolution,
    augment,
    centre_crop,
    draw_displacement,
    in_voxels,
    input_patch,
    rotation_matrix,
    sample_image,
    sample_labels,
    sampling_grid,
    thick_axis,
)
from invres.config import AugmentationConfig
from invres.configjson import from_dict
from invres.randomness import smooth_field

SWITCHES = ("spatial", "elastic", "gamma", "noise", "bias_field", "brightness", "low_resolution")
OFF = AugmentationConfig(**{f"{name}_probability": 0.0 for name in SWITCHES})
ALL = dataclasses.replace(OFF, **{f"{name}_probability": 1.0 for name in SWITCHES}, flip_axes=(0, 1, 2))
SPATIAL = dataclasses.replace(OFF, spatial_probability=1.0, elastic_probability=1.0)
INPUT, PATCH = (27, 34, 22), (19, 24, 15)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(samples: int = 2, channels: int = 2, shape=INPUT) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.randn(samples, channels, *shape)
    label = torch.randint(-1, 4, (samples, 1, *shape), dtype=torch.int16)
    return image, label


def blobs(shape) -> torch.Tensor:
    """A label map (1, D, H, W) of a few large balls with the values 1, 2 and 5."""
    grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, size) for size in shape), indexing="ij"))
    label = torch.zeros(shape, dtype=torch.int16)
    for value, centre, radius in ((1, (0.0, 0.0, 0.0), 0.75), (2, (0.2, -0.2, 0.1), 0.5), (5, (-0.1, 0.3, -0.2), 0.3)):
        distance = (grid - torch.tensor(centre).reshape(3, 1, 1, 1)).norm(dim=0)
        label[distance < radius] = value
    return label[None]


def test_the_same_seed_gives_the_same_patch_and_another_seed_another():
    image, label = batch()
    first, second, other = (augment(image, label, ALL, generator(seed), PATCH) for seed in (3, 3, 4))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_the_global_random_state_is_neither_read_nor_moved():
    image, label = batch()
    torch.manual_seed(1)
    first = augment(image, label, ALL, generator(), PATCH)[0]
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = augment(image, label, ALL, generator(), PATCH)[0]
    torch.manual_seed(1)
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("shape", [INPUT, PATCH, (20, 25, 16), (19, 34, 16)])
def test_with_every_probability_zero_the_result_is_exactly_the_centre_crop(shape):
    image, label = batch(shape=shape)
    new_image, new_label = augment(image, label, OFF, generator(), PATCH)
    assert torch.equal(new_image, centre_crop(image, PATCH)) and torch.equal(new_label, centre_crop(label, PATCH))
    assert new_image.data_ptr() != image.data_ptr(), "the caller's tensor must not be handed back"


@pytest.mark.parametrize("shape", [INPUT, PATCH, (20, 25, 16), (19, 34, 16), (1, 9, 8)])
def test_the_identity_grid_lands_on_the_voxels_of_the_centre_crop(shape):
    image, label = batch(1, shape=shape)
    patch = tuple(min(size, wanted) for size, wanted in zip(shape, PATCH, strict=True))
    grid = sampling_grid(np.eye(3), None, shape, patch, image.device)
    torch.testing.assert_close(sample_image(image[0], grid), centre_crop(image[0], patch), atol=2e-5, rtol=0)
    assert torch.equal(sample_labels(label[0], grid), centre_crop(label[0], patch))


@pytest.mark.parametrize("seed", range(6))
def test_image_and_label_stay_registered_under_rotation_scale_and_displacement(seed):
    shape, patch = (60, 52, 44), (48, 40, 32)
    label = blobs(shape)[None]
    config = dataclasses.replace(SPATIAL, elastic_voxels=1.5, flip_axes=(0, 1, 2))
    image, moved = augment((label > 0).float(), label, config, generator(seed), patch)
    thresholded, reference = image > 0.5, moved > 0
    dice = 2 * (thresholded & reference).sum() / (thresholded.sum() + reference.sum())
    assert dice > 0.97
    unmoved = centre_crop(label, patch) > 0
    assert (unmoved != reference).float().mean() > 0.01, "the deformation must be felt, or the test shows nothing"


def test_a_quarter_turn_about_the_first_axis_takes_h_to_w():
    image = torch.zeros(1, 3, 5, 5)
    image[0, 1, 4, 2] = 1.0  # two voxels in front of the centre, along +H
    sampling = rotation_matrix(90, 0, 0).T
    turned = sample_image(image, sampling_grid(sampling, None, (3, 5, 5), (3, 5, 5), image.device))
    assert turned[0, 1, 2, 4] == pytest.approx(1.0, abs=1e-5)  # now along +W
    assert turned.sum() == pytest.approx(1.0, abs=1e-5)


def test_rotation_matrices_are_right_handed_in_d_h_w():
    d, h, w = np.eye(3)
    np.testing.assert_allclose(rotation_matrix(90, 0, 0) @ h, w, atol=1e-12)
    np.testing.assert_allclose(rotation_matrix(0, 90, 0) @ w, d, atol=1e-12)
    np.testing.assert_allclose(rotation_matrix(0, 0, 90) @ d, h, atol=1e-12)


@pytest.mark.parametrize("spacing_mm", [(2.0, 0.8, 1.1), (0.7, 0.9, 2.4), (1.0, 3.0, 3.0)])
def test_turning_keeps_lengths_in_millimetres_whatever_the_voxels(spacing_mm):
    matrix = in_voxels(rotation_matrix(15, -12, 9), spacing_mm)
    offsets = np.random.default_rng(0).normal(size=(3, 50))
    side = np.array(spacing_mm)[:, None]
    turned = matrix @ offsets
    np.testing.assert_allclose(np.linalg.norm(turned * side, axis=0), np.linalg.norm(offsets * side, axis=0))
    assert np.allclose(in_voxels(matrix, tuple(1 / side[:, 0])), rotation_matrix(15, -12, 9))


@pytest.mark.parametrize("side", [0.7, 1.0, 3.0])
def test_cubic_voxels_of_any_size_give_the_very_same_patch(side):
    image, label = batch()
    first = augment(image, label, ALL, generator(5), PATCH)
    second = augment(image, label, ALL, generator(5), PATCH, (side, side, side))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert np.array_equal(in_voxels(rotation_matrix(15, -12, 9), (side, side, side)), rotation_matrix(15, -12, 9))
    for config in (ALL, AugmentationConfig()):
        assert input_patch(config, PATCH) == input_patch(config, PATCH, (side, side, side))


@pytest.mark.parametrize(
    ("spacing_mm", "axis"),
    [((5.0, 0.5, 0.5), 0), ((1.0, 3.1, 1.0), 1), ((1.0, 0.8, 3.0), None), ((1, 4, 4), None), ((0.9, 0.8, 6.0), 2)],
)
def test_thick_slices_are_those_three_times_as_thick_as_their_pixels(spacing_mm, axis):
    assert thick_axis(spacing_mm) == axis


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_thick_slices_stay_what_they_are_and_only_move_in_their_plane(axis, seed):
    """Every voxel holds the number of its slice: after rotation, scaling and displacement it still does."""
    spacing_mm = tuple(5.0 if other == axis else 0.5 for other in range(3))
    number = torch.arange(30.0).reshape([30 if other == axis else 1 for other in range(3)])
    image = number.expand(30, 30, 30)[None, None].contiguous()
    label = image.to(torch.int16)
    config = dataclasses.replace(SPATIAL, low_resolution_probability=1.0, low_resolution=(2.0, 2.0))
    moved, target = augment(image, label, config, generator(seed), (20, 20, 20), spacing_mm)
    wanted = number.narrow(axis, 5, 20).expand(20, 20, 20)
    torch.testing.assert_close(moved[0, 0], wanted, atol=1e-3, rtol=0)
    assert torch.equal(target[0, 0], wanted.to(torch.int16))
    in_plane = torch.rand(1, 1, 30, 30, 30)
    varied = augment(in_plane, None, SPATIAL, generator(seed), (20, 20, 20), spacing_mm)[0]
    assert not torch.allclose(varied[0], centre_crop(in_plane[0], (20, 20, 20)), atol=0.1)
    size = input_patch(SPATIAL, (20, 20, 20), spacing_mm)
    assert size[axis] == 20 and all(side > 20 for other, side in enumerate(size) if other != axis)


def test_a_displacement_is_as_long_in_millimetres_along_every_axis():
    control = torch.stack([draw_displacement(generator(seed), 1.0, 5, (99, 99, 99), (3, 1, 1.5)) for seed in range(9)])
    plain = torch.stack([draw_displacement(generator(seed), 1.0, 5, (99, 99, 99)) for seed in range(9)])
    side = torch.tensor([3, 1, 1.5]).reshape(3, 1, 1, 1)
    torch.testing.assert_close(control * side, plain)


def test_a_factor_of_two_doubles_the_object():
    label = torch.zeros(1, 17, 17, 17, dtype=torch.int32)
    label[:, 6:11, 6:11, 6:11] = 7
    grid = sampling_grid(np.eye(3) / 2, None, (17, 17, 17), (17, 17, 17), label.device)
    edge = (sample_labels(label, grid)[0, 8, 8] == 7).sum()
    assert 9 <= edge <= 11


def test_a_displacement_moves_by_the_voxels_it_says():
    image = torch.randn(1, 11, 12, 13)
    shift = torch.zeros(3, 4, 4, 4)
    shift[2] = 2.0  # the output looks two voxels further along W
    grid = sampling_grid(np.eye(3), shift, (11, 12, 13), (11, 12, 9), image.device)
    torch.testing.assert_close(sample_image(image, grid), image[..., 4:13], atol=2e-5, rtol=0)


def test_displacements_of_default_size_do_not_fold_even_in_a_small_patch():
    patch = (16, 16, 16)
    for seed in range(5):
        control = draw_displacement(generator(seed), 2.0, 5, patch)
        field = smooth_field(control, patch, control.device)
        for axis in range(3):
            assert field[axis].diff(dim=axis).min() > -1.0


def test_a_smooth_field_passes_through_its_control_points_and_keeps_lines_inside():
    control = torch.randn(2, 5, 4, 3)
    field = smooth_field(control, (17, 13, 9), control.device)
    torch.testing.assert_close(field[:, ::4, ::4, ::4], control)
    ramp = torch.arange(6.0).reshape(1, 6, 1, 1).expand(1, 6, 2, 2)
    inner = smooth_field(ramp, (51, 3, 3), control.device)[0, 10:41, 1, 1]
    torch.testing.assert_close(inner, torch.linspace(1, 4, 31))


@pytest.mark.parametrize("name", [*SWITCHES, "flip"])
@pytest.mark.parametrize("shape", [INPUT, PATCH])
def test_every_switch_alone_changes_the_image_and_keeps_shape_type_and_finiteness(name, shape):
    if name == "flip":
        config = dataclasses.replace(OFF, flip_axes=(0, 1, 2))
    else:
        config = dataclasses.replace(OFF, **{f"{name}_probability": 1.0}, low_resolution=(1.5, 2.0))
    image, label = batch(shape=shape)
    new_image, new_label = augment(image, label, config, generator(), PATCH)
    assert new_image.shape == (2, 2, *PATCH) and new_image.dtype == torch.float32
    assert new_label.shape == (2, 1, *PATCH) and new_label.dtype == torch.int16
    assert torch.isfinite(new_image).all()
    assert not torch.allclose(new_image, centre_crop(image, PATCH), atol=1e-3)
    moves = name in ("spatial", "elastic", "flip")
    assert torch.equal(new_label, centre_crop(label, PATCH)) is not moves


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_labels_get_no_new_values_and_ignored_voxels_survive(dtype):
    allowed = torch.tensor({torch.bool: [0, 1], torch.uint8: [0, 3, 200]}.get(dtype, [-1, 0, 3, 2035]))
    label = allowed[torch.randint(0, len(allowed), (2, 3, *INPUT))].to(dtype)
    image, _ = batch()
    moved = augment(image, label, ALL, generator(), PATCH)[1]
    assert moved.dtype == dtype and moved.shape == (2, 3, *PATCH)
    assert torch.equal(torch.unique(moved.long()), torch.unique(label.long()))


def test_an_image_without_label_gets_the_same_draws_as_one_with_label():
    image, label = batch()
    alone, none = augment(image, None, ALL, generator(), PATCH)
    assert none is None and torch.equal(alone, augment(image, label, ALL, generator(), PATCH)[0])


def test_the_samples_of_a_batch_are_varied_differently():
    image, label = batch(1)
    image, label = image.expand(3, -1, -1, -1, -1), label.expand(3, -1, -1, -1, -1)
    new_image, new_label = augment(image, label, ALL, generator(), PATCH)
    assert not torch.allclose(new_image[0], new_image[1]) and not torch.equal(new_label[1], new_label[2])


def test_the_input_is_left_as_it_was():
    image, label = batch()
    kept = image.clone(), label.clone()
    augment(image, label, ALL, generator(), PATCH)
    assert torch.equal(image, kept[0]) and torch.equal(label, kept[1])


def test_gamma_keeps_mean_spread_and_order():
    image = torch.randn(2, 9, 10, 11) * 3 + 5
    curved = apply_gamma(image, torch.tensor([0.7, 1.5]))
    torch.testing.assert_close(curved.mean((1, 2, 3)), image.mean((1, 2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(curved.std((1, 2, 3)), image.std((1, 2, 3)), atol=1e-4, rtol=0)
    order = image[0].flatten().argsort()
    assert (curved[0].flatten()[order].diff() >= -1e-5).all()
    torch.testing.assert_close(apply_gamma(image, torch.ones(2)), image, atol=1e-4, rtol=0)


def test_a_constant_patch_stays_constant_under_gamma_and_bias_field():
    image = torch.full((1, 6, 7, 8), -0.5)
    torch.testing.assert_close(apply_gamma(image, torch.tensor([1.4])), image)
    torch.testing.assert_close(apply_bias_field(image, torch.randn(1, 4, 4, 4)), image)


def test_a_bias_field_multiplies_and_leaves_the_darkest_voxel_dark():
    image = torch.rand(2, 9, 10, 11) - 1.0
    image[:, 4, 4, 4] = -1.5
    doubled = apply_bias_field(image, torch.full((1, 4, 4, 4), float(np.log(2))))
    torch.testing.assert_close(doubled, (image + 1.5) * 2 - 1.5)


@pytest.mark.parametrize("ct", [(), (1,), (0, 1)])
def test_a_bias_field_leaves_ct_alone_and_every_other_channel_as_it_would_be(ct):
    image, _ = batch(samples=1)
    config = dataclasses.replace(OFF, bias_field_probability=1.0)
    wanted = augment(image, None, config, generator(), PATCH)[0]
    found = augment(image, None, config, generator(), PATCH, ct_channels=ct)[0]
    plain = centre_crop(image, PATCH)
    for channel in range(2):
        assert torch.equal(found[0, channel], (plain if channel in ct else wanted)[0, channel])
        assert not torch.equal(wanted[0, channel], plain[0, channel])


def test_low_resolution_averages_in_place():
    image = torch.arange(8.0).reshape(1, 8, 1, 1).expand(1, 8, 4, 4).contiguous()
    low = apply_low_resolution(image, (2.0, 1.0, 1.0))
    torch.testing.assert_close(low[:, 1:-1], image[:, 1:-1])  # a ramp keeps its place: no half-voxel shift
    noise = torch.randn(1, 24, 24, 24)
    assert apply_low_resolution(noise, (2.0, 2.0, 2.0)).std() < 0.5 * noise.std()


def test_the_input_patch_covers_the_whole_range_unless_capped():
    config = dataclasses.replace(OFF, spatial_probability=1.0, rotation_degrees=(10, 0, 0), scale=(0.9, 1.1))
    patch = (32, 40, 24)
    size = input_patch(config, patch)
    corners = np.array([[d, h, w] for d in (-1, 1) for h in (-1, 1) for w in (-1, 1)]) * (np.array(patch) - 1) / 2
    for angle in (-10, 0, 10):
        reach = np.abs(corners @ rotation_matrix(angle, 0, 0) / 0.9).max(0)
        assert (reach <= (np.array(size) - 1) / 2).all()
    assert size < tuple(1.5 * edge for edge in patch)


def test_the_input_patch_is_the_patch_without_spatial_changes_and_capped_for_the_default():
    assert input_patch(OFF, PATCH) == PATCH
    size = input_patch(AugmentationConfig(), (64, 64, 64))
    assert size == (96, 96, 96)
    wild = dataclasses.replace(AugmentationConfig(), rotation_degrees=(180, 180, 180), scale=(0.5, 2.0))
    for big, small in zip(input_patch(wild, PATCH), PATCH, strict=True):
        assert (big - small) % 2 == 0 and small < big <= 1.5 * small + 2


def test_rotations_in_a_recipe_may_be_whole_or_broken_numbers():
    config = from_dict(AugmentationConfig, {"rotation_degrees": [7.5, 0, 15]})
    assert config.rotation_degrees == (7.5, 0.0, 15.0)
    assert all(isinstance(limit, float) for limit in (*config.rotation_degrees, *AugmentationConfig().rotation_degrees))


def test_a_single_precision_image_stays_so_and_a_double_one_is_not_lowered():
    image, label = batch()
    assert augment(image, label, ALL, generator(), PATCH)[0].dtype == torch.float32
    assert augment(image.double(), label, ALL, generator(), PATCH)[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch": (28, 24, 15)}, "fit into the image"),
        ({"image": torch.zeros(2, *INPUT)}, "float image"),
        ({"image": torch.zeros(2, 1, *INPUT, dtype=torch.int32)}, "float image"),
        ({"label": torch.zeros(2, 1, 9, 9, 9, dtype=torch.int16)}, "on the grid of the image"),
        ({"config": dataclasses.replace(OFF, flip_axes=(3,))}, "flip_axes"),
        ({"config": dataclasses.replace(OFF, elastic_grid=1)}, "elastic_grid"),
        ({"config": dataclasses.replace(OFF, scale=(0.0, 1.0))}, "scale"),
    ],
)
def test_a_mistake_is_named(change, words):
    image, label = batch()
    arguments = {"image": image, "label": label, "config": OFF, "patch": PATCH, **change}
    with pytest.raises(InvresError, match=words):
        augment(generator=generator(), **arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cpu_and_gpu_see_the_same_draws():
    image, label = batch()
    on_cpu = augment(image, label, ALL, generator(), PATCH)
    on_gpu = augment(image.cuda(), label.cuda(), ALL, generator(), PATCH)
    torch.testing.assert_close(on_gpu[0].cpu(), on_cpu[0], atol=2e-2, rtol=0)
    assert (on_gpu[1].cpu() == on_cpu[1]).float().mean() > 0.999
