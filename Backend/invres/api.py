"""invres from Python: a model that is loaded once and segments images in memory, and every verb as a function.

What stands here is reached as `invres.load_model` and so on; torch is imported when a model is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from . import Cancelled, InvresError, OutOfMemory
from .console import load_torch, segmenter_named
from .events import SILENT, JsonReporter
from .faults import fault_of
from .interruption import stop_when_saved
from .modelpackage import ModelPackage
from .segmentoptions import SegmentOptions

if TYPE_CHECKING:
    import SimpleITK

    from .inference import Locate, NetworkKeeper, Source
    from .segmentation import Segmentation
    from .volume import Volume

    Image = str | os.PathLike[str] | SimpleITK.Image | Volume

__all__ = ["Model", "load_model", "run"]

Listener = Callable[[dict[str, Any]], object]


class Flag(Protocol):
    """What says that a run is to be cancelled: a `threading.Event`, for example."""

    def is_set(self) -> bool: ...


def load_model(model: str | os.PathLike[str], device: str = "auto") -> Model:
    """The model with its weights on a device, ready to segment.

    model: a name, as `invres models list` has it, a folder, or an `.invres` file. device: "auto", "cpu" or "cuda:0".
    Raises InvresError for a model or device that is not there, and where torch is missing or damaged.
    """
    with _told_plainly():
        package = segmenter_named(os.fspath(model))
        load_torch(SILENT)
        from .inference import NetworkKeeper

        return Model(package, device, NetworkKeeper())


def run(
    *arguments: str | os.PathLike[str] | float, on_event: Listener | None = None, cancel: Flag | None = None
) -> dict[str, Any]:
    """Runs a verb and returns its result: `run("evaluate", "--predictions", a, "--references", b, "--output", c)`.

    arguments: what the command line takes, one word each. The result is the `result` event, whose fields
    Backend/README.md lists ({} for --help). Nothing is printed.
    on_event: gets each event as a dictionary: progress, epoch, warning, note... What it raises ends the run.
    cancel: looked at whenever there is an event. Trainings save first, as at Ctrl-C.
    Raises InvresError for whatever the command line would refuse, Cancelled, OutOfMemory; never SystemExit. A fault of
    the program keeps its own class.
    """
    words = [os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in arguments]
    if "worker" in words[:1]:
        raise InvresError("A worker is a process of its own.", hint="Start `invres worker`.", code="usage")
    from .cli import perform

    told = _Told(on_event, cancel)
    with _told_plainly(), contextlib.suppress(SystemExit):
        perform(words, told)
    return told.found


class Model:
    """A loaded model, see `load_model`. May be used from several threads; one of them segments at a time."""

    def __init__(self, package: ModelPackage, device: str, keeper: NetworkKeeper) -> None:
        from .devices import choose_device

        self._package, self._keeper, self._lock = package, keeper, threading.Lock()
        self._locators: dict[str, Model] = {}
        chosen = choose_device(device)
        self._keeper.network(package, chosen)
        self.device = str(chosen)
        manifest = package.manifest
        self.name, self.version, self.id = manifest.name, manifest.version, manifest.id
        self.channels = tuple(channel.name for channel in manifest.plan.channels)
        self.optional_channels = tuple(channel.name for channel in manifest.plan.channels if channel.optional)
        self.label_names = {label.output_value: label.name for label in manifest.output_scheme.labels}

    def __repr__(self) -> str:
        return f"<Model: {self.name} {self.version} of {', '.join(self.channels)} on {self.device}>"

    def segment(
        self,
        images: Image | Mapping[str, Image],
        *,
        locate: Model | str | os.PathLike[str] | None = None,
        overlap: float = 0.5,
        mirror: Sequence[int] | None = None,
        window: Sequence[int] | None = None,
        roi: Sequence[float] | None = None,
        sides: bool = True,
        keep_pieces: bool = False,
        align: bool = False,
        probabilities: bool = False,
        on_event: Listener | None = None,
        cancel: Flag | None = None,
    ) -> Segmentation:
        """Segments one case: what `invres segment` with the options of these names does, and the same voxels.

        images: an image, or one for each channel by its name. An image is a path (also of a DICOM folder), a SimpleITK
        image, or what `image_from_array` makes of an array; one of four axes has all channels.
        locate: for a model of crops, the model that finds their place in a whole image. overlap: of windows.
        mirror: axes to average mirrored predictions along, 0 top to bottom, 1 front to back, 2 left to right; None as
        the model wants it, () none. window: voxels along these axes; None = the model's.
        roi: R0, R1, A0, A1, S0, S1, a box in RAS mm. sides: left and right are told apart where the model knows how.
        keep_pieces: loose pieces stay. align: channels on other grids are resampled to that of the first.
        probabilities: kept in the result, which takes memory for each label.
        on_event, cancel: as for `run`.
        Warnings are in the result, and are given as Python warnings too.
        Raises InvresError for images or options that do not fit the model, Cancelled, OutOfMemory.
        """
        options = SegmentOptions(
            device=self.device,
            overlap=overlap,
            mirror_axes=None if mirror is None else tuple(map(int, mirror)),
            window=_triple(window),
            roi_mm=tuple(map(float, roi or ())),
            sides=sides,
            one_piece=not keep_pieces,
            align=align,
        )
        told = _Told(on_event, cancel)
        with self._lock, _told_plainly():
            from .inference import segment_inputs

            other = None if locate is None else self._located_by(locate)
            found = segment_inputs(
                self._package,
                _sources(images, told),
                options,
                told,
                keeper=self._keeper,
                locate=None if other is None else other._finder(self._package),
                locator=None if other is None else other._package,
            )
        for sentence in told.warnings:
            warnings.warn(sentence, stacklevel=2)
        return dataclasses.replace(
            found,
            parts=found.parts if probabilities else (),
            warnings=tuple(told.warnings),
            seconds=dict(found.seconds),
        )

    def _located_by(self, model: Model | str | os.PathLike[str]) -> Model:
        if isinstance(model, Model):
            return model
        name = os.fspath(model)
        if name not in self._locators:
            self._locators[name] = load_model(name, self.device)
        return self._locators[name]

    def _finder(self, package: ModelPackage) -> Locate:
        from .locating import finder

        return finder(package, self._package, self.device, self._keeper)


class _Told(JsonReporter):
    """Hands events on, keeps warnings and the result, and ends or stops the run at an event once it is cancelled.

    A reporter for a program, so that nothing is printed.
    """

    def __init__(self, on_event: Listener | None, cancel: Flag | None) -> None:
        super().__init__()
        self._on_event, self._cancel = on_event, cancel
        self.warnings: list[str] = []
        self.found: dict[str, Any] = {}

    def emit(self, event: dict[str, Any]) -> None:
        if event["event"] == "warning":
            self.warnings.append(event["message"])
        elif event["event"] == "result":
            self.found = {key: value for key, value in event.items() if key != "event"}
        if self._on_event is not None:
            self._on_event(dict(event))
        if self._cancel is None or event["event"] != "progress" or not self._cancel.is_set():
            return
        if not stop_when_saved():
            raise Cancelled()


@contextlib.contextmanager
def _told_plainly() -> Iterator[None]:
    """What is no fault of the program is raised as InvresError, in the words of the command line."""
    try:
        yield
    except InvresError:
        raise
    except Exception as error:
        fault = fault_of(error)
        if fault.code == "internal":
            raise
        if fault.exit_code == OutOfMemory.exit_code:
            raise OutOfMemory(fault.message, hint=fault.hint) from error
        raise InvresError(fault.message, hint=fault.hint, code=fault.code) from error


def _sources(images: Image | Mapping[str, Image], report: JsonReporter) -> dict[str, Source]:
    given = images if isinstance(images, Mapping) else {"": images}
    return {name: _source(image, report) for name, image in given.items()}


def _source(image: Image, report: JsonReporter) -> Source:
    if isinstance(image, (str, os.PathLike)):
        return Path(image)
    from .memoryimages import volumes_in

    return volumes_in(image, report)


def _triple(window: Sequence[int] | None) -> tuple[int, int, int]:
    if window is None:
        return 0, 0, 0
    if len(window) != 3:
        raise InvresError(f"A window has three sizes, got {len(window)}.")
    depth, height, width = map(int, window)
    return depth, height, width
