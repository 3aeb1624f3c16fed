"""Mixture: weighted recipes as one endless source; record(i) is a pure function of (seed, i)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from omnimri.example import Record

from .recipe import Recipe, generator, pick
from .variation import vary

WINDOW = 24
"""Records that are kept for another look."""


class Mixture:
    """Draw each record from one of several recipes."""

    def __init__(self, recipes: Mapping[Recipe, float], *, seed: int, reuse: int = 1, tellings: int = 1) -> None:
        """Take recipes with their weights.

        Args:
            reuse: How often each record is shown, `WINDOW` records later and varied from the second time on; what is kept for it
                saves time and changes nothing.
            tellings: How many records in a row are of one study, each with exchanges of its own.

        Raises:
            ValueError: no recipe has a positive weight, or a count is below 1.
        """
        if not recipes or min(recipes.values()) < 0 or sum(recipes.values()) <= 0:
            raise ValueError(f"expected recipes with positive weights, got {list(recipes.values())}")
        if reuse < 1 or tellings < 1:
            raise ValueError(f"expected a record to be used and told at least once, got {min(reuse, tellings)}")
        self.recipes, self.weights, self.seed, self.reuse = tuple(recipes), tuple(recipes.values()), seed, reuse
        self.tellings = tellings
        self._kept: OrderedDict[int, Record] = OrderedDict()
        self._last: tuple[int | None, Any] = None, None

    def record(self, index: int) -> Record:
        """Record `index`; negative indices never collide with positive ones and serve validation."""
        if self.tellings == 1:
            return self._shown(index)
        study = index // self.tellings
        return self._recipe(self._source(study)).retell(self._shown(study), generator(self.seed, "telling", index))

    def _source(self, study: int) -> int:
        """Which study is made for a place of the order in which studies are shown."""
        block, place = divmod(study, WINDOW * self.reuse)
        return block * WINDOW + place % WINDOW

    def _shown(self, study: int) -> Record:
        """A study as it is shown at its place: varied where it has been shown before."""
        if study == self._last[0]:
            return self._last[1]
        source = self._source(study)
        if source not in self._kept:
            self._kept[source] = self._recipe(source).record(self.seed, source)
            while len(self._kept) > (WINDOW if self.reuse > 1 else 1):
                self._kept.popitem(last=False)
        again = study % (WINDOW * self.reuse) >= WINDOW
        self._last = study, vary(self._kept[source], generator(self.seed, "look", study)) if again else self._kept[source]
        return self._last[1]

    def _recipe(self, source: int) -> Recipe:
        return pick(generator(self.seed, "mixture", source), self.recipes, self.weights)
