"""Muon: what a step is, which weights take it, and that it keeps half of Adam's state."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from invres import InvresError
from invres.config import LossWeights, TrainingConfig
from invres.configjson import from_dict
from invres.memory import measure_training, predict_training
from invres.muon import Muon, orthogonalised
from invres.networkconfig import ENHANCEMENT_NETWORKS, NETWORKS, NetworkConfig, VAEConfig
from invres.networks import build, build_any, with_patch
from invres.step import make_optimizer, training_step

CONFIG = NetworkConfig(name="fully_invres", channels=(8, 16), levels=2, in_channels=2, out_channels=3)


@pytest.mark.parametrize("shape", [(12, 12), (8, 4, 3, 3, 3), (64, 2, 1, 1, 1), (1, 6, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_has_all_directions_about_equally_long(shape, dtype):
    torch.manual_seed(0)
    gradient = 1e-6 * torch.randn(shape).to(dtype)
    turned = orthogonalised(gradient)
    assert turned.shape == gradient.shape and turned.dtype == torch.float32
    lengths = torch.linalg.svdvals(turned.flatten(1))
    assert lengths.min() > 0.6 and lengths.max() < 1.25
    u, _, v = torch.linalg.svd(gradient.flatten(1).float(), full_matrices=False)
    along = torch.einsum("or,or->", turned.flatten(1), u @ v) / lengths.numel()
    assert along > 0.6, "the directions are the gradient's own"


def test_no_gradient_is_no_step():
    assert torch.equal(orthogonalised(torch.zeros(4, 4)), torch.zeros(4, 4))


def test_a_step_is_as_long_as_one_of_adam():
    weight = torch.nn.Parameter(torch.zeros(32, 16, 3, 3, 3))
    torch.manual_seed(0)
    weight.grad = torch.randn_like(weight)
    Muon([weight], [weight], lr=1.0).step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.15)


def test_the_rest_takes_the_steps_of_adam_and_only_matrices_decay():
    torch.manual_seed(0)
    both = [[torch.nn.Parameter(torch.randn(6, 5)) for _ in range(2)] for _ in range(2)]
    for one, other in zip(*both, strict=True):
        other.data.copy_(one.data)
    muon = Muon(both[0], [both[0][1]], lr=0.1, weight_decay=0.5)
    adam = torch.optim.AdamW(both[1], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        for one, other in zip(*both, strict=True):
            one.grad = torch.randn(6, 5)
            other.grad = one.grad.clone()
        muon.step()
        adam.step()
        assert both[0][1].grad is not None, "it is put back"
    assert torch.equal(both[0][0], both[1][0]) and not torch.equal(both[0][1], both[1][1])
    alone = torch.nn.Parameter(torch.ones(2, 2))
    alone.grad = torch.zeros(2, 2)
    Muon([alone], [alone], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(alone.detach(), torch.full((2, 2), 0.95))


def test_convolutions_between_the_first_and_the_head_are_turned():
    network = build(CONFIG)
    optimizer = make_optimizer(network, kind="muon")
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    turned = {name for name, p in network.named_parameters() if "exp_avg_sq" not in optimizer.state[p]}
    weights = {name for name, p in network.named_parameters() if p.ndim == 5}
    assert turned == weights - {"stem.weight", "heads.0.weight", "heads.1.weight"} and len(turned) > 4


@pytest.mark.parametrize("name", NETWORKS + ENHANCEMENT_NETWORKS)
@pytest.mark.parametrize("block", ["plain", "ccblock"])
def test_what_the_channels_of_the_data_fix_is_left_to_adam(name, block):
    """Channels of a number that occurs nowhere else tell the layers that are at the rim of the network."""
    inside, outside = 7, 11
    config = NetworkConfig(name=name, in_channels=inside, out_channels=outside, vae=VAEConfig(), block=block)
    if config.enhances:
        config = dataclasses.replace(config, vae=None)
    config = with_patch(config, (32, 32, 32))
    with torch.device("meta"):
        network = build_any(config)
    turned = make_optimizer(network, kind="muon")._matrices
    rim = {inside, outside, 8 * inside, 8 * outside}  # the VAE's head and an enhancer's last layer are shuffled up
    for parameter_name, parameter in network.named_parameters():
        if parameter.ndim == 5 and parameter.shape[1] > 1:
            at_rim = bool(rim & set(parameter.shape[:2]))
            assert (id(parameter) in turned) is not at_rim, parameter_name


def test_depthwise_convolutions_are_left_to_adam():
    network = build(NetworkConfig(name="mbconv_unet", levels=2, in_channels=2, out_channels=3))
    optimizer = make_optimizer(network, kind="muon")
    depthwise = [p for p in network.parameters() if p.ndim == 5 and p.shape[1] == 1]
    assert depthwise and all(id(p) not in optimizer._matrices for p in depthwise)


def test_it_goes_on_from_a_saved_state_as_if_undisturbed():
    def steps(network, optimizer, count):
        for _ in range(count):
            training_step(network, optimizer, image, target, False, LossWeights())

    torch.manual_seed(0)
    image, target = torch.randn(1, 2, 8, 8, 8), torch.randint(0, 3, (1, 8, 8, 8), dtype=torch.int16)
    network = build(CONFIG)
    optimizer = make_optimizer(network, 1e-2, kind="muon")
    steps(network, optimizer, 2)
    again = build(CONFIG)
    again.load_state_dict(network.state_dict())
    resumed = make_optimizer(again, 1e-2, kind="muon")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in ((network, optimizer), (again, resumed)):
        steps(one, other, 3)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), again.parameters(), strict=True))


def test_it_learns():
    torch.manual_seed(0)
    image = torch.randn(1, 2, 8, 8, 8)
    target = (image[:, 0] > 0).to(torch.int16) + (image[:, 1] > 0.5).to(torch.int16)
    network = build(CONFIG)
    optimizer = make_optimizer(network, 1e-2, kind="muon")
    losses = [float(training_step(network, optimizer, image, target, False, LossWeights()).total) for _ in range(15)]
    assert losses[-1] < 0.6 * losses[0]


def test_the_plan_knows_its_memory():
    config = dataclasses.replace(CONFIG, channels=(32, 64))
    options = {"patch": (16, 16, 16), "optimizer": "muon"}
    predicted, measured = predict_training(config, **options), measure_training(config, **options)
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)
    adam = predict_training(config, (16, 16, 16))
    assert predicted.optimizer_bytes == measured.optimizer_bytes < 0.6 * adam.optimizer_bytes
    assert predicted.peak_bytes < adam.peak_bytes


def test_an_unknown_optimizer_is_told():
    with pytest.raises(InvresError, match=r"optimizer.*adam"):
        from_dict(TrainingConfig, {"optimizer": "lion"}, "training")
