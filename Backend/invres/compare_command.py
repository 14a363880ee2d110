"""`invres compare`: two results of `invres evaluate` on the same cases, and what their difference proves."""

from __future__ import annotations

import argparse

from .console import say
from .events import Reporter
from .files import write_json
from .outputs import check_comparison

__all__ = ["compare"]


def compare(options: argparse.Namespace, report: Reporter) -> None:
    if options.output is not None:
        check_comparison(options.output, (options.a, options.b))
    from .resultcomparison import compare as compared
    from .resultcomparison import comparison_table, read_result

    content = compared(read_result(options.a), read_result(options.b), report)
    if options.output is not None:
        write_json(options.output, content, "comparison")
    say(report, comparison_table(content))
    if options.output is not None:
        say(report, f"\nWritten: {options.output}")
    report.result(output=None if options.output is None else str(options.output), **content)
