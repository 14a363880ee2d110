"""Training batches from label maps alone: no image is needed, every contrast is drawn at random (SynthSeg's idea)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from . import InvresError
from .config import LabelScheme, TrainingConfig
from .preprocessing import nonzero_box
from .randomness import happens, uniform
from .sampling import cut_padded, seeded_generator
from .synthesis import input_patch, synthesise
from .synthesisconfig import LabelMapConfig, SynthesisConfig

__all__ = ["LabelMapBatches"]

PLACE, SYNTHESISE = 6, 7


class LabelMapBatches:
    """Batches synthesised from label maps (D, H, W) in canonical orientation (last axis: to the right).

    maps: int16, with the values of the files. Patches lie with their centre in the box around the scheme's labels.
    Everything but the choice of the patch is computed on the training device; a batch is a pure function of seed and
    iteration. Raises InvresError for regions and, if these maps are to be `complete`, for a label that none has.
    """

    def __init__(
        self,
        maps: Sequence[np.ndarray],
        scheme: LabelScheme,
        label_maps: LabelMapConfig,
        config: TrainingConfig,
        device: torch.device,
        complete: bool = True,
    ):
        if scheme.regions:
            raise InvresError("Training on label maps alone needs labels that exclude one another, not regions.")
        self.config, self.device, self._settings = config, device, label_maps
        values = sorted({int(value) for one in maps for value in np.unique(one)} | {0})
        # Small numbers without gaps keep the table of contrasts short, whatever the values of the files are.
        self._code = {value: code for code, value in enumerate(values)}
        target = np.zeros(len(values), np.int16)
        for number, label in enumerate(scheme.labels, start=1):
            codes = [self._code[value] for value in label.values if value in self._code]
            if not codes and complete:
                raise InvresError(
                    f"No label map has a value of {label.name} ({', '.join(map(str, label.values))}).",
                    hint="Correct the labels of the recipe, or leave this one out.",
                )
            target[codes] = number
        mirror = np.arange(len(values), dtype=np.int16)
        for left, right in label_maps.mirrored:
            if left in self._code and right in self._code:
                mirror[self._code[left]], mirror[self._code[right]] = self._code[right], self._code[left]
        self._mirror = mirror
        self._maps = [np.searchsorted(values, one).astype(np.int16) for one in maps]
        self._boxes = [
            [part.indices(size)[:2] for part, size in zip(nonzero_box([target[one]]), one.shape, strict=True)]
            for one in self._maps
        ]
        self._target = torch.from_numpy(target).to(device)

        def with_codes(synthesis: SynthesisConfig) -> SynthesisConfig:
            return dataclasses.replace(
                synthesis,
                groups=self._codes(label_maps.same_contrast or label_maps.mirrored),
                tissues=self._codes(label_maps.similar),
                targets=tuple(np.flatnonzero(target).tolist()),
                fluid=self._codes((label_maps.fluid,))[0],
            )

        self._synthesis = with_codes(label_maps.synthesis)
        self._beginning = with_codes(label_maps.beginning or label_maps.synthesis)
        depth, height, width = (label_maps.finer * size for size in config.patch)
        self.patch_in = input_patch(self._synthesis, (depth, height, width))

    def batch(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(image (N, 1, D, H, W) float32, target int16 (N, D, H, W) with 1..n for the scheme's labels)."""
        settings, images, targets = self._settings, [], []
        synthesis = self._beginning if iteration < settings.beginning_iterations else self._synthesis
        for place in range(iteration * self.config.batch_size, (iteration + 1) * self.config.batch_size):
            generator = seeded_generator(self.config.seed, place, SYNTHESISE)
            image, codes = synthesise(self._cut(place), synthesis, generator, self.config.patch, finer=settings.finer)
            gain = math.exp(uniform(generator, -settings.gain, settings.gain))
            images.append(image.mul_(gain).add_(uniform(generator, -settings.offset, settings.offset)))
            targets.append(self._target[codes[:, 0].long()])
        return torch.cat(images), torch.cat(targets)

    def volumes_ml(self, spacing_mm: tuple[float, float, float]) -> list[list[float]]:
        """The volume of each label in each map. spacing_mm: of an image voxel."""
        voxel_ml = math.prod(spacing_mm) / self._settings.finer**3 / 1000
        target = self._target.cpu().numpy()
        counts = (np.bincount(target[one].ravel(), minlength=target.max() + 1)[1:] for one in self._maps)
        return [(count * voxel_ml).tolist() for count in counts]

    def _cut(self, place: int) -> torch.Tensor:
        """A part of size `patch_in` of a map, perhaps mirrored, in codes: int16 (1, 1, ...)."""
        turn, position = divmod(place, len(self._maps))
        order = np.random.RandomState((self.config.seed * 1_000_003 + turn) % 2**32).permutation(len(self._maps))
        index = int(order[position])
        generator = seeded_generator(self.config.seed, place, PLACE)
        corner = []
        for (low, high), outer, inner in zip(self._boxes[index], self.patch_in, self.config.patch, strict=True):
            reach = inner * self._settings.finer // 2
            # Patches stay inside the box of the labels; along an axis where they are wider they lie in its middle.
            low, high = min(low + reach, (low + high) // 2), max(high - reach, (low + high) // 2)
            corner.append(round(uniform(generator, low, high)) - outer // 2)
        part = cut_padded(self._maps[index][None], corner, self.patch_in, 0)
        if self._settings.mirrored and happens(generator, 0.5):
            part = self._mirror[part[..., ::-1]]
        return torch.from_numpy(np.ascontiguousarray(part)).to(self.device)[None]

    def _codes(self, groups: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        """Groups of file values as groups of codes; what is in no map is left out."""
        return tuple(tuple(self._code[value] for value in group if value in self._code) for group in groups)
