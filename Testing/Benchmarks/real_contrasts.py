"""The brain model on real MR: averages of T1, T2 and PD with tissue maps, one whole head, thick slices of DICOM.

    PYTHONPATH=Backend python Testing/Benchmarks/real_contrasts.py --picture Resources/Screenshots/brain_contrasts.png

Looks for the images in ../shared/data beside the repository, or in $INVRES_DATA. Run by hand; prints a Markdown table.
The tissue maps of SPM12 are population averages: they fit the averages of 152 heads, and one person only roughly, so
the whole head of one person (Colin27) is told by volumes as well. The DICOM series has no reference at all.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from invres.config import LabelScheme
from invres.console import package_named
from invres.demo import TISSUES, template, tissues_of
from invres.files import written_whole
from invres.inference import load_network, segment_volumes
from invres.metrics import dice_by_label
from invres.prediction import confidence_of
from invres.volume import Volume, read_volume, resample

REPOSITORY = Path(__file__).resolve().parents[2]
SPM = "brain_templates_spm12"
IN_A_ROW = 5
HEAD_MM = 100  # what is shorter along an axis shows a crop, which the model is not for: scored, but not in the picture
IMAGES = {
    "Colin27, T1, whole head": f"{SPM}/single_subj_T1.nii.gz",
    "average of 152, T1": f"{SPM}/avg152T1.nii.gz",
    "average of 152, T2": f"{SPM}/avg152T2.nii.gz",
    "average of 152, PD": f"{SPM}/avg152PD.nii.gz",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared = Path(os.environ.get("INVRES_DATA") or REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=shared)
    parser.add_argument("--model", default="brain-any-contrast")
    parser.add_argument("--picture", type=Path, help="PNG with all of them but crops")
    options = parser.parse_args()
    package = package_named(options.model)
    network = load_network(package, torch.device("cpu"))
    t1, reference = template()
    maps = [read_volume(options.data / SPM / f"{name}.nii.gz") for name in ("csf", "grey", "white")]
    scenes: list[tuple[str, Volume, np.ndarray | None]] = [("ICBM152 T1, brain only", t1, reference)]
    for name, path in IMAGES.items():
        image = read_volume(options.data / path)
        scenes.append((name, image, _reference(maps, image)))
    for folder in sorted({path.parent for path in (options.data / "dicom_gbm").rglob("*.dcm")}):
        image = read_volume(folder)
        spacing = " x ".join(f"{s:.2g}" for s in image.geometry.spacing_mm)
        scenes.append((f"DICOM {folder.name}, {spacing} mm", image, None))
    print(f"| image | {' | '.join(TISSUES.names)} | volumes of the three, mL | confidence |\n|---|---|---|---|---|---|")
    shown = []
    for name, image, wanted in scenes:
        labels, probabilities, _ = segment_volumes(package, network, [image])
        found = tissues_of(labels.array, package.manifest.scheme)
        numbers = range(1, len(TISSUES.labels) + 1)
        scores = ["-"] * len(numbers)
        if wanted is not None:
            masks = [np.stack([array == number for number in numbers]) for array in (found, wanted)]
            scores = [f"{value:.3f}" for value in dice_by_label(*masks)]
        voxel_ml = float(np.prod(image.geometry.spacing_mm)) / 1000
        volumes = ", ".join(f"{(found == number).sum() * voxel_ml:.0f}" for number in numbers)
        confidence = confidence_of(probabilities, False)
        print(f"| {name} | {' | '.join(scores)} | {volumes} | {confidence:.2f} |", flush=True)
        if min(np.multiply(image.geometry.shape, image.geometry.spacing_mm)) >= HEAD_MM:
            shown.append((name, image, labels.array))
    if options.picture:
        draw(options.picture, shown, package.manifest.scheme)


def _reference(maps: list[Volume], image: Volume) -> np.ndarray:
    """The likeliest of CSF, grey and white matter on the image's grid, 0 where none is likelier than not."""
    on_grid = np.stack([resample(one, image.geometry, interpolation="linear").array for one in maps]).astype(float)
    on_grid /= max(one.array.max() for one in maps)
    return np.where(on_grid.sum(axis=0) > 0.5, on_grid.argmax(axis=0) + 1, 0).astype(np.uint8)


def draw(path: Path, scenes: list[tuple[str, Volume, np.ndarray]], scheme: LabelScheme) -> None:
    """A block for each image, at most `IN_A_ROW` beside one another, and a legend of the colours below.

    A block has a coronal and an axial cut through the middle of the labels, each plain and with its labels beside it.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    table = np.zeros((max(label.output_value for label in scheme.labels) + 1, 3))
    for label in scheme.labels:
        table[label.output_value] = np.array(label.colour or (230, 75, 60)) / 255
    columns = min(len(scenes), IN_A_ROW)
    rows = -(-len(scenes) // columns)
    figure = Figure(figsize=(4 * columns, 4.4 * rows + 1.8), dpi=100, facecolor="black")
    *blocks, below = figure.subfigures(rows + 1, 1, height_ratios=[4.4] * rows + [1.8])
    for number, block in enumerate(blocks):
        parts = block.subfigures(1, columns, squeeze=False)[0]
        for part in parts:
            part.set_facecolor("black")
        for part, scene in zip(parts, scenes[number * columns : (number + 1) * columns], strict=False):
            _draw_scene(part, scene, table)
    below.set_facecolor("black")
    patches = [Patch(color=tuple(table[label.output_value]), label=label.name) for label in scheme.labels]
    legend = below.legend(handles=patches, loc="center", ncols=max(1, columns), fontsize=17, frameon=False)
    for text in legend.get_texts():
        text.set_color("white")
    with written_whole(path) as temporary:
        figure.savefig(temporary, facecolor="black")


def _draw_scene(figure: Any, scene: tuple[str, Volume, np.ndarray], table: np.ndarray) -> None:
    name, image, labels = scene
    base, over = image.canonical(), Volume(labels, image.geometry).canonical().array
    centre = np.argwhere(over > 0).mean(axis=0).astype(int) if over.any() else np.array(over.shape) // 2
    d, h, w = base.geometry.spacing_mm
    low, high = np.percentile(base.array, (1, 99.5))
    figure.suptitle(name.replace(", ", "\n", 1), color="white", fontsize=17, y=0.99, va="top")
    axes = figure.subplots(
        2, 2, gridspec_kw={"left": 0.01, "right": 0.99, "bottom": 0.01, "top": 0.84, "wspace": 0.02, "hspace": 0.02}
    )
    for row, (axis, aspect) in zip(axes, ((1, d / w), (0, h / w)), strict=True):
        grey = np.clip((base.array.take(centre[axis], axis) - low) / max(high - low, 1e-9), 0, 1)[::-1, ::-1]
        cut = over.take(centre[axis], axis)[::-1, ::-1]
        plain = np.repeat(grey[..., None], 3, axis=2)
        painted = np.where((cut > 0)[..., None], 0.45 * plain + 0.55 * table[cut], plain)
        for place, picture in zip(row, (plain, painted), strict=True):
            place.imshow(picture, aspect=aspect, interpolation="nearest")
            place.set_axis_off()


if __name__ == "__main__":
    main()
