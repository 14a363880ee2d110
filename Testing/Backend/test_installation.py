"""What `pip install ./Backend` leaves: a package that has its models and recipes without the clone it came from."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from invres.modelpackage import open_package

BROUGHT = ("Resources/Models", "Resources/Recipes", "LICENSE.txt", "NOTICE")
NEEDED = 77  # as pyproject.toml has it


@pytest.fixture(scope="module", autouse=True)
def tools():
    for name in ("pip", "setuptools"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"this Python has no {name}, which builds the package")
    version = importlib.metadata.version("setuptools")
    if int(version.partition(".")[0]) < NEEDED:
        pytest.skip(f"setuptools {version} is too old to build the package; {NEEDED} or newer is needed")


def python(*arguments, cwd, **environment):
    """Runs this Python on a folder; nothing of ours is on its path unless it is named."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True)


def files_below(folder: Path) -> dict[str, bytes]:
    """What is brought, by path below `folder`."""
    paths = [path for name in BROUGHT for path in (folder / name, *(folder / name).rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.name[0] != "."}


@pytest.fixture(scope="module")
def installed(repository, tmp_path_factory) -> Path:
    """The folder of packages that `pip install ./Backend` has filled."""
    folder, before = tmp_path_factory.mktemp("installed"), sorted(os.listdir(repository / "Backend"))
    # Nothing is downloaded, and nothing gets into the Python that runs this.
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--disable-pip-version-check")
    command = ("-m", "pip", "install", *offline, "--target", folder / "packages", repository / "Backend")
    done = python(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(repository / "Backend")) == before, "building left something in the source tree"
    return folder / "packages"


def test_an_installed_package_has_its_models_recipes_schema_and_licences(installed, repository):
    brought = files_below(installed / "invres")
    assert brought == files_below(repository) and len(brought) > 10
    schema = "manifest.schema.json"
    assert (installed / "invres" / schema).read_bytes() == (repository / "Backend/invres" / schema).read_bytes()


def test_an_installed_package_lists_and_describes_its_models_and_knows_its_recipes(installed, repository, tmp_path):
    def invres(*arguments):
        return python("-m", "invres", *arguments, cwd=tmp_path, PYTHONPATH=str(installed))

    empty = tmp_path / "none"
    done = invres("models", "list", "--models-dir", empty, "--json")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout.splitlines()[-1])["models"]
    assert {Path(model["path"]) for model in listed} == set((installed / "invres/Resources/Models").iterdir())
    for name in ("brain-any-contrast", "hippocampus-t1"):
        done = invres("describe", name)
        version = open_package(repository / "Resources/Models" / name).manifest.version
        assert done.returncode == 0 and done.stdout.startswith(f"{name} {version}: "), done
    done = invres("train", "--data", empty, "--recipe", "nothing", "--output", tmp_path / "run")
    named = ", ".join(sorted(path.stem for path in (repository / "Resources/Recipes").glob("*.json")))
    assert done.returncode == 2 and f"the recipes are {named}, or give" in done.stderr


@pytest.fixture
def clone(repository, tmp_path) -> Path:
    """A clone as far as the build needs it."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(repository / "Backend", tmp_path / "clone" / "Backend", ignore=ignored)
    for name in BROUGHT:
        copy = shutil.copytree if (repository / name).is_dir() else shutil.copy
        (tmp_path / "clone" / name).parent.mkdir(exist_ok=True)
        copy(repository / name, tmp_path / "clone" / name)
    return tmp_path / "clone"


def built(kind, clone):
    """Builds a "wheel", an "editable" one or an "sdist" into the folder above the clone."""
    code = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
    return python("-c", code, clone.parent, cwd=clone / "Backend")


def test_a_source_distribution_brings_what_lies_beside_backend(clone, tmp_path):
    done = built("sdist", clone)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as stream:
        names = {name.partition("/")[2] for name in stream.getnames()}
    assert files_below(clone).keys() | {"setup.py", "invres/manifest.schema.json"} <= names


def test_an_editable_installation_uses_them_where_they_are(clone, tmp_path):
    done = built("editable", clone)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 100_000 and not (clone / "Backend/invres/Resources").exists()
    code = "from invres.modelpackage import bundled_models_dir; print(bundled_models_dir())"
    found = python("-c", code, cwd=tmp_path, PYTHONPATH=str(clone / "Backend")).stdout.strip()
    assert Path(found) == (clone / "Resources/Models").resolve()


def test_a_folder_without_its_models_is_not_built(clone, tmp_path):
    shutil.rmtree(clone / "Resources")
    done = built("wheel", clone)
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl"))
    assert "error: Resources/Models is missing beside Backend" in done.stderr
