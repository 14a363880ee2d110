"""The weights of one model for a network with other labels, channels or sizes, and what became of each tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .config import LabelScheme
from .manifest import Manifest
from .networks import STEMS, SegmentationNetwork, is_head

__all__ = ["TensorOutcome", "Transfer", "match_names", "transfer_weights"]

Outcome = Literal["reused", "adapted", "initialised", "dropped"]

_VAE_HEAD = "vae.head."


@dataclass(frozen=True)
class TensorOutcome:
    """reused: as it was; adapted: in parts; initialised: new in the network; dropped: of no use to it.

    detail: which rows or channels came from where, or why not; "" where there is nothing to say.
    """

    name: str
    outcome: Outcome
    shape: tuple[int, ...]
    detail: str = ""


@dataclass(frozen=True)
class Transfer:
    """What was taken over. The names are those of labels and channels; background is not among them."""

    tensors: tuple[TensorOutcome, ...]
    labels_reused: tuple[str, ...]
    labels_initialised: tuple[str, ...]
    labels_dropped: tuple[str, ...]
    channels_reused: tuple[str, ...]
    channels_averaged: tuple[str, ...]
    channels_dropped: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of tensors by outcome; all four are there."""
        found = Counter(tensor.outcome for tensor in self.tensors)
        return {outcome: found[outcome] for outcome in ("reused", "adapted", "initialised", "dropped")}

    def sentence(self) -> str:
        """The whole in words."""
        counts = self.counts
        parts = [
            f"Of the base model {counts['reused']} tensors are reused and {counts['adapted']} adapted, "
            f"{counts['dropped']} dropped; {counts['initialised']} are new."
        ]
        for what, names in (
            ("New labels", self.labels_initialised),
            ("Labels that the model will no longer find", self.labels_dropped),
            ("New channels, begun with the average of the base model's", self.channels_averaged),
            ("Channels that it no longer takes", self.channels_dropped),
        ):
            if names:
                parts.append(f"{what}: {', '.join(names)}.")
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {
            "sentence": self.sentence(),
            "counts": self.counts,
            "labels": {
                "reused": list(self.labels_reused),
                "initialised": list(self.labels_initialised),
                "dropped": list(self.labels_dropped),
            },
            "channels": {
                "reused": list(self.channels_reused),
                "averaged": list(self.channels_averaged),
                "dropped": list(self.channels_dropped),
            },
            "tensors": [
                {"name": t.name, "outcome": t.outcome, "shape": list(t.shape), "detail": t.detail} for t in self.tensors
            ],
        }


def match_names(wanted: Sequence[str], known: Sequence[str], alone: bool = False) -> list[int | None]:
    """For each wanted name the place of the same name in `known`, whatever its case, spaces and dashes.

    alone: where both sides have a single name, these belong together whatever they are called.
    """
    if alone and len(wanted) == len(known) == 1:
        return [0]
    places = {_plain(name): place for place, name in reversed(list(enumerate(known)))}
    return [places.get(_plain(name)) for name in wanted]


