"""Training images of random contrast made from label maps alone (SynthSeg's idea)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor

from . import InvresError
from .augmentation import (
    ISOTROPIC,
    Spacing,
    apply_bias_field,
    apply_low_resolution,
    draw_displacement,
    in_voxels,
    rotation_matrix,
    sample_labels,
    sampling_grid,
    thick_axis,
    turns_allowed,
)
from .augmentation import input_patch as augmentation_input_patch
from .config import DARKEST, AugmentationConfig
from .pieces import largest_piece
from .randomness import happens, normal_noise, uniform
from .synthesisconfig import SynthesisConfig

__all__ = [
    "background_clusters",
    "input_patch",
    "synthesise",
    "tissue_maps_from_gm_wm",
]

Triple = tuple[int, int, int]

CONTRASTS = 4096
"""Entries of the contrast table; labels are looked up modulo this. FreeSurfer's usual values fit."""

EMPTY = 0.9
"""Background from this part on. Below it a voxel of a masked image still holds some signal, as in a real one that was
masked first and resampled then."""

MASK_CLOSING_VOXELS = 6
MASK_MARGIN_VOXELS = 3
"""Of masks drawn tightly around a brain, in voxels of the label map (1 mm in the source): they bridge gaps of twice the
first, and leave up to the second of what surrounds the brain. Chosen."""

RIM_VOXELS = 0.5
"""Fluid outside the cortex that `tissue_maps_from_gm_wm` adds: 1 voxel, half full. On ICBM152 (1 mm) this meets the
template's own brain mask within 3 %; a full voxel would spill over it."""


@torch.no_grad()
def synthesise(
    labels: Tensor,
    config: SynthesisConfig,
    generator: torch.Generator,
    patch: Triple,
    channels: int = 1,
    finer: int = 1,
    spacing_mm: Spacing = ISOTROPIC,
) -> tuple[Tensor, Tensor]:
    """An image of random contrast for each label map, and the label map moved with it.

    labels: integer (N, 1, D, H, W) on any device, at least as large as `patch` (see `input_patch`); -1 = ignore.
    channels: images of the same anatomy, each of a contrast and with artefacts of its own.
    finer: voxels of the label map along each axis of one image voxel. Above 1 the image voxel is the mean of what lies
    in it, so that it has true partial volume, and the label that of its centre; `patch` counts image voxels.
    spacing_mm: of the voxels (D, H, W), as for `augment`.
    Returns image (N, channels, *patch) float32, each channel with mean 0 and standard deviation 1 (where the background
    is masked: inside the mask, and 0 outside, as prepared images are), and labels (N, 1, *patch) of the type given.
    All random numbers come from `generator` (on the CPU): the same seed gives the same result on CPU and GPU.
    Raises InvresError for a wrong shape or type.
    """
    if labels.ndim != 5 or labels.shape[1] != 1 or labels.is_floating_point():
        raise InvresError(
            "synthesise wants an integer label map (N, 1, D, H, W), "
            f"got {labels.dtype} with shape {list(labels.shape)}."
        )
    fine_patch = (finer * patch[0], finer * patch[1], finer * patch[2])
    _check_patch(labels, fine_patch)
    images, moved = [], []
    for label in labels:
        grid = _draw_grid(label, config, generator, fine_patch, spacing_mm)
        objects = sample_labels(label, grid)
        if finer > 1:
            grid = F.avg_pool3d(grid.movedim(-1, 1), finer).movedim(1, -1)
            label = sample_labels(label, grid)
        else:
            label = objects
        shown = objects
        if happens(generator, config.strip_probability):
            inside = _is_target(objects, config)
            if happens(generator, config.tight_mask_probability):
                inside &= _tight_mask(inside & ~_is_among(objects, config.fluid), generator)
                cut_off = (_whole_voxels(inside.float(), finer) < 0.5) & _is_among(label, config.fluid)
                label = label.masked_fill(cut_off, 0)
            shown = objects.masked_fill(~inside, 0)
        present = _whole_voxels((shown != 0).float(), finer) > 1 - EMPTY
        planes = []
        for _ in range(channels):
            contrast = _draw_contrasts(config, generator, label.device)
            if shown is not objects:
                contrast[:, 0] = 0
            mean, std = contrast[:, shown.long() % CONTRASTS]
            mean, std = _whole_voxels(mean, finer), _whole_voxels(std, finer)
            planes.append(_acquire(mean, std, present, config, generator))
        images.append(torch.cat(planes))
        moved.append(torch.where(_is_target(label, config), label, torch.zeros_like(label)))
    return torch.stack(images), torch.stack(moved)


