"""What all tests on a GPU share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    """Random inputs do not depend on which tests ran before, in which worker."""
    torch.manual_seed(0)
