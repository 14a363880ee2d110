"""The catalogue of models on the real backend: what a package says, import, export, verify, delete, damage."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import standins

standins.install()

from InvResSegmentLib import Paths  # noqa: E402
from InvResSegmentLib.BackendProcess import BackendProcess, Outcome  # noqa: E402
from InvResSegmentLib.ModelCard import cardText  # noqa: E402
from InvResSegmentLib.Models import (  # noqa: E402
    ChannelInfo,
    LabelInfo,
    ModelCatalogue,
    locatorFor,
    modelFromDescription,
)

sys.path.insert(0, str(Paths.backendFolder()))

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Paths.backendFolder()), "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
METRICS = {
    "liver": {"Dice": {"mean": 0.91234, "sd": 0.05, "n": 12}, "HD95": {"mean": 3.21, "sd": None, "n": 12}},
    "cyst": {"Dice": {"mean": None, "sd": None, "n": 0}},
}


def save(path, name="Liver ä日"):
    import torch

    from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan
    from invres.modelpackage import save_package
    from invres.networkconfig import NetworkConfig
    from invres.networks import build

    torch.manual_seed(0)
    network = build(NetworkConfig(channels=(4, 16), in_channels=2, out_channels=3))
    return save_package(
        path,
        name=name,
        network=network.config,
        state_dict=network.state_dict(),
        plan=PreparationPlan((ChannelPlan("CT", "CT"), ChannelPlan("T1")), (2.0, 1.0, 0.5)),
        scheme=LabelScheme((Label("liver", (1,), 1, (221, 130, 101), "a~b"), Label("cyst", (2,), 7))),
        patch=(16, 16, 16),
        description="Finds livers.",
        licence="CC-BY-4.0",
        metrics=METRICS,
        training={"training_cases": 40, "validation_cases": 12, "recipe": "default"},
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return save(tmp_path_factory.mktemp("packages") / "liver").path


@pytest.fixture
def catalogue(tmp_path):
    folder = tmp_path / "Modelle ä"
    backend = BackendProcess(lambda: [sys.executable, "-m", "invres", "worker"], ENVIRONMENT)
    yield ModelCatalogue(backend, lambda: folder)
    backend.stop()
    assert standins.pythonqt.slotErrors == []


def refreshed(catalogue):
    found = []
    catalogue.refresh(lambda models, error: found.append((models, error)))
    standins.waitUntil(lambda: found, 60)
    return found[0]


def outcome_of(action, *arguments):
    outcomes = []
    action(*arguments, outcomes.append)
    standins.waitUntil(lambda: outcomes, 60)
    return outcomes[0]


def own(models):
    return [model for model in models if not model.bundled]


def test_what_a_package_says_is_read(catalogue, package):
    assert outcome_of(catalogue.importModel, package).state == "done"
    models, error = refreshed(catalogue)
    assert error == "" and catalogue.models == models
    (model,) = own(models)
    assert model.name == "Liver ä日" and model.description == "Finds livers." and model.licence == "CC-BY-4.0"
    assert model.channels == (ChannelInfo("CT", "CT"), ChannelInfo("T1", "MR"))
    assert model.labels == (LabelInfo("liver", 1, (221, 130, 101), "a~b"), LabelInfo("cyst", 7, None, ""))
    assert model.spacingMm == (2.0, 1.0, 0.5) and model.parent == "" and len(model.sha256) == 64
    assert model.metrics == ["liver: Dice 0.912 ± 0.050 (n = 12), HD95 3.2 mm (n = 12)"]
    assert model.trainingData == "40 cases, validated on 12 others (recipe default)"
    assert model.predictedBytes is None and model.manifest["patch"] == [16, 16, 16]
    assert Path(model.path).parent == Path(catalogue.modelsFolder) and (Path(model.path) / "manifest.json").is_file()


def test_labels_with_two_sides_are_known_and_shown(package):
    manifest = json.loads((package / "manifest.json").read_text(encoding="utf-8"))
    manifest["sides"] = [{"label": "cyst", "left_value": 7, "right_value": 8}]
    model = modelFromDescription({"path": str(package), "bundled": False, "manifest": manifest})
    assert [label.sided for label in model.labels] == [False, True] and model.finds(["cyst"])
    text = cardText(model).replace("&nbsp;", " ")
    assert "cyst (left and right)" in text and "liver (left" not in text


def test_a_model_goes_out_as_one_file_and_comes_back(catalogue, package, tmp_path):
    outcome_of(catalogue.importModel, package)
    (model,) = own(refreshed(catalogue)[0])
    file = tmp_path / "Export ö" / "liver.invres"
    assert outcome_of(catalogue.exportModel, model, file).result["path"] == str(file)
    assert outcome_of(catalogue.verifyModel, model).state == "done"
    assert outcome_of(catalogue.deleteModel, model).state == "done"
    assert own(refreshed(catalogue)[0]) == [] and not Path(model.path).exists()
    assert outcome_of(catalogue.importModel, file).state == "done"
    assert own(refreshed(catalogue)[0])[0].sha256 == model.sha256


def test_where_the_data_come_from_stands_first():
    training = {"training_cases": 20, "data": "Label maps of SynthSeg."}
    model = modelFromDescription(description(manifest={**description()["manifest"], "training": training}))
    assert model.trainingData == "Label maps of SynthSeg. 20 cases."


def test_a_model_of_crops_has_another_one_to_find_the_place():
    def model(name, labels, crop=None):
        known = description()["manifest"]
        scheme = {"labels": [{"name": label, "output_value": 1} for label in labels]}
        manifest = {**known, "name": name, "scheme": scheme, "plan": {**known["plan"], "crop": crop}}
        return modelFromDescription(description(manifest=manifest))

    crop = {"around": ["hippocampus"], "largest_mm": [40, 50, 45]}
    crops = model("crops", ["anterior"], crop)
    assert crops.cropAround == ("hippocampus",) and crops.largestMm == (40.0, 50.0, 45.0)
    brain, other = model("brain", ["Left Hippocampus", "amygdala"]), model("other", ["amygdala"])
    also = model("also", ["hippocampus"], crop)
    assert locatorFor(crops, [crops, also, other, brain]) is brain
    assert locatorFor(crops, [crops, also, other]) is None and locatorFor(other, [brain]) is None


def test_failures_come_as_sentences(catalogue, package, tmp_path):
    outcome = outcome_of(catalogue.importModel, tmp_path / "nothing.invres")
    assert outcome.state == "failed" and "There is no model package" in outcome.message and outcome.hint
    outcome_of(catalogue.importModel, package)
    (model,) = own(refreshed(catalogue)[0])
    weights = Path(model.path) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    outcome = outcome_of(catalogue.verifyModel, model)
    assert outcome.state == "failed" and "SHA-256" in outcome.message


def test_a_damaged_package_is_left_out_with_a_warning(catalogue, package):
    outcome_of(catalogue.importModel, package)
    folder = Path(catalogue.modelsFolder) / "damaged"
    folder.mkdir()
    (folder / "manifest.json").write_text("{")
    (folder / "model.safetensors").write_bytes(b"x")
    models, error = refreshed(catalogue)
    assert len(own(models)) == 1 and error == ""
    assert len(catalogue.warnings) == 1 and "damaged" in catalogue.warnings[0]


def test_bundled_models_are_not_deleted():
    class Backend:
        def request(self, arguments, onEvent, onFinished):
            self.arguments = arguments
            onFinished(Outcome("failed", code="bundled_model", message="No.", hint=""))
            return 1

    backend, outcomes = Backend(), []
    model = modelFromDescription(description(bundled=True))
    assert model.bundled
    ModelCatalogue(backend, "/models").deleteModel(model, outcomes.append)
    assert backend.arguments == ["models", "delete", model.path, "--models-dir", "/models"]
    assert outcomes[0].code == "bundled_model"
    ModelCatalogue(backend, "").verifyModel(model, outcomes.append)
    assert backend.arguments[-1] == str(Paths.defaultModelsFolder())


def description(**changes):
    manifest = {
        "name": "M",
        "sha256": "0" * 64,
        "plan": {"channels": [{"name": "T1"}], "spacing_mm": [1, 1, 1]},
        "scheme": {"labels": [{"name": "a", "output_value": 1}]},
    }
    return {"path": "/models/m", "manifest": manifest, **changes}


def test_what_a_manifest_leaves_out_is_empty():
    model = modelFromDescription(description())
    assert (model.description, model.licence, model.trainingData, model.metrics, model.parent) == ("", "", "", [], "")
    assert model.channels == (ChannelInfo("T1", ""),) and model.labels == (LabelInfo("a", 1, None, ""),)


@pytest.mark.parametrize("answer", [[{}], [None], [description(manifest={})], [description(manifest={"plan": 3})]])
def test_what_is_no_description_is_left_out(answer):
    class Backend:
        def request(self, arguments, onEvent, onFinished):
            onFinished(Outcome("done", {"models": [*answer, description()]}))

    found = []
    catalogue = ModelCatalogue(Backend(), "")
    catalogue.refresh(lambda models, error: found.append((models, error)))
    assert [model.name for model in found[0][0]] == ["M"] and len(catalogue.warnings) == 1


def test_models_that_enhance_images_are_passed_over():
    """As `models list` gives one of image quality transfer: without labels, which is no damage either."""
    manifest = {**description()["manifest"], "name": "IQT", "scheme": {"labels": []}, "enhancement": {"kind": "image"}}

    class Backend:
        def request(self, arguments, onEvent, onFinished):
            onFinished(Outcome("done", {"models": [description(manifest=manifest), description()]}))

    found = []
    catalogue = ModelCatalogue(Backend(), "")
    catalogue.refresh(lambda models, error: found.append((models, error)))
    assert [model.name for model in found[0][0]] == ["M"] and catalogue.warnings == []


def test_a_backend_that_fails_is_told():
    class Backend:
        def request(self, arguments, onEvent, onFinished):
            onFinished(Outcome("failed", code="crashed", message="It ended.", hint="Try again."))

    found = []
    ModelCatalogue(Backend(), "").refresh(lambda models, error: found.append((models, error)))
    assert found == [([], "It ended. Try again.")]


def test_the_folders_are_found_in_the_source_tree_and_installed(tmp_path, monkeypatch):
    assert (Paths.backendFolder() / "invres" / "__main__.py").is_file()
    assert Paths.bundledModelsFolder().parent == Paths.backendFolder().parent / "Resources"
    installed = tmp_path / "qt-scripted-modules ä"
    (installed / "Backend" / "invres").mkdir(parents=True)
    (installed / "Backend" / "invres" / "__init__.py").touch()
    (installed / "InvResSegmentLib").mkdir()
    monkeypatch.setattr(Paths, "__file__", str(installed / "InvResSegmentLib" / "Paths.py"))
    assert Paths.backendFolder() == installed / "Backend"
    assert Paths.bundledModelsFolder() == installed / "Resources" / "Models"
    (installed / "Backend" / "invres" / "__init__.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"incomplete.*Install the extension again\."):
        Paths.backendFolder()
