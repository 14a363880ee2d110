"""From volumes to a segmentation on the input's own grid: a sliding window, stitched with Gaussian weights."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference

from . import InvresError, OutOfMemory, __version__
from .config import LabelScheme
from .devices import device_info
from .events import SILENT, Reporter
from .livebytes import LiveBytes
from .memory import PeakResident
from .modelpackage import ModelPackage
from .networks import SegmentationNetwork, build
from .preprocessing import PreparedCase, prepare
from .region import Bounds, clear_outside, crop_to_region
from .restoration import restore_probabilities, restore_volume
from .volume import WRITABLE_ENDINGS, Volume, read_channels, read_volume, write_segmentation, write_volume

__all__ = [
    "NetworkKeeper",
    "SegmentOptions",
    "choose_device",
    "is_out_of_memory",
    "load_network",
    "predict_probabilities",
    "segment",
    "segment_volumes",
    "window_count",
]

Triple = tuple[int, int, int]
SMALLEST_WINDOW = 32


@dataclass(frozen=True)
class SegmentOptions:
    """overlap: part of a window shared with its neighbour. mirror_axes: also predict mirrored along these and average.
    window: voxels (D, H, W), (0, 0, 0) = the model's own. device: "auto", "cpu" or "cuda:0".
    roi_mm: a box (R0, R1, A0, A1, S0, S1) in RAS mm outside of which nothing is segmented; () = the whole volume."""

    device: str = "auto"
    overlap: float = 0.5
    mirror_axes: tuple[int, ...] = ()
    window: Triple = (0, 0, 0)
    roi_mm: Bounds = ()

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise InvresError(f"The overlap must be at least 0 and below 1, got {self.overlap}.")
        if any(axis not in (0, 1, 2) for axis in self.mirror_axes) or len({*self.mirror_axes}) < len(self.mirror_axes):
            raise InvresError(f"Mirror axes are 0, 1 and 2 (D, H, W), each once; got {list(self.mirror_axes)}.")
        if any(self.window) and min(self.window) < 1:
            raise InvresError(f"The window must be three sizes of 1 voxel or more, got {list(self.window)}.")
        if self.roi_mm and not (
            len(self.roi_mm) == 6
            and all(math.isfinite(end) for end in self.roi_mm)
            and all(low < high for low, high in zip(self.roi_mm[::2], self.roi_mm[1::2], strict=True))
        ):
            raise InvresError(
                "A region of interest has six ends in mm, each lower one below its upper one, "
                f"got {list(self.roi_mm)}.",
                hint="Give R0 R1 A0 A1 S0 S1.",
            )


def choose_device(name: str) -> torch.device:
    """ "auto" is the first CUDA card, else the CPU. Raises InvresError for a device that is not here."""
    try:
        device = torch.device(name if name != "auto" else "cuda:0" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InvresError(f"There is no device {name!r}; the devices are auto, cpu and cuda:0.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvresError(
            f"The device {name} was asked for, but torch sees {torch.cuda.device_count()} CUDA cards.",
            hint="Use --device cpu, or install a torch build with CUDA.",
        )
    return device


def load_network(package: ModelPackage, device: torch.device) -> SegmentationNetwork:
    """The package's network with its weights, ready to predict. The VAE branch is not built: it only trains."""
    network = build(dataclasses.replace(package.manifest.network, vae=None))
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


