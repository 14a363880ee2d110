"""`invres reproduce`: a table of a paper beside our own figures."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from . import InvresError, fixedbudget, furthertables, invrestables
from .console import load_torch, parse_bytes, say
from .events import Reporter, aligned
from .reproduction import HEADINGS, Request, Table, cells, find_table, tables

__all__ = ["reproduce"]

# The modules whose tables there are; importing them is what registers these.
MODULES = (invrestables, fixedbudget, furthertables)


def reproduce(options: argparse.Namespace, report: Reporter) -> None:
    if options.list or options.table is None:
        say(report, "\n".join(aligned([[table.name, table.title, table.source] for table in tables()])))
        say(report, "\n`invres reproduce TABLE` prints one of them.")
        report.result(tables=[{"name": t.name, "title": t.title, "source": t.source} for t in tables()])
        return
    table = find_table(options.table)
    metrics = _metrics(options.metrics, table)
    if options.vram and not table.takes_vram:
        raise InvresError(f"The table {table.name} does not depend on a card's memory.", hint="Leave --vram out.")
    vram_bytes = parse_bytes(options.vram) if options.vram else 0
    load_torch(report, "benchmark")
    device = _device(options.device) if options.device else ""
    from .benchmark import describe_machine
    from .benchmark import table as markdown

    found = table.make(Request(device, vram_bytes, metrics, report))
    machine, day = describe_machine(device or "cpu"), date.today().isoformat()
    shown = [heading for heading in HEADINGS if heading != "remark" or any(line[heading] for line in cells(found.rows))]
    say(report, f"{table.name}: {table.title}\n{table.source}\n{machine}, {day}\n")
    say(report, markdown(cells(found.rows), shown))
    say(report, "\n" + "\n\n".join(found.notes))
    report.result(
        table=table.name,
        title=table.title,
        source=table.source,
        machine=machine,
        date=day,
        rows=[{**dataclasses.asdict(row), "ratio": row.ratio} for row in found.rows],
        notes=list(found.notes),
    )


def _metrics(given: Sequence[str], table: Table) -> dict[str, Any]:
    """NETWORK=FILE, once for each network."""
    found: dict[str, Any] = {}
    for text in given:
        network, separator, file = text.partition("=")
        if not separator or network not in table.networks:
            known = f"its networks are {', '.join(table.networks)}" if table.networks else "it takes none"
            raise InvresError(
                f"--metrics {text} fits nothing in the table {table.name}: {known}.",
                hint=f"Write --metrics {table.networks[0]}=metrics.json." if table.networks else "Leave --metrics out.",
            )
        if network in found:
            raise InvresError(f"The metrics of {network} are given twice.", hint="Give them once.")
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise InvresError(f"There is no file {file}.", hint="`invres evaluate --output` writes it.") from None
        except (OSError, ValueError) as error:
            raise InvresError(f"{file} is not readable JSON: {error}.", hint="Evaluate again.") from None
        found[network] = content if isinstance(content, dict) else {}
    return found


def _device(name: str) -> str:
    from .devices import choose_device

    return str(choose_device(name))
