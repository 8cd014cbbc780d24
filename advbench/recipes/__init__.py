"""Recipes: how a training step makes its inputs and its loss."""

from advbench.recipes.awp import AWP
from advbench.recipes.base import AdversarialRecipe, Recipe
from advbench.recipes.fgsm_rs import FGSMRS
from advbench.recipes.mart import MART
from advbench.recipes.mixed import Mixed
from advbench.recipes.mtard import MTARD
from advbench.recipes.pgd_at import PGDAT
from advbench.recipes.standard import Standard
from advbench.recipes.trades import TRADES

__all__ = [
    "AWP",
    "FGSMRS",
    "MART",
    "MTARD",
    "PGDAT",
    "TRADES",
    "AdversarialRecipe",
    "Mixed",
    "Recipe",
    "Standard",
]
