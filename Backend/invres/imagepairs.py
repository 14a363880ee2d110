"""Pairs of one scan at low and at high resolution, kept on disk for a run, and training patches cut from them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import Cancelled, InvresError
from .config import TrainingConfig
from .enhancementconfig import EnhancementConfig, EnhancementPlan
from .enhancementscaling import restored, scaled_input, scaled_target
from .enhancementscores import cubic
from .events import SILENT, Reporter
from .files import stamps_of, written_whole
from .networks import BORDER
from .sampling import cut_padded
from .scans import ScanFiles, read_scan

__all__ = ["ImagePair", "PatchPairs", "PatchScores", "choose_centres", "plan_of", "prepare_pairs", "z_scores"]

Triple = tuple[int, int, int]
_PARTS = ("low", "high", "low_mask", "high_mask")


@dataclass(frozen=True, eq=False)
class ImagePair:
    """low: (C, d, h, w), high: (C, d * f0, ...), on grids that cover the same place; their masks without C.

    Diffusion tensors in mm2/s; plain images z-scored by the low-resolution one inside its mask. Canonical orientation.
    """

    low: np.ndarray
    high: np.ndarray
    low_mask: np.ndarray
    high_mask: np.ndarray


def z_scores(image: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of (C, D, H, W) inside the mask, by which plain images are scaled: MR has no unit."""
    inside = image[:, mask].astype(np.float64)
    return float(inside.mean()), max(float(inside.std()), 1e-8)


def prepare_pairs(
    scans: Sequence[ScanFiles],
    config: EnhancementConfig,
    factor: Triple,
    folder: Path,
    report: Reporter = SILENT,
    stopped: Callable[[], bool] = lambda: False,
) -> list[ImagePair]:
    """The scans at both resolutions, from `folder` where they were prepared before; arrays are memory maps.

    Raises InvresError for a scan that cannot be read; Cancelled between two scans once `stopped` says so.
    """
    pairs = []
    report.progress("prepare.scans", 0, len(scans))
    for count, files in enumerate(scans, start=1):
        if stopped():
            raise Cancelled("Stopped while the scans were prepared.", hint="Give the same command again to go on.")
        stamps = stamps_of(files.all())
        key = hashlib.sha256(json.dumps([stamps, config.kind, config.largest_b, factor]).encode()).hexdigest()[:16]
        kept = [folder / f"pair-{key}-{part}.npy" for part in _PARTS]
        # The last one is written last: with it all are there.
        if not kept[-1].is_file():
            for path, array in zip(kept, _read_pair(files, config, factor, report), strict=True):
                with written_whole(path) as temporary, open(temporary, "wb") as stream:
                    np.save(stream, array)
        pairs.append(ImagePair(*(np.load(path, mmap_mode="r") for path in kept)))
        report.progress("prepare.scans", count, len(scans))
    return pairs


