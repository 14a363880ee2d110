"""Which channel of the model an image of a training case is, whatever the case calls it; which ones are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .ContrastNames import Contrast, contrastOfChannel
from .LabelMapping import plainName
from .TrainingCases import CaseRow, TrainingCases

__all__ = ["channelsOf", "imagesOf", "namedAs", "namedFor", "presentChannels", "usedChannels"]

_NEUTRAL = ("image", "img", "volume", "input", "channel 0", "channel0", "c0", "0", "0000")
"""Names that say nothing of the kind of image."""


def namedAs(names: Sequence[str], model: Any) -> tuple[str, ...]:
    """As `namedFor` its channels."""
    return namedFor(names, model.channels)


def namedFor(names: Sequence[str], channels: Sequence[Any]) -> tuple[str, ...]:
    """These names as those of a model's channels; one that it does not know keeps its own name.

    Names count as the backend compares them (case, spaces and dashes do not matter, and where both sides have a single
    channel it is the same), then as kinds of images: T1w is T1. No channel is taken twice, and nothing is guessed.
    """
    if len(names) == len(channels) == 1 and _mayBe(names[0], channels[0]):
        return (channels[0].name,)
    left = [channel.name for channel in channels]
    found: dict[str, str] = {}
    for same in (plainName, contrastOfChannel):
        for name in names:
            wanted = same(name)
            fitting = [channel for channel in left if wanted is not None and same(channel) == wanted]
            alike = [other for other in names if other not in found and same(other) == wanted]
            if name not in found and len(fitting) == len(alike) == 1:
                found[name] = fitting[0]
                left.remove(fitting[0])
    return tuple(found.get(name, name) for name in names)


def channelsOf(cases: TrainingCases, row: CaseRow) -> tuple[str, ...]:
    """What the case itself calls its channels, in its own order."""
    if row.ofDataSet:
        return cases.dataSets[row.dataSet].channels
    return tuple(row.channels if row.stored is None else row.stored.images)


def imagesOf(row: CaseRow, model: Any) -> dict[str, Any]:
    """Channel, as the model calls it -> image of a case of no data set: a volume of the scene, or an `ImageFile`."""
    images: dict[str, Any] = row.channels if row.stored is None else row.stored.images
    return dict(zip(namedAs(tuple(images), model), images.values(), strict=True))


def presentChannels(cases: TrainingCases, row: CaseRow, model: Any) -> tuple[str, ...]:
    """The channels, as the model calls them, of which the case has an image."""
    names = namedAs(channelsOf(cases, row), model)
    images = row.files["images"] if row.ofDataSet else names
    if len(images) != len(names):  # all in one file, or so many too few that nobody can tell which
        return names
    return tuple(name for name, image in zip(names, images, strict=True) if image)


def usedChannels(cases: TrainingCases, model: Any) -> tuple[str, ...]:
    """The channels that are trained on, as the model calls them, in the order in which every case is written.

    Those of the first data set, which may hold them in one file; else those of the model that any used case has.
    """
    for row in cases.used:
        if row.ofDataSet:
            return namedAs(channelsOf(cases, row), model)
    had = {name for row in cases.used for name in namedAs(channelsOf(cases, row), model)}
    return tuple(channel.name for channel in model.channels if channel.name in had)


def _mayBe(name: str, channel: Any) -> bool:
    """Whether a lone channel of this name may be the model's only one: a CT is no MR, whatever they are called."""
    kind, modality = contrastOfChannel(name), channel.modality.upper()
    if kind in (None, Contrast.CONFLICT) or not modality or plainName(name) in _NEUTRAL:
        return True
    return {Contrast.CT: "CT", Contrast.PET: "PET"}.get(kind, "MR") == modality
