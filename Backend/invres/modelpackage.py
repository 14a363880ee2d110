"""Model packages: weights and manifest in a folder, or in one `.invres` zip; opening one never runs code."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import InvresError
from .config import LabelScheme, PreparationPlan
from .configjson import from_dict
from .enhancementconfig import EnhancementPlan
from .events import SILENT, Reporter
from .expectation import Expectation
from .lineage import active_members, family_of, read_active, set_active
from .manifest import Manifest, TrainingSummary, check_name, manifest_from_json, manifest_to_json
from .networkconfig import NetworkConfig
from .packagefiles import (
    AGAIN,
    ENDING,
    EXPORT,
    LOG,
    MANIFEST,
    PICKLES,
    WEIGHTS,
    aside,
    check_weights,
    copy,
    member,
    publish,
    remove,
    sizes_of,
    stored_at,
    temporary_folder,
)
from .sides import Side

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ENDING",
    "Manifest",
    "ModelPackage",
    "TrainingSummary",
    "bundled_models_dir",
    "delete_package",
    "export_package",
    "find_package",
    "fitting",
    "import_package",
    "is_bundled",
    "list_packages",
    "open_package",
    "save_package",
    "verify_hash",
    "verify_package",
]

_MAX_MANIFEST_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class ModelPackage:
    """An opened package. path: its folder or `.invres` file."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def id(self) -> str:
        return self.manifest.id

    def manifest_digest(self) -> str:
        """The sha256 of the manifest's file, which an imported or exported package keeps."""
        with member(self.path, MANIFEST) as stream:
            return copy(stream, None)

    def load_weights(self, as_stored: bool = False) -> dict[str, Tensor]:
        """The network's state on the CPU; tensors stored in 16 bits come back as float32, unless `as_stored`.

        Raises InvresError if the weights are not the bytes that the manifest vouches for.
        """
        import torch
        from safetensors.torch import load

        with member(self.path, WEIGHTS) as stream:
            data = stream.read(self.manifest.weights_bytes + 1)
        _check_hash(self, hashlib.sha256(data).hexdigest())
        narrow = () if as_stored else (torch.float16, torch.bfloat16)
        return {key: tensor.float() if tensor.dtype in narrow else tensor for key, tensor in load(data).items()}


