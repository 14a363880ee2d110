"""Volumes of labels in mL as a CSV file: a line for each case of a folder, or for each frame of a series."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .files import write_changed

__all__ = ["MARK", "TableLine", "write_table"]

MARK = "\ufeff"
"""What the file begins with: Excel takes one without it for another encoding."""


@dataclass(frozen=True)
class TableLine:
    """first: its values in the first columns. confidence: None where nothing was segmented; why say the remarks."""

    first: Sequence[object]
    volumes_ml: Mapping[str, float] = field(default_factory=dict)
    confidence: float | None = None
    remarks: str = ""


def write_table(path: Path, titles: Sequence[str], lines: Sequence[TableLine]) -> None:
    """Writes the table, whole or not at all, if it is not there already. titles: of the first columns.

    Labels stand in the order in which they come up first. Raises OSError where the disk refuses.
    """
    labels = list(dict.fromkeys(label for line in lines for label in line.volumes_ml))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*titles, *(f"{label} (mL)" for label in labels), "confidence", "remarks"])
    for line in lines:
        volumes = [line.volumes_ml.get(label, "") for label in labels]
        confidence = "" if line.confidence is None else line.confidence
        table.writerow([*line.first, *volumes, confidence, line.remarks])
    write_changed(path, MARK + text.getvalue())
