"""Writes training cases as a data set (dataset.json) for the backend, in small steps so that the window stays alive."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qt
from slicer.i18n import tr as _

from . import NodeConversion
from .CaseChannels import imagesOf, namedAs, usedChannels
from .CaseFindings import labelsOf, patients, unknownOf
from .LabelMapping import UNKNOWN, LabelConflict, TrainedLabel, labelOf, plainName
from .SegmentExport import labelArray, segmentNames, writeLabels
from .TrainingCases import TRAINING, VALIDATION, CaseRow, TrainingCases
from .WholeFile import writeJson

__all__ = ["CaseExport", "ExportOutcome", "Layout", "directDataSet", "layoutOf", "stampOf"]

DATASET, SPLITS = "dataset.json", "splits_final.json"
LABEL = "label.nrrd"


@dataclass(frozen=True)
class ExportOutcome:
    """How an export ended. state: "done", "failed" or "cancelled". dataset: what the backend takes as --data."""

    state: str
    dataset: Path | None = None
    written: int = 0
    message: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Layout:
    """What all cases have in common when they are written, and what none of them says alone.

    channels: as the model calls them, in the order of the files. labels: those that are trained on. unknown: the value
    of voxels that take no part, None where there are none.
    """

    channels: tuple[str, ...]
    labels: tuple[TrainedLabel, ...]
    unknown: int | None

    @property
    def written(self) -> list[tuple[str, int]]:
        """Label and its value in the files. What is not known comes last: it wins over what is drawn below."""
        values = [(label.name, label.value) for label in self.labels]
        return values + ([] if self.unknown is None else [(UNKNOWN, self.unknown)])


def layoutOf(cases: TrainingCases, model: Any) -> Layout:
    """How the used cases are written. Looks at all of them; raises LabelConflict where they contradict each other."""
    labels = labelsOf(cases, model)
    return Layout(usedChannels(cases, model), labels, unknownOf(cases, model, labels))


def directDataSet(cases: TrainingCases, model: Any) -> str:
    """The path of a data set on disk that can be used as it lies there; "" where the cases need one of their own."""
    rows = cases.used
    if len(cases.dataSets) != 1 or len(rows) < len(cases.rows) or not all(row.ofDataSet for row in rows):
        return ""
    (dataSet,) = cases.dataSets.values()
    if len(rows) != dataSet.count or (dataSet.folds != 1 and any(row.role != TRAINING for row in rows)):
        return ""
    if dataSet.folds == 1 and not all(row.files.get("splitRole") == row.role for row in rows):
        return ""
    alone = len(dataSet.channels) == len(model.channels) == 1
    pairs = zip(dataSet.channels, namedAs(dataSet.channels, model), strict=True)
    if not alone and any(plainName(name) != plainName(as_) for name, as_ in pairs):
        return ""  # the backend would take it for another one
    known = [label.name for label in model.labels]
    names = [label["name"] for label in dataSet.labels]
    same = all(plainName(labelOf(name, known, cases.choices) or "") == plainName(name) for name in names)
    return dataSet.path if same else ""


def stampOf(cases: TrainingCases, row: CaseRow, model: Any, layout: Layout | None = None) -> tuple:
    """What changes when any file of a case would: times of change, places, and what its segments stand for.

    layout: what `layoutOf` gives; asked for once for many cases. Raises LabelConflict as it does.
    """
    layout = layoutOf(cases, model) if layout is None else layout
    if row.ofDataSet:
        return ("on disk", *layout.written)
    return _stamp(row, _images(row, layout.channels, model), _values(row, layout, model, cases.choices))


class CaseExport:
    """One export at a time. folder: gives a new folder for the files of this session; it is asked for once.

    A case appears whole or not at all, and one that has not changed since is not written again.
    """

    def __init__(self, folder: Callable[[], str]) -> None:
        self._makeFolder = folder
        self._folder: Path | None = None
        self._stamps: dict[str, tuple] = {}
        self._steps: Iterator[tuple[int, int, str]] | None = None
        self._timer = qt.QTimer()
        self._timer.interval = 0
        self._timer.connect("timeout()", self._step)
        self._onProgress: Callable[[int, int, str], None] | None = None
        self._onDone: Callable[[ExportOutcome], None] | None = None
        self._outcome = ExportOutcome("failed")

    @property
    def running(self) -> bool:
        """Whether an export is under way."""
        return self._steps is not None

    def start(
        self,
        cases: TrainingCases,
        model: Any,
        onProgress: Callable[[int, int, str], None],
        onDone: Callable[[ExportOutcome], None],
    ) -> None:
        """Writes the used cases. onProgress(done, total, what) after each image; onDone once, from the event loop."""
        self._begin(self._export(cases, model), onProgress, onDone)

    def deliver(
        self,
        dataset: Path,
        target: Path,
        onProgress: Callable[[int, int, str], None],
        onDone: Callable[[ExportOutcome], None],
    ) -> None:
        """Puts an exported data set into the folder `target`, which later exports do not change."""
        self._begin(self._deliver(dataset.parent, target), onProgress, onDone)

    def cancel(self) -> None:
        """Stops; what was begun of a case is removed."""
        if self._steps is not None:
            self._end(ExportOutcome("cancelled"))

    def cleanup(self) -> None:
        """Stops without a word and removes the files of this session."""
        self._onDone = None
        self.cancel()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # ---------------------------------------------------------------- steps

    def _begin(self, steps, onProgress, onDone) -> None:
        if self._steps is not None:
            raise RuntimeError("An export is under way.")
        self._steps, self._onProgress, self._onDone = steps, onProgress, onDone
        self._outcome = ExportOutcome("failed")
        self._timer.start()

    def _step(self) -> None:
        steps = self._steps
        if steps is None:
            return
        try:
            done, total, what = next(steps)
        except StopIteration:
            self._end(self._outcome)
        except LabelConflict as error:
            self._end(ExportOutcome("failed", message=str(error)))
        except NodeConversion.ConversionError as error:
            self._end(ExportOutcome("failed", message=error.message, hint=error.hint))
        except OSError as error:
            message = _("The cases could not be written: {reason}.").format(reason=error.strerror or error)
            self._end(ExportOutcome("failed", message=message, hint=_("Free some space on the disk and try again.")))
        except Exception as error:  # a node that was taken away in the middle of it must not leave it hanging
            logging.exception("InvResSegment: the export of training cases failed")
            self._end(
                ExportOutcome("failed", message=_("The cases could not be written: {reason}.").format(reason=error))
            )
        else:
            if self._onProgress is not None:
                self._onProgress(done, total, what)

    def _end(self, outcome: ExportOutcome) -> None:
        self._timer.stop()
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.close()  # removes what is half-written
        callback, self._onDone, self._onProgress = self._onDone, None, None
        if callback is not None:
            callback(outcome)

    def _export(self, cases: TrainingCases, model: Any) -> Iterator[tuple[int, int, str]]:
        if self._folder is None:
            self._folder = Path(self._makeFolder())
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        rows = cases.used
        layout = layoutOf(cases, model)
        channels = layout.channels
        total, done, written = sum(len(channels) + 1 if row.inScene else 1 for row in rows), 0, 0
        yield 0, total, ""
        for row in rows:
            if row.ofDataSet:
                done += 1
                continue
            values = _values(row, layout, model, cases.choices)
            images = _images(row, channels, model)
            stamp = _stamp(row, images, values)
            place = folder / row.code
            if self._stamps.get(row.key) == stamp and place.is_dir():
                done += len(channels) + 1 if row.inScene else 1
                yield done, total, row.name
                continue
            self._stamps.pop(row.key, None)
            for step in _writeCase(row, images, values, place):
                done += step
                yield done, total, row.name
            self._stamps[row.key] = stamp
            written += 1
        self._forget(cases)
        description = _description(cases, rows, layout, model)
        writeJson(folder / DATASET, description)
        _writeSplit(folder / SPLITS, rows)
        self._outcome = ExportOutcome("done", folder / DATASET, written)

    def _forget(self, cases: TrainingCases) -> None:
        """Removes the files of cases that are not on the list any more."""
        kept = {row.code for row in cases.rows}
        self._stamps = {row.key: self._stamps[row.key] for row in cases.rows if row.key in self._stamps}
        for path in self._folder.iterdir() if self._folder is not None else ():
            if path.is_dir() and path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _deliver(self, source: Path, target: Path) -> Iterator[tuple[int, int, str]]:
        target.mkdir(parents=True)
        description = json.loads((source / DATASET).read_text(encoding="utf-8"))
        files = [name for case in description["dataset"].values() for name in (*case["images"], case["label"]) if name]
        mine = [name for name in files if not Path(name).is_absolute()]
        for index, name in enumerate(mine):
            (target / name).parent.mkdir(exist_ok=True)
            _link(source / name, target / name)
            yield index + 1, len(mine), name
        if (source / SPLITS).is_file():
            shutil.copyfile(source / SPLITS, target / SPLITS)
        writeJson(target / DATASET, description)
        self._outcome = ExportOutcome("done", target / DATASET, len(mine))


# ---------------------------------------------------------------- one case


def _values(row: CaseRow, layout: Layout, model: Any, choices: dict[str, str]) -> dict[Any, int]:
    """Segment -> label value, in the order in which they are painted: that of the labels.

    A segment is named by its id in the scene, and by its number in a file.
    """
    known = [label.name for label in model.labels]
    names = segmentNames(row.segmentation) if row.stored is None else dict(enumerate(row.stored.segments))
    labels = {segment: labelOf(name, known, choices) for segment, name in names.items()}
    return {segment: value for name, value in layout.written for segment, label in labels.items() if label == name}


def _images(row: CaseRow, channels: tuple[str, ...], model: Any) -> dict[str, Any]:
    """Channel -> image of a case, in the order of these channels; None for one that it lacks."""
    images = imagesOf(row, model)
    return {name: images.get(name) for name in channels}


def _stamp(row: CaseRow, volumes: dict[str, Any], values: dict[Any, int]) -> tuple:
    if row.stored is not None:
        return (tuple(values.items()), _first(volumes), *row.stored.stamp())
    reference = volumes.get(_first(volumes))
    stamp: list[Any] = [tuple(values.items())]
    for name, volume in volumes.items():
        if volume is None or reference is None:
            stamp.append((name, None))
            continue
        image = volume.GetImageData()
        between = NodeConversion.linearTransformBetween(volume, reference)
        place = None if between is None else (between @ NodeConversion.volumeMatrix(volume)).tobytes()
        stamp.append((name, volume.GetID(), image.GetMTime() if image else 0, place))
    segmentation = row.segmentation.GetSegmentation()
    for segmentId in values:
        segment = segmentation.GetSegment(segmentId)
        image = segment.GetRepresentation(NodeConversion.BINARY_LABELMAP) if segment else None
        stamp.append((segmentId, segment.GetLabelValue() if segment else 0, image.GetMTime() if image else 0))
    between = NodeConversion.linearTransformBetween(row.segmentation, reference)
    stamp.append(None if between is None else between.tobytes())
    return tuple(stamp)


def _writeCase(row: CaseRow, images: dict[str, Any], values: dict[Any, int], place: Path) -> Iterator[int]:
    """Images of the scene and label map of a case in a folder that is renamed when all of them are there."""
    temporary = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        reference = images[_first(images)]
        if row.stored is not None:
            row.stored.writeLabels(temporary / LABEL, values, reference)
        else:
            for index, volume in enumerate(images.values()):
                if volume is not None:
                    frame = None if volume is reference else reference
                    NodeConversion.exportVolume(volume, temporary / _image(index), frame)
                yield 1
            writeLabels(temporary / LABEL, labelArray(row.segmentation, reference, values), reference)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(temporary, place)
        yield 1
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _first(images: dict[str, Any]) -> str | None:
    """The channel of the first image that is there; the labels lie on its grid."""
    return next((name for name, image in images.items() if image is not None), None)


def _image(index: int) -> str:
    return f"{index:04d}.nrrd"


def _link(source: Path, target: Path) -> None:
    """The same file under another name: it stays when the first one is replaced by a new one."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)