def save_package(
    path: str | os.PathLike[str],
    *,
    name: str,
    network: NetworkConfig,
    state_dict: Mapping[str, Tensor],
    plan: PreparationPlan,
    scheme: LabelScheme,
    patch: tuple[int, int, int],
    version: str = "1.0.0",
    description: str = "",
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    expected: Expectation | None = None,
    sides: Sequence[Side] = (),
    one_piece: bool = False,
    mirror_axes: Sequence[int] = (),
    members: int = 1,
    trained_on: Iterable[str] = (),
    enhancement: EnhancementPlan | None = None,
    licence: str = "",
    intended_use: str = Manifest.intended_use,
    parent: str = "",
    log: Path | None = None,
) -> ModelPackage:
    """Writes a package: one zip if `path` ends in `.invres`, else a folder. An older package there is replaced whole.

    state_dict: tensors on any device; they are stored in their own type. training: the fields of `TrainingSummary`.
    sides: labels to be divided into left and right, for example `sides_of_recipe`.
    log: the epochs of the training, a JSON object a line (`metrics.jsonl` of its run), copied where it is there.
    Raises InvresError for weights that are not finite, contradicting fields, a folder there that is no package, and
    when the disk refuses; what stood there before then still stands.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_name(name)
    target = _absolute(path)
    for key, tensor in state_dict.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InvresError(
                f"The weights of {name!r} are not finite ({key}); nothing was saved.",
                hint="Go back to an earlier checkpoint, or train with a lower learning rate.",
            )
    with temporary_folder(target) as folder:
        # A copy each: safetensors refuses tensors that share memory.
        tensors = {
            key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, tensor in state_dict.items()
        }
        try:
            save_file(tensors, folder / WEIGHTS)
        except SafetensorError as error:
            raise InvresError(
                f"The weights of {name!r} cannot be written: {error}.", hint="Check free space."
            ) from error
        with open(folder / WEIGHTS, "rb") as stream:
            sha256 = copy(stream, None)
        manifest = Manifest(
            name=name,
            id=uuid.uuid4().hex,
            version=version,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            description=description,
            network=network,
            plan=plan,
            scheme=scheme,
            patch=patch,
            training=from_dict(TrainingSummary, dict(training or {}), "training"),
            metrics=dict(metrics or {}),
            expected=expected or Expectation(),
            sides=tuple(sides),
            one_piece=one_piece,
            mirror_axes=tuple(mirror_axes),
            members=members,
            trained_on=tuple(sorted(set(trained_on))),
            enhancement=enhancement,
            licence=licence,
            intended_use=intended_use,
            parent=parent,
            sha256=sha256,
            weights_bytes=(folder / WEIGHTS).stat().st_size,
        )
        (folder / MANIFEST).write_bytes(manifest_to_json(manifest))
        # safetensors keeps its file to its owner; a package may be read by whoever may read the folder.
        (folder / WEIGHTS).chmod((folder / MANIFEST).stat().st_mode)
        if log is not None and log.is_file():
            (folder / LOG).write_bytes(log.read_bytes())
        publish(folder, target)
    return open_package(target)


def open_package(path: str | os.PathLike[str]) -> ModelPackage:
    """Reads and checks the manifest, and that the weights file is whole safetensors; imports no torch.

    The weights' hash is checked when they are loaded, copied or verified.
    Raises InvresError, one sentence for each reason to refuse.
    """
    path = _absolute(path)
    stored = stored_at(path)
    if not stored.exists():
        raise InvresError(f"There is no model package {path}.", hint="`invres models list` shows what is installed.")
    if _is_run(path):
        made = next((name for name in ("model", "candidate") if (path / name / MANIFEST).is_file()), None)
        raise InvresError(
            f"{path.name} is the folder of a training; "
            + (f"its model is {path / made}." if made else "it has no model yet."),
            hint="Give that path." if made else "Let the training end, or go on with it by --resume.",
        )
    if path.suffix.lower() in PICKLES and stored.is_file():
        raise InvresError(f"{path.name} is refused: such a file is a pickle, which could run code.", hint=EXPORT)
    if stored.is_file() and path.suffix.lower() != ENDING:
        raise InvresError(f"{path.name} is neither a folder nor a file ending in {ENDING}.", hint=EXPORT)
    sizes = sizes_of(path)
    manifest = _read_manifest(path, sizes[MANIFEST])
    with member(path, WEIGHTS) as stream:
        check_weights(stream, sizes[WEIGHTS], path)
    if sizes[WEIGHTS] != manifest.weights_bytes:
        raise InvresError(
            f"The weights in {path.name} have {sizes[WEIGHTS]} bytes, the manifest says {manifest.weights_bytes}.",
            hint=AGAIN,
        )
    return ModelPackage(path, manifest)


def verify_package(path: str | os.PathLike[str]) -> ModelPackage:
    """Opens the package and checks hash, finiteness, and every name and shape against the network it configures.

    Raises InvresError naming the first thing that is wrong.
    """
    import torch

    from .networks import build_any

    package = open_package(path)
    weights = package.load_weights()
    # On "meta" a network has shapes but no memory and no time for random numbers.
    with torch.device("meta"):
        expected = build_any(package.manifest.network, package.manifest.members).state_dict()
    for key, tensor in expected.items():
        if key not in weights:
            raise InvresError(f"The weights in {package.path.name} lack {key}.", hint=EXPORT)
        if weights[key].shape != tensor.shape:
            raise InvresError(
                f"In {package.path.name}, {key} has the shape {list(weights[key].shape)}; "
                f"its network needs {list(tensor.shape)}.",
                hint=EXPORT,
            )
    for key, tensor in weights.items():
        if key not in expected:
            raise InvresError(f"{package.path.name} holds {key}, which its network does not have.", hint=EXPORT)
        if not bool(torch.isfinite(tensor).all()):
            raise InvresError(f"The weights in {package.path.name} are not finite ({key}).", hint=EXPORT)
    return package


def verify_hash(package: ModelPackage) -> None:
    """Checks the weights' hash alone, which needs neither torch nor safetensors. Raises InvresError if it differs."""
    with member(package.path, WEIGHTS) as stream:
        _check_hash(package, copy(stream, None))


