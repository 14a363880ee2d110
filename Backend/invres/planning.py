"""What a segmentation will need before it is begun: memory, the window that fits, and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from . import InvresError
from .devices import device_info
from .events import SILENT, Reporter, format_bytes, format_seconds
from .manifest import Manifest
from .memory import has_room, predict_forward
from .mirroring import flips_of
from .networks import build, build_predictor
from .pace import remember_speed, speed_of, windows_of
from .prediction import window_count, window_within
from .region import region_shape
from .volume import Geometry

__all__ = ["SegmentationPlan", "plan_segmentation"]

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]

# Windows are tried in these parts of the wanted one; below the last the network sees too little.
PARTS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
SMALLEST_SIDE = 32
PROBE_SIDE = 32
PROBE_S = 1.0
FLOAT = 4


@dataclass(frozen=True)
class SegmentationPlan:
    """predicted_bytes: peak on the device with `window`; host_bytes: peak in main memory (the same on the CPU).

    fits: whether the wanted window fits. window: the largest part of the wanted window that fits, or the wanted one if
    none does. windows: how many. windows_known: as a run of this process had them, and not as the whole volume would
    have them. seconds: expected, None where not known. free_bytes, total_bytes: of the device, None where it does not
    tell. shape: of the prepared volume, at most. sentence: all of it in words.
    """

    predicted_bytes: int
    host_bytes: int
    free_bytes: int | None
    total_bytes: int | None
    fits: bool
    window: Triple
    wanted_window: Triple
    windows: int
    windows_known: bool
    seconds: float | None
    device: str
    device_title: str
    shape: Triple
    sentence: str

    def after(self, before: SegmentationPlan) -> SegmentationPlan:
        """The plan of both, one after the other on one device."""
        times = (before.seconds, self.seconds)
        return replace(
            self,
            predicted_bytes=max(before.predicted_bytes, self.predicted_bytes),
            host_bytes=max(before.host_bytes, self.host_bytes),
            fits=before.fits and self.fits,
            windows_known=before.windows_known and self.windows_known,
            seconds=None if None in times else round(sum(filter(None, times)), 1),
            sentence=f"To find the place: {before.sentence} Then: {self.sentence}",
        )


def plan_segmentation(
    manifest: Manifest,
    shape: Triple,
    spacing_mm: Spacing,
    device: torch.device,
    window: Triple = (0, 0, 0),
    roi_shape: Triple | None = None,
    overlap: float = 0.5,
    mirror_axes: Sequence[int] | None = None,
    cut_from: Triple | None = None,
    report: Reporter = SILENT,
) -> SegmentationPlan:
    """The plan for a volume of this shape and spacing, both (D, H, W) in the order of the model's axes (superior,
    anterior, right). roi_shape: voxels of a region of interest. mirror_axes: None = the model's own. cut_from: voxels
    of a whole image that a volume of this shape is cut out of, in each place that another model finds.

    Empty borders are cropped before segmenting, which only the volume itself shows; so this is an upper bound. Only the
    number of windows, and so the time, is that of the last run where an image of this size was segmented before.
    Raises InvresError for sizes that make no sense.
    """
    for name, sizes in (("shape", shape), ("spacing", spacing_mm), ("region", roi_shape or (1, 1, 1))):
        if not all(size > 0 and np.isfinite(size) for size in sizes):
            raise InvresError(f"The {name} must be three sizes above 0, got {list(sizes)}.")
    grid = Geometry(shape, spacing_mm, (0, 0, 0), np.eye(3)[:, ::-1])
    whole = grid.with_spacing(manifest.plan.spacing_mm).shape
    wanted = window_within(window, manifest.patch, whole)
    flips = flips_of(manifest.mirror_axes if mirror_axes is None else mirror_axes)
    here = device_info(device)
    main = here if device.type == "cpu" else device_info(torch.device("cpu"))
    choices = _windows(wanted, build_divisor(manifest))
    report.progress("plan", 0, len(choices) + 1)
    best: tuple[Triple, int, int, Triple] | None = None
    first: tuple[Triple, int, int, Triple] | None = None
    for index, choice in enumerate(choices):
        seen = whole
        if roi_shape is not None:
            box = grid.crop((slice(0, roi_shape[0]), slice(0, roi_shape[1]), slice(0, roi_shape[2])))
            seen = region_shape(box.with_spacing(manifest.plan.spacing_mm).shape, whole, choice)
        on_device, on_host = _bytes(manifest, grid.shape, whole, seen, choice, overlap, device, len(flips) > 1)
        found = choice, on_device, on_host, seen
        first = first or found
        report.progress("plan", index + 1, len(choices) + 1)
        if has_room(on_device, here.free_bytes) and has_room(on_host, main.free_bytes):
            best = found
            break
    assert first is not None
    choice, on_device, on_host, seen = best or first
    count, known = window_count(seen, choice, overlap), None
    if roi_shape is None:
        known = windows_of(manifest.id, replace(grid, shape=cut_from or shape), choice, overlap)
        count = known or count
    seconds = None
    if best is not None:
        per_voxel = _seconds_per_voxel(manifest, device, choice)
        windows = len(flips) * count * float(np.prod(choice))
        seconds = round(per_voxel * windows + _other_seconds(manifest, shape, whole), 1)
    report.progress("plan", len(choices) + 1, len(choices) + 1)
    plan = SegmentationPlan(
        predicted_bytes=on_device,
        host_bytes=on_host,
        free_bytes=here.free_bytes,
        total_bytes=here.total_bytes,
        fits=best is first,
        window=choice,
        wanted_window=wanted,
        windows=count,
        windows_known=known is not None,
        seconds=seconds,
        device=here.name,
        device_title=here.title,
        shape=seen,
        sentence="",
    )
    return replace(plan, sentence=_sentence(plan, _time_text(plan, manifest, cut_from), nothing_fits=best is None))


def build_divisor(manifest: Manifest) -> Triple:
    """What each side of a window should be a multiple of."""
    with torch.device("meta"):
        return build(replace(manifest.network, vae=None)).divisor


def _windows(wanted: Triple, divisor: Triple) -> list[Triple]:
    """The wanted window and smaller ones, largest first."""
    choices = [wanted]
    for part in PARTS[1:]:
        sides = (
            side if side <= SMALLEST_SIDE else max(SMALLEST_SIDE, int(side * part) // d * d)
            for side, d in zip(wanted, divisor, strict=True)
        )
        depth, height, width = sides
        if (depth, height, width) != choices[-1]:
            choices.append((depth, height, width))
    return choices


def _bytes(
    manifest: Manifest,
    shape: Triple,
    whole: Triple,
    seen: Triple,
    window: Triple,
    overlap: float,
    device: torch.device,
    mirrored: bool,
) -> tuple[int, int]:
    """Peaks on the device and in main memory.

    shape: of the input; whole: prepared; seen: the part of it that is predicted.
    """
    channels, classes = manifest.network.in_channels, manifest.network.out_channels
    on_card = device.type == "cuda"
    voxels, prepared = int(np.prod(shape)), int(np.prod(whole))
    # A window larger than the volume is filled up.
    padded = int(np.prod([max(s, w) for s, w in zip(seen, window, strict=True)]))
    predicted = int(np.prod(seen))
    count = window_count(seen, window, overlap)
    batch = 1 if on_card else min(2, count)
    weights, forward = predict_forward(manifest.network, window, batch, manifest.members, mirrored)
    files = channels * voxels * FLOAT
    image = channels * predicted * FLOAT
    logits = classes * predicted * FLOAT
    filled_up = channels * padded * FLOAT if padded > predicted else 0
    # The logits of a batch are weighted, and in the end a softmax needs one map for its sums.
    joining = (batch * classes + 1) * int(np.prod(window)) * FLOAT
    predicting = weights + image + filled_up + logits + max(forward, joining, predicted * FLOAT)
    # In canonical orientation, one channel at a time resampled (ITK holds its own copies) and scaled: by its voxels in
    # double precision and their mask, beside a copy of the channel where that comes first.
    scaling = 18 * voxels if manifest.plan.normalise_first else 14 * prepared
    preparing = 2 * files + channels * prepared * FLOAT + max(2 * voxels * FLOAT + 2 * prepared * FLOAT, scaling)
    restoring = files + image + classes * predicted * FLOAT + 5 * voxels
    if on_card:
        return predicting, max(preparing, restoring)
    everything = max(preparing + weights, files + predicting, restoring + weights)
    return everything, everything


def _seconds_per_voxel(manifest: Manifest, device: torch.device, window: Triple) -> float:
    """From the last run; else from windows on made-up data, the largest that takes about a second."""
    known = speed_of(manifest.sha256, str(device))
    if known is not None:
        return known
    network = build_predictor(manifest.network, manifest.members).eval().to(device)
    start, side = time.perf_counter(), PROBE_SIDE
    while True:
        depth, height, width = (min(side, extent) for extent in window)
        sides = depth, height, width
        taken_s = _timed(network, manifest.network.in_channels, sides, device)
        per_voxel = taken_s / float(np.prod(sides))
        side *= 2
        # The next size takes about eight times as long, twice.
        next_s = per_voxel * 2 * float(np.prod([min(side, extent) for extent in window]))
        if sides == tuple(window) or time.perf_counter() - start + next_s > PROBE_S:
            remember_speed(manifest.sha256, str(device), 1, sides, taken_s)
            return per_voxel


@torch.no_grad()
def _timed(network: torch.nn.Module, channels: int, sides: tuple[int, ...], device: torch.device) -> float:
    """Seconds of one window, after a first one that warms up."""
    batch = 1 if device.type == "cuda" else 2
    tiles = torch.randn(batch, channels, *sides, device=device)
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        network(tiles)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return seconds / batch


def _other_seconds(manifest: Manifest, shape: Triple, whole: Triple) -> float:
    """Reading, preparing, restoring and writing; figures of a machine of 2024, the order of magnitude counts."""
    voxels, prepared = float(np.prod(shape)), float(np.prod(whole))
    channels, classes = manifest.network.in_channels, manifest.network.out_channels
    return 0.3 + channels * (voxels + prepared) * 1e-7 + classes * voxels * 3e-8


def _time_text(plan: SegmentationPlan, manifest: Manifest, cut_from: Triple | None) -> str:
    """The time in words, as sure as it is; "" where it is not known."""
    if plan.seconds is None:
        return ""
    time_text = format_seconds(max(1, plan.seconds))
    if plan.windows_known:
        return f", about {time_text}"
    if cut_from is not None:  # in how many places, only the other model will find out
        return f", about {time_text} for each place"
    return f", at most about {time_text}" if manifest.plan.crop_to_nonzero else f", about {time_text}"


def _sentence(plan: SegmentationPlan, time_text: str, nothing_fits: bool) -> str:
    free = "" if plan.free_bytes is None else f" of {format_bytes(plan.free_bytes)} free"
    where = "in main memory" if plan.device == "cpu" else f"on {plan.device} ({plan.device_title})"
    need = f"{format_bytes(plan.predicted_bytes)}{free} {where}"
    size = " x ".join(map(str, plan.window))
    if nothing_fits:
        other = "choose a region of interest" if plan.device == "cpu" else "choose the CPU or a region of interest"
        return f"Needs {need}, which is too little: {other}, or close other programs."
    count = "1 window" if plan.windows == 1 else f"{plan.windows} windows"
    if plan.fits:
        return f"Needs {need}{time_text} ({count} of {size} voxels)."
    wanted = " x ".join(map(str, plan.wanted_window))
    return f"The window of {wanted} voxels does not fit; {count} of {size} need {need}{time_text}."
