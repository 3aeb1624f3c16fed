"""OmniMRI: one vision-language model for the MRI workflow. An independent implementation. Research use only.

Names are imported when they are first used: a process that only decodes files never imports torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assistant import Assistant
    from .io import open_study
    from .model.omnimri import OmniMRI
    from .volume import KSpace, Study, Volume

# torch asks at its first allocation: large tensors in huge pages. Most of the time of fresh memory is its page faults, and a
# training step here is a third shorter without them. Values do not change.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
__all__ = ["Assistant", "KSpace", "OmniMRI", "Study", "Volume", "open_study"]
_HOME = {"Assistant": "assistant", "KSpace": "volume", "OmniMRI": "model.omnimri", "Study": "volume", "Volume": "volume",
         "open_study": "io"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'omnimri' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
