"""Data: sources of images, and the fixed splits that are made of them."""

from advbench.data.augment import Augment
from advbench.data.base import ArraySplit, Info, Source, Split, Splits

__all__ = ["ArraySplit", "Augment", "Info", "Source", "Split", "Splits"]
