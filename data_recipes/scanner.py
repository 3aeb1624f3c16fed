"""The simulated scanner: tissue codes in space -> slices by signal equations, with lesions, labels and k-space.

All draws are made on the CPU; the arrays are computed on `device`. Shapes: S slices, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from omnimri.anatomy import NAMES, PLANES, SEQUENCES, STRUCTURES
from omnimri.example import Record
from omnimri.grid import COLUMNS, NEIGHBOUR_MM, NORMAL, ROWS
from omnimri.measure import rank_components
from omnimri.physics import fft2c, gaussian_coils, inversion_recovery, line_mask, spin_echo, spoiled_gradient_echo

from .recipe import pick, uniform

NUM_STRUCTURES = len(NAMES)
EXTRA = {
    # name: (PD, T1 ms, T2 ms, lowest and highest random factor on the signal)
    "vessel": (0.75, 1500.0, 120.0, 0.3, 1.6),
    "chiasm": (0.72, 900.0, 80.0, 0.9, 1.1),
    "fifth ventricle": (1.0, 4000.0, 1500.0, 0.9, 1.1),
    "skin": (0.75, 500.0, 60.0, 0.4, 1.2),
    "soft tissue": (0.75, 900.0, 45.0, 0.4, 1.4),
    "bone": (0.1, 800.0, 20.0, 0.3, 2.5),
    "marrow": (0.8, 350.0, 60.0, 0.4, 1.4),
    "dura": (0.7, 1300.0, 60.0, 0.4, 1.6),
    "eye": (1.0, 4000.0, 1200.0, 0.8, 1.1),
    "optic nerve": (0.72, 900.0, 80.0, 0.8, 1.2),
    "mucosa": (0.9, 1400.0, 120.0, 0.5, 1.5),
    "cord": (0.7, 850.0, 75.0, 0.9, 1.1),
}
"""Tissues without a class of their own."""
CODE_OF_EXTRA = {name: NUM_STRUCTURES + 1 + k for k, name in enumerate(EXTRA)}
LEFT_WMH = NUM_STRUCTURES + 1 + len(EXTRA)
RIGHT_WMH, CORE, RIM, NECROSIS, OEDEMA = (LEFT_WMH + k for k in range(1, 6))
NUM_CODES = OEDEMA + 1
HEAD_CODES = tuple(CODE_OF_EXTRA[n] for n in ("skin", "soft tissue", "bone", "marrow", "dura", "eye", "mucosa", "cord"))
BRAIN = {"wm": (0.70, 850.0, 72.0), "gm": (0.82, 1350.0, 95.0), "csf": (1.0, 4200.0, 1800.0)}
DEEP = {"thalamus": 0.75, "pallidum": 0.45, "putamen": 0.85, "caudate": 0.95, "ventral DC": 0.45, "brain-stem": 0.1}
"""How far a structure lies from white (0) to grey matter (1), where it is neither."""
PATHOLOGY = {LEFT_WMH: (0.85, 1400.0, 140.0), RIGHT_WMH: (0.85, 1400.0, 140.0), CORE: (0.88, 1700.0, 150.0),
             RIM: (0.86, 1500.0, 120.0), NECROSIS: (0.98, 3000.0, 500.0), OEDEMA: (0.88, 1500.0, 160.0)}
CLASS_OF_CODE = torch.zeros(NUM_CODES, dtype=torch.uint8)
CLASS_OF_CODE[: NUM_STRUCTURES + 1] = torch.arange(NUM_STRUCTURES + 1)
CLASS_OF_CODE[LEFT_WMH] = 1 + NAMES.index("left cerebral white matter")
CLASS_OF_CODE[RIGHT_WMH] = 1 + NAMES.index("right cerebral white matter")


def tissue_table() -> Tensor:
    """(NUM_CODES, 3): PD, T1 ms, T2 ms at 3 T (Stanisz et al., MRM 2005; Bojorquez et al., MRI 2017)."""
    table = torch.zeros(NUM_CODES, 3)
    table[0] = torch.tensor([0.0, 1000.0, 50.0])
    for k, s in enumerate(STRUCTURES, 1):
        values = torch.tensor(BRAIN[s.tissue])
        share = next((v for name, v in DEEP.items() if name in s.name), None)
        if share is not None:
            values = torch.lerp(torch.tensor(BRAIN["wm"]), torch.tensor(BRAIN["gm"]), share)
        table[k] = values
    for name, (pd, t1, t2, _, _) in EXTRA.items():
        table[CODE_OF_EXTRA[name]] = torch.tensor([pd, t1, t2])
    for code, tissue in PATHOLOGY.items():
        table[code] = torch.tensor(tissue)
    return table


TISSUE = tissue_table()
SIDED = tuple((1 + NAMES.index(n), 1 + NAMES.index(n.replace("left", "right"))) for n in NAMES if n.startswith("left"))


@dataclass(frozen=True)
class Scan:
    """How one study is acquired; every number is drawn by `draw_scan`."""

    sequence: str
    plane: str
    positions_mm: Tensor
    """(S,)"""
    spacing_mm: tuple[float, float, float]
    centre_mm: tuple[float, float, float]
    """Middle of the lattice in the anatomy's own RAS+ mm."""
    stripped: bool
    mirrored: bool
    normal: bool
    variation: float = 1.0
    """How much heads and scanners differ: scales tilt, size, bending, field of view, tissue spread, bias field and noise,
    and the share of thin slabs and of contrasts without a name."""


