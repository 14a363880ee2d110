"""The versions of a model: their chain, what differs between two of them, and the way back to the one before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import InvresError
from .configjson import to_dict
from .events import aligned
from .lineage import active_members, ancestors, family_of, read_active, set_active
from .modelpackage import ModelPackage

__all__ = ["difference", "difference_table", "history", "history_table", "rollback"]

# Of the manifest: what a person compares. The rest is told by other entries or differs always.
_COMPARED = ("version", "network", "plan", "patch", "training", "licence", "intended_use")
SHOWN_TENSORS = 5


def history(
    package: ModelPackage, installed: Sequence[ModelPackage], models_dirs: Iterable[Path]
) -> list[dict[str, Any]]:
    """All versions of the model, oldest first, as plain JSON values; `active` is the one that its name stands for."""
    packages = {one.id: one for one in [package, *installed]}
    known = {key: one.manifest for key, one in packages.items()}
    family = family_of(package.manifest, known)
    members = [manifest for manifest in known.values() if family_of(manifest, known) == family]
    current = {manifest.id for manifest in active_members(members, read_active(models_dirs))}
    members.sort(key=lambda manifest: (len(ancestors(manifest, known)), manifest.created))
    return [
        {
            "id": manifest.id,
            "name": manifest.name,
            "version": manifest.version,
            "created": manifest.created,
            "parent": manifest.parent,
            "active": manifest.id in current,
            "path": str(packages[manifest.id].path),
            "training_cases": manifest.training.training_cases,
            "metrics": manifest.metrics,
        }
        for manifest in members
    ]


def history_table(versions: Sequence[dict[str, Any]]) -> str:
    """What `history` returned as text; * marks the active version."""
    rows = [["", "version", "made", "id", "from", "cases", "Dice"]]
    for one in versions:
        dice = [values["Dice"]["mean"] for values in one["metrics"].values() if values.get("Dice")]
        rows.append(
            [
                "*" if one["active"] else "",
                one["version"],
                one["created"][:16].replace("T", " "),
                one["id"][:8],
                one["parent"][:8] or "-",
                str(one["training_cases"]),
                f"{sum(dice) / len(dice):.3f}" if dice else "-",
            ]
        )
    return "\n".join([f"{versions[-1]['name']}", *aligned(rows)])


def difference(
    package: ModelPackage, other: ModelPackage | None, installed: Sequence[ModelPackage] = ()
) -> dict[str, Any]:
    """What changed between two models, as plain JSON values; without another one, since the model's parent.

    `configuration`: the fields of the manifest that differ, each [older, newer]. `labels`, `channels`: added, removed.
    `metrics`: Dice by label, [older, newer]. `tensors`: largest relative change first; change is the norm of the
    difference over the norm of the older weights, None where the shape differs or only one model has the tensor.
    Raises InvresError where the parent is not installed.
    """
    older, newer = (package, other) if other is not None else (_parent(package, installed, "compared with"), package)
    one, two = older.manifest, newer.manifest
    return {
        "older": {"id": one.id, "name": one.name, "version": one.version, "path": str(older.path)},
        "newer": {"id": two.id, "name": two.name, "version": two.version, "path": str(newer.path)},
        "configuration": {
            key: values
            for field in _COMPARED
            for key, values in _changes(to_dict(one)[field], to_dict(two)[field], field).items()
        },
        "labels": _added_and_removed(one.scheme.names, two.scheme.names),
        "channels": _added_and_removed([c.name for c in one.plan.channels], [c.name for c in two.plan.channels]),
        "metrics": {
            name: [manifest.metrics.get(name, {}).get("Dice", {}).get("mean") for manifest in (one, two)]
            for name in dict.fromkeys([*one.metrics, *two.metrics])
        },
        "tensors": _tensor_changes(older, newer),
    }


def difference_table(found: dict[str, Any]) -> str:
    """What `difference` returned as text."""
    lines = [
        f"{found['older']['name']} {found['older']['version']} ({found['older']['id'][:8]}) -> "
        f"{found['newer']['name']} {found['newer']['version']} ({found['newer']['id'][:8]})"
    ]
    for what in ("labels", "channels"):
        for change in ("added", "removed"):
            if names := found[what][change]:
                lines.append(f"  {what} {change}: {', '.join(names)}")
    for name, (before, after) in found["metrics"].items():
        numbers = ["-" if value is None else f"{value:.4f}" for value in (before, after)]
        lines.append(f"  Dice {name}: {numbers[0]} -> {numbers[1]}")
    for key, (before, after) in found["configuration"].items():
        for place, (one, two) in _changes(_by_name(before), _by_name(after), key).items():
            lines.append(f"  {place}: {_readable(one)} -> {_readable(two)}")
    changed = [one for one in found["tensors"] if one["change"] != 0]
    lines.append(f"  {len(changed)} of {len(found['tensors'])} tensors differ; most of all:")
    for one in changed[:SHOWN_TENSORS]:
        size = one["note"] if one["change"] is None else f"{one['change']:.2%}"
        lines.append(f"    {one['name']}: {size}")
    return "\n".join(lines)


def rollback(package: ModelPackage, installed: Sequence[ModelPackage], models_dir: Path) -> ModelPackage:
    """Makes the parent of `package` the version that the name stands for, and returns it; nothing is deleted.

    Raises InvresError where the parent is not installed, and where the disk refuses.
    """
    parent = _parent(package, installed, "gone back to")
    known = {one.id: one.manifest for one in [package, *installed]}
    set_active(models_dir, family_of(package.manifest, known), parent.id)
    return parent


def _parent(package: ModelPackage, installed: Sequence[ModelPackage], purpose: str) -> ModelPackage:
    identity = package.manifest.parent
    if not identity:
        raise InvresError(
            f"{package.name} {package.manifest.version} was not tuned from another model, so there is none to be "
            f"{purpose}.",
            hint="`invres models history` shows the versions of a model.",
        )
    for one in installed:
        if one.id == identity:
            return one
    raise InvresError(
        f"The model that {package.name} {package.manifest.version} was tuned from is not installed "
        f"(id {identity[:8]}).",
        hint="Import it with `invres models import`.",
    )


def _changes(one: Any, other: Any, where: str) -> dict[str, list[Any]]:
    """The leaves that differ, by their path."""
    if isinstance(one, dict) and isinstance(other, dict):
        found: dict[str, list[Any]] = {}
        for key in dict.fromkeys([*one, *other]):
            found |= _changes(one.get(key), other.get(key), f"{where}.{key}")
        return found
    return {} if one == other else {where: [one, other]}


def _by_name(value: Any) -> Any:
    """A list of things with names, such as channels, as what is known by name; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value):
        return {one["name"]: {key: item for key, item in one.items() if key != "name"} for one in value}
    return value


def _readable(value: Any) -> str:
    """A value of a manifest for a line of text."""
    if value in (None, "", [], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ("; " if any(isinstance(item, (list, dict)) for item in value) else ", ").join(map(_readable, value))
    return str(value)


def _added_and_removed(one: Sequence[str], other: Sequence[str]) -> dict[str, list[str]]:
    return {"added": [n for n in other if n not in one], "removed": [n for n in one if n not in other]}


def _tensor_changes(older: ModelPackage, newer: ModelPackage) -> list[dict[str, Any]]:
    before, after = older.load_weights(), newer.load_weights()
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys([*before, *after]):
        change, note = None, ""
        if name not in after:
            note = "only in the older"
        elif name not in before:
            note = "only in the newer"
        elif before[name].shape != after[name].shape:
            note = f"{list(before[name].shape)} -> {list(after[name].shape)}"
        else:
            one, two = before[name].double(), after[name].double()
            size = float(one.norm())
            moved = float((two - one).norm())
            change = moved / size if size else (0.0 if not moved else None)
            note = "was zero" if change is None else ""
        rows.append({"name": name, "change": change, "note": note})
    return sorted(rows, key=lambda row: (row["change"] is not None, -(row["change"] or 0.0)))
