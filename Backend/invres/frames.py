"""The frames of a series, such as cine MR: channels in 4D files, read one frame after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import InvresError
from .config import ChannelPlan
from .events import SILENT, Recorder, Reporter
from .image_header import Header, TimeAxis
from .nifti_file import nifti_chunks, nifti_frames
from .segmentfiles import series_files
from .volume import Geometry, Volume, check_scalar, finite_values, read_volume
from .volume_io import read_header, read_voxels

__all__ = ["FRAME", "Series", "frames_in_words", "open_series"]

FRAME = "frame"
"""Title of the first column of a table by frame."""

SLICER_SERIES = ".seq.nrrd"
"""The ending of volume sequences of Slicer, whose frames ITK takes for the values of a vector."""


@dataclass(frozen=True)
class Series:
    """The channels of a case, of which one at least has several volumes; one that has a single one shows it in every
    frame.

    paths, headers: of each channel, None for one that the case lacks. count: of frames. time: of the first channel that
    has several.
    """

    paths: Sequence[Path | None]
    headers: Sequence[Header | None]
    count: int
    time: TimeAxis

    def check(self) -> None:
        """Reads the files to their end. Raises InvresError for one that is cut short, before frames of it are used."""
        for path, header in zip(self.paths, self.headers, strict=True):
            if path is not None and header is not None and header.nifti is not None:
                for _ in nifti_chunks(path, header.nifti):
                    pass

    def frames(self, report: Reporter = SILENT) -> Iterator[list[Volume | None]]:
        """The volumes of one frame after the other. Of NIfTI files one frame is held, of others all as they are
        stored. Raises InvresError as `read_volume` does."""
        channels = [_volumes(*channel, report) for channel in zip(self.paths, self.headers, strict=True)]
        for _ in range(self.count):
            yield [next(channel) for channel in channels]


def open_series(channels: Sequence[ChannelPlan], inputs: Mapping[str, Path], model: str) -> Series:
    """The series of these files, from their headers. inputs: channel -> file; "" -> that of an only channel.

    Raises InvresError for files that are not the model's, where none of them has several volumes, and where they have
    different numbers of them.
    """
    paths, names = series_files(channels, inputs, model), [channel.name for channel in channels]
    headers = [None if path is None else read_header(path) for path in paths]
    there = [(name, header) for name, header in zip(names, headers, strict=True) if header is not None]
    counts = {name: _count(header) for name, header in there}
    several = {name: count for name, count in counts.items() if count > 1}
    if not several:
        raise InvresError(
            f"--frames is for 4D files (x, y, z, time), and {' and '.join(counts)} "
            f"{'is' if len(counts) == 1 else 'are'} 3D.",
            hint="Leave --frames out.",
        )
    if len(set(several.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in several.items())
        raise InvresError(
            f"The channels have different numbers of frames: {told}.",
            hint="Give files of one series; a 3D file is used for every frame.",
        )
    for path, header in zip(paths, headers, strict=True):
        if path is not None and header is not None and not _is_listed(header):
            check_scalar(path, header)
    first = next(header for name, header in there if name in several)
    return Series(paths, headers, next(iter(several.values())), first.time)


def frames_in_words(frames: Sequence[int], count: int) -> str:
    """Frames, counted from 1 and in order, of so many, for a sentence: Frames 3, 7 and 9 to 12."""
    if len(frames) == count:
        return f"All {count} frames"
    runs: list[list[int]] = []
    for frame in frames:
        if runs and frame == runs[-1][-1] + 1:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    parts: list[str] = []
    for run in runs:
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run)
    listed = " and ".join(text for text in (", ".join(parts[:-1]), parts[-1]) if text)
    return f"Frame{'' if len(frames) == 1 else 's'} {listed}"


def _is_listed(header: Header) -> bool:
    return header.count == 1 and header.components > 1 and header.files[0].lower().endswith(SLICER_SERIES)


def _count(header: Header) -> int:
    return header.components if _is_listed(header) else header.count


def _volumes(path: Path | None, header: Header | None, report: Reporter) -> Iterator[Volume | None]:
    """Of one channel, frame by frame; what is wrong with the file is said of each frame that shows it."""
    if path is None or header is None:
        yield from itertools.repeat(None)
        return
    if _count(header) == 1:
        heard = Recorder()
        volume = read_volume(path, report=heard)
        while True:
            for event in heard.events:
                report.emit(event)
            yield volume
    grid = Geometry.from_affine(header.affine, header.shape)
    for array in _arrays(path, header):
        for sentence in header.warnings:
            report.warning(sentence, path=str(path))
        yield Volume(finite_values(array, path.name, report), grid)


def _arrays(path: Path, header: Header) -> Iterator[np.ndarray]:
    if header.nifti is not None:
        return nifti_frames(path, header.nifti)
    stored = read_voxels(header)
    frames = np.moveaxis(stored, -1, 0) if _is_listed(header) else stored
    return (np.ascontiguousarray(frame) for frame in frames)
