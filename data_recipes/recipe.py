"""Recipe: the contract of a data source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from omnimri.example import Record, stable_hash


class Recipe(ABC):
    """A source of records. A recipe without licence, citation and how-to-obtain cannot be defined."""

    name: ClassVar[str]
    licence: ClassVar[str]
    citation: ClassVar[str]
    obtain: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        for field in ("name", "licence", "citation", "obtain", "tasks"):
            if not getattr(cls, field, None) and not cls.__name__.startswith("_"):
                raise TypeError(f"recipe {cls.__name__} lacks {field!r}")

    @abstractmethod
    def record(self, seed: int, index: int) -> Record:
        """Make one record, a pure function of (seed, index)."""

    def retell(self, record: Record, g: torch.Generator) -> Record:
        """The same study with another caption and other exchanges; a recipe without text leaves it as it is."""
        return record



def generator(seed: int, *index: int | str) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    return torch.Generator().manual_seed(stable_hash(f"{seed}:{':'.join(map(str, index))}"))


def uniform(g: torch.Generator, low: float, high: float) -> float:
    """One number from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=g))


def pick(g: torch.Generator, options: tuple | list, weights: tuple[float, ...] | None = None):
    """One of `options`."""
    if weights is None:
        return options[int(torch.randint(len(options), (), generator=g))]
    return options[int(torch.multinomial(torch.tensor(weights), 1, generator=g))]
