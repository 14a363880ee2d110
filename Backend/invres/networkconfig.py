"""What a network is: its name, widths, blocks and branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from . import InvresError
from .configjson import nearest

__all__ = ["ENHANCEMENT_NETWORKS", "NETWORKS", "NetworkConfig", "VAEConfig", "network_as_written"]

Triple = tuple[int, int, int]
NETWORKS = (
    "unet3d",
    "partially_invres",
    "fully_invres",
    "mbconv_unet",
    "no_new_net",
    "autoencoder_unet",
    "compact_fcn",
)


ENHANCEMENT_NETWORKS = ("espcn", "espcn_rn")
"""They give images, not labels, and are trained and used by verbs of their own."""


@dataclass(frozen=True)
class VAEConfig:
    """The variational branch (Myronenko, arXiv 1810.11654): it reconstructs the input while training.

    patch: (D, H, W) of the training input; the dense layers fix it. (0, 0, 0) is filled in from the recipe's patch.
    latent: length of mean and of log-variance each; published value.
    reduced_channels: width in front of the dense layer; published value.
    """

    patch: Triple = (0, 0, 0)
    latent: int = 128
    reduced_channels: int = 16


@dataclass(frozen=True)
class NetworkConfig:
    """One network. Empty tuples mean the architecture's own default.

    levels: how many levels of the default to take, finest first; 0 = all. Ignored where channels are given.
    channels: width of the full state at each level, finest first.
    blocks, decoder_blocks: couplings (unet3d: convolution pairs) per level; decoder_blocks has one entry less.
    strides: shrink factor (1 or 2 per axis, D H W) between neighbouring levels.
    convolutions: norm-activation-convolution units in each of N1 and N2 (eq. 1 of the paper).
    norm: "auto" is the one that the architecture was published with.
    resampling: fully_invres: "shuffle" squeezes by pixel shuffle (the paper's); "haar" also turns the voxels that it
        makes of one into their mean and differences; "auto" is "haar".
    learnable_resampling: fully_invres: an orthogonal matrix behind each squeeze is learned.
    expansion: mbconv_unet: how much wider its functions are inside than outside.
    block, bottleneck_ratio: compact_fcn: what stands for the two convolutions of a level; how much narrower (K)
        it is inside.
    inplace_norm: compact_fcn, unet3d, no_new_net: norm and leaky ReLU overwrite their input, so that one map is kept
        for backward and not two.
    For the enhancement networks see `networks.espcn`: blocks are those of each stack, strides the upsampling.
    """

    name: str = "fully_invres"
    in_channels: int = 1
    out_channels: int = 2
    levels: int = 0
    channels: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    decoder_blocks: tuple[int, ...] = ()
    strides: tuple[Triple, ...] = ()
    convolutions: int = 1
    kernel: int = 3
    norm: Literal["auto", "instance", "group", "batch", "none"] = "auto"
    negative_slope: float = 0.01
    dropout: float = 0.0
    resampling: Literal["auto", "shuffle", "haar"] = "auto"
    learnable_resampling: bool = False
    expansion: int = 6
    block: Literal["plain", "bottleneck", "separable", "ccblock"] = "ccblock"
    bottleneck_ratio: int = 3
    inplace_norm: bool = False
    vae: VAEConfig | None = None

    def __post_init__(self) -> None:
        if self.name not in NETWORKS and not self.enhances:
            known = NETWORKS + ENHANCEMENT_NETWORKS
            raise InvresError(
                f"There is no network {self.name!r}; the networks are {', '.join(known)}.",
                hint=nearest(self.name, known),
            )
        for key in ("in_channels", "out_channels", "convolutions", "expansion", "bottleneck_ratio"):
            if getattr(self, key) < 1:
                raise InvresError(f"network.{key} must be 1 or more, got {getattr(self, key)}.")
        if self.levels < 0 or self.levels == 1:
            raise InvresError(f"network.levels must be 2 or more (or 0 for the default), got {self.levels}.")
        if self.kernel % 2 == 0 or self.kernel < 1:
            raise InvresError(f"network.kernel must be odd, got {self.kernel}.")
        if self.inplace_norm and (self.norm == "none" or not self.negative_slope > 0):
            raise InvresError(
                "network.inplace_norm needs a norm and a negative_slope above 0, "
                f"got {self.norm} and {self.negative_slope}.",
                hint="Backward recovers what was overwritten by the inverse of the leaky ReLU.",
            )
        if not 0 <= self.dropout < 1:
            raise InvresError(f"network.dropout must be 0 or more and below 1, got {self.dropout}.")

    @property
    def enhances(self) -> bool:
        """Whether it makes an image of higher resolution, and no segmentation."""
        return self.name in ENHANCEMENT_NETWORKS


def network_as_written(values: dict[str, Any]) -> dict[str, Any]:
    """A network's JSON with what has been added since it was written, at the value that was in force then.

    "auto" would mean what is the default today, and the same weights would give another result without a word.
    """
    if values.get("name") == "fully_invres":
        return {"resampling": "shuffle"} | values
    return values
