"""How well a segmentation agrees with its reference: overlap, surface distances in mm, volume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from . import InvresError
from .config import LabelScheme

__all__ = [
    "EMPTY_DISTANCE_MM",
    "LabelScore",
    "SurfaceDistances",
    "dice_by_label",
    "score_case",
    "score_masks",
    "surface",
    "surface_distances",
]

# BraTS' distance where exactly one of the masks is empty: the diagonal of its 240 x 240 x 155 mm images.
EMPTY_DISTANCE_MM = 373.1287
# Spacings come from files with rounding (1.0000001 mm); without this a surface one voxel away would miss 1 mm.
_ROUNDING_MM = 1e-4


@dataclass(frozen=True)
class LabelScore:
    """Agreement of one label or region in one case. Distances in mm, volumes in ml, tp to tn in voxels.

    dice: eq. 7. hausdorff_mm: eq. 8. hd95_mm: the larger of the two directed 95th percentiles.
    asd_mm: average symmetric surface distance. mhd_mm: modified Hausdorff distance, the larger directed mean.
    nsd: normalised surface Dice, the share of both surfaces that lies within the tolerance of the other one.
    volume_error_ml: predicted minus reference.
    empty: which mask is empty. Both: Dice 1, NSD 1, distances 0. One: Dice 0, NSD 0, distances 373.1287 (BraTS).
    """

    dice: float
    hausdorff_mm: float
    hd95_mm: float
    asd_mm: float
    mhd_mm: float
    nsd: float
    volume_predicted_ml: float
    volume_reference_ml: float
    volume_error_ml: float
    tp: int
    fp: int
    fn: int
    tn: int
    empty: Literal["none", "both", "predicted", "reference"]

    @property
    def iou(self) -> float:
        """Intersection over union (Jaccard); 1 where both masks are empty."""
        union = self.tp + self.fp + self.fn
        return self.tp / union if union else 1.0

    @property
    def volume_error_relative(self) -> float | None:
        """volume_error_ml over the reference's volume; None where the reference is empty."""
        return self.volume_error_ml / self.volume_reference_ml if self.volume_reference_ml else None


@dataclass(frozen=True)
class SurfaceDistances:
    """From every surface voxel of one mask to the nearest surface voxel of the other, in mm, both ways."""

    predicted_to_reference_mm: np.ndarray
    reference_to_predicted_mm: np.ndarray

    def hausdorff_mm(self) -> float:
        """Hausdorff distance, eq. 8."""
        return float(max(self.predicted_to_reference_mm.max(), self.reference_to_predicted_mm.max()))

    def hd95_mm(self) -> float:
        """The larger of the two directed 95th percentiles (linear between ranks), not that of the pooled distances."""
        both = (self.predicted_to_reference_mm, self.reference_to_predicted_mm)
        return float(max(np.percentile(distances, 95) for distances in both))

    def asd_mm(self) -> float:
        """Average symmetric surface distance: the mean over the voxels of both surfaces together.

        Heimann et al., IEEE TMI 28(8), 2009 (SLIVER07). The mean of the two directed means is another one where the
        surfaces are not of one size.
        """
        return float(np.mean(self._both()))

    def mhd_mm(self) -> float:
        """Modified Hausdorff distance: the larger of the two directed means (Dubuisson and Jain, ICPR 1994).

        What iSeg's rankings call MHD is something else: it is far more than twice their ASD, which a larger mean of
        two surfaces of about one size cannot be.
        """
        both = (self.predicted_to_reference_mm, self.reference_to_predicted_mm)
        return float(max(np.mean(distances) for distances in both))

    def nsd(self, tolerance_mm: float) -> float:
        """Normalised surface Dice (Nikolov et al., arXiv 1809.04430), every surface voxel weighing the same.

        They weigh by area, which gives other values where voxels are longer in one direction.
        """
        return float(np.mean(self._both() <= tolerance_mm + _ROUNDING_MM))

    def _both(self) -> np.ndarray:
        return np.concatenate((self.predicted_to_reference_mm, self.reference_to_predicted_mm))


def score_case(
    predicted: np.ndarray,
    reference: np.ndarray,
    scheme: LabelScheme,
    spacing_mm: Sequence[float],
    tolerance_mm: float = 1.0,
) -> dict[str, LabelScore]:
    """Scores each label of `scheme` by name.

    predicted, reference: (D, H, W), values as in label files. spacing_mm: (D, H, W). tolerance_mm: of the NSD.
    A label's mask is the voxels whose value is in `label.values`. Voxels that hold `scheme.ignore_value` in the
    reference belong to no mask and no count.
    Raises: InvresError for different shapes, and for a spacing or a tolerance that cannot be.
    """
    _check(predicted, reference, spacing_mm, tolerance_mm)
    counted = None if scheme.ignore_value is None else reference != scheme.ignore_value
    scores = {}
    for label in scheme.labels:
        masks = [np.isin(values, label.values) for values in (predicted, reference)]
        scores[label.name] = _score(masks[0], masks[1], spacing_mm, tolerance_mm, counted)
    return scores


