"""What a model has seen, told by volumes and probabilities, so that it can warn of an image that is unlike that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import InvresError

if TYPE_CHECKING:
    import numpy as np

    from .config import ChannelPlan

__all__ = [
    "Expectation",
    "confidence_in_words",
    "merged",
    "of_volumes",
    "unlike_modality",
    "unlike_result",
    "unlike_spacing",
]

HOUNSFIELD_AIR = -500.0  # no magnitude image of a scanner is so negative; air and lung of a CT are
FACTOR = 2.0  # volumes within this factor of what was seen are taken as usual
CONFIDENCE_MARGIN = 0.1  # below the least seen by more than this is unusual (chosen)
SPACING_FACTOR = 1.2  # voxels within this factor of those trained on show about the same details (chosen)
NAMED = 3


@dataclass(frozen=True)
class Expectation:
    """What training and validation cases were like; kept in the manifest. Nothing of single cases but extremes.

    volumes_ml: smallest and largest volume of each label among the training cases.
    confidence: the least mean probability of the chosen labels, over their own voxels, among the cases held out (with
    one patient, in the cases trained on); 0 = not measured.
    """

    volumes_ml: dict = field(default_factory=dict)
    confidence: float = 0.0

    def __post_init__(self) -> None:
        for name, pair in self.volumes_ml.items():
            numbers = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_number, pair))
            if not numbers or not 0 <= pair[0] <= pair[1]:
                raise InvresError(f"expected.volumes_ml[{name!r}] must be two volumes, low then high, got {pair!r}.")
        if not 0 <= self.confidence <= 1:
            raise InvresError(f"expected.confidence must be from 0 to 1, got {self.confidence}.")


def of_volumes(
    names: Sequence[str], cases: Iterable[Sequence[float]], confidences: Iterable[float] = ()
) -> Expectation:
    """From the volumes (mL) of each label in each training case, and the confidence in each case that was scored.

    A case in which nothing was found has no confidence (0), and says nothing of the others.
    """
    confidence = min((value for value in confidences if value > 0), default=0.0)
    columns = list(zip(*cases, strict=True))
    ranges = {name: [round(min(c), 4), round(max(c), 4)] for name, c in zip(names, columns, strict=False)}
    return Expectation(ranges, round(min(confidence, 1.0), 4))


def merged(one: Expectation, other: Expectation, names: Sequence[str]) -> Expectation:
    """What either has seen, for the labels named; the confidence of `other`, where it was measured."""
    ranges = {}
    for name in names:
        pairs = [e.volumes_ml[name] for e in (one, other) if name in e.volumes_ml]
        if pairs:
            ranges[name] = [min(pair[0] for pair in pairs), max(pair[1] for pair in pairs)]
    return Expectation(ranges, other.confidence)


def unlike_modality(channels: Sequence[ChannelPlan], arrays: Sequence[np.ndarray | None]) -> list[str]:
    """A sentence for each image that cannot be of its channel's modality."""
    found = []
    for channel, array in zip(channels, arrays, strict=True):
        if array is None:
            continue
        lowest = float(array.min())
        if channel.modality != "CT" and lowest <= HOUNSFIELD_AIR:
            found.append(
                f"The image for {channel.name} looks like CT (its smallest value is {lowest:g}), but the model was "
                "trained on MR: do not rely on the result."
            )
        elif channel.modality == "CT" and lowest >= 0:
            found.append(
                f"The image for {channel.name} does not look like CT in Hounsfield units (its smallest value is "
                f"{lowest:g}): do not rely on the result."
            )
    return found


def unlike_spacing(trained_mm: Sequence[float], given_mm: Sequence[float]) -> list[str]:
    """A sentence where an image to be enhanced has other voxels than those trained on; both (D, H, W), canonical."""
    factors = [max(one / other, other / one) for one, other in zip(trained_mm, given_mm, strict=True)]
    if max(factors) <= SPACING_FACTOR + 1e-6:
        return []
    trained, given = (" x ".join(f"{side:.3g}" for side in sides) for sides in (trained_mm, given_mm))
    return [
        f"The image has voxels of {given} mm, but the model learned to refine voxels of {trained} mm (superior, "
        "anterior, right): it knows the details of that scale only, so do not rely on what it adds."
    ]


def unlike_result(expected: Expectation, volumes_ml: Mapping[str, float], confidence: float) -> list[str]:
    """Sentences where a segmentation of a whole image differs from all that was seen in training."""
    found = []
    odd = []
    for name, (low, high) in expected.volumes_ml.items():
        volume = volumes_ml.get(name)
        if volume is not None and not low / FACTOR <= volume <= high * FACTOR:
            odd.append(f"{name} {volume:.3g} mL (training: {low:.3g} to {high:.3g})")
    if odd:
        more = f" and {len(odd) - NAMED} more" if len(odd) > NAMED else ""
        found.append(
            f"Unusual volumes: {', '.join(odd[:NAMED])}{more}. Check the result: the image may be cropped, or unlike "
            "those that the model was trained on."
        )
    if 0 < confidence < expected.confidence - CONFIDENCE_MARGIN:
        found.append(
            f"The model is less sure than on any image it was tested with (mean probability {confidence:.2f} against "
            f"{expected.confidence:.2f}). Check the result: the image may be unlike those that it was trained on."
        )
    return found


def confidence_in_words(confidence: float, expected: Expectation) -> str:
    """How sure a model is of a segmentation, beside the least that it was on the cases that it was tested with."""
    if confidence <= 0:
        return "Confidence: none, for nothing was found"
    text, least = f"Confidence: {confidence:.2f} of 1", f"{expected.confidence:.2f}"
    if not expected.confidence:
        return text
    if confidence < expected.confidence:
        return f"{text}, less than on all images the model was tested with ({least} or more)"
    return f"{text} ({least} or more on the images the model was tested with)"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
