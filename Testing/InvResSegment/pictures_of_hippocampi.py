"""Pictures of fine-tuning, its proof and a batch, with the bundled hippocampus model on real crops.

The crops are of the data set that the model was trained on, which is why the pictures prove nothing of its worth.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from panel_driver import addSegmentation, addVolume, loadedPanel, picture, waitUntil
from standins import qtclasses

from invres.volume import read_volume

__all__ = ["takeHippocampi"]

REPOSITORY = Path(__file__).resolve().parents[2]
CASES, EPOCHS = 4, 4
MODEL = "hippocampus-t1"
PARTS = {"anterior hippocampus": 1, "posterior hippocampus": 2}


def takeHippocampi(folder: Path) -> None:
    """The Fine-tune tab while it learns and with its proof, then the Batch tab in review, with a case that failed."""
    data = Path(os.environ.get("INVRES_DATA") or REPOSITORY.parent / "shared" / "data") / "hippocampus_msd"
    if not data.is_dir():
        print(f"No pictures of hippocampi: {data} is not here; set INVRES_DATA to the folder of real volumes.")
        return
    place = Path(tempfile.gettempdir()) / "study"  # a name that may be seen
    shutil.rmtree(place, ignore_errors=True)
    try:
        _tune(folder, data, place)
        _batch(folder, data, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _tune(folder: Path, data: Path, place: Path) -> None:
    def shoot(name: str) -> None:
        print(picture(panel.widget, folder / f"{name}.png"))

    settings = {"InvResSegment/RunsFolder": str(place / "runs"), "InvResSegment/Device": "cpu"}
    with loadedPanel(place / "models", settings=settings, bundled=True) as module:
        panel = module.enter().panel
        tab = panel.fineTuneTab
        waitUntil(lambda: not panel.setup.checking and panel.segmentTab.models, 120)
        panel.ui.tabs.setCurrentWidget(tab.widget)
        _choose(tab.ui.baseBox)
        for number, path in enumerate(_files(data), start=1):
            volume = addVolume(f"Patient {number} T1", voxels=read_volume(path).array)
            labels = read_volume(data / "labels" / path.name, kind="labels").array
            masks = {name: labels == value for name, value in PARTS.items()}
            tab.cases.add(f"Patient {number}", {"T1": volume}, addSegmentation(volume, masks))
        waitUntil(lambda: tab.ui.casesTable.rowCount == CASES, 10)
        tab.ui.casesTable.selectRow(0)
        tab.ui.checkButton.click()
        waitUntil(lambda: not tab.working and "needs about" in tab.ui.memoryNoticeText.text, 120)
        tab.ui.minutesBox.value, tab.ui.epochsBox.value = 0, EPOCHS
        waitUntil(lambda: tab.ui.startButton.enabled, 60)
        tab.ui.startButton.click()
        view = tab.run.view
        waitUntil(lambda: view.record is not None and len(view.record.epochsShown) >= EPOCHS - 1, 900)
        shoot("hippocampus_training")
        waitUntil(lambda: view.state == "finished", 1800)
        for section in (tab.ui.casesButton, tab.ui.trainingButton):
            section.collapsed = True
        view.ui.casesTable.selectRow(0)
        shoot("hippocampus_proof")
        tab.ui.deleteRunButton.click()
        tab.ui.deleteRunButton.click()


def _batch(folder: Path, data: Path, place: Path) -> None:
    images, results = place / "scans", place / "results"
    for made in (images, results):
        made.mkdir(parents=True)
    for number, path in enumerate(_files(data), start=1):
        shutil.copyfile(path, images / f"patient{number}_T1.nii.gz")
    with loadedPanel(place / "models", settings={"InvResSegment/Device": "cpu"}, bundled=True) as module:
        panel = module.enter().panel
        tab = panel.batchTab
        waitUntil(lambda: not panel.setup.checking and panel.segmentTab.models, 120)
        panel.ui.tabs.setCurrentWidget(tab.widget)
        _choose(tab.ui.modelBox)
        qtclasses.answers.append(str(images))
        tab.ui.datasetButton.click()
        waitUntil(lambda: tab.ui.casesTable.rowCount == CASES, 60)
        tab.ui.folderEdit.currentPath = str(results)
        (images / "patient3_T1.nii.gz").unlink()
        tab.ui.startButton.click()
        waitUntil(lambda: tab.queue.cases[0].state == "done", 300)
        waitUntil(lambda: not tab.queue.running, 300)
        tab.ui.nextButton.click()
        tab.ui.acceptButton.click()
        tab.ui.nextButton.click()
        print(picture(panel.widget, folder / "hippocampus_batch.png"))


def _choose(box) -> None:
    names = [box.itemText(row) for row in range(box.count)]
    box.currentIndex = next(row for row, name in enumerate(names) if name.startswith(MODEL))


def _files(data: Path) -> list[Path]:
    """Crops of middling size, so that none is cut."""
    paths = sorted((data / "images").glob("*.nii.gz"))[: 3 * CASES]
    return sorted(paths, key=lambda path: int(np.prod(read_volume(path).array.shape)))[CASES : 2 * CASES]
