"""From volumes to a segmentation on the input's own grid."""

from __future__ import annotations

import dataclasses
import itertools
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import InvresError, __version__
from .alignment import align_channels, resampled_sentence
from .config import ChannelPlan, CropPlan, LabelScheme
from .devices import choose_device, device_info
from .events import SILENT, Reporter
from .expectation import unlike_modality, unlike_result
from .manifest import Manifest
from .memory import PeakResident
from .midline import divided, on_one_side
from .mirroring import check_mirror
from .modelpackage import ModelPackage
from .networks import SegmentationNetwork, build_predictor
from .pace import remember_windows
from .pieces import clear_loose_pieces
from .prediction import Prediction, SegmentOptions, confidence_of, predict_within_memory
from .preprocessing import PreparedCase, prepare
from .provenance import FIELD, header_text, inputs_told
from .region import Bounds, Box, are_left_and_right, clear_outside, crop_to_region, cut_out
from .restoration import restore_probabilities, restore_uncertainty, restore_volume
from .segmentfiles import check_files, counted, each_channel, files_of_channels, maps_of
from .sides import sided_scheme
from .volume import (
    SEVERAL_VOLUMES,
    Geometry,
    Volume,
    read_channels,
    read_volume,
    write_segmentation,
    write_volume,
)

__all__ = [
    "Clock",
    "Found",
    "Locate",
    "NetworkKeeper",
    "SegmentedCase",
    "bytes_beside",
    "find",
    "how_made",
    "is_crop",
    "load_network",
    "looked_at",
    "segment",
    "segment_case",
    "segment_volumes",
]

Locate = Callable[[Sequence[Volume | None], Reporter], tuple[Sequence[Bounds], int]]
WHOLE: Box = (slice(None), slice(None), slice(None))
WORTH_TELLING_ML = 1.0  # of loose pieces
OF_FRAMES = (
    "Where they are frames of a series, segment this file alone with --frames; else extract one volume of it, such as "
    "the first, into a file of its own, and give that."
)
SLACK = 1.5  # a crop may be so much longer than the largest that was trained on


def load_network(package: ModelPackage, device: torch.device) -> SegmentationNetwork:
    """The package's network with its weights, ready to predict. The VAE branch is not built: it only trains."""
    network = build_predictor(package.manifest.network, package.manifest.members)
    weights = {k: v for k, v in package.load_weights().items() if not k.startswith("vae.")}
    network.load_state_dict(weights)
    return network.to(device).eval()


class NetworkKeeper:
    """Keeps the network that was used last, so that the next segmentation with the same model does not load it."""

    def __init__(self) -> None:
        self._key: tuple[str, str] | None = None
        self._network: SegmentationNetwork | None = None

    def network(self, package: ModelPackage, device: torch.device, report: Reporter = SILENT) -> SegmentationNetwork:
        """The package's network on the device; loading it is a stage of its own."""
        key = package.manifest.sha256, str(device)
        if self._network is None or self._key != key:
            self._key, self._network = None, None  # two networks at a time may not fit
            report.progress("segment.load", 0, 1)
            self._network = load_network(package, device)
            self._key = key
            report.progress("segment.load", 1, 1)
        # A run that found the card full has moved it to the CPU.
        return self._network.to(device)


def segment_volumes(
    package: ModelPackage,
    network: SegmentationNetwork,
    volumes: Sequence[Volume | None],
    options: SegmentOptions = SegmentOptions(),
    report: Reporter = SILENT,
) -> tuple[Volume, np.ndarray, PreparedCase]:
    """Segments one case. Returns the labels (file values, on the grid of the first volume), the probabilities on the
    prepared grid (K, d, h, w), and the prepared case (only the part around a region of interest).

    volumes: in the order of the model's channels, None for an optional one that the case lacks.
    When memory runs out it stitches on the CPU, then halves the window, then goes to the CPU, each with a warning.
    Raises OutOfMemory when none of that is enough.
    """
    options = options.mirrored_as(package.manifest.mirror_axes)
    found = segment_case(package, network, volumes, options, report)
    _remember_windows(package, [found], found.labels.geometry, options)
    if options.roi_mm:
        clear_outside(found.labels.array, found.labels.geometry, options.roi_mm)
    return found.labels, found.prediction.probabilities, found.prepared


