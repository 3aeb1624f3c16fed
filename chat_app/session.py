"""Session: one person's study, conversation and views. No web framework in it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from omnimri.anatomy import LESION, STRUCTURES
from omnimri.answer import NOTICE, Answer
from omnimri.assistant import Assistant
from omnimri.cli import markdown, write_answer
from omnimri.conversation import Message
from omnimri.grid import COLUMNS, NORMAL, ROWS, closest_axes, foreground
from omnimri.io import open_study, warm
from omnimri.io.nifti import write_nifti
from omnimri.reconstruction import Reconstruction
from omnimri.volume import Study, Volume

from .review import Review

VIEW_PIXELS = 512
REQUESTS = {
    "Report": ("Write a report.", "report"),
    "Segment": ("Segment everything.", "segment"),
    "Find lesions": ("Find lesions.", "detect"),
    "Reconstruct": ("Reconstruct this.", "reconstruct"),
}
"""What each button asks, and its task."""


def label_colours() -> dict[int, tuple[int, int, int]]:
    """A fixed colour for every label; left and right share a hue, lesions are red."""
    import colorsys

    names = sorted({s.name.removeprefix("left ").removeprefix("right ") for s in STRUCTURES})
    colours = {}
    for s in STRUCTURES:
        k = names.index(s.name.removeprefix("left ").removeprefix("right "))
        hue = 0.1 + 0.8 * ((k * 7) % len(names)) / len(names)
        r, g, b = colorsys.hsv_to_rgb(hue, 0.75 if s.side != "right" else 0.5, 0.95)
        colours[s.label] = (int(255 * r), int(255 * g), int(255 * b))
    return colours | {25: (255, 40, 40), 57: (255, 40, 40)}


FINDING = 1000
"""The k-th finding has this label plus k in the viewer's masks."""
COLOURS = label_colours()
LABEL_NAMES = {s.label: s.name for s in STRUCTURES} | {25: f"left {LESION}", 57: f"right {LESION}"}


def _plain_name(name: str) -> str:
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


