"""Random variation of training patches on the training device: one interpolation in space, then intensities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import InvresError
from .config import AugmentationConfig, check_axes
from .randomness import happens, log_uniform, normal_noise, smooth_field, uniform

__all__ = [
    "ISOTROPIC",
    "Spacing",
    "apply_bias_field",
    "apply_gamma",
    "apply_low_resolution",
    "augment",
    "blank_channels",
    "centre_crop",
    "draw_displacement",
    "draw_presence",
    "in_voxels",
    "input_patch",
    "rotation_matrix",
    "sample_image",
    "sample_labels",
    "sampling_grid",
    "thick_axis",
    "turns_allowed",
]

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]

ISOTROPIC: Spacing = (1.0, 1.0, 1.0)

THICK = 3.0
"""Slices thicker than this many voxel sides of their own plane are moved within that plane only: what lies between them
nobody knows. The threshold, and what follows from it, are nnU-Net's (`ANISO_THRESHOLD`, arXiv 1904.08128)."""

BIAS_GRID = 4
"""Control points of the bias field along each axis: coil sensitivity varies over a good part of the field of view."""

LARGEST_MARGIN = 1.5
"""Cap of input_patch relative to the patch: 3.4 times the voxels. Only the corners of extreme draws lie outside."""


@torch.no_grad()
def augment(
    image: Tensor,
    label: Tensor | None,
    config: AugmentationConfig,
    generator: torch.Generator,
    patch: Triple,
    spacing_mm: Spacing = ISOTROPIC,
    ct_channels: Sequence[int] = (),
) -> tuple[Tensor, Tensor | None]:
    """Varies a batch; each sample decides for itself.

    image: float (N, C, D, H, W), z-scored, on any device. label: integer or bool (N, L, D, H, W) or None.
    spacing_mm: of their voxels (D, H, W); only its ratios count. Objects are turned in mm, so that none is sheared.
    With thick slices (see `thick_axis`) they stay in their slice: turned about its axis, and neither scaled, displaced
    nor lowered in resolution across it.
    ct_channels: have no coil, and so no bias field. Gamma and brightness stay theirs: tube voltage and contrast agent
    change Hounsfield units too, and nnU-Net varies CT by both (arXiv 1904.08128).
    Both may be larger than `patch` (see `input_patch`); the result is the centre of size `patch`, on the same
    device and of the same types. Labels are taken from the nearest voxel, so no new values arise and -1 survives.
    Every random number comes from `generator` (on the CPU): the same seed gives the same result on CPU and GPU.

    Order: rotation, scale, elastic displacement and crop in one interpolation; flips; gamma; brightness; bias
    field; noise; low resolution last, because averaging over larger voxels averages the noise too.
    Raises InvresError where patch, image, label or configuration do not fit one another.
    """
    _check(image, label, config, patch)
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for index in range(image.shape[0]):
        target = None if label is None else label[index]
        sample, target = _vary_space(image[index], target, config, generator, patch, spacing_mm)
        images.append(_vary_intensity(sample, config, generator, thick_axis(spacing_mm), ct_channels))
        if target is not None:
            labels.append(target)
    return torch.stack(images), torch.stack(labels) if labels else None


def input_patch(config: AugmentationConfig, patch: Triple, spacing_mm: Spacing = ISOTROPIC) -> Triple:
    """The size of the patch to cut so that rotation, shrinking and displacement bring in real voxels.

    Covers the whole range of the configuration, but at most 1.5 times `patch` along each axis. The margin is even,
    so that the centres coincide. spacing_mm: see `augment`.
    """
    extent, thick = np.asarray(patch, dtype=np.float64), thick_axis(spacing_mm)
    if config.spatial_probability > 0:
        limits = turns_allowed(config.rotation_degrees, thick)
        angles = [np.linspace(-limit, limit, 7) for limit in limits]
        turns = [
            np.abs(in_voxels(rotation_matrix(*combination), spacing_mm)) for combination in itertools.product(*angles)
        ]
        extent = (np.max([turn @ extent for turn in turns], axis=0)) / min(config.scale[0], 1.0)
        if thick is not None:
            extent[thick] = patch[thick]
    if config.elastic_probability > 0:
        # Twice two standard deviations: beyond, border voxels are repeated.
        std_voxels = config.elastic_voxels * _displaced(spacing_mm)
        extent = extent + 4 * np.minimum(std_voxels, _largest_displacement(config.elastic_grid, patch))
    margins = np.ceil((np.minimum(extent, LARGEST_MARGIN * np.asarray(patch)) - patch) / 2 - 1e-6)
    depth, height, width = (int(size + 2 * max(margin, 0)) for size, margin in zip(patch, margins, strict=True))
    return depth, height, width


