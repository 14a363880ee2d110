"""Model packages: what goes in comes out, and nothing harmful, half-written or altered is ever opened."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import typing
import warnings
import zipfile
from pathlib import Path

import jsonschema
import pytest
import torch

from invres import InvresError, modelpackage
from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan
from invres.events import Recorder
from invres.manifest import Manifest, manifest_to_json
from invres.modelpackage import (
    ModelPackage,
    export_package,
    find_package,
    import_package,
    list_packages,
    open_package,
    save_package,
    verify_package,
)
from invres.networkconfig import NetworkConfig, VAEConfig
from invres.networks import build

SCHEMA = json.loads(Path(modelpackage.__file__).with_name("manifest.schema.json").read_text(encoding="utf-8"))
NETWORK = NetworkConfig(
    name="fully_invres", in_channels=2, out_channels=3, channels=(8, 16), blocks=(1, 1), strides=((1, 2, 2),)
)
PLAN = PreparationPlan(
    channels=(
        ChannelPlan("T1", "MR"),
        ChannelPlan("CT", "CT", clip=(-100.0, 300.0), mean=40.5, std=22.0),
    ),
    spacing_mm=(2.5, 0.9, 1.1),
)
SCHEME = LabelScheme(
    labels=(
        Label("anterior", (1,), 1, colour=(255, 0, 7), terminology="Segmentation category and type~SCT^123037004^x"),
        Label("Größe 海馬", (2,), 2),
    ),
    ignore_value=9,
)
TRAINING = {
    "recipe": "quick",
    "epochs": 2,
    "iterations": 40,
    "seconds": 61.5,
    "data": "Phantoms.",
    "training_cases": 8,
    "validation_cases": 2,
    "engine": "reversible",
    "memory": "low",
    "precision": "fp32",
    "optimizer": "muon",
    "seed": 7,
    "channel_dropout": 0.25,
    "software": {"torch": "2.13.0"},
}
METRICS = {
    "anterior": {
        "Dice": {"mean": 0.9, "sd": 0.01, "median": 0.9, "n": 2, "ci95": [0.88, 0.92]},
        "HD95": {"mean": 2.0, "sd": None, "median": None, "n": 1, "ci95": None},
        "empty": {"prediction": 1, "reference": 0, "both": 0},
    }
}


def _save(path: Path, **changes: typing.Any) -> ModelPackage:
    fields: dict[str, typing.Any] = {
        "name": "Hippocampus",
        "network": NETWORK,
        "state_dict": build(NETWORK).state_dict(),
        "plan": PLAN,
        "scheme": SCHEME,
        "patch": (17, 33, 25),
        "training": TRAINING,
        "metrics": METRICS,
        "licence": "CC-BY-4.0",
        "parent": "0" * 32,
    }
    return save_package(path, **{**fields, **changes})


def _members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _rezip(path: Path, entries: typing.Iterable[tuple[str | zipfile.ZipInfo, bytes]], **options: int) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", **options) as archive:  # type: ignore[call-overload]
        warnings.simplefilter("ignore", UserWarning)  # a name given twice, on purpose
        for name, data in entries:
            archive.writestr(name, data)
    return path


def _edit(folder: Path, **changes: typing.Any) -> Path:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("where", ["model", "model.invres", "Ünï 海 mit Leerzeichen/modèle", "Ünï 海/modèle.invres"])
def test_a_saved_package_opens_with_equal_fields_and_tensors(tmp_path, where):
    state = build(NETWORK).state_dict()
    saved = _save(tmp_path / where, state_dict=state)
    opened = verify_package(tmp_path / where)
    assert opened == saved
    manifest = opened.manifest
    assert (manifest.network, manifest.plan, manifest.scheme, manifest.patch) == (NETWORK, PLAN, SCHEME, (17, 33, 25))
    assert dataclasses.asdict(manifest.training) == TRAINING
    assert manifest.metrics == METRICS
    weights = opened.load_weights()
    assert weights.keys() == state.keys()
    for key, tensor in state.items():
        assert weights[key].dtype == tensor.dtype and torch.equal(weights[key], tensor), key
    build(NETWORK).load_state_dict(weights)


def test_nothing_temporary_stays_behind(tmp_path):
    for _ in range(2):
        _save(tmp_path / "model")
        _save(tmp_path / "model.invres")
    assert sorted(os.listdir(tmp_path)) == ["model", "model.invres"]
    assert sorted(os.listdir(tmp_path / "model")) == ["manifest.json", "model.safetensors"]


@pytest.mark.parametrize("network", ["unet3d", "partially_invres", "fully_invres"])
@pytest.mark.parametrize("vae", [None, VAEConfig(patch=(16, 16, 16), latent=4, reduced_channels=2)])
def test_every_network_verifies_from_its_own_weights(tmp_path, network, vae):
    config = NetworkConfig(name=network, in_channels=2, out_channels=3, channels=(8, 16), vae=vae)
    _save(tmp_path / "model", network=config, state_dict=build(config).state_dict())
    verify_package(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stored_in_16_bits_come_back_as_float32(tmp_path, dtype):
    state = {key: tensor.to(dtype) for key, tensor in build(NETWORK).state_dict().items()}
    weights = _save(tmp_path / "model", state_dict=state).load_weights()
    for key, tensor in state.items():
        assert weights[key].dtype == torch.float32
        assert torch.equal(weights[key], tensor.float()), key


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_whoever_may_read_the_manifest_may_read_the_weights(tmp_path):
    path = _save(tmp_path / "model").path
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {(path / "manifest.json").stat().st_mode & 0o777}


def test_tensors_that_share_memory_or_are_not_contiguous_are_saved(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    state = {"a": base, "b": base.view(-1), "c": base.transpose(0, 2), "d": base[1], "n": torch.tensor(5)}
    weights = _save(tmp_path / "model", state_dict=state).load_weights()
    for key, tensor in state.items():
        assert torch.equal(weights[key], tensor), key


def test_the_published_schema_accepts_what_is_written(tmp_path):
    for vae in (None, VAEConfig(patch=(16, 16, 16))):
        config = dataclasses.replace(NETWORK, vae=vae)
        _save(tmp_path / "model", network=config, state_dict=build(config).state_dict())
        manifest = json.loads((tmp_path / "model" / "manifest.json").read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator.check_schema(SCHEMA)
        jsonschema.validate(manifest, SCHEMA)


@pytest.mark.parametrize(
    "change", [{"patch": [1, 2]}, {"sha256": "x"}, {"surprise": 1}, {"training": {"patient": "Doe"}}, {"id": None}]
)
def test_the_published_schema_refuses_what_is_wrong(tmp_path, change):
    _edit(_save(tmp_path / "model").path, **change)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text(encoding="utf-8"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)
    with pytest.raises(InvresError):
        open_package(tmp_path / "model")


def test_the_published_schema_has_the_fields_of_the_dataclasses():
    def compare(cls: type, schema: dict[str, typing.Any]) -> None:
        schema = schema.get("anyOf", [{}, schema])[1]
        schema = SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
        hints = typing.get_type_hints(cls)
        assert set(schema["properties"]) == {field.name for field in dataclasses.fields(cls)}, cls
        for name, hint in hints.items():
            for inner in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(inner):
                    of_field = schema["properties"][name]
                    compare(typing.cast(type, inner), of_field.get("items", of_field))

    compare(Manifest, SCHEMA)


def test_describing_a_package_imports_neither_torch_nor_numpy(tmp_path):
    package = _save(tmp_path / "model.invres")
    code = (
        "import sys\n"
        "from invres.modelpackage import open_package, import_package, list_packages\n"
        "assert open_package(sys.argv[1]).name == 'Hippocampus'\n"
        "import_package(sys.argv[1], sys.argv[2])\n"
        "assert len(list_packages([sys.argv[2]])) == 1\n"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)\n"
    )
    backend = str(Path(modelpackage.__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", code, str(package.path), str(tmp_path / "models")],
        check=True,
        env={**os.environ, "PYTHONPATH": backend},
    )


class Interrupted(BaseException):
    """Stands for a kill: no `except Exception` may swallow it."""


@pytest.mark.parametrize(
    ("name", "moment"),
    [("model", "fsync"), ("model", "rename"), ("model.invres", "fsync"), ("model.invres", "replace")],
)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Interrupted()])
def test_a_failure_while_saving_leaves_the_old_package(tmp_path, monkeypatch, name, moment, error):
    old = _save(tmp_path / name)

    def fail(*_arguments: typing.Any) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises((InvresError, Interrupted)):
        patch.setattr(os, moment, fail)
        _save(tmp_path / name, name="New")
    assert os.listdir(tmp_path) == [name]
    assert verify_package(tmp_path / name) == old


def test_a_failing_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    old = _save(tmp_path / "model")
    rename, calls = os.rename, []

    def fail_second(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(InvresError, match="Input/output error"):
        patch.setattr(os, "rename", fail_second)
        _save(tmp_path / "model", name="New")
    assert len(calls) == 3
    assert os.listdir(tmp_path) == ["model"]
    assert verify_package(tmp_path / "model") == old


def test_a_process_killed_between_the_two_renames_loses_nothing(tmp_path):
    old = _save(tmp_path / "model")
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from invres.packagefiles import publish, temporary_folder\n"
        "rename = os.rename\n"
        "os.rename = lambda source, target: os._exit(9) if 'tmp' in Path(source).suffix else rename(source, target)\n"
        "target = Path(sys.argv[1])\n"
        "with temporary_folder(target) as folder:\n"
        "    publish(folder, target)\n"
    )
    backend = str(Path(modelpackage.__file__).parents[1])
    child = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")], env={**os.environ, "PYTHONPATH": backend}
    )
    assert child.returncode == 9
    assert not (tmp_path / "model").exists()
    assert verify_package(tmp_path / "model") == old
    assert list_packages([tmp_path]) == [old]
    new = _save(tmp_path / "model", name="New")
    assert list_packages([tmp_path]) == [new]
    assert not (tmp_path / ".model.replaced").exists()


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(InvresError, match=r"chapter\.txt"):
        _save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    with pytest.raises(InvresError, match="is a file"):
        _save(tmp_path / "thesis" / "chapter.txt")


def test_a_package_behind_a_link_is_replaced_where_it_stands(tmp_path):
    _save(tmp_path / "v1")
    (tmp_path / "current").symlink_to(tmp_path / "v1", target_is_directory=True)
    new = _save(tmp_path / "current", name="New")
    assert (tmp_path / "current").is_symlink()
    assert open_package(tmp_path / "v1") == new


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    state = build(NETWORK).state_dict()
    state["stem.bias"][1] = float("inf")
    with pytest.raises(InvresError, match=r"not finite \(stem\.bias\)"):
        _save(tmp_path / "model", state_dict=state)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plan": PreparationPlan()}, "in_channels is 2, but plan names 1"),
        ({"scheme": LabelScheme()}, "out_channels is 3, but the labels of scheme need 1"),
        ({"patch": (0, 8, 8)}, "patch"),
        ({"name": " "}, "name"),
        ({"name": "two\nlines"}, "name"),
        ({"parent": "mother"}, "parent must be 32 hexadecimal digits"),
        ({"training": {"patients": ["Jane Doe"]}}, "unknown key 'patients'"),
        ({"metrics": {"case_jane_doe": {}}}, "no label of scheme"),
        ({"metrics": {"anterior": {"Dice": 0.9}}}, "must map each metric"),
        ({"metrics": {"anterior": {"Dice": {"mean": float("nan")}}}}, "finite numbers"),
    ],
)
def test_contradicting_fields_are_not_saved(tmp_path, changes, said):
    with pytest.raises(InvresError, match=said):
        _save(tmp_path / "model", **changes)
    assert os.listdir(tmp_path) == []


LINK = zipfile.ZipInfo("README.md")
LINK.create_system = 3
LINK.external_attr = 0o120777 << 16


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("../evil.txt", "leads out of the package"),
        ("a/../../evil.txt", "leads out of the package"),
        ("..\\evil.txt", "leads out of the package"),
        ("/etc/passwd", "absolute path"),
        ("\\\\host\\share\\x", "absolute path"),
        ("C:\\Windows\\x", "absolute path"),
        (LINK, "is a link"),
        ("model.pt", "pickle"),
        ("archive/data.PKL", "pickle"),
        ("pytorch_model.bin", "pickle"),
        ("weights.pth", "pickle"),
        ("run.py", "but only manifest.json, model.safetensors"),
        ("model/", "but only"),
        ("manifest.json", "twice"),
    ],
)
def test_an_archive_with_a_harmful_or_foreign_entry_is_refused(tmp_path, entry, said):
    good = _members(_save(tmp_path / "good.invres").path)
    bad = _rezip(tmp_path / "bad.invres", [*good.items(), (entry, b"x")])
    for act in (open_package, verify_package, lambda path: import_package(path, tmp_path / "models")):
        with pytest.raises(InvresError, match=said) as caught:
            act(bad)
        assert caught.value.hint
    assert not (tmp_path / "models").exists() and not (tmp_path.parent / "evil.txt").exists()


def test_the_optional_files_are_welcome_and_travel_along(tmp_path):
    good = _members(_save(tmp_path / "good.invres").path)
    extras = {"LICENSE.txt": b"CC", "README.md": b"# Read", "preview.png": b"png", "training.jsonl": b"{}"}
    path = _rezip(tmp_path / "full.invres", [*good.items(), *extras.items()])
    imported = import_package(path, tmp_path / "models")
    export_package(imported, tmp_path / "again.invres")
    assert _members(tmp_path / "again.invres") == {**good, **extras}


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path):
    good = _members(_save(tmp_path / "good.invres").path)
    bomb = {**good, "README.md": b"\0" * 8_000_000}
    _rezip(tmp_path / "bomb.invres", bomb.items(), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InvresError, match="200 times"):
        open_package(tmp_path / "bomb.invres")


def test_an_entry_that_claims_more_than_2_gib_is_refused(tmp_path):
    path = _save(tmp_path / "big.invres").path
    data = bytearray(path.read_bytes())
    directory = data.rindex(b"PK\x01\x02")
    data[directory + 20 : directory + 28] = (3 * 1024**3).to_bytes(4, "little") * 2
    path.write_bytes(data)
    with pytest.raises(InvresError, match=r"2\.00 GiB allowed"):
        open_package(path)


def test_an_encrypted_archive_is_refused(tmp_path):
    path = _save(tmp_path / "secret.invres").path
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(InvresError, match="encrypted"):
        open_package(path)


def _pickled() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, stream)
    return stream.getvalue()


def _old_pickled() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(300)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


@pytest.mark.parametrize("data", [_pickled(), _old_pickled()], ids=["zip", "pickle"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_pickle_under_the_name_of_the_weights_is_refused(tmp_path, data, packed):
    package = _save(tmp_path / ("model.invres" if packed else "model"))
    if packed:
        _rezip(package.path, {**_members(package.path), "model.safetensors": data}.items())
    else:
        (package.path / "model.safetensors").write_bytes(data)
    with pytest.raises(InvresError, match="pickle or an archive, which could run code"):
        open_package(package.path)


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.invres"])
def test_a_pickle_in_the_place_of_a_package_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(_pickled())
    with pytest.raises(InvresError, match="pickle"):
        open_package(tmp_path / name)


def test_a_folder_with_a_pickle_for_weights_is_refused(tmp_path):
    package = _save(tmp_path / "model")
    (package.path / "model.safetensors").rename(package.path / "model.pth")
    with pytest.raises(InvresError, match=r"'model\.pth' is a pickle"):
        open_package(package.path)


def _header(data: bytes, edit: typing.Callable[[dict], None]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _longer_shape(header: dict) -> None:
    header["stem.bias"]["shape"] = [9]


def _negative_shape(header: dict) -> None:
    header["stem.bias"]["shape"] = [-4, -2]


def _text_shape(header: dict) -> None:
    header["stem.bias"]["shape"] = ["8"]


def _overlap(header: dict) -> None:
    header["stem.bias"]["data_offsets"] = header["stem.weight"]["data_offsets"]


def _unknown_type(header: dict) -> None:
    header["stem.bias"]["dtype"] = "OBJECT"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: data + b"\0", "truncated or damaged"),
        (lambda data: data[:20], "truncated"),
        (lambda data: b"", "truncated"),
        (lambda data: b"\xff" * 8 + data[8:], "truncated or no safetensors"),
        (lambda data: data[:8] + b"{" * 60 + data[68:], "damaged header"),
        (lambda data: _header(data, _longer_shape), "damaged header"),
        (lambda data: _header(data, _negative_shape), "damaged header"),
        (lambda data: _header(data, _text_shape), "damaged header"),
        (lambda data: _header(data, _overlap), "damaged header"),
        (lambda data: _header(data, _unknown_type), "damaged header"),
        (lambda data: _header(data, lambda header: header.update(__metadata__={"a": "b"})), "the manifest says"),
    ],
)
def test_damaged_weights_are_refused_without_torch(tmp_path, harm, said):
    weights = _save(tmp_path / "model").path / "model.safetensors"
    weights.write_bytes(harm(weights.read_bytes()))
    with pytest.raises(InvresError, match=said):
        open_package(tmp_path / "model")


@pytest.mark.parametrize("name", ["model", "model.invres"])
def test_weights_altered_in_one_bit_are_refused_when_loaded_copied_or_verified(tmp_path, name):
    package = _save(tmp_path / name)
    if name == "model":
        weights = package.path / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    else:
        members = _members(package.path)
        data = bytearray(members["model.safetensors"])
        data[-1] ^= 1
        _rezip(package.path, {**members, "model.safetensors": bytes(data)}.items())
    opened = open_package(tmp_path / name)
    for act in (
        opened.load_weights,
        lambda: verify_package(opened.path),
        lambda: import_package(opened.path, tmp_path / "models"),
        lambda: export_package(opened, tmp_path / "copy.invres"),
    ):
        with pytest.raises(InvresError, match="SHA-256 differs"):
            act()
    assert list_packages([tmp_path / "models"]) == [] and not (tmp_path / "copy.invres").exists()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_archive_is_refused(tmp_path, kept):
    path = _save(tmp_path / "model.invres").path
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(InvresError, match="truncated or damaged"):
        open_package(path)


def test_an_archive_with_a_flipped_bit_in_its_manifest_is_refused(tmp_path):
    path = _save(tmp_path / "model.invres").path
    path.write_bytes(path.read_bytes().replace(b"Hippocampus", b"Hippocampux"))
    with pytest.raises(InvresError, match="truncated or damaged"):
        open_package(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, "has format 2; this InvResSegment reads up to 1"),
        ({"format_version": "1"}, "has no format_version"),
        ({"format_version": True}, "has no format_version"),
        ({"network": None}, "must be a JSON object"),
        ({"network": {"name": "transformer"}}, "no network 'transformer'"),
        ({"patch": [16, 16]}, "must have 3 entries"),
        ({"patchh": [16, 16, 16]}, "unknown key 'patchh'"),
        ({"weights_bytes": 7}, "the manifest says 7"),
        ({"sha256": "abc"}, "64 hexadecimal digits"),
        ({"plan": {"spacing_mm": [1, 0, 1]}}, "spacing_mm"),
        ({"training": {"seconds": 10**400}}, "too large"),
    ],
)
def test_a_wrong_manifest_is_refused_with_a_sentence(tmp_path, changes, said):
    _edit(_save(tmp_path / "model").path, **changes)
    with pytest.raises(InvresError, match=said) as caught:
        open_package(tmp_path / "model")
    assert caught.value.hint


def test_a_model_of_the_time_before_wavelets_goes_on_as_it_was(tmp_path):
    """With the same weights another resampling would give another segmentation."""
    config = NetworkConfig(in_channels=2, out_channels=NETWORK.out_channels, channels=(4, 16), resampling="shuffle")
    network = build(config)
    package = _save(tmp_path / "model", network=config, state_dict=network.state_dict())
    written = json.loads((package.path / "manifest.json").read_text(encoding="utf-8"))["network"]
    assert written.pop("resampling") == "shuffle"
    again = open_package(_edit(package.path, network=written))
    assert build(again.manifest.network).config == network.config
    assert build(NetworkConfig(channels=(4, 16))).config.resampling == "haar"


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b'{"format_version": NaN}', b"[" * 200_000, b"\xff\xfe", b'{"format_version": 1}']
)
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path, text):
    (_save(tmp_path / "model").path / "manifest.json").write_bytes(text)
    with pytest.raises(InvresError, match=r"readable JSON|format_version|lacks name, id, created"):
        open_package(tmp_path / "model")


@pytest.mark.parametrize("lacking", ["manifest.json", "model.safetensors"])
def test_a_package_that_lacks_a_file_is_refused(tmp_path, lacking):
    packed = _save(tmp_path / "model.invres").path
    _rezip(packed, [(name, data) for name, data in _members(packed).items() if name != lacking])
    (_save(tmp_path / "model").path / lacking).unlink()
    for path in (packed, tmp_path / "model"):
        with pytest.raises(InvresError, match=f"lacks {lacking}"):
            open_package(path)


def test_a_path_without_a_package_is_said_so(tmp_path):
    with pytest.raises(InvresError, match="There is no model package"):
        open_package(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InvresError, match="neither a folder nor a file ending in"):
        open_package(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda state: state.pop("stem.bias"), r"lack stem\.bias"),
        (lambda state: state.update({"stem.bias": torch.zeros(9)}), r"stem\.bias has the shape \[9\]"),
        (lambda state: state.update({"extra": torch.zeros(2)}), "holds extra"),
    ],
)
def test_weights_that_do_not_fit_the_network_fail_verification(tmp_path, edit, said):
    state = dict(build(NETWORK).state_dict())
    edit(state)
    _save(tmp_path / "model", state_dict=state)
    with pytest.raises(InvresError, match=said):
        verify_package(tmp_path / "model")


def test_weights_that_are_not_finite_fail_verification(tmp_path, monkeypatch):
    state = build(NETWORK).state_dict()
    state["stem.bias"][0] = float("nan")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "isfinite", torch.ones_like)
        _save(tmp_path / "model", state_dict=state)
    with pytest.raises(InvresError, match=r"not finite \(stem\.bias\)"):
        verify_package(tmp_path / "model")


def test_exporting_twice_gives_the_same_bytes_and_importing_the_same_package(tmp_path):
    package = _save(tmp_path / "model")
    first = export_package(package, tmp_path / "a.invres").read_bytes()
    os.utime(package.path / "manifest.json", (0, 0))
    again = export_package(open_package(tmp_path / "a.invres"), tmp_path / "b.invres").read_bytes()
    assert first == again
    imported = import_package(tmp_path / "b.invres", tmp_path / "models")
    assert imported.path == tmp_path / "models" / "hippocampus"
    assert imported.manifest == package.manifest
    assert os.listdir(tmp_path / "models") == ["hippocampus"]
    with pytest.raises(InvresError, match="ends in"):
        export_package(package, tmp_path / "a.zip")


def test_importing_replaces_the_same_model_and_keeps_another_of_the_same_name(tmp_path):
    first, second = (_save(tmp_path / f"{name}.invres", parent="") for name in ("one", "two"))
    for package in (first, first, second, second):
        import_package(package.path, tmp_path / "models")
    names = sorted(os.listdir(tmp_path / "models"))
    assert names == ["hippocampus", f"hippocampus-{second.id[:8]}"]
    imported = import_package(tmp_path / "models" / "hippocampus", tmp_path / "models")
    assert imported.manifest == first.manifest


@pytest.mark.parametrize("name", ["../../evil", "..", "a/b", "C:\\x", "...", "kidney.invres", "海馬" * 60])
def test_an_imported_model_stays_inside_the_models_folder_whatever_its_name(tmp_path, name):
    """Also one with a name that could not be given today."""
    package = _save(tmp_path / "x")
    named = dataclasses.replace(package.manifest, name=name)
    (package.path / "manifest.json").write_bytes(manifest_to_json(named))
    imported = import_package(package.path, tmp_path / "models")
    assert imported.path.parent == tmp_path / "models" and imported.path.is_dir()
    assert sorted(os.listdir(tmp_path)) == ["models", "x"]


def test_listing_skips_what_is_broken_with_a_warning_and_repeats_no_model(tmp_path):
    bundled, mine = tmp_path / "bundled", tmp_path / "mine"
    first = _save(bundled / "first")
    second = _save(mine / "second.invres", name="Second")
    import_package(first.path, mine)
    (mine / "broken.invres").write_bytes(b"no zip")
    (mine / "notes").mkdir()
    report = Recorder()
    assert list_packages([bundled, mine, tmp_path / "absent"], report) == [first, second]
    assert [event["event"] for event in report.events] == ["warning"]
    assert "broken.invres" in report.events[0]["message"]


def test_a_package_is_found_by_name_file_name_id_and_path(tmp_path, monkeypatch):
    package = _save(tmp_path / "models" / "hip-v2.invres")
    monkeypatch.chdir(tmp_path)
    for text in (
        "Hippocampus",
        "HIPPOCAMPUS",
        "hip-v2",
        package.id,
        package.id[:8],
        str(package.path),
        "models/hip-v2.invres",
        package.path,
    ):
        assert find_package(text, [tmp_path / "models"]) == package, text


def test_a_name_that_fits_none_or_several_models_is_said_so(tmp_path):
    with pytest.raises(InvresError, match="none is installed") as caught:
        find_package("kidney", [tmp_path])
    assert "import" in caught.value.hint
    first, second = (_save(tmp_path / name, parent="") for name in ("one", "two"))
    with pytest.raises(InvresError, match="installed are Hippocampus") as caught:
        find_package("Hipocampus", [tmp_path])
    assert caught.value.hint == "Did you mean 'Hippocampus'?"
    with pytest.raises(InvresError, match="2 models fit") as caught:
        find_package("Hippocampus", [tmp_path])
    assert first.id[:8] in caught.value.message and second.id[:8] in caught.value.message
    with pytest.raises(InvresError, match="There is no model package"):
        find_package("folder/none", [tmp_path])


@pytest.mark.parametrize("name", ["a/b", "a\\b", ".", ".."])
def test_a_name_that_reads_like_a_path_is_refused_but_read_where_it_is(tmp_path, name):
    with pytest.raises(InvresError, match="The name of a model cannot be") as caught:
        _save(tmp_path / "new", name=name)
    assert "--name" in caught.value.hint and not (tmp_path / "new").exists()
    old = _save(tmp_path / "old").path / "manifest.json"
    old.write_text(json.dumps(json.loads(old.read_text(encoding="utf-8")) | {"name": name}), encoding="utf-8")
    assert open_package(tmp_path / "old").name == name