@torch.no_grad()
def predict_probabilities(
    network: Callable[[torch.Tensor], Any],
    image: torch.Tensor,
    window: Triple,
    regions: bool,
    options: SegmentOptions = SegmentOptions(),
    stitch_device: torch.device | str | None = None,
    report: Reporter = SILENT,
) -> torch.Tensor:
    """Probabilities (K, D, H, W) float32 of one prepared image (C, D, H, W), by a sliding window.

    Logits are averaged with Gaussian weights (sigma = 1/8 of the window) in float32 on `stitch_device`, then passed
    through softmax (sigmoid for regions). Mirrored predictions are averaged as logits too.
    """
    flips: list[tuple[int, ...]] = [()]
    for axis in options.mirror_axes:
        flips += [(*flip, axis + 2) for flip in flips]
    total = len(flips) * window_count(image.shape[1:], window, options.overlap)
    done = 0
    report.progress("segment.tiles", 0, total)

    def predictor(tiles: torch.Tensor) -> torch.Tensor:
        nonlocal done
        logits: torch.Tensor | None = None
        for flip in flips:  # a flip of no axis would copy too
            found = network(tiles.flip(flip) if flip else tiles).logits.float()
            found = found.flip(flip) if flip else found
            logits = found if logits is None else logits + found
        assert logits is not None
        done += tiles.shape[0] * len(flips)
        report.progress("segment.tiles", min(done, total), total)
        # Always a new tensor: the caller weights it in place.
        return logits / len(flips)

    logits = sliding_window_inference(
        image[None],
        roi_size=window,
        # For a batch of one and small maps torch's CPU convolution leaves oneDNN for a path five times slower.
        sw_batch_size=2 if image.device.type == "cpu" else 1,
        predictor=predictor,
        overlap=options.overlap,
        mode="gaussian",
        sigma_scale=0.125,
        padding_mode="replicate",
        sw_device=image.device,
        device=stitch_device or image.device,
    )
    assert isinstance(logits, torch.Tensor)  # one output in, one out
    return logits[0].sigmoid_() if regions else _softmax_in_place(logits[0])


