"""From a data set on disk to scored segmentations, step by step as a person types it: once each in its own process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from tiny_datasets import invres, invres_process, leftovers, phantom, write_dataset, write_recipe

from invres.config import Recipe
from invres.configjson import to_dict
from invres.volume import Geometry, read_volume, write_volume

RECIPES = Path(__file__).resolve().parents[2] / "Resources" / "Recipes"


def run(*arguments, way=invres_process):
    """A command that succeeds: its result."""
    outcome = way(*arguments, "--json")
    assert outcome.code == 0, outcome.err + outcome.out
    assert outcome.err == ""
    assert outcome.events[-1]["event"] == "result", "a result is the last line"
    assert not outcome.of("error")
    return outcome.events[-1]


def test_a_data_set_becomes_a_model_that_is_shared_and_segments_a_new_case(tmp_path):
    data = write_dataset(
        tmp_path / "my data ü", cases=4, labels={"background": 0, "upper": 10, "lower": 150, "core": 250}
    )
    checked = run("check", "--data", data)
    assert (checked["cases"], checked["layout"]) == (4, "nnU-Net v2 (dataset.json that lists its files)")
    assert [finding["code"] for finding in checked["findings"]] == ["labels_renumbered"]

    recipe = write_recipe(tmp_path / "recipe.json", epochs=2, iterations_per_epoch=40, warmup_iterations=5)
    trained = run("train", "--data", data, "--recipe", recipe, "--output", tmp_path / "run", "--device", "cpu")
    assert trained["iterations"] == 80 and trained["validation_cases"] == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]

    described = run("describe", trained["model"])["manifest"]
    assert [channel["name"] for channel in described["plan"]["channels"]] == ["T1", "T2"]
    assert [label["output_value"] for label in described["scheme"]["labels"]] == [10, 150, 250]
    assert described["metrics"] == trained["metrics"]

    run("models", "export", trained["model"], "--output", tmp_path / "shared.invres")
    mine = tmp_path / "another computer"
    imported = run("models", "import", tmp_path / "shared.invres", "--models-dir", mine)
    assert run("models", "verify", "tiny", "--models-dir", mine)["sha256"] == described["sha256"]
    listed = run("models", "list", "--models-dir", mine)["models"]
    assert imported["path"] in [model["path"] for model in listed]

    # A new patient on a grid that no training case has: finer, oblique, its axes in another order.
    angle = np.radians(17)
    turned = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    grid = Geometry((26, 30, 22), (0.8, 1.7, 1.1), (31.0, -12.0, 7.5), turned[:, [1, 2, 0]] * [1, 1, -1])
    images, reference = phantom(grid, 2, seed=99)
    for name, image in zip(("t1.nrrd", "t2.nii.gz"), images, strict=True):
        write_volume(tmp_path / name, image)
    reference.array[...] = np.array([0, 10, 150, 250], np.uint8)[reference.array]
    write_volume(tmp_path / "references" / "new.nii.gz", reference)
    output = tmp_path / "segmentations" / "new.seg.nrrd"
    inputs = ["--input", f"t2={tmp_path / 't2.nii.gz'}", "--input", f"T1={tmp_path / 't1.nrrd'}"]
    segmented = run("segment", "--model", imported["path"], *inputs, "--output", output, "--device", "cpu")
    assert segmented["model_sha256"] == described["sha256"]
    found = read_volume(output, kind="labels")
    assert found.geometry.same_as(images[0].geometry)
    header = sitk.ReadImage(str(output))
    assert [header.GetMetaData(f"Segment{index}_Name") for index in range(3)] == ["upper", "lower", "core"]

    scored = run(
        *("evaluate", "--predictions", output.parent, "--references", tmp_path / "references"),
        *("--output", tmp_path / "metrics.json", "--data", data),
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["summary"] == scored["summary"] and metrics["label_names"] == {
        "10": "upper",
        "150": "lower",
        "250": "core",
    }
    for name, value in (("upper", 10), ("lower", 150), ("core", 250)):
        one, other = found.array == value, reference.array == value
        dice = 2 * (one & other).sum() / (one.sum() + other.sum())
        assert metrics["metric_per_case"][0]["metrics"][str(value)]["Dice"] == pytest.approx(dice)
        assert segmented["volumes_ml"][name] == pytest.approx(one.sum() * 0.8 * 1.7 * 1.1 / 1000, abs=1e-3)
    assert metrics["summary"]["upper"]["Dice"]["mean"] > 0.8 and metrics["summary"]["lower"]["Dice"]["mean"] > 0.7
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_real_mr_of_the_hippocampus_trains_and_is_segmented(data_dir, tmp_path):
    source = data_dir / "hippocampus_msd"
    if not source.is_dir():
        pytest.skip("the hippocampus cases are not in the data folder")
    names = sorted(path.name for path in (source / "images").iterdir())[:6]
    new, training = names[0], names[1:]
    description = {
        "name": "Hippocampus",
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": len(training),
        "file_ending": ".nii.gz",
        "dataset": {
            name.removesuffix(".nii.gz"): {
                "images": [os.fspath(source / "images" / name)],
                "label": os.fspath(source / "labels" / name),
            }
            for name in training
        },
    }
    data = tmp_path / "dataset.json"
    data.write_text(json.dumps(description), encoding="utf-8")
    recipe = to_dict(Recipe.read(RECIPES / "hippocampus-t1.json"))
    recipe["network"] = {"name": "fully_invres", "levels": 3}
    recipe["training"] |= {"epochs": 1, "iterations_per_epoch": 25, "learning_rate": 0.01, "warmup_iterations": 2}
    recipe["training"] |= {"patch": [24, 40, 24], "batch_size": 2}
    recipe["augmentation"] = {"spatial_probability": 0.0, "elastic_probability": 0.0}
    recipe["mirror_axes"] = []
    (tmp_path / "few.json").write_text(json.dumps(recipe), encoding="utf-8")

    checked = run("check", "--data", data, way=invres)
    assert not [finding for finding in checked["findings"] if finding["severity"] == "error"]
    trained = run("train", "--data", data, "--recipe", tmp_path / "few.json", "--output", tmp_path / "run", way=invres)
    output = tmp_path / "predictions" / new
    run("segment", "--model", trained["model"], "--input", source / "images" / new, "--output", output, way=invres)
    scored = run(
        *("evaluate", "--predictions", output, "--references", source / "labels" / new),
        *("--output", tmp_path / "metrics.json", "--data", data),
        way=invres,
    )
    assert read_volume(output, kind="labels").geometry.same_as(read_volume(source / "labels" / new).geometry)
    # Seconds of training already find the place of both halves; a guess would score a few percent.
    assert all(of_label["Dice"]["mean"] > 0.2 for of_label in scored["summary"].values())
    assert all(np.isfinite(of_label["HD95"]["mean"]) for of_label in scored["summary"].values())
