"""The data set formats that are known by their folders and file names, one small reader for each."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from . import InvresError
from .config import Label, LabelScheme
from .dataset_json import (
    Case,
    Dataset,
    file_names,
    is_number,
    label_pairs,
    list_files,
    list_folders,
    list_volumes,
    make_dataset,
    plain_scheme,
    read_json,
    stem_of,
)
from .segmentation_file import segment_names
from .volume import read_channels, read_volume
from .volume_io import read_header

__all__ = ["FOLDER_PAIRS", "FOLDER_READERS", "LABELS_JSON", "label_list_of"]

FOLDER_PAIRS = (("images", "labels"), ("imagesTr", "labelsTr"))

LABEL_STEMS = ("label", "labels", "seg", "segmentation")
# Label values are looked up in so many label files at most where nothing states them; all, for nearly every data set.
# A value that is in others only is told of by the data doctor, which reads every file.
LABEL_FILES_READ = 500
LABELS_JSON = "labels.json"
# Formats whose labels are what their publishers say, whatever the files hold.
PUBLISHED = ("BraTS 2020", "BraTS 2023", "KiTS19", "iSeg", "HCP")
BIDS = "BIDS derivatives"
PER_CASE = "a folder per case"
# What Slicer calls segments that nobody has named.
UNNAMED = re.compile(r"segment([ _]\d+)?")
# What decides whether a name that not all cases have is a channel.
FEW = 5
FEWEST_CASES = 2
RARE = 0.05
# A case as found: its name, its patient, its image of each channel, its label map.
Found = tuple[str, str, dict[str, Path], Path | None]


def _brats(root: Path) -> Dataset | None:
    """BraTS 2020: BraTS20_Training_001/BraTS20_Training_001_{t1,t1ce,t2,flair,seg}.nii(.gz)."""
    cases = []
    for folder in list_folders(root, r"BraTS20_.+_\d+"):
        files = {stem_of(file).removeprefix(f"{folder.name}_").lower(): file for file in list_volumes(folder)}
        # BraTS20_Training_355 was published with its label as W39_1998.09.19_Segm.nii.
        label = files.get("seg") or next((file for key, file in files.items() if key.endswith("segm")), None)
        images = tuple(files.get(key, folder / f"{folder.name}_{key}.nii.gz") for key in ("t1", "t1ce", "t2", "flair"))
        cases.append(Case(folder.name, images, label))
    return _brats_dataset(root, cases, 4, "BraTS 2020")


def _brats_2023(root: Path) -> Dataset | None:
    """BraTS 2023 and 2024: BraTS-GLI-00001-000/BraTS-GLI-00001-000-{t1n,t1c,t2w,t2f,seg}.nii.gz.

    Of glioma, metastases, meningioma and Africa (GLI, MET, MEN, SSA), whose labels are the same; the children's (PED)
    have others in 2024, so they are read as any folder per case. The last number is that of the visit. Enhancing tumour
    is 3, where it was 4 until 2020; channels and regions have the names of 2020, so that models of either know the data
    of both.
    """
    cases = []
    for folder in list_folders(root, r"BraTS-(GLI|MET|MEN|SSA)-\d+-\d+"):
        files = {stem_of(file).removeprefix(f"{folder.name}-").lower(): file for file in list_volumes(folder)}
        images = tuple(files.get(key, folder / f"{folder.name}-{key}.nii.gz") for key in ("t1n", "t1c", "t2w", "t2f"))
        cases.append(Case(folder.name, images, files.get("seg"), folder.name.rpartition("-")[0]))
    return _brats_dataset(root, cases, 3, "BraTS 2023")


def _brats_dataset(root: Path, cases: list[Case], enhancing: int, layout: str) -> Dataset | None:
    """Channels and regions of BraTS. enhancing: the value of enhancing tumour."""
    regions = (
        Label("whole_tumour", (1, 2, enhancing), 2),
        Label("tumour_core", (1, enhancing), 1),
        Label("enhancing_tumour", (enhancing,), enhancing),
    )
    scheme = LabelScheme(regions, regions=True)
    channels = ["T1", "T1ce", "T2", "FLAIR"]
    return make_dataset(root.name, channels, scheme, cases, root, layout) if cases else None


def _kits(root: Path) -> Dataset | None:
    """KiTS19: case_00000/{imaging,segmentation}.nii.gz; the last 90 cases have no segmentation."""
    cases = []
    for folder in list_folders(root, r"case_\d{5}"):
        files = {stem_of(file): file for file in list_volumes(folder)}
        if "imaging" in files or "segmentation" in files:
            image = files.get("imaging", folder / "imaging.nii.gz")
            cases.append(Case(folder.name, (image,), files.get("segmentation")))
    scheme = LabelScheme((Label("kidney", (1,), 1), Label("tumour", (2,), 2)))
    return make_dataset(root.name, ["CT"], scheme, cases, root, "KiTS19") if cases else None


def _iseg(root: Path) -> Dataset | None:
    """iSeg-2017 and 2019: subject-1-T1, subject-1-T2, subject-1-label as .hdr/.img or NIfTI, all in one folder."""
    subjects: dict[str, dict[str, Path]] = {}
    for file in list_volumes(root):
        if match := re.fullmatch(r"(subject-\d+)-(T1|T2|label)", stem_of(file)):
            subjects.setdefault(match[1], {})[match[2]] = file
    cases = []
    for name, files in sorted(subjects.items()):
        images = tuple(files.get(channel, root / f"{name}-{channel}.hdr") for channel in ("T1", "T2"))
        cases.append(Case(name, images, files.get("label")))
    scheme = LabelScheme((Label("CSF", (10,), 10), Label("GM", (150,), 150), Label("WM", (250,), 250)))
    return make_dataset(root.name, ["T1", "T2"], scheme, cases, root, "iSeg") if cases else None


def _hcp(root: Path) -> Dataset | None:
    """HCP Young Adult, "Structural Preprocessed": 100307/T1w/{T1w,T2w}_acpc_dc_restore.nii.gz with ribbon.nii.gz.

    The ribbon has FreeSurfer's values of white matter and cortex on either side; it says nothing of the rest.
    """
    found: list[Found] = []
    for subject in list_folders(root, r"\d{6}"):
        files = {stem_of(file): file for file in list_volumes(subject / "T1w")}
        contrasts = {"T1": "T1w_acpc_dc_restore", "T2": "T2w_acpc_dc_restore"}
        images = {channel: files[stem] for channel, stem in contrasts.items() if stem in files}
        if images:
            found.append((subject.name, subject.name, images, files.get("ribbon")))
    if not found:
        return None
    sides = (("left white matter", 2), ("left cortex", 3), ("right white matter", 41), ("right cortex", 42))
    scheme = LabelScheme(tuple(Label(name, (value,), value) for name, value in sides))
    channels, cases = _with_channels(found)
    return make_dataset(root.name, channels, scheme, cases, root, "HCP")


def _bids(root: Path) -> Dataset | None:
    """BIDS derivatives: sub-*/[ses-*/]anat/*_T1w.nii.gz, labels *_dseg.nii.gz there or in derivatives/*/sub-*/."""
    found: list[Found] = []
    for subject in list_folders(root, "sub-.+"):
        for session in list_folders(subject, "ses-.+") or [subject]:
            inside = session.relative_to(root) / "anat"
            name = "_".join(inside.parts[:-1])
            derived = [folder / inside for folder in list_folders(root / "derivatives")]
            images: dict[str, Path] = {}
            labels = []
            for file in [file for folder in (root / inside, *derived) for file in list_volumes(folder)]:
                entities, _, suffix = stem_of(file).rpartition("_")
                contrast = re.search(r"_ce-([^_]+)", f"_{entities}")
                channel = f"{suffix}_{contrast[1]}" if contrast else suffix
                if suffix == "dseg":
                    labels.append(file)
                elif suffix in ("T1w", "T2w", "FLAIR", "PDw", "T2starw") and file.parent == root / inside:
                    if channel in images:
                        raise _ambiguous(name, channel, images[channel], file)
                    images[channel] = file
            if len(labels) > 1:
                raise _ambiguous(name, "dseg", *labels[:2])
            if images:
                found.append((name, subject.name, images, labels[0] if labels else None))
    if not found:
        return None
    channels, cases = _with_channels(found)
    return make_dataset(root.name, channels, _bids_scheme(root, cases), cases, root, BIDS)


def _ambiguous(case: str, what: str, first: Path, second: Path) -> InvresError:
    return InvresError(
        f"The case {case} has two {what} files, {first.name} and {second.name}.",
        hint="Keep one of them in the data set, or list the wanted files in a dataset.json.",
    )


def _bids_scheme(root: Path, cases: list[Case]) -> LabelScheme:
    """Label names from the first *_dseg.tsv (columns index and name) at the root, a derivative's, or a case's."""
    if (table := _bids_table(root, cases)) is not None:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
        if not rows or not all(is_number(row.get("index")) and row.get("name") for row in rows):
            raise InvresError(f"{table} must have the columns index and name.", hint="Correct its first line.")
        return plain_scheme((row["name"], (int(row["index"]),)) for row in rows)
    return _scheme_of_files(root, cases)


def _bids_table(root: Path, cases: Iterable[Case]) -> Path | None:
    folders = [root, *list_folders(root / "derivatives")]
    folders += list(dict.fromkeys(case.label.parent for case in cases if case.label is not None))
    return next((file for folder in folders for file in list_files(folder) if file.name.endswith("dseg.tsv")), None)


def _folder_pair(root: Path) -> Dataset | None:
    """images/ + labels/, or imagesTr/ + labelsTr/ without a dataset.json: equal file names, one image file a case."""
    present = [pair for pair in FOLDER_PAIRS if (root / pair[0]).is_dir()]
    if not present:
        return None
    images, labels = present[0]
    label_files = {stem_of(file): file for file in list_volumes(root / labels)}
    cases = []
    for image in list_volumes(root / images):
        # As for nnU-Net: with label files present, an absent one is a missing file and not an unlabelled case.
        expected = root / labels / image.name if label_files else None
        cases.append(Case(stem_of(image), (image,), label_files.get(stem_of(image), expected)))
    with_image = {case.name for case in cases}
    if cases and label_files and not with_image & label_files.keys():
        raise InvresError(
            f"No file in {root / images} (as {file_names(cases[0].images)}) has the name of one in {root / labels}.",
            hint="Give image and label equal names, or write a dataset.json for files such as CASE_0000.nii.gz.",
        )
    for name in sorted(label_files.keys() - with_image):
        cases.append(Case(name, (root / images / label_files[name].name,), label_files[name]))
    count = _channel_count(cases)
    channels = ["image"] if count == 1 else [f"channel_{index}" for index in range(count)]
    scheme = _scheme_of_files(root, cases)
    return make_dataset(root.name, channels, scheme, cases, root, _pair_name((images, labels)), True)


def _pair_name(folders: tuple[str, str]) -> str:
    return f"{folders[0]} and {folders[1]} folders"


def _channel_count(cases: list[Case]) -> int:
    """How many channels the first readable image file holds."""
    for case in cases:
        try:
            return sum(len(read_channels(image)) for image in case.images if image is not None)
        except InvresError:
            continue  # named with its case when that case is loaded
    return 1


def _folder_per_case(root: Path) -> Dataset | None:
    """A folder per case with files named by channel (T1.nii.gz, CASE_T1.nii.gz or CASE-T1.nii.gz) and label, seg or
    segmentation."""
    found: list[Found] = []
    for folder in list_folders(root):
        images: dict[str, Path] = {}
        label = None
        for file in list_volumes(folder):
            channel = stem_of(file).removeprefix(f"{folder.name}_").removeprefix(f"{folder.name}-")
            if channel.lower() in LABEL_STEMS:
                if label is not None:
                    raise _ambiguous(folder.name, "label", label, file)
                label = file
            elif channel in images:
                raise _ambiguous(folder.name, channel, images[channel], file)
            else:
                images[channel] = file
        if images:
            found.append((folder.name, folder.name, images, label))
    if not found:
        return None
    channels, cases = _with_channels(found)
    return make_dataset(root.name, channels, _scheme_of_files(root, cases), cases, root, PER_CASE)


def _scheme_of_files(root: Path, cases: list[Case]) -> LabelScheme:
    """Names from a labels.json beside the data; else those that Slicer's segmentations give; else the values found in
    the label files, as label_1, label_2..."""
    if (path := root / LABELS_JSON).is_file():
        labels = read_json(path)
        if not isinstance(labels, dict):
            raise InvresError(f"{path} must be an object, got {labels!r}.", hint='Write {"1": "anterior"}.')
        return plain_scheme(label_pairs(path, labels))
    files = [case.label for case in cases if case.label is not None and case.label.is_file()]
    chosen = sorted({round(i) for i in np.linspace(0, len(files) - 1, LABEL_FILES_READ)}) if files else []
    found: set[int] = set()
    for index in chosen:
        try:
            found |= _values(read_volume(files[index], kind="labels").array)
        except InvresError:
            continue  # an unreadable file is named with its case when that case is loaded
    names = _segment_names(root, files)
    return plain_scheme((names.get(value, f"label_{value}"), (value,)) for value in found | names.keys())


def _values(array: np.ndarray) -> set[int]:
    """The values of a label map. Counting spares the sorting of `np.unique`."""
    if array.dtype in (np.uint8, np.uint16):
        return set(np.flatnonzero(np.bincount(array.ravel())).tolist())
    return {int(value) for value in np.unique(array)}


def label_list_of(dataset: Dataset) -> str:
    """The file that lists the labels of a data set, or may do so; "" where its format says what they are."""
    if dataset.layout in PUBLISHED:
        return ""
    if dataset.layout == BIDS and (table := _bids_table(dataset.root, dataset.cases)) is not None:
        return table.name
    free = dataset.layout in (BIDS, PER_CASE, *(_pair_name(pair) for pair in FOLDER_PAIRS))
    return LABELS_JSON if free else "dataset.json"


def _segment_names(root: Path, files: list[Path]) -> dict[int, str]:
    """Value -> name in the .seg.nrrd files among these; what Slicer calls a segment that nobody has named is no name.

    Raises InvresError where a value is called otherwise in another file, or a name has another value: Slicer numbers
    segments as they were made.
    """
    names: dict[int, tuple[str, Path]] = {}
    values: dict[str, tuple[int, Path]] = {}
    for file in (one for one in files if one.name.lower().endswith(".seg.nrrd")):
        try:
            fields = read_header(file).metadata
        except InvresError:
            continue  # named with its case when that case is loaded
        here = file.relative_to(root) if file.is_relative_to(root) else file
        for value, name in segment_names(fields).items():
            plain = name.strip().casefold()
            if UNNAMED.fullmatch(plain):
                continue
            known, where = names.setdefault(value, (name, here))
            number, place = values.setdefault(plain, (value, here))
            if known.strip().casefold() != plain:
                raise _contradiction(f"The label value {value} is {known} in {where} and {name} in {here}")
            if number != value:
                raise _contradiction(f"{name} has the label value {number} in {place} and {value} in {here}")
    return {value: name for value, (name, _) in names.items()}


def _contradiction(what: str) -> InvresError:
    return InvresError(
        f"{what}, so the files cannot be learned from together.",
        hint="Give each structure one value in all files (in Slicer: export with a colour table), or load the cases "
        "into Slicer's scene and add them from there in the tab Fine-tune, which goes by names.",
    )


def _with_channels(found: list[Found]) -> tuple[list[str], list[Case]]:
    """All channels that the cases have, sorted by name; a case that lacks one has None in its place.

    What fewer than `FEWEST_CASES` or less than `RARE` of the cases have is no channel (with less than `FEW` cases all
    are): a scan that is hardly ever there cannot be learnt from, so such a name is a misspelt one or another kind of
    file, and all other cases would be said to lack it. It stays with its case, as one image file too many, which
    `case_problems` names. Where no name is common, the channels are those of the most frequent set.
    """
    counts = Counter(channel for _, _, images, _ in found for channel in images)
    fewest = 1 if len(found) < FEW else max(FEWEST_CASES, RARE * len(found))
    channels = sorted(channel for channel, count in counts.items() if count >= fewest)
    if not channels:
        ((most, _),) = Counter(tuple(sorted(images)) for _, _, images, _ in found).most_common(1)
        channels = list(most)
    cases = []
    for name, patient, images, label in found:
        extra = [images[channel] for channel in sorted(images.keys() - set(channels))]
        cases.append(Case(name, (*(images.get(channel) for channel in channels), *extra), label, patient))
    return channels, cases


# In the order of trial: names that no other format uses come first.
FOLDER_READERS: tuple[Callable[[Path], Dataset | None], ...] = (
    _brats,
    _brats_2023,
    _kits,
    _iseg,
    _hcp,
    _bids,
    _folder_pair,
    _folder_per_case,
)
