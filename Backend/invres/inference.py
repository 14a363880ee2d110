"""From volumes to a segmentation on the input's own grid."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import InvresError
from .alignment import align_channels, resampled_sentence
from .config import ChannelPlan, CropPlan
from .devices import choose_device, computation_told, device_info
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
from .prediction import SegmentOptions, confidence_of, predict_within_memory
from .preprocessing import PreparedCase, prepare
from .provenance import inputs_told, model_told, software_told
from .region import Bounds, are_left_and_right, clear_outside, crop_to_region, cut_out
from .restoration import restore_probabilities
from .segmentation import Segmentation, SegmentedCase, joined, volumes_of, volumes_of_part
from .segmentfiles import check_files, counted, each_channel, files_of_channels
from .sides import sided_scheme
from .volume import SEVERAL_VOLUMES, Geometry, Volume, read_channels, read_volume

__all__ = [
    "Clock",
    "Locate",
    "NetworkKeeper",
    "Source",
    "is_crop",
    "load_network",
    "segment",
    "segment_case",
    "segment_inputs",
    "segment_volumes",
]

Locate = Callable[[Sequence[Volume | None], Reporter], tuple[Sequence[Bounds], int]]
Source = Path | Sequence[Volume]
"""Where the voxels of an input come from: an image file or DICOM folder, or volumes in memory, one for each channel."""
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
    locator: ModelPackage | None = None,
    uncertainty_path: Path | None = None,
    provenance_path: Path | None = None,
) -> dict[str, Any]:
    """Segments files into a file: `segment_inputs`, then `Segmentation.save`, whose arguments the paths are.

    Returns a summary: paths, volumes in mL, seconds by stage, measured memory, and all that is needed to do the same
    again. Raises InvresError as these two do, for results that could not be written before any work.
    """
    clock, resident = Clock(), PeakResident()
    check_files(package.manifest, inputs, output, probabilities_path, uncertainty_path)
    found = segment_inputs(package, inputs, options, report, network, keeper, locate, locator)
    clock.add(found.seconds)
    report.progress("segment.write", 0, 1)
    paths = found.save(
        output, probabilities=probabilities_path, uncertainty=uncertainty_path, provenance=provenance_path
    )
    report.progress("segment.write", 1, 1)
    clock.lap("write")
    return {
        **paths,
        "volumes_ml": found.volumes_ml,
        "confidence": found.confidence,
        "seconds": clock.rounded(),
        "measured_bytes": found.measured_bytes,
        "measured_rss_bytes": resident.growth_bytes(),
        **found.provenance,
    }


def segment_inputs(
    package: ModelPackage,
    inputs: Mapping[str, Source],
    options: SegmentOptions = SegmentOptions(),
    report: Reporter = SILENT,
    network: SegmentationNetwork | None = None,
    keeper: NetworkKeeper | None = None,
    locate: Locate | None = None,
    locator: ModelPackage | None = None,
) -> Segmentation:
    """Segments one case. inputs: channel name -> where its voxels are; "" -> one that has all channels. Optional
    channels may be left out.

    network: an already loaded one; else `keeper` gives it, or it is loaded for this run, on `options.device`.
    locate: finds the boxes in a whole image that a model trained on crops is to segment (see `locating`), and says how
    many bytes that took; locator: the model that it asks, for the record.
    Warns where image or result are unlike what the model has seen in training.
    Labels that have sides (`Manifest.sides`) are divided into left and right, unless `options` say otherwise or nobody
    can tell; probabilities, confidence and what is expected are of both sides together.
    Raises InvresError for inputs that do not fit the model, and for mirroring that would swap labels of both sides.
    """
    clock, manifest = Clock(), package.manifest
    options = options.mirrored_as(manifest.mirror_axes)
    check_mirror(manifest.scheme, options.mirror_axes or ())
    report.progress("segment.read", 0, 1)
    volumes = _read_inputs(manifest.plan.channels, inputs, package.name, report)
    names = [channel.name for channel in manifest.plan.channels]
    resampled: list[str] = []
    if options.align:
        volumes, resampled = align_channels(volumes, names)
        if resampled:
            report.note(resampled_sentence([resampled]))
    missing = [name for name, volume in zip(names, volumes, strict=True) if volume is None]
    if missing:
        report.note(f"There is no {' and no '.join(missing)}; the model was trained to do without.")
    files = {name: source if isinstance(source, Path) else None for name, source in inputs.items()}
    read = inputs_told(files)
    report.progress("segment.read", 1, 1)
    clock.lap("read")
    arrays = [None if volume is None else volume.array for volume in volumes]
    for sentence in unlike_modality(manifest.plan.channels, arrays):
        report.warning(sentence)
    if odd := _odd_window(options.window, manifest.patch):
        report.warning(odd)
    if network is None:
        network = (keeper or NetworkKeeper()).network(package, choose_device(options.device), report)
    clock.lap("load")
    boxes, locating_bytes = _boxes(package, volumes, options, locate, report)
    if boxes:
        clock.lap("locate")
    parts = _segment_parts(package, network, volumes, boxes, options, report)
    for part in parts:
        clock.add(part.seconds)
    roi_mm = options.roi_mm
    labels, scheme = joined(parts, next(volume.geometry for volume in volumes if volume is not None)), manifest.scheme
    _remember_windows(package, parts, labels.geometry, options)
    if manifest.sides and options.sides:
        both = _divided(labels, parts, boxes, manifest, report)
        if both is not None:
            labels, scheme = both, sided_scheme(scheme, manifest.sides)
        clock.lap("sides")
    if roi_mm:
        clear_outside(labels.array, labels.geometry, roi_mm)
    of_parts = [volumes_of_part(part, manifest.scheme, roi_mm) for part in parts]
    confidences = [confidence_of(part.prediction.probabilities, manifest.scheme.regions) for part in parts]
    if not roi_mm:
        said = (unlike_result(manifest.expected, *seen) for seen in zip(of_parts, confidences, strict=True))
        for sentence in dict.fromkeys(itertools.chain(*said)):
            report.warning(sentence)
    device = next(network.parameters()).device
    # The tensors share the memory of the prepared image; the volumes of the files stand beside them.
    beside = 0 if device.type == "cuda" else sum(volume.array.nbytes for volume in volumes if volume is not None)
    clock.lap("restore")
    return Segmentation(
        labels=labels,
        scheme=scheme,
        volumes_ml=volumes_of(labels, scheme, of_parts),
        confidence=round(min(confidences), 4),
        provenance={
            **model_told(package),
            # Whoever gives the box, or an image as small as a crop, asks no other model.
            "locator": model_told(locator) if locator is not None and boxes and not roi_mm else None,
            "inputs": read,
            "missing_channels": missing,
            "resampled_channels": resampled,
            "settings": {
                # The largest of all parts: with it each gets the window that it had, for none is larger than the part.
                "window": [max(sizes) for sizes in zip(*(part.prediction.window for part in parts), strict=True)],
                "windows": sum(part.prediction.windows for part in parts),
                "overlap": options.overlap,
                "mirror_axes": list(options.mirror_axes or ()),
                "roi_mm": list(options.roi_mm),
                "sides": options.sides,
                "one_piece": options.one_piece,
                "align": options.align,
                "boxes_mm": [list(box) for box in boxes],
            },
            "software": software_told(),
            "device_title": device_info(device).title,
            **computation_told(device),
        },
        scheme_of_network=manifest.scheme,
        parts=tuple(parts),
        roi_mm=roi_mm,
        files=tuple(path for path in files.values() if path is not None),
        seconds=clock.seconds,
        measured_bytes=max(locating_bytes, *(part.prediction.measured_bytes for part in parts)) + beside,
    )


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
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
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
    return joined(of_sides, labels.geometry)


def _read_inputs(
    channels: Sequence[ChannelPlan], inputs: Mapping[str, Source], model: str, report: Reporter
) -> Sequence[Volume | None]:
    """One volume for each of the model's channels, in its order, None for an optional one that is not given.

    Names are matched whatever their case.
    """
    found = files_of_channels(channels, inputs, model)
    if found is not None:
        return [None if source is None else _read_one(source, report) for source in found]
    source = inputs[""]
    volumes = read_channels(source, report=report) if isinstance(source, Path) else source
    if len(volumes) != len(channels):
        names = [channel.name for channel in channels]
        hint = f"Give each channel once: {each_channel(channels)}."
        if len(names) == 1:
            hint = OF_FRAMES if isinstance(source, Path) else "Give one volume of it, such as the first."
        what = str(source) if isinstance(source, Path) else "the image"
        raise InvresError(
            f"The model {model} takes {counted(names)}; {what} holds {len(volumes)} volume"
            f"{'' if len(volumes) == 1 else 's'}.",
            hint=hint,
        )
    return volumes


def _read_one(source: Source, report: Reporter) -> Volume:
    if isinstance(source, Path):
        try:
            return read_volume(source, report=report)
        except InvresError as error:
            if error.code != SEVERAL_VOLUMES:
                raise
            raise InvresError(error.message, hint=OF_FRAMES, code=error.code) from None
    if len(source) != 1:
        raise InvresError(f"One image of a channel holds {len(source)} volumes, but one is wanted.")
    return source[0]
