"""The training loss of the paper: cross entropy, soft Dice, reconstruction and Kullback-Leibler terms (eq. 2 to 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import InvresError
from .config import LossWeights

__all__ = [
    "EnhancementLosses",
    "Losses",
    "NetworkOutput",
    "Regularisation",
    "check_target",
    "regularisation_loss",
    "root_mean_square_error",
    "segmentation_loss",
    "sums_of_boxes",
    "total_loss",
]

# Eq. 3 is 0/0 where a class is neither predicted nor present; this value (as in nnU-Net and MONAI) makes that Dice 1.
SMOOTH = 1e-5
# One slab of logits holds about this many voxels: small beside a training patch, large enough to keep a GPU busy.
SLAB_VOXELS = 2**17
# More of them would save little beside the logits, and each costs a few dozen operators.
MAXIMUM_SLABS = 32


class Losses(NamedTuple):
    """Scalars of one step. total is weighted, the terms are not; a term that was not computed is None."""

    total: Tensor
    cross_entropy: Tensor
    dice: Tensor
    reconstruction: Tensor | None = None
    kullback_leibler: Tensor | None = None


class EnhancementLosses(NamedTuple):
    """The scalar of a step of image quality transfer."""

    total: Tensor


class Regularisation(NamedTuple):
    """Scalars of the VAE branch. total is weighted, the terms are not."""

    total: Tensor
    reconstruction: Tensor
    kullback_leibler: Tensor


class NetworkOutput(Protocol):
    """What `total_loss` reads from a network.

    sums: of `sums_of_boxes` over the volume, or None where there are logits. The other three: None without VAE branch.
    """

    @property
    def logits(self) -> Tensor | None: ...
    @property
    def sums(self) -> tuple[Tensor, ...] | None: ...
    @property
    def reconstruction(self) -> Tensor | None: ...
    @property
    def mean(self) -> Tensor | None: ...
    @property
    def log_variance(self) -> Tensor | None: ...


def segmentation_loss(logits: Tensor, target: Tensor, regions: bool, weights: LossWeights) -> Losses:
    """Cross entropy (eq. 4) and soft Dice (eq. 3) of one batch; float32, also for half-precision logits.

    logits: (N, K, D, H, W), before softmax or sigmoid.
    target: labels, any signed or unsigned integer type, (N, D, H, W) with values 0 .. K - 1 (0 = background);
        with `regions`, membership (N, K, D, H, W) as bool or as numbers from 0 to 1. -1 = ignore.
    regions: False takes the softmax over K and the Dice of channels 1 .. K - 1; True takes a sigmoid and the Dice
        of each channel.

    Cross entropy is the mean over voxels that are not ignored (and over regions). Dice is taken for each sample and
    class and then averaged, not from sums over the batch: eq. 3 is defined for one volume, and so the loss does not
    depend on how a batch is divided among accumulation steps or GPUs. It is nnU-Net's and MONAI's default too. A
    class that a patch lacks costs up to 1; where every voxel is ignored both terms are 0.

    Works in slabs of depth that are recomputed in backward: no float32 or one-hot map of the logits' full size is
    made beside the gradient itself. `sums_of_boxes` does without the logits' full size, too.
    Raises: InvresError where the shapes or the type of the target do not fit.
    """
    check_target(target, logits.shape, regions)
    return _from_sums(_sum_over_slabs(_region_sums if regions else _softmax_sums, logits, target), weights)


def sums_of_boxes(target: Tensor, regions: bool) -> Callable[[Tensor, tuple[slice, ...]], tuple[Tensor, ...]]:
    """A function of (logits of a box, its indices into N, K, D, H, W) that gives that box's share of the loss.

    What it gives for all boxes of the volume, added up, is a network's `sums`, enough for `total_loss`. target: as in
    `segmentation_loss`; call `check_target` before.
    """

    def sums(logits: Tensor, where: tuple[slice, ...]) -> tuple[Tensor, ...]:
        part = target[where] if regions else target[where[:1] + where[2:]]
        return (_region_sums if regions else _softmax_sums)(logits, part)

    return sums


def _from_sums(sums: Sequence[Tensor], weights: LossWeights) -> Losses:
    cross_entropy_sum, voxels, overlap, predicted, present = sums
    cross_entropy = cross_entropy_sum / voxels.clamp(min=1)
    dice = (1 - (2 * overlap + SMOOTH) / (predicted + present + SMOOTH)).mean()
    return Losses(weights.cross_entropy * cross_entropy + weights.dice * dice, cross_entropy, dice)


def regularisation_loss(
    reconstruction: Tensor, image: Tensor, mean: Tensor, log_variance: Tensor, weights: LossWeights
) -> Regularisation:
    """L2 loss (eq. 6) and Kullback-Leibler divergence (eq. 5) of the VAE branch; float32.

    reconstruction, image: (N, C, D, H, W). mean, log_variance: (N, latent), of the estimated normal distribution.

    L2 is the mean of the squared differences, where eq. 6 writes their sum: the sum grows with the patch, and the
    weight 0.1 of eq. 2 would mean something else at 64^3 than at 128^3. The divergence is summed over the latent
    values, divided by the D * H * W voxels of the input (the N of eq. 5) and averaged over the batch, as in
    Myronenko (arXiv 1810.11654).
    Raises: InvresError where the shapes do not fit.
    """
    if reconstruction.shape != image.shape:
        raise InvresError(
            f"The reconstruction must have the image's shape {list(image.shape)}, got {list(reconstruction.shape)}."
        )
    if mean.shape != log_variance.shape:
        raise InvresError(
            f"Mean and log-variance must have one shape, got {list(mean.shape)} and {list(log_variance.shape)}."
        )
    (squares,) = _sum_over_slabs(_squared_difference, reconstruction, image)
    l2 = squares / image.numel()
    mean, log_variance = _wide(mean), _wide(log_variance)
    divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum()
    divergence = divergence / (image.shape[0] * image[0, 0].numel())
    return Regularisation(weights.reconstruction * l2 + weights.kullback_leibler * divergence, l2, divergence)


def root_mean_square_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The loss of Blumberg et al. 2018, section 3, over all values of the batch (chosen: not patch by patch); float32.

    prediction, target: of one shape. Raises InvresError where it differs.
    """
    if prediction.shape != target.shape:
        raise InvresError(f"The target must have shape {list(prediction.shape)}, got {list(target.shape)}.")
    # Not the root of exactly 0, whose gradient is infinite.
    return ((_wide(prediction) - _wide(target)).square().mean() + torch.finfo(torch.float32).tiny).sqrt()


