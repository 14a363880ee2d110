"""A recipe and its parts, each a frozen dataclass: training, augmentation, preparation, labels."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from . import InvresError
from .configjson import from_dict
from .enhancementconfig import EnhancementConfig
from .networkconfig import ENHANCEMENT_NETWORKS, NetworkConfig
from .synthesisconfig import LabelMapConfig

__all__ = [
    "DARKEST",
    "ENGINES",
    "MEMORY_SETTINGS",
    "OPTIMIZERS",
    "AugmentationConfig",
    "ChannelPlan",
    "Label",
    "LabelScheme",
    "LossWeights",
    "PreparationPlan",
    "Recipe",
    "TrainingConfig",
    "check_axes",
    "check_one_piece",
    "check_spacing",
]

ENGINES = ("auto", "stored", "checkpoint", "recursive", "memcnn", "reversible")
MEMORY_SETTINGS = ("low", "lower", "lowest")
OPTIMIZERS = {"adam": 0.0, "muon": 0.1}
"""With the weight decay that goes with each. Muon's concerns only the weights that it turns."""
DARKEST = -4.0
"""Of empty background, in standard deviations. It keeps the darkness that scaling gives it, but an image of little
contrast must not push it so far that it dominates the network's statistics."""
SMALLEST_MM = 0.01
"""Of a voxel that images are resampled to (chosen): below it a mistyped number would fill the memory."""
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class LossWeights:
    """Weights of equation 2: cross entropy, Dice, reconstruction (L2), Kullback-Leibler."""

    cross_entropy: float = 1.0
    dice: float = 1.0
    reconstruction: float = 0.1
    kullback_leibler: float = 0.1


@dataclass(frozen=True)
class AugmentationConfig:
    """How training patches are varied. Probabilities are per patch; ranges are symmetric unless a pair is given.

    Rotation in degrees about each axis, scale as a factor, elastic displacement in the shortest sides of a voxel
    (standard deviation at the control points); with thick slices all three stay in their plane. Noise relative to the
    image's own standard deviation (images are z-scored).
    channel_dropout: probability that a channel of a patch is blanked, never all of them; above 0 the model can do
    without any of its channels as long as one is there.
    """

    spatial_probability: float = 0.5
    rotation_degrees: tuple[float, float, float] = (15.0, 15.0, 15.0)
    scale: tuple[float, float] = (0.8, 1.25)
    elastic_probability: float = 0.2
    elastic_voxels: float = 2.0
    elastic_grid: int = 5
    flip_axes: tuple[int, ...] = ()
    gamma_probability: float = 0.3
    gamma: tuple[float, float] = (0.7, 1.5)
    noise_probability: float = 0.15
    noise_std: float = 0.1
    bias_field_probability: float = 0.2
    bias_field: float = 0.3
    brightness_probability: float = 0.15
    brightness: tuple[float, float] = (0.75, 1.25)
    low_resolution_probability: float = 0.15
    low_resolution: tuple[float, float] = (1.0, 2.0)
    channel_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.channel_dropout < 1:
            raise InvresError(
                f"augmentation.channel_dropout must be 0 or more and below 1, got {self.channel_dropout}.",
                hint="0.25 blanks each channel in a quarter of the patches.",
            )


_NOT_NEGATIVE = (
    *("time_s", "warmup_iterations", "weight_decay", "gradient_clip"),
    *("validation_cases", "early_stop_epochs", "checkpoint_every_s", "seed"),
)