class Session:
    """A study that was opened, what was asked about it, what was decided, and what may be shown of it.

    Everything that must survive a restart lies in its folder: the uploaded file, masks, conversation, review. What is in memory
    can be read from there again.
    """

    def __init__(self, assistant: Assistant, folder: Path) -> None:
        self.assistant, self.folder = assistant, folder
        self.study: Study | None = None
        self.shown: Volume | None = None
        self.history: list[Message] = []
        self.chat: list[dict[str, str]] = []
        """What the page shows, filled text."""
        self.answer: Answer | None = None
        self.labels: torch.Tensor | None = None
        self.ranks: torch.Tensor | None = None
        """(X, Y, Z) uint8: 0, or the number of a finding."""
        self.reconstruction: Reconstruction | None = None
        self.review = Review()
        self.upload: str | None = None
        """Name of the study's file in `upload/`, or of an example."""
        self.outside: list[str] = []
        """Copies of exports that the server hands out from its own cache."""
        self.handed_out: dict[str, Path] = {}
        """Token -> file that the viewer may fetch."""
        self.revision = 0
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._restore()

    # --- one study --------------------------------------------------------------------------------------------

    def load(self, path: str | Path, *, keep: bool = True) -> str:
        """Open a study and tell what was understood.

        Args:
            keep: Take the file into the session's folder; a bundled example stays where it is.

        Raises:
            ValueError: it cannot be used; the session is empty then.
        """
        self.reset()
        path = Path(path)
        if keep:
            place = self.folder / "upload"
            place.mkdir()
            shutil.move(str(path), place / _plain_name(path.name))
            path = place / _plain_name(path.name)
        try:
            self.study = open_study(path)
        except ValueError:
            self.reset()
            raise
        warm()
        self.upload = str(path)
        if self.study.kspace is not None and self.study.kspace.num_slices > len(self.study.kspace.data):
            self.reset()
            raise ValueError("expected k-space that fits into memory on this page, got a larger file; use 'omnimri reconstruct'")
        if self.study.volumes:
            self.shown = self.study.primary
        self._save()
        return self.overview()

    def _open_again(self) -> None:
        """Read the study from disk where it was unloaded."""
        if self.study is not None or self.upload is None:
            return
        self.study = open_study(self.upload)
        if (self.folder / "reconstruction.nii").exists():
            rebuilt = open_study(self.folder / "reconstruction.nii").primary
            self.shown = replace(rebuilt, oriented=False, name="reconstruction")
            self.study = replace(self.study, volumes=(self.shown,))
        elif self.study.volumes:
            self.shown = self.study.primary
        if (self.folder / "masks.npz").exists():
            with np.load(self.folder / "masks.npz", allow_pickle=False) as f:
                self.labels = torch.from_numpy(f["labels"].astype(np.int32))
                self.ranks = torch.from_numpy(f["ranks"])

    def unload(self) -> None:
        """Leave memory; what is on disk stays."""
        self.study = self.shown = self.labels = self.ranks = self.reconstruction = self.answer = None
        self.handed_out = {}

    def touch(self) -> None:
        """Count as used now."""
        with contextlib.suppress(OSError):
            os.utime(self.folder)

    def reset(self) -> None:
        """Forget the study and everything said about it."""
        self.unload()
        self.history, self.chat, self.review, self.upload = [], [], Review(), None
        for name in self.outside:
            Path(name).unlink(missing_ok=True)
        self.outside = []
        self.revision += 1
        self.assistant.forget()
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Forget everything and remove the session's folder."""
        self.reset()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- on disk ----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.revision += 1
        write_json(
            self.folder / "session.json",
            {
                "upload": self.upload,
                "history": [[m.role, m.text] for m in self.history],
                "chat": self.chat,
                "review": self.review.to_json(),
                "outside": self.outside,
                "revision": self.revision,
            },
        )

    def _restore(self) -> None:
        try:
            told = json.loads((self.folder / "session.json").read_text())
        except (OSError, ValueError):
            return
        self.upload, self.chat, self.revision = told["upload"], told["chat"], told["revision"]
        self.outside = told["outside"]
        self.history = [Message(r, t) for r, t in told["history"]]
        self.review = Review.from_json(told["review"])
        if self.upload is None or not Path(self.upload).exists():
            self.reset()

    # --- conversation -----------------------------------------------------------------------------------------

    def overview(self) -> str:
        """What was understood of the study, in Markdown."""
        self._open_again()
        if self.study is None:
            return "No study is open."
        rows = []
        for v in self.study.series:
            size = " × ".join(map(str, v.shape))
            mm = " × ".join(f"{s:.2f}" for s in v.spacing_mm)
            what = ", ".join(w for w in (v.kind if v.kind != "image" else "", v.variant, f"{v.sequence} (header)", v.plane) if w)
            rows.append(f"- **{v.name}**: {what}, {size} voxels of {mm} mm: {v.why}")
        if self.study.kspace is not None:
            s, c, h, w = self.study.kspace.data.shape
            share = 100 * float(self.study.kspace.mask.float().mean())
            rows.append(f"- **k-space**: {s} slices, {c} coils, {h} × {w}, {share:.0f} % sampled")
        rows += [f"- ⚠ {w}" for w in self.study.warnings]
        return "\n".join(rows)

    def ask(self, question: str, *, task: str | None = None, on_text: Callable[[str], bool] | None = None) -> Answer:
        """Ask about the open study; the conversation remembers slots, never filled text.

        Raises:
            ValueError: no study is open, or the question cannot be used.
        """
        self._open_again()
        if self.study is None:
            raise ValueError("no study is open; upload an MRI or load an example first")
        answer = self.assistant.answer(self.study, question, history=self.history, task=task, on_text=on_text)
        self.history += [Message("user", question), Message("assistant", answer.raw)]
        self.answer = answer
        if answer.reconstruction is not None:
            self.reconstruction = answer.reconstruction
            self.shown = answer.reconstruction.image
            self.study = replace(self.study, volumes=(self.shown,))
            write_nifti(self.folder / "reconstruction.nii", self.shown.voxels[0], self.shown.affine)
        if answer.labels is not None and bool(answer.labels.any()):
            self.labels = answer.labels
        seen = self.assistant.examine(self.study.named(question) or self.study.primary)
        if answer.findings:
            self.ranks = seen.lesion_ranks
        self.review.take(answer, {x.rank: x.measured.centre_mm for x in seen.lesions})
        if self.labels is not None:
            ranks = self.ranks if self.ranks is not None else torch.zeros_like(self.labels, dtype=torch.uint8)
            np.savez_compressed(self.folder / "masks.npz", labels=self.labels.numpy().astype(np.uint16), ranks=ranks.numpy())
        self._save()
        return answer

    def say(self, role: str, text: str) -> None:
        """Add to what the page shows of the conversation."""
        self.chat.append({"role": role, "content": text})
        self._save()

    def decide(self, number: int, state: str) -> None:
        """Accept or reject a finding, or open it again; kept on disk before this returns."""
        self.review.decide(number, state)
        self._save()

    def edit(self, number: int, *, place: str, comment: str) -> None:
        """Change the words of a finding; kept on disk before this returns."""
        self.review.edit(number, place=place, comment=comment)
        self._save()

    def hand_out_copies(self, paths: list[str]) -> None:
        """Remember copies that lie elsewhere, so that they go when the study is forgotten."""
        self.outside += [p for p in paths if p not in self.outside]
        self._save()

    def num_slices(self) -> int:
        """Slices along the axis that findings are cited by."""
        self._open_again()
        return 1 if self.shown is None else int(self.shown.shape[2])

    def export(self) -> list[str]:
        """Files of the last answer: answer.json, answer.md and the masks; an empty list before the first answer."""
        if self.answer is None:
            return []
        place = self.folder / "answer"
        write_answer(self.answer, place)
        return [str(p) for p in sorted(place.iterdir())]

    def report_markdown(self) -> str:
        """The last answer with its table of findings."""
        return markdown(self.answer) if self.answer else ""

    # --- the viewer -------------------------------------------------------------------------------------------

    def scene(self) -> dict[str, Any]:
        """What the viewer shows: where to fetch volumes and masks, labels with their colours, places of findings."""
        self._open_again()
        if self.study is None or self.shown is None:
            return {"revision": self.revision}
        self.handed_out = {}
        listed = [(v.name or "study", v) for v in (self.shown, *(v for v in self.study.volumes if v is not self.shown))]
        if self.reconstruction is not None:
            listed.append(("zero-filled", self.reconstruction.zero_filled))
        volumes = [{"name": name, "url": self._hand_out(f"{name}.nii", v.voxels[0], v.affine)} for name, v in listed]
        overlay, drawn = None, self.drawn()
        if drawn is not None:
            overlay = {"url": self._hand_out("masks.nii", drawn, self.shown.affine), "labels": self.segments(drawn), "of": listed[0][0]}
        home = self.shown.affine @ torch.tensor([*((n - 1) / 2 for n in self.shown.shape), 1.0], dtype=torch.float64)
        first = next(iter(self.review.in_state("accepted") or self.review.in_state("open")), None)
        return {
            "revision": self.revision,
            "study": self.upload and Path(self.upload).name + str(len(self.history) < 1),
            "volumes": volumes,
            "overlay": overlay,
            "oriented": self.shown.oriented,
            "home": list(first.centre_mm) if first else home[:3].tolist(),
            "step_mm": list(self.shown.spacing_mm),
            "findings": [{"number": i.number, "mm": list(i.centre_mm)} for i in self.review.items.values()],
            "compare": "zero-filled" if self.reconstruction is not None else "",
        }

    def drawn(self) -> torch.Tensor | None:
        """(X, Y, Z) int32: the masks as reviewed: each finding that was not rejected under its own label, structures under FreeSurfer's."""
        self._open_again()
        if self.labels is None or self.shown is None or self.labels.shape != self.shown.shape:
            return None
        drawn = self.labels.clone()
        if self.ranks is not None and self.ranks.shape == drawn.shape:
            rejected = {i.number for i in self.review.in_state("rejected")}
            for number in self.review.items:
                drawn[self.ranks == number] = 0 if number in rejected else self.finding_label(number)
        return drawn

    @staticmethod
    def finding_label(number: int) -> int:
        """The label of a finding in `drawn`."""
        return FINDING + number

    def segments(self, drawn: torch.Tensor) -> list[dict[str, Any]]:
        """What a label map of `drawn` holds: id, name, colour, and whether it is a lesion."""
        found = []
        for k in drawn.unique().tolist():
            name = f"finding {k - FINDING}" if k > FINDING else LABEL_NAMES.get(k, "")
            if name:
                found.append({"id": k, "name": name, "colour": list(COLOURS.get(k, (255, 40, 40))), "lesion": k > FINDING or k in (25, 57)})
        return found

    def _hand_out(self, name: str, voxels: torch.Tensor, affine: torch.Tensor) -> str:
        """The address of an array as NIfTI: nobody can guess it."""
        token = secrets.token_hex(16)
        path = self.folder / "viewer" / f"{secrets.token_hex(4)}-{_plain_name(name)}"
        path.parent.mkdir(exist_ok=True)
        write_nifti(path, voxels, affine)
        self.handed_out[token] = path
        return f"omnimri/file/{token}.nii"

    # --- views ------------------------------------------------------------------------------------------------

    def slices(self, plane: str) -> int:
        """Number of slices of a plane."""
        if self.shown is None:
            return 1
        return self.shown.shape[closest_axes(self.shown.affine)[NORMAL[plane]]]

    def best_slice(self, plane: str) -> int:
        """The slice to show first: through the largest finding, else the middle of the head."""
        if self.shown is None:
            return 0
        axis = closest_axes(self.shown.affine)[NORMAL[plane]]
        mask = self.labels
        lesion = torch.isin(mask, torch.tensor([25, 57], dtype=mask.dtype)) if mask is not None else None
        where = lesion if lesion is not None and bool(lesion.any()) else foreground(self.shown)
        other = [a for a in range(3) if a != axis]
        areas = where.sum(other)
        middle = int(areas.argmax()) if where is lesion else int(torch.nonzero(areas > areas.max() / 4).float().mean())
        return self.shown.shape[axis] - 1 - middle if float(self.shown.affine[NORMAL[plane], axis]) < 0 else middle

    def before_after(self, plane: str, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The slice of the zero-filled and of the reconstructed image; None where nothing was reconstructed."""
        if self.reconstruction is None:
            return None
        before = self.reconstruction.zero_filled.voxels[0]
        return self.view(plane, index, overlay=False, voxels=before), self.view(plane, index, overlay=False)

    def view(self, plane: str, index: int, *, overlay: bool = True, voxels: torch.Tensor | None = None) -> np.ndarray:
        """One slice as (H, W, 3) uint8, radiological, square pixels, with the patient's sides lettered.

        Slices count from inferior, posterior or left.

        Args:
            voxels: Shown instead of the study's, on its lattice and in its window.
        """
        from PIL import Image, ImageDraw

        if self.shown is None:
            return np.zeros((VIEW_PIXELS, VIEW_PIXELS, 3), dtype=np.uint8)
        axes = closest_axes(self.shown.affine)
        image = self._cut(self.shown.voxels[0] if voxels is None else voxels, plane, index)
        fore = self.shown.voxels[0][foreground(self.shown)]
        low, high = torch.quantile(fore.flatten()[:: max(1, fore.numel() // 200_000)], torch.tensor([0.005, 0.995])).tolist()
        grey = ((image.float() - min(low, 0)) / max(high - min(low, 0), 1e-9)).clamp(0, 1)
        spacing = self.shown.spacing_mm
        mm = [image.shape[0] * spacing[axes[ROWS[plane][0]]], image.shape[1] * spacing[axes[COLUMNS[plane][0]]]]
        scale = VIEW_PIXELS / max(mm)
        size = (max(1, round(mm[0] * scale)), max(1, round(mm[1] * scale)))
        big = F.interpolate(grey[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        rgb = big[..., None].expand(-1, -1, 3).clone() * 255
        if overlay and self.labels is not None and self.labels.shape == self.shown.shape:
            cut = self._cut(self.labels, plane, index).float()
            labels = F.interpolate(cut[None, None], size=size, mode="nearest")[0, 0].int()
            for label in labels.unique().tolist():
                if label:
                    where = labels == label
                    share = 0.55 if label in (25, 57) else 0.4
                    rgb[where] = (1 - share) * rgb[where] + share * torch.tensor(COLOURS[label], dtype=torch.float32)
        picture = Image.new("RGB", (VIEW_PIXELS, VIEW_PIXELS))
        picture.paste(Image.fromarray(rgb.byte().numpy()), ((VIEW_PIXELS - size[1]) // 2, (VIEW_PIXELS - size[0]) // 2))
        draw = ImageDraw.Draw(picture)
        letters = ("A", "P") if plane == "sagittal" else ("R", "L")
        if not self.shown.oriented:
            letters = ("?", "?")
        middle = VIEW_PIXELS // 2
        draw.text((8, middle), letters[0], fill=(255, 220, 0), font_size=20)
        draw.text((VIEW_PIXELS - 22, middle), letters[1], fill=(255, 220, 0), font_size=20)
        draw.text((8, VIEW_PIXELS - 20), f"{plane} {index + 1}/{self.slices(plane)}   {NOTICE}", fill=(200, 200, 200), font_size=12)
        return np.asarray(picture)

    def _cut(self, array: torch.Tensor, plane: str, index: int) -> torch.Tensor:
        """(rows, columns) of a plane from (X, Y, Z), rows downwards and columns rightwards as displayed."""
        assert self.shown is not None
        affine, axes = self.shown.affine, closest_axes(self.shown.affine)
        wanted = [(NORMAL[plane], 1), ROWS[plane], COLUMNS[plane]]
        turned = array.permute([axes[p] for p, _ in wanted])
        flips = [k for k, (p, sign) in enumerate(wanted) if float(affine[p, axes[p]]) * sign < 0]
        return torch.flip(turned, flips)[max(0, min(index, turned.shape[0] - 1))]

    def legend(self) -> list[tuple[str, tuple[int, int, int]]]:
        """Names and colours of what the overlay shows."""
        if self.labels is None:
            return []
        return [(LABEL_NAMES[k], COLOURS[k]) for k in self.labels.unique().tolist() if k in LABEL_NAMES]

    def findings_json(self) -> str:
        """The last answer as the contract's JSON."""
        return json.dumps(self.answer.to_json(), indent=1) if self.answer else "{}"
