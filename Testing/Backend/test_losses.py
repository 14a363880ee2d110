"""The loss of the paper: numbers worked out by hand, MONAI where the definitions agree, gradients, dtypes, memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss
from torch.utils._python_dispatch import TorchDispatchMode

from invres import InvresError, losses
from invres.config import LossWeights
from invres.losses import regularisation_loss, segmentation_loss, total_loss

WEIGHTS = LossWeights()
SHAPE = (5, 3, 7)


@pytest.fixture(params=["one slab", "a slab a plane"])
def slabs(request, monkeypatch):
    """The result must not depend on how depth is divided."""
    if request.param == "a slab a plane":
        monkeypatch.setattr(losses, "SLAB_VOXELS", 1)


class Output(NamedTuple):
    logits: torch.Tensor
    reconstruction: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    log_variance: torch.Tensor | None = None


def batch(samples=2, channels=3, regions=False, dtype=torch.float32, shape=SHAPE):
    logits = torch.randn(samples, channels, *shape, dtype=dtype, requires_grad=True)
    if regions:
        return logits, torch.rand(samples, channels, *shape) > 0.6
    return logits, torch.randint(0, channels, (samples, *shape))


def test_softmax_loss_of_two_voxels_is_the_one_worked_out_by_hand(slabs):
    """Foreground probabilities 0.8 and 0.4, the first voxel is foreground."""
    foreground = torch.tensor([0.8, 0.4])
    logits = torch.stack([(1 - foreground).log(), foreground.log()]).view(1, 2, 2, 1, 1)
    found = segmentation_loss(logits, torch.tensor([1, 0]).view(1, 2, 1, 1), False, WEIGHTS)
    cross_entropy = -(math.log(0.8) + math.log(0.6)) / 2
    dice = 1 - 2 * 0.8 / (1.2 + 1)
    assert found.cross_entropy.item() == pytest.approx(cross_entropy, rel=1e-5)
    assert found.dice.item() == pytest.approx(dice, rel=1e-4)
    assert found.total.item() == pytest.approx(cross_entropy + dice, rel=1e-4)


def test_region_loss_of_two_voxels_is_the_one_worked_out_by_hand(slabs):
    """One region, probabilities 0.8 and 0.4, the first voxel inside."""
    probabilities = torch.tensor([0.8, 0.4])
    logits = torch.logit(probabilities).view(1, 1, 2, 1, 1)
    found = segmentation_loss(logits, torch.tensor([True, False]).view(1, 1, 2, 1, 1), True, WEIGHTS)
    assert found.cross_entropy.item() == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2, rel=1e-5)
    assert found.dice.item() == pytest.approx(1 - 2 * 0.8 / (1.2 + 1), rel=1e-4)


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_softmax_loss_equals_monai(channels, slabs):
    logits, target = batch(channels=channels)
    monai = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    expected = monai(logits, target.unsqueeze(1))
    found = segmentation_loss(logits, target, False, WEIGHTS).total
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("channels", [1, 3])
def test_region_loss_equals_monai(channels, slabs):
    logits, target = batch(channels=channels, regions=True)
    found = segmentation_loss(logits, target, True, WEIGHTS)
    dice = DiceLoss(sigmoid=True)(logits, target.float())
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.float())
    torch.testing.assert_close(found.dice, dice, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.cross_entropy, cross_entropy, rtol=1e-5, atol=1e-6)


def test_weights_scale_the_terms_of_the_total():
    logits, target = batch()
    found = segmentation_loss(logits, target, False, LossWeights(cross_entropy=0.25, dice=3.0))
    torch.testing.assert_close(found.total, 0.25 * found.cross_entropy + 3 * found.dice)


def test_dice_is_averaged_over_samples_so_a_batch_equals_its_samples():
    logits, target = batch(samples=3)
    whole = segmentation_loss(logits, target, False, WEIGHTS).dice
    apart = [segmentation_loss(logits[i : i + 1], target[i : i + 1], False, WEIGHTS).dice for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(apart).mean())


@pytest.mark.parametrize("regions", [False, True])
def test_gradients_are_right(regions, slabs):
    logits, target = batch(channels=2, regions=regions, dtype=torch.float64, shape=(3, 2, 2))
    target = target.to(torch.int8)
    target[0, ..., 0, 0] = -1
    assert torch.autograd.gradcheck(lambda x: segmentation_loss(x, target, regions, WEIGHTS).total, (logits,))


@pytest.mark.parametrize("regions", [False, True])
def test_an_ignored_voxel_changes_nothing_and_gets_no_gradient(regions, slabs):
    logits, target = batch(regions=regions)
    target = target.to(torch.int16)
    kept = (slice(None), slice(None), slice(0, 4))
    target[..., 4:, :, :] = -1
    found = segmentation_loss(logits, target, regions, WEIGHTS)
    cropped = segmentation_loss(logits[kept], target[..., :4, :, :], regions, WEIGHTS)
    torch.testing.assert_close(tuple(found[:3]), tuple(cropped[:3]))
    gradient = torch.autograd.grad(found.total, logits)[0]
    assert torch.all(gradient[:, :, 4:] == 0)
    assert torch.any(gradient[kept] != 0)


@pytest.mark.parametrize("regions", [False, True])
def test_a_batch_of_only_ignored_voxels_costs_nothing_and_has_a_zero_gradient(regions):
    logits, target = batch(regions=regions)
    found = segmentation_loss(logits, torch.full_like(target, -1, dtype=torch.int8), regions, WEIGHTS)
    found.total.backward()
    assert [value.item() for value in found[:3]] == [0, 0, 0]
    assert torch.all(logits.grad == 0)


@pytest.mark.parametrize("regions", [False, True])
def test_an_absent_class_gives_a_finite_loss_and_gradient(regions):
    logits, target = batch(regions=regions)
    found = segmentation_loss(logits, torch.zeros_like(target), regions, WEIGHTS)
    found.total.backward()
    assert found.dice.item() == pytest.approx(1, abs=1e-4)
    assert torch.isfinite(found.total) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("regions", [False, True])
def test_a_perfect_prediction_costs_nothing_even_where_a_class_is_absent(regions):
    member = torch.zeros(1, 3, *SHAPE)
    member[:, 1, :2] = 1
    if not regions:
        member[:, 0] = 1 - member[:, 1]
    target = member.bool() if regions else member.argmax(1)
    found = segmentation_loss(200 * (member - 0.5), target, regions, WEIGHTS)
    assert found.total.item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_small_label_types_give_the_same_loss_as_int64(dtype):
    logits, target = batch()
    found = segmentation_loss(logits, target.to(dtype), False, WEIGHTS)
    assert found.total == segmentation_loss(logits, target, False, WEIGHTS).total


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_region_types_give_the_same_loss_as_bool(dtype):
    logits, target = batch(regions=True)
    found = segmentation_loss(logits, target.to(dtype), True, WEIGHTS)
    assert found.total == segmentation_loss(logits, target, True, WEIGHTS).total


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_a_float32_loss(regions, dtype):
    logits, target = batch(regions=regions, shape=(9, 40, 40))
    half = logits.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = segmentation_loss(half, target, regions, WEIGHTS)
    expected = segmentation_loss(half.detach().float(), target, regions, WEIGHTS)
    assert found.total.dtype == found.dice.dtype == found.cross_entropy.dtype == torch.float32
    torch.testing.assert_close(tuple(found[:3]), tuple(expected[:3]))
    found.total.backward()
    assert half.grad.dtype == dtype and torch.isfinite(half.grad).all()


@pytest.mark.parametrize("regions", [False, True])
def test_extreme_logits_stay_finite(regions):
    logits, target = batch(regions=regions)
    extreme = (logits.detach() * 1e4).requires_grad_()
    found = segmentation_loss(extreme, target, regions, WEIGHTS)
    found.total.backward()
    assert torch.isfinite(found.total) and torch.isfinite(extreme.grad).all()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(value, torch.Tensor) and not value._is_view():
                self.bytes = max(self.bytes, value.numel() * value.element_size())
        return made


@pytest.mark.parametrize("regions", [False, True])
def test_forward_makes_no_map_of_the_size_of_the_logits(regions, monkeypatch):
    logits, target = batch(regions=regions, shape=(16, 8, 8))
    monkeypatch.setattr(losses, "SLAB_VOXELS", 2 * 2 * 8 * 8)
    with Largest() as largest:
        segmentation_loss(logits, target, regions, WEIGHTS)
    # Eight slabs: nothing wider than float32, and nothing of more than one slab.
    assert largest.bytes <= logits.numel() * 4 / 8


def test_vae_terms_are_the_ones_worked_out_by_hand(slabs):
    image = torch.zeros(2, 1, 2, 1, 2)
    reconstruction = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0]).view_as(image)
    mean = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    log_variance = torch.tensor([[0.0, 0.0], [math.log(2), 0.0]])
    found = regularisation_loss(reconstruction, image, mean, log_variance, WEIGHTS)
    l2 = (1 + 4 + 9) / 8
    # Sample 1: mean^2 = 1. Sample 2: 4 + (2 - log 2 - 1). Four voxels each; then the mean of two samples.
    divergence = (1 + 4 + 1 - math.log(2)) / 4 / 2
    assert found.reconstruction.item() == pytest.approx(l2)
    assert found.kullback_leibler.item() == pytest.approx(divergence, rel=1e-6)
    assert found.total.item() == pytest.approx(0.1 * l2 + 0.1 * divergence, rel=1e-6)


def test_kullback_leibler_counts_voxels_and_not_channels():
    mean, log_variance = torch.ones(1, 4), torch.zeros(1, 4)
    image = torch.zeros(1, 3, *SHAPE)
    found = regularisation_loss(image, image, mean, log_variance, WEIGHTS)
    assert found.kullback_leibler.item() == pytest.approx(4 / math.prod(SHAPE))
    assert found.reconstruction.item() == 0


def test_gradients_of_the_vae_terms_are_right(slabs):
    image = torch.randn(2, 2, 3, 2, 1, dtype=torch.float64)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (image.shape, (2, 5), (2, 5))]
    assert torch.autograd.gradcheck(lambda r, m, v: regularisation_loss(r, image, m, v, WEIGHTS).total, inputs)


def test_vae_terms_of_half_precision_are_float32():
    image = torch.randn(1, 2, *SHAPE)
    values = [torch.randn(1, 8).bfloat16() for _ in range(2)]
    found = regularisation_loss(image.bfloat16(), image, *values, WEIGHTS)
    assert {value.dtype for value in found} == {torch.float32}


def test_total_loss_is_the_weighted_sum_of_four_terms():
    logits, target = batch()
    image, mean, log_variance = torch.randn(2, 1, *SHAPE), torch.randn(2, 8), torch.randn(2, 8)
    output = Output(logits, torch.randn_like(image), mean, log_variance)
    found = total_loss(output, image, target, False, WEIGHTS)
    l2 = torch.nn.functional.mse_loss(output.reconstruction, image)
    divergence = (mean**2 + log_variance.exp() - log_variance - 1).sum() / (2 * math.prod(SHAPE))
    torch.testing.assert_close(found.reconstruction, l2)
    torch.testing.assert_close(found.kullback_leibler, divergence)
    torch.testing.assert_close(found.total, found.cross_entropy + found.dice + 0.1 * l2 + 0.1 * divergence)


def test_total_loss_without_a_vae_branch_is_the_segmentation_loss():
    logits, target = batch()
    found = total_loss(Output(logits), torch.zeros(2, 1, *SHAPE), target, False, WEIGHTS)
    assert found == segmentation_loss(logits, target, False, WEIGHTS)
    assert found.reconstruction is None and found.kullback_leibler is None


@pytest.mark.parametrize(
    ("logits", "target", "regions", "word"),
    [
        ((1, 2, 3, 3), torch.zeros(1, 3, 3), False, "Logits"),
        ((1, 1, 2, 2, 2), torch.zeros(1, 2, 2, 2, dtype=torch.int64), False, "2 or more"),
        ((1, 2, 2, 2, 2), torch.zeros(1, 2, 2, 2), False, "whole numbers"),
        ((1, 2, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2, dtype=torch.int64), False, "shape"),
        ((1, 2, 2, 2, 2), torch.zeros(1, 2, 2, 2), True, "shape"),
    ],
)
def test_a_target_that_does_not_fit_is_refused_with_a_sentence(logits, target, regions, word):
    with pytest.raises(InvresError, match=word):
        segmentation_loss(torch.zeros(logits), target, regions, WEIGHTS)


def test_a_reconstruction_of_another_shape_is_refused():
    image, latent = torch.zeros(1, 1, *SHAPE), torch.zeros(1, 4)
    with pytest.raises(InvresError, match="reconstruction"):
        regularisation_loss(image[:, :, 1:], image, latent, latent, WEIGHTS)
    with pytest.raises(InvresError, match="log-variance"):
        regularisation_loss(image, image, latent, latent[:, 1:], WEIGHTS)