def draw_scan(
    g: torch.Generator,
    *,
    num_slices: int,
    size: int,
    brain_box: tuple[Tensor, Tensor],
    head_centre: Tensor,
    mirror: bool,
    normal_share: float = 0.4,
    variation: float = 1.0,
    sequences: tuple[float, ...] = (0.5, 0.12, 0.13, 0.03, 0.16, 0.06),
) -> Scan:
    """Draw plane, slices, field of view and sequence.

    Args:
        brain_box: Lowest and highest corner of the brain, (3,) mm each.
        head_centre: (3,) mm, middle of the whole head.
        sequences: Share of each of `SEQUENCES`.
    """
    plane = pick(g, PLANES, (0.7, 0.15, 0.15))
    low, high = brain_box
    axis = NORMAL[plane]
    extent, middle = float(high[axis] - low[axis]), (low + high) / 2
    stripped = uniform(g, 0, 1) < 0.45
    if uniform(g, 0, 1) < 1 - 0.25 * variation:
        gap = extent * uniform(g, 0.9, 1.05) / num_slices
    else:
        gap = math.exp(uniform(g, 0.0, math.log(7)))
        middle[axis] += (extent / 2 - gap * num_slices / 2) * uniform(g, -0.85, 0.85)
    centre = middle.clone()
    for a in range(3):
        if a != axis:
            toward = 0.0 if stripped else uniform(g, 0.0, 1.0)
            centre[a] += toward * float(head_centre[a] - middle[a]) + uniform(g, -8, 8) * variation
    field = 192.0 / size
    spacing = field * ((0.95 + 0.25 * variation * uniform(g, 0, 1)) if stripped else (1.1 + 0.35 * variation * uniform(g, 0, 1)))
    return Scan(
        sequence=pick(g, SEQUENCES, sequences),
        plane=plane,
        positions_mm=(torch.arange(num_slices) - (num_slices - 1) / 2) * gap,
        spacing_mm=(gap, spacing, spacing),
        centre_mm=(float(centre[0]), float(centre[1]), float(centre[2])),
        stripped=stripped,
        mirrored=mirror and uniform(g, 0, 1) < 0.5,
        normal=uniform(g, 0, 1) < normal_share,
        variation=variation,
    )


