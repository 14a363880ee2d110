"""Which cases a folder holds for a model, labelled or not; needs no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import InvresError
from .cases import case_problems, read_dataset
from .config import ChannelPlan
from .dataset_json import (
    Case,
    Dataset,
    list_files,
    list_folders,
    list_volumes,
    read_json_layout,
    stem_of,
)
from .events import SILENT, Reporter, listed
from .files import SEGMENTATION
from .segmentfiles import counted

__all__ = ["CaseInputs", "cases_to_segment", "chosen_channels", "inputs_of"]

DESCRIPTION = "dataset.json"
LABEL = re.compile(r"(.+[_-])?(labels?|seg|segmentation|dseg|mask)", re.IGNORECASE)


@dataclass(frozen=True)
class CaseInputs:
    """A case to be segmented. inputs: channel of the model -> file or DICOM folder; "" -> one file of all channels."""

    name: str
    inputs: Mapping[str, Path]


def chosen_channels(texts: Sequence[str], channels: Sequence[ChannelPlan], model: str) -> dict[str, str]:
    """Channel of the model -> its name in the data, from CHANNEL=NAME; the same name where nothing is said.

    Raises InvresError for a channel that the model has not, or that is given twice.
    """
    chosen = {channel.name: channel.name for channel in channels}
    own = {name.casefold(): name for name in chosen}
    given = set()
    for text in texts:
        channel, _, name = text.partition("=")
        known = own.get(channel.casefold())
        if known is None or not name or known in given:
            raise InvresError(
                f"With --data, --input says which of the data's channels is which of the model's, once for each; got "
                f"{text}.",
                hint=f"The model {model} takes {counted(list(chosen))}: --input {next(iter(chosen))}=NAME.",
                code="usage",
            )
        given.add(known)
        chosen[known] = name
    return chosen


def cases_to_segment(
    path: Path, channels: Sequence[ChannelPlan], model: str, chosen: Mapping[str, str], report: Reporter = SILENT
) -> list[CaseInputs]:
    """The cases of a data set, with or without labels; or of a folder of scans that is none.

    Of a folder of scans: files CASE_0000.nii.gz, CASE_0001.nii.gz... (nnU-Net), numbered as a dataset.json beside the
    folder or, without one, as the model counts its channels; files CASE_CHANNEL.nii.gz; for a model of one channel any
    files, one for each case, or a DICOM folder for each case; for several CASE/CHANNEL as DICOM folders; or files that
    hold all channels each. What is named as a label map or as another channel is left out, of which a note tells.
    chosen: see `chosen_channels`. Raises InvresError where there is no case, where the data lack a channel that the
    model needs, and for two cases of one name.
    """
    loose = _loose_files(path, channels, chosen) if path.is_dir() and not (path / DESCRIPTION).is_file() else []
    if loose:
        found = loose
        taken = {file for case in loose for file in case.inputs.values()}
        if left := [file.name for file in list_volumes(path) if file not in taken]:
            report.note(f"Left out, for their names are not those of images for {model}: {listed(left)}.")
    else:
        try:
            dataset = read_dataset(path, checked=False)
        except InvresError:
            found = _dicom_folders(path, channels, chosen)
            if not found:
                raise
        else:
            found = _of_dataset(dataset, channels, model, chosen)
    counts = Counter(case.name.casefold() for case in found)  # a disk may not tell capitals from small letters
    for case in found:
        if counts[case.name.casefold()] > 1:
            raise InvresError(
                f"Two cases in {path} have the name {case.name}, and the results would be one file.",
                hint="Rename one of them.",
            )
    return sorted(found, key=lambda case: case.name)


def inputs_of(dataset: Dataset, case: Case, chosen: Mapping[str, str] | None = None) -> dict[str, Path]:
    """The files of a case by channel; one file of all channels has no name.

    chosen: channel of a model -> channel of the data set; None = all that the data set has, by its own names.
    """
    if dataset.channels_in_one_file:
        image = case.images[0]
        return {} if image is None else {"": image}
    names, present = dataset.channel_names, dataset.present(case)
    there = {name: image for name, image, here in zip(names, case.images, present, strict=True) if here and image}
    if chosen is None:
        return there
    return {own: there[name] for own, name in chosen.items() if name in there}


def _of_dataset(
    dataset: Dataset, channels: Sequence[ChannelPlan], model: str, chosen: Mapping[str, str]
) -> list[CaseInputs]:
    for _, code, sentence in case_problems(dataset, partial=True):
        if code in ("duplicate_name", "channel_count"):
            raise InvresError(sentence, hint="Run `invres check` on the data set for the whole list.")
    names = {name.casefold(): name for name in dataset.channel_names}
    if len(chosen) == len(names) == 1 and list(chosen) == list(chosen.values()):
        matched = dict(zip(chosen, dataset.channel_names, strict=True))  # an only channel has no other to be taken for
    else:
        matched = {own: names[name.casefold()] for own, name in chosen.items() if name.casefold() in names}
    lacking = [channel.name for channel in channels if channel.name not in matched and not channel.optional]
    mixed = dataset.channels_in_one_file and [*matched.values()] != [*dataset.channel_names]
    there, taken = ", ".join(dataset.channel_names), counted(list(chosen))
    if mixed:
        raise InvresError(
            f"Each file of the data set ({dataset.layout}) holds the channels {there}, and the model {model} takes "
            f"{taken}.",
            hint="Write the channels into files of their own, such as CASE_CHANNEL.nii.gz, and give their folder.",
        )
    if lacking or not matched:
        raise InvresError(
            f"The model {model} takes {taken}, and the data set ({dataset.layout}) has {there}.",
            hint=f"Say which one it is: --input {(lacking or list(chosen))[0]}={dataset.channel_names[0]}.",
        )
    return [CaseInputs(case.name, inputs_of(dataset, case, matched)) for case in dataset.cases]


def _loose_files(folder: Path, channels: Sequence[ChannelPlan], chosen: Mapping[str, str]) -> list[CaseInputs]:
    """The cases of a folder that directly holds volume files."""
    files = [file for file in list_volumes(folder) if not file.name.lower().endswith(SEGMENTATION)]
    files = [file for file in files if not LABEL.fullmatch(stem_of(file))]
    numbered = _numbered(folder, files, chosen)
    if numbered:
        return numbered
    named = _named(files, chosen)
    if named:
        return named
    own = channels[0].name if len(channels) == 1 else ""
    return [CaseInputs(stem_of(file), {own: file}) for file in files]


def _numbered(folder: Path, files: Sequence[Path], chosen: Mapping[str, str]) -> list[CaseInputs]:
    """CASE_0000, CASE_0001...; nothing where a file has no such number, or one that stands for no channel."""
    own = {name.casefold(): channel for channel, name in chosen.items()}
    beside = folder.parent / DESCRIPTION
    names = read_json_layout(beside).channel_names if beside.is_file() else tuple(chosen.values())
    if len(names) == len(own) == 1:
        names = tuple(chosen.values())
    cases: dict[str, dict[str, Path]] = {}
    for file in files:
        match = re.fullmatch(r"(.+)_(\d{4})", stem_of(file))
        if match is None or int(match[2]) >= len(names):
            return []
        channel = own.get(names[int(match[2])].casefold())
        inputs = cases.setdefault(match[1], {})
        if channel is not None:
            inputs[channel] = file
    return [CaseInputs(name, inputs) for name, inputs in cases.items()]


def _named(files: Sequence[Path], chosen: Mapping[str, str]) -> list[CaseInputs]:
    """CASE_CHANNEL or CASE-CHANNEL; other files are other channels, which the model does not take."""
    cases: dict[str, dict[str, Path]] = {}
    for own, name in chosen.items():
        for file in files:
            if match := re.fullmatch(rf"(.+)[_-]{re.escape(name)}", stem_of(file), re.IGNORECASE):
                cases.setdefault(match[1], {})[own] = file
    return [CaseInputs(name, inputs) for name, inputs in cases.items()]


def _dicom_folders(root: Path, channels: Sequence[ChannelPlan], chosen: Mapping[str, str]) -> list[CaseInputs]:
    """CASE/ for one channel or CASE/CHANNEL/ for several, with a DICOM series in each."""
    cases = []
    for folder in list_folders(root):
        inner = {path.name.casefold(): path for path in list_folders(folder) if _is_dicom(path)}
        inputs = {own: inner[name.casefold()] for own, name in chosen.items() if name.casefold() in inner}
        if not inputs and len(channels) == 1 and _is_dicom(folder):
            inputs = {channels[0].name: folder}
        if inputs:
            cases.append(CaseInputs(folder.name, inputs))
    return cases


def _is_dicom(folder: Path) -> bool:
    """Whether it may be a DICOM series: files, and none of them a volume. What is in them is read later."""
    return bool(list_files(folder)) and not list_volumes(folder)
