"""python -m data_recipes list | build NAME --count N --out DIR | show NAME --count N --out DIR."""

from __future__ import annotations

import argparse
import html
import os
import sys
from pathlib import Path

from . import RECIPES, Phantom, Recipe, Synthetic


def make(name: str, data: str | None) -> Recipe:
    """A recipe by name.

    Raises:
        ValueError: unknown, or its folder is not given.
    """
    if name == "phantom":
        return Phantom()
    if name == "synthetic" and data:
        return Synthetic(data)
    raise ValueError(f"expected a recipe from {', '.join(RECIPES)} (synthetic with --data FOLDER), got {name!r}")


def show(recipe: Recipe, *, seed: int, count: int, out: Path) -> None:
    """Write an HTML page of records: slices, masks, text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from omnimri.example import normalise

    out.mkdir(parents=True, exist_ok=True)
    parts = ["<!doctype html><meta charset=utf-8><title>records</title><p>Research use only. Not a medical device.</p>"]
    for i in range(count):
        record = recipe.record(seed, i)
        images = normalise(record.images)[:, 1]
        figure, axes = pyplot.subplots(2, len(images), figsize=(2 * len(images), 4), squeeze=False)
        for k, image in enumerate(images):
            axes[0, k].imshow(image, cmap="gray", vmin=0, vmax=1.2)
            axes[1, k].imshow(record.labels[k], cmap="nipy_spectral", vmin=0, vmax=33)
            axes[1, k].contour((record.lesions[k] > 0) & (record.lesions[k] < 255), [0.5], colors="white")
        for axis in axes.flat:
            axis.axis("off")
        figure.tight_layout()
        figure.savefig(out / f"{i}.png", dpi=70)
        pyplot.close(figure)
        said = "".join(f"<li><b>{m.role}</b> {html.escape(m.text)}</li>" for chat in record.conversations for m in chat)
        parts.append(f"<h3>{i}: {record.plane} {record.sequence}</h3><img src={i}.png><p>{html.escape(record.caption)}</p><ul>{said}</ul>")
    (out / "index.html").write_text("\n".join(parts))


def main(argv: list[str] | None = None) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m data_recipes", description=__doc__)
    parser.add_argument("command", choices=("list", "build", "show"))
    parser.add_argument("name", nargs="?")
    parser.add_argument("--data", default=os.environ.get("OMNIMRI_DATA"), help="folder of label maps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.command == "list":
            for recipe in RECIPES.values():
                print(f"{recipe.name}\n  tasks: {', '.join(recipe.tasks)}\n  licence: {recipe.licence}\n"
                      f"  citation: {recipe.citation}\n  obtain: {recipe.obtain}")
            return 0
        if not args.name or not args.out:
            raise ValueError("expected the name of a recipe and --out DIR")
        recipe = make(args.name, args.data)
        if args.command == "build":
            from .store import build

            print(f"{build(recipe, seed=args.seed, count=args.count, out=args.out)} records in {args.out}")
        else:
            show(recipe, seed=args.seed, count=args.count, out=args.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
