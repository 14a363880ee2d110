"""The volumes of all cases of a batch as a table (CSV), with the columns that `invres segment --data` writes."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .BatchCase import ACCEPTED, DONE, EDITED, FAILED, BatchCase, resultStem
from .WholeFile import writeWhole

__all__ = ["freeTableName", "writeTable"]

TABLE, SUFFIX = "volumes", ".csv"
BYTE_ORDER_MARK = "\ufeff"
"""Without it, spreadsheets on Windows read names with umlauts in another encoding."""
REMARKS = {EDITED: "Corrected by hand.", ACCEPTED: "Accepted in the review."}
"""Not in the language of the panel, as nothing is in the table: other programs read it."""


def freeTableName(folder: Path) -> str:
    """What the table of a folder can be called without writing over a file that is there."""
    name, number = f"{TABLE}{SUFFIX}", 1
    while (folder / name).exists():
        number += 1
        name = f"{TABLE}_{number}{SUFFIX}"
    return name


def writeTable(path: Path, cases: Sequence[BatchCase]) -> None:
    """A line for each case of files that is done or has failed. Raises OSError; the file is whole or as it was."""
    ended = [case for case in cases if case.state in (DONE, FAILED) and not case.inScene]
    labels = list(dict.fromkeys(label for case in ended for label in case.volumesMl))
    counts = Counter(case.name for case in ended)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["case", *(f"{label} (mL)" for label in labels), "confidence", "remarks"])
    for case in sorted(ended, key=lambda case: (case.name, case.fileName)):
        name = case.name if counts[case.name] == 1 else resultStem(case.fileName)  # the result tells them apart
        volumes = [case.volumesMl.get(label, "") for label in labels]
        remarks = " ".join(filter(None, (case.message, REMARKS.get(case.review, ""))))
        table.writerow([name, *volumes, "" if case.confidence is None else case.confidence, remarks])
    writeWhole(path, BYTE_ORDER_MARK + text.getvalue())