def _softmax_in_place(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the first axis without a second array of its size."""
    logits -= logits.amax(dim=0)
    logits.exp_()
    logits /= logits.sum(dim=0)
    return logits


def window_count(shape: tuple[int, ...], window: Triple, overlap: float) -> int:
    """How many windows cover an image of this shape."""
    count = 1
    for size, length in zip(shape, window, strict=True):
        step = max(1, int(length * (1 - overlap)))
        count *= 1 if size <= length else math.ceil((size - length) / step) + 1
    return count


def segment_volumes(
    package: ModelPackage,
    network: SegmentationNetwork,
    volumes: list[Volume],
    options: SegmentOptions = SegmentOptions(),
    report: Reporter = SILENT,
) -> tuple[Volume, np.ndarray, PreparedCase]:
    """Segments one case. Returns the labels (file values, on the grid of the first volume), the probabilities on the
    prepared grid (K, d, h, w), and the prepared case (only the part around a region of interest).

    When memory runs out it stitches on the CPU, then halves the window, then goes to the CPU, each with a warning.
    Raises OutOfMemory when none of that is enough.
    """
    found = _segment_case(package, network, volumes, options, report)
    return found.labels, found.prediction.probabilities, found.prepared


@dataclass(frozen=True)
class _Prediction:
    """window: the one that had room. measured_bytes: peak of live tensors; on a card that of its allocator."""

    probabilities: np.ndarray
    window: Triple
    windows: int
    measured_bytes: int


@dataclass(frozen=True)
class _SegmentedCase:
    labels: Volume
    prepared: PreparedCase
    prediction: _Prediction
    seconds: dict[str, float]


def _segment_case(
    package: ModelPackage,
    network: SegmentationNetwork,
    volumes: list[Volume],
    options: SegmentOptions,
    report: Reporter,
) -> _SegmentedCase:
    manifest, clock = package.manifest, _Clock()
    report.progress("segment.prepare", 0, 1)
    prepared = prepare(volumes, None, manifest.plan, manifest.scheme, report=report)
    if options.roi_mm:
        window = options.window if min(options.window) > 0 else manifest.patch
        prepared = crop_to_region(prepared, options.roi_mm, window)
    report.progress("segment.prepare", 1, 1)
    clock.lap("prepare")
    prediction = _predict_within_memory(manifest.scheme, manifest.patch, network, prepared, options, report)
    clock.lap("predict")
    report.progress("segment.restore", 0, 1)
    labels = restore_probabilities(prediction.probabilities, prepared.geometry, prepared.original, manifest.scheme)
    if options.roi_mm:
        clear_outside(labels, prepared.original, options.roi_mm)
    report.progress("segment.restore", 1, 1)
    clock.lap("restore")
    return _SegmentedCase(Volume(labels, prepared.original), prepared, prediction, clock.seconds)


def _predict_within_memory(
    scheme: LabelScheme,
    patch: Triple,
    network: SegmentationNetwork,
    prepared: PreparedCase,
    options: SegmentOptions,
    report: Reporter,
) -> _Prediction:
    device = next(network.parameters()).device
    window = options.window if min(options.window) > 0 else patch
    stitch = device
    while True:
        try:
            return _predict_measured(scheme, network, device, prepared, window, options, stitch, report)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        smaller: Triple = tuple(min(size, max(SMALLEST_WINDOW, size // 2)) for size in window)  # type: ignore[assignment]
        if stitch.type == "cuda":
            stitch = torch.device("cpu")
            report.warning("The GPU's memory ran out; the windows are now joined in main memory, which is slower.")
        elif smaller != window:
            window = smaller
            report.warning(f"Memory ran out; the window is now {'x'.join(map(str, window))} voxels.")
        elif device.type == "cuda":
            device, window = torch.device("cpu"), options.window if min(options.window) > 0 else patch
            network.to(device)
            report.warning("The GPU has too little free memory for this model; the CPU takes over, which is slower.")
        else:
            raise OutOfMemory(
                "There is not enough memory to segment this volume, even in the smallest windows.",
                hint="Close other programs, or crop the volume to the region of interest.",
            )


def _predict_measured(
    scheme: LabelScheme,
    network: SegmentationNetwork,
    device: torch.device,
    prepared: PreparedCase,
    window: Triple,
    options: SegmentOptions,
    stitch: torch.device,
    report: Reporter,
) -> _Prediction:
    image = torch.from_numpy(prepared.image)
    probe = LiveBytes()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        found = predict_probabilities(network, image.to(device), window, scheme.regions, options, stitch, report)
        measured = torch.cuda.max_memory_allocated(device)
    else:
        probe.watch([image, *network.parameters(), *network.buffers()])
        with probe:
            found = predict_probabilities(network, image, window, scheme.regions, options, stitch, report)
        measured = probe.peak
    count = window_count(prepared.image.shape[1:], window, options.overlap)
    return _Prediction(found.cpu().numpy(), window, count, measured)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on a card or on the CPU, or Python had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "not enough memory" in text or "can't allocate memory" in text


def segment(
    package: ModelPackage,
    inputs: Mapping[str, Path],
    output: Path,
    options: SegmentOptions = SegmentOptions(),
    probabilities_path: Path | None = None,
    report: Reporter = SILENT,
    network: SegmentationNetwork | None = None,
    keeper: NetworkKeeper | None = None,
) -> dict[str, Any]:
    """Segments files into a file. inputs: channel name -> image file or DICOM folder; "" -> a file with all channels.

    probabilities_path: a file ending for which one volume per label is written beside it, NAME_label.nii.gz.
    network: an already loaded one; else `keeper` gives it, or it is loaded for this run, on `options.device`.
    Returns a summary: paths, volumes in mL (of each region as a whole, also where the written label map shows another
    region on top of it), seconds by stage, measured memory, and all that is needed to do the same again.
    Raises InvresError for inputs that do not fit the model.
    """
    clock, resident = _Clock(), PeakResident()
    manifest = package.manifest
    for path in (output, probabilities_path):
        if path is not None:
            _check_writable(path)
    report.progress("segment.read", 0, 1)
    volumes = _read_inputs([channel.name for channel in manifest.plan.channels], inputs, package.name, report)
    report.progress("segment.read", 1, 1)
    clock.lap("read")
    if network is None:
        network = (keeper or NetworkKeeper()).network(package, choose_device(options.device), report)
    clock.lap("load")
    found = _segment_case(package, network, volumes, options, report)
    clock.add(found.seconds)
    report.progress("segment.write", 0, 1)
    write_segmentation(output, found.labels, manifest.scheme)
    written = _write_probabilities(probabilities_path, found, manifest.scheme, options.roi_mm)
    volumes_ml = _volumes_ml(found, manifest.scheme, options.roi_mm)
    report.progress("segment.write", 1, 1)
    clock.lap("write")
    device = next(network.parameters()).device
    # The tensors share the memory of the prepared image; the volumes of the files stand beside them.
    beside = 0 if device.type == "cuda" else sum(volume.array.nbytes for volume in volumes)
    return {
        "output": str(output),
        "probabilities": written,
        "volumes_ml": volumes_ml,
        "seconds": clock.rounded(),
        "measured_bytes": found.prediction.measured_bytes + beside,
        "measured_rss_bytes": resident.growth_bytes(),
        "device": str(device),
        "device_title": device_info(device).title,
        "model": package.name,
        "model_id": package.id,
        "model_version": manifest.version,
        "model_sha256": manifest.sha256,
        "settings": {
            "window": list(found.prediction.window),
            "windows": found.prediction.windows,
            "overlap": options.overlap,
            "mirror_axes": list(options.mirror_axes),
            "roi_mm": list(options.roi_mm),
        },
        "software": {"invres": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


class _Clock:
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
        self.seconds.update(seconds)
        self._last = time.perf_counter()

    def rounded(self) -> dict[str, float]:
        total = time.perf_counter() - self._start
        return {stage: round(seconds, 2) for stage, seconds in {**self.seconds, "total": total}.items()}


def _write_probabilities(path: Path | None, found: _SegmentedCase, scheme: LabelScheme, roi_mm: Bounds) -> list[str]:
    """One map per label (and for the background where labels exclude one another); the paths."""
    if path is None:
        return []
    prepared, written = found.prepared, []
    names_of_maps = scheme.names if scheme.regions else ("background", *scheme.names)
    for name, array in zip(names_of_maps, found.prediction.probabilities, strict=True):
        outside = 1.0 if name == "background" and not scheme.regions else 0.0
        whole = restore_volume(array, prepared.geometry, prepared.original, outside)
        if roi_mm:
            clear_outside(whole, prepared.original, roi_mm, outside)
        target = _beside(path, name)
        write_volume(target, Volume(whole, prepared.original))
        written.append(os.fspath(target))
    return written


def _read_inputs(names: list[str], inputs: Mapping[str, Path], model: str, report: Reporter) -> list[Volume]:
    """One volume for each of the model's channels, in its order; names are matched whatever their case."""
    each = " ".join(f"--input {name}=FILE" for name in names)
    if list(inputs) == [""]:
        volumes = read_channels(inputs[""], report=report)
        if len(volumes) != len(names):
            raise InvresError(
                f"The model {model} takes {_counted(names)}; {inputs['']} holds {len(volumes)} volume"
                f"{'' if len(volumes) == 1 else 's'}.",
                hint=f"Give each channel once: {each}." if len(names) > 1 else "Give a 3D volume.",
            )
        return volumes
    given = {key.casefold(): path for key, path in inputs.items()}
    if len(given) < len(inputs) or given.keys() != {name.casefold() for name in names}:
        got = ", ".join(name or "a file without a channel name" for name in inputs)
        raise InvresError(f"The model {model} takes {_counted(names)}; got {got}.", hint=f"Give each once: {each}.")
    return [read_volume(given[name.casefold()], report=report) for name in names]


def _counted(names: list[str]) -> str:
    return f"the channel {names[0]}" if len(names) == 1 else f"the {len(names)} channels {', '.join(names)}"


def _volumes_ml(found: _SegmentedCase, scheme: LabelScheme, roi_mm: Bounds) -> dict[str, float]:
    """Millilitres of each label or region on the original grid."""
    labels, prepared = found.labels, found.prepared
    voxel_ml = float(np.prod(labels.geometry.spacing_mm)) / 1000
    volumes = {}
    for index, label in enumerate(scheme.labels):
        if scheme.regions:
            # Counted before regions overwrite one another in the label map.
            probability = found.prediction.probabilities[index]
            inside = restore_volume(probability, prepared.geometry, prepared.original) > 0.5
            if roi_mm:
                clear_outside(inside, labels.geometry, roi_mm)
        else:
            inside = labels.array == label.output_value
        volumes[label.name] = round(int(inside.sum()) * voxel_ml, 3)
    return volumes


def _check_writable(path: Path) -> None:
    """Refuses, before the work, a name that could not be written after it."""
    if not path.name.lower().endswith(WRITABLE_ENDINGS):
        raise InvresError(
            f"{path.name} cannot be written: the allowed endings are {', '.join(WRITABLE_ENDINGS)} and .seg.nrrd.",
            hint="Choose one of these endings.",
        )
    if path.is_dir():
        raise InvresError(f"{path} is a folder, not a file that can be written.", hint="Add a file name.")


def _beside(path: Path, name: str) -> Path:
    """FOLDER/base_name.ending for FOLDER/base.ending, with the name made safe for file systems."""
    ending = max((e for e in WRITABLE_ENDINGS if path.name.lower().endswith(e)), key=len)
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    return path.with_name(f"{path.name[: -len(ending)]}_{safe}{ending}")
