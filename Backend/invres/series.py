"""Segments a series of frames, such as cine MR, one after the other: 4D images in, one 4D label map out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import Cancelled, InvresError, OutOfMemory
from .devices import choose_device
from .events import SILENT, Reporter
from .frames import FRAME, frames_in_words, open_series
from .inference import Clock, Locate, NetworkKeeper, segment_inputs
from .manifest import Manifest
from .memory import PeakResident
from .midline import join_sides
from .mirroring import check_mirror
from .modelpackage import ModelPackage
from .preprocessing import NOTHING_TO_SEGMENT
from .provenance import inputs_told, write_provenance
from .segmentation import Segmentation
from .segmentfiles import check_series_files
from .segmentoptions import SegmentOptions
from .sides import SIDES
from .volume import Geometry, write_series
from .volumestable import TableLine, write_table

__all__ = ["segment_series"]

JOINED = "Left and right were put into one label here, too, so that all frames are alike."


def segment_series(
    package: ModelPackage,
    inputs: Mapping[str, Path],
    output: Path,
    options: SegmentOptions = SegmentOptions(),
    table: Path | None = None,
    report: Reporter = SILENT,
    keeper: NetworkKeeper | None = None,
    locate: Locate | None = None,
    locator: ModelPackage | None = None,
    provenance_path: Path | None = None,
) -> dict[str, Any]:
    """Segments each frame of 4D files as an image of its own into a 4D label map with their grid and time step.

    inputs: channel name -> 4D file, or a 3D one or DICOM folder that is used for every frame; "" -> that of an only
    channel. table: where a CSV file with the volumes by frame goes. Else as `inference.segment`.
    A frame that shows nothing is left empty, with a warning; whatever else is wrong with one ends the run, and nothing
    is written. Warnings are told at the end, once for all frames that they are true of.
    Returns a summary as `inference.segment` does, with a record of each frame in `frames`.
    """
    clock, resident = Clock(), PeakResident()
    manifest = package.manifest
    check_series_files(manifest, inputs, output)
    options = options.mirrored_as(manifest.mirror_axes)
    check_mirror(manifest.scheme, options.mirror_axes or ())
    report.progress("segment.read", 0, 1)
    series = open_series(manifest.plan.channels, inputs, package.name)
    series.check()
    read = inputs_told(inputs)
    report.progress("segment.read", 1, 1)
    clock.lap("read")
    network = (keeper or NetworkKeeper()).network(package, choose_device(options.device), report)
    clock.lap("load")

    told = _OfFrames(report, series.count)
    volumes_of = series.frames(told)
    labels = _Labels(series.count)
    records: list[dict[str, Any]] = []
    how: dict[str, Any] = {}
    nothing: InvresError | None = None
    windows = measured = 0
    for number in range(series.count):
        told.begin(number)
        record: dict[str, Any] = {"frame": number + 1, "time_s": None, "volumes_ml": {}, "confidence": None}
        if series.time.in_seconds:
            record["time_s"] = series.time.at(number)
        try:
            case = {
                channel.name: [volume]
                for channel, volume in zip(manifest.plan.channels, next(volumes_of), strict=True)
                if volume is not None
            }
            found = segment_inputs(package, case, options, told, network, locate=locate, locator=locator)
        except (Cancelled, OutOfMemory):
            raise
        except InvresError as error:
            if error.code != NOTHING_TO_SEGMENT:
                raise _of_frame(error, number) from None
            told.warning(f"{error.message} The frame was left empty.")
            nothing = nothing or error
        else:
            clock.add(found.seconds)
            labels.take(number, found)
            settings = found.provenance["settings"]
            record |= {"volumes_ml": found.volumes_ml, "confidence": found.confidence}
            record |= {"boxes_mm": settings["boxes_mm"]} if settings["boxes_mm"] else {}
            windows += settings["windows"]
            measured = max(measured, found.measured_bytes)
            how = how or found.provenance
            del found, case  # before the next frame takes as much
        records.append({**record, "warnings": told.of_frame})
        told.end()
    if nothing is not None and not how:
        raise nothing
    _agree_on_sides(manifest, labels, records, told)
    settings = {**how["settings"], "windows": windows, "boxes_mm": [], "frames": series.count}
    how = {**how, "inputs": read, "settings": settings}

    report.progress("segment.write", 0, 1)
    assert labels.array is not None and labels.grid is not None  # one frame at least was segmented
    write_series(output, labels.array, labels.grid, series.time)
    if table is not None:
        _write_table(table, records)
    if provenance_path is not None:
        write_provenance(provenance_path, how, output)
    told.tell()
    report.progress("segment.write", 1, 1)
    clock.lap("write")
    return {
        "output": str(output),
        "volumes": None if table is None else str(table),
        "frames": records,
        "confidence": min((record["confidence"] for record in records if record["confidence"]), default=0.0),
        "seconds": clock.rounded(),
        "measured_bytes": measured,
        "measured_rss_bytes": resident.growth_bytes(),
        "device": str(next(network.parameters()).device),
        **how,
    }


class _Labels:
    """The label maps of all frames (T, D, H, W); 0 in those that none was taken of."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.array: np.ndarray | None = None
        self.grid: Geometry | None = None
        self.divided: set[int] = set()
        """Frames with left and right apart."""
        self.whole: set[int] = set()
        """Frames without."""

    def take(self, number: int, found: Segmentation) -> None:
        frame = found.labels.array
        if self.array is None:
            self.array = np.zeros((self._count, *frame.shape), frame.dtype)
            self.grid = found.labels.geometry
        # Left and right of a frame may have values that need more bits than those of the frame before.
        self.array = self.array.astype(np.promote_types(self.array.dtype, frame.dtype), copy=False)
        self.array[number] = frame
        (self.divided if found.scheme is not found.scheme_of_network else self.whole).add(number)


