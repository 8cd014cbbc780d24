"""Run directories: what is in one, which is the same run, and what made it."""

from advbench.runs.results import Accuracy, Results, StageResult

__all__ = ["Accuracy", "Results", "StageResult"]
