"""Weight transfer: what a network keeps of a model with other labels, channels or sizes, tensor by tensor."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan
from invres.freezing import freeze
from invres.manifest import Manifest
from invres.networkconfig import NetworkConfig, VAEConfig
from invres.networks import build
from invres.transfer import match_names, transfer_weights

WIDTHS = {"unet3d": (4, 6), "partially_invres": (4, 6), "fully_invres": (4, 16)}
HEADS = {"unet3d": ("head.weight",), "partially_invres": ("heads.0.weight", "heads.1.weight")}
HEADS["fully_invres"] = HEADS["partially_invres"]
STEM = {"unet3d": "encoder.0.layers.0.weight", "partially_invres": "stem.weight", "fully_invres": "stem.weight"}


def scheme(*names, regions=False):
    return LabelScheme(tuple(Label(name, (i,), i) for i, name in enumerate(names, start=1)), regions)


def model(name="fully_invres", channels=("T1", "T2"), labels=("upper", "lower"), regions=False, **network):
    """(manifest, weights)"""
    found = scheme(*labels, regions=regions)
    config = NetworkConfig(
        name=name, channels=WIDTHS[name], in_channels=len(channels), out_channels=found.out_channels, **network
    )
    torch.manual_seed(5)
    built = build(config)
    manifest = Manifest(
        name="Base",
        id="1" * 32,
        created="",
        network=built.config,
        plan=PreparationPlan(tuple(ChannelPlan(channel) for channel in channels)),
        scheme=found,
        patch=(16, 16, 16),
        sha256="0" * 64,
        weights_bytes=0,
    )
    return manifest, built.state_dict()


def moved(base, channels, labels, regions=False, **network):
    """(transfer, the new network's weights, what they were before)"""
    manifest, weights = base
    new = scheme(*labels, regions=regions)
    config = dataclasses.replace(manifest.network, in_channels=len(channels), out_channels=new.out_channels, **network)
    torch.manual_seed(6)
    built = build(config)
    fresh = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    transfer = transfer_weights(weights, manifest, built, channels, new)
    return transfer, built.state_dict(), fresh


def outcome(transfer, name):
    return next(tensor for tensor in transfer.tensors if tensor.name == name)


@pytest.mark.parametrize("name", list(WIDTHS))
def test_the_same_labels_and_channels_take_over_every_bit(name):
    base = model(name)
    transfer, weights, _ = moved(base, ("T1", "T2"), ("upper", "lower"))
    assert all(torch.equal(weights[key], tensor) for key, tensor in base[1].items())
    assert transfer.counts == {"reused": len(base[1]), "adapted": 0, "initialised": 0, "dropped": 0}


@pytest.mark.parametrize("name", list(WIDTHS))
def test_heads_go_by_label_name_in_whatever_order(name):
    base = model(name, labels=("Left Hippocampus", "lower", "gone"))
    transfer, weights, fresh = moved(base, ("T1", "T2"), ("new", "lower", "left_hippocampus"))
    for head in HEADS[name]:
        old = base[1][head]
        assert torch.equal(weights[head][[0, 2, 3]], old[[0, 2, 1]]), "background, lower, left hippocampus"
        assert torch.equal(weights[head][1], fresh[head][1]) and not torch.equal(weights[head][1], old[1])
        assert outcome(transfer, head).outcome == "adapted"
        assert "initialised: new" in outcome(transfer, head).detail
    assert transfer.labels_reused == ("lower", "left_hippocampus")
    assert (transfer.labels_initialised, transfer.labels_dropped) == (("new",), ("gone",))


def test_no_label_in_common_leaves_the_background():
    base = model()
    transfer, weights, fresh = moved(base, ("T1", "T2"), ("a", "b", "c"))
    head = "heads.0.weight"
    assert torch.equal(weights[head][0], base[1][head][0]) and torch.equal(weights[head][1:], fresh[head][1:])
    assert transfer.labels_reused == ()


@pytest.mark.parametrize("into_regions", [True, False])
def test_regions_and_exclusive_labels_go_into_one_another_without_the_background(into_regions):
    base = model(regions=not into_regions)
    transfer, weights, fresh = moved(base, ("T1", "T2"), ("lower", "upper"), regions=into_regions)
    old, new = base[1]["heads.1.weight"], weights["heads.1.weight"]
    if into_regions:
        assert torch.equal(new, old[[2, 1]])
    else:
        assert torch.equal(new[1:], old[[1, 0]]) and torch.equal(new[0], fresh["heads.1.weight"][0])
    assert outcome(transfer, "heads.1.weight").outcome == "adapted"


@pytest.mark.parametrize("name", list(WIDTHS))
def test_channels_go_by_name_and_an_unknown_one_starts_from_their_average(name):
    base = model(name)
    transfer, weights, _ = moved(base, ("FLAIR", "t2", "T1"), ("upper", "lower"))
    old, new = base[1][STEM[name]], weights[STEM[name]]
    torch.testing.assert_close(new[:, 0], old.mean(1) * 2 / 3)
    torch.testing.assert_close(new[:, 1], old[:, 1] * 2 / 3)
    torch.testing.assert_close(new[:, 2], old[:, 0] * 2 / 3)
    assert (transfer.channels_reused, transfer.channels_averaged) == (("t2", "T1"), ("FLAIR",))
    assert "scaled by 2/3" in outcome(transfer, STEM[name]).detail


def test_one_image_in_every_channel_gives_the_same_answer_however_many_there_are():
    """Inflation keeps the sum over channels: what the network sees of one contrast does not depend on their number."""
    base = model(channels=("T1",))
    _, weights, _ = moved(base, ("T1", "T2", "PD"), ("upper", "lower"))
    torch.testing.assert_close(weights["stem.weight"].sum(1), base[1]["stem.weight"].sum(1))


def test_a_channel_that_the_data_lack_is_dropped():
    base = model(channels=("T1", "T2", "PD"))
    transfer, weights, _ = moved(base, ("T2",), ("upper", "lower"))
    torch.testing.assert_close(weights["stem.weight"][:, 0], base[1]["stem.weight"][:, 1] * 3)
    assert transfer.channels_dropped == ("T1", "PD")


def test_a_single_channel_is_the_same_one_whatever_it_is_called():
    base = model(channels=("image",))
    transfer, weights, _ = moved(base, ("T1w",), ("upper", "lower"))
    assert torch.equal(weights["stem.weight"], base[1]["stem.weight"])
    assert transfer.channels_averaged == transfer.channels_dropped == ()


def test_the_vae_branch_is_dropped_made_anew_or_taken_as_far_as_the_patch_allows():
    vae = VAEConfig((16, 16, 16), latent=4, reduced_channels=2)
    with_branch = model(vae=vae)
    branch = [key for key in with_branch[1] if key.startswith("vae.")]
    transfer, weights, _ = moved(with_branch, ("T1", "T2"), ("upper", "lower"), vae=None)
    assert transfer.counts["dropped"] == len(branch) and not any(key.startswith("vae.") for key in weights)
    transfer, weights, _ = moved(model(), ("T1", "T2"), ("upper", "lower"), vae=vae)
    assert transfer.counts["initialised"] == len(branch)
    larger = dataclasses.replace(vae, patch=(24, 16, 16))
    transfer, weights, fresh = moved(with_branch, ("T1", "T2"), ("upper", "lower"), vae=larger)
    assert torch.equal(weights["vae.encode.weight"], fresh["vae.encode.weight"])
    assert torch.equal(weights["vae.reduce.weight"], with_branch[1]["vae.reduce.weight"])
    assert "shape" in outcome(transfer, "vae.encode.weight").detail
    transfer, weights, fresh = moved(with_branch, ("T2", "T1"), ("upper", "lower"))
    assert torch.equal(weights["vae.head.weight"], fresh["vae.head.weight"]), "it reconstructs them in another order"


def test_the_report_names_every_tensor_of_both_and_says_it_in_words():
    base = model(vae=VAEConfig((16, 16, 16), latent=4, reduced_channels=2))
    transfer, weights, _ = moved(base, ("FLAIR", "T1"), ("upper", "new"), vae=None)
    assert {tensor.name for tensor in transfer.tensors} == base[1].keys() | weights.keys()
    assert sum(transfer.counts.values()) == len(transfer.tensors)
    words = transfer.sentence()
    assert "New labels: new." in words and "no longer find: lower." in words and "FLAIR" in words
    content = transfer.to_json()
    assert content["channels"] == {"reused": ["T1"], "averaged": ["FLAIR"], "dropped": ["T2"]}
    assert len(content["tensors"]) == len(transfer.tensors)


def test_names_are_the_same_whatever_their_case_and_dashes():
    assert match_names(["T1", "left-lung", "x"], ["Left Lung", "t1"]) == [1, 0, None]
    assert match_names(["a"], ["b"]) == [None] and match_names(["a"], ["b"], alone=True) == [0]


@pytest.mark.parametrize("name", list(WIDTHS))
def test_frozen_parts_stay_as_they_are(name):
    manifest, _ = model(name)
    for part in ("none", "encoder", "all-but-head"):
        network = build(manifest.network)
        frozen = freeze(network, part, {STEM[name]})
        before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
        network(torch.randn(1, 2, 8, 8, 8)).logits.square().sum().backward()
        optimizer.step()
        changed = {key for key, tensor in network.state_dict().items() if not torch.equal(tensor, before[key])}
        assert not changed & set(frozen)
        assert STEM[name] in changed, "what was not taken over is trained all the same"
        assert changed >= set(HEADS[name])
        if part == "none":
            assert frozen == []
        elif part == "encoder":
            assert frozen and any(not key.startswith(("head", STEM[name])) for key in changed), "the decoder learns"
        else:
            assert changed - {STEM[name]} <= {key for key in before if key.startswith("head")}


def test_a_frozen_encoder_reaches_down_to_the_deepest_level_of_every_plain_network():
    for name, words in (("unet3d", ("encoder",)), ("autoencoder_unet", ("stem", "down", "encoder"))):
        network = build(NetworkConfig(name=name, channels=(4, 8), in_channels=2, out_channels=3))
        frozen = set(freeze(network, "encoder"))
        rest = {key.split(".")[0] for key, _ in network.named_parameters() if key not in frozen}
        assert {key.split(".")[0] for key in frozen} == set(words) and not rest & set(words), name
