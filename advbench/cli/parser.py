"""The parser of the subcommands that are not Hydra applications."""

from __future__ import annotations

import argparse
from typing import Any

from advbench.errors import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message} ({self.prog} --help)")
