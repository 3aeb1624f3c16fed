"""python -m data_recipes list | build NAME --count N --out DIR | show NAME --count N --out DIR | patient --data DIR --out FILE |
speed --data DIR [--device cuda] [--slices N ...] [--processes N ...].
"""

from __future__ import annotations

import argparse
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


def patient(data: str, out: Path) -> None:
    """Write the example of the page: a FLAIR study with a glioblastoma, of a head that nothing is trained on."""
    from omnimri.io.nifti import write_nifti

    from .phantom import record_volume
    from .synthetic import CHOOSING_MAPS

    volume = record_volume(Synthetic(data, numbers=CHOOSING_MAPS, num_slices=28, mirror=False, kspace_size=0).record(77, 233))
    write_nifti(out, (volume.voxels[0] * 1000).round().int(), volume.affine)


def main(argv: list[str] | None = None) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m data_recipes", description=__doc__)
    parser.add_argument("command", choices=("list", "build", "show", "patient", "speed"))
    parser.add_argument("name", nargs="?")
    parser.add_argument("--data", default=os.environ.get("OMNIMRI_DATA"), help="folder of label maps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--slices", type=int, nargs="+", default=[8])
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    args = parser.parse_args(argv)
    try:
        if args.command == "list":
            for recipe in RECIPES.values():
                print(f"{recipe.name}\n  tasks: {', '.join(recipe.tasks)}\n  licence: {recipe.licence}\n"
                      f"  citation: {recipe.citation}\n  obtain: {recipe.obtain}")
            return 0
        if args.command == "patient":
            if not args.data or not args.out:
                raise ValueError("expected --data, the folder of label maps, and --out FILE.nii.gz")
            patient(args.data, args.out)
            return 0
        if args.command == "speed":
            from .speed import slices_a_second

            if not args.data:
                raise ValueError("expected --data, the folder of label maps")
            for number in args.processes:
                for n in args.slices:
                    rate = slices_a_second(args.data, device=args.device, num_slices=n, processes=number)
                    print(f"{args.device}, processes {number}, studies of {n} slices: {rate:.0f} slices a second", flush=True)
            return 0
        if not args.name or not args.out:
            raise ValueError("expected the name of a recipe and --out DIR")
        recipe = make(args.name, args.data)
        if args.command == "build":
            from .store import build

            print(f"{build(recipe, seed=args.seed, count=args.count, out=args.out)} records in {args.out}")
        else:
            from omnimri.checkpoint import EMBEDDED, load_tokenizer

            from .page import show

            show(recipe, load_tokenizer(EMBEDDED), seed=args.seed, count=args.count, out=args.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
