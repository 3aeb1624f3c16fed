"""Session: one person's study, conversation and views. No web framework in it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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
from omnimri.reconstruction import Reconstruction
from omnimri.volume import Study, Volume

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


COLOURS = label_colours()
LABEL_NAMES = {s.label: s.name for s in STRUCTURES} | {25: f"left {LESION}", 57: f"right {LESION}"}


class Session:
    """A study that was opened, what was asked about it, and what may be shown of it."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self.folder = Path(tempfile.mkdtemp(prefix="omnimri-"))
        self.study: Study | None = None
        self.shown: Volume | None = None
        self.history: list[Message] = []
        self.answer: Answer | None = None
        self.labels: torch.Tensor | None = None
        self.reconstruction: Reconstruction | None = None

    def load(self, path: str | Path) -> str:
        """Open a study and tell what was understood.

        Raises:
            ValueError: it cannot be used.
        """
        study = open_study(path)
        warm()
        self.reset()
        self.study = study
        if study.volumes:
            self.shown = study.primary
        return self.overview()

    def reset(self) -> None:
        """Forget the study and everything said about it."""
        self.study = self.shown = self.answer = self.labels = self.reconstruction = None
        self.history = []
        self.assistant.forget()
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Forget everything and remove the session's files."""
        self.reset()
        shutil.rmtree(self.folder, ignore_errors=True)

    def overview(self) -> str:
        """What was understood of the study, in Markdown."""
        if self.study is None:
            return "No study is open."
        rows = []
        for v in self.study.series:
            size = " × ".join(map(str, v.shape))
            mm = " × ".join(f"{s:.2f}" for s in v.spacing_mm)
            what = ", ".join(w for w in (v.kind if v.kind != "image" else "", v.variant, f"{v.sequence} (header)", v.plane) if w)
            rows.append(f"- **{v.name}**: {what}, {size} voxels of {mm} mm — {v.why}")
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
        if self.study is None:
            raise ValueError("no study is open; upload an MRI or load the example first")
        answer = self.assistant.answer(self.study, question, history=self.history, task=task, on_text=on_text)
        self.history += [Message("user", question), Message("assistant", answer.raw)]
        self.answer = answer
        if answer.reconstruction is not None:
            self.reconstruction = answer.reconstruction
            self.shown = answer.reconstruction.image
            self.study = replace(self.study, volumes=(self.shown,))
        if answer.labels is not None and bool(answer.labels.any()):
            self.labels = answer.labels
        return answer

    def export(self) -> list[str]:
        """Files of the last answer: answer.json, answer.md and the masks; an empty list before the first answer."""
        if self.answer is None:
            return []
        write_answer(self.answer, self.folder)
        return [str(p) for p in sorted(self.folder.iterdir())]

    def report_markdown(self) -> str:
        """The last answer with its table of findings."""
        return markdown(self.answer) if self.answer else ""

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
