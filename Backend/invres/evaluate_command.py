"""`invres evaluate`: scores files against references, or a training on the cases that it held out."""

from __future__ import annotations

import argparse

from . import InvresError
from .console import say
from .events import Reporter

__all__ = ["evaluate"]


def evaluate(options: argparse.Namespace, report: Reporter) -> None:
    from .cases import read_dataset
    from .evaluation import evaluate as score_files
    from .evaluation import score_pairs, summary_table, write_metrics

    files = (options.predictions, options.references)
    if (options.trained is None) != (None not in files) or (options.trained is not None and files != (None, None)):
        raise InvresError(
            "Scoring needs either --predictions and --references, or --run.",
            hint="Give two folders of label maps, or the folder of a training and its --data.",
            code="usage",
        )
    if options.trained is None:
        scheme = read_dataset(options.data, checked=False).scheme if options.data else None
        metrics = score_files(*files, scheme, report, options.tolerance)
    else:
        if options.data is None:
            raise InvresError("`invres evaluate --run` needs the data set of the training: --data.", code="usage")
        from .heldout import segment_held_out

        dataset = read_dataset(options.data, checked=False)
        pairs = segment_held_out(options.trained, dataset, options.device, report)
        metrics = score_pairs(pairs, dataset.scheme, report, options.tolerance)
    write_metrics(options.output, metrics)
    say(report, summary_table(metrics))
    say(report, f"\nWritten: {options.output}")
    report.result(output=str(options.output), summary=metrics["summary"])
