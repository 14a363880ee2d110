"""Several models as one: exactly the mean of what they say, each with the intensities that it was trained on."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from tiny_datasets import GRIDS, invres, phantom

from invres import InvresError
from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan
from invres.expectation import Expectation
from invres.inference import load_network, segment_volumes
from invres.joining import join_packages
from invres.memory import predict_forward
from invres.modelpackage import open_package, save_package, verify_package
from invres.networkconfig import NetworkConfig, VAEConfig
from invres.networks import Ensemble, build, build_predictor
from invres.prediction import SegmentOptions
from invres.preprocessing import prepare
from invres.volume import Volume

SCHEME = LabelScheme((Label("a", (1,), 1), Label("b", (2,), 2)))
NETWORK = NetworkConfig(name="fully_invres", in_channels=1, out_channels=3, channels=(8, 16))
MR = ChannelPlan("T1")


def saved(path, seed, channel=MR, network=NETWORK, half=False, **more):
    torch.manual_seed(seed)
    net = build(network)
    state = net.state_dict()
    values = {
        "name": "fold",
        "plan": PreparationPlan((channel,), (1.0, 1.0, 1.0), crop_to_nonzero=False),
        "scheme": SCHEME,
        "patch": (16, 16, 16),
        **more,
    }
    if half:
        state = {key: tensor.half() for key, tensor in state.items()}
    return save_package(path, network=net.config, state_dict=state, **values)


@pytest.fixture
def folds(tmp_path):
    return [saved(tmp_path / f"fold{number}", number) for number in range(3)]


def image(seed=0, scale=1.0, shift=0.0):
    volume = phantom(GRIDS[0], 1, seed)[0][0]
    return Volume(volume.array.astype(np.float32) * scale + shift, volume.geometry)


def logits_of(package, *volumes):
    """Of the whole volumes, without windows."""
    prepared = prepare(volumes, None, package.manifest.plan, SCHEME)
    network = load_network(package, torch.device("cpu"))
    with torch.no_grad():
        return network(torch.from_numpy(prepared.image)[None]).logits


def test_the_logits_are_the_mean_of_those_of_the_members(folds, tmp_path):
    joined = join_packages(folds, tmp_path / "joined", "joined")
    volume = image()
    each = [logits_of(package, volume) for package in folds]
    found = logits_of(joined, volume)
    assert torch.allclose(found, sum(each) / 3, atol=1e-5)
    assert not torch.allclose(each[0], each[1], atol=1e-2), "the members differ"
    assert joined.manifest.members == 3
    assert verify_package(joined.path).id == joined.id


def test_a_joined_model_counts_as_all_that_are_in_it(folds, tmp_path):
    pair = join_packages(folds[:2], tmp_path / "pair", "pair")
    nested = join_packages([pair, folds[2]], tmp_path / "nested", "nested")
    flat = join_packages(folds, tmp_path / "flat", "flat")
    one, two = nested.load_weights(), flat.load_weights()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert nested.manifest.members == 3


CT = [
    ChannelPlan("CT", "CT", (-100.0, 240.0), 60.0, 40.0),
    ChannelPlan("CT", "CT", (-80.0, 300.0), 75.0, 35.0),
    ChannelPlan("CT", "CT", (-120.0, 200.0), 50.0, 55.0),
]


def test_each_fold_of_ct_sees_the_intensities_that_it_was_trained_on(tmp_path):
    folds = [saved(tmp_path / f"ct{number}", number, channel) for number, channel in enumerate(CT)]
    volume = image(scale=3.0, shift=-300.0)
    assert volume.array.min() < -120 and volume.array.max() > 300, "all clips count"
    each = [logits_of(package, volume) for package in folds]
    for name, order in (("one", [0, 1, 2]), ("other", [2, 0, 1])):
        joined = join_packages([folds[number] for number in order], tmp_path / name, name)
        assert joined.manifest.plan.channels[0].clip == (-120.0, 300.0)
        assert torch.allclose(logits_of(joined, volume), sum(each) / 3, atol=1e-4)
    pair = join_packages(folds[1:], tmp_path / "pair", "pair")
    nested = join_packages([folds[0], pair], tmp_path / "nested", "nested")
    assert torch.allclose(logits_of(nested, volume), sum(each) / 3, atol=1e-4)


def test_it_segments_in_windows_and_mirrored_as_any_model(folds, tmp_path):
    joined = join_packages(folds, tmp_path / "joined", "joined")
    volume = image()
    options = SegmentOptions(device="cpu", mirror_axes=(2,), window=(8, 16, 16), sides=False)
    network = load_network(joined, torch.device("cpu"))
    labels, probabilities, _ = segment_volumes(joined, network, [volume], options)
    each = [segment_volumes(p, load_network(p, torch.device("cpu")), [volume], options)[1] for p in folds]
    mean = np.mean([np.log(one) for one in each], axis=0)  # logits, but for what softmax takes away
    mean = np.exp(mean) / np.exp(mean).sum(axis=0)
    assert np.abs(probabilities - mean).max() < 1e-4
    assert labels.geometry.same_as(volume.geometry)


def test_weights_of_16_bits_stay_so(tmp_path):
    folds = [saved(tmp_path / f"half{number}", number, half=True) for number in range(2)]
    joined = join_packages(folds, tmp_path / "joined", "joined")
    assert joined.manifest.weights_bytes < 2.2 * folds[0].manifest.weights_bytes


def test_the_vae_branch_is_left_out(tmp_path):
    network = dataclasses.replace(NETWORK, vae=VAEConfig(patch=(16, 16, 16)))
    folds = [saved(tmp_path / f"vae{number}", number, network=network) for number in range(2)]
    joined = verify_package(join_packages(folds, tmp_path / "joined", "joined").path)
    assert joined.manifest.network.vae is None
    assert not any("vae" in key for key in joined.load_weights())


def spread(mean, sd, n):
    return {"mean": mean, "sd": sd, "n": n}


def test_figures_over_patients_are_pooled_over_the_patients_of_all(tmp_path):
    parts = [np.array([0.5, 0.6, 0.9]), np.array([0.8, 0.7])]
    folds = [
        saved(
            tmp_path / f"m{number}",
            number,
            trained_on=[f"c{number}"],
            metrics={
                "a": {"Dice": {**spread(float(part.mean()), float(part.std(ddof=1)), 20), "n_patients": len(part)}}
            },
        )
        for number, part in enumerate(parts)
    ]
    found = join_packages(folds, tmp_path / "joined", "joined").manifest.metrics["a"]["Dice"]
    together = np.concatenate(parts)
    assert (found["n"], found["n_patients"]) == (40, 5)
    assert np.isclose(found["mean"], together.mean()) and np.isclose(found["sd"], together.std(ddof=1))


def test_figures_are_pooled_over_the_cases_of_all(tmp_path):
    values = np.random.default_rng(3).random((2, 9))
    parts = [values[0, :5], values[1, :9]]
    folds = [
        saved(
            tmp_path / f"m{number}",
            number,
            description="A recipe.",
            metrics={
                "a": {"Dice": spread(float(part.mean()), float(part.std(ddof=1)), len(part))},
                **({"b": {"Dice": spread(0.5, 0.1, 4)}} if number else {}),
            },
            expected=Expectation({"a": (1.0 + number, 5.0 + number)}, 0.9 - number / 10),
            trained_on=["ab", f"c{number}"],
            training={"iterations": 10, "seconds": 2.0, "training_cases": 4 + number, "validation_cases": len(part)},
        )
        for number, part in enumerate(parts)
    ]
    manifest = join_packages(folds, tmp_path / "joined", "joined").manifest
    together = np.concatenate(parts)
    found = manifest.metrics["a"]["Dice"]
    assert found["n"] == 14
    assert np.isclose(found["mean"], together.mean()) and np.isclose(found["sd"], together.std(ddof=1))
    assert "b" not in manifest.metrics, "which one of them does not know"
    assert manifest.expected == Expectation({"a": [1.0, 6.0]}, 0.8)
    assert (manifest.training.iterations, manifest.training.training_cases) == (20, 5)
    assert manifest.training.validation_cases == 14
    assert "each on the cases that it was not trained on" in manifest.description


@pytest.mark.parametrize("learned", [(), ("ab", "cd")])
def test_there_are_no_figures_where_members_may_have_held_out_the_same_cases(tmp_path, learned):
    metrics = {"a": {"Dice": spread(0.5, 0.1, 4)}}
    folds = [saved(tmp_path / f"m{number}", number, metrics=metrics, trained_on=learned) for number in range(2)]
    outcome = invres("models", "join", *(fold.path for fold in folds), "-o", tmp_path / "joined")
    assert outcome.code == 0 and "The joined model has no figures" in outcome.err
    assert open_package(tmp_path / "joined").manifest.metrics == {}


def test_a_member_is_never_overwritten(folds, tmp_path):
    before = {path.name: path.read_bytes() for path in folds[0].path.iterdir()}
    outcome = invres("models", "join", *(fold.path for fold in folds), "-o", folds[0].path)
    assert outcome.code == 2 and "is one of the models that are joined and would be overwritten" in outcome.err
    assert {path.name: path.read_bytes() for path in folds[0].path.iterdir()} == before


def test_a_channel_that_a_case_lacks_stays_empty_for_every_fold(tmp_path):
    channels = [tuple(dataclasses.replace(plan, name=name, optional=True) for name in "AB") for plan in CT]
    network = dataclasses.replace(NETWORK, in_channels=2)
    folds = [
        saved(
            tmp_path / f"two{number}",
            number,
            network=network,
            plan=PreparationPlan(channels[number], (1.0, 1.0, 1.0), crop_to_nonzero=False),
        )
        for number in range(3)
    ]
    joined = join_packages(folds, tmp_path / "joined", "joined")
    volumes = [image(scale=3.0, shift=-300.0), None]
    found, *each = (logits_of(package, *volumes) for package in (joined, *folds))
    assert torch.allclose(found, sum(each) / 3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"plan": PreparationPlan((MR,), (2.0, 1.0, 1.0), crop_to_nonzero=False)}, "plan.spacing_mm"),
        ({"channel": ChannelPlan("T2")}, "plan.channels"),
        ({"network": dataclasses.replace(NETWORK, channels=(8, 32))}, "network.channels"),
        ({"scheme": LabelScheme((Label("a", (1,), 1), Label("c", (2,), 2)))}, "scheme"),
        ({"patch": (16, 16, 24)}, "patch"),
        ({"licence": "CC0-1.0"}, "licence"),
    ],
)
def test_models_that_differ_are_not_averaged(folds, tmp_path, change, told):
    other = saved(tmp_path / "other", 9, **change)
    with pytest.raises(InvresError, match=rf"fold0 and other cannot be joined: they differ in {told}\."):
        join_packages([*folds, other], tmp_path / "joined", "joined")
    assert not (tmp_path / "joined").exists()


def test_one_model_is_no_ensemble(folds, tmp_path):
    with pytest.raises(InvresError, match="two models or more"):
        join_packages(folds[:1], tmp_path / "joined", "joined")
    with pytest.raises(InvresError, match="given twice"):
        join_packages([folds[0], folds[0]], tmp_path / "joined", "joined")
    pair = join_packages(folds[:2], tmp_path / "pair", "pair")
    with pytest.raises(InvresError, match="given twice"):
        join_packages([pair, folds[0]], tmp_path / "joined", "joined")


def test_memory_grows_by_the_weights_of_the_members_alone():
    (one, step), (three, together) = (predict_forward(NETWORK, (32, 32, 32), members=count) for count in (1, 3))
    assert three == pytest.approx(3 * one, rel=0.01)
    # Beside the forward pass of a member: its own intensities, the sum of the logits, and which channels there are.
    assert together <= step + (1 + 2 * 3) * 32**3 * 4 + 1


def test_it_cannot_be_trained_by_mistake():
    network = build_predictor(NETWORK, 2)
    assert isinstance(network, Ensemble)
    with pytest.raises(RuntimeError, match="only predicts"):
        network(torch.zeros(1, 1, 16, 16, 16))


def test_a_manifest_with_another_number_is_found_out(folds, tmp_path):
    joined = join_packages(folds, tmp_path / "joined", "joined")
    path = joined.path / "manifest.json"
    manifest = json.loads(path.read_text())
    for members, told in ((4, "lack|has the shape"), (2, "which its network does not have|has the shape")):
        path.write_text(json.dumps(manifest | {"members": members}))
        with pytest.raises(InvresError, match=told):
            verify_package(joined.path)
    path.write_text(json.dumps(manifest | {"members": 0}))
    with pytest.raises(InvresError, match="members must be 1, or more"):
        open_package(joined.path)


def test_the_command_line_joins_describes_plans_and_segments(folds, tmp_path):
    target = tmp_path / "joined.invres"
    outcome = invres("models", "join", *(fold.path for fold in folds), "--name", "all folds", "-o", target, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.of("result")[0]["members"] == 3
    assert "average of 3 networks fully_invres" in invres("describe", target).out
    from invres.volume import write_volume

    write_volume(tmp_path / "scan.nii.gz", image())
    result = invres("segment", "-m", target, "-i", tmp_path / "scan.nii.gz", "-o", tmp_path / "out.nii.gz", "--json")
    assert result.code == 0, result.err
    planned = invres("plan", "--model", target, "--shape", 30, 30, 30, "--spacing", 1, 1, 1, "--json")
    assert planned.code == 0 and planned.of("result"), planned.err
    shutil.rmtree(folds[0].path)
    assert invres("models", "verify", target).code == 0, "it stands alone"


def test_fine_tuning_is_refused_before_anything_is_written(folds, tmp_path):
    joined = join_packages(folds, tmp_path / "joined", "joined")
    from tiny_datasets import write_dataset

    write_dataset(tmp_path / "data")
    outcome = invres("finetune", "-m", joined.path, "-d", tmp_path / "data", "-o", tmp_path / "run")
    assert outcome.code == 2 and "is the average of 3 networks, which are not fine-tuned together" in outcome.err
    assert not (tmp_path / "run").exists()
