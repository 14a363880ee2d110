"""What backend tests share: the random state that each starts from, and a data set."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_datasets import write_dataset


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    import torch

    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """The curves of a training take a quarter of a tiny one; `test_curves` looks at them."""
    monkeypatch.setattr("invres.curves.draw_curves", lambda folder: folder)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A data set of three cases with two channels and three labels, for tests that only read it."""
    return write_dataset(tmp_path_factory.mktemp("phantoms"))
