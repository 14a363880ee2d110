"""The demo on the real volume: with a model of random weights all but the Dice is as with the bundled one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_datasets import invres

from invres import demo
from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan
from invres.modelpackage import save_package
from invres.networkconfig import NetworkConfig
from invres.networks import build
from invres.volume import read_volume

SCHEME = LabelScheme(
    tuple(
        Label(name, (value,), value)
        for value, name in enumerate(("CSF", "lateral ventricle", "cerebral cortex", "cerebral white matter"), start=3)
    )
)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    torch.manual_seed(2)
    network = build(NetworkConfig(channels=(4, 16), out_channels=SCHEME.out_channels))
    return save_package(
        tmp_path_factory.mktemp("model") / "brain",
        name="brain",
        network=network.config,
        state_dict=network.state_dict(),
        plan=PreparationPlan((ChannelPlan("MR", "MR"),), (4.0, 4.0, 4.0)),
        scheme=SCHEME,
        patch=(32, 32, 32),
    )


@pytest.fixture(scope="module")
def template():
    """The T1 and its tissues, which take seconds to read."""
    pytest.importorskip("nilearn")
    return demo.template()


@pytest.fixture(scope="module")
def outcome(package, template, tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "template", lambda: template)
        return folder, demo.run(package, folder, "cpu")


@pytest.mark.slow
def test_the_segmentation_lies_on_the_grid_of_the_t1(outcome, template):
    folder, found = outcome
    t1, _ = template
    labels = read_volume(found["segmentation"], kind="labels")
    assert labels.geometry.difference(t1.geometry) == ""
    copy = read_volume(folder / "icbm152_t1.nii.gz")
    assert copy.geometry.difference(t1.geometry) == "" and (copy.array == t1.array).all()
    plain = read_volume(folder / "icbm152_t1_labels.nii.gz", kind="labels")
    assert (plain.array == labels.array).all() and labels.array.any()


def test_the_dice_is_that_of_the_written_files(outcome, template):
    _, found = outcome
    labels = read_volume(found["segmentation"], kind="labels").array
    _, reference = template
    assert max(found["dice"].values()) > 0
    for number, (name, values) in enumerate((("CSF", (3, 4)), ("grey matter", (5,)), ("white matter", (6,))), start=1):
        one, other = np.isin(labels, values), reference == number
        assert found["dice"][name] == pytest.approx(2 * (one & other).sum() / (one.sum() + other.sum()))


def test_what_is_told_can_be_read_by_people_and_programs(outcome):
    folder, found = outcome
    for name in ("tissues.png", "structures.png"):
        assert (folder / name).stat().st_size > 10_000
    json.dumps(found)  # as the command line's result event
    assert found["predicted_bytes"] >= found["measured_bytes"] > 0
    assert all(f"{name} {ml:.1f}" in found["text"] for name, ml in found["volumes_ml"].items())


def test_a_model_that_is_not_there_is_told(tmp_path):
    outcome = invres("demo", "--model", "brain-any-contrst", "--output", tmp_path / "out")
    assert outcome.code == 2 and "brain-any-contrst" in outcome.err and not (tmp_path / "out").exists()


def test_a_model_that_is_not_of_a_brain_is_refused(package, tmp_path):
    scheme = LabelScheme(tuple(Label(name, (value,), value) for value, name in enumerate(("a", "b", "c", "d"), 1)))
    fields = {name: getattr(package.manifest, name) for name in ("network", "plan", "patch")}
    other = save_package(tmp_path / "m", name="liver", state_dict=package.load_weights(), scheme=scheme, **fields)
    outcome = invres("demo", "--model", other.path, "--output", tmp_path / "out", "--json")
    error = outcome.events[-1]
    assert error["message"] == "liver is not a model of the whole brain, whose tissues the demo scores."
    assert outcome.code == 2 and "--roi" not in error["hint"] and not (tmp_path / "out").exists()
    crops = invres("demo", "--model", "hippocampus-t1", "--output", tmp_path / "out")
    assert crops.code == 2 and "is not a model of the whole brain" in crops.err
