"""From volumes to a segmentation on the input's own grid: a sliding window, stitched with Gaussian weights."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference

from . import InvresError, OutOfMemory
from .config import LabelScheme
from .events import SILENT, Reporter
from .modelpackage import ModelPackage
from .networks import SegmentationNetwork, build
from .preprocessing import PreparedCase, prepare
from .restoration import restore_probabilities, restore_volume
from .volume import WRITABLE_ENDINGS, Volume, read_channels, read_volume, write_segmentation, write_volume

__all__ = [
    "SegmentOptions",
    "choose_device",
    "is_out_of_memory",
    "load_network",
    "predict_probabilities",
    "segment",
    "segment_volumes",
]

Triple = tuple[int, int, int]
SMALLEST_WINDOW = 32


@dataclass(frozen=True)
class SegmentOptions:
    """overlap: part of a window shared with its neighbour. mirror_axes: also predict mirrored along these and average.
    window: voxels (D, H, W), (0, 0, 0) = the model's own. device: "auto", "cpu" or "cuda:0"."""

    device: str = "auto"
    overlap: float = 0.5
    mirror_axes: tuple[int, ...] = ()
    window: Triple = (0, 0, 0)

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise InvresError(f"The overlap must be at least 0 and below 1, got {self.overlap}.")
        if any(axis not in (0, 1, 2) for axis in self.mirror_axes) or len({*self.mirror_axes}) < len(self.mirror_axes):
            raise InvresError(f"Mirror axes are 0, 1 and 2 (D, H, W), each once; got {list(self.mirror_axes)}.")
        if any(self.window) and min(self.window) < 1:
            raise InvresError(f"The window must be three sizes of 1 voxel or more, got {list(self.window)}.")


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
    total = len(flips) * _window_count(image.shape[1:], window, options.overlap)
    done = 0
    report.progress("segment.tiles", 0, total)

    def predictor(tiles: torch.Tensor) -> torch.Tensor:
        nonlocal done
        logits = sum(network(tiles.flip(flip)).logits.float().flip(flip) for flip in flips)
        done += tiles.shape[0] * len(flips)
        report.progress("segment.tiles", min(done, total), total)
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


def _window_count(shape: tuple[int, ...], window: Triple, overlap: float) -> int:
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
    prepared grid (K, d, h, w), and the prepared case.

    When memory runs out it stitches on the CPU, then halves the window, then goes to the CPU, each with a warning.
    Raises OutOfMemory when none of that is enough.
    """
    manifest = package.manifest
    report.progress("segment.prepare", 0, 1)
    prepared = prepare(volumes, None, manifest.plan, manifest.scheme, report=report)
    report.progress("segment.prepare", 1, 1)
    probabilities = _predict_within_memory(manifest.scheme, manifest.patch, network, prepared, options, report)
    report.progress("segment.restore", 0, 1)
    labels = restore_probabilities(probabilities, prepared.geometry, prepared.original, manifest.scheme)
    report.progress("segment.restore", 1, 1)
    return Volume(labels, prepared.original), probabilities, prepared


def _predict_within_memory(
    scheme: LabelScheme,
    patch: Triple,
    network: SegmentationNetwork,
    prepared: PreparedCase,
    options: SegmentOptions,
    report: Reporter,
) -> np.ndarray:
    device = next(network.parameters()).device
    window = options.window if min(options.window) > 0 else patch
    stitch = device
    while True:
        try:
            image = torch.from_numpy(prepared.image).to(device)
            found = predict_probabilities(network, image, window, scheme.regions, options, stitch, report)
            return found.cpu().numpy()
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
) -> dict[str, Any]:
    """Segments files into a file. inputs: channel name -> image file or DICOM folder; "" -> a file with all channels.

    probabilities_path: a file ending for which one volume per label is written beside it, NAME_label.nii.gz.
    network: an already loaded one (else it is loaded on `options.device`).
    Returns a summary: seconds by stage, volumes in mL (of each region as a whole, also where the written label map
    shows another region on top of it), paths. Raises InvresError for inputs that do not fit the model.
    """
    start = time.perf_counter()
    manifest = package.manifest
    for path in (output, probabilities_path):
        if path is not None:
            _check_writable(path)
    volumes = _read_inputs([channel.name for channel in manifest.plan.channels], inputs, package.name, report)
    read_s = time.perf_counter() - start
    if network is None:
        network = load_network(package, choose_device(options.device))
    loaded_s = time.perf_counter() - start - read_s
    labels, probabilities, prepared = segment_volumes(package, network, volumes, options, report)
    predicted_s = time.perf_counter() - start - read_s - loaded_s
    write_segmentation(output, labels, manifest.scheme)
    written = []
    if probabilities_path is not None:
        names_of_maps = manifest.scheme.names if manifest.scheme.regions else ("background", *manifest.scheme.names)
        for name, array in zip(names_of_maps, probabilities, strict=True):
            outside = 1.0 if name == "background" and not manifest.scheme.regions else 0.0
            whole = restore_volume(array, prepared.geometry, prepared.original, outside)
            target = _beside(probabilities_path, name)
            write_volume(target, Volume(whole, prepared.original))
            written.append(str(target))
    return {
        "output": str(output),
        "probabilities": written,
        "volumes_ml": _volumes_ml(labels, probabilities, prepared, manifest.scheme),
        "seconds": {
            "read": round(read_s, 2),
            "load": round(loaded_s, 2),
            "predict": round(predicted_s, 2),
            "total": round(time.perf_counter() - start, 2),
        },
        "device": str(next(network.parameters()).device),
        "model": package.name,
        "model_sha256": manifest.sha256,
    }


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


def _volumes_ml(
    labels: Volume, probabilities: np.ndarray, prepared: PreparedCase, scheme: LabelScheme
) -> dict[str, float]:
    """Millilitres of each label or region on the original grid."""
    voxel_ml = float(np.prod(labels.geometry.spacing_mm)) / 1000
    volumes = {}
    for index, label in enumerate(scheme.labels):
        if scheme.regions:
            # Counted before regions overwrite one another in the label map.
            inside = restore_volume(probabilities[index], prepared.geometry, prepared.original) > 0.5
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
