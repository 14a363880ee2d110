"""Which labels of a model those of a data set are: settled before any is dropped or begun anew without a word."""

from __future__ import annotations

import dataclasses

from . import InvresError
from .config import LabelScheme
from .events import SILENT, Reporter
from .transfer import match_names

__all__ = ["check_known", "named_by_value", "shared_labels"]


def named_by_value(scheme: LabelScheme, base: LabelScheme, model: str, report: Reporter = SILENT) -> LabelScheme:
    """The data's labels, under the model's names where the data have none of their own and the very same values.

    base, model: the model's labels and its name.
    """
    names = {label.output_value: label.name for label in base.labels}
    invented = all(label.name == f"label_{label.output_value}" for label in scheme.labels)
    if not invented or base.regions or shared_labels(scheme, base):
        return scheme
    if not names or {label.output_value for label in scheme.labels} != names.keys():
        return scheme
    told = ", ".join(f"{value} {name}" for value, name in names.items())
    report.note(f"The data do not name their labels, so their values are taken as those of {model}: {told}.")
    labels = (dataclasses.replace(label, name=names[label.output_value]) for label in scheme.labels)
    return dataclasses.replace(scheme, labels=tuple(labels))


def check_known(scheme: LabelScheme, base: LabelScheme, model: str) -> None:
    """Raises InvresError, code `other_labels`, for data of which no label is one of the model's."""
    if not scheme.labels or not base.labels or shared_labels(scheme, base):
        return
    written = ", ".join(f'"{label.name}": {label.output_value}' for label in base.labels)
    raise InvresError(
        f"None of the labels of the data ({', '.join(scheme.names)}) is one of {model} ({', '.join(base.names)}).",
        hint=f'Name them in dataset.json, as "labels": {{"background": 0, {written}}}, or add --new-labels if '
        "all are new to the model.",
        code="other_labels",
    )


def shared_labels(scheme: LabelScheme, base: LabelScheme) -> bool:
    """Whether any label of the one is a label of the other."""
    return any(place is not None for place in match_names(scheme.names, base.names))
