"""The data doctor (`invres check`): what is odd in a data set, in sentences, and what will be done about each thing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from . import InvresError
from .alignment import (
    IMAGE_TOLERANCE_MM,
    LABEL_TOLERANCE_MM,
    LEAST_OVERLAP,
    align_channels,
    overlap,
    same_place,
)
from .cases import Case, Dataset, case_problems, split_cases
from .config import ChannelPlan
from .dataset_json import read_json
from .events import SILENT, Recorder, Reporter
from .expectation import unlike_modality
from .layouts import LABELS_JSON, label_list_of
from .sides import side_pairs
from .volume import Geometry, Volume

__all__ = ["Finding", "check_dataset", "findings_table"]

Severity = Literal["error", "warning", "note"]

# A case whose spacing differs from the median by more than this factor is named.
SPACING_FACTOR = 2.0
# Labels with more than this part on empty background do not belong to their image.
OUTSIDE_FRACTION = 0.25
# Below this value (Hounsfield units) CT shows air or nothing, and MR has no values at all.
CT_AIR = -950
# The table shows this many sentences of one kind; all are in the list.
SHOWN_MESSAGES = 3


@dataclass(frozen=True)
class Finding:
    """One observation.

    case: its name, "" for the whole data set. code: a stable word for programs.
    message: what was seen, one sentence. action: what will be done, or is to be done, about it, one sentence.
    """

    case: str
    severity: Severity
    code: str
    message: str
    action: str


def check_dataset(dataset: Dataset, report: Reporter = SILENT) -> list[Finding]:
    """Reads every case of `dataset` once and lists what is wrong or odd; errors first, then by case.

    `dataset` may come from `read_dataset(path, checked=False)`. A broken case becomes a finding and the check goes
    on. Emits progress per case under the stage "check.cases".
    """
    findings = [_file_finding(*problem) for problem in case_problems(dataset)]
    broken = {finding.case for finding in findings if finding.code not in ("duplicate_name", "missing_channel")}
    spacings: dict[str, tuple[float, float, float]] = {}
    digests: dict[str, str] = {}
    labelled: dict[str, set[int]] = {}
    report.progress("check.cases", 0, len(dataset.cases))
    for index, case in enumerate(dataset.cases):
        if case.name not in broken:
            try:
                findings += _check_case(dataset, case, spacings, digests, labelled)
            # One broken file must not hide the other cases: InvresError, and what readers throw for damaged data.
            except (InvresError, OSError, RuntimeError, ValueError, MemoryError) as error:
                reason = error.message if isinstance(error, InvresError) else f"It cannot be read: {error}."
                findings.append(
                    Finding(case.name, "error", "unreadable", reason, "Export the case again or remove it.")
                )
        report.progress("check.cases", index + 1, len(dataset.cases))
    findings += _spacing_outliers(spacings)
    findings += _duplicates(dataset, digests)
    findings += _missing_labels(dataset, labelled)
    findings += _whole_dataset(dataset)
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(findings, key=lambda finding: (order[finding.severity], finding.case))


def findings_table(findings: list[Finding]) -> str:
    """The findings as text of 100 columns for a terminal; repeated findings of many cases share one entry."""
    if not findings:
        return "No problem was found."
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.code, finding.action), []).append(finding)
    lines = []
    for (severity, code, action), members in groups.items():
        names = list(dict.fromkeys(member.case for member in members))
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        lines.append(f"{severity.upper():<8} {code:<20} {shown or 'data set'}")
        messages = [("  ", member.message) for member in members[:SHOWN_MESSAGES]]
        if len(members) > SHOWN_MESSAGES:
            messages.append(("  ", f"and {len(members) - SHOWN_MESSAGES} more like these."))
        for prefix, text in (*messages, ("  -> ", action)):
            lines += textwrap.wrap(text, 100, initial_indent=" " * 9 + prefix, subsequent_indent=" " * 14)
    counts = {kind: sum(finding.severity == kind for finding in findings) for kind in ("error", "warning", "note")}
    summary = ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items() if count)
    return "\n".join([*lines, "", f"{summary}."])


def _file_finding(case: str, code: str, message: str) -> Finding:
    actions = {
        "duplicate_name": "Rename one of the cases; training refuses the data set until then.",
        "channel_count": "Add or remove image files of this case; training refuses the data set until then.",
        "missing_file": "Put the file there or remove the case; training refuses the data set until then.",
        "missing_channel": "Put the file there or remove the case; only training with channel dropout accepts it.",
    }
    return Finding(case, "error", code, message, actions[code])


def _check_case(
    dataset: Dataset,
    case: Case,
    spacings: dict[str, tuple[float, float, float]],
    digests: dict[str, str],
    labelled: dict[str, set[int]],
) -> Iterator[Finding]:
    """The findings of one case; notes its spacing, the digest of its voxels and the values of its label map for
    comparison with the others.
    """
    recorder = Recorder()
    found, label = dataclasses.replace(dataset, aligned=False).load(case, recorder)
    for event in recorder.events:
        if event["event"] == "warning":
            code = "not_finite" if "NaN" in event["message"] else "header_repaired"
            yield Finding(case.name, "warning", code, event["message"], "The repaired volume is used; nothing to do.")
    there = [place for place, volume in enumerate(found) if volume is not None]
    names = [dataset.channel_names[place] for place in there]
    modalities = tuple(dataset.modalities[place] for place in there)
    originals = [volume for volume in found if volume is not None]
    stored = originals[0].geometry
    volumes = [volume.canonical() for volume in originals]
    grid = volumes[0].geometry
    spacings[case.name] = grid.spacing_mm
    digests[case.name] = _digest(volumes)
    for name, modality, volume in zip(names, modalities, volumes, strict=True):
        yield from _check_volume(case.name, name, modality, volume)
        if not grid.same_as(volume.geometry, tolerance_mm=IMAGE_TOLERANCE_MM):
            yield _channel_grid(case.name, (names[0], grid), (name, volume.geometry), dataset.aligned)
    if label is None:
        yield Finding(
            case.name,
            "note",
            "missing_label",
            f"{case.name} has no label.",
            "The case is left out of training; it can be segmented.",
        )
        return
    stored_label = label.geometry
    close = stored.same_as(stored_label, tolerance_mm=LABEL_TOLERANCE_MM)
    label = (Volume(label.array, stored) if close else label).canonical()
    labelled[case.name] = {int(value) for value in np.unique(label.array)} - {0}
    yield from _check_label_values(case.name, labelled[case.name], dataset)
    yield from _check_sides(case.name, label, dataset)
    if grid.same_as(label.geometry, tolerance_mm=LABEL_TOLERANCE_MM):
        if dataset.aligned:
            with contextlib.suppress(InvresError):  # told of as grid_mismatch
                aligned, _ = align_channels(originals, names)
                volumes = [volume.canonical() for volume in aligned if volume is not None]
        yield from _check_label_place(case.name, volumes, label.array, modalities, dataset.scheme.ignore_value)
    else:
        grids = zip(names, originals, strict=True)
        others = [name for name, one in grids if same_place(one.geometry, stored_label, LABEL_TOLERANCE_MM)]
        yield _label_grid(case.name, stored, stored_label, others)


def _check_volume(case: str, channel: str, modality: str, volume: Volume) -> Iterator[Finding]:
    lowest, highest = float(volume.array.min()), float(volume.array.max())
    if lowest == highest:
        yield Finding(
            case,
            "error",
            "constant_image",
            f"The {channel} volume of {case} is empty: every voxel is {lowest:g}.",
            "Export the volume again or remove the case; training refuses it.",
        )
    elif modality != "CT" and lowest <= CT_AIR and highest > 0:
        yield Finding(
            case,
            "note",
            "looks_like_ct",
            f"The {channel} volume of {case} starts at {lowest:g} and looks like CT, but its channel is not called CT.",
            "It is z-scored like MR; name the channel CT in dataset.json to have Hounsfield units clipped and scaled.",
        )
    elif modality == "CT" and unlike_modality([ChannelPlan(channel, modality)], [volume.array]):
        yield Finding(
            case,
            "warning",
            "not_hounsfield",
            f"The {channel} volume of {case} does not look like CT in Hounsfield units: its smallest value is "
            f"{lowest:g}, and air has about -1000.",
            "It is clipped and scaled as Hounsfield units all the same; export it with its rescaling, or give the "
            "channel another name if it is no CT.",
        )


def _check_label_values(case: str, found: set[int], dataset: Dataset) -> Iterator[Finding]:
    scheme = dataset.scheme
    known = {value for entry in scheme.labels for value in entry.values}
    ignored = set() if scheme.ignore_value is None else {scheme.ignore_value}
    known |= ignored
    if not found - ignored:
        yield Finding(
            case,
            "warning",
            "empty_label",
            f"The label of {case} is empty: it holds background{' and voxels to ignore' if found else ''} only.",
            "The case teaches background only; draw what should be labelled, or remove the case.",
        )
    if unknown := sorted(found - known):
        values = ", ".join(map(str, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
        yield Finding(
            case,
            "warning",
            "unknown_label_value",
            f"The label of {case} has values that the data set does not name: {values}.",
            _how_to_name(dataset),
        )


def _check_sides(case: str, label: Volume, dataset: Dataset) -> Iterator[Finding]:
    """Labels whose names say left and right, where the header has them the other way round."""
    pairs = side_pairs(dataset.scheme.names)
    if not pairs:
        return
    values = np.array(sorted({value for entry in dataset.scheme.labels for value in entry.values}))
    counts, sums_mm = np.zeros(len(values)), np.zeros(len(values))
    down, forward, right = label.geometry.affine[0, :3]
    for place, plane in enumerate(label.array):  # places of all voxels at once take ten times the label's memory
        h, w = np.nonzero(np.isin(plane, values))
        which = np.searchsorted(values, plane[h, w])
        counts += np.bincount(which, minlength=len(values))
        sums_mm += np.bincount(which, down * place + forward * h + right * w, len(values))
    middles = {}
    for entry in dataset.scheme.labels:
        its = np.isin(values, entry.values)
        if counts[its].any():
            middles[entry.name] = sums_mm[its].sum() / counts[its].sum()
    there = [(left, right) for left, right in pairs if left in middles and right in middles]
    swapped = [(left, right) for left, right in there if middles[left] > middles[right]]
    # One pair may lie oddly (a part of the heart, say); what is mirrored has most of them swapped.
    if 2 * len(swapped) > len(there):
        left, right = swapped[0]
        others = f", and so it is with {len(swapped)} of its {len(there)} pairs of sides" if len(there) > 1 else ""
        yield Finding(
            case,
            "warning",
            "sides_swapped",
            f"By the header of {case}, {left} lies to the right of {right}{others}.",
            "Look in a viewer whether labels are swapped or the image is mirrored, and correct it; training takes the "
            "case as it is.",
        )


def _how_to_name(dataset: Dataset) -> str:
    """What to do about label values that the data set does not name."""
    listed = label_list_of(dataset)
    if not listed:
        return f"They count as background, for {dataset.layout} has no such labels; correct them, if that is wrong."
    if listed == LABELS_JSON:
        there = "add them to" if (dataset.root / listed).is_file() else "name all label values in"
        return f'They count as background; {there} {listed} beside the data ({{"1": "anterior"}}) to learn them.'
    where = f"`labels` in {listed}" if listed == "dataset.json" else listed
    return f"They count as background; add them to {where} to learn them."


def _channel_grid(case: str, first: tuple[str, Geometry], other: tuple[str, Geometry], aligned: bool) -> Finding:
    """What to say of a channel (name, canonical grid) that lies on another grid than the first one."""
    (wanted, grid), (name, own) = first, other
    message = f"{wanted} and {name} of {case} lie on different grids ({grid.difference(own)})."
    if (part := overlap(grid, own)) < LEAST_OVERLAP:
        covers = f"{name} covers only {max(1, round(100 * part))} % of {wanted}" if part else "They do not overlap"
        action = f"{covers}: correct the headers, or register them first; training refuses the case."
        return Finding(case, "error", "grid_mismatch", message, action)
    if aligned:
        action = f"{name} is resampled to the grid of {wanted} by what the headers say; nothing is registered."
        return Finding(case, "note", "grid_mismatch", message, action)
    action = (
        f"Resample {name} to the grid of {wanted}, which --align of the command line does by what the headers say; "
        "training refuses the case as it is."
    )
    return Finding(case, "error", "grid_mismatch", message, action)


def _label_grid(case: str, image: Geometry, label: Geometry, others: list[str]) -> Finding:
    """What to say of a label that lies on another grid than its image; both grids as stored.

    others: the channels on whose grid it does lie.
    """
    difference = image.difference(label)
    if others:
        return Finding(
            case,
            "error",
            "label_grid_mismatch",
            f"The label of {case} lies on the grid of {others[0]} and not on that of the first channel ({difference}).",
            f"Name {others[0]} first among the channels of a dataset.json and give --align; training refuses the case.",
        )
    if shift := _whole_voxel_shift(image, label):
        return Finding(
            case,
            "error",
            "label_shift",
            f"The label of {case} is shifted against its image by {shift} voxels (k, j, i); {difference}.",
            "Correct the origin of the label or of the image; training refuses the case.",
        )
    return Finding(
        case,
        "error",
        "label_grid_mismatch",
        f"The label of {case} lies on another grid than its image ({difference}).",
        "Resample the label to the image's grid with nearest neighbours; training refuses the case.",
    )


def _check_label_place(
    case: str, volumes: list[Volume], label: np.ndarray, modalities: tuple[str, ...], ignored: int | None
) -> Iterator[Finding]:
    foreground = label != 0
    if ignored is not None:  # what nobody has looked at may well reach beyond the body
        foreground &= label != ignored
    body = np.zeros(foreground.shape, dtype=bool)
    for volume, modality in zip(volumes, modalities, strict=True):
        if volume.array.shape != body.shape:
            return  # reported as grid_mismatch
        body |= volume.array > CT_AIR if modality == "CT" else volume.array != 0
    count = int(foreground.sum())
    outside = int((foreground & ~body).sum())
    if count and outside > OUTSIDE_FRACTION * count:
        yield Finding(
            case,
            "warning",
            "label_outside_image",
            f"{outside / count:.0%} of the label of {case} lies on empty background of the image.",
            "Check in a viewer whether the label belongs to this image or is shifted; it is used as it is.",
        )


def _whole_voxel_shift(grid: Geometry, other: Geometry) -> str:
    """ "1, 0, -2" where two grids differ by whole voxels of origin alone; "" otherwise."""
    moved = Geometry(other.shape, other.spacing_mm, grid.origin_mm, other.direction)
    if not grid.same_as(moved, tolerance_mm=LABEL_TOLERANCE_MM):
        return ""
    voxels = np.linalg.solve(grid.affine[:3, :3], np.subtract(other.origin_mm, grid.origin_mm))
    whole = np.rint(voxels)
    if not whole.any() or np.abs(voxels - whole).max() > 0.05:
        return ""
    return ", ".join(f"{int(value)}" for value in whole)


def _digest(volumes: list[Volume]) -> str:
    """A digest of the voxels of all channels; the same whatever the file format or number type."""
    digest = hashlib.blake2b(digest_size=16)
    for volume in volumes:
        digest.update(repr(volume.array.shape).encode())
        digest.update(np.ascontiguousarray(volume.array, dtype=np.float32).data)
    return digest.hexdigest()


def _spacing_outliers(spacings: dict[str, tuple[float, float, float]]) -> Iterator[Finding]:
    if not spacings:
        return
    median = np.median(np.array(list(spacings.values())), axis=0)
    for case, spacing in spacings.items():
        if np.abs(np.log(spacing / median)).max() > np.log(SPACING_FACTOR):
            sizes = " against ".join("x".join(f"{value:.3g}" for value in three) for three in (spacing, median))
            yield Finding(
                case,
                "note",
                "spacing_outlier",
                f"The spacing of {case} is far from the median of the data set ({sizes} mm).",
                "The case is resampled to the spacing of the recipe, by default the median.",
            )


def _duplicates(dataset: Dataset, digests: dict[str, str]) -> Iterator[Finding]:
    groups: dict[str, list[str]] = {}
    for case, digest in digests.items():
        groups.setdefault(digest, []).append(case)
    twins = [names for names in groups.values() if len(names) > 1]
    if not twins:
        return
    try:
        train, validation = (set(side) for side in split_cases(dataset))
    except InvresError:  # nothing to train on, or a broken splits_final.json, which _whole_dataset reports
        train, validation = set(), set()
    for names in twins:
        leaks = any(name in train - validation for name in names) and any(name in validation - train for name in names)
        yield Finding(
            names[1],
            "error" if leaks else "warning",
            "duplicate_leak" if leaks else "duplicate_case",
            f"{' and '.join(names)} have exactly the same voxels"
            + (", and lie on both sides of the split between training and validation." if leaks else "."),
            "Remove all but one, or give them one patient; until then the scores are too good."
            if leaks
            else "All are used; remove all but one unless that is meant.",
        )


def _missing_labels(dataset: Dataset, labelled: dict[str, set[int]]) -> Iterator[Finding]:
    """Labels that no case has, and cases without a label that others have; those whose label map is empty are told of
    by `_check_label_values`.
    """
    labels = dataset.scheme.labels
    used = [label for label in labels if any(values & set(label.values) for values in labelled.values())]
    if labelled and not used:
        names = f" ({', '.join(label.name for label in labels)})" if labels else ""
        yield Finding(
            "",
            "error",
            "nothing_labelled",
            f"No case of {dataset.name} has a labelled voxel{names}.",
            "Draw what is to be learned, or correct the label values; training refuses the data set until then.",
        )
        return
    listed = label_list_of(dataset)
    for label in (one for one in labels if labelled and one not in used):
        yield Finding(
            "",
            "warning",
            "unused_label",
            f"No case has the label {label.name} ({', '.join(map(str, label.values))}), so it cannot be learned.",
            f"Take it out of {listed} or correct the value there, unless cases with it are to come."
            if listed
            else "Nothing to do where there is none to be seen; else add a case that has it.",
        )
    ignored = set() if dataset.scheme.ignore_value is None else {dataset.scheme.ignore_value}
    for case, values in labelled.items():
        missing = [label.name for label in used if not values & set(label.values)]
        if not values - ignored or not missing:
            continue
        names = f"{case} has no {', '.join(missing)}, which other cases have"
        if values & ignored:
            yield Finding(
                case,
                "note",
                "missing_label_value",
                f"{names}; outside of its voxels to ignore it is learned that there is none.",
                "Nothing to do where that is so; else draw it, or ignore its voxels, too.",
            )
        else:
            yield Finding(
                case,
                "warning",
                "missing_label_value",
                f"{names}; its voxels are learned as background.",
                "Nothing to do where there is none to be seen; else draw it, give its voxels the value of `ignore`, or "
                "remove the case.",
            )


def _whole_dataset(dataset: Dataset) -> Iterator[Finding]:
    """Findings that belong to no single case."""
    values = sorted({value for label in dataset.scheme.labels for value in label.values} - {0})
    if values and values != list(range(1, len(values) + 1)):
        yield Finding(
            "",
            "note",
            "labels_renumbered",
            f"The label values are not 1 to {len(values)} but {', '.join(map(str, values))}.",
            "They are renumbered for training and restored in every result.",
        )
    if not dataset.labelled_cases:
        return
    try:
        split_cases(dataset)
    except InvresError as error:
        yield Finding("", "error", "bad_split", error.message, error.hint)
    file = dataset.root / "dataset.json"
    description = read_json(file) if file.is_file() else None
    declared = description.get("numTraining") if isinstance(description, dict) else None
    if isinstance(declared, int) and declared != len(dataset.cases):
        yield Finding(
            "",
            "warning",
            "case_count",
            f"dataset.json announces {declared} training cases (numTraining), but {len(dataset.cases)} were found.",
            "The cases found are used; complete the copy or correct numTraining.",
        )
