"""What the results of a batch are called in their folder: nothing is written over what is not of the same images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from .BatchCase import CORRECTED_SUFFIX, WAITING, BatchCase, endingOf, resultStem

__all__ = ["ResultNames"]

LONGEST_NAME = 60


class ResultNames:
    """The names that are taken in a folder, as it is now.

    folder: None for one that is not chosen yet. made: the names of results that batches have written there -> the
    `identity` of what they were made of, None where that is not known. cases: of the batch, with the names they have.
    Names that differ in upper and lower case only are one: on many disks they are one file.
    """

    def __init__(self, folder: Path | None, made: Mapping[str, tuple | None], cases: Iterable[BatchCase]) -> None:
        cases = [case for case in cases if case.fileName and not case.inScene]
        there = [path.name for path in folder.iterdir()] if folder is not None and folder.is_dir() else []
        self._there = {name.casefold(): name for name in there if endingOf(name)}
        owners = {**made, **{case.fileName: case.identity for case in cases if case.state != WAITING}}
        self._owners = {name.casefold(): owner for name, owner in owners.items()}
        self._cases = {resultStem(case.fileName).casefold(): case for case in cases}
        # Corrections are called after the stem of a result, whatever its ending was.
        corrected = {name.removesuffix(CORRECTED_SUFFIX) for name in self._there if name.endswith(CORRECTED_SUFFIX)}
        self._owned: dict[str, set[tuple | None]] = {}
        for name, owner in self._owners.items():
            if name in self._there or resultStem(name) in corrected:
                self._owned.setdefault(resultStem(name), set()).add(owner)
        for stem in corrected:
            self._owned.setdefault(stem, {None})

    def take(self, case: BatchCase, ending: str) -> None:
        """Gives a case the first name that is free for it, on any file system, with this one of `ENDINGS`."""
        plain = re.sub(r"[^\w.-]+", "_", case.name).strip("._")[:LONGEST_NAME] or "case"
        candidate, number = plain, 1
        while not self._isFree(candidate.casefold(), ending, case):
            number += 1
            candidate = f"{plain}_{number}"
        case.fileName = f"{candidate}{ending}"
        self._cases[candidate.casefold()] = case

    def earlier(self, case: BatchCase) -> list[str]:
        """The other files that batches have made of the same images, before the ending was another one."""
        ours = (name for name, owner in self._owners.items() if owner == case.identity)
        return sorted(self._there[name] for name in ours if name in self._there and name != case.fileName.casefold())

    def _isFree(self, stem: str, ending: str, case: BatchCase) -> bool:
        """Whether neither another case nor a file of other images, or of nobody knows what, has this name."""
        if self._cases.get(stem, case) is not case or self._owned.get(stem, {case.identity}) != {case.identity}:
            return False
        name = f"{stem}{ending}"
        return name not in self._there or self._owners.get(name) == case.identity
