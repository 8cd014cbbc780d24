"""Run directories: what is in one, which is the same run, and what made it."""

from advbench.runs.accuracy import Accuracy
from advbench.runs.results import Results, StageResult

__all__ = ["Accuracy", "Results", "StageResult"]