@dataclass(frozen=True)
class SegmentedCase:
    """A case that was segmented. labels: also those around a region of interest, which help to tell left from right.
    seconds: by stage. where: of the part in the whole image."""

    labels: Volume
    prepared: PreparedCase
    prediction: Prediction
    seconds: dict[str, float]
    where: Box = WHOLE


def is_crop(crop: CropPlan, volumes: Sequence[Volume | None]) -> bool:
    """Whether the volumes of a case are no larger than the crops that a model learned from."""
    grid = next(volume.geometry for volume in volumes if volume is not None).canonical()
    lengths = np.multiply(grid.shape, grid.spacing_mm)
    return bool((lengths <= SLACK * np.array(crop.largest_mm)).all())


def _segment_parts(
    package: ModelPackage,
    network: SegmentationNetwork,
    volumes: Sequence[Volume | None],
    boxes: Sequence[Bounds],
    options: SegmentOptions,
    report: Reporter,
) -> list[SegmentedCase]:
    """Each box as if only it had been acquired; without boxes the whole."""
    if not boxes:
        return [segment_case(package, network, volumes, options, report)]
    parts = []
    for number, bounds in enumerate(boxes):
        cut, where = cut_out(volumes, bounds)
        whole = dataclasses.replace(options, roi_mm=())
        found = segment_case(package, network, cut, whole, _PartOf(report, number, len(boxes)))
        parts.append(dataclasses.replace(found, where=where))
    return parts


def _boxes(
    package: ModelPackage,
    volumes: Sequence[Volume | None],
    options: SegmentOptions,
    locate: Locate | None,
    report: Reporter,
) -> tuple[Sequence[Bounds], int]:
    """What a whole image is cut to for a model that was trained on crops, nothing for other models and for crops; and
    the bytes that finding it took."""
    plan = package.manifest.plan
    if plan.crop is None:
        return [], 0
    if is_crop(plan.crop, volumes) and not options.roi_mm:
        if locate is not None:
            report.note("The image is a crop already, so nothing has to be located and --locate is left out.")
        return [], 0
    if options.roi_mm:
        if locate is not None:
            report.note("With --roi nothing has to be located, so --locate is left out.")
        return [options.roi_mm], 0
    if locate is not None:
        return locate(volumes, report)
    largest = " x ".join(f"{length:g}" for length in plan.crop.largest_mm)
    raise InvresError(
        f"{package.name} was trained on crops around the {plan.crop.around[0]} of up to {largest} mm, and this image "
        "is larger.",
        hint="Name a model that finds it in the whole image (--locate MODEL), or give a region of interest (--roi).",
        code="needs_region",
    )


