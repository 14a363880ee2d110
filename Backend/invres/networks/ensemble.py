"""Several networks as one: the average of what they say, as of the folds of a cross-validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from ..reversible import Readout
from .base import SegmentationNetwork

__all__ = ["ANY", "INTENSITIES", "Ensemble"]

ANY = 1e30
"""A limit that no intensity reaches, for channels that are not clipped; finite, as all weights of a package are."""

INTENSITIES = ("low", "high", "factor", "offset")
"""The names of what turns shared intensities into those of a member."""


class Ensemble(SegmentationNetwork):
    """Averages the logits of networks of one configuration, one after the other, so that memory grows by their weights
    alone. It only predicts.

    low, high, factor, offset: (members, C). Member i sees clamp(x, low_i, high_i) * factor_i + offset_i, which turns
    intensities that were scaled for all of them into those that it was trained on; at first they change nothing. A
    channel that a case lacks is all zero, and stays so for every member.
    """

    engines = ("stored",)

    def __init__(self, members: Sequence[SegmentationNetwork]):
        super().__init__(dataclasses.replace(members[0].config, vae=None), "stored")
        self.members = nn.ModuleList(members)
        shape = len(members), self.config.in_channels
        for name, value in zip(INTENSITIES, (-ANY, ANY, 1.0, 0.0), strict=True):
            self.register_buffer(name, torch.full(shape, value))

    def compute(
        self, x: torch.Tensor, wants_features: bool, readout: Readout | None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """As of the base class, without features and readout, which only training asks for."""
        if wants_features or readout is not None or torch.is_grad_enabled():
            raise RuntimeError("An ensemble only predicts: call it under torch.no_grad().")
        total: torch.Tensor | None = None
        present = (x != 0).amax(dim=(2, 3, 4), keepdim=True)
        for number, member in enumerate(self.members):
            assert isinstance(member, SegmentationNetwork)
            low, high, factor, offset = (self.get_buffer(name)[number].reshape(1, -1, 1, 1, 1) for name in INTENSITIES)
            seen = torch.maximum(torch.minimum(x, high), low).mul_(factor).add_(offset).mul_(present)
            ((logits,), _) = member.compute(seen, False, None)
            total = logits if total is None else total.add_(logits)
        assert total is not None
        return (total.div_(len(self.members)),), None