def thick_axis(spacing_mm: Spacing) -> int | None:
    """The axis across slices that are more than `THICK` times as thick as the longer side of their pixels, if any."""
    axis = max(range(3), key=lambda axis: spacing_mm[axis])
    in_plane = max(side for other, side in enumerate(spacing_mm) if other != axis)
    return axis if spacing_mm[axis] > THICK * in_plane else None


def turns_allowed(degrees: Sequence[float], thick: int | None) -> list[float]:
    """Angles about (D, H, W), without those that would turn thick slices out of their plane."""
    return [angle if thick in (None, axis) else 0.0 for axis, angle in enumerate(degrees)]


def rotation_matrix(degrees_d: float, degrees_h: float, degrees_w: float) -> np.ndarray:
    """Rotation (3, 3) of offsets (D, H, W) in mm, or in voxels that are cubes: about W first, then H, then D.

    A positive angle about D turns +H towards +W, about H +W towards +D, about W +D towards +H.
    """
    matrix = np.eye(3)
    for axis, degrees in enumerate((degrees_d, degrees_h, degrees_w)):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = cosine
        turn[second, first], turn[first, second] = sine, -sine
        matrix = matrix @ turn
    return matrix


def in_voxels(matrix: np.ndarray, spacing_mm: Spacing) -> np.ndarray:
    """A map (3, 3) of offsets in mm as the same map M of offsets in voxels: S^-1 M S, S the spacing on its diagonal."""
    side = np.asarray(spacing_mm, dtype=np.float64)
    return matrix * (side[None, :] / side[:, None])  # factors of exactly 1 where voxels are cubes


def draw_displacement(
    generator: torch.Generator, std_voxels: float, points: int, patch: Triple, spacing_mm: Spacing = ISOTROPIC
) -> Tensor:
    """Random displacement (3, points, points, points) in voxels (D, H, W) at the control points, on the CPU.

    std_voxels: counted in the shortest side of a voxel, so that it is the same length in mm along all axes; 0 across
    thick slices.
    """
    limit = torch.from_numpy(_largest_displacement(points, patch)).float().reshape(3, 1, 1, 1)
    control = torch.randn((3, points, points, points), generator=generator) * std_voxels
    control *= torch.from_numpy(_displaced(spacing_mm)).float().reshape(3, 1, 1, 1)
    return torch.minimum(torch.maximum(control, -limit), limit)