class _PartOf(Reporter):
    """Counts the progress of one part of several as that of the whole."""

    def __init__(self, report: Reporter, number: int, count: int):
        super().__init__()
        self._report, self._number, self._count = report, number, count

    def emit(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            done, total = event["done"] + self._number * event["total"], event["total"] * self._count
            self._report.progress(event["stage"], done, total)
        else:
            self._report.emit(event)


def segment_case(
    package: ModelPackage,
    network: SegmentationNetwork,
    volumes: Sequence[Volume | None],
    options: SegmentOptions,
    report: Reporter,
) -> SegmentedCase:
    """As `segment_volumes`, with all that was measured; around a region of interest the labels go on."""
    manifest, clock = package.manifest, Clock()
    report.progress("segment.prepare", 0, 1)
    prepared = prepare(volumes, None, manifest.plan, manifest.scheme, report=report)
    if options.roi_mm:
        window = options.window if min(options.window) > 0 else manifest.patch
        prepared = crop_to_region(prepared, options.roi_mm, window)
    report.progress("segment.prepare", 1, 1)
    clock.lap("prepare")
    prediction = predict_within_memory(manifest.scheme, manifest.patch, network, prepared, options, report)
    clock.lap("predict")
    report.progress("segment.restore", 0, 1)
    labels = restore_probabilities(prediction.probabilities, prepared.geometry, prepared.original, manifest.scheme)
    # A region's border cuts through what hangs together outside of it.
    if manifest.one_piece and options.one_piece and not options.roi_mm:
        _leave_out_pieces(labels, prepared.original, report)
    report.progress("segment.restore", 1, 1)
    clock.lap("restore")
    return SegmentedCase(Volume(labels, prepared.original), prepared, prediction, clock.seconds)


def _leave_out_pieces(labels: np.ndarray, grid: Geometry, report: Reporter) -> None:
    """In place; says so where it may matter."""
    count, voxels = clear_loose_pieces(labels)
    millilitres = voxels * float(np.prod(grid.spacing_mm)) / 1000
    if millilitres >= WORTH_TELLING_ML:
        pieces = f"{count} loose piece{'' if count == 1 else 's'}"
        report.warning(f"Left out: {millilitres:.1f} mL in {pieces}, which did not hang together with the rest.")


def segment(
    package: ModelPackage,
    inputs: Mapping[str, Path],
    output: Path,
    options: SegmentOptions = SegmentOptions(),
    probabilities_path: Path | None = None,
    report: Reporter = SILENT,
    network: SegmentationNetwork | None = None,
    keeper: NetworkKeeper | None = None,
    locate: Locate | None = None,
    uncertainty_path: Path | None = None,
) -> dict[str, Any]:
    """Segments files into a file. inputs: channel name -> image file or DICOM folder; "" -> a file with all channels.
    Optional channels may be left out.

    probabilities_path: FILE.nii.gz (or another ending; none means .nii.gz): FILE_LABEL.nii.gz is written by label.
    uncertainty_path: where a map of how likely each label is to be wrong goes, see `restore_uncertainty`.
    network: an already loaded one; else `keeper` gives it, or it is loaded for this run, on `options.device`.
    locate: finds the boxes in a whole image that a model trained on crops is to segment (see `locating`), and says how
    many bytes that took.
    Warns where image or result are unlike what the model has seen in training.
    Labels that have sides (`Manifest.sides`) are divided into left and right, unless `options` say otherwise or nobody
    can tell; probabilities, confidence and what is expected are of both sides together.
    Returns a summary: paths, volumes in mL (of each region as a whole, also where the written label map shows another
    region on top of it), seconds by stage, measured memory, and all that is needed to do the same again.
    Raises InvresError for inputs that do not fit the model, for mirroring that would swap labels of both sides, and for
    results that would overwrite an input.
    """
    clock, resident = Clock(), PeakResident()
    manifest = package.manifest
    check_files(manifest, inputs, output, probabilities_path, uncertainty_path)
    options = options.mirrored_as(manifest.mirror_axes)
    check_mirror(manifest.scheme, options.mirror_axes or ())
    report.progress("segment.read", 0, 1)
    volumes = _read_inputs(manifest.plan.channels, inputs, package.name, report)
    volumes, resampled = looked_at(package, volumes, options, report)
    read = inputs_told(inputs)
    report.progress("segment.read", 1, 1)
    clock.lap("read")
    if network is None:
        network = (keeper or NetworkKeeper()).network(package, choose_device(options.device), report)
    clock.lap("load")
    found = find(package, network, volumes, options, report, locate, clock)
    labels, parts, roi_mm = found.labels, found.parts, options.roi_mm
    how = how_made(package, network, volumes, resampled, options, found)
    how["inputs"] = read
    report.progress("segment.write", 0, 1)
    write_segmentation(output, labels, found.scheme, {FIELD: header_text(how)})
    maps = {} if probabilities_path is None else maps_of(probabilities_path, manifest)
    written = _write_probabilities(maps, parts, labels.geometry, manifest.scheme, roi_mm)
    if uncertainty_path is not None:
        _write_uncertainty(uncertainty_path, parts, labels.geometry, manifest.scheme, roi_mm)
    report.progress("segment.write", 1, 1)
    clock.lap("write")
    return {
        "output": str(output),
        "probabilities": written,
        "uncertainty": None if uncertainty_path is None else str(uncertainty_path),
        "volumes_ml": found.volumes_ml,
        "confidence": round(found.confidence, 4),
        "seconds": clock.rounded(),
        "measured_bytes": found.measured_bytes + bytes_beside(network, volumes),
        "measured_rss_bytes": resident.growth_bytes(),
        "device": str(next(network.parameters()).device),
        **how,
    }


def looked_at(
    package: ModelPackage, volumes: Sequence[Volume | None], options: SegmentOptions, report: Reporter
) -> tuple[Sequence[Volume | None], list[str]]:
    """The volumes of a case as they were read, on one grid where `options` want it, and the names of those that were
    resampled for that. Says what is missing, and warns where an image or a wish is unlike what the model has seen."""
    channels = package.manifest.plan.channels
    names = [channel.name for channel in channels]
    resampled: list[str] = []
    if options.align:
        volumes, resampled = align_channels(volumes, names)
        if resampled:
            report.note(resampled_sentence([resampled]))
    if missing := _missing(package, volumes):
        report.note(f"There is no {' and no '.join(missing)}; the model was trained to do without.")
    for sentence in unlike_modality(channels, [None if volume is None else volume.array for volume in volumes]):
        report.warning(sentence)
    if odd := _odd_window(options.window, package.manifest.patch):
        report.warning(odd)
    return volumes, resampled


def _missing(package: ModelPackage, volumes: Sequence[Volume | None]) -> list[str]:
    channels = package.manifest.plan.channels
    return [channel.name for channel, volume in zip(channels, volumes, strict=True) if volume is None]


@dataclass(frozen=True)
class Found:
    """What was found in the volumes of a case, before it is written.

    labels, scheme: divided into left and right where the model has sides and they can be told. boxes: that `parts` lie
    in; () of a whole image. volumes_ml: of each region as a whole. confidence: the least of all parts.
    """

    labels: Volume
    scheme: LabelScheme
    parts: Sequence[SegmentedCase]
    boxes: Sequence[Bounds]
    volumes_ml: dict[str, float]
    confidence: float
    measured_bytes: int


def find(
    package: ModelPackage,
    network: SegmentationNetwork,
    volumes: Sequence[Volume | None],
    options: SegmentOptions,
    report: Reporter,
    locate: Locate | None,
    clock: Clock,
) -> Found:
    """Segments volumes that were `looked_at`. locate: see `segment`. Warns where the result is unlike what the model
    has seen."""
    manifest, roi_mm = package.manifest, options.roi_mm
    boxes, locating_bytes = _boxes(package, volumes, options, locate, report)
    if boxes:
        clock.lap("locate")
    parts = _segment_parts(package, network, volumes, boxes, options, report)
    for part in parts:
        clock.add(part.seconds)
    labels, scheme = _joined(parts, next(volume.geometry for volume in volumes if volume is not None)), manifest.scheme
    _remember_windows(package, parts, labels.geometry, options)
    if manifest.sides and options.sides:
        both = _divided(labels, parts, boxes, manifest, report)
        if both is not None:
            labels, scheme = both, sided_scheme(scheme, manifest.sides)
        clock.lap("sides")
    if roi_mm:
        clear_outside(labels.array, labels.geometry, roi_mm)
    of_parts = [_volumes_ml(part, manifest.scheme, roi_mm) for part in parts]
    if scheme.regions:
        volumes_ml = {name: round(sum(one[name] for one in of_parts), 3) for name in scheme.names}
    else:  # not the sum of parts: boxes may overlap, and a voxel counts once
        volumes_ml = _label_volumes_ml(labels, scheme)
    confidences = [confidence_of(part.prediction.probabilities, manifest.scheme.regions) for part in parts]
    if not roi_mm:
        said = (unlike_result(manifest.expected, *seen) for seen in zip(of_parts, confidences, strict=True))
        for sentence in dict.fromkeys(itertools.chain(*said)):
            report.warning(sentence)
    measured = max(locating_bytes, *(part.prediction.measured_bytes for part in parts))
    return Found(labels, scheme, parts, boxes, volumes_ml, min(confidences), measured)


def how_made(
    package: ModelPackage,
    network: SegmentationNetwork,
    volumes: Sequence[Volume | None],
    resampled: Sequence[str],
    options: SegmentOptions,
    found: Found,
) -> dict[str, Any]:
    """All that is needed to do the same again, but for the `inputs`."""
    manifest, parts = package.manifest, found.parts
    return {
        "missing_channels": _missing(package, volumes),
        "resampled_channels": list(resampled),
        "device_title": device_info(next(network.parameters()).device).title,
        "model": package.name,
        "model_id": package.id,
        "model_version": manifest.version,
        "model_sha256": manifest.sha256,
        "settings": {
            "window": list(parts[0].prediction.window),
            "windows": sum(part.prediction.windows for part in parts),
            "overlap": options.overlap,
            "mirror_axes": list(options.mirror_axes or ()),
            "roi_mm": list(options.roi_mm),
            "sides": options.sides,
            "one_piece": options.one_piece,
            "align": options.align,
            "boxes_mm": [list(box) for box in found.boxes],
        },
        "software": {"invres": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def bytes_beside(network: SegmentationNetwork, volumes: Sequence[Volume | None]) -> int:
    """Of the volumes of the files, where they share the memory that the network ran in: not on a card."""
    if next(network.parameters()).device.type == "cuda":
        return 0
    # The tensors share the memory of the prepared image; the volumes of the files stand beside them.
    return sum(volume.array.nbytes for volume in volumes if volume is not None)


def _remember_windows(
    package: ModelPackage, parts: Sequence[SegmentedCase], grid: Geometry, options: SegmentOptions
) -> None:
    """For the plan of the next image on such a grid; what a region of interest needed says nothing of the whole."""
    if not options.roi_mm:
        windows = sum(part.prediction.windows for part in parts)
        remember_windows(package.id, grid, parts[0].prediction.window, options.overlap, windows)


def _odd_window(window: tuple[int, int, int], own: tuple[int, int, int]) -> str:
    """A sentence where the window is less than half or more than one and a half times as long as the model's own along
    an axis, else ""."""
    wanted, trained = ("x".join(map(str, sizes)) for sizes in (window, own))
    if any(0 < size < length / 2 for size, length in zip(window, own, strict=True)):
        return (
            f"The window of {wanted} voxels is far below the {trained} that the model was trained with: it sees less "
            "around each voxel, and the result may be worse."
        )
    if any(size > 1.5 * length for size, length in zip(window, own, strict=True)):
        return (
            f"The window of {wanted} voxels is far above the {trained} that the model was trained with: what its norms "
            "divide by is another than in training, and the result may be worse."
        )
    return ""


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now

    def add(self, seconds: Mapping[str, float]) -> None:
        """Stages that another clock has timed meanwhile."""
        for stage, taken in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + taken
        self._last = time.perf_counter()

    def rounded(self) -> dict[str, float]:
        total = time.perf_counter() - self._start
        return {stage: round(seconds, 2) for stage, seconds in {**self.seconds, "total": total}.items()}


def _divided(
    labels: Volume, parts: Sequence[SegmentedCase], boxes: Sequence[Bounds], manifest: Manifest, report: Reporter
) -> Volume | None:
    """The labels divided into left and right; None where nobody can tell."""
    if manifest.plan.crop is None:
        return divided(labels, manifest.scheme, manifest.sides, report=report)
    # A crop shows one side and nothing that tells which; but of two, the right one lies further to the right.
    if not are_left_and_right(boxes):
        return None
    of_sides = [
        dataclasses.replace(
            part,
            labels=Volume(on_one_side(part.labels.array, manifest.scheme, manifest.sides, right), part.labels.geometry),
        )
        for part, right in zip(parts, (False, True), strict=True)
    ]
    return _joined(of_sides, labels.geometry)


def _joined(parts: Sequence[SegmentedCase], grid: Geometry) -> Volume:
    """The labels of all parts on the grid of the whole image."""
    if parts[0].where == WHOLE:
        return parts[0].labels
    labels = np.zeros(grid.shape, parts[0].labels.array.dtype)
    for part in parts:
        inside = labels[part.where]
        np.copyto(inside, part.labels.array, where=part.labels.array != 0)
    return Volume(labels, grid)


def _write_probabilities(
    maps: Mapping[str, Path], parts: Sequence[SegmentedCase], grid: Geometry, scheme: LabelScheme, roi_mm: Bounds
) -> list[str]:
    """One map per label (and for the background where labels exclude one another); the paths."""
    written = []
    for place, (name, target) in enumerate(maps.items()):
        outside = 1.0 if name == "background" and not scheme.regions else 0.0

        def restored(part: SegmentedCase, place: int = place, outside: float = outside) -> np.ndarray:
            array, prepared = part.prediction.probabilities[place], part.prepared
            return restore_volume(array, prepared.geometry, prepared.original, outside)

        _write_map(target, parts, grid, roi_mm, restored, outside)
        written.append(os.fspath(target))
    return written


def _write_uncertainty(
    target: Path, parts: Sequence[SegmentedCase], grid: Geometry, scheme: LabelScheme, roi_mm: Bounds
) -> None:
    """0 where nothing was segmented: beyond the parts, and outside of a region of interest."""

    def restored(part: SegmentedCase) -> np.ndarray:
        prepared = part.prepared
        found, labels = part.prediction.probabilities, part.labels.array
        return restore_uncertainty(found, labels, prepared.geometry, prepared.original, scheme.regions)

    _write_map(target, parts, grid, roi_mm, restored, 0.0)


def _write_map(
    target: Path,
    parts: Sequence[SegmentedCase],
    grid: Geometry,
    roi_mm: Bounds,
    restored: Callable[[SegmentedCase], np.ndarray],
    outside: float,
) -> None:
    """A map of all parts on the grid of the whole image. restored: that of a part, float32 on its own grid."""
    if parts[0].where == WHOLE:
        whole = restored(parts[0])
    else:
        whole = np.full(grid.shape, outside, np.float32)
        for part in parts:
            whole[part.where] = restored(part)
    if roi_mm:
        clear_outside(whole, grid, roi_mm, outside)
    write_volume(target, Volume(whole, grid))


def _read_inputs(
    channels: Sequence[ChannelPlan], inputs: Mapping[str, Path], model: str, report: Reporter
) -> Sequence[Volume | None]:
    """One volume for each of the model's channels, in its order, None for an optional one that is not given.

    Names are matched whatever their case.
    """
    found = files_of_channels(channels, inputs, model)
    if not isinstance(found, Path):
        return [None if path is None else _read_one(path, report) for path in found]
    volumes = read_channels(found, report=report)
    if len(volumes) != len(channels):
        names = [channel.name for channel in channels]
        hint = f"Give each channel once: {each_channel(channels)}."
        if len(names) == 1:
            hint = OF_FRAMES
        raise InvresError(
            f"The model {model} takes {counted(names)}; {found} holds {len(volumes)} volume"
            f"{'' if len(volumes) == 1 else 's'}.",
            hint=hint,
        )
    return volumes


def _read_one(path: Path, report: Reporter) -> Volume:
    try:
        return read_volume(path, report=report)
    except InvresError as error:
        if error.code != SEVERAL_VOLUMES:
            raise
        raise InvresError(error.message, hint=OF_FRAMES, code=error.code) from None


def _label_volumes_ml(labels: Volume, scheme: LabelScheme) -> dict[str, float]:
    """Millilitres of each label that excludes the others."""
    voxel_ml = float(np.prod(labels.geometry.spacing_mm)) / 1000
    return {label.name: round(int((labels.array == label.output_value).sum()) * voxel_ml, 3) for label in scheme.labels}


def _volumes_ml(found: SegmentedCase, scheme: LabelScheme, roi_mm: Bounds) -> dict[str, float]:
    """Millilitres of each label or region on the original grid."""
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
