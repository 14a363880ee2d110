"""Image quality transfer on whole volumes: patches through the network, stitched together on a grid of finer voxels."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import InvresError
from .devices import choose_device
from .diffusion import turned
from .enhancementconfig import EnhancementPlan
from .enhancementscaling import restored, scaled_input
from .enhancementscores import cubic, region_errors, regions
from .events import SILENT, Reporter
from .expectation import unlike_spacing
from .imagepairs import z_scores
from .modelpackage import ModelPackage
from .networks import BORDER, ESPCN, build_enhancer
from .outputs import check_outputs
from .scans import Scan, ScanFiles, read_scan
from .volume import Geometry, Volume, write_channels, write_volume

__all__ = [
    "EnhanceOptions",
    "compared",
    "enhance",
    "enhanced",
    "errors_of_scans",
    "finer",
    "loaded_enhancer",
    "stitch",
    "written_scan",
]

Triple = tuple[int, int, int]
BATCH = 16


@dataclass(frozen=True)
class EnhanceOptions:
    """overlap: low-resolution voxels that the outputs of neighbouring patches share; at 0 they lie side by side."""

    device: str = "auto"
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.overlap < 0:
            raise InvresError(f"The overlap must be 0 or more voxels, got {self.overlap}.")


def finer(grid: Geometry, factor: Triple) -> Geometry:
    """The grid of `factor` times as many voxels in the same place: at half the spacing, the first voxel's centre lies a
    quarter of the old spacing further out."""
    spacing = [size / step for size, step in zip(grid.spacing_mm, factor, strict=True)]
    return grid.with_spacing((spacing[0], spacing[1], spacing[2]))


def stitch(
    low: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray],
    patch: Triple,
    factor: Triple,
    channels: int,
    overlap: int = 0,
    skip_empty: bool = False,
    report: Reporter = SILENT,
) -> np.ndarray:
    """The whole volume at high resolution, (channels, d * f0, h * f1, w * f2) float32, from its patches.

    low: (C, d, h, w). predict: patches (N, C, *patch) -> their middles without `BORDER` at high resolution. At the ends
    the border is repeated; where outputs overlap their mean is taken. skip_empty: patches of nothing but 0 give 0.
    Raises InvresError for an overlap that leaves no step.
    """
    inner = [size - 2 * BORDER for size in patch]
    if overlap >= min(inner):
        raise InvresError(
            f"The overlap must be below the {min(inner)} voxels that a patch gives, got {overlap}.",
            hint="0 puts patches side by side.",
        )
    shape = low.shape[1:]
    extra = [max(0, part - size) for part, size in zip(inner, shape, strict=True)]
    padded = np.pad(low, [(0, 0), *((BORDER, BORDER + more) for more in extra)], mode="edge")
    starts = []
    for size, part, more in zip(shape, inner, extra, strict=True):
        last = size + more - part
        starts.append(sorted({*range(0, last, part - overlap), last}))
    result = np.zeros((channels, *((s + e) * f for s, e, f in zip(shape, extra, factor, strict=True))), np.float32)
    counts = np.zeros((1, *result.shape[1:]), np.uint16)
    places = []
    for corner in itertools.product(*starts):
        source = (slice(None), *(slice(c, c + size) for c, size in zip(corner, patch, strict=True)))
        target = (slice(None), *(slice(c * f, (c + n) * f) for c, n, f in zip(corner, inner, factor, strict=True)))
        counts[target] += 1
        if not skip_empty or padded[source].any():
            places.append((source, target))
    report.progress("enhance.patches", 0, len(places))
    for start in range(0, len(places), BATCH):
        some = places[start : start + BATCH]
        found = predict(np.stack([padded[source] for source, _ in some]))
        for (_, target), values in zip(some, found, strict=True):
            result[target] += values
        report.progress("enhance.patches", start + len(some), len(places))
    whole = (slice(None), *(slice(0, size * f) for size, f in zip(shape, factor, strict=True)))
    return (result / counts)[whole]


def enhanced(
    network: ESPCN,
    plan: EnhancementPlan,
    patch: Triple,
    scan: Scan,
    options: EnhanceOptions = EnhanceOptions(),
    report: Reporter = SILENT,
) -> np.ndarray:
    """The scan's channels at high resolution (C, D, H, W) float32, in its own unit, canonical orientation."""
    device = next(network.parameters()).device
    factor = network.config.strides[0]
    low = scan.channels()
    mean, std = z_scores(low, scan.mask) if plan.kind == "image" else (0.0, 1.0)

    def predict(patches: np.ndarray) -> np.ndarray:
        part = (torch.from_numpy(patches).to(device, torch.float32) - mean) / std
        with torch.inference_mode():
            found = restored(network(scaled_input(part, plan)).float(), part, plan, factor)
            return (found * std + mean).cpu().numpy()

    # Around a masked volume of tensors there is nothing to enhance.
    empty = plan.kind == "tensor"
    found = stitch(low, predict, patch, factor, plan.channels, options.overlap, empty, report)
    if empty:
        # A tensor where there is no brain would make it a part of the brain for whoever reads the result.
        found *= np.kron(scan.mask, np.ones(factor, bool))
    return found


