"""How a segmentation came about: model, inputs, settings and versions, inside a .seg.nrrd or in a JSON file."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import InvresError, __version__
from .files import digest_of, write_changed

if TYPE_CHECKING:
    from .modelpackage import ModelPackage

__all__ = [
    "FIELD",
    "PARTS",
    "checked_record",
    "header_text",
    "inputs_told",
    "model_told",
    "provenance_told",
    "read_provenance",
    "software_told",
    "write_provenance",
]

FIELD = "InvResSegment.Provenance"
"""The field of a .seg.nrrd; the panel's attribute of a node is called so as well."""
MODEL = ("model", "model_version", "model_id", "model_sha256")
LATER = ("manifest_sha256", "locator", "device", "threads", "precision")
"""What records of earlier versions do not say; it is None then."""
PARTS = (
    *(*MODEL, "inputs", "missing_channels", "resampled_channels"),
    *("settings", "software", "device_title", *LATER),
)
"""What it consists of, all of it in the result of a segmentation. No date: the same again gives the same bytes."""
LIBRARIES = ("torch", "numpy", "scipy", "SimpleITK")
"""That compute what the voxels of a result depend on."""
HEADER_BYTES = 1 << 20  # of a file that is searched for the field


def model_told(package: ModelPackage) -> dict[str, str]:
    """Which model it was. The digest of the weights says nothing of how images are prepared for them; that of the
    manifest does."""
    manifest = package.manifest
    return {
        "model": manifest.name,
        "model_version": manifest.version,
        "model_id": manifest.id,
        "model_sha256": manifest.sha256,
        "manifest_sha256": package.manifest_digest(),
    }


def inputs_told(inputs: Mapping[str, Path | None]) -> list[dict[str, str]]:
    """Channel, name and digest of each file, without its folder, which may say whose it is; in the order of names.

    inputs: None for an image that was in memory, of which both are "".
    """
    return [
        {"channel": name, "file": path.name if path else "", "sha256": digest_of(path) if path else ""}
        for name, path in sorted(inputs.items())
    ]


def software_told() -> dict[str, str]:
    """The versions of what computes; "" where a library does not say its own."""
    versions = {name: str(getattr(import_module(name), "__version__", "")) for name in LIBRARIES}
    return {"invres": __version__, "python": platform.python_version(), **versions}


def header_text(record: Mapping[str, Any]) -> str:
    """The field of a .seg.nrrd. record: all of PARTS."""
    return json.dumps({"format_version": 1, **{key: record[key] for key in PARTS}}, ensure_ascii=False)


def write_provenance(path: Path, record: Mapping[str, Any], output: Path) -> None:
    """The same as a file, with the name of the result and the date (UTC). Raises InvresError where the disk refuses."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content = {**json.loads(header_text(record)), "output": output.name, "date": date}
    try:
        write_changed(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InvresError(
            f"{path} cannot be written: {error.strerror or error}.", hint="Free some space.", code="write_failed"
        ) from None


def read_provenance(path: Path) -> dict[str, Any]:
    """What a .seg.nrrd says of itself; from its header, without any other package.

    Raises InvresError for a file without a readable field.
    """
    try:
        with open(path, "rb") as stream:
            lines = stream.read(HEADER_BYTES).split(b"\n\n", 1)[0].split(b"\n")
    except OSError as error:
        raise InvresError(f"{path} cannot be read: {error.strerror or error}.") from None
    start = f"{FIELD}:=".encode()
    for line in lines:
        if line.startswith(start):
            text = line.removeprefix(start).decode("utf-8", "replace")
            # A header has line breaks and backslashes behind a backslash.
            text = re.sub(r"\\(.)", lambda match: {"n": "\n"}.get(match[1], match[1]), text)
            try:
                return checked_record(json.loads(text))
            except ValueError:
                break
    raise InvresError(
        f"{path} does not say how it was made.",
        hint="`invres segment` writes it into .seg.nrrd files; a program that saved one again may have left it out.",
    )


def checked_record(record: Any) -> dict[str, Any]:
    """The parts of a record, None for those that an earlier version lacks. Raises ValueError for anything else."""
    try:
        parts = {key: record.get(key) if key in LATER else record[key] for key in PARTS}
        # What a damaged one does not survive.
        provenance_told(parts)
        told = [*(one["sha256"] for one in parts["inputs"]), *((parts["locator"] or parts)[key] for key in MODEL)]
        if not all(isinstance(text, str) for text in told):
            raise TypeError
        return {"format_version": record.get("format_version", 1), **parts}
    except (KeyError, TypeError, AttributeError):
        raise ValueError("This is no provenance.") from None


def provenance_told(record: Mapping[str, Any]) -> list[str]:
    """The record for people, a line for each part."""
    files = [f"{one['channel']} = {one['file'] or 'in memory'}".removeprefix(" = ") for one in record["inputs"]]
    settings = {key: value for key, value in record["settings"].items() if value not in ([], False, None)}
    lines = [
        f"  model      {record['model']} {record['model_version']} (id {record['model_id'][:8]})",
        f"  inputs     {', '.join(files)}",
        *(f"  without    {name}" for name in record["missing_channels"]),
        *(f"  resampled  {name}, to the grid of the first channel" for name in record["resampled_channels"]),
        f"  settings   {', '.join(f'{key} {_shown(value)}' for key, value in settings.items())}",
        *([f"  located by {located['model']} {located['model_version']}"] if (located := record["locator"]) else []),
        f"  software   {', '.join(f'{name} {version}' for name, version in record['software'].items())}",
        f"  device     {record['device_title']}",
    ]
    return lines


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "yes" if value is True else str(value)
