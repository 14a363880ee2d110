"""The manifest of a model package: all that is known of a model besides its weights."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field

from . import InvresError
from .config import LabelScheme, PreparationPlan, check_one_piece
from .configjson import from_dict, to_dict
from .enhancementconfig import EnhancementPlan
from .expectation import Expectation
from .mirroring import check_mirror
from .networkconfig import NetworkConfig, network_as_written
from .sides import Side, check_sides, sided_scheme

__all__ = [
    "FORMAT_VERSION",
    "PATCHES",
    "Manifest",
    "TrainingSummary",
    "check_name",
    "manifest_from_json",
    "manifest_to_json",
]

FORMAT_VERSION = 1
PATCHES = "validation patches"
"""What the scores of a model that enhances images are of, where others name a label."""


@dataclass(frozen=True)
class TrainingSummary:
    """How the weights came about; counts and versions only, nothing about patients.

    data: where the training data come from, in words. seconds: time spent training. channel_dropout: how often each
    channel was blanked. software: name -> version.
    """

    recipe: str = ""
    data: str = ""
    epochs: int = 0
    iterations: int = 0
    seconds: float = 0.0
    training_cases: int = 0
    validation_cases: int = 0
    engine: str = ""
    memory: str = ""
    precision: str = ""
    optimizer: str = ""
    seed: int = 0
    channel_dropout: float = 0.0
    software: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.schema.json` describes its JSON form to other programs.

    id: 32 hexadecimal digits, new for each saved package; parent: the id that this model was fine-tuned from, or "".
    created: UTC, ISO 8601. patch: training window in voxels (D, H, W). sha256, weights_bytes: of model.safetensors.
    expected: what training cases were like, for a warning where an image is unlike them.
    metrics: label name -> metric -> mean, sd, median, n, n_patients, ci95 (`summary` of `evaluation.evaluate`).
    sides: labels of scheme that segmenting divides into left and right (see `midline`); older manifests have none.
    one_piece: all labels together are one connected structure, so that segmenting leaves out loose pieces (`pieces`).
    mirror_axes: segmenting averages predictions of images mirrored along these axes (D, H, W).
    members: so many networks of this configuration, whose logits are averaged (`networks.ensemble`, `joining`).
    trained_on: `fingerprints` of the images that it and those before it learned from, sorted.
    enhancement: of a model that enhances images (image quality transfer) and has no labels; None if it segments.

    Raises InvresError for values that contradict one another or the format.
    """

    format_version: int = FORMAT_VERSION
    name: str
    id: str
    version: str = "1.0.0"
    created: str
    description: str = ""
    network: NetworkConfig
    plan: PreparationPlan
    scheme: LabelScheme
    patch: tuple[int, int, int]
    training: TrainingSummary = field(default_factory=TrainingSummary)
    metrics: dict = field(default_factory=dict)
    expected: Expectation = field(default_factory=Expectation)
    sides: tuple[Side, ...] = ()
    one_piece: bool = False
    mirror_axes: tuple[int, ...] = ()
    members: int = 1
    trained_on: tuple[str, ...] = ()
    enhancement: EnhancementPlan | None = None
    licence: str = ""
    intended_use: str = "Research; not a medical device."
    parent: str = ""
    sha256: str
    weights_bytes: int

    def __post_init__(self) -> None:
        _check_text(self.name)
        for key, digits in (("id", 32), ("parent", 32), ("sha256", 64)):
            value = getattr(self, key)
            if not re.fullmatch(f"[0-9a-f]{{{digits}}}", value) and not (key == "parent" and value == ""):
                raise InvresError(f"{key} must be {digits} hexadecimal digits, got {value!r}.")
        if min(self.patch) < 1:
            raise InvresError(f"patch must be three sizes of 1 or more, got {list(self.patch)}.")
        if min(self.plan.spacing_mm) <= 0:
            raise InvresError(f"plan.spacing_mm must be three sizes above 0, got {list(self.plan.spacing_mm)}.")
        if self.network.in_channels != len(self.plan.channels):
            raise InvresError(
                f"network.in_channels is {self.network.in_channels}, but plan names {len(self.plan.channels)} channels."
            )
        if len(self.plan.channels) == 1 and self.plan.channels[0].optional:
            raise InvresError("plan.channels has a single channel, which cannot be optional.")
        if self.members < 1 or (self.members > 1 and (self.network.enhances or self.network.vae is not None)):
            raise InvresError(
                f"members must be 1, or more for networks that segment and have no VAE branch, got {self.members}."
            )
        if (self.enhancement is not None) != self.network.enhances:
            raise InvresError(
                f"network.name is {self.network.name}, which {'enhances' if self.network.enhances else 'segments'} "
                f"images, but enhancement is {'not there' if self.enhancement is None else 'there'}."
            )
        if self.enhancement is not None:
            self._check_enhancement(self.enhancement)
        elif self.network.out_channels != self.scheme.out_channels:
            raise InvresError(
                f"network.out_channels is {self.network.out_channels}, but the labels of scheme need "
                f"{self.scheme.out_channels}."
            )
        check_sides(self.scheme, self.sides)
        check_one_piece(self.scheme, self.one_piece)
        check_mirror(self.scheme, self.mirror_axes)
        # Scores of single cases would carry the names of patients; scores by label cannot.
        known = (PATCHES,) if self.enhancement is not None else self.scheme.names
        strangers = [str(key) for key in self.metrics if key not in known]
        if strangers:
            raise InvresError(f"metrics has the entry {strangers[0]!r}, which is no label of scheme.")
        for label, of_label in self.metrics.items():
            if not isinstance(of_label, dict) or not all(isinstance(spread, dict) for spread in of_label.values()):
                raise InvresError(f"metrics[{label!r}] must map each metric to its mean, sd, median, n and ci95.")

    @property
    def output_scheme(self) -> LabelScheme:
        """The labels of what is written, where left and right could be told apart."""
        return sided_scheme(self.scheme, self.sides)

    def _check_enhancement(self, plan: EnhancementPlan) -> None:
        if self.scheme.labels:
            raise InvresError("A model that enhances images has no labels, but scheme.labels has some.")
        if {self.network.in_channels, self.network.out_channels} != {plan.channels}:
            raise InvresError(
                f"enhancement has {plan.channels} channels, but the network {self.network.in_channels} in and "
                f"{self.network.out_channels} out."
            )