def loaded_enhancer(package: ModelPackage, device: torch.device) -> tuple[ESPCN, EnhancementPlan]:
    """The package's network, ready to predict, and its plan. Raises InvresError for a model that segments."""
    plan = package.manifest.enhancement
    if plan is None:
        raise InvresError(f"{package.name} segments images; it does not enhance them.", hint="Use `invres segment`.")
    network = build_enhancer(package.manifest.network)
    network.load_state_dict(package.load_weights())
    return network.to(device).eval(), plan


def enhance(
    package: ModelPackage,
    files: ScanFiles,
    output: Path,
    options: EnhanceOptions = EnhanceOptions(),
    reference: ScanFiles | None = None,
    report: Reporter = SILENT,
) -> dict[str, Any]:
    """Writes the scan at finer voxels, on its own axes: one volume, or six tensor components in the file's frame.

    reference: the truth on the output's grid, to compare with. Returns output, model, spacing_mm and shape (D, H, W of
    the file), seconds, device, and `errors` (see `compared`) where there is a reference.
    Warns where the voxels are of another size than those that the model was trained on.
    Raises InvresError for a model that segments and for files that do not fit the model.
    """
    started = time.monotonic()
    check_outputs([output], [*files.all(), *(reference.all() if reference else ())], also="")
    device = choose_device(options.device)
    network, plan = loaded_enhancer(package, device)
    scan = read_scan(files, plan.kind, plan.largest_b, report)
    for sentence in unlike_spacing(package.manifest.plan.spacing_mm, scan.geometry.spacing_mm):
        report.warning(sentence)
    factor, patch = network.config.strides[0], package.manifest.patch
    truth = None if reference is None else _reference(reference, plan, finer(scan.geometry, factor), report)
    found = enhanced(network, plan, patch, scan, options, report)
    grid = written_scan(output, found, scan, factor)
    errors = {} if truth is None else {"errors": compared(files.name, found, scan, truth, patch, factor)}
    return {
        "output": str(output),
        "model": package.name,
        "spacing_mm": list(grid.spacing_mm),
        "shape": list(grid.shape),
        "seconds": round(time.monotonic() - started, 3),
        "device": str(device),
        **errors,
    }


def errors_of_scans(
    package: ModelPackage,
    scans: Sequence[ScanFiles],
    options: EnhanceOptions = EnhanceOptions(),
    report: Reporter = SILENT,
) -> list[dict[str, Any]]:
    """Each scan reduced as in training, enhanced, compared with itself (see `compared`). Warns as `enhance` does."""
    network, plan = loaded_enhancer(package, choose_device(options.device))
    factor, patch = network.config.strides[0], package.manifest.patch
    errors = []
    for files in scans:
        truth = read_scan(files, plan.kind, plan.largest_b, report).cut(factor)
        low = truth.reduced(factor)
        for sentence in unlike_spacing(package.manifest.plan.spacing_mm, low.geometry.spacing_mm):
            report.warning(f"{files.name}: {sentence}", scan=files.name)
        errors.append(
            compared(files.name, enhanced(network, plan, patch, low, options, report), low, truth, patch, factor)
        )
    return errors


def compared(
    name: str, prediction: np.ndarray, low: Scan, truth: Scan, patch: Triple, factor: Triple
) -> dict[str, Any]:
    """Errors of a prediction (C, D, H, W) and of cubic interpolation of what it was made from, by region.

    Returns name, and "network" and "cubic" with the root mean square error by region, None where that has no voxels.
    """
    parts = regions(low.mask, truth.mask, patch, factor)
    wanted = truth.channels()
    methods = {"network": prediction, "cubic": cubic(low.channels(), factor)}
    return {"name": name, **{method: region_errors(values, wanted, parts) for method, values in methods.items()}}


def _reference(files: ScanFiles, plan: EnhancementPlan, grid: Geometry, report: Reporter) -> Scan:
    truth = read_scan(files, plan.kind, plan.largest_b, report)
    if not truth.geometry.same_as(grid, tolerance_mm=1e-2):
        raise InvresError(
            f"The reference {files.image.name} does not lie on the grid of the result "
            f"({truth.geometry.difference(grid)}).",
            hint="Give an image of half the input's spacing in the same place.",
            code="grid_mismatch",
        )
    return truth


def written_scan(output: Path, channels: np.ndarray, scan: Scan, factor: Triple) -> Geometry:
    """Writes (C, D, H, W) that lie on the scan's grid made finer by `factor`, in the orientation and frame of its file.

    Returns the grid of the file.
    """
    if len(channels) > 1:
        channels = turned(channels, scan.file_frame.T)
    grid = finer(scan.geometry, factor)
    volumes = [Volume(channel, grid).oriented_as(scan.direction) for channel in channels]
    if len(volumes) > 1:
        write_channels(output, volumes)
    else:
        write_volume(output, volumes[0])
    return volumes[0].geometry
