"""Two models in sequence: one of the whole image finds the structure that another one was trained on crops around."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from . import InvresError
from .config import CropPlan, LabelScheme
from .devices import choose_device
from .events import SILENT, FilteredReporter, Reporter
from .inference import Locate, NetworkKeeper, segment_case
from .modelpackage import ModelPackage
from .networks import SegmentationNetwork
from .prediction import SegmentOptions
from .preprocessing import NOTHING_TO_SEGMENT
from .region import Bounds
from .segmentfiles import check_locatable
from .sides import SIDES
from .volume import Volume

__all__ = ["boxes_around", "can_locate", "crop_shape", "finder", "locate"]

SMALLEST_PART = 0.25  # of the largest piece: smaller ones are specks, not another side


def can_locate(scheme: LabelScheme, crop: CropPlan) -> bool:
    """Whether a model with these labels finds what the crops lie around."""
    return bool(_values(scheme, crop))


def crop_shape(
    crop: CropPlan, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> tuple[int, int, int]:
    """Voxels of the largest crop out of an image of this shape and spacing, all (D, H, W) and canonical."""
    d, h, w = (min(n, math.ceil(mm / s)) for n, mm, s in zip(shape, crop.largest_mm, spacing_mm, strict=True))
    return d, h, w


def finder(package: ModelPackage, other: ModelPackage, device: str, keeper: NetworkKeeper) -> Locate:
    """What finds the boxes for a package that was trained on crops, with the other model, whose network `keeper` has.

    Raises InvresError for a package that segments whole images.
    """
    check_locatable(package.manifest)
    crop = package.manifest.plan.crop
    assert crop is not None

    def find(volumes: Sequence[Volume | None], report: Reporter) -> tuple[Sequence[Bounds], int]:
        return locate(other, keeper.network(other, choose_device(device)), volumes, crop, report)

    return find


def locate(
    package: ModelPackage,
    network: SegmentationNetwork,
    volumes: Sequence[Volume | None],
    crop: CropPlan,
    report: Reporter = SILENT,
) -> tuple[list[Bounds], int]:
    """The boxes (R0, R1, A0, A1, S0, S1) in mm that the crops' model wants to see, from left to right, and the peak of
    memory in bytes that finding them took.

    package, network: of the model that segments the whole image; it gets the first of the volumes.
    Raises InvresError for a model that cannot find it, and where it finds nothing.
    """
    manifest, what = package.manifest, crop.around[0]
    if not can_locate(manifest.scheme, crop):
        raise InvresError(
            f"{package.name} has no label {what}, so it cannot find where to look.",
            hint="Name a model that segments it, or give the region of interest yourself.",
        )
    if len(manifest.plan.channels) > 1:
        raise InvresError(
            f"{package.name} takes {len(manifest.plan.channels)} channels, but a model that locates gets one.",
            hint="Name another model, or give the region of interest yourself.",
        )
    first = next(volume for volume in volumes if volume is not None)
    found = segment_case(package, network, [first], SegmentOptions(mirror_axes=()), _AsLocating(report))
    labels = found.labels
    boxes = boxes_around(np.isin(labels.array, _values(manifest.scheme, crop)), labels, crop.margin_mm)
    if not boxes:
        raise InvresError(
            f"{package.name} found no {what} in this image.",
            hint="Check that the image shows it, or give the region of interest yourself.",
            code=NOTHING_TO_SEGMENT,
        )
    report.note(f"{package.name} found {what} in {len(boxes)} place{'' if len(boxes) == 1 else 's'}.")
    return boxes, found.prediction.measured_bytes


def boxes_around(inside: np.ndarray, grid: Volume, margin_mm: Sequence[float]) -> list[Bounds]:
    """A box in RAS mm around each connected piece of a mask (D, H, W) on the grid of a volume, from left to right.

    margin_mm: added along the axes that run nearest to superior, anterior and right. Specks are left out.
    """
    mask = Volume(inside, grid.geometry).canonical()
    pieces, count = ndimage.label(mask.array)
    if not count:
        return []
    sizes = np.bincount(pieces.ravel())[1:]
    affine, margin = mask.geometry.affine, np.array(margin_mm) / mask.geometry.spacing_mm
    boxes = []
    for place, size in zip(ndimage.find_objects(pieces), sizes, strict=True):
        if size < SMALLEST_PART * sizes.max():
            continue
        low = np.array([part.start for part in place]) - 0.5 - margin
        high = np.array([part.stop for part in place]) - 0.5 + margin
        ends = np.array(list(itertools.product(*zip(low, high, strict=True))))
        world = ends @ affine[:3, :3].T + affine[:3, 3]
        boxes.append(tuple(float(v) for pair in zip(world.min(0), world.max(0), strict=True) for v in pair))
    return sorted(boxes)


def _values(scheme: LabelScheme, crop: CropPlan) -> list[int]:
    wanted = {name.casefold() for name in crop.around}
    found = []
    for label in scheme.labels:
        name = label.name.casefold()
        if name in wanted or any(name.removeprefix(side) in wanted for side in SIDES):
            found.append(label.output_value)
    return found


class _AsLocating(FilteredReporter):
    """Passes on warnings, and the progress through the image as a stage of its own."""

    def __init__(self, report: Reporter):
        super().__init__(report, lambda kind: kind == "warning")

    def emit(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event["stage"] == "segment.tiles":
            self._report.progress("segment.locate", event["done"], event["total"])
        super().emit(event)