def sampling_grid(
    matrix: np.ndarray, displacement: Tensor | None, shape: Triple, patch: Triple, device: torch.device
) -> Tensor:
    """Where each output voxel looks in the input: (1, D, H, W, 3) for `grid_sample` with align_corners=True.

    matrix: (3, 3) takes an output offset from the centre to an input offset (the inverse of what the object does).
    displacement: control points as of `draw_displacement`, added to the input place. shape: spatial size of the input.
    """
    grid = torch.empty((3, *patch), dtype=torch.float32, device=device)
    offsets = [
        (torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2).reshape(
            [size if axis == own else 1 for axis in range(3)]
        )
        for own, size in enumerate(patch)
    ]
    # (size - 1) // 2 steps and halves: the identity must land on the voxels of centre_crop, also for odd margins.
    shift = [(inner - outer) // 2 - (inner - outer) / 2 for inner, outer in zip(shape, patch, strict=True)]
    half = [max(size - 1, 1) / 2 for size in shape]
    for axis in range(3):
        along_d, along_h, along_w = (
            offset * (float(matrix[axis, other]) / half[axis]) for other, offset in enumerate(offsets)
        )
        torch.add(along_d + along_h, along_w + shift[axis] / half[axis], out=grid[2 - axis])
    if displacement is not None:
        scaled = displacement / torch.tensor(half).reshape(3, 1, 1, 1)
        grid += smooth_field(scaled.flip(0), patch, device)
    return grid.permute(1, 2, 3, 0)[None]


def sample_image(image: Tensor, grid: Tensor) -> Tensor:
    """A float image (C, D, H, W) at the places of `sampling_grid`, linear; outside, the border is repeated."""
    grid = grid.to(image.dtype)
    return F.grid_sample(image[None], grid, mode="bilinear", padding_mode="border", align_corners=True)[0]


def sample_labels(label: Tensor, grid: Tensor) -> Tensor:
    """Labels (L, D, H, W) of the nearest voxel, their type kept. Exact for values up to 2^24 (float32)."""
    taken = F.grid_sample(label[None].float(), grid, mode="nearest", padding_mode="border", align_corners=True)[0]
    return taken.to(label.dtype)


def centre_crop(array: Tensor, patch: Triple) -> Tensor:
    """The centre of the last three axes; where the margin is odd, the smaller half lies in front."""
    for axis, wanted in zip((-3, -2, -1), patch, strict=True):
        array = array.narrow(axis, (array.shape[axis] - wanted) // 2, wanted)
    return array


def apply_gamma(image: Tensor, exponents: Tensor) -> Tensor:
    """Raises each channel (C, D, H, W), rescaled to 0..1 by its own range, to its exponent (C); keeps mean and std."""
    low, high = (_per_channel(value) for value in torch.aminmax(image.flatten(1), dim=1))
    std, mean = torch.std_mean(image, dim=(1, 2, 3), correction=0, keepdim=True)
    curved = ((image - low) / (high - low).clamp_min(1e-7)).clamp_(0, 1).pow_(_per_channel(exponents.to(image)))
    curved_std, curved_mean = torch.std_mean(curved, dim=(1, 2, 3), correction=0, keepdim=True)
    return (curved - curved_mean) * (std / curved_std.clamp_min(1e-7)) + mean


def apply_bias_field(image: Tensor, control: Tensor) -> Tensor:
    """Multiplies (C, D, H, W) by exp of the smooth field through `control` (1, d, h, w), one coil for all channels.

    Intensities are counted from each channel's minimum: z-scored images have no zero signal at zero, and a
    coil must leave the air dark.
    """
    low = _per_channel(image.flatten(1).amin(dim=1))
    _, depth, height, width = image.shape
    field = smooth_field(control, (depth, height, width), image.device).exp_().to(image.dtype)
    return torch.addcmul(low, image - low, field)


def apply_low_resolution(image: Tensor, factors: tuple[float, float, float]) -> Tensor:
    """Averages (C, D, H, W) over voxels larger by `factors` (D, H, W) and interpolates linearly back."""
    shape = tuple(image.shape[1:])
    small = [max(1, round(size / factor)) for size, factor in zip(shape, factors, strict=True)]
    if tuple(small) == shape:
        return image
    averaged = F.interpolate(image[None], size=small, mode="area")
    return F.interpolate(averaged, size=shape, mode="trilinear", align_corners=False)[0]


def draw_presence(present: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Which channels of a batch stay, bool (N, C), on the CPU.

    Each of those that are `present` (N, C) goes with the given probability; where all would go, one of them stays,
    each as likely as the others.
    """
    stays = present & (torch.rand(present.shape, generator=generator) >= probability)
    chosen = torch.rand(present.shape[0], generator=generator)
    for sample, (row, number) in enumerate(zip(stays, chosen.tolist(), strict=True)):
        if not row.any():
            places = present[sample].nonzero()[:, 0]
            row[places[int(number * len(places))]] = True
    return stays


def blank_channels(image: Tensor, present: Tensor) -> Tensor:
    """Zeros, in place, for the channels of (N, C, D, H, W) that are not `present` (N, C)."""
    return image.masked_fill_(~present.to(image.device)[:, :, None, None, None], 0)


def _vary_space(
    image: Tensor,
    label: Tensor | None,
    config: AugmentationConfig,
    generator: torch.Generator,
    patch: Triple,
    spacing_mm: Spacing,
) -> tuple[Tensor, Tensor | None]:
    """Rotation, scale, displacement, crop and flips of one sample (C, D, H, W)."""
    matrix, displacement, thick = None, None, thick_axis(spacing_mm)
    if happens(generator, config.spatial_probability):
        angles = turns_allowed([uniform(generator, -limit, limit) for limit in config.rotation_degrees], thick)
        matrix = in_voxels(rotation_matrix(*angles).T, spacing_mm) / log_uniform(generator, *config.scale)
        if thick is not None:
            matrix[thick, thick] = 1
    if happens(generator, config.elastic_probability):
        displacement = draw_displacement(generator, config.elastic_voxels, config.elastic_grid, patch, spacing_mm)
    if matrix is None and displacement is None:
        image = centre_crop(image, patch)
        label = None if label is None else centre_crop(label, patch)
    else:
        matrix = np.eye(3) if matrix is None else matrix
        _, depth, height, width = image.shape
        grid = sampling_grid(matrix, displacement, (depth, height, width), patch, image.device)
        image = sample_image(image, grid)
        label = None if label is None else sample_labels(label, grid)
    axes = [axis - 3 for axis in config.flip_axes if happens(generator, 0.5)]
    if axes:
        image = image.flip(axes)
        label = None if label is None else label.flip(axes)
    return image, label


def _vary_intensity(
    image: Tensor,
    config: AugmentationConfig,
    generator: torch.Generator,
    thick: int | None,
    ct_channels: Sequence[int],
) -> Tensor:
    """Contrast and artefacts of one sample (C, D, H, W); each channel has its own numbers."""
    channels = image.shape[0]
    if happens(generator, config.gamma_probability):
        exponents = torch.tensor([log_uniform(generator, *config.gamma) for _ in range(channels)])
        image = apply_gamma(image, exponents)
    if happens(generator, config.brightness_probability):
        factors = torch.tensor([uniform(generator, *config.brightness) for _ in range(channels)])
        image = image * _per_channel(factors.to(image))
    if happens(generator, config.bias_field_probability):
        control = torch.randn((1, BIAS_GRID, BIAS_GRID, BIAS_GRID), generator=generator) * config.bias_field
        biased = apply_bias_field(image, control)
        for channel in ct_channels:
            biased[channel] = image[channel]
        image = biased
    if happens(generator, config.noise_probability):
        stds = torch.tensor([uniform(generator, 0, config.noise_std) for _ in range(channels)])
        noise = normal_noise(generator, tuple(image.shape), image.device).to(image.dtype)
        image = torch.addcmul(image, noise, _per_channel(stds.to(image)))
    if happens(generator, config.low_resolution_probability):
        shrinks = [uniform(generator, *config.low_resolution) for _ in range(channels)]
        d, h, w = (float(axis != thick) for axis in range(3))
        image = torch.cat([apply_low_resolution(image[i : i + 1], (f**d, f**h, f**w)) for i, f in enumerate(shrinks)])
    return image


def _per_channel(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


def _displaced(spacing_mm: Spacing) -> np.ndarray:
    """Voxels along each axis that are as long as the shortest side of one; none across thick slices."""
    thick = thick_axis(spacing_mm)
    return np.array([0.0 if axis == thick else min(spacing_mm) / side for axis, side in enumerate(spacing_mm)])


def _largest_displacement(points: int, patch: Triple) -> np.ndarray:
    """A fifth of the control points' distance per axis: with more, Catmull-Rom curves could fold small patches."""
    return (np.asarray(patch, dtype=np.float64) - 1) / (points - 1) / 5


def _check(image: Tensor, label: Tensor | None, config: AugmentationConfig, patch: Triple) -> None:
    if image.ndim != 5 or not image.is_floating_point():
        raise InvresError(
            f"augment wants a float image (N, C, D, H, W), got {image.dtype} with shape {list(image.shape)}."
        )
    shape = tuple(image.shape[2:])
    if any(wanted < 1 or wanted > size for wanted, size in zip(patch, shape, strict=True)):
        raise InvresError(
            f"The patch must have 1 or more voxels and fit into the image of {list(shape)}, got {list(patch)}.",
            hint="Pad the image or choose a smaller patch.",
        )
    if label is not None and (label.ndim != 5 or label.shape[0] != image.shape[0] or tuple(label.shape[2:]) != shape):
        raise InvresError(
            f"The label must be (N, L, D, H, W) on the grid of the image {list(image.shape)}, got {list(label.shape)}."
        )
    if config.elastic_grid < 2:
        raise InvresError(f"augmentation.elastic_grid must be 2 or more, got {config.elastic_grid}.")
    check_axes("augmentation.flip_axes", config.flip_axes)
    for name in ("scale", "gamma", "low_resolution"):
        low, high = getattr(config, name)
        if not 0 < low <= high:
            raise InvresError(f"augmentation.{name} must be two factors above 0, low then high, got {[low, high]}.")