# ---------------------------------------------------------------- the description


def _description(cases: TrainingCases, rows, layout: Layout, model: Any) -> dict[str, Any]:
    """As nnU-Net v2 describes a data set, with a list of its files; those on disk stay where they are."""
    regions = any(len(label.values) > 1 for label in layout.labels)
    sets = [cases.dataSets[path] for path in dict.fromkeys(row.dataSet for row in rows if row.ofDataSet)]
    labels: dict[str, Any] = {"background": 0}
    labels |= {label.name: list(label.values) if regions else label.value for label in layout.labels}
    if layout.unknown is not None:
        labels[UNKNOWN] = layout.unknown
    description: dict[str, Any] = {
        "name": "fine-tuning",
        "channel_names": {str(index): name for index, name in enumerate(layout.channels)},
        "labels": labels,
        "numTraining": len(rows),
        "file_ending": ".nrrd",
    }
    if regions:
        description["regions_class_order"] = [label.value for label in layout.labels]
    if sets and all(each.severalInOneFile for each in sets):
        description["channels_in_one_file"] = True
    people = patients(cases)
    entries = {}
    for row in rows:
        if row.ofDataSet:
            own = namedAs(cases.dataSets[row.dataSet].channels, model)
            entry = {"images": _inOrder(row.files["images"], own, layout.channels), "label": row.files["label"]}
        else:
            found = list(_images(row, layout.channels, model).values())
            images = [f"{row.code}/{_image(index)}" if image else None for index, image in enumerate(found)]
            if row.stored is not None:
                images = [image.path if image else None for image in found]
            entry = {"images": images, "label": f"{row.code}/{LABEL}"}
        entries[row.code] = entry | {"patient": people[row.key]}
    description["dataset"] = entries
    return description


def _inOrder(files: list[str | None], own: Sequence[str], channels: Sequence[str]) -> list[str | None]:
    """The images of a case on disk in the order of the channels. own: what each of them is."""
    # Too many or too few, or all in one file: as they lie there; the data doctor says what is wrong with them.
    if len(files) != len(own):
        return list(files)
    return [files[own.index(name)] if name in own else None for name in channels]


def _writeSplit(path: Path, rows: list[CaseRow]) -> None:
    """The roles as a split that fine-tuning takes; without any case held out it makes its own."""
    sides = {role: [row.code for row in rows if row.role == role] for role in (TRAINING, VALIDATION)}
    if sides[VALIDATION]:
        writeJson(path, [{"train": sides[TRAINING], "val": sides[VALIDATION]}])
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
