"""Batches some of which are synthesised from the training cases' own label maps, for trainings on few cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from . import InvresError
from .config import AugmentationConfig, LabelScheme, PreparationPlan, TrainingConfig
from .preprocessing import PreparedCase, inside_values
from .randomness import happens
from .sampling import BatchSource, CaseBatches, seeded_generator
from .synthesis import background_clusters, input_patch, synthesise
from .synthesisconfig import SynthesisConfig

__all__ = ["MixedBatches", "SyntheticBatches"]

STRUCTURES = 6  # anonymous ones around the labels; chosen
MIX, SYNTHESISE = 3, 4


class SyntheticBatches(CaseBatches):
    """As `CaseBatches`, with images of random contrast made from the label maps.

    What is not labelled is divided, by the intensities of the first channel that the case has, into a few anonymous
    structures, so that the labels lie in an anatomy; of the intensities themselves nothing is kept.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        scheme: LabelScheme,
        config: TrainingConfig,
        device: torch.device,
        plan: PreparationPlan,
        channel_dropout: float = 0.0,
    ):
        if not cases:
            raise InvresError("There is no case to synthesise images from.", hint="Give at least one labelled case.")
        self.channels = cases[0].image.shape[0]
        labels = len(inside_values(scheme))
        maps = [_structures(case, labels, config.seed, place) for place, case in enumerate(cases)]
        super().__init__(maps, scheme, config, AugmentationConfig(channel_dropout=channel_dropout), device, plan)
        self.synthesis = SynthesisConfig(targets=tuple(range(1, labels + 1)))
        self.patch_in = input_patch(self.synthesis, config.patch, plan.spacing_mm)

    def batch(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        maps, _, _ = self._cut(iteration)
        labels = torch.from_numpy(maps).to(self.device)
        generator = seeded_generator(self.config.seed, iteration, SYNTHESISE)
        patch, spacing_mm = self.config.patch, self.plan.spacing_mm
        image, moved = synthesise(labels, self.synthesis, generator, patch, self.channels, spacing_mm=spacing_mm)
        everything = torch.ones(image.shape[:2], dtype=torch.bool)
        return self._blanked(image, everything, iteration), self._target(moved[:, 0])


class MixedBatches:
    """Batches of the first source, and a `fraction` of them of the second; the iteration alone decides which."""

    def __init__(self, real: BatchSource, synthetic: BatchSource, fraction: float, seed: int):
        if not 0 <= fraction <= 1:
            raise InvresError(f"The fraction of synthetic batches must be from 0 to 1, got {fraction}.")
        self._real, self._synthetic, self._fraction, self._seed = real, synthetic, fraction, seed

    def batch(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = happens(seeded_generator(self._seed, iteration, MIX), self._fraction)
        return (self._synthetic if chosen else self._real).batch(iteration)


def _structures(case: PreparedCase, labels: int, seed: int, place: int) -> PreparedCase:
    """The case with, for an image, its label map and above it the numbers of the structures around: int16."""
    assert case.label is not None  # only labelled cases are trained on
    label = np.asarray(case.label)
    image = np.asarray(case.image[next(place for place in range(len(case.image)) if place not in case.absent)])
    try:
        # Prepared images are z-scored; the head is looked for in an image whose air is 0.
        around = background_clusters(
            image - image.min(), label != 0, STRUCTURES, seeded_generator(seed, place, SYNTHESISE)
        )
    except InvresError:  # an image without anything around its labels
        around = np.zeros(label.shape, np.int16)
    numbers = np.where((label == 0) & (around > 0), around + labels, label).astype(np.int16)
    return dataclasses.replace(case, image=numbers[None], label=label, absent=())