def check_name(name: str) -> None:
    """Raises InvresError for what a new model cannot be called. Older ones with such a name are still read."""
    _check_text(name)
    # `--model` takes these for a path, so the model could not be named.
    if name in (".", "..") or "/" in name or "\\" in name:
        raise InvresError(
            f"The name of a model cannot be . or .. and has neither / nor \\, got {name!r}.",
            hint="Choose another name (--name), with - or _ instead.",
        )


def _check_text(name: str) -> None:
    if not name.strip() or not name.isprintable():
        raise InvresError(f"name must be printable text that is not empty, got {name!r}.")


def manifest_to_json(manifest: Manifest) -> bytes:
    """The manifest as the bytes of a JSON file. Raises InvresError for numbers that JSON does not know."""
    try:
        text = json.dumps(to_dict(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise InvresError("A manifest may hold only finite numbers.", hint="Leave undefined scores out.") from None
    return f"{text}\n".encode()


def manifest_from_json(data: bytes) -> Manifest:
    """The manifest in the bytes of a JSON file. Raises InvresError; its message goes on from "The manifest ..."."""
    try:
        values = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InvresError("is not readable JSON.") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or version < 1:
        raise InvresError("has no format_version.")
    if version > FORMAT_VERSION:
        raise InvresError(
            f"has format {version}; this InvResSegment reads up to {FORMAT_VERSION}.", hint="Update InvResSegment."
        )
    required = [f.name for f in dataclasses.fields(Manifest) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise InvresError(f"lacks {', '.join(missing)}.")
    if isinstance(values["network"], dict):
        values["network"] = network_as_written(values["network"])
    try:
        return from_dict(Manifest, values, "manifest")
    except InvresError as error:
        raise InvresError(f"is wrong: {error.message}", hint=error.hint) from None
    except OverflowError:
        raise InvresError("holds a number too large to use.") from None


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")
