"""Backbones: undefended classifiers, a module for each family."""

from advbench.backbones.base import Classifier

__all__ = ["Classifier"]
