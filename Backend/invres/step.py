"""One optimizer step, the same for training, for the memory prediction and for the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .config import LossWeights
from .losses import EnhancementLosses, Losses, check_target, root_mean_square_error, sums_of_boxes, total_loss
from .muon import Muon
from .networks import Network, SegmentationNetwork, is_rim
from .reversible import role

__all__ = ["AUTOCAST_DTYPES", "autocast", "enhancement_step", "make_optimizer", "training_step"]

L = TypeVar("L", Losses, EnhancementLosses)
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for "bf16" and "fp16", nothing for "fp32"."""
    dtype = AUTOCAST_DTYPES.get(precision, torch.bfloat16)
    return torch.autocast(device.type, dtype=dtype, enabled=precision in AUTOCAST_DTYPES)


def make_optimizer(
    network: torch.nn.Module, learning_rate: float = 2e-4, weight_decay: float = 0.0, kind: str = "adam"
) -> torch.optim.Optimizer:
    """Adam with the paper's learning rate (section 3.3); weight decay, where wanted, is decoupled (AdamW).

    kind: "muon" for Muon on the convolutions between the first one and the head, and Adam for the rest.
    """
    trainable = [p for p in network.parameters() if p.requires_grad]
    if kind == "muon":
        return Muon(trainable, _between_channels(network), learning_rate, weight_decay)
    # foreach=False updates one tensor after the other: the fused form holds copies of all gradients at once.
    return torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=weight_decay, foreach=False)


def training_step(
    network: SegmentationNetwork,
    optimizer: torch.optim.Optimizer,
    image: torch.Tensor,
    target: torch.Tensor,
    regions: bool,
    weights: LossWeights,
    precision: str = "fp32",
    scaler: torch.amp.GradScaler | None = None,
    gradient_clip: float = 0.0,
    check_finite: bool = True,
) -> Losses:
    """Forward, loss (equation 2), backward, update. image (N, C, D, H, W); target as `losses.total_loss` takes it.

    check_finite: leave the weights alone if the gradient holds Inf or NaN (costs one wait for the device).
    Returns the losses of this step, detached.
    """

    def losses() -> Losses:
        check_target(target, (image.shape[0], _classes(network), *image.shape[2:]), regions)
        with autocast(image.device, precision):
            output = network(image, sums_of_boxes(target, regions))
        with role("loss"):
            return total_loss(output, image, target, regions, weights)

    return _optimize(network, optimizer, losses, scaler, gradient_clip, check_finite)


def enhancement_step(
    network: Network,
    optimizer: torch.optim.Optimizer,
    image: torch.Tensor,
    target: torch.Tensor,
    precision: str = "fp32",
    scaler: torch.amp.GradScaler | None = None,
    gradient_clip: float = 0.0,
    check_finite: bool = True,
) -> EnhancementLosses:
    """The same for image quality transfer. image: (N, C, D, H, W); target: as the network gives it (`unshuffle`)."""

    def losses() -> EnhancementLosses:
        with autocast(image.device, precision):
            output = network(image)
        with role("loss"):
            return EnhancementLosses(root_mean_square_error(output, target))

    return _optimize(network, optimizer, losses, scaler, gradient_clip, check_finite)


def _optimize(
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    compute: Callable[[], L],
    scaler: torch.amp.GradScaler | None,
    gradient_clip: float,
    check_finite: bool,
) -> L:
    """Takes the step that lowers the first of the losses that `compute` gives, and returns them detached.

    The first is NaN where the step was left out, so that whoever counts on it notices. A scaler leaves steps out of its
    own accord, and tries with a smaller scale the next time.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = compute()
    detached = type(losses)(*(None if t is None else t.detach() for t in losses))  # type: ignore[arg-type]
    loss = losses[0]
    del losses
    (loss if scaler is None else scaler.scale(loss)).backward()
    del loss
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [p for p in network.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    left_out = type(detached)(torch.full_like(detached[0], torch.nan), *detached[1:])
    finite = not check_finite or bool(torch.isfinite(norm))
    if scaler is None and not finite:
        return left_out
    if gradient_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip, norm)
    with role("optimizer"):
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    return detached if finite else left_out


def _between_channels(network: torch.nn.Module) -> list[torch.Tensor]:
    """Weights of convolutions that map channels to channels: not of the first and last layers, or depthwise ones."""
    inner = getattr(network, "module", network)
    return [
        weight
        for name, weight in inner.named_parameters()
        if weight.ndim == 5 and weight.shape[1] > 1 and not is_rim(name)
    ]


def _classes(network: torch.nn.Module) -> int:
    """Output channels, also of a network wrapped for distributed training."""
    inner: Any = getattr(network, "module", network)
    return int(inner.config.out_channels)
