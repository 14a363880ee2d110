"""The plan for a card: what it says fits is predicted to fit, and the mildest change is taken."""

from __future__ import annotations

import dataclasses

import pytest

from invres import InvresError, cardplan
from invres.cardplan import correction, fit_recipe, plan_for_card
from invres.config import Recipe, TrainingConfig
from invres.events import Recorder
from invres.memory import CONTEXT_BYTES, card_bytes, predict_training
from invres.networkconfig import NetworkConfig

SMALL = NetworkConfig(in_channels=2, out_channels=3, channels=(8, 16))
MIB = 2**20


def needed(patch, memory="low", config=SMALL, batch=1):
    return card_bytes(predict_training(config, patch, batch, memory=memory).peak_bytes)


def test_the_largest_patch_fits_and_the_next_larger_does_not():
    vram = 1100 * MIB
    plan = plan_for_card(SMALL, vram)
    side = plan.patch[0]
    assert plan.patch == (side, side, side) and side % cardplan.STEP == 0
    assert plan.needed_bytes == needed(plan.patch) <= vram < needed((side + cardplan.STEP,) * 3)
    assert plan.whole_volume_bytes["lowest"] < plan.whole_volume_bytes["low"]
    assert plan.width_factor >= 1 and plan.block_factor > 10
    text = "\n".join(plan.sentences())
    assert f"a patch of {side}x{side}x{side} voxels" in text
    assert f"At {'x'.join(map(str, plan.half))} voxels there is room" in text
    assert "A whole volume of 240x240x155 needs" in text


def test_the_search_predicts_no_more_than_it_must(monkeypatch):
    """A prediction takes a third of a second: one at hand is used, and the next size to try comes from the last."""
    real, asked = predict_training, []

    def counted(config, patch, *rest, **options):
        asked.append((config, patch, options["memory"]))
        return real(config, patch, *rest, **options)

    monkeypatch.setattr(cardplan, "predict_training", counted)
    at_hand = {(128, 128, 128): real(SMALL, (128, 128, 128))}
    plan = plan_for_card(SMALL, 2000 * MIB, known=at_hand)
    side = plan.patch[0]
    assert (SMALL, (128,) * 3, "low") not in asked and len(set(asked)) == len(asked) <= 8
    assert {patch[0] for _, patch, memory in asked} >= {side, side + cardplan.STEP, 240}
    assert plan.half in {patch for _, patch, _ in asked}, "what is said of a size was predicted at that size"


@pytest.mark.parametrize(("name", "engine"), [("partially_invres", "stored"), ("fully_invres", "checkpoint")])
@pytest.mark.slow
def test_the_blocks_that_are_said_to_fit_are_predicted_to(name, engine):
    """Under `stored` every block keeps maps, so there is room for far fewer of them."""
    config = dataclasses.replace(SMALL, name=name, blocks=(1, 1), decoder_blocks=(1,))
    plan = plan_for_card(config, 1000 * MIB, engine=engine)
    count = plan.block_factor
    assert 1 < count < plan_for_card(config, 1000 * MIB).block_factor
    deeper = dataclasses.replace(config, blocks=(count, count), decoder_blocks=(count,))
    assert card_bytes(predict_training(deeper, plan.half, engine=engine).peak_bytes) <= 1000 * MIB


def test_networks_without_a_choice_of_blocks_or_memory_are_not_offered_one():
    plan = plan_for_card(NetworkConfig("unet3d", channels=(8, 16)), 1100 * MIB)
    assert plan.block_factor == 0 and list(plan.whole_volume_bytes) == ["low"]
    assert "times the blocks" not in "\n".join(plan.sentences())


def test_a_measurement_corrects_the_plan():
    predicted = predict_training(SMALL, (64, 64, 64))
    on_cpu = dataclasses.replace(predicted, peak_bytes=predicted.peak_bytes * 2)
    assert correction(predicted, on_cpu) == 2
    in_use = round(0.9 * predicted.peak_bytes * cardplan.ROUNDING)
    assert correction(predicted, dataclasses.replace(on_cpu, allocated_bytes=in_use)) == pytest.approx(0.9)
    vram = 1100 * MIB
    plain, worse = plan_for_card(SMALL, vram), plan_for_card(SMALL, vram, correction=1.5)
    assert worse.patch < plain.patch and worse.needed_bytes <= vram
    live = predict_training(SMALL, worse.patch).peak_bytes
    assert worse.needed_bytes == pytest.approx(1.5 * live * cardplan.ROUNDING + cardplan.CONTEXT_BYTES, rel=1e-6)


def test_anisotropic_voxels_get_a_flat_patch():
    plan = plan_for_card(SMALL, 1000 * MIB, spacing_mm=(4.0, 1.0, 1.0))
    assert plan.patch[1] == plan.patch[2] >= 3 * plan.patch[0]


def test_a_card_that_is_too_small_is_said_to_be():
    with pytest.raises(InvresError, match="too little to train fully_invres"):
        plan_for_card(SMALL, CONTEXT_BYTES)


def recipe(patch=(96, 96, 96), **training):
    return Recipe("r", "", SMALL, TrainingConfig(patch=patch, batch_size=1, **training))


def test_a_recipe_that_fits_is_left_as_it_is():
    given, recorder = recipe(), Recorder()
    assert fit_recipe(given, needed((96, 96, 96)), False, recorder) == given
    assert "memory 'low'" in recorder.events[-1]["message"]


def test_the_memory_setting_is_changed_before_the_patch():
    found = fit_recipe(recipe(), needed((96, 96, 96)) - 1, False, Recorder())
    assert (found.training.memory, found.training.patch) == ("lower", (96, 96, 96))
    found = fit_recipe(recipe(), needed((96, 96, 96), "lower") - 1, False, Recorder())
    assert (found.training.memory, found.training.patch) == ("lowest", (96, 96, 96))


def test_the_patch_shrinks_only_where_nothing_else_helps():
    vram = needed((96, 96, 96), "lowest") - 1
    found = fit_recipe(recipe(), vram, False, Recorder()).training
    assert found.memory == "lowest" and found.patch < (96, 96, 96)
    assert needed(found.patch, "lowest") <= vram
    with pytest.raises(InvresError, match="too little for the recipe r"):
        fit_recipe(recipe(), CONTEXT_BYTES, False, Recorder())


def test_a_learnable_resampling_is_not_put_on_a_grid():
    learnable = dataclasses.replace(recipe(), network=dataclasses.replace(SMALL, learnable_resampling=True))
    vram = card_bytes(predict_training(learnable.network, (96, 96, 96), memory="lower").peak_bytes) - 1
    assert fit_recipe(learnable, vram, False, Recorder()).training.memory == "lower"
