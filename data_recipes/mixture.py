"""Mixture: weighted recipes as one endless source; record(i) is a pure function of (seed, i)."""

from __future__ import annotations

from collections.abc import Mapping

from omnimri.example import Record

from .recipe import Recipe, generator, pick


class Mixture:
    """Draw each record from one of several recipes."""

    def __init__(self, recipes: Mapping[Recipe, float], *, seed: int) -> None:
        """Take recipes with their weights.

        Raises:
            ValueError: no recipe has a positive weight.
        """
        if not recipes or min(recipes.values()) < 0 or sum(recipes.values()) <= 0:
            raise ValueError(f"expected recipes with positive weights, got {list(recipes.values())}")
        self.recipes, self.weights, self.seed = tuple(recipes), tuple(recipes.values()), seed

    def record(self, index: int) -> Record:
        """Record `index`; negative indices never collide with positive ones and serve validation."""
        recipe = pick(generator(self.seed, "mixture", index), self.recipes, self.weights)
        return recipe.record(self.seed, index)
