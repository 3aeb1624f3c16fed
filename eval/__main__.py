"""python -m eval COMMAND: generated reports (report, compare, perturb, facts), suites of cases (suite), and single studies of the
project itself (reading, speed, reconstruct, realism, resampled, paraphrase, planted, probe, picture). Everything runs offline.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m eval", description=f"{__doc__} Research use only. Not a medical device.")
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, told: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=told, description=told)
        sub.add_argument("--out", type=Path, required=True, metavar="DIR")
        return sub

    texts = command("report", "metrics of generated reports against references, with intervals")
    texts.add_argument(
        "--predictions", type=Path, required=True, metavar="FILE", help="JSONL or CSV: id, prediction, reference or references, patient"
    )
    texts.add_argument("--references", type=Path, metavar="FILE", help="JSONL or CSV: id, reference or references, patient")
    systems = command("compare", "two or more systems on the same reports, with paired tests")
    systems.add_argument("systems", nargs="+", type=Path, metavar="FILE")
    systems.add_argument("--references", type=Path, metavar="FILE")
    ranks = command("perturb", "which metric ranks a clinical error below a paraphrase")
    for sub in (texts, systems, ranks):
        sub.add_argument("--encoder", type=Path, metavar="FOLDER", help="a local model for BERTScore and embedding similarity")
        sub.add_argument(
            "--scorer", action="append", default=[], metavar="MODULE:FUNCTION", help="any other metric: a number for each report"
        )
    for sub in (texts, systems):
        sub.add_argument("--seed", type=int, default=0)
    gold = command("facts", "the extractor of facts against annotated sentences")
    gold.add_argument("--gold", type=Path, required=True, metavar="FILE")
    suite = command(
        "suite", "predict and score the cases of a suite: synthetic, mni, colin, freesurfer, individuals, brats, refused, or all"
    )
    suite.add_argument("suite")
    suite.add_argument("--count", type=int, default=24, help="cases of the synthetic suite")
    suite.add_argument("--score-only", action="store_true", help="score what was predicted; no model is loaded")
    suite.add_argument("--no-controls", action="store_true", help="without random weights")
    suite.add_argument("--pooled", action="store_true", help="also Dice over the voxels of all cases together")
    rebuilt = command("reconstruct", "reconstruction of simulated acquisitions beside zero-filling, CG-SENSE, BART and sigpy")
    rebuilt.add_argument("--coils", type=int, nargs="+", default=(8,))
    rebuilt.add_argument("--accelerations", type=int, nargs="+", choices=(2, 4, 8, 12), default=(2, 4, 8, 12))
    rebuilt.add_argument("--noise", nargs="+", choices=("low", "moderate", "high"), default=("moderate",))
    rebuilt.add_argument("--raw", type=Path, metavar="KSPACE", help="also a picture of measured k-space, beside BART's")
    real = command("realism", "simulated studies against real scans")
    stored = command("resampled", "a labelled scan with its array turned, in larger voxels and as a mirrored person")
    other = command("paraphrase", "the same requests in other words")
    other.add_argument("--questions", type=Path, metavar="FILE", help="more questions: image|category|question|answer (VQA-Med 2019)")
    other.add_argument("--count", type=int, default=10, help="held-out simulated studies that are asked about")
    burnt = command("planted", "instructions burnt into pixels")
    burnt.add_argument("--count", type=int, default=50, help="held-out simulated studies")
    frozen = command("probe", "what frozen encoders know: linear probes of many and of few studies")
    frozen.add_argument("--encoder", type=Path, action="append", default=[], metavar="DIR", help="another encoder; may be repeated")
    frozen.add_argument("--count", type=int, default=200, help="simulated studies that a probe is fitted to")
    command("reading", "seconds to read a scan beside other readers")
    command("speed", "seconds of report metrics beside pycocoevalcap's")
    drawn = command("picture", "the picture in the README")
    for sub in (suite, rebuilt, real, stored, drawn, other, burnt, frozen):
        sub.add_argument("--checkpoint", metavar="DIR", help="default: the embedded one")
    for sub in (suite, rebuilt, real, other, burnt, frozen):
        sub.add_argument("--maps", type=Path, metavar="DIR", help="folder of label maps")
    for sub in (suite, rebuilt, real, stored, frozen):
        sub.add_argument(
            "--scans", type=Path, action="append", default=[], metavar="DIR", help="folder that eval/scans.tsv is about; may be repeated"
        )
    return top


def run(args: argparse.Namespace) -> None:
    """Run one command."""
    out: Path = args.out
    if args.command in ("report", "compare"):
        from .reports import chosen_metrics, compare_markdown, compare_systems, read_texts, report_markdown, score, to_json, write_atomic

        metrics, left_out = chosen_metrics(args.encoder, args.scorer)
        if args.command == "report":
            results: dict[str, Any] = score(read_texts(args.predictions, args.references), metrics, seed=args.seed) | {"left_out": left_out}
            text = report_markdown(results)
        else:
            if len(args.systems) < 2 or len({p.stem for p in args.systems}) < len(args.systems):
                raise ValueError("expected two or more files with different names, got fewer")
            results = compare_systems({p.stem: read_texts(p, args.references) for p in args.systems}, metrics, seed=args.seed)
            text = compare_markdown(results)
        write_atomic(out / "results.json", to_json(results))
        write_atomic(out / "results.md", text)
        print(text)
    elif args.command == "perturb":
        from .perturbation import rank, trials, write
        from .reports import chosen_metrics

        metrics, _ = chosen_metrics(args.encoder, args.scorer)
        cases = trials()
        write(rank(metrics, cases), cases, metrics, out)
        print((out / "results.md").read_text())
    elif args.command == "facts":
        from .metrics.facts import score_gold
        from .reports import read_rows, to_json, write_atomic

        results = score_gold([row for _, row in read_rows(args.gold)])
        write_atomic(out / "results.json", to_json(results))
        print(
            "\n".join(
                f"{k:12s} precision {v['precision']:.3f} recall {v['recall']:.3f} F1 {v['f1']:.3f} ({v['said']} said, {v['true']} true)"
                for k, v in results.items()
            )
        )
    elif args.command == "suite":
        from .cases import cases_of
        from .suite import run as run_suite

        cases = cases_of(args.suite, scans=args.scans, maps=args.maps, count=args.count)
        run_suite(cases, out, checkpoint=args.checkpoint, score_only=args.score_only, controls=not args.no_controls, pooled=args.pooled)
        print((out / "results.md").read_text())
    elif args.command in ("reading", "speed"):
        from .reports import to_json, write_atomic

        if args.command == "reading":
            from .reading import benchmark
        else:
            from .speed import benchmark
        write_atomic(out / "results.json", to_json(benchmark()))
        print((out / "results.json").read_text())
    else:
        from omnimri.assistant import Assistant

        assistant = Assistant(args.checkpoint)
        if args.command == "picture":
            from .suite import picture

            print(picture(assistant, out)["text"])
            return
        from .reports import to_json, write_atomic

        if args.command in ("paraphrase", "planted"):
            from . import paraphrase, planted
            from .cases import cases_of

            cases = cases_of("synthetic", maps=args.maps, count=args.count)
            if args.command == "paraphrase":
                found = paraphrase.measure(assistant, cases, args.questions)
                text = paraphrase.markdown(found)
            else:
                found = planted.measure(assistant, cases)
                text = planted.markdown(found)
            write_atomic(out / "results.json", to_json({"checkpoint_sha256": assistant.digest, **found}))
            write_atomic(out / "results.md", text)
            print(text)
            return
        if args.command == "resampled":
            from . import resampled

            ways = resampled.measure(assistant, args.scans)
            write_atomic(out / "results.json", to_json({"checkpoint_sha256": assistant.digest, "scans": ways}))
            write_atomic(out / "results.md", resampled.markdown(ways))
            print(resampled.markdown(ways))
            return
        if not args.maps or not args.scans:
            raise ValueError("expected --maps and --scans")
        if args.command == "reconstruct":
            from . import reconstruct

            if args.raw:
                reconstruct.picture(assistant, args.raw, out / "raw.png")
            setting = {"coils": args.coils, "noise": args.noise, "accelerations": args.accelerations}
            results = reconstruct.benchmark(assistant, scans=args.scans, maps=args.maps, **setting)
            write_atomic(out / "results.json", to_json(results))
            write_atomic(out / "results.md", reconstruct.markdown(results))
            print(reconstruct.markdown(results))
            return
        from . import probe, realism

        if args.command == "probe":
            results = probe.measure(assistant, args.maps, args.scans, args.encoder, count=args.count)
            text = probe.markdown(results)
        else:
            results = realism.measure_realism(assistant, args.maps, args.scans)
            text = realism.markdown(results)
        write_atomic(out / "results.json", to_json({"checkpoint_sha256": assistant.digest, **results}))
        write_atomic(out / "results.md", text)
        print(text)


def main(argv: list[str] | None = None) -> int:
    """Run one command: exit 2 with one sentence for input that cannot be used."""
    for key, value in OFFLINE.items():
        os.environ.setdefault(key, value)
    args = parser().parse_args(argv)
    try:
        if args.out.exists() and not args.out.is_dir():
            raise ValueError(f"expected --out DIR, got the file {args.out.name!r}")
        run(args)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
