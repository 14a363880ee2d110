"""Boots Slicer's real MRML from slicer-core for every test of the panel: scene, logics, subject hierarchy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mrml_scene import emptyScene


@pytest.fixture
def scene():
    """An empty scene with Slicer's logics on it; it is `slicer.mrmlScene` during the test."""
    with emptyScene() as scene:
        yield scene


@pytest.fixture(scope="session")
def one_channel_package(tmp_path_factory):
    """A model with the channel T1 that finds a bright ball, trained in seconds."""
    from small_models import ONE, trained_package

    return trained_package(tmp_path_factory.mktemp("models") / "balls", ("T1",), ONE)


@pytest.fixture(scope="session")
def two_channel_package(tmp_path_factory):
    """A model with the channels T1 and FLAIR and two labels."""
    from small_models import TWO, trained_package

    return trained_package(tmp_path_factory.mktemp("models") / "two balls", ("T1", "FLAIR"), TWO)


@pytest.fixture
def small_model(one_channel_package):
    """What the panel knows of the one-channel model."""
    from small_models import model_info

    return model_info(one_channel_package)


@pytest.fixture(scope="session")
def crop_model(one_channel_package, tmp_path_factory):
    """The small model as if it had been trained on crops around the ball."""
    from small_models import model_info, of_crops

    return model_info(of_crops(one_channel_package, tmp_path_factory.mktemp("crops") / "crops"))


@pytest.fixture(scope="session")
def finished_run(one_channel_package, tmp_path_factory):
    """The folder of a fine-tuning on three cases, beside it `data`; made once, so copy it to change it."""
    from tiny_run import tuned

    return tuned(one_channel_package, tmp_path_factory.mktemp("fine-tuning"))


@pytest.fixture(scope="session")
def backend():
    """The real backend behind the real BackendProcess, one worker for all tests."""
    from backends import RecordingBackend

    backend = RecordingBackend()
    yield backend
    backend.stop()