def transfer_weights(
    weights: Mapping[str, Tensor],
    base: Manifest,
    network: SegmentationNetwork,
    channels: Sequence[str],
    scheme: LabelScheme,
) -> Transfer:
    """Loads into `network`, freshly initialised, all of `weights` that fits, and says what became of each tensor.

    weights, base: of the model begun with. channels, scheme: what `network` takes and gives.
    Rows of the head go by label name, the background's too; a label that the base does not know keeps its fresh row
    (rows of zeros learn more slowly).
    Input channels of the first convolution go by name; a channel that the base does not know gets the average over
    all of the base's, and where the number of channels changes all are scaled by old over new, so that the sum over
    channels stays of the same size (as Carreira and Zisserman inflate filters, arXiv 1705.07750).
    Everything else is reused where name and shape agree.
    """
    taken = match_names(channels, [channel.name for channel in base.plan.channels], alone=True)
    rows, row_names = _head_rows(base.scheme, scheme)
    fresh = network.state_dict()
    loaded: dict[str, Tensor] = {}
    outcomes: list[TensorOutcome] = []
    outcome: Outcome
    for name, tensor in fresh.items():
        old = weights.get(name)
        shape = tuple(tensor.shape)
        if old is None:
            loaded[name], outcome, detail = tensor, "initialised", "the base model has none"
        elif is_head(name):
            loaded[name], outcome, detail = _head(old, tensor, rows, row_names)
        elif name in STEMS:
            loaded[name], outcome, detail = _stem(old, tensor, taken, channels)
        elif name.startswith(_VAE_HEAD) and taken != list(range(base.network.in_channels)):
            loaded[name], outcome, detail = tensor, "initialised", "it reconstructs other channels"
        elif old.shape != tensor.shape:
            loaded[name], outcome, detail = tensor, "initialised", f"the base model's has the shape {list(old.shape)}"
        else:
            loaded[name], outcome, detail = old.to(tensor.dtype), "reused", ""
        outcomes.append(TensorOutcome(name, outcome, shape, detail))
    outcomes += [
        TensorOutcome(name, "dropped", tuple(tensor.shape), "the network has none")
        for name, tensor in weights.items()
        if name not in fresh
    ]
    network.load_state_dict(loaded)
    labels = match_names(scheme.names, base.scheme.names)
    base_channels = [channel.name for channel in base.plan.channels]
    return Transfer(
        tensors=tuple(outcomes),
        labels_reused=tuple(n for n, place in zip(scheme.names, labels, strict=True) if place is not None),
        labels_initialised=tuple(n for n, place in zip(scheme.names, labels, strict=True) if place is None),
        labels_dropped=tuple(n for place, n in enumerate(base.scheme.names) if place not in labels),
        channels_reused=tuple(n for n, place in zip(channels, taken, strict=True) if place is not None),
        channels_averaged=tuple(n for n, place in zip(channels, taken, strict=True) if place is None),
        channels_dropped=tuple(n for place, n in enumerate(base_channels) if place not in taken),
    )


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _head_rows(old: LabelScheme, new: LabelScheme) -> tuple[list[int | None], list[str]]:
    """For each output channel of the new head the row of the old one, and the channels' names."""
    first = 0 if old.regions else 1
    rows = [None if place is None else place + first for place in match_names(new.names, old.names)]
    if new.regions:
        return rows, list(new.names)
    return [None if old.regions else 0, *rows], ["background", *new.names]


def _head(old: Tensor, fresh: Tensor, rows: list[int | None], names: list[str]) -> tuple[Tensor, Outcome, str]:
    if old.shape[1:] != fresh.shape[1:]:
        return fresh, "initialised", f"the base model's has the shape {list(old.shape)}"
    tensor = fresh.clone()
    for target, source in enumerate(rows):
        if source is not None:
            tensor[target] = old[source].to(tensor)
    if rows == list(range(old.shape[0])):
        return tensor, "reused", ""
    reused = [name for name, source in zip(names, rows, strict=True) if source is not None]
    new = [name for name, source in zip(names, rows, strict=True) if source is None]
    detail = "; ".join(
        f"{what} {', '.join(some)}" for what, some in (("rows reused:", reused), ("rows initialised:", new)) if some
    )
    return tensor, "adapted" if reused else "initialised", detail


def _stem(old: Tensor, fresh: Tensor, taken: list[int | None], channels: Sequence[str]) -> tuple[Tensor, Outcome, str]:
    if (old.shape[0], *old.shape[2:]) != (fresh.shape[0], *fresh.shape[2:]):
        return fresh, "initialised", f"the base model's has the shape {list(old.shape)}"
    if taken == list(range(old.shape[1])):
        return old.to(fresh.dtype), "reused", ""
    mean = old.mean(dim=1)
    columns = [mean if place is None else old[:, place] for place in taken]
    tensor = (torch.stack(columns, dim=1) * (old.shape[1] / len(taken))).to(fresh.dtype)
    averaged = [name for name, place in zip(channels, taken, strict=True) if place is None]
    kept = [name for name, place in zip(channels, taken, strict=True) if place is not None]
    parts = [f"{w} {', '.join(n)}" for w, n in (("channels reused:", kept), ("averaged:", averaged)) if n]
    if old.shape[1] != len(taken):
        parts.append(f"scaled by {old.shape[1]}/{len(taken)}")
    return tensor, "adapted", "; ".join(parts)
