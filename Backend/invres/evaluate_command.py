"""`invres evaluate`: scores files against references, trainings on what they held out, or a model that enhances."""

from __future__ import annotations

import argparse

from . import InvresError
from .console import load_torch, say
from .enhance_command import evaluate_enhancement
from .events import Reporter
from .files import write_json
from .outputs import check_report

__all__ = ["evaluate"]


def evaluate(options: argparse.Namespace, report: Reporter) -> None:
    files = (options.predictions, options.references)
    ways = (files != (None, None), options.trained is not None, options.model is not None)
    if sum(ways) != 1 or (ways[0] and None in files):
        raise InvresError(
            "Scoring needs either --predictions and --references, or --run, or --model.",
            hint="Give two folders of label maps, the folders of trainings, or a model that enhances and scans as "
            "--data.",
            code="usage",
        )
    check_report(options.output)
    if options.model is not None:
        evaluate_enhancement(options, report)
        return
    from .evaluation import evaluate as score_files
    from .evaluation import score_pairs, summary_table

    if options.trained is None:
        from .cases import read_dataset

        dataset = read_dataset(options.data, checked=False) if options.data else None
        scheme = dataset.scheme if dataset else None
        patients = {case.name: case.patient for case in dataset.cases} if dataset else None
        metrics = score_files(*files, scheme, report, options.tolerance, patients)
    else:
        load_torch(report)
        from .heldout import segment_folds
        from .trainingrun import choosing_names

        pairs, patients, scheme = segment_folds(options.trained, options.data, options.device, report)
        metrics = score_pairs(pairs, scheme, report, options.tolerance, patients)
        metrics["epoch_chosen_on"] = [name for run in options.trained for name in choosing_names(run)]
    write_json(options.output, metrics, "metrics")
    say(report, summary_table(metrics))
    if chosen := metrics.get("epoch_chosen_on"):
        epoch = "epoch" if len(options.trained) == 1 else "epoch of each training"
        say(report, f"\nThe {epoch} was chosen by the Dice of {len(chosen)} of these cases, which flatters the scores.")
    say(report, f"\nWritten: {options.output}")
    report.result(output=str(options.output), summary=metrics["summary"])