@dataclass(frozen=True)
class TrainingConfig:
    """One training. Sizes in voxels (D, H, W), times in seconds.

    learning_rate: 2e-4 with Adam is the paper's (section 3.3); the schedule and the rest are chosen.
    optimizer: "muon" needs about half as many steps as "adam" at about the same learning rates, and keeps half the
    state; in long trainings it wants a weight_decay of about 0.1.
    epochs counts `iterations_per_epoch` optimizer steps each; `time_s` (0 = none) ends the training earlier.
    memory: how far the reversible engine goes to save memory. "low" is right for most: little memory at hardly any cost
    in time. "lower" works on fewer channels at a time, and under bf16 or fp16 keeps gradients in 16 bits. "lowest" also
    keeps the state itself in 16 bits, on a grid that it can be recomputed on exactly.
    """

    patch: Triple = (64, 64, 64)
    batch_size: int = 2
    iterations_per_epoch: int = 100
    epochs: int = 100
    time_s: float = 0.0
    optimizer: Literal["adam", "muon"] = "adam"
    learning_rate: float = 2e-4
    schedule: Literal["constant", "cosine", "poly"] = "cosine"
    warmup_iterations: int = 0
    weight_decay: float = 0.0
    gradient_clip: float = 12.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    engine: str = "auto"
    memory: str = "low"
    foreground_fraction: float = 0.5
    validate_every: int = 1
    validation_cases: int = 0
    early_stop_epochs: int = 0
    checkpoint_every_s: float = 300.0
    seed: int = 0
    loss: LossWeights = field(default_factory=LossWeights)

    def with_optimizer(self, name: str) -> TrainingConfig:
        """The same with another optimizer and the weight decay that goes with that; itself where it is the same one."""
        if name == self.optimizer:
            return self
        return dataclasses.replace(self, optimizer=name, weight_decay=OPTIMIZERS.get(name, 0.0))  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise InvresError(
                f"There is no optimizer {self.optimizer!r}; the optimizers are {' and '.join(OPTIMIZERS)}."
            )
        if self.engine not in ENGINES:
            raise InvresError(f"There is no engine {self.engine!r}; the engines are {', '.join(ENGINES)}.")
        if self.memory not in MEMORY_SETTINGS:
            raise InvresError(
                f"There is no memory setting {self.memory!r}; the settings are {', '.join(MEMORY_SETTINGS)}."
            )
        for key in ("batch_size", "iterations_per_epoch", "epochs", "validate_every"):
            if getattr(self, key) < 1:
                raise InvresError(f"training.{key} must be 1 or more, got {getattr(self, key)}.")
        for key in _NOT_NEGATIVE:
            if not getattr(self, key) >= 0:
                raise InvresError(f"training.{key} must be 0 or more, got {getattr(self, key)}.")
        if self.seed >= 2**32:
            raise InvresError(f"training.seed must be below 2^32, got {self.seed}.")
        if not 0 <= self.foreground_fraction <= 1:
            raise InvresError(f"training.foreground_fraction must be from 0 to 1, got {self.foreground_fraction}.")
        if min(self.patch) < 1:
            raise InvresError(f"training.patch must be three sizes of 1 or more, got {list(self.patch)}.")
        if not self.learning_rate > 0:
            raise InvresError(f"training.learning_rate must be above 0, got {self.learning_rate}.")
        for where, part in (("training", self), ("training.loss", self.loss)):
            for key, value in vars(part).items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise InvresError(f"{where}.{key} must be a finite number, got {value}.")


@dataclass(frozen=True)
class ChannelPlan:
    """One input channel. modality "CT" is clipped and scaled by data-set figures, all else is z-scored per image.

    clip, mean, std: used for CT only (Hounsfield units inside the foreground of the training cases).
    optional: a case may lack it, where it has another channel; the network then gets zeros for it.
    """

    name: str = "image"
    modality: str = "MR"
    clip: tuple[float, float] | None = None
    mean: float = 0.0
    std: float = 1.0
    optional: bool = False


@dataclass(frozen=True)
class CropPlan:
    """Training images that were cut out around a structure: what a whole image is cut to before it is segmented.

    around: names of the structure, as models of the whole image have it among their labels ("hippocampus" also stands
    for "left hippocampus"). margin_mm: left around it, (D, H, W). largest_mm: about the largest training image.
    """

    around: tuple[str, ...] = ()
    margin_mm: tuple[float, float, float] = (5.0, 5.0, 5.0)
    largest_mm: tuple[float, float, float] = (64.0, 64.0, 64.0)

    def __post_init__(self) -> None:
        if not self.around:
            raise InvresError("crop.around must name the structure that the images are cut out around.")
        if min(self.margin_mm) < 0 or min(self.largest_mm) <= 0:
            raise InvresError(
                "crop.margin_mm must be three sizes of 0 or more and crop.largest_mm three above 0, "
                f"got {list(self.margin_mm)} and {list(self.largest_mm)}."
            )


@dataclass(frozen=True)
class PreparationPlan:
    """How files become network input; recorded in the model package so that segmenting repeats it.

    spacing_mm: target voxel size in canonical array order (D, H, W) = (superior, anterior, right).
    crop_to_nonzero: crop to the box where any channel differs from zero.
    crop: the images were cut out around a structure before they became training data; None if they show all.
    normalise_first: intensities are scaled in the voxels of the files, before resampling; False in models of the time
    before this key, and where images are synthesised at the spacing that the network sees.
    aligned: channels on other grids than the first one of their case were resampled to its grid before all else, when
    the training data were read (`Dataset`).
    """

    channels: tuple[ChannelPlan, ...] = (ChannelPlan(),)
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    crop_to_nonzero: bool = True
    crop: CropPlan | None = None
    normalise_first: bool = False
    aligned: bool = False


@dataclass(frozen=True)
class Label:
    """One foreground label or region.

    values: the values of label files that belong to it; more than one makes it a region.
    output_value: the value written for it.
    terminology: Slicer's terminology entry string (category~type~modifier~...), "" if none.
    """

    name: str
    values: tuple[int, ...]
    output_value: int
    colour: Triple | None = None
    terminology: str = ""