def delete_package(package: ModelPackage, models_dir: Path | None = None) -> None:
    """Removes the package from the disk; where `models_dir` has a link to it, only the link.

    Raises InvresError for a package that came with InvResSegment, for a folder that holds other things too, and where
    the disk refuses; the package then still stands.
    """
    if is_bundled(package):
        raise InvresError(
            f"The model {package.name} came with InvResSegment and cannot be deleted.",
            hint="Only models that you imported or trained can be deleted.",
            code="bundled_model",
        )
    links = [path for path in models_dir.iterdir() if path.is_symlink()] if models_dir and models_dir.is_dir() else []
    for link in links:
        if _absolute(link) == package.path:
            link.unlink()
            return
    remove(package.path)


def is_bundled(package: ModelPackage) -> bool:
    """Whether the package came with InvResSegment."""
    return package.path.is_relative_to(_absolute(bundled_models_dir()))


def export_package(package: ModelPackage, destination: str | os.PathLike[str]) -> Path:
    """Writes the package as one `.invres` file; the same package always gives the same bytes.

    Raises InvresError for another ending, weights that fail their hash, and when the disk refuses.
    """
    target = _absolute(destination)
    if target.suffix.lower() != ENDING:
        raise InvresError(f"An exported model ends in {ENDING}, got {target.name!r}.", hint=f"Name it …{ENDING}.")
    with temporary_folder(target) as folder:
        _copy_members(package, folder)
        publish(folder, target)
    return target


def import_package(source: str | os.PathLike[str], models_dir: str | os.PathLike[str]) -> ModelPackage:
    """Copies a package (folder or `.invres`) into a folder of `models_dir` named after the model.

    The same model (by id) replaces its older copy; another one of the same name gets a folder with its id. A model that
    was tuned from another one becomes the active version: the one that the name stands for.
    Raises InvresError as `open_package`, and for weights that fail their hash.
    """
    package = open_package(source)
    slug = re.sub(r"[^\w-]+", "-", package.name.lower()).strip("-")[:60] or "model"
    target = _absolute(models_dir) / slug
    if package.path == target:
        _make_active(package, target.parent)
        return package
    if stored_at(target).exists() and not _is_model(target, package.id):
        target = target.with_name(f"{slug}-{package.id[:8]}")
    with temporary_folder(target) as folder:
        _copy_members(package, folder)
        publish(folder, target)
    _make_active(package, target.parent)
    return open_package(target)


def bundled_models_dir() -> Path:
    """`Resources/Models`: in the package where pip has installed it (Backend/setup.py), and beside `Backend` in the
    source tree and in an installed extension alike; may not exist."""
    package = Path(__file__).resolve().parent
    places = (package / "Resources", package.parents[1] / "Resources")
    return next((folder for folder in places if folder.is_dir()), places[-1]) / "Models"


def list_packages(models_dirs: Iterable[str | os.PathLike[str]], report: Reporter = SILENT) -> list[ModelPackage]:
    """The packages in these folders, in their order, then by file name; each model (id) once.

    A package that cannot be opened is a warning, not an error; a folder that does not exist is passed over.
    """
    found: dict[str, ModelPackage] = {}
    for models_dir in map(_absolute, models_dirs):
        for path in _candidates(models_dir):
            try:
                package = open_package(path)
            except InvresError as error:
                report.warning(f"The model {path.name} is left out: {error}", path=str(path))
            else:
                found.setdefault(package.id, package)
    return list(found.values())


