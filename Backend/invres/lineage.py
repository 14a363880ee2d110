"""Which of several versions of a model is meant by its name: families by parent id, and the active member of each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from . import InvresError
from .files import written_whole

__all__ = ["ACTIVE", "active_members", "ancestors", "family_of", "read_active", "set_active"]

ACTIVE = "active.json"
"""In a folder of models: family id -> id of the active version."""


class Version(Protocol):
    """What is needed of a manifest. id, parent: 32 hexadecimal digits, parent may be ""; created: UTC, ISO 8601."""

    @property
    def id(self) -> str: ...
    @property
    def parent(self) -> str: ...
    @property
    def created(self) -> str: ...


V = TypeVar("V", bound=Version)


def ancestors(version: V, known: Mapping[str, V]) -> list[V]:
    """The versions that it came from, nearest first, as far as they are known."""
    found: list[V] = []
    parent = known.get(version.parent)
    while parent is not None and parent not in found and parent.id != version.id:
        found.append(parent)
        parent = known.get(parent.parent)
    return found


def family_of(version: V, known: Mapping[str, V]) -> str:
    """The id that all versions of one model share: that of the first one, also where it is known by name only."""
    oldest = [version, *ancestors(version, known)][-1]
    return oldest.parent if oldest.parent and oldest.parent not in known else oldest.id


def active_members(versions: Sequence[V], active: Mapping[str, str]) -> list[V]:
    """One version of each family among `versions`: the one that `active` names, else the one made last."""
    known = {version.id: version for version in versions}
    families: dict[str, list[V]] = {}
    for version in versions:
        families.setdefault(family_of(version, known), []).append(version)
    chosen = []
    for family, members in families.items():
        named = [member for member in members if member.id == active.get(family)]
        # Of two made in the same second the later generation is the newer one.
        newest = max(members, key=lambda member: (member.created, len(ancestors(member, known))))
        chosen.append(named[0] if named else newest)
    return chosen


def read_active(models_dirs: Iterable[Path]) -> dict[str, str]:
    """What the folders' `active.json` files say; a damaged one says nothing."""
    found: dict[str, str] = {}
    for folder in models_dirs:
        try:
            content: Any = json.loads((folder / ACTIVE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            found |= {str(key): value for key, value in content.items() if isinstance(value, str)}
    return found


def set_active(models_dir: Path, family: str, identity: str) -> None:
    """Makes a version the active one of its family. Raises InvresError where the disk refuses."""
    content = {**read_active([models_dir]), family: identity}
    try:
        with written_whole(models_dir / ACTIVE) as temporary:
            temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvresError(
            f"{models_dir / ACTIVE} cannot be written: {error.strerror or error}.",
            hint="Check free space and the right to write there.",
        ) from error
