"""One thread per process: the models here are small, and the suite runs in several processes."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_modules() -> Iterator[None]:
    """Files of a test, imported in this process, do not keep their names from the next test's."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(tempfile.gettempdir()):
            del sys.modules[name]
