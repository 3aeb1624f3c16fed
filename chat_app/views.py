"""Views: slices as pictures with masks and the patient's sides; key images and before-and-after are made of them."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from omnimri.anatomy import LESION, STRUCTURES
from omnimri.answer import NOTICE
from omnimri.grid import COLUMNS, NORMAL, ROWS, closest_axes, foreground
from omnimri.volume import Study, Volume

VIEW_PIXELS = 512
LESIONS = (25, 57)
FINDING = 100
"""The k-th finding has this label plus k in the viewer's masks. With labels from 1,000 on beside those of structures, NiiVue (0.69) tints
what has no label.
"""


def label_colours() -> dict[int, tuple[int, int, int]]:
    """A fixed colour for every label; left and right share a hue, lesions are red."""
    names = sorted({s.name.removeprefix("left ").removeprefix("right ") for s in STRUCTURES})
    colours = {}
    for s in STRUCTURES:
        k = names.index(s.name.removeprefix("left ").removeprefix("right "))
        hue = 0.1 + 0.8 * ((k * 7) % len(names)) / len(names)
        r, g, b = colorsys.hsv_to_rgb(hue, 0.75 if s.side != "right" else 0.5, 0.95)
        colours[s.label] = (int(255 * r), int(255 * g), int(255 * b))
    return colours | dict.fromkeys(LESIONS, (255, 40, 40))


COLOURS = label_colours()
LABEL_NAMES = {s.label: s.name for s in STRUCTURES} | {25: f"left {LESION}", 57: f"right {LESION}"}


def segments(drawn: Tensor) -> list[dict[str, Any]]:
    """What a label map of `Session.drawn` holds: id, name, colour, and whether it is a lesion."""
    found = []
    for k in drawn.unique().tolist():
        name = f"finding {k - FINDING}" if k > FINDING else LABEL_NAMES.get(k, "")
        if name:
            found.append({"id": k, "name": name, "colour": list(COLOURS.get(k, (255, 40, 40))), "lesion": k > FINDING or k in LESIONS})
    return found


def slices(volume: Volume, plane: str) -> int:
    """Number of slices of a plane."""
    return volume.shape[closest_axes(volume.affine)[NORMAL[plane]]]


def best_slice(volume: Volume, labels: Tensor | None, plane: str) -> int:
    """The slice to show first: through most of the lesions, else the middle of the head.

    Args:
        labels: (X, Y, Z) FreeSurfer labels.
    """
    axis = closest_axes(volume.affine)[NORMAL[plane]]
    lesion = torch.isin(labels, torch.tensor(LESIONS, dtype=labels.dtype)) if labels is not None else None
    where = lesion if lesion is not None and bool(lesion.any()) else foreground(volume)
    areas = where.sum([a for a in range(3) if a != axis])
    middle = int(areas.argmax()) if where is lesion else int(torch.nonzero(areas > areas.max() / 4).float().mean())
    return recount(volume, plane, middle)


def recount(volume: Volume, plane: str, index: int) -> int:
    """A slice counted from inferior, posterior or left <-> the same along its voxel axis, in the file's order."""
    axis = closest_axes(volume.affine)[NORMAL[plane]]
    return volume.shape[axis] - 1 - index if float(volume.affine[NORMAL[plane], axis]) < 0 else index