def find_package(
    name_or_path: str | os.PathLike[str], models_dirs: Iterable[str | os.PathLike[str]], report: Reporter = SILENT
) -> ModelPackage:
    """The package at a path, or the installed one with this name, file name or id (8 digits or more of it).

    Where several versions of one model have the name, it is the active one (see `lineage`).
    Raises InvresError if there is none, with the nearest name, or if several models share the name.
    """
    text = os.fspath(name_or_path)
    path = _absolute(text)
    if path.suffix.lower() == ENDING or os.path.basename(text) != text or (path / MANIFEST).is_file() or _is_run(path):
        return open_package(path)
    models_dirs = list(models_dirs)
    packages = list_packages(models_dirs, report)
    fits = fitting(text, packages, models_dirs)
    if len(fits) == 1:
        return fits[0]
    if fits:
        choices = ", ".join(f"{package.id[:8]} ({package.path})" for package in fits)
        raise InvresError(f"{len(fits)} models fit {text!r}: {choices}.", hint="Give the id or the path of one.")
    names = [package.name for package in packages]
    near = difflib.get_close_matches(text, names, n=1)
    installed = f"installed are {', '.join(sorted(set(names)))}" if names else "none is installed"
    raise InvresError(
        f"There is no model {text!r}; {installed}.",
        hint=f"Did you mean {near[0]!r}?" if near else "`invres models import FILE` adds one.",
    )


def fitting(
    text: str, packages: Sequence[ModelPackage], models_dirs: Iterable[str | os.PathLike[str]]
) -> list[ModelPackage]:
    """Those of the installed packages that a name, file name or id stands for: of versions of one model the active
    one; several where unrelated models share the name.
    """
    wanted = text.casefold()
    fits = [
        package
        for package in packages
        if wanted in (package.name.casefold(), package.path.name.casefold().removesuffix(ENDING))
        or (len(wanted) >= 8 and package.id.startswith(wanted))
    ]
    if len(fits) > 1:
        manifests = [package.manifest for package in packages]
        current = {manifest.id for manifest in active_members(manifests, read_active(map(_absolute, models_dirs)))}
        fits = [package for package in fits if package.id in current] or fits
    return fits


def _is_run(path: Path) -> bool:
    """Whether a folder is that of a training, which is named in place of its model."""
    return (path / "run.json").is_file() and not (path / MANIFEST).is_file()


def _make_active(package: ModelPackage, models_dir: Path) -> None:
    """A first version is active until another one is, and an only version needs no mark."""
    known = {p.id: p.manifest for p in list_packages([bundled_models_dir(), models_dir])}
    family = family_of(package.manifest, known)
    others = [one for one in known.values() if one.id != package.id and family_of(one, known) == family]
    if package.manifest.parent and others:
        set_active(models_dir, family, package.id)


def _absolute(path: str | os.PathLike[str]) -> Path:
    """Without links, so that replacing a package replaces it where it stands."""
    return Path(os.path.realpath(path))


def _is_model(path: Path, identity: str) -> bool:
    try:
        return open_package(path).id == identity
    except InvresError:
        return False


def _candidates(models_dir: Path) -> list[Path]:
    """Paths in `models_dir` that look like packages."""
    try:
        entries = sorted(models_dir.iterdir())
    except OSError:
        return []
    paths = []
    for entry in entries:
        if entry.name.startswith("."):
            entry = models_dir / entry.name[1:].removesuffix(".replaced")
            if entry.exists() or not aside(entry).is_dir():
                continue
        if (stored_at(entry) / MANIFEST).is_file() or entry.suffix.lower() == ENDING:
            paths.append(entry)
    return paths


def _read_manifest(path: Path, size: int) -> Manifest:
    if size > _MAX_MANIFEST_BYTES:
        raise InvresError(f"The manifest in {path.name} has {size} bytes; 4 MiB are allowed.", hint=EXPORT)
    with member(path, MANIFEST) as stream:
        data = stream.read(size)
    try:
        return manifest_from_json(data)
    except InvresError as error:
        raise InvresError(f"The manifest in {path.name} {error.message}", hint=error.hint or EXPORT) from None


def _check_hash(package: ModelPackage, sha256: str) -> None:
    if sha256 != package.manifest.sha256:
        raise InvresError(
            f"The weights in {package.path.name} are not those of its manifest: their SHA-256 differs.", hint=AGAIN
        )


def _copy_members(package: ModelPackage, folder: Path) -> None:
    """Copies the package's files and nothing else. Raises InvresError if the weights fail their hash."""
    for name in sizes_of(package.path):
        with member(package.path, name) as source, open(folder / name, "wb") as target:
            sha256 = copy(source, target)
        if name == WEIGHTS:
            _check_hash(package, sha256)