def _agree_on_sides(manifest: Manifest, labels: _Labels, records: list[dict[str, Any]], told: _OfFrames) -> None:
    """Puts left and right together in all frames where they could not be told apart in some: a value of the label map
    must not stand for one side in one frame and for both in the next."""
    if not (labels.divided and labels.whole):
        return
    assert labels.array is not None
    for number in labels.divided:
        join_sides(labels.array[number], manifest.scheme, manifest.sides)
        volumes = records[number]["volumes_ml"]
        sided = [(name, [name, *(f"{side}{name}" for side in SIDES)]) for name in manifest.scheme.names]
        records[number]["volumes_ml"] = {
            name: round(sum(volumes.get(one, 0.0) for one in names), 3) for name, names in sided
        }
        records[number]["warnings"].append(JOINED)
    told.say_of(sorted(labels.divided), JOINED)


class _OfFrames(Reporter):
    """What is said of the frames of a series, to a reporter who is to hear of the series.

    Progress is that of all frames, in windows; notes are passed on once; warnings are kept until `tell`.
    """

    def __init__(self, report: Reporter, count: int) -> None:
        super().__init__()
        self._report, self._count = report, count
        self._number = 0
        self._windows = (0, 1)
        self._notes: set[str] = set()
        self._warnings: dict[str, list[tuple[int, str]]] = {}
        self.of_frame: list[str] = []
        """The warnings of the frame at hand."""

    def begin(self, number: int) -> None:
        """number: of the frame that comes now, counted from 0."""
        self._number, self._windows, self.of_frame = number, (0, self._windows[1]), []
        self._progress()

    def end(self) -> None:
        self._windows = (self._windows[1], self._windows[1])
        self._progress()

    def emit(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "progress":
            if event["stage"] == "segment.tiles":
                self._windows = (event["done"], event["total"])
            self._progress()  # also while a frame is prepared: here a person's wish to end is heard
        elif kind == "warning":
            self.of_frame.append(event["message"])
            self.say_of([self._number], event["message"])
        elif kind != "note" or event["message"] not in self._notes:
            self._notes.add(event.get("message", ""))
            self._report.emit(event)

    def _progress(self) -> None:
        done, total = self._windows
        self._report.progress("segment.tiles", self._number * total + done, self._count * total)

    def say_of(self, numbers: Sequence[int], message: str) -> None:
        """A warning that is true of these frames."""
        said = self._warnings.setdefault(_without_figures(message), [])
        said += [(number + 1, message) for number in numbers]

    def tell(self) -> None:
        """Passes each warning on, once for all frames that it is true of."""
        for said in self._warnings.values():
            frames = list(dict.fromkeys(frame for frame, _ in said))
            first, message = said[0]
            same = {text for _, text in said} == {message}
            whose = "" if same else f" The figures are those of frame {first}."
            self._report.warning(f"{frames_in_words(frames, self._count)}: {message}{whose}", frames=frames)


def _without_figures(message: str) -> str:
    """How a warning begins, which is the same in all frames, where its figures and what it lists are not."""
    file, rest = re.fullmatch(r"([^:]*\.\w+: )?(.*)", message, re.DOTALL).groups()  # type: ignore[union-attr]
    return (file or "") + re.split(r"(?<!\w)-?\d|:", rest)[0]  # the 1 of a channel T1 is no figure


def _of_frame(error: InvresError, number: int) -> InvresError:
    return InvresError(f"Frame {number + 1}: {error.message}", hint=error.hint, code=error.code)


def _write_table(path: Path, records: list[dict[str, Any]]) -> None:
    timed = records[0]["time_s"] is not None
    lines = [
        TableLine(
            [record["frame"], *([record["time_s"]] if timed else [])],
            record["volumes_ml"],
            record["confidence"],
            " ".join(record["warnings"]),
        )
        for record in records
    ]
    try:
        write_table(path, [FRAME, *(["time (s)"] if timed else [])], lines)
    except OSError as error:
        raise InvresError(
            f"{path} cannot be written: {error.strerror or error}.", hint="Free some space.", code="write_failed"
        ) from None
