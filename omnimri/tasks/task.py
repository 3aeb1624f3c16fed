"""The contract of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from ..model.config import OmniMRIConfig


class Task(Protocol):
    """An ability: what it is called, the token that drives it, its head, its truth, its loss and its read-out.

    Each task takes what its ability needs: see the methods of the four.
    """

    name: str
    token: str
    def head(self, config: OmniMRIConfig) -> nn.Module | None:
        """The module that the token's hidden state drives; None where the answer is text."""
        ...

    def target(self, *args: Any, **kwargs: Any) -> Any:
        """The truth, from a collated batch."""
        ...

    def loss(self, *args: Any, **kwargs: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Name -> (sum, count) of each loss term."""
        ...

    def read(self, *args: Any, **kwargs: Any) -> Any:
        """The answer in the scan's own space."""
        ...
