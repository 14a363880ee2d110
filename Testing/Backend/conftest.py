"""Every backend test starts from the same random state."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    import torch

    torch.manual_seed(0)
    np.random.seed(0)