def total_loss(output: NetworkOutput, image: Tensor, target: Tensor, regions: bool, weights: LossWeights) -> Losses:
    """Eq. 2: `segmentation_loss` (from logits or their sums), and `regularisation_loss` added where a VAE branch ran.

    image: (N, C, D, H, W), the network's input. target, regions: as in `segmentation_loss`.
    """
    if output.logits is not None:
        losses = segmentation_loss(output.logits, target, regions, weights)
    else:
        assert output.sums is not None, "a network gives logits or sums"
        losses = _from_sums(output.sums, weights)
    if output.reconstruction is None or output.mean is None or output.log_variance is None:
        return losses
    vae = regularisation_loss(output.reconstruction, image, output.mean, output.log_variance, weights)
    return Losses(losses.total + vae.total, losses.cross_entropy, losses.dice, vae.reconstruction, vae.kullback_leibler)


def check_target(target: Tensor, shape: Sequence[int], regions: bool) -> None:
    """Raises InvresError unless the target fits logits of this shape (N, K, D, H, W)."""
    if len(shape) != 5:
        raise InvresError(f"Logits must be (N, K, D, H, W), got shape {list(shape)}.")
    if regions:
        wanted = list(shape)
    else:
        wanted = [shape[0], *shape[2:]]
        if shape[1] < 2:
            raise InvresError("Exclusive labels need 2 or more output channels (background and a label), got 1.")
        if target.is_floating_point() or target.dtype == torch.bool:
            raise InvresError(f"The target of exclusive labels must hold whole numbers, got {target.dtype}.")
    if list(target.shape) != wanted:
        raise InvresError(f"The target must have shape {wanted}, got {list(target.shape)}.")


def _wide(values: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return values if values.dtype == torch.float64 else values.float()


def _sum_over_slabs(function: Callable[..., tuple[Tensor, ...]], first: Tensor, second: Tensor) -> list[Tensor]:
    """The sums that `function(first, second)` gives, added up over slabs of the depth axis (third from the end).

    Each slab is evaluated again in backward, so that its temporaries and not those of the whole map are alive.
    """
    plane = first.shape[0] * first.shape[-2] * first.shape[-1]
    planes = max(1, SLAB_VOXELS // max(1, plane), first.shape[-3] // MAXIMUM_SLABS)
    slabs = zip(first.split(planes, dim=-3), second.split(planes, dim=-3), strict=True)
    parts = [checkpoint(function, *slab, use_reentrant=False, preserve_rng_state=False) for slab in slabs]
    return [torch.stack(terms).sum(0) for terms in zip(*parts, strict=True)]


def _softmax_sums(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Summed cross entropy, counted voxels, and per sample and foreground class overlap, predicted, present."""
    log_probabilities = F.log_softmax(_wide(logits), dim=1)
    classes = torch.arange(logits.shape[1], device=target.device, dtype=target.dtype)
    # Compared, not gathered: needs no int64 labels, leaves ignored voxels (-1) out, and is deterministic on CUDA.
    member = target.unsqueeze(1) == classes.view(1, -1, 1, 1, 1)
    counted = target.unsqueeze(1) >= 0
    cross_entropy = -(log_probabilities * member).sum()
    return cross_entropy, counted.sum(), *_dice_sums(log_probabilities[:, 1:].exp(), member[:, 1:], counted)


def _region_sums(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """As `_softmax_sums`, for overlapping regions; each region of a voxel counts as one."""
    logits = _wide(logits)
    counted = target >= 0
    member = target.to(logits.dtype).clamp(min=0)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, member, weight=counted, reduction="sum")
    return cross_entropy, counted.sum(), *_dice_sums(logits.sigmoid(), member, counted)


def _dice_sums(probabilities: Tensor, member: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    axes = (2, 3, 4)
    present = member.sum(axes, dtype=probabilities.dtype)
    return (probabilities * member).sum(axes), (probabilities * counted).sum(axes), present


def _squared_difference(reconstruction: Tensor, image: Tensor) -> tuple[Tensor]:
    return ((_wide(reconstruction) - _wide(image)).square().sum(),)
