"""Writes a picture of every tab and state of the panel to a folder; with --keep the best to Resources/Screenshots.

python Testing/InvResSegment/take_screenshots.py FOLDER [--keep]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "Backend")]

from panel_driver import addSegmentation, addVolume, loadedPanel, picture, tunedManifest, waitUntil  # noqa: E402
from pictures_of_hippocampi import takeHippocampi  # noqa: E402
from pictures_of_results import takeBatch, takeProof  # noqa: E402
from small_models import ONE, TWO, example, trained_package  # noqa: E402

from invres.demo import template  # noqa: E402

KEPT = {"brain_ready": "panel_segment.png", "brain_done": "panel_result.png", "models_bundled": "panel_models.png"}
KEPT |= {"hippocampus_done": "panel_hippocampus.png"}
KEPT |= {"hippocampus_training": "panel_finetune.png", "hippocampus_proof": "panel_proof.png"}
KEPT |= {"hippocampus_batch": "panel_batch.png"}
SCREENSHOTS = HERE.parents[1] / "Resources" / "Screenshots"


def makeModels(folder: Path, iterations: int = 45) -> None:
    """Two models that are trained in seconds to find balls, with cards as real ones have."""
    trained_package(folder / "one", ("T1",), ONE, iterations)
    trained_package(folder / "two", ("T1", "FLAIR"), TWO, iterations)
    # Nothing was measured, so the cards say so: a picture must not show figures that nobody can reproduce.
    said = "a demonstration, not anatomy."
    tunedManifest(folder / "one", name="Ball, one contrast", description=f"Finds a bright ball in noise; {said}")
    tunedManifest(
        folder / "two",
        name="Ball with core, two contrasts",
        description=f"Finds a ball and its core in two contrasts; {said}",
    )


def takeFineTuning(folder: Path) -> None:
    """The Fine-tune tab: empty, with a question, ready, and while it learns."""

    def shoot(name: str) -> None:
        waitUntil(lambda: not tab.working and not tab._timer.active, 60)
        print(picture(panel.widget, folder / f"{name}.png"))

    models = Path(tempfile.mkdtemp())
    makeModels(models, iterations=5)  # so that there is something to learn
    settings = {"InvResSegment/RunsFolder": str(models / "runs"), "InvResSegment/Device": "cpu"}
    with loadedPanel(models, settings=settings) as module:
        panel = module.enter().panel
        tab = panel.fineTuneTab
        waitUntil(lambda: not panel.setup.checking and panel.segmentTab.models, 120)
        panel.ui.tabs.setCurrentWidget(tab.widget)
        tab.ui.baseBox.currentIndex = 1
        shoot("finetune_empty")
        for seed in range(4):
            images, classes = example(np.random.default_rng(seed), (24, 26, 28), 2)
            volumes = {"T1": addVolume(f"Scan {seed + 1} T1", voxels=images[0])}
            volumes["FLAIR"] = addVolume(f"Scan {seed + 1} FLAIR", voxels=images[1])
            names = ("\u00d6dem", "core") if seed else ("\u00d6dem", "Segment_2")
            masks = {names[0]: classes == 1, names[1]: (classes == 2) & (seed < 3)}
            tab.cases.add(f"Scan {seed + 1}", volumes, addSegmentation(volumes["T1"], masks))
        waitUntil(lambda: tab.ui.casesTable.rowCount == 4, 10)
        tab.ui.casesTable.selectRow(0)
        shoot("finetune_question")
        tab.cases.choose({"Segment_2": "core"})
        tab.cases.setRole(tab.cases.rows[1], "validation")
        shoot("finetune_answered")
        tab.ui.checkButton.click()
        waitUntil(lambda: not tab.working and "needs about" in tab.ui.memoryNoticeText.text, 120)
        tab.ui.casesTable.selectRow(3)
        shoot("finetune")
        tab.ui.advancedButton.collapsed = False
        shoot("finetune_advanced")
        tab.ui.advancedButton.collapsed = True
        tab.ui.minutesBox.value, tab.ui.epochsBox.value = 0, 40
        waitUntil(lambda: tab.ui.startButton.enabled, 60)
        tab.ui.startButton.click()
        waitUntil(lambda: tab.run.view.record is not None and len(tab.run.view.record.epochsShown) > 3, 300)
        shoot("finetune_running")
        tab.ui.deleteRunButton.click()
        tab.ui.deleteRunButton.click()


def takeSegmenting(folder: Path) -> None:
    """Setup, the Segment tab in every state, and the Models tab."""

    def shoot(name: str) -> None:
        print(picture(panel.widget, folder / f"{name}.png"))

    models = Path(tempfile.mkdtemp())
    makeModels(models)
    with loadedPanel(models) as module:
        panel = module.enter().panel
        tab = panel.segmentTab
        shoot("checking")
        waitUntil(lambda: not panel.setup.checking and tab.models, 120)
        shoot("empty")
        images, _classes = example(np.random.default_rng(3), (40, 42, 44), 2)
        addVolume("MPRAGE T1", voxels=images[0])
        addVolume("scan 7", voxels=images[1], origin=(3, 0, 0))
        tab.ui.modelList.setCurrentRow(1)
        shoot("unmatched")
        other = addVolume("FLAIR axial", voxels=images[1], origin=(3, 0, 0))
        tab.ui.matchButton.click()
        waitUntil(lambda: tab.idle, 60)
        shoot("geometry")
        other.SetOrigin(0, 0, 0)
        waitUntil(lambda: tab.ui.applyButton.enabled and tab.idle, 60)
        shoot("ready")
        tab.ui.applyButton.click()
        waitUntil(lambda: tab.ui.progressBar.value > 400, 120)
        shoot("running")
        waitUntil(lambda: not tab.running, 120)
        waitUntil(lambda: tab.idle, 60)
        shoot("done")
        (models / "two" / "model.safetensors").write_bytes(b"damaged")
        panel.backend.stop()
        tab.ui.applyButton.click()
        waitUntil(lambda: not tab.running, 120)
        shoot("error")
        panel.ui.tabs.setCurrentWidget(panel.modelsTab.widget)
        panel.modelsTab.ui.modelsTable.selectRow(1)
        panel.modelsTab.ui.manifestButton.collapsed = False
        shoot("models")
    with loadedPanel(models / "nothing") as module:
        panel = module.enter().panel
        waitUntil(lambda: not panel.setup.checking, 120)
        waitUntil(lambda: "Reading" not in panel.segmentTab.ui.modelCard.text, 60)
        panel.ui.tabs.setCurrentWidget(panel.modelsTab.widget)
        shoot("models_empty")
    with loadedPanel(models / "nothing", python=bareEnvironment(models)) as module:
        panel = module.enter().panel
        waitUntil(lambda: not panel.setup.checking, 120)
        shoot("setup_missing")
        panel.ui.offlineButton.collapsed = False
        shoot("setup_offline")


def takeBundled(folder: Path) -> None:
    """The bundled models on the real ICBM152 T1: chosen, segmented, then two in sequence, and in the Models tab."""

    def shoot(name: str) -> None:
        print(picture(panel.widget, folder / f"{name}.png"))

    with loadedPanel(Path(tempfile.mkdtemp()), bundled=True) as module:
        panel = module.enter().panel
        tab = panel.segmentTab
        addVolume("ICBM152 T1", voxels=template()[0].canonical().array)
        waitUntil(lambda: not panel.setup.checking and tab.models and tab.idle, 120)
        tab.enter()
        waitUntil(lambda: tab.idle and tab.ui.applyButton.enabled and "predicted" not in tab.ui.modelCard.text, 120)
        shoot("brain_ready")
        tab.ui.applyButton.click()
        waitUntil(lambda: not tab.running and tab.idle, 600)
        shoot("brain_done")
        names = [tab.ui.modelList.item(row).text() for row in range(tab.ui.modelList.count)]
        tab.ui.modelList.setCurrentRow(names.index("hippocampus-t1"))
        waitUntil(lambda: tab.idle and tab.ui.applyButton.enabled, 120)
        shoot("hippocampus_ready")
        tab.ui.applyButton.click()
        waitUntil(lambda: not tab.running and tab.idle, 600)
        shoot("hippocampus_done")
        panel.ui.tabs.setCurrentWidget(panel.modelsTab.widget)
        panel.modelsTab.ui.modelsTable.selectRow(0)
        shoot("models_bundled")


def bareEnvironment(folder: Path) -> str:
    """A Python without any package."""
    import venv

    venv.create(folder / "bare", with_pip=False)
    return str(next(path for path in (folder / "bare").glob("*/python*") if path.is_file()))


def keep(folder: Path) -> None:
    """The best pictures as small files, without what they were made on in their metadata."""
    for name, kept in KEPT.items():
        if not (folder / f"{name}.png").is_file():
            continue
        image = Image.open(folder / f"{name}.png").convert("RGB")
        image.quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            SCREENSHOTS / kept, optimize=True
        )
        print(SCREENSHOTS / kept, (SCREENSHOTS / kept).stat().st_size)


PARTS = {
    "bundled": takeBundled,
    "hippocampi": takeHippocampi,
    "segment": takeSegmenting,
    "finetune": takeFineTuning,
    "proof": takeProof,
    "batch": takeBatch,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true", help="write the best to Resources/Screenshots as well")
    parser.add_argument("--only", choices=PARTS, help="only these pictures")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, take in PARTS.items():
        if options.only in (None, name):
            take(options.folder)
    if options.keep:
        keep(options.folder)
