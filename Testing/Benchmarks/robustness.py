"""How a brain model bears up: one T1 with known tissue maps, changed in one way at a time, and what Dice is left.

The image is the ICBM152 T1 of the package nilearn (extra `demo`), which no model here was trained on, or the one given.
The labels of the model are joined to CSF, grey and white matter. Every change is made to the volume that a user would
load, so geometry, preparation, windows and the way back are all in it. Changes that move voxels move the reference too.

    python Testing/Benchmarks/robustness.py --model Resources/Models/brain-any-contrast

Run by hand; prints a Markdown table. Images that ought to be told apart (CT, constant) show what is said instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from scipy import ndimage

from invres import InvresError
from invres.console import package_named
from invres.demo import TISSUES, template, tissues_of
from invres.events import Reporter
from invres.expectation import unlike_modality, unlike_result
from invres.inference import load_network, segment_volumes
from invres.metrics import dice_by_label
from invres.prediction import SegmentOptions, confidence_of
from invres.volume import Geometry, Volume, resample

Scene = tuple[str, Volume, np.ndarray]


def rotated(geometry: Geometry, degrees: float) -> Geometry:
    """The same voxels as if the head had lain obliquely in the scanner."""
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(angle / 2), -np.sin(angle / 2)], [0, np.sin(angle / 2), np.cos(angle / 2)]])
    return Geometry(geometry.shape, geometry.spacing_mm, geometry.origin_mm, tilt @ turn @ geometry.direction)


def turned(volume: Volume, reference: np.ndarray, axes: tuple[int, int]) -> tuple[Volume, np.ndarray]:
    """Stored in another order of axes, the header saying so."""
    order = [0, 1, 2]
    order[axes[0]], order[axes[1]] = order[axes[1]], order[axes[0]]
    old = volume.geometry
    geometry = Geometry(
        tuple(old.shape[i] for i in order),
        tuple(old.spacing_mm[i] for i in order),
        old.origin_mm,
        old.direction[:, order],
    )
    return Volume(np.ascontiguousarray(volume.array.transpose(order)), geometry), reference.transpose(order)


def flipped(volume: Volume, reference: np.ndarray, axis: int) -> tuple[Volume, np.ndarray]:
    """Stored backwards along an axis, the header saying so."""
    old = volume.geometry
    origin = np.array(old.origin_mm) + old.direction[:, axis] * old.spacing_mm[axis] * (old.shape[axis] - 1)
    direction = old.direction.copy()
    direction[:, axis] *= -1
    geometry = Geometry(old.shape, old.spacing_mm, tuple(origin), direction)
    return Volume(np.ascontiguousarray(np.flip(volume.array, axis)), geometry), np.flip(reference, axis)


def resliced(volume: Volume, reference: np.ndarray, spacing: tuple[float, float, float]) -> tuple[Volume, np.ndarray]:
    """Acquired with other voxels: averaged over them, then sampled."""
    sigmas = [max(new / old - 1, 0) / 2 for new, old in zip(spacing, volume.geometry.spacing_mm, strict=True)]
    smooth = Volume(ndimage.gaussian_filter(volume.array.astype(np.float32), sigmas), volume.geometry)
    grid = volume.geometry.with_spacing(spacing)
    labels = resample(Volume(reference, volume.geometry), grid, interpolation="label").array
    return resample(smooth, grid), labels


def scenes(image: Volume, reference: np.ndarray) -> Iterator[Scene]:
    """(what was done, the volume, the reference on its grid)."""
    random = np.random.RandomState(0)
    array, geometry = image.array.astype(np.float32), image.geometry
    tissue = float(array[reference == 3].mean())

    def same_grid(new: np.ndarray) -> Volume:
        return Volume(new.astype(np.float32), geometry)

    yield "as it is", image, reference
    yield "stored in the order sagittal", *turned(image, reference, (0, 2))
    yield "stored in the order coronal", *turned(image, reference, (0, 1))
    for axis, name in enumerate(("head to feet", "front to back", "left to right")):
        yield f"stored backwards {name}", *flipped(image, reference, axis)
    yield "oblique header, 20 degrees", Volume(image.array, rotated(geometry, 20)), reference
    for spacing in ((0.7, 0.7, 0.7), (2.0, 2.0, 2.0), (3.0, 1.0, 1.0), (5.0, 1.0, 1.0), (1.0, 5.0, 1.0)):
        yield f"voxels of {'x'.join(f'{s:g}' for s in spacing)} mm", *resliced(image, reference, spacing)
    for part in (0.05, 0.1):
        noise = random.standard_normal(array.shape) * part * tissue
        yield f"noise, {part:.0%} of white matter", same_grid(np.abs(array + noise * (array > 0))), reference
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in array.shape), indexing="ij", sparse=True)
    for strength in (0.3, 0.6):
        yield (
            f"bias field, factor {np.exp(2 * strength):.1f} from side to side",
            same_grid(array * np.exp(strength * (axes[0] + axes[1] - axes[2]) / 1.5)),
            reference,
        )
    half = array.shape[0] // 2
    geometry_half = geometry.crop((slice(half, None), slice(None), slice(None)))
    yield "upper half of the head only", Volume(array[half:], geometry_half), reference[half:]
    centre = np.argwhere(reference == 3).mean(axis=0) + np.array([20, 10, 25])
    distance = np.linalg.norm(np.indices(array.shape).transpose(1, 2, 3, 0) - centre, axis=-1)
    lesion = np.where(distance < 12, 0.45 * tissue, array)
    yield "a dark lesion of 24 mm", same_grid(lesion), np.where(distance < 12, 255, reference)
    yield "negative intensities (minus 300)", same_grid(array - 300), reference
    yield "inverted contrast", same_grid(np.where(array > 0, 1.2 * tissue - array, 0)), reference
    yield "constant", same_grid(np.full_like(array, 7)), reference
    yield "CT-like values", same_grid(np.where(array > 0, 40 + array / tissue * 10, -1000)), reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="name or path of a package")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    package = package_named(options.model)
    network = load_network(package, torch.device(options.device))
    print(f"| {package.name} | {' | '.join(TISSUES.names)} | what it says |\n|---|---|---|---|---|")
    for name, volume, wanted in scenes(*template()):
        print(f"| {name} | {row(package, network, volume, wanted)} |", flush=True)


def row(package, network, volume: Volume, wanted: np.ndarray) -> str:
    manifest = package.manifest
    try:
        labels, probabilities, _ = segment_volumes(package, network, [volume], SegmentOptions(), Reporter())
    except InvresError as error:
        return f"- | - | - | {error.message}"
    found = tissues_of(labels.array, manifest.scheme)
    counted = wanted != 255
    dice = dice_by_label(
        np.stack([(found == t + 1) & counted for t in range(3)]), np.stack([wanted == t + 1 for t in range(3)])
    )
    voxel_ml = float(np.prod(volume.geometry.spacing_mm)) / 1000
    counts = {label.name: int((labels.array == label.output_value).sum()) for label in manifest.scheme.labels}
    volumes = {name: count * voxel_ml for name, count in counts.items()}
    said = unlike_modality(manifest.plan.channels, [volume.array])
    said += unlike_result(manifest.expected, volumes, confidence_of(probabilities, manifest.scheme.regions))
    return f"{' | '.join(f'{value:.3f}' for value in dice)} | {' '.join(said)}"


if __name__ == "__main__":
    main()
