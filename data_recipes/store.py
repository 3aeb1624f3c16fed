"""Records on disk through `datasets`: an Arrow folder of rows that turn back into the same records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from omnimri.conversation import Message
from omnimri.example import Record

from .recipe import Recipe

_TENSORS = ("images", "positions_mm", "labels", "lesions")


def to_row(record: Record) -> dict[str, Any]:
    """Columns of a record: text to read and filter by, and its tensors as one safetensors blob."""
    tensors = {k: getattr(record, k).contiguous() for k in _TENSORS if getattr(record, k) is not None}
    tensors |= {f"kspace.{k}": v.contiguous() for k, v in record.kspace.items()}
    chats = [[[m.role, m.text] for m in chat] for chat in record.conversations]
    return {
        "plane": record.plane,
        "sequence": record.sequence or "",
        "spacing_mm": list(record.spacing_mm),
        "lesion_places": list(record.lesion_places or ()),
        "lesion_kinds": list(record.lesion_kinds or ()),
        "lesion_lobes": list(record.lesion_lobes or ()),
        "technique": record.technique,
        "parameters": json.dumps(dict(record.parameters)),
        "signal": list(record.signal),
        "caption": record.caption,
        "facts": list(record.facts),
        "conversations": json.dumps(chats),
        "tensors": save(tensors),
    }


def from_row(row: dict[str, Any]) -> Record:
    """The record of a row."""
    tensors = load(row["tensors"])
    slice_mm, row_mm, column_mm = row["spacing_mm"]
    return Record(
        images=tensors["images"],
        positions_mm=tensors["positions_mm"],
        plane=row["plane"],
        spacing_mm=(slice_mm, row_mm, column_mm),
        sequence=row["sequence"] or None,
        labels=tensors.get("labels"),
        lesions=tensors.get("lesions"),
        lesion_places=tuple(row["lesion_places"]),
        lesion_kinds=tuple(row["lesion_kinds"]),
        lesion_lobes=tuple(row["lesion_lobes"]),
        technique=row["technique"],
        parameters=json.loads(row["parameters"]),
        signal=tuple(row["signal"]),
        caption=row["caption"],
        conversations=tuple(tuple(Message(r, t) for r, t in chat) for chat in json.loads(row["conversations"])),
        kspace={k.removeprefix("kspace."): v for k, v in tensors.items() if k.startswith("kspace.")},
        facts=tuple(row["facts"]),
    )


def build(recipe: Recipe, *, seed: int, count: int, out: Path) -> int:
    """Write `count` records of a recipe as a `datasets` folder; the number of rows written."""
    from datasets import Dataset, Features, List, Value

    text = Value("string")
    features = Features(
        {
            "plane": text,
            "sequence": text,
            "spacing_mm": List(Value("float64")),
            "lesion_places": List(text),
            "lesion_kinds": List(text),
            "lesion_lobes": List(text),
            "technique": text,
            "parameters": text,
            "signal": List(text),
            "caption": text,
            "facts": List(text),
            "conversations": text,
            "tensors": Value("binary"),
        }
    )

    def rows() -> Iterator[dict[str, Any]]:
        for i in range(count):
            yield to_row(recipe.record(seed, i))

    dataset = Dataset.from_generator(rows, features=features, cache_dir=str(out) + ".cache")
    dataset.info.license, dataset.info.citation = recipe.licence, recipe.citation
    dataset.save_to_disk(str(out))
    return len(dataset)


class Stored(Recipe):
    """Records that were built before."""

    name = "stored"
    licence = "that of the recipe it was built from (in the folder's dataset_info.json)"
    citation = "that of the recipe it was built from"
    obtain = "python -m data_recipes build NAME --count N --out DIR"
    tasks = ("segment", "detect", "reconstruct", "report")

    def __init__(self, folder: str | Path) -> None:
        """Open a folder.

        Raises:
            ValueError: it is not a folder of records.
        """
        from datasets import load_from_disk

        try:
            self.rows = load_from_disk(str(folder))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"expected a folder written by 'python -m data_recipes build', got {error}") from None

    def record(self, seed: int, index: int) -> Record:
        """Row `index`, counted round and round; the seed has no part in it."""
        return from_row(self.rows[index % len(self.rows)])
