"""Export: what a person takes away - report, table, masks, pictures, DICOM. Every file says what it is not."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnimri.anatomy import PLANES
from omnimri.answer import NOTICE, SIDES_UNKNOWN, UNLIKE
from omnimri.io.nifti import write_nifti
from omnimri.io.sandbox import environment

from .files import in_use
from .session import Session
from .views import LABEL_NAMES, segments

TIME_S = 180
NOT_DICOM = "SEG, SR and a de-identified copy need a DICOM study; this one is not."
NO_LETTERS = "Letters that this page cannot draw are shown as ?; report.md beside it has them."
MULTIFRAME = "SEG and SR need one DICOM instance for each slice; this series has its slices in one file."


def structures(session: Session) -> list[dict[str, Any]]:
    """Every outlined structure: label, name, ml, and percent of all that was outlined inside the skull; the largest first."""
    labels = session.reviewed()
    if labels is None or session.shown is None:
        return []
    values, counts = np.unique(labels.numpy(), return_counts=True)
    ml = session.shown.voxel_ml
    inside = session.brain_ml / ml or int(counts[values > 0].sum())
    rows = [
        {
            "label": int(v),
            "name": LABEL_NAMES.get(int(v), str(v)),
            "ml": round(float(n) * ml, 3),
            "percent": round(100 * float(n) / inside, 2),
        }
        for v, n in zip(values, counts, strict=True)
        if v
    ]
    return sorted(rows, key=lambda r: -r["ml"])


def table_csv(session: Session) -> str:
    """The structures as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ["label", "name", "ml", "percent"])
    writer.writeheader()
    writer.writerows(structures(session))
    return "\n".join(f"# {line}" for line in (f"{NOTICE} {signature(session)}", *caveats(session))) + f"\n{out.getvalue()}"


def caveats(session: Session) -> list[str]:
    """What was noticed when the study was read or rebuilt, and whether it could be judged: a reader of an export must know it too."""
    told = [*(session.study.warnings if session.study is not None else ()), *(() if session.review.in_scope else (UNLIKE,))]
    told += [SIDES_UNKNOWN] if session.shown is not None and not session.shown.oriented else []
    return [f"{line[:1].upper()}{line[1:]}{'' if line.endswith('.') else '.'}" for line in dict.fromkeys(told)]


def signature(session: Session) -> str:
    """What made an export."""
    return f"Model {session.assistant.name}, SHA-256 of the weights {session.assistant.digest}."


def source_uids(session: Session) -> list[str]:
    """SOPInstanceUID of each slice of the shown volume; nothing where the study is no DICOM."""
    return list(session.shown.source) if session.shown is not None else []


def why_no_segmentation(session: Session) -> str:
    """Why the study cannot become DICOM SEG and SR; empty where it can."""
    uids = source_uids(session)
    return NOT_DICOM if not uids else MULTIFRAME if len(set(uids)) < len(uids) else ""


@in_use
def write_files(session: Session, folder: Path) -> list[Path]:
    """Report (PDF, Markdown, JSON), table, masks and key images.

    Raises:
        ValueError: there is nothing to export yet.
    """
    if session.study is None or session.shown is None:
        raise ValueError("expected an open study to export, there is none")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = {"name": session.assistant.name, "checkpoint_sha256": session.assistant.digest}
    report = session.review.report(session.num_slices())
    report = f"{report}\n\n{session.told}" if session.told else report
    report = "\n\n".join([report, *(line for line in caveats(session) if line not in report)])
    signed = signature(session)
    (folder / "report.md").write_text(f"{report}\n\n{signed}\n")
    told = {"review": session.review.to_json(), "structures": structures(session), "model": model, "notice": NOTICE,
            "oriented": session.shown.oriented, "warnings": caveats(session)}
    (folder / "report.json").write_text(json.dumps(told, indent=1))
    labels = session.reviewed()
    if labels is not None:
        (folder / "structures.csv").write_text(table_csv(session))
        comment = f"{NOTICE} {signed}"
        write_nifti(folder / "labels.nii.gz", labels, session.shown.affine, comment=comment)
        if session.ranks is not None:
            rejected = torch.tensor([i.number for i in session.review.in_state("rejected")], dtype=torch.int32)
            ranks = session.ranks.int()
            kept = torch.where(torch.isin(ranks, rejected), 0, ranks)
            write_nifti(folder / "findings.nii.gz", kept, session.shown.affine, comment=comment)
    images = key_images(session, folder)
    write_pdf(folder / "report.pdf", report, signed, structures(session), images)
    return sorted(folder.iterdir())


