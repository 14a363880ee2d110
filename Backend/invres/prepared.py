"""Prepared cases on disk: each case is prepared once for a run and read by memory map afterwards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from . import Cancelled, InvresError
from .cases import Case, Dataset
from .config import PreparationPlan
from .configjson import to_dict
from .events import SILENT, Reporter
from .files import stamps_of
from .fingerprints import fingerprints
from .preprocessing import PreparedCase, prepare
from .volume import Geometry

__all__ = ["prepare_cases"]


def prepare_cases(
    dataset: Dataset,
    names: Sequence[str],
    plan: PreparationPlan,
    folder: Path,
    report: Reporter = SILENT,
    stopped: Callable[[], bool] = lambda: False,
) -> list[PreparedCase]:
    """The named cases as network input, from `folder` where they were prepared before with the same files and plan.

    Arrays are memory maps: the operating system keeps in memory what is used and fits.
    Raises InvresError for a case that cannot be read or prepared; Cancelled between two cases once `stopped` says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prepared = []
    report.progress("prepare.cases", 0, len(names))
    for count, name in enumerate(names, start=1):
        if stopped():
            raise Cancelled("Stopped while the cases were prepared.", hint="Give the same command again to go on.")
        case = dataset.case(name)
        home = folder / _key(dataset, case, plan)
        found = _read(home, name)
        if found is None:
            shutil.rmtree(home, ignore_errors=True)
            volumes, label = dataset.load(case, report)
            known = case.fingerprints or fingerprints(volumes)
            _write(home, replace(prepare(volumes, label, plan, dataset.scheme, name, report), fingerprints=known))
            found = _read(home, name)
            assert found is not None
        prepared.append(found)
        report.progress("prepare.cases", count, len(names))
    return prepared


def _key(dataset: Dataset, case: Case, plan: PreparationPlan) -> str:
    """A folder name that changes with the files, the plan and the labels."""
    said = to_dict(plan)
    said["aligned"] = dataset.aligned
    for key in ("normalise_first", "aligned"):
        if not said[key]:
            del said[key]  # what was prepared before this key was there stays good
    content = json.dumps([stamps_of((*case.images, case.label)), said, to_dict(dataset.scheme)])
    safe = "".join(c if c.isalnum() and c.isascii() else "_" for c in case.name)[:60]
    return f"{safe}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _write(home: Path, case: PreparedCase) -> None:
    temporary = home.with_name(home.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        np.save(temporary / "image.npy", case.image)
        if case.label is not None:
            np.save(temporary / "label.npy", case.label)
        grids = {"geometry": _to_json(case.geometry), "original": _to_json(case.original)}
        rest = {**grids, "absent": case.absent, "fingerprints": case.fingerprints}
        (temporary / "grids.json").write_text(json.dumps(rest), encoding="utf-8")
        for path in temporary.iterdir():
            with open(path, "rb+") as stream:
                os.fsync(stream.fileno())
        os.rename(temporary, home)
    except OSError as error:
        raise InvresError(
            f"The prepared case {case.name} could not be written to {home.parent} ({error.strerror or error}).",
            hint="Free some space and try again.",
            code="write_failed",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(home: Path, name: str) -> PreparedCase | None:
    """The case as it was written; None where it was not, or was damaged, as when the power fails."""
    try:
        return _read_whole(home, name)
    except (OSError, ValueError, EOFError, KeyError):
        return None


def _read_whole(home: Path, name: str) -> PreparedCase:
    rest = json.loads((home / "grids.json").read_text(encoding="utf-8"))
    label = home / "label.npy"
    return PreparedCase(
        name,
        np.load(home / "image.npy", mmap_mode="r"),
        np.load(label, mmap_mode="r") if label.exists() else None,
        _from_json(rest["geometry"]),
        _from_json(rest["original"]),
        tuple(rest.get("absent", ())),
        tuple(rest.get("fingerprints", ())),
    )


def _to_json(grid: Geometry) -> dict[str, object]:
    values = {field.name: getattr(grid, field.name) for field in dataclasses.fields(grid)}
    return {key: np.asarray(value).tolist() for key, value in values.items()}


def _from_json(values: dict[str, list]) -> Geometry:
    return Geometry(
        shape=tuple(values["shape"]),
        spacing_mm=tuple(values["spacing_mm"]),
        origin_mm=tuple(values["origin_mm"]),
        direction=np.asarray(values["direction"]),
    )