def score_masks(
    predicted: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float = 1.0
) -> LabelScore:
    """Scores one pair of masks (D, H, W), everything but 0 being inside. Raises as `score_case`."""
    _check(predicted, reference, spacing_mm, tolerance_mm)
    return _score(predicted.astype(bool), reference.astype(bool), spacing_mm, tolerance_mm, None)


def dice_by_label(predicted: np.ndarray, reference: np.ndarray) -> list[float]:
    """Dice (eq. 7) alone, of pairs of masks, bool (R, D, H, W); 1 where both are empty. For validation in training."""
    scores = []
    for one, other in zip(predicted, reference, strict=True):
        total = int(one.sum()) + int(other.sum())
        scores.append(2 * int((one & other).sum()) / total if total else 1.0)
    return scores


def surface(mask: np.ndarray, unknown: np.ndarray | None = None) -> np.ndarray:
    """The voxels of `mask` (bool, D H W) with a face neighbour outside it; outside the array nothing is inside.

    unknown: voxels of which nobody knows what they are; a border with them is no surface.
    """
    return mask & ~ndimage.binary_erosion(mask if unknown is None else mask | unknown)


def surface_distances(
    predicted: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float], unknown: np.ndarray | None = None
) -> SurfaceDistances:
    """Distances between the surfaces of two non-empty masks (bool, D H W). spacing_mm: (D, H, W); unknown: as in
    `surface`.

    Where a mask has no other border than that with unknown voxels, that counts as its surface all the same.
    """
    # Both surfaces lie inside the joint box and erosion takes what is beyond it as background, which it is: cropping
    # to the box changes no distance, and the transform's time goes with the volume.
    box = _bounding_box(predicted | reference)
    if unknown is not None:  # what lies just outside may be unknown
        box = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
    masks = [mask[box] for mask in (predicted, reference)]
    surfaces = [surface(mask, None if unknown is None else unknown[box]) for mask in masks]
    surfaces = [found if found.any() else surface(mask) for found, mask in zip(surfaces, masks, strict=True)]
    directed = [
        ndimage.distance_transform_edt(~other, sampling=tuple(spacing_mm))[own]
        for own, other in (surfaces, surfaces[::-1])
    ]
    return SurfaceDistances(*directed)


def _score(
    predicted: np.ndarray,
    reference: np.ndarray,
    spacing_mm: Sequence[float],
    tolerance_mm: float,
    counted: np.ndarray | None,
) -> LabelScore:
    voxels = predicted.size
    if counted is not None:
        predicted, reference = predicted & counted, reference & counted
        voxels = int(np.count_nonzero(counted))
    tp = int(np.count_nonzero(predicted & reference))
    n_predicted, n_reference = int(np.count_nonzero(predicted)), int(np.count_nonzero(reference))
    voxel_ml = math.prod(float(size) for size in spacing_mm) / 1000
    empty: Literal["none", "both", "predicted", "reference"] = "none"
    if n_predicted and n_reference:
        distances = surface_distances(predicted, reference, spacing_mm, None if counted is None else ~counted)
        hausdorff_mm, hd95_mm = distances.hausdorff_mm(), distances.hd95_mm()
        asd_mm, mhd_mm = distances.asd_mm(), distances.mhd_mm()
        nsd, dice = distances.nsd(tolerance_mm), 2 * tp / (n_predicted + n_reference)
    elif n_predicted or n_reference:
        empty = "reference" if n_predicted else "predicted"
        hausdorff_mm = hd95_mm = asd_mm = mhd_mm = EMPTY_DISTANCE_MM
        nsd = dice = 0.0
    else:
        empty = "both"
        hausdorff_mm = hd95_mm = asd_mm = mhd_mm = 0.0
        nsd = dice = 1.0
    return LabelScore(
        dice=dice,
        hausdorff_mm=hausdorff_mm,
        hd95_mm=hd95_mm,
        asd_mm=asd_mm,
        mhd_mm=mhd_mm,
        nsd=nsd,
        volume_predicted_ml=n_predicted * voxel_ml,
        volume_reference_ml=n_reference * voxel_ml,
        volume_error_ml=(n_predicted - n_reference) * voxel_ml,
        tp=tp,
        fp=n_predicted - tp,
        fn=n_reference - tp,
        tn=voxels - n_predicted - n_reference + tp,
        empty=empty,
    )


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds every voxel of a non-empty mask."""
    box = []
    for axis in range(mask.ndim):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return tuple(box)


def _check(predicted: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float) -> None:
    if predicted.shape != reference.shape or predicted.ndim != 3:
        raise InvresError(
            "Prediction and reference must be volumes (D, H, W) of one shape, "
            f"got {list(predicted.shape)} and {list(reference.shape)}."
        )
    if len(spacing_mm) != 3 or not all(math.isfinite(size) and size > 0 for size in spacing_mm):
        raise InvresError(f"The spacing must be three sizes above 0 mm, got {list(spacing_mm)}.")
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise InvresError(f"The tolerance of the surface Dice must be 0 mm or more, got {tolerance_mm}.")
