"""Made-up data sets, each written once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from made_up_data import MAKERS, Made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Made]]:
    """The made-up set of that name; written once, and not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        known: dict[str, Made] = {}

        def get(name: str) -> Made:
            if name not in known:
                known[name] = MAKERS[name](tmp_path_factory.mktemp(name), patch)
            return known[name]

        yield get
