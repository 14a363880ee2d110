"""The files that a verb is to write: refused before any work where that could not, or must not, be done after it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import InvresError
from .files import SEGMENTATION, WRITABLE_ENDINGS

__all__ = [
    "beside",
    "check_comparison",
    "check_outputs",
    "check_provenance",
    "check_report",
    "check_table",
    "same_file",
    "with_ending",
]

ANOTHER = "Choose another name."


def check_outputs(outputs: Sequence[Path], inputs: Iterable[Path], also: str = " and .seg.nrrd") -> None:
    """Raises InvresError for a volume file that cannot be written, that is one of `inputs`, or is named twice.

    inputs: files and DICOM folders; nothing is written into the latter. also: said of the allowed endings.
    """
    read = list(inputs)
    for number, path in enumerate(outputs):
        _check_name(path, also)
        for given in read:
            if same_file(path, given):
                raise InvresError(f"{path} is an input and would be overwritten.", hint=ANOTHER, code="output_is_input")
            if given.is_dir() and path.resolve().parent == given.resolve():
                raise InvresError(
                    f"{path} would be written into the DICOM folder {given}, which is an input.",
                    hint="Choose another folder.",
                    code="output_is_input",
                )
        if any(same_file(path, other) for other in outputs[:number]):
            raise InvresError(f"{path} would be written twice, with different content.", hint=ANOTHER)
        _check_folder(path)


def check_report(path: Path) -> None:
    """Raises InvresError for a JSON file that cannot be written, and for a file there that is no earlier report."""
    _check_json(path, "summary", "scores")


def check_comparison(path: Path, results: Sequence[Path]) -> None:
    """The same for what `invres compare` writes; results: what it compares, which it never overwrites."""
    if any(same_file(path, given) for given in results):
        raise InvresError(f"{path} is an input and would be overwritten.", hint=ANOTHER, code="output_is_input")
    _check_json(path, "compared", "a comparison")


def check_provenance(path: Path) -> None:
    """Raises InvresError for a JSON file that cannot be written, and for a file there that is no earlier provenance."""
    if path.suffix.lower() != ".json":
        raise InvresError(f"{path.name} cannot be the provenance, which is a .json file.", hint=ANOTHER)
    _check_json(path, "model_sha256", "a provenance")


def check_table(path: Path, first_title: str) -> None:
    """Raises InvresError for a CSV file that cannot be written, and for a file there that is no earlier table.

    first_title: of the first column of every such table."""
    if path.suffix.lower() != ".csv":
        raise InvresError(f"{path.name} cannot be the table of volumes, which is a .csv file.", hint=ANOTHER)
    _check_place(path, _begins_with(path, f"\ufeff{first_title},"), "a table of volumes")


def _begins_with(path: Path, text: str) -> bool:
    try:
        with open(path, "rb") as stream:
            return stream.read(len(text.encode())) == text.encode()
    except OSError:
        return False


def _check_json(path: Path, key: str, what: str) -> None:
    """key: that every file of the kind has. what: the kind, in words."""
    _check_place(path, _has_key(path, key), what)


def _check_place(path: Path, is_earlier: bool, what: str) -> None:
    """is_earlier: whether the file that is there, if one is, is of the kind `what`."""
    if path.is_dir():
        raise InvresError(f"{path} is a folder, not a file that can be written.", hint="Add a file name.")
    if path.exists() and not is_earlier:
        raise InvresError(
            f"{path} is there already, holds something else than {what}, and would be overwritten.",
            hint=ANOTHER,
            code="output_is_input",
        )
    _check_folder(path)


def _has_key(path: Path, key: str) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and key in content


def with_ending(path: Path) -> Path:
    """A name without any ending is the base of one with .nii.gz."""
    return path if path.suffix else path.with_name(f"{path.name}.nii.gz")


def beside(path: Path, name: str) -> Path:
    """FOLDER/base_name.ending for FOLDER/base.ending, with the name made safe for file systems."""
    ending = max((e for e in WRITABLE_ENDINGS if path.name.lower().endswith(e)), key=len)
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    return path.with_name(f"{path.name[: -len(ending)]}_{safe}{ending}")


def _check_name(path: Path, also: str) -> None:
    if not also and path.name.lower().endswith(SEGMENTATION):
        # It would be written as an image, which a program that goes by the ending takes for labels.
        raise InvresError(
            f"{path.name} has the ending of a segmentation, but an image is written: the allowed endings are "
            f"{', '.join(WRITABLE_ENDINGS)}.",
            hint="Choose one of these endings.",
        )
    if not path.name.lower().endswith(WRITABLE_ENDINGS):
        raise InvresError(
            f"{path.name} cannot be written: the allowed endings are {', '.join(WRITABLE_ENDINGS)}{also}.",
            hint="Choose one of these endings.",
        )
    if path.is_dir():
        raise InvresError(f"{path} is a folder, not a file that can be written.", hint="Add a file name.")


def _check_folder(path: Path) -> None:
    """The nearest folder that is there must take new files; the ones below it are made when the file is written."""
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise InvresError(f"{path} cannot be written, for {folder} is a file.", hint=ANOTHER)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvresError(
            f"{path} cannot be written: you may not write to the folder {folder}.",
            hint="Choose another folder, or change its permissions.",
            code="write_failed",
        )


def same_file(one: Path, other: Path) -> bool:
    """Whether two names are one file: links and other spellings of a folder count, and case where the disk says so."""
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return one.resolve() == other.resolve()
