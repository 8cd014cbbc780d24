"""Configs of the user's own come before shipped ones of the same name.

``--config-dir`` adds its directory at the end of Hydra's search path, where a changed copy of a
shipped config would never be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

OPTIONS = ("--config-dir", "-cd")


class OwnFirst(SearchPathPlugin):
    """Puts a directory before advbench's own."""

    folder: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            anchor = SearchPathQuery(provider="main")
            search_path.prepend(provider="own", path=f"file://{self.folder}", anchor=anchor)


def own_first(words: Sequence[str]) -> None:
    """Look into the directory that a command line names with ``--config-dir`` first."""
    OwnFirst.folder = None
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in OPTIONS:
            named = value if equals else (*words, "")[i + 1]
            OwnFirst.folder = Path(named).absolute() if named else None
    Plugins.instance().register(OwnFirst)
