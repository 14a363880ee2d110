"""The tuned model: in memory while it is proved, then a package and result.json, promoted or a candidate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .casecomparison import Contender
from .config import LabelScheme
from .configjson import to_dict
from .events import Reporter
from .expectation import Expectation, merged
from .files import written_whole
from .manifest import Manifest
from .mirroring import kept_mirror
from .modelpackage import ModelPackage, save_package
from .networks import build
from .sides import Side, possible_sides
from .transfer import match_names
from .tuningplan import TuningOptions, TuningPlan

__all__ = ["RESULT", "contender_of", "finished_result", "save_tuned", "write_result"]

MODEL, CANDIDATE = "model", "candidate"
RESULT = "result.json"


def contender_of(
    base: Manifest, plan: TuningPlan, options: TuningOptions, weights: Mapping[str, torch.Tensor], device: torch.device
) -> Contender:
    """The tuned model as far as segmenting needs it; it has no file yet."""
    manifest = Manifest(
        name=options.name or base.name,
        id="0" * 32,
        created="",
        network=plan.network,
        plan=plan.plan,
        scheme=plan.scheme,
        patch=plan.training.patch,
        one_piece=_stays_one_piece(base, plan.scheme),
        mirror_axes=kept_mirror(plan.scheme, base.mirror_axes),
        sha256="0" * 64,
        weights_bytes=0,
    )
    network = build(dataclasses.replace(plan.network, vae=None))
    network.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("vae.")})
    return Contender(ModelPackage(Path(), manifest), network.to(device).eval())


def save_tuned(
    output: Path,
    base: Manifest,
    plan: TuningPlan,
    options: TuningOptions,
    weights: Mapping[str, torch.Tensor],
    training: Mapping[str, Any],
    metrics: Mapping[str, Any],
    seen: Expectation,
    trained_on: Sequence[str],
    promoted: bool,
    log: Path,
) -> ModelPackage:
    """The package of the next version, in `output`/model where it is promoted, else in `output`/candidate.

    log: of the training that it came from.
    """
    return save_package(
        output / (MODEL if promoted else CANDIDATE),
        name=options.name or base.name,
        version=_next_version(base.version),
        description=f"Fine-tuned from {base.name} {base.version}.",
        network=plan.network,
        state_dict=weights,
        plan=plan.plan,
        scheme=plan.scheme,
        patch=plan.training.patch,
        training=training,
        metrics=metrics,
        expected=merged(base.expected, seen, plan.scheme.names),
        sides=_kept_sides(base, plan.scheme),
        one_piece=_stays_one_piece(base, plan.scheme),
        mirror_axes=kept_mirror(plan.scheme, base.mirror_axes),
        trained_on=trained_on,
        licence=options.licence or base.licence,
        intended_use=base.intended_use,
        parent=base.id,
        log=log,
    )


def write_result(
    output: Path,
    base: Manifest,
    plan: TuningPlan,
    package: ModelPackage,
    proof: Mapping[str, Any],
    comparison: Path,
    transfer: Path,
) -> dict[str, Any]:
    """Writes result.json and returns its content."""
    check = proof["base_check"]
    transferred = json.loads(transfer.read_text(encoding="utf-8"))
    result = {
        "model": str(package.path),
        "model_id": package.id,
        "name": package.name,
        "version": package.manifest.version,
        "parent": base.id,
        "parent_version": base.version,
        "promoted": proof["promoted"],
        "verdict": proof["verdict"],
        "promotable": proof["promotable"],
        "worse_labels": proof["worse_labels"],
        "dropped_labels": proof["dropped_labels"],
        "sentence": proof["sentence"],
        "comparison": str(comparison),
        "transfer": {
            "path": str(transfer),
            **{key: transferred[key] for key in ("sentence", "counts", "labels", "channels")},
        },
        "base_check": None if check is None else {key: check[key] for key in ("verdict", "worse_labels", "sentence")},
        "skipped_cases": [to_dict(one) for one in plan.skipped],
        "reductions": list(plan.reductions),
        "training": to_dict(package.manifest.training),
    }
    _write(output, result)
    return result


def finished_result(output: Path, promote: bool, report: Reporter) -> dict[str, Any]:
    """The result of a run that is complete; a candidate is promoted if that is what is asked for now."""
    result = json.loads((output / RESULT).read_text(encoding="utf-8"))
    if promote and not result["promoted"]:
        if (output / CANDIDATE).is_dir():  # not there if it was killed behind this
            (output / CANDIDATE).rename(output / MODEL)
        result |= {"promoted": True, "model": str(output / MODEL)}
        _write(output, result)
        report.note(f"The candidate is promoted: {output / MODEL}.")
    else:
        report.note(f"The fine-tuning in {output} is complete.")
    return result


def _write(output: Path, result: Mapping[str, Any]) -> None:
    with written_whole(output / RESULT) as temporary:
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")


def _kept_sides(base: Manifest, scheme: LabelScheme) -> tuple[Side, ...]:
    """The base model's sides, for the labels that the tuned one has of it."""
    sides = {side.label: side for side in base.sides}
    wanted = []
    for name, place in zip(scheme.names, match_names(scheme.names, base.scheme.names), strict=True):
        if place is not None and (side := sides.get(base.scheme.names[place])) is not None:
            wanted.append(dataclasses.replace(side, label=name))
    return possible_sides(scheme, wanted)


def _stays_one_piece(base: Manifest, scheme: LabelScheme) -> bool:
    """Only with the very labels of the base model: of a new one nobody knows whether it hangs together with the others,
    and what is left of a brain without some of its structures does not."""
    places = match_names(scheme.names, base.scheme.names)
    return base.one_piece and not scheme.regions and {*places} == {*range(len(base.scheme.names))}


def _next_version(version: str) -> str:
    """1.2.0 -> 1.3.0; what is no such number gets one behind it."""
    words = version.split(".")
    if len(words) == 3 and all(word.isdigit() for word in words):
        return f"{words[0]}.{int(words[1]) + 1}.0"
    return f"{version}.1"
