"""Where the cases of a batch come from: the scene, a data set, a folder of images, studies of the DICOM database."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import slicer
from slicer.i18n import tr as _

from . import NodeConversion
from .BatchCase import FAILED, BatchCase, patientCode
from .CaseChannels import namedFor
from .ChannelMatching import describeVolume, match
from .VolumeDescription import DICOM_TAGS, VolumeDescription, choosableImages

__all__ = ["casesOfDatabase", "casesOfDataset", "casesOfFolder", "casesOfListing", "casesOfScene"]

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
LABEL_FILES = ".seg.nrrd"
IMAGE_MODALITIES = ("MR", "CT", "PT", "NM", "US", "XA", "MG", "OT")


def casesOfScene(channels: Sequence[Any]) -> list[BatchCase]:
    """Each volume of the scene for a model of one channel; else each study or folder of the subject hierarchy."""
    nodes = [node for node in choosableImages(slicer.mrmlScene) if not NodeConversion.exportProblem(node)]
    if len(channels) == 1:
        return [BatchCase(node.GetName(), nodes={channels[0].name: node}) for node in nodes]
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    groups: dict[int, list] = {}
    for node in nodes:
        item = hierarchy.GetItemByDataNode(node) if hierarchy is not None else 0
        parent = hierarchy.GetItemParent(item) if hierarchy is not None else 0
        groups.setdefault(parent, []).append(node)
    found = []
    for parent, members in groups.items():
        byId = {node.GetID(): node for node in members}
        matches = match(channels, [describeVolume(node) for node in members])
        chosen = {one.channel: byId[one.volume.key] for one in matches if one.volume is not None}
        if chosen:
            top = hierarchy is None or parent in (hierarchy.GetSceneItemID(), hierarchy.GetInvalidItemID())
            name = members[0].GetName() if top else hierarchy.GetItemName(parent)
            found.append(_withProblem(BatchCase(name, nodes=chosen), matches, channels))
    return found


def casesOfDataset(contents: dict[str, Any], channels: Sequence[Any]) -> list[BatchCase]:
    """The cases that the backend found in a data set (`contents` of `check`), with the channels of the model.

    Raises ConversionError where the data set does not have them.
    """
    names = [str(one.get("name") or "") for one in contents.get("channels") or []]
    if contents.get("channels_in_one_file") and len(names) > 1:
        raise NodeConversion.ConversionError(
            _("The cases of this data set have all channels in one file."),
            _("Split them into a file for each channel."),
        )
    named, places = namedFor(names, channels), {}
    for channel in channels:
        if channel.name in named:
            places[channel.name] = named.index(channel.name)
        elif not channel.optional:
            raise NodeConversion.ConversionError(
                _("The data set has no channel {name}; it has {names}.").format(
                    name=channel.name, names=", ".join(names)
                ),
                _("Choose another model, or rename the channel if it is the same."),
            )
    found = []
    for case in contents.get("cases") or []:
        images = case.get("images") or []
        files = {name: Path(images[place]) for name, place in places.items() if place < len(images) and images[place]}
        patient = str(case.get("patient") or "")
        code = patientCode(str(contents.get("root") or ""), patient) if patient else ""
        found.append(BatchCase(str(case.get("name") or ""), files=files, patient=code))
    return found


def casesOfListing(listed: Sequence[dict[str, Any]]) -> list[BatchCase]:
    """The cases that the backend found in a folder of scans (`cases` of `segment --list`).

    Files that it takes to hold all channels of a model are passed over: a person may have meant something else by them.
    """
    found = []
    for case in listed:
        files = {str(channel): Path(path) for channel, path in (case.get("inputs") or {}).items()}
        if files and "" not in files:
            found.append(BatchCase(str(case.get("name") or ""), files=files))
    return found


def casesOfFolder(folder: Path, channels: Sequence[Any]) -> list[BatchCase]:
    """What the backend makes nothing of: for a model of one channel each image file, here or in the sub-folders; else
    each sub-folder, or the folder itself, its files told apart by their names as those of loaded volumes are."""
    if len(channels) == 1:
        files = _imagesIn(folder) or [file for sub in _foldersIn(folder) for file in _imagesIn(sub)]
        return [BatchCase(_stem(file), files={channels[0].name: file}) for file in files]
    found = []
    for sub in _foldersIn(folder) or [folder]:
        files = {str(file): file for file in _imagesIn(sub)}
        matches = match(channels, [VolumeDescription(_stem(file), key=key) for key, file in files.items()])
        chosen = {one.channel: files[one.volume.key] for one in matches if one.volume is not None}
        if chosen:
            found.append(_withProblem(BatchCase(sub.name, files=chosen), matches, channels))
    return found


def casesOfDatabase(database: Any, channels: Sequence[Any]) -> Iterator[tuple[int, int, BatchCase | None]]:
    """The studies of Slicer's DICOM database, one at a time: how many are read, of how many, and the case in this one.

    None where a study has no series for the model's channels. A case names the first file of a series: the backend
    reads the others that belong to it. Reading headers takes its time, so whoever iterates lets Slicer breathe.
    """
    studies = [(patient, study) for patient in database.patients() for study in database.studiesForPatient(patient)]
    for number, (patient, study) in enumerate(studies, 1):
        yield number, len(studies), _caseOfStudy(database, patient, study, channels)


def _caseOfStudy(database: Any, patient: str, study: str, channels: Sequence[Any]) -> BatchCase | None:
    described = {}
    for series in database.seriesForStudy(study):
        files = database.filesForSeries(series)
        if files and database.fileValue(files[0], DICOM_TAGS["modality"]) in IMAGE_MODALITIES:
            described[series] = _describedSeries(database, series, files[0]), Path(files[0])
    matches = match(channels, [description for description, _file in described.values()])
    chosen = {one.channel: described[one.volume.key][1] for one in matches if one.volume is not None}
    if not chosen:
        return None
    words = (database.displayedNameForPatient(patient), database.descriptionForStudy(study))
    name = ", ".join(word for word in words if word) or study
    code = patientCode(database.databaseFilename, patient)
    return _withProblem(BatchCase(name, files=chosen, patient=code), matches, channels)


def _describedSeries(database: Any, series: str, file: str) -> VolumeDescription:
    header = {key: database.fileValue(file, tag) or "" for key, tag in DICOM_TAGS.items()}
    name = database.descriptionForSeries(series) or series
    return VolumeDescription.fromHeader(name, header, key=series)


def _withProblem(case: BatchCase, matches: Sequence[Any], channels: Sequence[Any]) -> BatchCase:
    """A case that lacks a channel which the model needs says so at once, and is left out of the run."""
    optional = {channel.name for channel in channels if channel.optional}
    problems = [one.sentence for one in matches if one.volume is None and one.channel not in optional]
    if problems:
        case.state, case.message = FAILED, " ".join(problems)
    return case


def _imagesIn(folder: Path) -> list[Path]:
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    fitting = (path for path in files if path.name.lower().endswith(SUFFIXES))
    return sorted(path for path in fitting if not path.name.lower().endswith(LABEL_FILES))


def _foldersIn(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _stem(path: Path) -> str:
    suffix = next((one for one in SUFFIXES if path.name.lower().endswith(one)), path.suffix)
    return path.name[: len(path.name) - len(suffix)]
