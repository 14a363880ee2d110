"""The files of a segmentation: which is which channel of the model, and where the results may go; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from . import InvresError
from .config import ChannelPlan, LabelScheme
from .files import SEGMENTATION
from .manifest import Manifest
from .outputs import beside, check_outputs, with_ending

__all__ = [
    "check_files",
    "check_locatable",
    "check_results",
    "check_series_files",
    "counted",
    "each_channel",
    "files_of_channels",
    "maps_of",
    "named_inputs",
    "names_of_maps",
    "series_files",
]

T = TypeVar("T")


def named_inputs(texts: Sequence[str], channels: Sequence[ChannelPlan]) -> dict[str, Path]:
    """Channel -> file from CHANNEL=FILE; "" for a file without a channel. Raises InvresError for one given twice."""
    inputs: dict[str, Path] = {}
    for text in texts:
        channel, separator, path = text.partition("=")
        # A path may hold "=" itself.
        if not separator or Path(text).exists():
            channel, path = "", text
        if not path:
            raise InvresError(
                f"The path after {text} is empty." if text else "The path of an input is empty.",
                hint=f"Give a file or a DICOM folder: {each_channel(channels)}.",
            )
        if channel in inputs:
            raise InvresError(
                f"The channel {channel} is given twice." if channel else "Two inputs have no channel name.",
                hint=f"Give each channel once, with its name: {each_channel(channels)}.",
            )
        inputs[channel] = Path(path)
    return inputs


def files_of_channels(
    channels: Sequence[ChannelPlan], inputs: Mapping[str, T], model: str
) -> Sequence[T | None] | None:
    """A file, or what stands in its place, for each of the model's channels, in its order, None for an optional one
    that is not given. None for all of them where one file, which has no name, has them all.

    Names are matched whatever their case. Raises InvresError for other channels than the model's, and for a file that
    is not there.
    """
    for path in inputs.values():
        if isinstance(path, Path) and not path.exists():
            raise InvresError(f"There is no file {path}.", hint="Check the spelling and the folder.")
    if list(inputs) == [""]:
        return None
    names = [channel.name for channel in channels]
    given = {key.casefold(): path for key, path in inputs.items()}
    needed = {channel.name.casefold() for channel in channels if not channel.optional}
    if len(given) < len(inputs) or not needed <= given.keys() <= {name.casefold() for name in names}:
        got = ", ".join(name or "a file without a channel name" for name in inputs) or "none"
        optional = ", ".join(channel.name for channel in channels if channel.optional)
        may_miss = f" It can do without some of {optional}." if optional else ""
        raise InvresError(
            f"The model {model} takes {counted(names)}; got {got}.",
            hint=f"Give each once: {each_channel(channels)}.{may_miss}",
        )
    return [given.get(name.casefold()) for name in names]


def check_files(
    manifest: Manifest,
    inputs: Mapping[str, Path],
    output: Path,
    probabilities: Path | None,
    uncertainty: Path | None = None,
) -> None:
    """Raises InvresError, before any work, for inputs that are not the model's or not there, and for results that
    could not be written or would take the place of an input.
    """
    check_results(manifest.scheme, list(inputs.values()), output, probabilities, uncertainty)
    files_of_channels(manifest.plan.channels, inputs, manifest.name)


def check_results(
    scheme: LabelScheme, inputs: Sequence[Path], output: Path, probabilities: Path | None, uncertainty: Path | None
) -> None:
    """The same for the results alone. scheme: the labels of the network."""
    outputs = [output]
    if probabilities is not None:
        check_outputs([with_ending(probabilities)], inputs)
        outputs += maps_of(probabilities, scheme).values()
    if uncertainty is not None:
        check_outputs([uncertainty], inputs, also="")
        outputs.append(uncertainty)
    check_outputs(outputs, inputs)


def check_series_files(manifest: Manifest, inputs: Mapping[str, Path], output: Path) -> None:
    """The same for a series of frames, whose result is one 4D label map."""
    if output.name.lower().endswith(SEGMENTATION):
        raise InvresError(
            f"{output.name} cannot hold a series: a {SEGMENTATION} is one segmentation, and the frames become one 4D "
            "label map.",
            hint="Give it the ending .nii.gz, which Slicer loads as a volume sequence, or .nrrd.",
        )
    series_files(manifest.plan.channels, inputs, manifest.name)
    check_outputs([output], inputs.values(), also="")


def series_files(channels: Sequence[ChannelPlan], inputs: Mapping[str, Path], model: str) -> Sequence[Path | None]:
    """As `files_of_channels`, for files of which each is one channel, in several frames or in one."""
    found = files_of_channels(channels, inputs, model)
    if found is not None:
        return found
    if len(channels) == 1:
        return [inputs[""]]
    raise InvresError(
        f"With --frames a 4D file is one channel in several frames, and the model {model} takes "
        f"{counted([channel.name for channel in channels])}.",
        hint=f"Give each with its name: {each_channel(channels)}.",
        code="usage",
    )


def check_locatable(manifest: Manifest) -> None:
    """Raises InvresError for a model that segments whole images, for which no other one finds the place."""
    if manifest.plan.crop is None:
        raise InvresError(
            f"{manifest.name} segments whole images, so there is nothing to locate.", hint="Leave --locate out."
        )


def maps_of(probabilities: Path, scheme: LabelScheme) -> dict[str, Path]:
    """Label of the network -> file of its probabilities; the background too, where labels exclude one another.

    probabilities: FILE of FILE_LABEL.nii.gz, with an ending that can be written, or none.
    """
    path = with_ending(probabilities)
    return {name: beside(path, name) for name in names_of_maps(scheme)}


def names_of_maps(scheme: LabelScheme) -> tuple[str, ...]:
    """What a network says probabilities of: its labels, and the background where they exclude one another."""
    return scheme.names if scheme.regions else ("background", *scheme.names)


def each_channel(channels: Sequence[ChannelPlan]) -> str:
    """How the inputs are given on the command line."""
    return " ".join(f"--input {channel.name}=FILE" for channel in channels)


def counted(names: Sequence[str]) -> str:
    """The channels for a sentence."""
    return f"the channel {names[0]}" if len(names) == 1 else f"the {len(names)} channels {', '.join(names)}"