@dataclass(frozen=True)
class LabelScheme:
    """All foreground labels; background is 0 in files and inside.

    regions False: labels exclude one another, the network has len(labels) + 1 softmax channels (0 = background).
    regions True: labels may overlap, the network has len(labels) sigmoid channels; when written to one label map,
    later labels overwrite earlier ones.
    ignore_value: voxels with this value in a label file take no part in the loss.
    """

    labels: tuple[Label, ...] = ()
    regions: bool = False
    ignore_value: int | None = None

    @property
    def out_channels(self) -> int:
        """Channels of the network's output."""
        return len(self.labels) if self.regions else len(self.labels) + 1

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)


def check_spacing(what: str, spacing_mm: Sequence[float], hint: str = "") -> None:
    """Raises InvresError for anything but three sizes of at least `SMALLEST_MM`."""
    if not all(SMALLEST_MM <= side < math.inf for side in spacing_mm):
        raise InvresError(
            f"{what} must be three sizes of {SMALLEST_MM} mm or more, got {list(spacing_mm)}.",
            hint=hint,
        )


def check_axes(what: str, axes: Sequence[int]) -> None:
    """Raises InvresError for anything but different axes of a volume."""
    if any(axis not in (0, 1, 2) for axis in axes) or len({*axes}) < len(axes):
        raise InvresError(f"{what} are 0, 1 and 2 (D, H, W), each once; got {list(axes)}.")


def check_one_piece(scheme: LabelScheme, one_piece: bool) -> None:
    """Raises InvresError for regions, of which each is counted on its own and not in the label map."""
    if one_piece and scheme.regions:
        raise InvresError("one_piece is for labels that exclude one another, but scheme.regions is true.")


@dataclass(frozen=True)
class Recipe:
    """A named training configuration: what `Resources/Recipes/*.json` holds.

    spacing_mm: target spacing (D, H, W canonical); None takes the training cases' median.
    clip_hu: Hounsfield units that CT channels are clipped to; None takes the training cases' (see `make_plan`).
    window: voxels (D, H, W) of the sliding window that the model will segment with; (0, 0, 0) = the training patch.
    crop: what the data set's images were cut out around, if they do not show all.
    label_maps: train on images synthesised from label maps alone; the data are then a folder of label maps.
    labels: what the model tells apart, by the values of the label maps. With label_maps only: other data sets say it.
    one_piece: all labels together are one connected structure; the model leaves out pieces that hang loose.
    mirror_axes: the model averages predictions of images mirrored along these; the training has to mirror along them.
    enhancement: image quality transfer instead of segmentation; the data are then scans without labels.
    """

    name: str = "default"
    description: str = ""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    spacing_mm: tuple[float, float, float] | None = None
    clip_hu: tuple[float, float] | None = None
    window: Triple = (0, 0, 0)
    crop: CropPlan | None = None
    label_maps: LabelMapConfig | None = None
    labels: tuple[Label, ...] = ()
    one_piece: bool = False
    mirror_axes: tuple[int, ...] = ()
    enhancement: EnhancementConfig | None = None

    def __post_init__(self) -> None:
        if self.spacing_mm is not None:
            check_spacing("The recipe's spacing_mm", self.spacing_mm)
        if self.clip_hu is not None and not self.clip_hu[0] < self.clip_hu[1]:
            raise InvresError(f"The recipe's clip_hu must be a lower and a higher number, got {list(self.clip_hu)}.")
        if (self.enhancement is not None) != self.network.enhances:
            does = ("segments", "enhances")
            raise InvresError(
                f"The recipe {self.name} {does[self.enhancement is not None]} images, but its network "
                f"{self.network.name} {does[self.network.enhances]} them.",
                hint=f"Enhancing needs one of {', '.join(ENHANCEMENT_NETWORKS)}, and the key enhancement.",
            )
        check_axes(f"In the recipe {self.name}, mirror_axes", self.mirror_axes)
        if self.label_maps is not None and self.label_maps.mirrored:
            trained: tuple[int, ...] = (2,)
        else:
            trained = self.augmentation.flip_axes
        if unseen := sorted({*self.mirror_axes} - {*trained}):
            raise InvresError(
                f"The recipe {self.name} predicts mirrored along axis {unseen[0]}, along which it does not train.",
                hint="Name the same axes in augmentation.flip_axes, or leave mirror_axes out.",
            )
        if bool(self.labels) != (self.label_maps is not None):
            raise InvresError(
                f"The recipe {self.name} must give labels and label_maps together, or neither of them.",
                hint="Leave labels out for a data set with images: it states its labels itself.",
            )

    @property
    def window_or_patch(self) -> Triple:
        """The window that the trained model segments with."""
        return self.window if min(self.window) > 0 else self.training.patch

    @staticmethod
    def read(path: Path) -> Recipe:
        """Reads a recipe file. Raises InvresError for unreadable JSON, unknown keys and wrong types."""
        try:
            # Editors on Windows put a byte order mark in front.
            data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise InvresError(f"There is no recipe file {path}.", hint="Check the path for a typing mistake.") from None
        except (OSError, ValueError) as error:
            raise InvresError(f"The recipe {path} is not readable JSON: {error}.") from None
        return from_dict(Recipe, data, f"recipe {Path(path).name}")