def draw(volume: Volume, plane: str, index: int, *, labels: Tensor | None = None, voxels: Tensor | None = None) -> np.ndarray:
    """One slice as (H, W, 3) uint8, radiological, square pixels, with the patient's sides lettered.

    Slices count from inferior, posterior or left.

    Args:
        labels: (X, Y, Z) masks laid over it.
        voxels: (X, Y, Z) shown instead of the volume's own, on its lattice and in its window.
    """
    from PIL import Image, ImageDraw

    axes = closest_axes(volume.affine)
    image = _cut(volume, volume.voxels[0] if voxels is None else voxels, plane, index)
    fore = volume.voxels[0][foreground(volume)]
    low, high = torch.quantile(fore.flatten()[:: max(1, fore.numel() // 200_000)], torch.tensor([0.005, 0.995])).tolist()
    grey = ((image.float() - min(low, 0)) / max(high - min(low, 0), 1e-9)).clamp(0, 1)
    spacing = volume.spacing_mm
    mm = [image.shape[0] * spacing[axes[ROWS[plane][0]]], image.shape[1] * spacing[axes[COLUMNS[plane][0]]]]
    scale = VIEW_PIXELS / max(mm)
    size = (max(1, round(mm[0] * scale)), max(1, round(mm[1] * scale)))
    big = F.interpolate(grey[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    rgb = big[..., None].expand(-1, -1, 3).clone() * 255
    if labels is not None:
        drawn = F.interpolate(_cut(volume, labels, plane, index).float()[None, None], size=size, mode="nearest")[0, 0].int()
        for label in drawn.unique().tolist():
            if label:
                where = drawn == label
                share = 0.55 if label in LESIONS else 0.4
                rgb[where] = (1 - share) * rgb[where] + share * torch.tensor(COLOURS[label], dtype=torch.float32)
    picture = Image.new("RGB", (VIEW_PIXELS, VIEW_PIXELS))
    picture.paste(Image.fromarray(rgb.byte().numpy()), ((VIEW_PIXELS - size[1]) // 2, (VIEW_PIXELS - size[0]) // 2))
    pen = ImageDraw.Draw(picture)
    letters = ("A", "P") if plane == "sagittal" else ("R", "L")
    if not volume.oriented:
        letters = ("?", "?")
    middle = VIEW_PIXELS // 2
    pen.text((8, middle), letters[0], fill=(255, 220, 0), font_size=20)
    pen.text((VIEW_PIXELS - 22, middle), letters[1], fill=(255, 220, 0), font_size=20)
    cited = recount(volume, plane, index) + 1  # as findings do
    pen.text((8, VIEW_PIXELS - 20), f"{plane} {cited}/{slices(volume, plane)}   {NOTICE}", fill=(200, 200, 200), font_size=12)
    return np.asarray(picture)


def _cut(volume: Volume, array: Tensor, plane: str, index: int) -> Tensor:
    """(rows, columns) of a plane from (X, Y, Z), rows downwards and columns rightwards as displayed."""
    affine, axes = volume.affine, closest_axes(volume.affine)
    wanted = [(NORMAL[plane], 1), ROWS[plane], COLUMNS[plane]]
    turned = array.permute([axes[p] for p, _ in wanted])
    flips = [k for k, (p, sign) in enumerate(wanted) if float(affine[p, axes[p]]) * sign < 0]
    return torch.flip(turned, flips)[max(0, min(index, turned.shape[0] - 1))]


def described(study: Study, told: str, face: bool) -> str:
    """A study in Markdown: its series and raw data, and what to mind.

    Args:
        told: What it is, where that is known; or nothing.
        face: Whether the head is shown with its face.
    """
    rows = [f"**{told}**", ""] if told else []
    for v in study.series:
        size = " × ".join(map(str, v.shape))
        mm = " × ".join(f"{s:.2f}" for s in v.spacing_mm)
        what = ", ".join(w for w in (v.kind if v.kind != "image" else "", v.variant, f"{v.sequence} (header)", v.plane) if w)
        rows.append(f"- **{v.name}**: {what}, {size} voxels of {mm} mm: {v.why}")
    if study.kspace is not None:
        s, c, h, w = study.kspace.data.shape
        share = 100 * float(study.kspace.mask.float().mean())
        rows.append(f"- **k-space**: {s} slices, {c} coils, {h} × {w}, {share:.0f} % sampled")
    rows += [f"- ⚠ {w}" for w in study.warnings]
    if face:
        rows.append("- ⚠ The head is shown with its face, which can be rebuilt from it: mind whom you hand these images to")
    return "\n".join(rows)
