"""Segment, correct, learn, prove, keep, go back: the loop of the panel on real MR, with the real backend on the CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

PANEL_TESTS = Path(__file__).resolve().parents[1] / "InvResSegment"
if importlib.util.find_spec("PySide6") is None:  # asked for without importing it: the stand-ins have to come first
    pytest.skip("PySide6 is not installed", allow_module_level=True)
sys.path.insert(0, str(PANEL_TESTS))

import mrml_scene  # noqa: E402
import slicer  # noqa: E402
from panel_driver import addSegmentation, loadedPanel, waitUntil  # noqa: E402
from small_models import add_volume  # noqa: E402

from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan  # noqa: E402
from invres.modelpackage import open_package, save_package  # noqa: E402
from invres.networkconfig import NetworkConfig  # noqa: E402
from invres.volume import read_volume  # noqa: E402

pytestmark = pytest.mark.slow
LABELMAP = "Binary labelmap"
NAMES = ("anterior", "posterior")
PATCH = (24, 24, 24)
CASES = 4


@pytest.fixture
def scene():
    with mrml_scene.emptyScene() as scene:
        yield scene


@pytest.fixture(scope="module")
def hippocampus(data_dir) -> list[tuple[Path, Path]]:
    """Image and label file of a few cases."""
    folder = data_dir / "hippocampus_msd"
    if not folder.is_dir():
        pytest.skip("the hippocampus cases are not in the data folder")
    names = sorted(path.name for path in (folder / "images").iterdir())[:CASES]
    return [(folder / "images" / name, folder / "labels" / name) for name in names]


@pytest.fixture(scope="module")
def models(tmp_path_factory, hippocampus) -> Path:
    """A folder of models with one in it, which has seen a single case for seconds."""
    import torch

    from invres.networks import build

    torch.manual_seed(0)
    scheme = LabelScheme(tuple(Label(name, (index + 1,), index + 1) for index, name in enumerate(NAMES)))
    network = build(NetworkConfig("unet3d", 1, scheme.out_channels, channels=(8, 16)))
    image, label = (read_volume(path).canonical().array for path in hippocampus[-1])
    middle = tuple(
        slice((length - side) // 2, (length + side) // 2) for length, side in zip(image.shape, PATCH, strict=True)
    )
    image, label = (torch.from_numpy(array[middle].astype(np.float32)) for array in (image, label))
    image = ((image - image.mean()) / image.std())[None, None]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(network(image).logits, label.long()[None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("models")
    save_package(
        folder / "hippocampus",
        name="hippocampus",
        version="1.0.0",
        network=network.config,
        state_dict=network.state_dict(),
        plan=PreparationPlan((ChannelPlan("T1", "MR"),), (1.0, 1.0, 1.0), crop_to_nonzero=False),
        scheme=scheme,
        patch=PATCH,
        licence="CC0-1.0",
    )
    return folder


def loaded(scene, files):
    """An image of the scene, and the reference as segment name -> voxels (K, J, I)."""
    image, label = read_volume(files[0]), read_volume(files[1], kind="labels")
    affine = image.geometry.affine[:, [2, 1, 0, 3]]
    volume = add_volume(scene, image.array.astype(np.float32), affine, name=files[0].name.partition(".")[0] + " T1")
    volume.CreateDefaultDisplayNodes()
    return volume, {name: label.array == index + 1 for index, name in enumerate(NAMES)}


def correct(segmentation, volume, masks):
    """What a person does in the Segment Editor: the voxels of each segment become those of the reference."""
    right, found = addSegmentation(volume, masks), segmentation.GetSegmentation()
    for index in range(found.GetNumberOfSegments()):
        segment = found.GetNthSegment(index)
        wanted = right.GetSegmentation().GetNthSegment(list(masks).index(segment.GetName()))
        found.SeparateSegmentLabelmap(found.GetNthSegmentID(index))
        segment.AddRepresentation(LABELMAP, wanted.GetRepresentation(LABELMAP))
        segment.SetLabelValue(1)
    slicer.mrmlScene.RemoveNode(right)


def segment(tab):
    waitUntil(lambda: tab.ui.applyButton.enabled and tab.idle, 200)
    tab.ui.applyButton.click()
    waitUntil(lambda: not tab.running, 200)
    assert tab.ui.messageNotice.isHidden(), tab.ui.messageNoticeText.text
    return tab.ui.show3DButton.segmentationNode()


def chosen(panel):
    return next(model for model in panel.segmentTab.models if model.sha256 == panel.segmentTab._parameters.model)


def test_a_case_is_segmented_corrected_learned_from_and_the_better_model_kept_and_given_back(
    scene, models, hippocampus, tmp_path
):
    runs = tmp_path / "runs"
    base = open_package(models / "hippocampus").manifest
    with loadedPanel(models, settings={"InvResSegment/RunsFolder": str(runs), "InvResSegment/Device": "cpu"}) as module:
        panel = module.enter().panel
        waitUntil(lambda: not panel.setup.checking and panel.segmentTab.models, 300)
        first, *others = [loaded(scene, files) for files in hippocampus]

        # Segment, correct, and hand the case over.
        for volume, _masks in others:
            volume.SetHideFromEditors(True)  # not loaded yet, for a person
        panel.segmentTab.ui.matchButton.click()
        corrected = segment(panel.segmentTab)
        correct(corrected, *first)
        panel.segmentTab.ui.trainingButton.click()
        tab = panel.fineTuneTab
        assert panel.ui.tabs.currentIndex == panel.tabs.index(tab) and len(tab.cases.rows) == 1
        for volume, masks in others:
            volume.SetHideFromEditors(False)
            addSegmentation(volume, masks)
        tab.ui.addSceneButton.click()
        assert [row.channels["T1"] for row in tab.cases.rows] == [volume for volume, _masks in (first, *others)]
        tab.cases.setRole(tab.cases.rows[1], "validation")
        tab.cases.setRole(tab.cases.rows[2], "validation")

        # Learn.
        tab.ui.minutesBox.value, tab.ui.epochsBox.value = 0, 1
        tab.ui.rateEdit.text = "0.01"
        waitUntil(lambda: tab.ui.startButton.enabled, 20)
        tab.ui.startButton.click()
        waitUntil(lambda: tab.run.shown is not None or not tab.ui.messageNotice.isHidden(), 200)
        assert tab.run.shown is not None, tab.ui.messageNoticeText.text
        folder = tab.run.shown.folder
        waitUntil(lambda: tab.run.state in ("finished", "failed"), 300)
        assert tab.run.state == "finished", tab.run.shown.failure()
        assert not list(folder.glob("data/**/*T1*")), "no file is called as the volumes are"

        # The proof.
        comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        assert sorted(case["case"] for case in comparison["cases"]) == ["case02", "case03"]
        assert comparison["difference"]["mean"] > 0.03, "a model that has hardly learned anything gets better"
        ui = tab.run.view.ui
        assert "not enough data to tell" in ui.verdictNoticeText.text  # 2 patients prove nothing, however it looks
        cells = [ui.proofTable.item(row, 0).text() for row in range(ui.proofTable.rowCount)]
        assert set(NAMES) <= set(cells)
        assert ui.casesTable.rowCount == 2 and ui.promoteButton.enabled

        # Keep it, and use it.
        ui.promoteButton.click()
        if ui.promoteButton.text != "Promote":
            ui.promoteButton.click()
        waitUntil(lambda: len(panel.segmentTab.models) == 2 and chosen(panel).version == "1.1.0", 200)
        assert chosen(panel).parent == base.id
        panel.ui.tabs.setCurrentWidget(panel.segmentTab.widget)
        again = segment(panel.segmentTab)
        from InvResSegmentLib.SegmentationResult import readProvenance

        assert readProvenance(again)[-1].modelSha256 == chosen(panel).sha256 != base.sha256

        # And back.
        ui.rollbackButton.click()
        waitUntil(lambda: chosen(panel).version == "1.0.0", 200)
        assert readProvenance(segment(panel.segmentTab))[-1].modelSha256 == base.sha256