def key_images(session: Session, folder: Path) -> list[Path]:
    """A slice in each plane through most of the lesions that were not rejected, else through the middle, with masks, as PNG."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", f"{NOTICE} {signature(session)}")
    made = []
    for plane in PLANES:
        path = folder / f"{plane}.png"
        Image.fromarray(session.key_image(plane)).save(path, pnginfo=info)
        made.append(path)
    return made


def in_letters(text: str) -> str:
    """The text with `?` for characters that a page's fonts lack, and a line that says so."""
    from reportlab.pdfbase.pdfmetrics import getFont

    font = getFont("Helvetica")
    fonts = (font, *font.substitutionFonts)
    drawn = "".join(c if c.isspace() or any(c.encode(f.encName, "ignore") for f in fonts) else "?" for c in text)
    return drawn if drawn == text else f"{drawn}\n\n{NO_LETTERS}"


def write_pdf(path: Path, report: str, signature: str, rows: list[dict[str, Any]], images: list[Path]) -> None:
    """The report as it is read on paper."""
    from xml.sax.saxutils import escape

    from reportlab.lib.pagesizes import A4
    from reportlab.lib.styles import getSampleStyleSheet
    from reportlab.platypus import Image, Paragraph, SimpleDocTemplate, Spacer, Table

    styles = getSampleStyleSheet()
    flow: list[Any] = []
    for line in in_letters(report).splitlines():
        style = "Title" if line.startswith("# ") else "Heading2" if line.startswith("## ") else "BodyText"
        text = escape(line.lstrip("# ").replace("**", ""))
        flow.append(Paragraph(f"<b>{text}</b>" if line.startswith("**") else text, styles[style]) if text else Spacer(1, 6))
    flow += [Spacer(1, 8), Table([[Image(str(i), width=165, height=165) for i in images]]), Spacer(1, 8)]
    if rows:
        flow.append(Table([["structure", "ml", "%"], *([r["name"], f"{r['ml']:.1f}", f"{r['percent']:.1f}"] for r in rows[:40])]))
    flow += [Spacer(1, 8), Paragraph(escape(signature), styles["BodyText"]), Paragraph(NOTICE, styles["BodyText"])]

    def foot(canvas: Any, _: Any) -> None:
        canvas.setFont("Helvetica", 8)
        canvas.drawString(40, 24, NOTICE)

    SimpleDocTemplate(str(path), pagesize=A4, title="OmniMRI report", author="OmniMRI").build(flow, onFirstPage=foot, onLaterPages=foot)


@in_use
def write_dicom(session: Session, folder: Path, task: str = "segmentation") -> list[Path]:
    """DICOM SEG and SR on the source's instances, or with `deidentify` a zip of a copy without names and the list of what was removed.

    Raises:
        ValueError: the study is no DICOM series, nothing is outlined, or the series cannot be referred to.
    """
    uids = source_uids(session)
    if not uids or session.upload is None:
        raise ValueError(NOT_DICOM)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    request: dict[str, Any] = {
        "task": task,
        "source": session.upload,
        "uids": uids,
        "slice_mm": session.shown.spacing_mm[2] if session.shown is not None else 1.0,
        "segments": [],
        "findings": [],
        "model": {"name": session.assistant.name, "checkpoint_sha256": session.assistant.digest},
        "face": session.face,
    }
    if task == "segmentation":
        labels = session.drawn()
        if labels is None:
            raise ValueError("expected masks to export, nothing is outlined yet; press Segment or Find lesions first")
        request["segments"] = segments(labels)
        if not request["segments"]:
            raise ValueError("expected masks to export, none is left: every finding is rejected and no structure is outlined")
        at = {s["id"]: k for k, s in enumerate(request["segments"], 1)}
        request["findings"] = [
            {
                "number": i.number,
                "side": i.side,
                "place": i.place,
                "comment": i.comment,
                "volume_ml": i.volume_ml,
                "diameter_mm": i.diameter_mm,
                "segment": at[session.finding_label(i.number)],
            }
            for i in session.review.in_state("accepted")
            if session.finding_label(i.number) in at
        ]
        np.savez_compressed(folder / "masks.npz", labels=labels.numpy().astype(np.uint16))
    (folder / "request.json").write_text(json.dumps(request))
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    try:
        command = [sys.executable, "-P", "-m", "chat_app.dicom_out", str(folder)]
        done = subprocess.run(command, env=environment(folder), timeout=TIME_S, check=False, **quiet).returncode == 0
    except subprocess.TimeoutExpired:
        done = False
    finally:
        shutil.rmtree(folder / "unpacked", ignore_errors=True)
    if not done:
        told = folder / "error.txt"
        raise ValueError(told.read_text() if told.exists() else "expected a DICOM series that can be read within limits, got another")
    if task == "deidentify":
        with zipfile.ZipFile(folder / "deidentified.zip", "w", zipfile.ZIP_DEFLATED) as z:
            for path in sorted((folder / "deidentified").iterdir()):
                z.write(path, path.name)
            z.write(folder / "deidentified.json", "deidentified.json")
        shutil.rmtree(folder / "deidentified")
    wanted = ("segmentation.dcm", "report.dcm", "deidentified.zip", "deidentified.json")
    return [folder / n for n in wanted if (folder / n).exists()]
