"""Backbones: undefended classifiers, a module for each family."""

from advbench.backbones.base import Backbone, Classifier

__all__ = ["Backbone", "Classifier"]
