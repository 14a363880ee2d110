"""Training batches: which case, which patch, which augmentation; each a pure function of seed and iteration."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from .augmentation import augment, blank_channels, draw_presence, input_patch
from .config import AugmentationConfig, LabelScheme, PreparationPlan, TrainingConfig
from .preprocessing import PreparedCase, target_table

__all__ = ["BatchSource", "CaseBatches", "cut_padded", "seeded_generator"]

VOXELS_PER_LABEL = 4096  # remembered per case and label as centres of foreground patches
CROP, AUGMENT, BLANK = 1, 2, 5


class BatchSource(Protocol):
    """What the trainer draws from. The same iteration always gives the same batch, so resuming needs no state."""

    def batch(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(image (N, C, D, H, W) float32, target as `losses.segmentation_loss` takes it), on the training device."""
        ...


def seeded_generator(seed: int, *position: int) -> torch.Generator:
    """A CPU generator for one place in the training, independent of all other places."""
    state = np.random.SeedSequence([seed, *position]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


class CaseBatches:
    """Patches of prepared cases, augmented on the training device.

    Every case is used once before any is used again. A patch is centred on a voxel of a randomly chosen label of the
    case with probability `config.foreground_fraction`, else anywhere. Where it reaches beyond the volume the border
    is repeated and the target ignored. The next batch is cut by a thread while the device works on this one.
    Channels that a case lacks are zero, and so are those that `augmentation.channel_dropout` blanks.
    plan: how the cases were prepared; from it come the spacing of their voxels and which channels are CT.
    unlabelled: names of cases whose label is background throughout.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        scheme: LabelScheme,
        config: TrainingConfig,
        augmentation: AugmentationConfig,
        device: torch.device,
        plan: PreparationPlan,
    ):
        self.cases = cases
        self.config = config
        self.augmentation = augmentation
        self.device = device
        self.plan = plan
        self._ct = [place for place, channel in enumerate(plan.channels) if channel.modality == "CT"]
        self.patch_in = input_patch(augmentation, config.patch, plan.spacing_mm)
        self._regions = torch.from_numpy(target_table(scheme)).to(device) if scheme.regions else None
        self._centres = [_label_voxels(case) for case in cases]
        self.unlabelled = [case.name for case, found in zip(cases, self._centres, strict=True) if not found]
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._next: tuple[int, Future[tuple[np.ndarray, np.ndarray, np.ndarray]]] | None = None

    def batch(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._next is not None and self._next[0] == iteration:
            images, labels, present = self._next[1].result()
        else:
            images, labels, present = self._cut(iteration)
        self._next = (iteration + 1, self._thread.submit(self._cut, iteration + 1))
        image = torch.from_numpy(images).to(self.device, non_blocking=True)
        label = torch.from_numpy(labels).to(self.device, non_blocking=True)
        generator = seeded_generator(self.config.seed, iteration, AUGMENT)
        patch, spacing_mm = self.config.patch, self.plan.spacing_mm
        image, moved = augment(image, label, self.augmentation, generator, patch, spacing_mm, self._ct)
        assert moved is not None  # a label went in
        return self._blanked(image, torch.from_numpy(present), iteration), self._target(moved[:, 0])

    def _blanked(self, image: torch.Tensor, present: torch.Tensor, iteration: int) -> torch.Tensor:
        """Zeros, in place, for channels that are not there or left out; after all else, which may make noise there."""
        probability = self.augmentation.channel_dropout
        if probability > 0:
            present = draw_presence(present, probability, seeded_generator(self.config.seed, iteration, BLANK))
        return image if bool(present.all()) else blank_channels(image, present)

    def _target(self, label: torch.Tensor) -> torch.Tensor:
        """Labels (N, D, H, W) as they are; for regions one mask each, float (N, R, D, H, W), -1 = ignore."""
        if self._regions is None:
            return label
        masks = self._regions[:, label.clamp(min=0).long()].transpose(0, 1).to(torch.int8)
        return torch.where(label.unsqueeze(1) < 0, torch.full_like(masks, -1), masks)

    def _cut(self, iteration: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Patches of size `patch_in`: images (N, C, ...) float32, labels (N, 1, ...) int16; and which channels of the
        cases are there, bool (N, C)."""
        images, labels, present = [], [], []
        for place in range(iteration * self.config.batch_size, (iteration + 1) * self.config.batch_size):
            turn, position = divmod(place, len(self.cases))
            order = np.random.RandomState((self.config.seed * 1_000_003 + turn) % 2**32).permutation(len(self.cases))
            index = int(order[position])
            random = np.random.RandomState(np.random.SeedSequence([self.config.seed, place, CROP]).generate_state(4))
            case = self.cases[index]
            corner = self._corner(case, self._centres[index], random)
            images.append(cut_padded(case.image, corner, self.patch_in, None))
            assert case.label is not None  # only labelled cases are trained on
            labels.append(cut_padded(case.label[None], corner, self.patch_in, -1))
            present.append([channel not in case.absent for channel in range(len(case.image))])
        return np.stack(images), np.stack(labels), np.array(present)

    def _corner(self, case: PreparedCase, centres: list[np.ndarray], random: np.random.RandomState) -> list[int]:
        """Where the patch of size `patch_in` starts; its centre part of size `config.patch` stays inside if it fits."""
        shape, patch = case.image.shape[1:], self.config.patch
        if centres and random.random_sample() < self.config.foreground_fraction:
            voxels = centres[random.randint(len(centres))]
            centre = np.unravel_index(voxels[random.randint(len(voxels))], shape)
            shift = [random.randint(-(p // 4), p // 4 + 1) for p in patch]
            start = [int(c) + s - p // 2 for c, s, p in zip(centre, shift, patch, strict=True)]
        else:
            start = [random.randint(0, max(n - p, 0) + 1) for n, p in zip(shape, patch, strict=True)]
        corner = []
        for begin, size, inner, outer in zip(start, shape, patch, self.patch_in, strict=True):
            # A volume smaller than the patch lies in its middle.
            begin = min(max(begin, 0), size - inner) if size >= inner else (size - inner) // 2
            corner.append(begin - (outer - inner) // 2)
        return corner


def _label_voxels(case: PreparedCase) -> list[np.ndarray]:
    """For each label present in the case up to VOXELS_PER_LABEL flat voxel indices."""
    if case.label is None:
        return []
    flat = np.asarray(case.label).ravel()
    found = []
    for value in np.unique(flat[flat > 0]):
        voxels = np.flatnonzero(flat == value)
        if len(voxels) > VOXELS_PER_LABEL:
            voxels = np.random.RandomState(int(value)).choice(voxels, VOXELS_PER_LABEL, replace=False)
        found.append(voxels)
    return found


def cut_padded(array: np.ndarray, corner: Sequence[int], size: Sequence[int], fill: int | None) -> np.ndarray:
    """array[:, corner : corner + size]; beyond the array `fill`, or the border repeated where fill is None."""
    inside, before_after = [slice(None)], [(0, 0)]
    for start, length, whole in zip(corner, size, array.shape[1:], strict=True):
        low, high = min(max(start, 0), whole - 1), max(min(start + length, whole), 1)
        inside.append(slice(low, high))
        before_after.append((max(-start, 0), max(start + length - whole, 0)))
    part = np.asarray(array[tuple(inside)])
    if not any(sum(pair) for pair in before_after):
        return np.ascontiguousarray(part)
    if fill is None:
        return np.pad(part, before_after, mode="edge")
    return np.pad(part, before_after, mode="constant", constant_values=fill)
