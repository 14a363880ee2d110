"""What can be said of training cases at once, before any file is written: what is missing, what does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slicer.i18n import tr as _

from . import GeometryDoctor, NodeConversion
from .CaseChannels import channelsOf, imagesOf, namedAs, presentChannels, usedChannels
from .LabelMapping import (
    UNKNOWN,
    LabelConflict,
    TrainedLabel,
    isLearned,
    labelOf,
    labelTable,
    undecided,
    unknownValue,
)
from .RunOptions import proofSentence
from .SceneCases import patientOf
from .SegmentExport import segmentationProblem, segmentNames
from .TrainingCases import MISSING_LABEL, TRAINING, VALIDATION, CaseRow, Finding, TrainingCases

__all__ = [
    "findingsOf",
    "labelNames",
    "labelsOf",
    "lackingAdvice",
    "lackingLabels",
    "patients",
    "problems",
    "summary",
    "tableOf",
    "unknownOf",
    "wrongCases",
]


def labelNames(cases: TrainingCases, row: CaseRow) -> list[str]:
    """What the case itself calls its labels."""
    if row.ofDataSet:
        return [label["name"] for label in cases.dataSets[row.dataSet].labels]
    if row.stored is not None:
        return list(row.stored.segments)
    return list(segmentNames(row.segmentation).values()) if row.segmentation is not None else []


def labelsOf(cases: TrainingCases, model: Any) -> tuple[TrainedLabel, ...]:
    """The labels that are trained on. Raises LabelConflict where the used cases contradict each other."""
    return labelTable(model, _segments(cases), _sets(cases), cases.choices)


def unknownOf(cases: TrainingCases, model: Any, table: Sequence[TrainedLabel]) -> int | None:
    """The value of voxels that take no part, None where there are none.

    table: what `labelsOf` gives. Raises LabelConflict as it does.
    """
    value, ofFiles = unknownValue(model, table, _sets(cases), cases.choices)
    known = [label.name for label in model.labels]
    drawn = any(labelOf(name, known, cases.choices) == UNKNOWN for name in _segments(cases))
    return value if drawn or ofFiles else None


def _segments(cases: TrainingCases) -> list[str]:
    """The names of all segments, each once: many cases have the same."""
    return list(dict.fromkeys(name for row in cases.used if not row.ofDataSet for name in labelNames(cases, row)))


def _sets(cases: TrainingCases) -> list[Any]:
    """The data sets that cases are used of."""
    return [cases.dataSets[path] for path in dict.fromkeys(row.dataSet for row in cases.used if row.ofDataSet)]


def findingsOf(
    cases: TrainingCases,
    row: CaseRow,
    model: Any,
    table: Sequence[TrainedLabel] | None = None,
    used: Sequence[str] | None = None,
) -> list[Finding]:
    """All findings of a case, the worst first; those of the data doctor are among them.

    table: what `labelsOf` gives, () where the cases contradict each other. used: what `usedChannels` gives. Both look
    at all cases, and are asked for once for many.
    """
    used = usedChannels(cases, model) if used is None else used
    channels = used or tuple(channel.name for channel in model.channels)
    needed, optional = _lacking(cases, row, model, channels)
    found = [Finding("error", sentence) for sentence in _problemsOf(cases, row, model, channels, needed)]
    if optional:
        text = _("It has no {names}; the model learns to do without.")
        found.append(Finding("note", text.format(names=", ".join(optional))))
    open_ = undecided(labelNames(cases, row), [label.name for label in model.labels], cases.choices)
    if open_:
        text = _("{names}: not among the model's labels; say under Labels what it stands for.")
        found.append(Finding("error", text.format(names=", ".join(open_))))
    elif row.used and all(finding.code != MISSING_LABEL for finding in row.findings):  # the doctor has seen the voxels
        found += _unlearned(cases, row, model, tableOf(cases, model) if table is None else table)
    found += row.findings
    order = ["error", "warning", "note"]
    return sorted(found, key=lambda finding: order.index(finding.severity))


def tableOf(cases: TrainingCases, model: Any) -> tuple[TrainedLabel, ...]:
    """As `labelsOf`; () where the cases contradict each other."""
    try:
        return labelsOf(cases, model)
    except LabelConflict:
        return ()


def _unlearned(cases: TrainingCases, row: CaseRow, model: Any, table: Sequence[TrainedLabel]) -> list[Finding]:
    """What others have and this one lacks: that there is none of it is what the case teaches."""
    lacking = lackingLabels(cases, row, model, table)
    if not lacking:
        return []
    known, names = [label.name for label in model.labels], ", ".join(lacking)
    if any(labelOf(name, known, cases.choices) == UNKNOWN for name in labelNames(cases, row)):
        text = _(
            "It has no {names}, which other cases have; outside of what is not known it teaches that there is none."
        )
        return [Finding("note", text.format(names=names))]
    text = _("It has no {names}, which other cases have; it teaches that there is none anywhere in the image.")
    return [Finding("warning", f"{text.format(names=names)} {lackingAdvice(row)}")]


def lackingLabels(cases: TrainingCases, row: CaseRow, model: Any, table: Sequence[TrainedLabel]) -> list[str]:
    """The labels that are trained on and that a case does not name; none of one that names nothing at all."""
    known = [label.name for label in model.labels]
    own = {labelOf(name, known, cases.choices) for name in labelNames(cases, row)}
    lacking = [label.name for label in table if label.name not in own]
    return lacking if len(lacking) < len(table) else []


def lackingAdvice(row: CaseRow) -> str:
    """What to do about a label that a case lacks. That one label is not known cannot be said, only that a place is."""
    if row.ofDataSet:
        return _(
            "Where that is wrong, draw it, give the voxels in question the value of `ignore`, or leave the case out."
        )
    return _(
        "Where that is wrong, draw it; or draw a segment over the places where it may be, and say under Labels that "
        "this segment is not known."
    )


def _lacking(cases: TrainingCases, row: CaseRow, model: Any, channels: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the channels that a case has no image of: what the model needs, and what it can do without.

    Where there is no image at all, none can be done without.
    """
    present = presentChannels(cases, row, model)
    lacking = [name for name in channels if name not in present]
    mayLack = {channel.name for channel in model.channels if channel.optional}
    if len(lacking) == len(channels):
        mayLack = set()
    return [name for name in lacking if name not in mayLack], [name for name in lacking if name in mayLack]


