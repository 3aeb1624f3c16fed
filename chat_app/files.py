"""Files of a session: names without surprises, JSON that is whole or not there, and arrays handed out under addresses nobody can guess."""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from omnimri.io.nifti import write_nifti


def plain_name(name: str) -> str:
    """A file name with nothing but letters, digits, dots and dashes; its suffixes stay."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name)[-64:].lstrip(".") or "study"


def write_json(path: Path, value: object) -> None:
    """Write whole or not at all, and flushed: what a person decided must outlive a killed server."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with partial.open("w") as f:
        json.dump(value, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


_counting = Lock()


def in_use(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a session, its first argument, during which the session's study stays in memory."""

    @functools.wraps(function)
    def held(session: Any, *args: Any, **more: Any) -> Any:
        with _counting:
            session.users += 1
        try:
            return function(session, *args, **more)
        finally:
            with _counting:
                session.users -= 1

    return held


class HandedOut:
    """Arrays as NIfTI files that the viewer may fetch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[str, tuple[torch.Tensor, str, Path]] = {}
        """Name -> array, token and file."""

    def address(self, name: str, voxels: torch.Tensor, affine: torch.Tensor) -> str:
        """The address of a (1, X, Y, Z) array; the same as long as the array is the same."""
        held = self._held.get(name)
        if held is None or held[0] is not voxels:
            if held is not None:
                held[2].unlink(missing_ok=True)
            token = secrets.token_hex(16)
            path = self.folder / f"{token[:8]}.nii"
            self.folder.mkdir(exist_ok=True)
            write_nifti(path, voxels[0], affine)
            self._held[name] = held = (voxels, token, path)
        return f"omnimri/file/{held[1]}.nii"

    def find(self, token: str) -> Path | None:
        """The file of a token."""
        return next((path for _, known, path in list(self._held.values()) if known == token), None)

    def clear(self) -> None:
        """Remove every file."""
        self._held = {}
        shutil.rmtree(self.folder, ignore_errors=True)
