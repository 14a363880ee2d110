"""Configurations: to JSON and back without loss, and every mistake told by its name."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from invres import InvresError
from invres.config import (
    AugmentationConfig,
    ChannelPlan,
    Label,
    LabelScheme,
    LossWeights,
    PreparationPlan,
    Recipe,
    TrainingConfig,
)
from invres.configjson import from_dict, to_dict
from invres.networkconfig import NetworkConfig, VAEConfig

RECIPES = sorted((Path(__file__).resolve().parents[2] / "Resources" / "Recipes").glob("*.json"))
CONFIGS = [
    VAEConfig(patch=(17, 33, 5)),
    NetworkConfig(),
    NetworkConfig(
        name="unet3d",
        channels=(4, 8),
        blocks=(1, 2),
        decoder_blocks=(1,),
        strides=((1, 2, 2),),
        norm="group",
        dropout=0.3,
    ),
    NetworkConfig(vae=VAEConfig(latent=7)),
    LossWeights(dice=0.25),
    AugmentationConfig(flip_axes=(0, 2), rotation_degrees=(10.5, 0, 0)),
    TrainingConfig(patch=(1, 2, 3), loss=LossWeights(kullback_leibler=0)),
    ChannelPlan("CT", "CT", (-100.5, 300), 40.25, 22.0),
    PreparationPlan((ChannelPlan("T1"), ChannelPlan("Größe 海馬")), (2.5, 0.9, 1.1), False),
    Label("tumour", (1, 3, 4), 7, (255, 0, 7), "category~type"),
    LabelScheme((Label("a", (1,), 1),), regions=True, ignore_value=9),
    Recipe(spacing_mm=(1, 1, 3), clip_hu=(-79.0, 304.0), description="Ünï"),
    Recipe(),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_configuration_goes_to_json_and_back_without_loss(config):
    text = json.dumps(to_dict(config), allow_nan=False)
    back = from_dict(type(config), json.loads(text))
    assert back == config
    assert to_dict(back) == json.loads(text)
    assert hash(back) == hash(config), "lists became tuples again"


@pytest.mark.parametrize(
    "cls", [NetworkConfig, TrainingConfig, AugmentationConfig, PreparationPlan, LabelScheme, Recipe]
)
def test_what_is_left_out_takes_its_default(cls):
    assert from_dict(cls, {}) == cls()


def test_whole_numbers_serve_where_numbers_are_wanted():
    config = from_dict(TrainingConfig, {"learning_rate": 1, "loss": {"dice": 2}})
    assert config.learning_rate == 1.0 and isinstance(config.learning_rate, float)
    assert config.loss == LossWeights(dice=2.0)


@pytest.mark.parametrize(
    ("cls", "data", "told", "hint"),
    [
        (TrainingConfig, {"learning_rte": 1}, "has the unknown key 'learning_rte'", "Did you mean 'learning_rate'?"),
        (NetworkConfig, {"xyzzy": 1}, "has the unknown key 'xyzzy'", "Known keys: name, in_channels"),
        (Recipe, {"training": {"epoch": 3}}, "training has the unknown key 'epoch'", "Did you mean 'epochs'?"),
        (Recipe, {"network": {"vae": {"laten": 3}}}, "vae has the unknown key 'laten'", "'latent'"),
        (TrainingConfig, {"epochs": "10"}, "epochs must be a whole number, got '10'", ""),
        (TrainingConfig, {"epochs": 1.5}, "epochs must be a whole number, got 1.5", ""),
        (TrainingConfig, {"epochs": True}, "epochs must be a whole number, got True", ""),
        (TrainingConfig, {"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'", ""),
        (TrainingConfig, {"learning_rate": None}, "learning_rate must be a number, got None", ""),
        (NetworkConfig, {"learnable_resampling": 1}, "learnable_resampling must be true or false, got 1", ""),
        (NetworkConfig, {"name": 3}, "name must be a text, got 3", ""),
        (NetworkConfig, {"norm": "layer"}, "norm must be one of auto, instance, group, batch, none, got 'layer'", ""),
        (TrainingConfig, {"schedule": ["cosine"]}, "schedule must be one of constant, cosine, poly", ""),
        (TrainingConfig, {"patch": [1, 2]}, "patch must have 3 entries, got 2", ""),
        (TrainingConfig, {"patch": 64}, "patch must be a list, got 64", ""),
        (TrainingConfig, {"patch": [1, 2, "3"]}, "patch must be a whole number, got '3'", ""),
        (NetworkConfig, {"strides": [[2, 2]]}, "strides must have 3 entries, got 2", ""),
        (Recipe, {"network": []}, "network must be a JSON object, got list", ""),
        (Recipe, 7, "must be a JSON object, got int", ""),
        (Label, {"name": "a"}, "Label is incomplete", ""),
    ],
)
def test_a_mistake_is_told_with_its_place_what_was_wanted_and_what_was_got(cls, data, told, hint):
    with pytest.raises(InvresError) as caught:
        from_dict(cls, data)
    assert told in caught.value.message and hint in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("cls", "values", "told"),
    [
        (NetworkConfig, {"name": "resnet"}, "no network 'resnet'; the networks are unet3d, partially_invres"),
        *((NetworkConfig, {key: 0}, f"network.{key} must be 1 or more") for key in ("in_channels", "convolutions")),
        (NetworkConfig, {"levels": 1}, "network.levels must be 2 or more"),
        (NetworkConfig, {"kernel": 4}, "network.kernel must be odd, got 4"),
        (NetworkConfig, {"bottleneck_ratio": 0}, "network.bottleneck_ratio must be 1 or more, got 0"),
        *(
            (NetworkConfig, {"inplace_norm": True, **mistake}, "inplace_norm needs a norm and a negative_slope above 0")
            for mistake in ({"norm": "none"}, {"negative_slope": 0.0})
        ),
        *((NetworkConfig, {"dropout": p}, "network.dropout must be 0 or more and below 1") for p in (1.0, -0.1)),
        (TrainingConfig, {"engine": "magic"}, "no engine 'magic'; the engines are auto, stored"),
        *(
            (TrainingConfig, {key: 0}, f"training.{key} must be 1 or more, got 0")
            for key in ("batch_size", "iterations_per_epoch", "epochs", "validate_every")
        ),
        (TrainingConfig, {"patch": (64, 0, 64)}, "training.patch must be three sizes of 1 or more"),
        *((TrainingConfig, {"learning_rate": r}, "learning_rate must be above 0") for r in (0.0, -1.0, float("nan"))),
        *(
            (TrainingConfig, {key: float("inf")}, f"training.{key} must be a finite number, got inf")
            for key in ("learning_rate", "time_s", "weight_decay", "gradient_clip", "checkpoint_every_s")
        ),
        *((TrainingConfig, {"loss": LossWeights(dice=w)}, "loss.dice must be a finite") for w in (math.inf, math.nan)),
        (Recipe, {"spacing_mm": (1.0, 1.0, 0.009)}, "three sizes of 0.01 mm or more, got [1.0, 1.0, 0.009]"),
        *(
            (TrainingConfig, {key: -1}, f"training.{key} must be 0 or more, got -1")
            for key in ("time_s", "warmup_iterations", "early_stop_epochs", "validation_cases", "weight_decay", "seed")
        ),
        (TrainingConfig, {"time_s": float("nan")}, "training.time_s must be 0 or more"),
        (TrainingConfig, {"seed": 2**32}, "training.seed must be below 2^32"),
        *((TrainingConfig, {"foreground_fraction": f}, "must be from 0 to 1") for f in (-0.1, 1.1, float("nan"))),
    ],
)
def test_values_that_make_no_sense_are_refused(cls, values, told):
    with pytest.raises(InvresError) as caught:
        cls(**values)
    assert told in caught.value.message
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    with pytest.raises(InvresError):
        from_dict(cls, plain)


def test_every_configuration_is_frozen():
    for config in CONFIGS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, None)


def test_a_scheme_counts_the_networks_output_channels():
    labels = (Label("a", (1, 2), 1), Label("b", (2,), 2))
    assert LabelScheme(labels).out_channels == 3, "and the background"
    assert LabelScheme(labels, regions=True).out_channels == 2
    assert LabelScheme(labels).names == ("a", "b")


# --- recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_bundled_recipe_is_named_as_its_file_and_describes_a_network_that_trains_with_its_patch(path):
    from invres.memory import predict_enhancement, predict_training

    recipe = Recipe.read(path)
    predict = predict_enhancement if recipe.enhancement else predict_training
    assert recipe.name == path.stem and recipe.description
    assert predict(recipe.network, recipe.training.patch, recipe.training.batch_size).peak_bytes > 0


def test_there_is_a_default_recipe():
    assert "default" in [path.stem for path in RECIPES]


def test_the_recipe_for_kits19_has_the_papers_figures_in_our_order_of_axes():
    recipe = Recipe.read(next(path for path in RECIPES if path.stem == "kits19"))
    assert recipe.spacing_mm == (3.22, 1.62, 1.62), "(D, H, W): the thick slices come first"
    assert recipe.clip_hu == (-79.0, 304.0)
    assert (recipe.training.patch, recipe.training.learning_rate) == ((96, 96, 96), 4e-4)
    with pytest.raises(InvresError, match="clip_hu must be a lower and a higher number"):
        dataclasses.replace(recipe, clip_hu=(304.0, 79.0))


def test_a_recipe_file_may_start_with_a_byte_order_mark(tmp_path):
    (tmp_path / "r.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"name": "Ünï"}).encode())
    assert Recipe.read(tmp_path / "r.json").name == "Ünï"


@pytest.mark.parametrize("content", [b"", b"{", b"{'name': 1}", b"\xff\xfe\x00", b'{"name": "a",}'])
def test_a_recipe_that_is_no_json_is_told(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(InvresError, match=r"r\.json is not readable JSON"):
        Recipe.read(tmp_path / "r.json")


def test_a_recipe_that_is_not_there_is_told(tmp_path):
    with pytest.raises(InvresError, match="no recipe file"):
        Recipe.read(tmp_path / "r.json")
    with pytest.raises(InvresError, match="not readable"):
        Recipe.read(tmp_path)


def test_a_mistake_in_a_recipe_file_names_the_file(tmp_path):
    (tmp_path / "mine.json").write_text('{"training": {"patches": [1, 1, 1]}}')
    with pytest.raises(InvresError) as caught:
        Recipe.read(tmp_path / "mine.json")
    assert caught.value.message == "recipe mine.json: training has the unknown key 'patches'."
    assert caught.value.hint == "Did you mean 'patch'?"
