"""`invres demo`: trains on synthetic contrasts, then segments a real MR volume whose contrast it has never seen.

The volume is the ICBM152 2009a T1 template with its grey and white matter maps, as shipped inside the `nilearn`
package (extra `demo`): an average of 152 real brains, 1 mm, already brain-extracted. Training sees only images
synthesised from the tissue maps with random T1-like contrasts, never the T1 itself. It does see the template's anatomy,
deformed at random: the demo shows transfer to a real contrast, not to a new person.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from . import Cancelled, InvresError
from .config import ChannelPlan, Label, LabelScheme, NetworkConfig, PreparationPlan, Recipe, TrainingConfig
from .events import SILENT, Reporter, format_bytes, format_seconds
from .inference import segment
from .memory import predict_training
from .metrics import score_case
from .modelpackage import save_package
from .networks import build
from .overlay import draw_overlay
from .prediction import SegmentOptions, choose_device
from .sampling import seeded_generator
from .synthesis import input_patch, synthesise_from_probabilities, tissue_maps_from_gm_wm
from .synthesisconfig import SynthesisConfig
from .trainer import StopRequest, Trainer
from .training import training_summary
from .volume import Volume, read_volume, resample, write_volume

__all__ = ["SCHEME", "run", "template_files"]

_TERMINOLOGY = (
    "Segmentation category and type - DICOM master list~SCT^{category}~SCT^{type}~^^"
    "~Anatomic codes - DICOM master list~^^~^^"
)
_TISSUE = "85756007^Tissue"


def _label(value: int, name: str, colour: tuple[int, int, int], category: str, kind: str) -> Label:
    return Label(name, (value,), value, colour, _TERMINOLOGY.format(category=category, type=kind))


# Codes: DICOM PS3.16, CID 7153 (CNS segmentation types).
SCHEME = LabelScheme(
    (
        _label(1, "CSF", (86, 152, 222), "91720002^Body Substance", "65216001^Cerebrospinal Fluid"),
        _label(2, "grey matter", (214, 105, 92), _TISSUE, "389081007^Gray Matter"),
        _label(3, "white matter", (240, 214, 140), _TISSUE, "389080008^White Matter"),
    )
)
MARGIN = 6  # voxels around the brain that patches may reach into
# Half the T1's resolution: minutes on a CPU are enough for it, and probabilities are interpolated back to 1 mm.
SPACING_MM = (2.0, 2.0, 2.0)
CONFIG = TrainingConfig(
    patch=(40, 40, 40),
    batch_size=2,  # faster than one on a CPU: see prediction.predict_probabilities
    iterations_per_epoch=100,
    epochs=1000,  # the time budget ends it
    learning_rate=4e-3,
    warmup_iterations=20,
    checkpoint_every_s=60,
)
# Somewhat larger than the training patch, but inside the volume: a window filled up with repeated border would shift
# the statistics that instance norm divides by.
WINDOW = (64, 64, 64)
NETWORK = NetworkConfig(name="fully_invres", out_channels=4, channels=(16, 32, 64, 128))
# Contrasts are random, within what a spoiled gradient echo of any T1 weighting gives (white matter = 220; T1 of white
# matter 0.55 to 0.9 s, grey matter 0.9 to 1.45 s, CSF 3.5 to 4.5 s; TR 8 to 25 ms, flip 15 to 35 degrees). Any order of
# tissues, other heads and scanners want hours of training, not minutes. Outside the brain the images are exactly zero,
# as the T1 is.
SYNTHESIS = SynthesisConfig(
    means=((45.0, 95.0), (120.0, 195.0), (200.0, 240.0)),
    scale=0.1,
    rotation_degrees=8.0,
    elastic_voxels=1.5,
    std=(2.0, 10.0),
    blur_voxels=0.4,
    bias_field=0.3,
    gamma_std=0.2,
    noise_std=4.0,
    low_resolution_probability=0.0,
    zero_background_probability=1.0,
    textured_background_probability=0.0,
)


def template_files() -> dict[str, Path]:
    """t1, gm and wm of the ICBM152 template inside the nilearn package. Raises InvresError where it is missing."""
    found = importlib.util.find_spec("nilearn")
    if found is None or not found.submodule_search_locations:
        raise InvresError(
            "The demo's MR volume comes with the package nilearn, which is not installed.",
            hint="Run `pip install invres[demo]`.",
        )
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data"
    files = {key: folder / f"mni_icbm152_{key}_tal_nlin_sym_09a_converted.nii.gz" for key in ("t1", "gm", "wm")}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise InvresError(f"nilearn has no {missing[0]}.", hint="Install nilearn 0.10 or newer.")
    return files


def run(output: Path, time_s: float, device: str = "auto", report: Reporter = SILENT) -> dict[str, Any]:
    """Trains for `time_s` seconds, segments the T1, scores it. Returns paths, figures and a readable `text`."""
    output.mkdir(parents=True, exist_ok=True)
    files = template_files()
    report.note(
        "The network will be trained on images with random T1-like contrasts, synthesised from the ICBM152 grey and "
        "white matter maps; it will not see the real T1 before it segments it."
    )
    t1, maps, reference = _template(files)
    chosen = choose_device(device)
    config = dataclasses.replace(CONFIG, time_s=time_s)
    torch.manual_seed(config.seed)
    network = build(NETWORK).to(chosen)
    predicted = predict_training(NETWORK, config.patch, config.batch_size)
    stored = predict_training(NETWORK, config.patch, config.batch_size, engine="stored")
    batches = _TissueBatches(maps, config, chosen)
    with StopRequest().listening() as stop:
        try:
            result = Trainer(network, batches, config, output, regions=False, report=report, stop=stop).run()
        except Cancelled as error:
            raise Cancelled("The demo was stopped.", hint="Run it again; it starts anew.") from error
    recipe = Recipe(name="demo-brain-tissue", network=NETWORK, training=config)
    package = save_package(
        output / "model",
        name=recipe.name,
        network=network.config,
        state_dict=result.weights,
        plan=PreparationPlan((ChannelPlan("T1", "MR"),), SPACING_MM),
        scheme=SCHEME,
        patch=WINDOW,
        description="CSF, grey and white matter of brain-extracted MR; minutes of training on synthetic contrasts.",
        training=training_summary(recipe, result, network.engine, 1, 0),
        intended_use="Demonstration only.",
    )
    network.eval()
    volume = output / "icbm152_t1.nii.gz"
    write_volume(volume, t1)
    segmentation = output / "icbm152_t1.seg.nrrd"
    options = SegmentOptions(device=str(chosen))
    summary = segment(package, {"T1": files["t1"]}, segmentation, options, report=report, network=network)
    labels = read_volume(segmentation, kind="labels")
    write_volume(output / "icbm152_t1_labels.nii.gz", labels)
    scores = score_case(labels.array, reference, SCHEME, t1.geometry.spacing_mm)
    dice = {name: score.dice for name, score in scores.items()}
    picture = draw_overlay(
        output / "overlay.png",
        t1,
        [("Segmentation by Fully-InvRes", labels.array), ("Reference from the template's tissue maps", reference)],
        SCHEME,
        "ICBM152 T1: Dice " + ", ".join(f"{name} {value:.3f}" for name, value in dice.items()),
    )
    text = "\n".join(
        [
            "Dice of the real T1 against its own tissue maps (CSF: inside the brain, neither grey nor white):",
            *(f"  {name:13} {value:.3f}" for name, value in dice.items()),
            f"Training: {result.iterations} iterations of {'x'.join(map(str, config.patch))} voxels in "
            f"{format_seconds(result.seconds)}, synthetic images only; the anatomy was seen, the T1 was not.",
            f"Peak memory of a training step: predicted {format_bytes(predicted.peak_bytes)}, measured "
            f"{format_bytes(result.peak_bytes)} (the same network with stored activations: "
            f"{format_bytes(stored.peak_bytes)}).",
            f"Segmentation of {'x'.join(map(str, t1.array.shape))} voxels: "
            f"{format_seconds(summary['seconds']['total'])} on {summary['device']}.",
            "Files:",
            f"  {volume}",
            f"  {segmentation}  (open both in 3D Slicer)",
            f"  {output / 'icbm152_t1_labels.nii.gz'}",
            f"  {picture}",
            f"  {package.path}",
        ]
    )
    return {
        "dice": dice,
        "predicted_bytes": predicted.peak_bytes,
        "measured_bytes": result.peak_bytes,
        "iterations": result.iterations,
        "segmentation": str(segmentation),
        "overlay": str(picture),
        "model": str(package.path),
        "text": text,
    }


def _template(files: dict[str, Path]) -> tuple[Volume, np.ndarray, np.ndarray]:
    """The T1; tissue maps float32 (3, D, H, W) in canonical orientation; the reference labels on the T1's own grid."""
    t1, gm, wm = (read_volume(files[key]) for key in ("t1", "gm", "wm"))
    maps = tissue_maps_from_gm_wm(gm.array, wm.array)
    likeliest = maps.argmax(axis=0).astype(np.uint8) + 1
    reference = np.where(maps.sum(axis=0) > 0.5, likeliest, 0) * (t1.array > 0)
    working = gm.geometry.canonical().with_spacing(SPACING_MM)
    coarse = []
    for tissue in maps:
        smooth = gaussian_filter(tissue, [s / g / 2 for s, g in zip(SPACING_MM, gm.geometry.spacing_mm, strict=True)])
        coarse.append(resample(Volume(smooth, gm.geometry), working).array)
    return t1, np.stack(coarse), reference.astype(np.uint8)