def _read_pair(
    files: ScanFiles, config: EnhancementConfig, factor: Triple, report: Reporter
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    scan = read_scan(files, config.kind, config.largest_b, report).cut(factor)
    reduced = scan.reduced(factor)
    if not reduced.mask.any():
        raise InvresError(f"The mask of the scan {files.name} is empty at low resolution.")
    low, high = reduced.channels(), scan.channels()
    if config.kind == "image":
        mean, std = z_scores(low, reduced.mask)
        low, high = (low - mean) / std, (high - mean) / std
    return low.astype(np.float32), high.astype(np.float32), reduced.mask, scan.mask


def plan_of(pairs: Sequence[ImagePair], config: EnhancementConfig) -> EnhancementPlan:
    """Mean and standard deviation of each channel over the masks of all pairs, at low and at high resolution."""

    def figures(volumes: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        count = sum(int(mask.sum()) for mask in masks)
        inside = [np.asarray(v)[:, m].astype(np.float64) for v, m in zip(volumes, masks, strict=True)]
        mean = np.sum([part.sum(axis=1) for part in inside], axis=0) / count
        square = np.sum([((part - mean[:, None]) ** 2).sum(axis=1) for part in inside], axis=0) / count
        return mean, np.sqrt(np.maximum(square, 1e-30))

    low = figures([pair.low for pair in pairs], [pair.low_mask for pair in pairs])
    high = figures([pair.high for pair in pairs], [pair.high_mask for pair in pairs])
    input_mean, input_std, target_mean, target_std = (tuple(values.tolist()) for values in (*low, *high))
    scales = input_mean, input_std, target_mean, target_std
    return EnhancementPlan(config.kind, *scales, config.largest_b, config.residual)


def choose_centres(
    pairs: Sequence[ImagePair], patch: Triple, config: EnhancementConfig, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Central voxels (pair, d, h, w) of training and of validation patches, at low resolution.

    From each pair `config.patches` voxels of its mask, or all where it has fewer, whose output lies in the volume; of
    all of them together `config.held_out` for validation. Raises InvresError where there are fewer than two.
    """
    random = np.random.RandomState(np.random.SeedSequence([seed, len(pairs)]).generate_state(4))
    chosen = []
    for place, pair in enumerate(pairs):
        before = [size // 2 - BORDER for size in patch]
        behind = [size - BORDER - size // 2 for size in patch]
        inside = np.zeros(pair.low_mask.shape, bool)
        inside[
            tuple(slice(b, max(b, n - a + 1)) for b, a, n in zip(before, behind, pair.low_mask.shape, strict=True))
        ] = True
        voxels = np.argwhere(inside & pair.low_mask)
        order = random.permutation(len(voxels))[: config.patches]
        chosen.append(np.column_stack([np.full(len(order), place), voxels[order]]))
    centres = np.concatenate(chosen)
    if len(centres) < 2:
        raise InvresError(
            f"The scans are too small for patches of {'x'.join(map(str, patch))} voxels at low resolution.",
            hint="Give larger scans, or a smaller training.patch (5 voxels or more).",
        )
    centres = centres[random.permutation(len(centres))]
    held_out = min(max(1, round(config.held_out * len(centres))), len(centres) - 1)
    return centres[held_out:], centres[:held_out]


class PatchPairs:
    """Batches of patches around given centres: (N, C, *patch) and, as the network gives it, the target at their middle.

    Each centre is used once before any is used again; a batch is a pure function of seed and iteration. Where a patch
    reaches beyond the volume the border is repeated. Both sides are scaled by `plan` (see `enhancementscaling`).
    """

    def __init__(
        self,
        pairs: Sequence[ImagePair],
        centres: np.ndarray,
        plan: EnhancementPlan,
        factor: Triple,
        config: TrainingConfig,
        device: torch.device,
    ):
        self.pairs, self.centres, self.plan, self.factor = pairs, centres, plan, factor
        self.config, self.device = config, device
        self._turn = (-1, np.empty(0, int))

    def batch(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        places = range(iteration * self.config.batch_size, (iteration + 1) * self.config.batch_size)
        return self.patches([self._centre(place) for place in places])

    def patches(self, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The patches around these centres (their numbers)."""
        low, high = self.unscaled(chosen)
        return scaled_input(low, self.plan), scaled_target(high, low, self.plan, self.factor)

    def unscaled(self, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in the unit of a pair, with the middle at high resolution as (N, C, (d - 4) * f0, ...)."""
        low, high = zip(*(self._cut(*self.centres[index]) for index in chosen), strict=True)
        return torch.from_numpy(np.stack(low)).to(self.device), torch.from_numpy(np.stack(high)).to(self.device)

    def _centre(self, place: int) -> int:
        turn, position = divmod(place, len(self.centres))
        if self._turn[0] != turn:
            random = np.random.RandomState((self.config.seed * 1_000_003 + turn) % 2**32)
            self._turn = turn, random.permutation(len(self.centres))
        return int(self._turn[1][position])

    def _cut(self, pair: int, *centre: int) -> tuple[np.ndarray, np.ndarray]:
        corner = [int(c) - size // 2 for c, size in zip(centre, self.config.patch, strict=True)]
        low = cut_padded(self.pairs[pair].low, corner, self.config.patch, None)
        fine = [(c + BORDER) * f for c, f in zip(corner, self.factor, strict=True)]
        size = [(s - 2 * BORDER) * f for s, f in zip(self.config.patch, self.factor, strict=True)]
        return low, cut_padded(self.pairs[pair].high, fine, size, None)


class PatchScores:
    """Root mean square errors over patches that are not trained on."""

    def __init__(self, patches: PatchPairs):
        self._patches = patches

    def validate(self, network: torch.nn.Module) -> dict[str, float]:
        """In units of the target's standard deviation, as "mean"."""
        total, count = 0.0, 0
        size = self._patches.config.batch_size
        numbers = range(len(self._patches.centres))
        with torch.no_grad():
            for start in range(0, len(numbers), size):
                image, target = self._patches.patches(numbers[start : start + size])
                total += float((network(image).double() - target).square().sum())
                count += target.numel()
        return {"mean": math.sqrt(total / count)}

    def compared(self, network: torch.nn.Module) -> dict[str, float]:
        """The same in the target's own unit, beside that of cubic interpolation of the same patches."""
        patches, squares, count = self._patches, {"RMSE": 0.0, "RMSE of cubic interpolation": 0.0}, 0
        for start in range(0, len(patches.centres), patches.config.batch_size):
            numbers = range(len(patches.centres))[start : start + patches.config.batch_size]
            low, wanted = patches.unscaled(numbers)
            with torch.no_grad():
                output = network(scaled_input(low, patches.plan))
            found = restored(output, low, patches.plan, patches.factor)
            rough = np.stack([cubic(one, patches.factor, BORDER) for one in low.cpu().numpy()])
            squares["RMSE"] += float((found - wanted).double().square().sum())
            squares["RMSE of cubic interpolation"] += float(((rough - wanted.cpu().numpy()) ** 2).sum(dtype=np.float64))
            count += wanted.numel()
        return {name: math.sqrt(total / count) for name, total in squares.items()}
