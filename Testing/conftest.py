"""Fixtures of all tests: the repository's root and the optional folder of real volumes."""

from __future__ import annotations

import gc
import locale
import os
from pathlib import Path

import pytest

# Before torch is imported; the first as the command line does. Tiny volumes gain nothing from threads, which two
# processes of tests would take from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: of two processes of tests none should wait for the other's last file."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What all tests have imported stays; to look through it for garbage again and again takes a good part of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_locale():
    """GDCM, writing DICOM, leaves the locale C behind, in which Python opens text files as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real volumes: $INVRES_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("INVRES_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"real volumes are not here ({folder}); set INVRES_DATA to their folder")
    return folder