def _problemsOf(
    cases: TrainingCases, row: CaseRow, model: Any, channels: Sequence[str], missing: Sequence[str]
) -> list[str]:
    """channels: those that are trained on. missing: of them, what the case lacks and the model needs."""
    if row.ofDataSet:
        has = namedAs(channelsOf(cases, row), model)
        if not set(has) <= set(channels) or not set(missing) <= set(has):
            return [
                _("It has the channels {has}, but the other cases have {wanted}.").format(
                    has=", ".join(has), wanted=", ".join(channels)
                )
            ]
        return [_("It has no image of the channel {name}; leave it out.").format(name=name) for name in missing]
    if row.stored is not None:
        if not row.stored.segments:
            return [_("It has no segments, so there is nothing to learn from it; leave it out.")]
        return [_("It has no image of the channel {name}; leave it out.").format(name=name) for name in missing]
    if row.segmentation is None or row.segmentation.GetScene() is None:
        return [_("Its segmentation is not in the scene any more; remove the case.")]
    if missing:
        return [_("No volume is chosen for the channel {name}.").format(name=name) for name in missing]
    images = imagesOf(row, model)
    volumes = [images[name] for name in channels if name in images]
    unusable = [problem for volume in volumes if (problem := NodeConversion.exportProblem(volume))]
    if unusable:
        return unusable
    if len(set(volumes)) < len(volumes):
        return [_("One volume is chosen for two channels.")]
    if problem := segmentationProblem(row.segmentation, volumes[0]):
        return [problem]
    apart = [finding.sentence for finding in GeometryDoctor.examine(volumes) if finding.severity == "error"]
    hint = _("Align it in the tab Segment.")
    return [f"{apart[0]} {hint}"] if apart else []


def patients(cases: TrainingCases) -> dict[str, str]:
    """Key of each used case -> patient, as a number that tells nobody who that is."""
    numbers: dict[str, str] = {}
    found = {}
    for row in cases.used:
        if row.ofDataSet:
            who = f"{row.dataSet} {row.files.get('patient') or row.name}"
        else:
            first = next(iter(row.channels.values()), None)
            who = patientOf(first) if first is not None else row.key
            if row.stored is not None and row.stored.patient:
                who = row.stored.patient
        found[row.key] = numbers.setdefault(who, f"patient{len(numbers) + 1:02d}")
    return found


