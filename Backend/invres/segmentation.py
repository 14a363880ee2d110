"""What a model found in one case, in memory: labels on the grid of the input, figures, maps, and their files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from . import InvresError
from .config import LabelScheme
from .image_header import array_order
from .outputs import check_provenance
from .prediction import Prediction
from .preprocessing import PreparedCase
from .provenance import FIELD, header_text, write_provenance
from .region import Bounds, Box, clear_outside
from .restoration import restore_uncertainty, restore_volume
from .segmentfiles import check_results, maps_of, names_of_maps
from .volume import Geometry, Volume, write_segmentation, write_volume
from .volume_io import to_sitk

__all__ = ["WHOLE", "Segmentation", "SegmentedCase", "joined", "volumes_of", "volumes_of_part"]

WHOLE: Box = (slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class SegmentedCase:
    """A case, or a part of one, that was segmented. labels: also those around a region of interest, which help to tell
    left from right. seconds: by stage. where: of the part in the whole image."""

    labels: Volume
    prepared: PreparedCase
    prediction: Prediction
    seconds: dict[str, float]
    where: Box = WHOLE


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a model found in one case.

    labels: whole numbers (D, H, W), 0 and the values of `scheme`, on the grid of the first image.
    scheme: the labels of that map; left and right are labels of their own where they could be told apart.
    volumes_ml: of each label in mL (of each region as a whole, also where the label map shows another one on top).
    confidence: mean probability of the labels over their own voxels, 0 where nothing was found; of several boxes the
    least. warnings: sentences. provenance: model, inputs, settings and versions.

    scheme_of_network, parts: labels and probabilities as the network gave them; no parts where they were not kept.
    roi_mm: outside of which nothing was segmented. files: the inputs, which are never overwritten. seconds: by stage.
    measured_bytes: the peak of its tensors.
    """

    labels: Volume
    scheme: LabelScheme
    volumes_ml: dict[str, float]
    confidence: float
    provenance: dict[str, Any]
    scheme_of_network: LabelScheme
    parts: tuple[SegmentedCase, ...]
    roi_mm: Bounds = ()
    files: tuple[Path, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    measured_bytes: int = 0
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        count = sum(volume > 0 for volume in self.volumes_ml.values())
        warned = f", warnings: {len(self.warnings)}" if self.warnings else ""
        return f"<Segmentation: {count} of {len(self.volumes_ml)} labels found, confidence {self.confidence}{warned}>"

    @property
    def array(self) -> np.ndarray:
        """The label map (k, j, i), as `SimpleITK.GetArrayFromImage` orders axes; nibabel's order is its transpose."""
        return self.labels.array

    @property
    def affine(self) -> np.ndarray:
        """4x4, from (i, j, k, 1) to RAS mm: nibabel's affine, and Slicer's IJK to RAS matrix."""
        return array_order(self.labels.geometry.affine)

    @property
    def image(self) -> sitk.Image:
        """The label map as a SimpleITK image."""
        return to_sitk(self.array, self.labels.geometry.affine)

    @property
    def label_names(self) -> dict[int, str]:
        """What each value of the label map stands for."""
        return {label.output_value: label.name for label in self.scheme.labels}

    @property
    def probability_names(self) -> tuple[str, ...]:
        """The labels that `probability` knows: those of the network, and the background unless labels overlap."""
        return names_of_maps(self.scheme_of_network)

    def probability(self, name: str) -> np.ndarray:
        """The probability of a label (k, j, i), float32 on the grid of the label map; of both sides together.

        0, and 1 for the background, where nothing was segmented. Raises InvresError for a name that is not in
        `probability_names`, and where probabilities were not kept.
        """
        if name not in self.probability_names:
            raise InvresError(f"There is no probability of {name!r}, but of {', '.join(self.probability_names)}.")
        place = self.probability_names.index(name)
        outside = 1.0 if name == "background" and not self.scheme_of_network.regions else 0.0

        def restored(part: SegmentedCase) -> np.ndarray:
            array, prepared = part.prediction.probabilities[place], part.prepared
            return restore_volume(array, prepared.geometry, prepared.original, outside)

        return self._map(restored, outside)

    def uncertainty(self) -> np.ndarray:
        """How likely the label of each voxel is to be wrong (k, j, i), float32, see `restore_uncertainty`.

        0 where nothing was segmented. Raises InvresError where probabilities were not kept.
        """

        def restored(part: SegmentedCase) -> np.ndarray:
            prepared, found = part.prepared, part.prediction.probabilities
            regions = self.scheme_of_network.regions
            return restore_uncertainty(found, part.labels.array, prepared.geometry, prepared.original, regions)

        return self._map(restored, 0.0)

    def save(
        self,
        output: str | os.PathLike[str],
        *,
        probabilities: str | os.PathLike[str] | None = None,
        uncertainty: str | os.PathLike[str] | None = None,
        provenance: str | os.PathLike[str] | None = None,
    ) -> dict[str, Any]:
        """Writes the label map: .seg.nrrd (names, colours, terminology and provenance for Slicer), .nii.gz, .nii, .nrrd
        or .mha; each file complete or not at all.

        probabilities: FILE.nii.gz (or another ending; none means .nii.gz): FILE_LABEL.nii.gz is written by label.
        uncertainty, provenance: files for these, the last one ending in .json.
        Returns the paths: `output`, `probabilities` (a list), `uncertainty` (None where it was not asked for).
        Raises InvresError for other endings, for a file that is one of the inputs, and where the disk refuses.
        """
        target = Path(output)
        of_labels, of_doubt = (None if path is None else Path(path) for path in (probabilities, uncertainty))
        check_results(self.scheme_of_network, self.files, target, of_labels, of_doubt)
        if provenance is not None:
            check_provenance(Path(provenance))
        if of_labels is not None or of_doubt is not None:
            self._check_kept()
        grid = self.labels.geometry
        write_segmentation(target, self.labels, self.scheme, {FIELD: header_text(self.provenance)})
        maps = {} if of_labels is None else maps_of(of_labels, self.scheme_of_network)
        for name, path in maps.items():
            write_volume(path, Volume(self.probability(name), grid))
        if of_doubt is not None:
            write_volume(of_doubt, Volume(self.uncertainty(), grid))
        if provenance is not None:
            write_provenance(Path(provenance), self.provenance, target)
        return {
            "output": str(target),
            "probabilities": [os.fspath(path) for path in maps.values()],
            "uncertainty": None if of_doubt is None else str(of_doubt),
        }

    def _check_kept(self) -> None:
        if not self.parts:
            raise InvresError(
                "The probabilities of this segmentation were not kept.", hint="Segment with probabilities=True."
            )

    def _map(self, restored: Callable[[SegmentedCase], np.ndarray], outside: float) -> np.ndarray:
        """A map of all parts on the grid of the whole image. restored: that of a part, float32 on its own grid."""
        self._check_kept()
        grid = self.labels.geometry
        if self.parts[0].where == WHOLE:
            whole = restored(self.parts[0])
        else:
            whole = np.full(grid.shape, outside, np.float32)
            for part in self.parts:
                whole[part.where] = restored(part)
        if self.roi_mm:
            clear_outside(whole, grid, self.roi_mm, outside)
        return whole


def joined(parts: Sequence[SegmentedCase], grid: Geometry) -> Volume:
    """The labels of all parts on the grid of the whole image."""
    if parts[0].where == WHOLE:
        return parts[0].labels
    labels = np.zeros(grid.shape, parts[0].labels.array.dtype)
    for part in parts:
        inside = labels[part.where]
        np.copyto(inside, part.labels.array, where=part.labels.array != 0)
    return Volume(labels, grid)


def volumes_of(labels: Volume, scheme: LabelScheme, of_parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Millilitres of each label. of_parts: those of the parts by `volumes_of_part`."""
    if scheme.regions:
        return {name: round(sum(one[name] for one in of_parts), 3) for name in scheme.names}
    # Not the sum of parts: boxes may overlap, and a voxel counts once.
    return _label_volumes_ml(labels, scheme)


def volumes_of_part(found: SegmentedCase, scheme: LabelScheme, roi_mm: Bounds) -> dict[str, float]:
    """Millilitres of each label or region of the network on the original grid."""
    if not scheme.regions:
        return _label_volumes_ml(found.labels, scheme)
    prepared, grid = found.prepared, found.labels.geometry
    voxel_ml = float(np.prod(grid.spacing_mm)) / 1000
    volumes = {}
    for label, probability in zip(scheme.labels, found.prediction.probabilities, strict=True):
        # Counted before regions overwrite one another in the label map.
        inside = restore_volume(probability, prepared.geometry, prepared.original) > 0.5
        if roi_mm and found.where == WHOLE:
            clear_outside(inside, grid, roi_mm)
        volumes[label.name] = round(int(inside.sum()) * voxel_ml, 3)
    return volumes


def _label_volumes_ml(labels: Volume, scheme: LabelScheme) -> dict[str, float]:
    """Millilitres of each label that excludes the others."""
    voxel_ml = float(np.prod(labels.geometry.spacing_mm)) / 1000
    return {label.name: round(int((labels.array == label.output_value).sum()) * voxel_ml, 3) for label in scheme.labels}
