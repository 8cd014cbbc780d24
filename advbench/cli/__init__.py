"""The command line, a file per subcommand."""

from advbench.cli.main import main

__all__ = ["main"]
