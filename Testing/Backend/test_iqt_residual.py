"""Residual image quality transfer: the interpolation, what a training starts at, what it learns, what is kept of it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_iqt import TWICE, pair_of, recipe_of, striped_scan, write_scan

from invres.config import Recipe, TrainingConfig
from invres.configjson import from_dict, to_dict
from invres.enhancement import EnhanceOptions, enhanced, loaded_enhancer
from invres.enhancementconfig import EnhancementConfig, EnhancementPlan
from invres.enhancementscaling import restored, scaled_input, scaled_target
from invres.enhancementtraining import train_enhancer
from invres.events import Recorder
from invres.imagepairs import PatchPairs, plan_of
from invres.interpolation import interpolated
from invres.networkconfig import NetworkConfig
from invres.networks import build_enhancer
from invres.scans import find_scans, read_scan
from invres.trainingrun import TrainOptions

CPU = torch.device("cpu")


def residual_recipe(kind="image", name="espcn_rn", **training):
    recipe = recipe_of(kind, name, **training)
    return dataclasses.replace(recipe, enhancement=dataclasses.replace(recipe.enhancement, residual=True))


def train(data, recipe, folder):
    return train_enhancer(find_scans(data, recipe.enhancement.kind), recipe, folder, TrainOptions("cpu"), Recorder())


def interpolation_of(low):
    """(C, d, h, w) -> (C, 2 d, 2 h, 2 w), the border repeated."""
    padded = np.pad(low, [(0, 0), *[(2, 2)] * 3], mode="edge")
    return interpolated(torch.from_numpy(padded[None]), TWICE)[0].numpy()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    write_scan(folder)
    write_scan(folder, "dwi", kind="tensor")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("models")
    return {kind: train(data, residual_recipe(kind), folder / kind) for kind in ("image", "tensor")}


# The interpolation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [(2, 2, 2), (1, 2, 2), (2, 1, 2)])
def test_of_means_of_blocks_a_polynomial_of_degree_4_comes_back(factor):
    """Means over finer voxels from means over coarser ones; centres that were not aligned would shift it."""
    coefficients = [1, 2, -1, 0.5, 0.2], [0, 1, 1, -0.3, 0.1], [3, -2]
    antiderivatives = [np.polynomial.Polynomial(values).integ() for values in coefficients]

    def means(step):
        sides = []
        for p, size, f in zip(antiderivatives, (7, 6, 5), step, strict=True):
            edges = np.linspace(-0.5, 0.5, size * f + 1) * size / 3
            sides.append(np.diff(p(edges)) / np.diff(edges))
        return np.einsum("i,j,k->ijk", *sides)

    found = interpolated(torch.from_numpy(means((1, 1, 1)))[None, None], factor)[0, 0].numpy()
    inner = tuple(slice(2 * f, -2 * f) for f in factor)
    np.testing.assert_allclose(found, means(factor)[inner], rtol=1e-10, atol=1e-10)


def test_each_block_has_the_mean_of_its_voxel_and_depends_on_two_neighbours_a_side():
    low = torch.randn(2, 3, 9, 8, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = interpolated(low, TWICE)
    assert found.shape == (2, 3, 10, 8, 6)
    torch.testing.assert_close(torch.nn.functional.avg_pool3d(found, 2), low[:, :, 2:-2, 2:-2, 2:-2])
    other = low.clone()
    other[:, :, 0] += 1
    changed = (interpolated(other, TWICE) != found).any(dim=(0, 1, 3, 4))
    assert changed.tolist() == [True, True] + [False] * 8


@pytest.mark.parametrize("residual", [False, True])
def test_targets_and_their_restoration_are_inverses_channel_by_channel(residual):
    pairs = [pair_of(channels=6)]
    scale = np.array([1, 10, 0.1, 3, 1e-3, 50], np.float32).reshape(6, 1, 1, 1)
    pairs = [dataclasses.replace(pairs[0], low=pairs[0].low * scale + scale, high=pairs[0].high * scale + scale)]
    plan = plan_of(pairs, EnhancementConfig("tensor", residual=residual))
    assert plan.residual is residual
    config = TrainingConfig(patch=(7, 7, 7), batch_size=3)
    patches = PatchPairs(pairs, np.array([[0, 5, 5, 5], [0, 2, 1, 3]]), plan, TWICE, config, CPU)
    low, high = patches.unscaled([0, 1])
    image, target = patches.patches([0, 1])
    torch.testing.assert_close(image, scaled_input(low, plan))
    torch.testing.assert_close(restored(target, low, plan, TWICE), high, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target, scaled_target(high, low, plan, TWICE))
    nothing = restored(torch.zeros_like(target), low, plan, TWICE)
    wanted = interpolated(low, TWICE) if residual else torch.tensor(plan.target_mean).view(1, 6, 1, 1, 1)
    torch.testing.assert_close(nothing, wanted.expand_as(nothing))


# Training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("image", "espcn"), ("image", "espcn_rn"), ("tensor", "espcn_rn")])
def test_a_training_starts_at_the_interpolation(data, tmp_path, kind, name):
    recipe = residual_recipe(kind, name, epochs=1, iterations_per_epoch=1, learning_rate=1e-20)
    package = train(data, recipe, tmp_path)
    network, plan = loaded_enhancer(package, CPU)
    low = read_scan(find_scans(data, kind)[0], kind, 1500).reduced(TWICE)
    wanted = interpolation_of(low.channels())
    if kind == "tensor":  # which end where the brain does
        wanted = wanted * np.kron(low.mask, np.ones(TWICE))
    found = enhanced(network, plan, (7, 7, 7), low)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    if kind == "image":  # one channel: the figure of validation is in its standard deviations
        entry = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
        (scores,) = package.manifest.metrics.values()
        assert entry["rmse"]["mean"] * plan.target_std[0] == pytest.approx(scores["RMSE"]["mean"], rel=1e-3)


def test_what_is_learnt_lowers_the_error_below_that_of_the_interpolation(tmp_path):
    folder = striped_scan(tmp_path)
    recipe = residual_recipe(name="espcn", epochs=1, iterations_per_epoch=60, learning_rate=0.02, batch_size=3)
    package = train(folder, recipe, tmp_path / "run")
    network, plan = loaded_enhancer(package, CPU)
    truth = read_scan(find_scans(folder, "image")[0], "image", 1500)
    low = truth.reduced(TWICE)

    def error(values):
        return np.sqrt(np.mean((values - truth.channels()) ** 2))

    assert error(enhanced(network, plan, (7, 7, 7), low)) < 0.6 * error(interpolation_of(low.channels()))


def test_an_older_run_goes_on_without_it(data, tmp_path):
    run = tmp_path / "run"
    train(data, recipe_of(), run)
    content = json.loads((run / "run.json").read_text(encoding="utf-8"))
    del content["recipe"]["enhancement"]["residual"], content["enhancement"]["residual"]
    (run / "run.json").write_text(json.dumps(content), encoding="utf-8")
    report = Recorder()
    longer = residual_recipe(epochs=3)
    scans = find_scans(data, "image")
    package = train_enhancer(scans, longer, run, TrainOptions("cpu", resume=True), report)
    assert not package.manifest.enhancement.residual and package.manifest.training.epochs == 3
    assert any("enhancement.residual" in event.get("message", "") for event in report.events)


# Whole volumes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "tensor"])
def test_engines_give_one_result(models, data, kind):
    package = models[kind]
    network, plan = loaded_enhancer(package, CPU)
    assert network.engine == "reversible" and plan.residual
    stored = build_enhancer(package.manifest.network, "stored")
    stored.load_state_dict(package.load_weights())
    scan = read_scan(find_scans(data, kind)[0], kind, 1500)
    found, wanted = (enhanced(one.eval(), plan, (7, 7, 7), scan) for one in (stored, network))
    limit = 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=limit)
    assert np.abs(wanted - interpolation_of(scan.channels())).max() > 100 * limit, "something was learnt"


def test_the_result_does_not_depend_on_how_patches_lie(data):
    """Without blocks, whose padded kernels see the end of a patch."""
    torch.manual_seed(0)
    network = build_enhancer(NetworkConfig(name="espcn", in_channels=1, out_channels=1, channels=(4, 6))).eval()
    plan = EnhancementPlan("image", (0.5,), (2.0,), (0.3,), (1.5,), residual=True)
    scan = read_scan(find_scans(data, "image")[0], "image", 1500)
    assert scan.geometry.shape == (18, 20, 19), "no multiple of what a patch gives"
    wanted = enhanced(network, plan, (24, 24, 24), scan)
    limit = 1e-5 * np.abs(wanted).max()
    for patch, overlap in (((7, 7, 7), 0), ((9, 8, 10), 0), ((7, 7, 7), 1)):
        found = enhanced(network, plan, patch, scan, EnhanceOptions("cpu", overlap))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=limit)
    torch.nn.init.zeros_(network.layers[-1].weight)
    found = enhanced(network, plan, (7, 7, 7), scan)
    np.testing.assert_allclose(found, interpolation_of(scan.channels()), rtol=1e-4, atol=limit)


# Configuration ------------------------------------------------------------------------------------------------------


def test_it_is_off_unless_asked_for_and_in_manifests_that_do_not_know_it(repository):
    recipes = {name: Recipe.read(repository / "Resources" / "Recipes" / f"{name}.json") for name in ("iqt", "iqt-t1")}
    assert not recipes["iqt"].enhancement.residual and recipes["iqt-t1"].enhancement.residual
    assert not EnhancementConfig().residual
    known = to_dict(EnhancementPlan("image", (0.0,), (1.0,), (0.0,), (1.0,), residual=True))
    assert from_dict(EnhancementPlan, known).residual
    del known["residual"]
    assert not from_dict(EnhancementPlan, known).residual
