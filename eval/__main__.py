"""python -m eval tissue | segment | detect | picture: the project's figures on real scans; reading: seconds against other readers;
realism: simulated studies against real scans.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(argv: list[str] | None = None) -> int:
    """Run one suite."""
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    parser.add_argument("suite", choices=("tissue", "segment", "detect", "picture", "reading", "realism"))
    parser.add_argument("--checkpoint", metavar="DIR", help="default: the embedded one")
    parser.add_argument("--scan", type=Path, help="segment: a scan")
    parser.add_argument("--truth", type=Path, help="segment: its FreeSurfer labels (aseg or aparc+aseg)")
    parser.add_argument("--cases", type=Path, help="detect: a folder of BRATS 2013 cases")
    parser.add_argument("--maps", type=Path, help="realism: the folder of label maps")
    parser.add_argument("--scans", type=Path, help="realism: the folder that eval/scans.tsv is about")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)

    from omnimri.assistant import Assistant

    from .suite import detect, load_any, picture, segment, tissue_mni, to_structures, write_results

    try:
        if args.suite == "reading":
            from .reading import benchmark

            write_results({"suite": "reading", **benchmark()}, args.out)
            return 0
        assistant = Assistant(args.checkpoint)
        results: dict[str, Any] = {"suite": args.suite, "checkpoint_sha256": assistant.digest}
        if args.suite == "picture":
            results |= picture(assistant, args.out)
            print(results["text"])
            return 0
        if args.suite == "tissue":
            results |= tissue_mni(assistant)
        elif args.suite == "realism":
            from .realism import measure_realism

            if not args.maps or not args.scans:
                raise ValueError("expected --maps and --scans")
            results |= measure_realism(assistant, args.maps, args.scans)
        elif args.suite == "segment":
            if not args.scan or not args.truth:
                raise ValueError("expected --scan and --truth")
            study, _ = load_any(args.scan)
            _, truth = load_any(args.truth)
            results |= segment(assistant, study, to_structures(truth))
        else:
            if not args.cases:
                raise ValueError("expected --cases")
            for case in sorted(p for p in args.cases.iterdir() if p.is_dir()):
                truth_file = next(case.glob("*OTMultiClass*"))
                _, truth = load_any(truth_file)
                for contrast, counted in (("Flair", (1, 2, 3, 4)), ("T1c", (1, 3, 4))):
                    scan = next(p for p in case.iterdir() if contrast.lower() in p.name.lower())
                    study, _ = load_any(scan)
                    results[f"{case.name} {contrast}"] = detect(assistant, study, np.isin(truth, counted))
                    assistant.forget()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_results(results, args.out)
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
