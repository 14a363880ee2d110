"""Tables of the papers beside our own figures: the registry of all tables, and the form that each comes in.

A module adds a table by one function, which gets a `Request` and returns its `Comparison`, decorated with `table`.
Nothing here or in those modules imports torch before a table is made, so that the list answers at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import InvresError
from .events import SILENT, Reporter

__all__ = ["Comparison", "Request", "Row", "Table", "cells", "find_table", "table", "tables"]

HEADINGS = ("of", "figure", "published", "ours", "ratio", "remark")


@dataclass(frozen=True)
class Row:
    """One figure. of: the network or what else has it. published, ours: None where there is none; in one unit.

    Ours MUST be predicted, measured or read from an evaluation of the user's, never estimated or taken from a paper.
    """

    of: str
    figure: str
    published: float | None = None
    ours: float | None = None
    remark: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours to the published value."""
        return self.ours / self.published if self.ours is not None and self.published else None


@dataclass(frozen=True)
class Comparison:
    """notes: sentences below the table; what an empty cell needs to be filled is one of them."""

    rows: Sequence[Row]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Request:
    """What the user gave. device: to measure on; "" predicts without allocating. vram_bytes: of a card, 0 for none.

    metrics: what `invres evaluate` wrote, by the name of the network.
    """

    device: str = ""
    vram_bytes: int = 0
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    report: Reporter = SILENT


@dataclass(frozen=True)
class Table:
    """networks: those whose metrics it takes; metrics of others are a mistake. takes_vram: whether a card matters."""

    name: str
    title: str
    source: str
    make: Callable[[Request], Comparison]
    networks: tuple[str, ...] = ()
    takes_vram: bool = False


_TABLES: dict[str, Table] = {}


def table(
    name: str, title: str, source: str, networks: Sequence[str] = (), takes_vram: bool = False
) -> Callable[[Callable[[Request], Comparison]], Callable[[Request], Comparison]]:
    """Registers the function below it as the table `name`."""

    def register(make: Callable[[Request], Comparison]) -> Callable[[Request], Comparison]:
        _TABLES[name] = Table(name, title, source, make, tuple(networks), takes_vram)
        return make

    return register


def tables() -> list[Table]:
    """All tables by name."""
    return [_TABLES[name] for name in sorted(_TABLES)]


def find_table(name: str) -> Table:
    """Raises InvresError for a name that no table has."""
    if name not in _TABLES:
        near = difflib.get_close_matches(name, _TABLES, n=1)
        raise InvresError(
            f"There is no table {name!r}; the tables are {', '.join(sorted(_TABLES))}.",
            hint=f"Did you mean {near[0]}?" if near else "`invres reproduce --list` says what each of them is.",
        )
    return _TABLES[name]


def cells(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The rows as text under `HEADINGS`; what stands as in the row above is left out where that is the network."""
    found, above = [], ""
    for row in rows:
        texts = ("" if row.of == above else row.of, row.figure, *map(_number, (row.published, row.ours, row.ratio)))
        found.append(dict(zip(HEADINGS, (*texts, row.remark), strict=True)))
        above = row.of
    return found


def _number(value: float | None) -> str:
    """Three digits or the whole number; nothing for None."""
    if value is None:
        return ""
    if value == int(value) and (isinstance(value, int) or abs(value) >= 1000):
        return f"{int(value):,}"
    digits = 3 if abs(value) < 1 else 2
    return f"{value:.{digits}f}"