def input_patch(config: SynthesisConfig, patch: Triple, spacing_mm: Spacing = ISOTROPIC) -> Triple:
    """The size of the label patch to cut so that the deformation brings in real voxels; at most 1.5 times `patch`."""
    angle = config.rotation_degrees
    reach = AugmentationConfig(
        spatial_probability=1.0,
        rotation_degrees=(angle, angle, angle),
        scale=(1 - config.scale, 1 + config.scale),
        elastic_probability=float(config.elastic_voxels > 0),
        elastic_voxels=config.elastic_voxels,
        elastic_grid=_control_points(config, patch),
    )
    return augmentation_input_patch(reach, patch, spacing_mm)


def background_clusters(image: np.ndarray, inside: np.ndarray, count: int, generator: torch.Generator) -> np.ndarray:
    """The head outside the brain as anonymous structures: int16 (D, H, W), 0 = air and brain, 1..count.

    image: real image (D, H, W) with skull and scalp. inside: bool (D, H, W), the brain. The head is found by Otsu's
    threshold and filled; its smoothed intensities outside the brain are divided by one-dimensional k-means
    (Lloyd, on the histogram), and the clusters are numbered in random order. Only the geometry of the image is kept:
    no intensity and no order of intensities gets into training. SynthSeg treats extracerebral tissue in the same way.
    Raises InvresError if nothing is left outside the brain.
    """
    if image.shape != inside.shape or image.ndim != 3:
        raise InvresError(f"Image and brain mask must share one 3D grid, got {image.shape} and {inside.shape}.")
    smooth = ndimage.gaussian_filter(image.astype(np.float32), sigma=1.0)
    around = _head_mask(smooth) & ~inside
    if not around.any():
        raise InvresError("The image shows nothing outside the brain mask.", hint="Use an image with skull and scalp.")
    values = smooth[around]
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    share = (np.arange(count) + torch.rand(count, generator=generator).numpy()) / count
    means = np.sort(np.quantile(values, share))
    for _ in range(50):
        nearest = np.abs(centres[:, None] - means).argmin(1)
        weight = np.bincount(nearest, counts, count)
        moved = np.where(weight > 0, np.bincount(nearest, counts * centres, count) / np.maximum(weight, 1), means)
        if np.allclose(moved, means):
            break
        means = moved
    names = torch.randperm(count, generator=generator).numpy() + 1
    clusters = np.zeros(image.shape, np.int16)
    clusters[around] = names[np.abs(values[:, None] - means).argmin(1)]
    return clusters


def tissue_maps_from_gm_wm(gm: np.ndarray, wm: np.ndarray) -> np.ndarray:
    """CSF, grey and white matter, float32 (3, D, H, W) with a sum of at most 1, from grey and white matter alone.

    gm, wm: probabilities (D, H, W), float 0..1 or unsigned integers over their full range (uint8: 0..255), with
    voxels of about 1 mm. CSF is what grey and white matter leave inside the brain, closed over sulci and ventricles,
    filled, and grown by half a voxel for the fluid around the cortex, with an edge 1 voxel soft.
    """
    if gm.shape != wm.shape or gm.ndim != 3:
        raise InvresError(f"Grey and white matter must share one 3D grid, got {gm.shape} and {wm.shape}.")
    gm, wm = (_as_probability(array) for array in (gm, wm))
    total = gm + wm
    excess = np.maximum(total, 1)
    gm, wm, total = gm / excess, wm / excess, np.minimum(total, 1)
    brain = _closed(_largest(total > 0.5), radius_voxels=8)
    # Distances are between voxel centres; the surface lies half a voxel nearer.
    depth = np.where(brain, ndimage.distance_transform_edt(brain) - 0.5, 0.5 - ndimage.distance_transform_edt(~brain))
    soft_brain = np.clip(depth + RIM_VOXELS + 0.5, 0, 1)
    csf = np.clip(soft_brain - total, 0, 1)
    return np.stack((csf, gm, wm)).astype(np.float32)