def wrongCases(cases: TrainingCases, findings: Mapping[str, Sequence[Finding]]) -> list[str]:
    """The names of used cases that cannot be learned from. findings: of each case, by its key."""
    return [row.name for row in cases.used if cases.worst(list(findings.get(row.key, ()))) == "error"]


def summary(
    cases: TrainingCases, model: Any, findings: Mapping[str, Sequence[Finding]]
) -> tuple[str, list[str], tuple[str, ...]]:
    """What will come of the cases: a severity and sentences, and severity and sentence on the proof (or nothing)."""
    rows = cases.used
    if model is None:
        return "note", [_("Choose the model to tune.")], ()
    if not rows:
        text = _("Add cases: images with a corrected segmentation each. One is enough to begin; ten are better.")
        return "note", [text], ()
    if wrong := wrongCases(cases, findings):
        text = _("{names}: choose the case in the table to see what is wrong.")
        return "error", [text.format(names=", ".join(wrong))], ()
    try:
        table = labelsOf(cases, model)
    except LabelConflict as conflict:
        return "error", [str(conflict)], ()
    named = [label.name for label in table]
    new = [label.name for label in table if label.new]
    gone = [label.name for label in model.labels if label.name not in named]
    sentences = [_("The tuned model will find: {names}.").format(names=", ".join(named))] if named else []
    if new:
        sentences.append(_("New to it: {names}.").format(names=", ".join(new)))
    if gone and named:
        text = _("It will not find {names} any more, because no case has it.")
        sentences.append(text.format(names=", ".join(gone)))
    known = [channel.name for channel in model.channels]
    channels = usedChannels(cases, model)
    strange = [name for name in channels if name not in known]
    if strange and not len(channels) == len(known) == 1:
        text = _("The model does not know the channel {names}, and begins anew with it.")
        sentences.append(text.format(names=", ".join(strange)))
    left = [name for name in known if name not in channels]
    if left and len(channels) < len(known):
        text = _("The tuned model will do without the channel {names}, because no case has it.")
        sentences.append(text.format(names=", ".join(left)))
    count, held = len(set(patients(cases).values())), sum(row.role == VALIDATION for row in rows)
    proof = ("warning" if count == 1 and not held else "note", proofSentence(count, held))
    return "warning" if (gone and named) or len(channels) < len(known) else "note", sentences, proof


def problems(cases: TrainingCases, model: Any, findings: Mapping[str, Sequence[Finding]]) -> list[str]:
    """Why the cases as they are cannot be trained on, one plain sentence each; none where they can.

    findings: of each case, by its key.
    """
    rows = cases.used
    if not rows:
        return [_("Add at least one case to train on.")]
    sentences = []
    for row in rows:
        errors = [finding.sentence for finding in findings.get(row.key, ()) if finding.severity == "error"]
        if errors:
            sentences.append(f"{row.name}: {errors[0]}")
    if sentences:
        return sentences
    sides: dict[str, set[str]] = {TRAINING: set(), VALIDATION: set()}
    people = patients(cases)
    for row in rows:
        sides[row.role].add(people[row.key])
    if not sides[TRAINING]:
        return [_("Give at least one case the role training.")]
    if both := sides[TRAINING] & sides[VALIDATION]:
        names = [row.name for row in rows if people[row.key] in both]
        return [
            _("{names} are of one patient; give them the same role, or leave some out.").format(names=", ".join(names))
        ]
    sets = {row.dataSet for row in rows}
    if len(sets) > 1 and any(path and cases.dataSets[path].severalInOneFile for path in sets):
        return [_("Cases with all channels in one file cannot be mixed with others; train on them alone.")]
    try:
        table = labelsOf(cases, model)
    except LabelConflict as conflict:
        return [str(conflict)]
    if not table:
        return [_("No case has a label to learn; choose under Labels what the segments stand for.")]
    return _unlabelled(cases, rows, model)


def _unlabelled(cases: TrainingCases, rows: Sequence[CaseRow], model: Any) -> list[str]:
    known = [label.name for label in model.labels]
    empty = [
        row.name
        for row in rows
        if not any(isLearned(labelOf(name, known, cases.choices)) for name in labelNames(cases, row))
    ]
    return [_("{name} has no segment that is learned; leave it out.").format(name=name) for name in empty]
