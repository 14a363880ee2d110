"""A training case of files that no data set describes, as a batch leaves them: images where they lie, a .seg.nrrd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import slicer
from slicer.i18n import tr as _

from . import NodeConversion
from .NrrdFile import writeNrrd
from .ResultFile import DamagedFile, readMasks, readSegments
from .SegmentExport import paint

__all__ = ["CaseFiles", "ImageFile"]


@dataclass(frozen=True)
class ImageFile:
    """An image on disk and its grid. size: voxels (I, J, K); matrix: its rows, (i, j, k, 1) -> RAS mm."""

    path: str
    size: tuple[int, ...]
    matrix: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, path: Path, node: slicer.vtkMRMLScalarVolumeNode) -> ImageFile:
        """node: the image as it is loaded."""
        rows = tuple(tuple(row) for row in NodeConversion.volumeMatrix(node).tolist())
        return cls(str(path.absolute()), tuple(node.GetImageData().GetDimensions()), rows)


@dataclass(frozen=True)
class CaseFiles:
    """images: by their channel. label: the .seg.nrrd, on any grid; segments: what it names.

    patient: a code that cases of one person share (see `BatchCase.patientCode`), "" where that is not known.
    """

    images: dict[str, ImageFile]
    label: str
    segments: tuple[str, ...]
    patient: str = ""

    @classmethod
    def of(
        cls,
        files: Mapping[str, Path],
        nodes: Mapping[str, slicer.vtkMRMLScalarVolumeNode],
        label: Path,
        patient: str = "",
    ) -> CaseFiles:
        """files, nodes: channel -> image, on disk and as it is loaded. Raises OSError where the label is unreadable."""
        try:
            segments = tuple(segment.name for segment in readSegments(label))
        except DamagedFile as error:
            raise OSError(str(error)) from None
        images = {channel: ImageFile.of(files[channel], node) for channel, node in nodes.items()}
        return cls(images, str(label.absolute()), segments, patient)

    @classmethod
    def fromJson(cls, content: dict[str, Any]) -> CaseFiles:
        """Of what `dataclasses.asdict` made. Raises KeyError or TypeError for anything else."""
        images = {
            channel: ImageFile(one["path"], tuple(one["size"]), tuple(map(tuple, one["matrix"])))
            for channel, one in content["images"].items()
        }
        return cls(images, content["label"], tuple(content["segments"]), content.get("patient") or "")

    @property
    def paths(self) -> dict[str, str]:
        """Channel -> image file."""
        return {channel: image.path for channel, image in self.images.items()}

    def stamp(self) -> tuple:
        """Changes with the label file."""
        try:
            state = Path(self.label).stat()
        except OSError:
            return (self.label, None)
        return (self.label, tuple(self.paths.items()), state.st_mtime_ns, state.st_size)

    def writeLabels(self, path: Path, values: Mapping[int, int], image: ImageFile) -> None:
        """Writes the segments as one label map on the grid of this image.

        values: number of a segment -> label value; later ones overwrite earlier ones.
        Raises ConversionError where the label file is not what it was, OSError where the disk does not take it.
        """
        name = Path(self.label).name
        try:
            masks = readMasks(self.label)
        except (DamagedFile, OSError) as error:
            raise NodeConversion.ConversionError(
                _("The segmentation {path} cannot be read ({reason}).").format(path=self.label, reason=error),
                _("Put it back, or remove the case."),
            ) from None
        if tuple(segment.name for segment in masks.segments) != self.segments:
            raise NodeConversion.ConversionError(
                _("The segments of {path} are others than when it was accepted.").format(path=name),
                _("Accept the case again in the tab Batch."),
            )
        labels = np.zeros(image.size[::-1], np.uint8 if max(values.values(), default=0) < 256 else np.uint16)
        matrix = np.array(image.matrix)
        toVoxels = np.linalg.inv(matrix) @ masks.matrix
        for number, value in values.items():
            mask = masks.mask(number)
            if mask.any():
                paint(labels, mask, toVoxels, value)
        writeNrrd(path, labels, matrix)