def signals(g: torch.Generator, sequence: str, variation: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean and texture of every code's signal, (NUM_CODES,) each, by the sequence's equation at drawn parameters."""
    spread = 1 + 0.07 * variation * torch.randn(NUM_CODES, 3, generator=g)
    shared = {t: 1 + 0.08 * variation * torch.randn(3, generator=g) for t in BRAIN}
    for k, s in enumerate(STRUCTURES, 1):
        spread[k] = 1 + (spread[k] - 1) * 0.5
        spread[k] *= shared[s.tissue]
    for left, right in SIDED:
        spread[right] = spread[left]
    pd, t1, t2 = (TISSUE * spread.clamp(0.6, 1.5)).T
    gd = sequence == "T1w-Gd"
    if gd:
        t1 = t1.clone()
        t1[RIM] = uniform(g, 250, 450)
        t1[CORE] = uniform(g, 300, 600)
        t1[CODE_OF_EXTRA["vessel"]] = 300.0
        t1[CODE_OF_EXTRA["dura"]] = 500.0
    one = torch.ones(())
    if sequence in ("T1w", "T1w-Gd"):
        kind = int(torch.randint(3, (), generator=g))
        if kind == 0:
            ti = one * uniform(g, 750, 1100)
            mean = inversion_recovery(pd, t1, t2, tr_ms=ti * uniform(g, 2.2, 3.2), te_ms=one * 3, ti_ms=ti)
            # MPRAGE keeps its polarity: what has not yet crossed zero shows dark.
            signed = 1 - 2 * torch.exp(-ti / t1) + torch.exp(-ti * 2.5 / t1)
            mean = torch.where(signed > 0, mean, 0.1 * mean)
        elif kind == 1:
            flip = one * math.radians(uniform(g, 15, 35))
            mean = spoiled_gradient_echo(pd, t1, tr_ms=one * uniform(g, 8, 30), flip_rad=flip)
        else:
            mean = spin_echo(pd, t1, t2, tr_ms=one * uniform(g, 350, 750), te_ms=one * uniform(g, 8, 20))
    elif sequence == "T2w":
        mean = spin_echo(pd, t1, t2, tr_ms=one * uniform(g, 3000, 7000), te_ms=one * uniform(g, 75, 120))
    elif sequence == "PDw":
        mean = spin_echo(pd, t1, t2, tr_ms=one * uniform(g, 2200, 4000), te_ms=one * uniform(g, 10, 30))
    elif sequence == "FLAIR":
        tr = one * uniform(g, 7000, 11000)
        null = math.log(2 / (1 + math.exp(-float(tr) / 4200))) * 4200
        ti, te = one * null * uniform(g, 0.93, 1.05), one * uniform(g, 85, 140)
        mean = inversion_recovery(pd, t1, t2, tr_ms=tr, te_ms=te, ti_ms=ti)
    else:
        mean = torch.rand(NUM_CODES, generator=g)
        for left, right in SIDED:
            mean[right] = mean[left]
        mean[LEFT_WMH] = mean[RIGHT_WMH] = mean[OEDEMA]
        mean[0] = 0.0
    for name, (_, _, _, low, high) in EXTRA.items():
        mean[CODE_OF_EXTRA[name]] *= uniform(g, low, high)
    mean = mean / mean[1 : NUM_STRUCTURES + 1].max().clamp(min=1e-6)
    texture = mean * (0.02 + 0.05 * torch.rand(NUM_CODES, generator=g))
    texture[CODE_OF_EXTRA["soft tissue"]] = 0.25 * mean[CODE_OF_EXTRA["soft tissue"]]
    return mean, texture


def lattice_points(scan: Scan, size: int, device: torch.device) -> Tensor:
    """(S, 3 channels, H, W, 3) mm in the anatomy's RAS+ frame, before deformation."""
    s = len(scan.positions_mm)
    reach = max(NEIGHBOUR_MM, scan.spacing_mm[0])
    z = scan.positions_mm.to(device)[:, None] + torch.tensor([-reach, 0.0, reach], device=device)
    line = (torch.arange(size, device=device) - (size - 1) / 2) * scan.spacing_mm[1]
    points = torch.empty(s, 3, size, size, 3, device=device)
    row_axis, row_sign = ROWS[scan.plane]
    column_axis, column_sign = COLUMNS[scan.plane]
    points[..., NORMAL[scan.plane]] = z[:, :, None, None]
    points[..., row_axis] = row_sign * line[:, None]
    points[..., column_axis] = column_sign * line
    return points


def anatomy_points(g: torch.Generator, scan: Scan, points: Tensor) -> Tensor:
    """Tilt, scale and bend lattice points into the anatomy's frame: a pure function of the generator."""
    device = points.device
    angle = torch.randn(3, generator=g) * math.radians(7) * scan.variation
    (cx, cy, cz), (sx, sy, sz) = angle.cos(), angle.sin()
    rx = torch.tensor([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = torch.tensor([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = torch.tensor([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    scale = torch.diag(1 + 0.08 * scan.variation * torch.randn(3, generator=g).clamp(-2, 2))
    moved = points @ (rx @ ry @ rz @ scale).to(device).T
    s, _, h, w, _ = points.shape
    nodes = 4 if scan.spacing_mm[0] > 8 else 1
    coarse = torch.randn(1, 3, nodes, 7, 7, generator=g).to(device) * uniform(g, 0.5, 3.0) * scan.variation
    bend = F.interpolate(coarse, size=(s, h, w), mode="trilinear", align_corners=True)[0]
    moved = moved + bend.permute(1, 2, 3, 0)[:, None]
    if scan.mirrored:
        moved = moved * torch.tensor([-1.0, 1.0, 1.0], device=device)
    return moved + torch.tensor(scan.centre_mm, device=device)


def swap_sides(codes: Tensor) -> Tensor:
    """Exchange left and right codes: a mirrored head is another person's head with its own left and right."""
    table = torch.arange(NUM_CODES, dtype=torch.uint8, device=codes.device)
    for left, right in (*SIDED, (LEFT_WMH, RIGHT_WMH)):
        table[left], table[right] = right, left
    return table[codes.int()]


def grow_lesions(g: torch.Generator, scan: Scan, codes: Tensor, points: Tensor) -> Tensor:
    """Write up to three lesions into (S, 3, H, W) codes, seeded in visible cerebral white or deep grey matter."""
    for _ in range(pick(g, (1, 2, 3), (0.6, 0.25, 0.15))):
        s = int(torch.randint(len(codes), (), generator=g))
        classes = CLASS_OF_CODE.to(codes.device)[codes[s, 1].int()]
        white = 1 + NAMES.index("left cerebral white matter"), 1 + NAMES.index("right cerebral white matter")
        seeds = torch.nonzero((classes == white[0]) | (classes == white[1]))
        if len(seeds) < 50:
            continue
        seed = seeds[int(torch.randint(len(seeds), (), generator=g))]
        centre = points[s, 1, seed[0], seed[1]]
        radius = math.exp(uniform(g, math.log(4.0), math.log(25.0)))
        axes = radius * (1 + 0.25 * torch.randn(3, generator=g).clamp(-1.5, 1.5))
        waves = torch.randn(4, 3, generator=g) * 1.2
        phases = torch.rand(4, generator=g) * 2 * math.pi
        kind = pick(g, ("tumour", "focal", "infarct"), (0.45, 0.4, 0.15))
        halo = uniform(g, 1.3, 2.0) if kind == "tumour" else 1.0
        near = torch.nonzero((points[:, :, 0, 0] - centre).abs()[..., NORMAL[scan.plane]] < 1.4 * halo * float(axes.max()))
        if len(near) == 0:
            continue
        i, c = near.T
        off = (points[i, c] - centre) / axes.to(points.device)
        wobble = sum(torch.sin(off @ k.to(off.device) + float(p)) for k, p in zip(waves, phases, strict=True))
        distance = torch.linalg.vector_norm(off, dim=-1) + 0.12 * wobble
        here = codes[i, c]
        classes = CLASS_OF_CODE.to(codes.device)[here.int()]
        tissue = ((classes > 0) & (classes != 1 + NAMES.index("CSF"))) | (here >= LEFT_WMH)
        whites = (classes == white[0]) | (classes == white[1])
        if kind == "tumour":
            here = torch.where(whites & (distance < halo), OEDEMA, here)
            here = torch.where(tissue & (distance < 1), RIM, here)
            inner = uniform(g, 0.0, 0.75)
            here = torch.where(tissue & (distance < inner), NECROSIS, here)
        else:
            code = CORE if kind == "focal" else NECROSIS
            if kind == "focal" and uniform(g, 0, 1) < 0.6:
                code = OEDEMA
            here = torch.where(tissue & (distance < 1), code, here)
        codes[i, c] = here.to(torch.uint8)
    return codes


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of (..., H, W), sigma in pixels, as two matrix products (faster than a convolution)."""

    def matrix(size: int) -> Tensor:
        line = torch.arange(size, device=x.device)
        weights = torch.exp(-0.5 * ((line[:, None] - line) / sigma) ** 2)
        return weights / weights.sum(1, keepdim=True)

    return matrix(x.shape[-2]) @ x @ matrix(x.shape[-1]).T


def acquire(g: torch.Generator, scan: Scan, codes: Tensor) -> Tensor:
    """Tissue codes (S, 3, H, W) -> image intensities: signal, texture, blur, bias field, Rician noise."""
    device = codes.device
    mean, texture = signals(g, scan.sequence, scan.variation)
    noise_seed = int(torch.randint(2**31, (), generator=g))
    white = torch.randn(3, *codes.shape, generator=torch.Generator().manual_seed(noise_seed)).to(device)
    index = codes.int()
    x = mean.to(device)[index] + texture.to(device)[index] * white[0]
    x = gaussian_blur(x, uniform(g, 0.3, 1.1) if uniform(g, 0, 1) < 0.8 else uniform(g, 1.1, 2.0))
    reach = max(NEIGHBOUR_MM, scan.spacing_mm[0])
    share = NEIGHBOUR_MM / reach
    x = torch.stack([torch.lerp(x[:, 1], x[:, 0], share), x[:, 1], torch.lerp(x[:, 1], x[:, 2], share)], 1)
    s, _, h, w = x.shape
    coarse = torch.randn(1, 1, 3, 4, 4, generator=g).to(device) * uniform(g, 0.02, 0.25) * scan.variation
    bias = F.interpolate(coarse, size=(s, h, w), mode="trilinear", align_corners=True)[0, 0]
    x = x.clamp(min=0) * torch.exp(bias)[:, None]
    sigma = math.exp(uniform(g, math.log(0.004), math.log(0.06))) * scan.variation
    if scan.stripped:
        return torch.where(index > 0, ((x + sigma * white[1]) ** 2 + (sigma * white[2]) ** 2).sqrt(), x)
    return ((x + sigma * white[1]) ** 2 + (sigma * white[2]) ** 2).sqrt()


def lesion_mask(codes: Tensor, sequence: str) -> Tensor:
    """Bool mask of what counts as lesion on this sequence: oedema is separate on contrast-enhanced T1."""
    return (codes >= LEFT_WMH) & ((codes != OEDEMA) | (sequence != "T1w-Gd"))


def simulate_kspace(g: torch.Generator, image: Tensor, *, size: int, num_coils: int = 6) -> dict[str, Tensor]:
    """Undersampled multi-coil k-space of one slice (H, W), with smooth object phase and complex noise."""
    small = F.interpolate(image[None, None].cpu(), size=(size, size), mode="area")[0, 0].clamp(min=0)
    small = small / small.max().clamp(min=1e-6)
    coarse = torch.randn(1, 1, 3, 3, generator=g)
    phase = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)[0, 0]
    coils = gaussian_coils(num_coils, size, size, g)
    full = fft2c(torch.polar(small, phase)[None] * coils)
    sigma = math.exp(uniform(g, math.log(0.001), math.log(0.03)))
    full = full + sigma * torch.complex(*torch.randn(2, *full.shape, generator=g))
    mask = line_mask(size, uniform(g, 2.0, 6.0), g)[None]
    return {"kspace": full * mask, "coils": coils, "mask": mask, "image": small}


def scan_record(
    g: torch.Generator,
    scan: Scan,
    lookup: Callable[[Tensor], Tensor],
    *,
    size: int,
    with_kspace: bool,
    device: torch.device,
) -> Record:
    """Acquire one study: everything but its text.

    Args:
        lookup: (..., 3) mm in the anatomy's frame -> (...) uint8 codes.
    """
    points = lattice_points(scan, size, device)
    codes = lookup(anatomy_points(g, scan, points))
    if scan.mirrored:
        codes = swap_sides(codes)
    if scan.stripped:
        outside = torch.zeros(NUM_CODES, dtype=torch.bool, device=device)
        outside[list(HEAD_CODES)] = True
        if uniform(g, 0, 1) < 0.4:
            outside[1 + NAMES.index("CSF")] = True
        codes = torch.where(outside[codes.int()], 0, codes).to(torch.uint8)
    plain = CLASS_OF_CODE.to(device)[codes[:, 1].int()]
    if scan.normal:
        codes = torch.where(codes >= LEFT_WMH, CLASS_OF_CODE.to(device)[codes.int()], codes)
    else:
        codes = grow_lesions(g, scan, codes, points)
    images = acquire(g, scan, codes)
    ranks, areas = rank_components(lesion_mask(codes[:, 1], scan.sequence), least=12)
    places = tuple(place_of(plain, ranks == r) for r in range(1, len(areas) + 1))
    record = Record(
        images=images,
        positions_mm=scan.positions_mm,
        plane=scan.plane,
        spacing_mm=scan.spacing_mm,
        sequence=scan.sequence,
        labels=plain,
        lesions=ranks,
        lesion_places=places,
    )
    if with_kspace:
        record = replace(record, kspace=simulate_kspace(g, images[len(images) // 2, 1], size=min(96, size)))
    return record


def place_of(classes: Tensor, where: Tensor) -> str:
    """Name of the structure that most of a lesion lies in."""
    counts = torch.bincount(classes[where].long().flatten(), minlength=NUM_STRUCTURES + 1)
    counts[0] = 0
    return NAMES[int(counts.argmax()) - 1]
