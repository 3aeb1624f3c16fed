"""Recipes: where training records come from, under which licence, and how to obtain them."""

from .mixture import Mixture
from .phantom import Phantom
from .recipe import Recipe
from .synthetic import Synthetic

RECIPES: dict[str, type[Recipe]] = {r.name: r for r in (Phantom, Synthetic)}

__all__ = ["RECIPES", "Mixture", "Phantom", "Recipe", "Synthetic"]