def _draw_grid(
    array: Tensor, config: SynthesisConfig, generator: torch.Generator, patch: Triple, spacing_mm: Spacing
) -> Tensor:
    """A random sampling grid for one sample (C, D, H, W)."""
    thick = thick_axis(spacing_mm)
    angles = [uniform(generator, -config.rotation_degrees, config.rotation_degrees) for _ in range(3)]
    scales = np.diag([uniform(generator, 1 - config.scale, 1 + config.scale) for _ in range(3)])
    shear = np.eye(3)
    for row, column in ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)):
        shear[row, column] = uniform(generator, -config.shear, config.shear)
    if thick is not None:
        scales[thick, thick] = 1
        shear[thick, :] = shear[:, thick] = np.eye(3)[thick]
    turn = rotation_matrix(*turns_allowed(angles, thick))
    matrix = in_voxels(np.linalg.inv(turn @ shear @ scales), spacing_mm)
    std_voxels = uniform(generator, 0, config.elastic_voxels)
    displacement = draw_displacement(generator, std_voxels, _control_points(config, patch), patch, spacing_mm)
    _, depth, height, width = array.shape
    return sampling_grid(matrix, displacement, (depth, height, width), patch, array.device)


def _control_points(config: SynthesisConfig, patch: Triple) -> int:
    return round(max(patch) / config.elastic_spacing) + 2


def _draw_contrasts(config: SynthesisConfig, generator: torch.Generator, device: torch.device) -> Tensor:
    """Mean and standard deviation (2, CONTRASTS) of every possible label.

    Drawn for all of them, so that the device need not be asked which labels are present (a wait) and so that a
    label's contrast does not depend on the others in the patch.
    """
    bounds = torch.tensor((config.mean, config.std))
    table = bounds[:, :1] + (bounds[:, 1:] - bounds[:, :1]) * torch.rand((2, CONTRASTS), generator=generator)
    if config.tissues and happens(generator, config.tissue_probability):
        bounds_of_tissues = (config.mean,) * len(config.tissues)
        if config.families:
            bounds_of_tissues = config.families[int(torch.randint(len(config.families), (), generator=generator))]
        for tissue, (low, high) in zip(config.tissues, bounds_of_tissues, strict=True):
            spread = torch.randn(len(tissue), generator=generator) * config.tissue_spread
            table[0, list(tissue)] = (uniform(generator, low, high) + spread).clamp_(min=0)
    for group in config.groups:
        if group:
            table[:, list(group)] = table[:, group[0], None]
    if not happens(generator, config.textured_background_probability):
        table[:, 0] = 0
    return table.to(device)


def _whole_voxels(fine: Tensor, finer: int) -> Tensor:
    """The mean over each image voxel of (1, D, H, W)."""
    return fine if finer == 1 else F.avg_pool3d(fine[None], finer)[0]


def _is_target(label: Tensor, config: SynthesisConfig) -> Tensor:
    """Bool: voxels whose label is returned; ignored ones (-1) stay ignored."""
    if not config.targets:
        return label != 0
    return _is_among(label, config.targets) | (label < 0)


def _is_among(label: Tensor, values: tuple[int, ...]) -> Tensor:
    return torch.isin(label, torch.tensor(values, device=label.device))


def _tight_mask(tissue: Tensor, generator: torch.Generator) -> Tensor:
    """A mask of a brain, bool (1, D, H, W): its tissue with what lies deep in sulci, and a margin of random width."""
    mask = _grown(tissue.float(), MASK_CLOSING_VOXELS)
    mask = -_grown(-mask, MASK_CLOSING_VOXELS)
    margin = int(torch.randint(MASK_MARGIN_VOXELS + 1, (), generator=generator))
    return _grown(mask, margin) > 0


def _grown(mask: Tensor, voxels: int) -> Tensor:
    """The largest value within a cube of `voxels` to each side, axis by axis; beyond the border there is nothing."""
    for axis in range(3):
        size, padding = [1, 1, 1], [0, 0, 0]
        size[axis], padding[axis] = 2 * voxels + 1, voxels
        mask = F.max_pool3d(mask[None], size, stride=1, padding=padding)[0]
    return mask


