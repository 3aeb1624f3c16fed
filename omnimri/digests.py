"""Folders that are written whole or not at all, with the digest of every file in `digests.json`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

DIGESTS = "digests.json"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_digests(folder: Path) -> None:
    """Write `digests.json` over every other file of the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != DIGESTS)
    values = {str(p.relative_to(folder)): sha256(p) for p in files}
    (folder / DIGESTS).write_text(json.dumps(values, indent=1))


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that has digests: a sentence, or None when all files are as written."""
    try:
        values: dict[str, str] = json.loads((folder / DIGESTS).read_text())
    except (OSError, ValueError) as error:
        return f"{DIGESTS} cannot be read ({type(error).__name__})"
    for name, digest in values.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} is damaged (its SHA-256 differs from the one written with it)"
    return None


def publish(partial: Path, final: Path) -> None:
    """Add digests to a finished folder, flush it to disk and move it into place in one step."""
    write_digests(partial)
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as f:
                os.fsync(f.fileno())
    if final.exists():
        shutil.rmtree(final)
    partial.replace(final)
