"""Synthesis: random contrast, exact registration, repeatable draws, plausible tissue maps."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from invres import InvresError
from invres.configjson import from_dict, to_dict
from invres.synthesis import (
    MASK_MARGIN_VOXELS,
    background_clusters,
    input_patch,
    synthesise,
    tissue_maps_from_gm_wm,
)
from invres.synthesisconfig import SynthesisConfig

PLAIN = SynthesisConfig(
    scale=0.0,
    rotation_degrees=0.0,
    shear=0.0,
    elastic_voxels=0.0,
    blur_voxels=0.0,
    bias_field=0.0,
    gamma_std=0.0,
    low_resolution_probability=0.0,
    noise_std=0.0,
    zero_background_probability=1.0,
    textured_background_probability=0.0,
)
SHAPE, PATCH = (30, 26, 22), (21, 18, 16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shells(shape=SHAPE) -> torch.Tensor:
    """Nested balls (1, 1, D, H, W): background 0, then 1, 2 and 3 inwards."""
    grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, size) for size in shape), indexing="ij"))
    radius = grid.norm(dim=0)
    return sum((radius < edge).to(torch.int16) for edge in (0.9, 0.6, 0.35))[None, None]


def label_means(image: torch.Tensor, label: torch.Tensor, values=(1, 2, 3)) -> list[float]:
    return [image[label == value].mean().item() for value in values]


def test_the_same_seed_gives_the_same_image_and_another_seed_another():
    config = SynthesisConfig()
    first, second, other = (synthesise(shells(), config, generator(seed), PATCH) for seed in (1, 1, 2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_contrast_is_random_so_that_every_order_of_the_labels_comes_up():
    numbers = generator()
    orders = set()
    for _ in range(60):
        image, label = synthesise(shells(), PLAIN, numbers, PATCH)
        orders.add(tuple(np.argsort(label_means(image, label))))
    assert orders == set(itertools.permutations(range(3)))


def test_label_statistics_are_those_drawn():
    config = dataclasses.replace(PLAIN, mean=(100.0, 100.0), std=(10.0, 10.0))
    image, label = synthesise(torch.ones(1, 1, 24, 24, 24, dtype=torch.int16), config, generator(), (24, 24, 24))
    assert (label == 1).all()
    assert image.mean().abs() < 1e-4 and abs(image.std() - 1) < 1e-3
    assert (image**3).mean().abs() < 0.1 and abs((image**4).mean() - 3) < 0.2  # Gaussian inside one label


def drawn(image):
    """Where an image (N, 1, D, H, W) is not empty background; empty is every voxel that equals the darkest corner.

    All voxels are drawn if no two corners are equal: then the background is noise.
    """
    masks = []
    for sample in image:
        corners = sample[0, :: sample.shape[1] - 1, :: sample.shape[2] - 1, :: sample.shape[3] - 1].flatten()
        values, counts = corners.unique(return_counts=True)
        empty = counts.max() > 1
        masks.append(sample != values[counts.argmax()] if empty else torch.ones_like(sample, dtype=torch.bool))
    return torch.stack(masks)


@pytest.mark.parametrize("seed", range(4))
def test_image_and_labels_stay_registered(seed):
    config = dataclasses.replace(
        SynthesisConfig(),
        low_resolution_probability=0.0,
        std=(0.0, 1.0),
        noise_std=0.0,
        bias_field=0.0,
        blur_voxels=0.0,
        zero_background_probability=1.0,
    )
    shape, patch = (60, 52, 44), (42, 36, 32)
    image, label = synthesise(shells(shape), config, generator(seed), patch)
    assert torch.equal(drawn(image), label != 0)
    assert not torch.equal(label, shells(patch)), "the deformation must be felt"
    means = torch.tensor([0.0, *label_means(image, label)])
    spread = torch.stack([image[label == value].std() for value in (1, 2, 3)])
    assert (spread < 0.35).all(), f"a label holds foreign intensities: means {means}, spread {spread}"


def test_labels_of_a_group_share_one_contrast_and_others_do_not():
    numbers = generator()
    config = dataclasses.replace(PLAIN, groups=((1, 3),), std=(1.0, 2.0))
    for _ in range(5):
        image, label = synthesise(shells(), config, numbers, PATCH)
        one, two, three = label_means(image, label)
        assert abs(one - three) < 0.2 and abs(one - two) > abs(one - three)


@pytest.mark.parametrize("seed", range(6))
def test_images_are_standardised_over_their_non_zero_voxels(seed):
    image, _ = synthesise(shells().expand(2, -1, -1, -1, -1), SynthesisConfig(), generator(seed), PATCH)
    assert image.shape == (2, 1, *PATCH) and image.dtype == torch.float32 and torch.isfinite(image).all()
    for sample in image:
        inside = sample[drawn(sample[None])[0]]
        assert inside.mean().abs() < 1e-3 and abs(inside.std() - 1) < 1e-2


def test_an_empty_label_map_gives_a_finite_image():
    empty = torch.zeros(1, 1, *SHAPE, dtype=torch.uint8)
    image, label = synthesise(empty, PLAIN, generator(), PATCH)
    assert torch.isfinite(image).all() and not label.any() and label.dtype == torch.uint8


def test_labels_get_no_new_values_and_ignored_voxels_survive():
    label = torch.tensor([-1, 0, 17, 2035, 530])[torch.randint(0, 5, (2, 1, *SHAPE))]
    _, moved = synthesise(label, SynthesisConfig(), generator(), PATCH)
    assert moved.dtype == torch.int64 and set(moved.unique().tolist()) == {-1, 0, 17, 2035, 530}


def test_only_targets_are_returned_and_stripping_removes_the_rest_from_the_image():
    label = shells()
    label[0, 0, 15, 13, 11] = -1
    config = dataclasses.replace(PLAIN, targets=(2, 3))
    whole, returned = synthesise(label, config, generator(), PATCH)
    assert set(returned.unique().tolist()) == {-1, 0, 2, 3}
    assert drawn(whole)[returned == 0].any(), "the outer shell shapes the image"
    stripped, returned = synthesise(label, dataclasses.replace(config, strip_probability=1.0), generator(), PATCH)
    assert torch.equal(drawn(stripped), returned != 0)


def test_a_tight_mask_cuts_off_the_fluid_around_the_brain_and_its_label():
    """A ball with a cleft, in fluid: the cleft keeps its fluid, what lies outside the margin is background."""
    axes = torch.meshgrid(*(torch.arange(40) - 20 for _ in range(3)), indexing="ij")
    radius = torch.stack(axes).float().norm(dim=0)
    label = (radius < 18).to(torch.int16)
    label[(radius < 12) & (axes[2].abs() > 1)] = 2
    config = dataclasses.replace(PLAIN, targets=(1, 2), fluid=(1,), strip_probability=1.0, tight_mask_probability=1.0)
    cleft, beyond, volumes = (radius < 8) & (axes[2].abs() <= 1), radius >= 12 + 3**0.5 * MASK_MARGIN_VOXELS, set()
    for seed in range(12):
        image, moved = synthesise(label[None, None], config, generator(seed), (40, 40, 40))
        assert torch.equal(moved[0, 0] == 2, label == 2)
        assert (moved[0, 0][cleft] == 1).all() and not moved[0, 0][beyond].any()
        assert torch.equal(drawn(image), moved != 0)
        volumes.add(int((moved == 1).sum()))
    assert len(volumes) == MASK_MARGIN_VOXELS + 1, "every margin comes up"
    _, moved = synthesise(
        label[None, None], dataclasses.replace(config, tight_mask_probability=0.0), generator(), (40, 40, 40)
    )
    assert torch.equal(moved[0, 0], label)


def test_the_background_is_zero_or_dark_or_textured_as_asked():
    label = shells()
    zero, moved = synthesise(label, PLAIN, generator(), PATCH)
    assert not drawn(zero)[moved == 0].any()
    noisy = dataclasses.replace(PLAIN, zero_background_probability=0.0, noise_std=5.0, std=(1.0, 1.0))
    dark, moved = synthesise(label, noisy, generator(), PATCH)
    assert dark[moved == 0].mean() < min(label_means(dark, moved))
    textured = dataclasses.replace(noisy, textured_background_probability=1.0)
    brighter = 0
    for seed in range(12):
        image, moved = synthesise(label, textured, generator(seed), PATCH)
        brighter += image[moved == 0].mean() > image[moved == 1].mean()
    assert 0 < brighter < 12


def test_thick_slices_blur_along_one_axis_only():
    stripes = torch.randint(1, 3, (1, 1, 32, 32, 32), dtype=torch.int16)
    config = dataclasses.replace(
        PLAIN, low_resolution_probability=1.0, low_resolution=1.0, thick_slices=8.0, std=(0.0, 0.0)
    )
    ratios, axes = [], set()
    for seed in range(24):
        image = synthesise(stripes, config, generator(seed), (32, 32, 32))[0][0, 0]
        by_axis = [image.diff(dim=axis).square().mean().item() for axis in range(3)]
        roughness = sorted(by_axis)
        ratios.append(roughness[0] / roughness[1])
        if ratios[-1] < 0.5:
            axes.add(by_axis.index(roughness[0]))
        assert roughness[1] == pytest.approx(roughness[2], rel=0.25)  # the other two axes stay alike
    assert min(ratios) < 0.2, "at least one draw must have clearly thick slices"
    assert axes == {0, 1, 2}


def test_a_larger_voxel_smooths_all_axes():
    noise = torch.randint(1, 9, (1, 1, 24, 24, 24), dtype=torch.int16)
    fine = synthesise(noise, PLAIN, generator(), (24, 24, 24))[0]
    coarse_config = dataclasses.replace(PLAIN, low_resolution_probability=1.0, low_resolution=4.0, thick_slices=1.0)
    roughness = []
    for seed in range(6):
        coarse = synthesise(noise, coarse_config, generator(seed), (24, 24, 24))[0]
        roughness.append(max(coarse.diff(dim=axis).square().mean().item() for axis in (2, 3, 4)))
    assert min(roughness) < 0.3 * fine.diff(dim=2).square().mean()


def test_the_input_patch_is_larger_only_where_the_deformation_reaches_out():
    assert input_patch(PLAIN, PATCH) == PATCH
    assert all(big > small for big, small in zip(input_patch(SynthesisConfig(), PATCH), PATCH, strict=True))


def test_a_configuration_survives_json():
    config = dataclasses.replace(SynthesisConfig(), groups=((1, 2), (3, 4)), targets=(1, 2))
    assert from_dict(SynthesisConfig, to_dict(config)) == config


def head(shape=(48, 56, 44)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A toy head: image, grey and white matter; a ventricle inside, fluid, skull and scalp outside."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    white = ((radius < 0.5) & (radius > 0.15)).astype(np.float32)
    grey = ((radius >= 0.5) & (radius < 0.62)).astype(np.float32)
    image = 100 * white + 70 * grey + 20.0 * (radius < 0.15) + 20.0 * ((radius >= 0.62) & (radius < 0.68))
    image += 35.0 * ((radius >= 0.68) & (radius < 0.76)) + 130.0 * ((radius >= 0.76) & (radius < 0.88))
    return (image + np.random.default_rng(0).normal(0, 1, shape)).astype(np.float32), grey, white


@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_csf_is_the_ventricle_and_a_thin_rim(kind):
    _, grey, white = head()
    if kind == "uint8":
        grey, white = (grey * 255).astype(np.uint8), (white * 255).astype(np.uint8)
    maps = tissue_maps_from_gm_wm(grey, white)
    assert maps.shape == (3, *grey.shape) and maps.dtype == np.float32
    assert maps.min() >= 0 and maps.sum(0).max() <= 1 + 1e-5
    csf = maps[0]
    assert csf[24, 28, 22] == 1.0, "the ventricle is fluid"
    assert 1 <= (csf[24, 28, :10] > 0.3).sum() <= 2, "the rim is one or two voxels thick"
    assert csf[0].max() == 0 and csf[:, 0].max() == 0
    assert np.array_equal(maps[1] > 0.5, grey > 0.5 * grey.max())


def test_background_clusters_follow_geometry_with_names_in_random_order():
    image, grey, white = head()
    inside = tissue_maps_from_gm_wm(grey, white).sum(0) > 0.5
    clusters = background_clusters(image, inside, 3, generator(0))
    assert clusters.dtype == np.int16 and set(np.unique(clusters)) == {0, 1, 2, 3}
    assert not clusters[inside].any() and clusters[0, 0, 0] == 0
    brightest = set()
    for seed in range(12):
        drawn = background_clusters(image, inside, 3, generator(seed))
        assert np.array_equal(drawn != 0, clusters != 0)
        brightest.add(int(np.argmax([image[drawn == value].mean() for value in (1, 2, 3)])))
    assert len(brightest) > 1, "the numbers must not betray the order of intensities"
    again = background_clusters(image, inside, 3, generator(0))
    assert np.array_equal(again, clusters)


def test_nothing_outside_the_brain_is_said_so():
    image, _, _ = head()
    with pytest.raises(InvresError, match="nothing outside"):
        background_clusters(image, np.ones(image.shape, bool), 3, generator())


def test_the_shipped_template_gives_a_plausible_brain():
    nibabel, datasets = pytest.importorskip("nibabel"), pytest.importorskip("nilearn.datasets")
    folder = Path(datasets.__file__).parent / "data"
    files = [folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz" for name in ("gm", "wm")]
    grey, white = (np.asarray(nibabel.load(file).dataobj).transpose(2, 1, 0)[::2, ::2, ::2] for file in files)
    maps = tissue_maps_from_gm_wm(grey, white)
    csf_ml, grey_ml, white_ml = maps.sum((1, 2, 3)) * 8 / 1000
    assert 100 < csf_ml < 400 and 800 < grey_ml < 1200 and 500 < white_ml < 900


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: synthesise(shells().float(), PLAIN, generator(), PATCH), "integer label map"),
        (lambda: synthesise(shells()[0], PLAIN, generator(), PATCH), "integer label map"),
        (lambda: synthesise(shells(), PLAIN, generator(), (31, 5, 5)), "fit into the maps"),
        (lambda: SynthesisConfig(scale=1.0), "synthesis.scale"),
        (lambda: SynthesisConfig(mean=(9.0, 1.0)), "synthesis.mean"),
        (lambda: SynthesisConfig(thick_slices=0.5), "thick_slices"),
    ],
)
def test_a_mistake_is_named(call, words):
    with pytest.raises(InvresError, match=words):
        call()


@pytest.mark.parametrize("side", [0.7, 2.0])
def test_cubic_voxels_of_any_size_give_the_very_same_image(side):
    labels = torch.randint(0, 4, (1, 1, 24, 24, 24), dtype=torch.int16)
    one, other = (
        synthesise(labels, SynthesisConfig(), torch.Generator().manual_seed(3), (16, 16, 16), spacing_mm=spacing_mm)
        for spacing_mm in ((1.0, 1.0, 1.0), (side, side, side))
    )
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("axis", [0, 2])
def test_labels_of_thick_slices_stay_in_their_slices(axis):
    number = torch.arange(24, dtype=torch.int16).reshape([24 if other == axis else 1 for other in range(3)])
    labels = number.expand(24, 24, 24)[None, None].contiguous()
    spacing_mm = tuple(4.0 if other == axis else 1.0 for other in range(3))
    for seed in range(4):
        random = torch.Generator().manual_seed(seed)
        _, moved = synthesise(labels, SynthesisConfig(), random, (16, 16, 16), spacing_mm=spacing_mm)
        assert torch.equal(moved[0, 0], number.narrow(axis, 4, 16).expand(16, 16, 16))