def _acquire(mean: Tensor, std: Tensor, present: Tensor, config: SynthesisConfig, generator: torch.Generator) -> Tensor:
    """The image (1, D, H, W) that a random scanner makes of the objects; `present`: what is not background."""
    device, shape = mean.device, tuple(mean.shape)
    # A magnitude, as scanners give: no negative signal, and no exact zero except where the background is masked.
    image = torch.addcmul(mean, std, normal_noise(generator, shape, device)).abs_()
    image = _blur(image, uniform(generator, 0, config.blur_voxels))
    control = torch.randn((1, 4, 4, 4), generator=generator) * uniform(generator, 0, config.bias_field)
    image = apply_bias_field(image, control)
    exponent = torch.randn((), generator=generator).mul(config.gamma_std).exp().item()
    top = image.amax().clamp_min(1e-3)
    image = top * (image / top).clamp_(0, 1).pow_(exponent)
    if happens(generator, config.low_resolution_probability):
        factor = uniform(generator, 1, config.low_resolution)
        factors = [factor, factor, factor]
        if happens(generator, 0.5):
            axis = int(torch.randint(3, (), generator=generator))
            factors = [1.0, 1.0, 1.0]
            factors[axis] = uniform(generator, 1, config.thick_slices)
        image = apply_low_resolution(image, (factors[0], factors[1], factors[2]))
    noise_std = uniform(generator, 0, config.noise_std)
    image = torch.add(image, normal_noise(generator, shape, device), alpha=noise_std).abs_()
    if not happens(generator, config.zero_background_probability):
        present = torch.ones_like(present)
    return _standardise(image, present)


def _blur(image: Tensor, sigma_voxels: float) -> Tensor:
    """Gaussian blur of (1, D, H, W); sigma below 0.75 voxels, so three taps hold the kernel's weight."""
    side = float(np.exp(-0.5 / max(sigma_voxels, 1e-3) ** 2))
    kernel = torch.tensor([side, 1.0, side], device=image.device) / (1 + 2 * side)
    for axis in range(3):
        shape, padding = [1, 1, 1], [0] * 6
        shape[axis] = 3
        padding[4 - 2 * axis : 6 - 2 * axis] = [1, 1]
        image = F.conv3d(F.pad(image[None], padding, mode="replicate"), kernel.reshape(1, 1, *shape))[0]
    return image


def _standardise(image: Tensor, inside: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 where `inside`; elsewhere what zero becomes by that. As `preprocessing.prepare`.

    Without boolean indexing: the device would have to be waited for.
    """
    image = image * inside
    count = inside.sum().clamp_min(1)
    mean = image.sum() / count
    std = (((image - mean) * inside).square().sum() / count).sqrt().clamp_min(1e-6)
    scaled = (image - mean) / std
    return torch.where(inside, scaled, scaled.clamp_min(DARKEST))


def _check_patch(array: Tensor, patch: Triple) -> None:
    shape = tuple(array.shape[2:])
    if any(wanted < 1 or wanted > size for wanted, size in zip(patch, shape, strict=True)):
        raise InvresError(
            f"The patch must have 1 or more voxels and fit into the maps of {list(shape)}, got {list(patch)}.",
            hint="Pad the maps or choose a smaller patch.",
        )


def _as_probability(array: np.ndarray) -> np.ndarray:
    if np.issubdtype(array.dtype, np.integer):
        return array.astype(np.float32) / np.iinfo(array.dtype).max
    return np.clip(array.astype(np.float32), 0, 1)


def _largest(mask: np.ndarray) -> np.ndarray:
    if not mask.any():
        raise InvresError("The maps are empty: no voxel stands out.")
    return largest_piece(mask)


def _closed(mask: np.ndarray, radius_voxels: int) -> np.ndarray:
    """Closing by a ball, by distances (a ball of this size as structuring element takes minutes), then filled."""
    padded = np.pad(mask, radius_voxels + 1)
    grown = ndimage.distance_transform_edt(~padded) <= radius_voxels
    closed = ndimage.distance_transform_edt(grown) > radius_voxels
    inner = slice(radius_voxels + 1, -radius_voxels - 1)
    return ndimage.binary_fill_holes(closed[inner, inner, inner])


def _head_mask(image: np.ndarray) -> np.ndarray:
    """Everything that is not air: bright tissue, closed over skull and sinuses, filled."""
    return _closed(_largest(image > 0.5 * threshold_otsu(image)), radius_voxels=5)
