"""One optimizer step: it learns, it clips, it survives a gradient that is not finite, it runs in half precision."""

from __future__ import annotations

import math

import pytest
import torch

from invres import InvresError
from invres.config import LossWeights, TrainingConfig
from invres.events import Recorder
from invres.losses import total_loss
from invres.networkconfig import NETWORKS, NetworkConfig, VAEConfig
from invres.networks import build, with_patch
from invres.objectives import Segmentation
from invres.step import autocast, make_optimizer, training_step
from invres.trainer import Trainer

PATCH = (13, 9, 16)
WEIGHTS = LossWeights()


def make(name="fully_invres", engine="auto", **changes):
    torch.manual_seed(0)
    config = NetworkConfig(name=name, in_channels=2, out_channels=3, channels=(4, 16, 32), **changes)
    network = build(with_patch(config, PATCH), engine).train()
    image = torch.randn(2, 2, *PATCH)
    target = (image[:, 0] > 0.3).to(torch.int16) + (image[:, 1] > 0.8).to(torch.int16)
    return network, image, target


def weights_of(network):
    return [p.detach().clone() for p in network.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_few_steps_lower_the_loss(name, precision):
    network, image, target = make(name)
    optimizer = make_optimizer(network, learning_rate=1e-2)
    losses = [training_step(network, optimizer, image, target, False, WEIGHTS, precision) for _ in range(10)]
    totals = [float(loss.total) for loss in losses]
    assert min(totals) < 0.9 * totals[0]
    assert not any(t.requires_grad for loss in losses for t in loss if t is not None)
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in network.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_what_is_written_out_by_hand(precision):
    network, image, target = make()
    training_step(network, torch.optim.SGD(network.parameters(), lr=0.5), image, target, False, WEIGHTS, precision)
    found = weights_of(network)
    network, image, target = make()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        output = network(image)
    total_loss(output, image, target, False, WEIGHTS).total.backward()
    for f, p in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(f, p.detach() - 0.5 * p.grad, rtol=1e-6, atol=1e-7)


def test_gradients_of_the_step_before_do_not_linger():
    network, image, target = make()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    gradients = []
    for _ in range(2):
        training_step(network, optimizer, image, target, False, WEIGHTS)
        gradients.append([p.grad.clone() for p in network.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("engine", ["stored", "reversible"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_weights_and_adam_alone(engine, bad):
    network, image, target = make(engine=engine)
    optimizer = make_optimizer(network)
    training_step(network, optimizer, image, target, False, WEIGHTS)
    before, steps = weights_of(network), [int(s["step"]) for s in optimizer.state.values()]
    spoilt = image.clone()
    spoilt[0, 1, 3, 4, 5] = bad
    losses = training_step(network, optimizer, spoilt, target, False, WEIGHTS)
    assert not torch.isfinite(losses.total)
    assert all(torch.equal(b, p) for b, p in zip(before, network.parameters(), strict=True))
    assert [int(s["step"]) for s in optimizer.state.values()] == steps
    training_step(network, optimizer, image, target, False, WEIGHTS)
    assert not all(torch.equal(b, p) for b, p in zip(before, network.parameters(), strict=True))
    assert all(p.isfinite().all() for p in network.parameters())


def test_without_the_check_such_a_gradient_would_spoil_the_weights():
    """Or the test above would pass for another reason."""
    network, image, target = make()
    image[0, 1, 3, 4, 5] = float("nan")
    training_step(network, make_optimizer(network), image, target, False, WEIGHTS, check_finite=False)
    assert not all(p.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "engine"), [("unet3d", "stored"), ("unet3d", "checkpoint"), ("fully_invres", "stored")]
)
def test_deep_maps_of_two_planes_learn_in_bfloat16_as_in_float32(name, engine):
    """oneDNN gives unwritten memory as the gradient of kernels that are deeper than the map."""
    found = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        network = build(NetworkConfig(name=name, out_channels=2, channels=(16, 32, 32)), engine).train()
        image = torch.randn(1, 1, 8, 12, 12, generator=torch.Generator().manual_seed(1))
        junk = [torch.full((32 * 32 * 27,), 1e30) for _ in range(8)]  # so that what is not written shows
        del junk
        losses = training_step(
            network, make_optimizer(network, 0.0), image, (image[:, 0] > 0.5).short(), False, WEIGHTS, precision
        )
        assert torch.isfinite(losses.total)
        found.append([p.grad for p in network.parameters()])
    for exact, half in zip(*found, strict=True):
        assert (exact - half).norm() < 0.5 * exact.norm() + 1e-3


def test_float16_is_scaled_on_the_cpu_as_well(tmp_path):
    """Without it the gradients of a large patch vanish."""
    network, image, target = make()
    trainer = Trainer(network, None, TrainingConfig(precision="fp16"), tmp_path, Segmentation(False))
    assert trainer.scaler is not None and trainer.scaler.is_enabled()
    before = [p.detach().clone() for p in network.parameters()]
    for _ in range(8):  # the first ones may be left out, until the scale fits
        training_step(network, trainer.optimizer, image, target, False, WEIGHTS, "fp16", trainer.scaler)
    assert not all(torch.equal(b, p) for b, p in zip(before, network.parameters(), strict=True))
    assert trainer.scaler.get_scale() >= 1024


@pytest.mark.parametrize(("broken", "scale_from", "message"), [(8, 65536.0, ""), (99, 1.0, "Not one of 10 steps")])
def test_steps_that_a_scaler_leaves_out_are_told_once_it_has_settled(
    tmp_path, monkeypatch, broken, scale_from, message
):
    network, image, target = make()

    class Broken:
        """Batches whose loss overflows until the scaler has come down."""

        def batch(self, iteration):
            return (image * math.nan if iteration < broken else image), target

    report = Recorder()
    config = TrainingConfig(precision="fp16", iterations_per_epoch=10, epochs=1)
    trainer = Trainer(network, Broken(), config, tmp_path, Segmentation(False), report=report)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale_from)
    if message:
        with pytest.raises(InvresError, match=message):
            trainer.run()
    else:
        assert math.isfinite(trainer.run().history[0]["loss"])
    warned = [event for event in report.events if event["event"] == "warning"]
    assert bool(warned) == bool(message)


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_a_long_gradient_is_clipped_to_the_given_norm_and_a_short_one_kept(factor):
    network, image, target = make()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    training_step(network, optimizer, image, target, False, WEIGHTS)
    free = torch.cat([p.grad.flatten() for p in network.parameters()])
    limit = factor * float(free.norm())
    training_step(network, optimizer, image, target, False, WEIGHTS, gradient_clip=limit)
    clipped = torch.cat([p.grad.flatten() for p in network.parameters()])
    torch.testing.assert_close(clipped, free * min(1.0, factor), rtol=1e-4, atol=1e-7)


def test_the_losses_of_the_vae_branch_are_part_of_the_step():
    network, image, target = make(vae=VAEConfig(latent=4))
    losses = training_step(network, make_optimizer(network), image, target, False, WEIGHTS)
    parts = losses.cross_entropy + losses.dice + 0.1 * losses.reconstruction + 0.1 * losses.kullback_leibler
    torch.testing.assert_close(losses.total, parts)
    assert losses.reconstruction > 0.1
    assert all(p.grad is not None for p in network.vae.parameters())


def test_regions_are_trained_as_overlapping_targets():
    network, image, _ = make()
    target = torch.stack([image[:, 0] > 0, image[:, 0] > 0.5, image[:, 1] > 0.5], dim=1)
    optimizer = make_optimizer(network, learning_rate=1e-2)
    totals = [float(training_step(network, optimizer, image, target, True, WEIGHTS).total) for _ in range(6)]
    assert totals[-1] < totals[0]


def test_frozen_parameters_are_left_alone_and_take_no_optimizer_state():
    network, image, target = make()
    network.stem.requires_grad_(False)
    before = weights_of(network.stem)
    optimizer = make_optimizer(network, weight_decay=0.1)
    training_step(network, optimizer, image, target, False, WEIGHTS, gradient_clip=1.0)
    assert all(torch.equal(b, p) for b, p in zip(before, network.stem.parameters(), strict=True))
    assert len(optimizer.state) == len(list(network.parameters())) - 2


def test_a_gradient_scaler_is_undone_before_clipping_and_skips_what_is_not_finite():
    """Half precision's way on a card; the scaler itself also runs on the CPU."""
    network, image, target = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain, _, _ = make()
    for net, scale in ((network, scaler), (plain, None)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        training_step(net, optimizer, image, target, False, WEIGHTS, scaler=scale, gradient_clip=0.1)
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    before = weights_of(network)
    image[0, 0, 0, 0, 0] = float("inf")
    optimizer = make_optimizer(network)
    training_step(network, optimizer, image, target, False, WEIGHTS, scaler=scaler, gradient_clip=0.1)
    assert all(torch.equal(b, p) for b, p in zip(before, network.parameters(), strict=True))
    assert scaler.get_scale() < 2.0**10


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_convolutions_in_the_named_precision(precision, dtype):
    with autocast(torch.device("cpu"), precision):
        assert torch.nn.Conv3d(1, 1, 3)(torch.ones(1, 1, 3, 3, 3)).dtype == dtype
