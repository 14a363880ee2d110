"""What a training lowers step by step, and how the figure is called by which its epochs are judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from .config import LossWeights, TrainingConfig
from .losses import EnhancementLosses, Losses
from .networks import Network, SegmentationNetwork
from .step import enhancement_step, training_step

__all__ = ["Enhancement", "Objective", "Segmentation"]


class Objective(Protocol):
    """One kind of training.

    terms: names of the losses of a step in metrics.jsonl; the first is what is lowered. score: name of what validation
    gives. larger_is_better: of its "mean".
    """

    @property
    def terms(self) -> tuple[str, ...]: ...
    @property
    def score(self) -> str: ...
    @property
    def larger_is_better(self) -> bool: ...

    def step(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        image: torch.Tensor,
        target: torch.Tensor,
        config: TrainingConfig,
        scaler: torch.amp.GradScaler | None,
    ) -> Losses | EnhancementLosses:
        """One optimizer step. Returns its losses, detached, in the order of `terms`."""
        ...


@dataclass(frozen=True)
class Segmentation:
    """Equation 2. regions: of the label scheme."""

    regions: bool
    weights: LossWeights = field(default_factory=LossWeights)
    terms = ("loss", "cross_entropy", "dice_loss", "reconstruction", "kullback_leibler")
    score = "dice"
    larger_is_better = True

    def step(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        image: torch.Tensor,
        target: torch.Tensor,
        config: TrainingConfig,
        scaler: torch.amp.GradScaler | None,
    ) -> Losses:
        assert isinstance(network, SegmentationNetwork)
        return training_step(
            network,
            optimizer,
            image,
            target,
            self.regions,
            self.weights,
            config.precision,
            scaler,
            config.gradient_clip,
        )


@dataclass(frozen=True)
class Enhancement:
    """The root mean square error of image quality transfer."""

    terms = ("loss",)
    score = "rmse"
    larger_is_better = False

    def step(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        image: torch.Tensor,
        target: torch.Tensor,
        config: TrainingConfig,
        scaler: torch.amp.GradScaler | None,
    ) -> EnhancementLosses:
        return enhancement_step(network, optimizer, image, target, config.precision, scaler, config.gradient_clip)
