"""Mixture: weighted recipes as one endless source; record(i) is a pure function of (seed, i)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from omnimri.example import Record

from .recipe import Recipe, generator, pick
from .variation import vary

WINDOW = 24
"""Records that are kept for another look."""


class Mixture:
    """Draw each record from one of several recipes."""

    def __init__(self, recipes: Mapping[Recipe, float], *, seed: int, reuse: int = 1) -> None:
        """Take recipes with their weights.

        Args:
            reuse: How often each record is shown, `WINDOW` records later and varied from the second time on; what is kept for it
                saves time and changes nothing.

        Raises:
            ValueError: no recipe has a positive weight.
        """
        if not recipes or min(recipes.values()) < 0 or sum(recipes.values()) <= 0:
            raise ValueError(f"expected recipes with positive weights, got {list(recipes.values())}")
        if reuse < 1:
            raise ValueError(f"expected a record to be used at least once, got {reuse}")
        self.recipes, self.weights, self.seed, self.reuse = tuple(recipes), tuple(recipes.values()), seed, reuse
        self._kept: OrderedDict[int, Record] = OrderedDict()

    def record(self, index: int) -> Record:
        """Record `index`; negative indices never collide with positive ones and serve validation."""
        if self.reuse == 1:
            return self._made(index)
        block, place = divmod(index, WINDOW * self.reuse)
        look, number = divmod(place, WINDOW)
        source = block * WINDOW + number
        if source not in self._kept:
            self._kept[source] = self._made(source)
            while len(self._kept) > WINDOW:
                self._kept.popitem(last=False)
        record = self._kept[source]
        return vary(record, generator(self.seed, "look", index)) if look else record

    def _made(self, index: int) -> Record:
        recipe = pick(generator(self.seed, "mixture", index), self.recipes, self.weights)
        return recipe.record(self.seed, index)
