"""From a prepared image to probabilities: a sliding window with Gaussian weights, within the memory that there is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import OutOfMemory
from .config import LabelScheme
from .events import SILENT, Reporter
from .faults import is_out_of_memory
from .livebytes import LiveBytes
from .mirroring import flips_of
from .networks import SegmentationNetwork
from .preprocessing import PreparedCase
from .segmentoptions import SegmentOptions
from .slidingwindow import mirrored_logits, sliding_window, window_starts

__all__ = [
    "Prediction",
    "SegmentOptions",
    "confidence_of",
    "predict_probabilities",
    "predict_within_memory",
    "window_count",
    "window_within",
]

Triple = tuple[int, int, int]
SMALLEST_WINDOW = 32


@torch.no_grad()
def predict_probabilities(
    network: Callable[[torch.Tensor], Any],
    image: torch.Tensor,
    window: Triple,
    regions: bool,
    options: SegmentOptions = SegmentOptions(),
    stitch_device: torch.device | str | None = None,
    report: Reporter = SILENT,
) -> torch.Tensor:
    """Probabilities (K, D, H, W) float32 of one prepared image (C, D, H, W), by a sliding window.

    Logits are averaged with Gaussian weights (sigma = 1/8 of the window) in float32 on `stitch_device`, then passed
    through softmax (sigmoid for regions). Mirrored predictions are averaged as logits too; without mirror axes there
    are none.
    """
    flips = flips_of(options.mirror_axes or ())
    total = len(flips) * window_count(image.shape[1:], window, options.overlap)
    done = 0
    report.progress("segment.tiles", 0, total)

    def predict(tiles: torch.Tensor) -> torch.Tensor:
        nonlocal done
        logits = mirrored_logits(network, tiles, flips)
        done += tiles.shape[0] * len(flips)
        report.progress("segment.tiles", done, total)
        return logits

    # For a batch of one and small maps torch's CPU convolution leaves oneDNN for a path five times slower.
    batch = 2 if image.device.type == "cpu" else 1
    logits = sliding_window(predict, image, window, options.overlap, batch, stitch_device or image.device)
    return logits.sigmoid_() if regions else _softmax_in_place(logits)


def _softmax_in_place(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the first axis without a second array of its size."""
    logits -= logits.amax(dim=0)
    logits.exp_()
    logits /= logits.sum(dim=0)
    return logits


def confidence_of(probabilities: np.ndarray | torch.Tensor, regions: bool) -> float:
    """The mean probability of the chosen labels (K, D, H, W) over their own voxels; 0 where nothing is found.

    As the network gave them: loose pieces count, too, which a model of one piece leaves out of the label map.
    Plane by plane, so that it needs no memory to speak of.
    """
    total, count = 0.0, 0
    for plane in torch.as_tensor(probabilities).unbind(dim=1):
        if regions:
            chosen = plane[plane > 0.5]
        else:
            best, label = plane.max(dim=0)
            chosen = best[label > 0]
        total += float(chosen.sum(dtype=torch.float64))
        count += len(chosen)
    return total / count if count else 0.0


def window_count(shape: tuple[int, ...], window: Triple, overlap: float) -> int:
    """How many windows cover an image of this shape."""
    return math.prod(len(window_starts(size, length, overlap)) for size, length in zip(shape, window, strict=True))


def window_within(window: Triple, patch: Triple, shape: Triple) -> Triple:
    """The window, no longer along any axis than the image or, where that is shorter, than the model's own: what is
    beyond both is filled up with repeated border, which costs memory and tells the network nothing.

    window: (0, 0, 0) for `patch`, the model's own."""
    asked = window if min(window) > 0 else patch
    depth, height, width = (min(wanted, max(own, size)) for wanted, own, size in zip(asked, patch, shape, strict=True))
    return depth, height, width


@dataclass(frozen=True)
class Prediction:
    """window: the one that had room. measured_bytes: peak of live tensors; on a card that of its allocator."""

    probabilities: np.ndarray
    window: Triple
    windows: int
    measured_bytes: int


def predict_within_memory(
    scheme: LabelScheme,
    patch: Triple,
    network: SegmentationNetwork,
    prepared: PreparedCase,
    options: SegmentOptions,
    report: Reporter,
) -> Prediction:
    device = next(network.parameters()).device
    shape: Triple = prepared.image.shape[1:]
    wanted = window_within(options.window, patch, shape)
    window, stitch = wanted, device
    while True:
        try:
            return _predict_measured(scheme, network, device, prepared, window, options, stitch, report)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        smaller: Triple = tuple(min(size, max(SMALLEST_WINDOW, size // 2)) for size in window)  # type: ignore[assignment]
        if stitch.type == "cuda":
            stitch = torch.device("cpu")
            report.warning("The GPU's memory ran out; the windows are now joined in main memory, which is slower.")
        elif smaller != window:
            window = smaller
            report.warning(f"Memory ran out; the window is now {'x'.join(map(str, window))} voxels.")
        elif device.type == "cuda":
            device, window = torch.device("cpu"), wanted
            network.to(device)
            report.warning("The GPU has too little free memory for this model; the CPU takes over, which is slower.")
        else:
            raise OutOfMemory(
                "There is not enough memory to segment this volume, even in the smallest windows.",
                hint="Close other programs, or crop the volume to the region of interest.",
            )


def _predict_measured(
    scheme: LabelScheme,
    network: SegmentationNetwork,
    device: torch.device,
    prepared: PreparedCase,
    window: Triple,
    options: SegmentOptions,
    stitch: torch.device,
    report: Reporter,
) -> Prediction:
    image = torch.from_numpy(prepared.image)
    probe = LiveBytes()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        found = predict_probabilities(network, image.to(device), window, scheme.regions, options, stitch, report)
        measured = torch.cuda.max_memory_allocated(device)
    else:
        probe.watch([image, *network.parameters(), *network.buffers()])
        with probe:
            found = predict_probabilities(network, image, window, scheme.regions, options, stitch, report)
        measured = probe.peak
    count = window_count(prepared.image.shape[1:], window, options.overlap)
    return Prediction(found.cpu().numpy(), window, count, measured)
