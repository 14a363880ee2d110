"""The step that pyproject.toml cannot say: the bundled models and recipes, which lie beside Backend, go into the wheel.

An installed package has them inside itself (`invres/Resources`, see `modelpackage.bundled_models_dir`). In a clone, in
an editable installation and in Slicer they are used where they are.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import SetupError

HERE = Path(__file__).resolve().parent
# The weights have licences of their own, which go where they go.
BROUGHT = ("Resources/Models", "Resources/Recipes", "LICENSE.txt", "NOTICE")
SCRATCH = tempfile.TemporaryDirectory()  # a `build` in the source tree would put files of yesterday into wheels


def bring(target: Path) -> None:
    """Copies what is brought into the folder `target`. Raises SetupError where something is missing."""
    for name in BROUGHT:
        # In a source distribution they lie beside this file.
        source = next((folder / name for folder in (HERE, HERE.parent) if (folder / name).exists()), None)
        if source is None:
            raise SetupError(
                f"{name} is missing beside Backend, so the package would lack its models and recipes. Install from a "
                "whole clone of the repository, with pip 21.3 or newer: older ones build from a copy of one folder."
            )
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
        else:
            shutil.copy(source, target / name)


class BuildWithResources(build_py):
    """Puts them into the package that a wheel is made of."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            bring(Path(self.build_lib) / "invres")


class SdistWithResources(sdist):
    """Puts them beside this file in a source distribution."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        bring(Path(base_dir))


setup(
    cmdclass={"build_py": BuildWithResources, "sdist": SdistWithResources},
    options={"build": {"build_base": SCRATCH.name}, "egg_info": {"egg_base": SCRATCH.name}},
)