class _TissueBatches:
    """Patches of synthetic heads, one head for each iteration; a pure function of the iteration.

    The whole head is synthesised and standardised before patches are cut, because a real volume is standardised as a
    whole too: a patch standardised by itself would no longer tell which grey is which tissue.
    """

    def __init__(self, maps: np.ndarray, config: TrainingConfig, device: torch.device):
        self.config = config
        inside = np.argwhere(maps.sum(axis=0) > 0.5)
        low, high = inside.min(axis=0), inside.max(axis=0) + 1
        box = maps[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        self.head: tuple[int, int, int] = tuple(int(n) + 2 * MARGIN for n in box.shape[1:])  # type: ignore[assignment]
        # The deformation reaches somewhat beyond the head that it makes.
        around = [
            ((wide - n) // 2, wide - n - (wide - n) // 2)
            for wide, n in zip(input_patch(SYNTHESIS, self.head), box.shape[1:], strict=True)
        ]
        self.maps = torch.from_numpy(np.pad(box, [(0, 0), *around])).to(device)[None]

    def batch(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = seeded_generator(self.config.seed, iteration)
        head, label = synthesise_from_probabilities(self.maps, None, SYNTHESIS, generator, self.head)
        both = torch.cat((head, label.to(head.dtype)), dim=1)[0]
        parts = []
        for _ in range(self.config.batch_size):
            cut = []
            for room, size in zip(self.head, self.config.patch, strict=True):
                start = int(torch.randint(room - size + 1, (), generator=generator))
                cut.append(slice(start, start + size))
            parts.append(both[:, cut[0], cut[1], cut[2]])
        patches = torch.stack(parts)
        return patches[:, :1].contiguous(), patches[:, 1].to(torch.int16)
