"""The simulated scanner: a head, a protocol and a disease become one study with exact masks.

All draws are made on the CPU; the arrays are computed on `device`. Shapes: S slices, P planes (slices and their neighbours),
K samples of a pixel, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from omnimri.anatomy import NAMES, PLANES
from omnimri.example import Record
from omnimri.grid import COLUMNS, NEIGHBOUR_MM, NORMAL, ROWS
from omnimri.measure import lobe_of, place_of, rank_components

from .acquisition import ThickSlices, acquire, draw_quality, simulate_kspace
from .head import Lattice, Lookup, draw_warp
from .pathology import draw_kinds, draw_spot, seeds_of, write
from .protocol import SHARES, Protocol, draw_protocol, signals
from .recipe import pick, uniform
from .tissue import (
    AFTER_LESIONS,
    BASE_OF_CODE,
    CLASS_OF_CODE,
    CODE,
    CORTEX_SHELLS,
    FIRST_LESION,
    FLUID_SHELLS,
    HEAD_CODES,
    NUM_STRUCTURES,
    SIDE_OF_CODE,
    WHITE_SHELLS,
    swap_sides,
)

LEAST_PIXELS = 12
"""A lesion has at least so many pixels in a study."""
LEAST_CONTRAST = 0.04
"""A lesion whose median differs less from its surroundings, on the scale of the brightest brain tissue, is not seen."""
BURNT_SHARE = 0.12
"""Studies with letters burnt into their pixels, which say nothing of the patient and take the grey scale's upper end."""
SAMPLES = torch.tensor([[0.0, 0.0, 0.0], [-0.25, -0.3, 0.15], [0.25, 0.15, 0.3], [0.0, 0.3, -0.3], [0.4, -0.15, -0.15]])
"""Samples of a pixel: along the slice normal in slice thicknesses, along rows and columns in pixels."""


@dataclass(frozen=True)
class Scan:
    """How one study is laid out; every number is drawn by `draw_scan`."""

    protocol: Protocol
    plane: str
    positions_mm: Tensor
    """(S,)"""
    spacing_mm: tuple[float, float, float]
    native_mm: float
    """Distance of the slices that were acquired, of which these are some."""
    thickness_mm: float
    centre_mm: Tensor
    """(3,) middle of the lattice in the head's own mm."""
    stripped: bool
    mirrored: bool
    normal: bool
    variation: float = 1.0
    """How much heads and scanners differ: scales everything that is drawn around a mean, and how rare things are."""


def draw_scan(
    g: torch.Generator,
    *,
    num_slices: int,
    size: int,
    brain_box: tuple[Tensor, Tensor],
    head_centre: Tensor,
    mirror: bool,
    normal_share: float = 1 / 3,
    variation: float = 1.0,
    sequences: Mapping[str, float] = SHARES,
) -> Scan:
    """Draw plane, slices, field of view and protocol.

    Args:
        brain_box: Lowest and highest corner of the brain, (3,) mm each.
        head_centre: (3,) mm, middle of the whole head.
        sequences: Share of each of `anatomy.SEQUENCES`.
    """
    plane = pick(g, PLANES, (0.7, 0.15, 0.15))
    low, high = brain_box
    axis = NORMAL[plane]
    extent, middle = float(high[axis] - low[axis]), (low + high) / 2
    stripped = uniform(g, 0, 1) < 0.45
    if uniform(g, 0, 1) < 1 - 0.25 * variation:
        gap = extent * uniform(g, 0.9, 1.05) / num_slices
        native = min(gap, pick(g, (1.0, uniform(g, 1.0, 3.0), uniform(g, 3.0, 8.0)), (0.4, 0.2, 0.4)))
    else:
        gap = native = math.exp(uniform(g, math.log(0.7), math.log(8)))
        middle[axis] += (extent / 2 - gap * num_slices / 2) * uniform(g, -0.85, 0.85)
    centre = middle.clone()
    for a in range(3):
        if a != axis:
            toward = 0.0 if stripped else uniform(g, 0.0, 1.0)
            centre[a] += toward * float(head_centre[a] - middle[a]) + uniform(g, -8, 8) * variation
    field = 192.0 / size
    widest = 0.95 + 0.25 * variation * uniform(g, 0, 1) if stripped else 1.1 + 0.35 * variation * uniform(g, 0, 1)
    if uniform(g, 0, 1) < 0.1 * variation:
        widest *= uniform(g, 0.55, 0.9)  # the field of view cuts the head
    return Scan(
        protocol=draw_protocol(g, pick(g, tuple(sequences), tuple(sequences.values()))),
        plane=plane,
        positions_mm=(torch.arange(num_slices) - (num_slices - 1) / 2) * gap,
        spacing_mm=(gap, field * widest, field * widest),
        native_mm=native,
        thickness_mm=native * (uniform(g, 0.7, 1.0) if native > 2 else 1.0),
        centre_mm=centre,
        stripped=stripped,
        mirrored=mirror and uniform(g, 0, 1) < 0.5,
        normal=uniform(g, 0, 1) < normal_share,
        variation=variation,
    )


def planes_of(scan: Scan) -> tuple[Tensor, Tensor, float]:
    """Planes that slices and their neighbours need: (P,) mm, (S, 3) which plane each channel reads, and how far toward
    its plane a neighbour lies when slices are further apart than `NEIGHBOUR_MM` (as `Grid.to_grid` interpolates).
    """
    step = max(NEIGHBOUR_MM, scan.native_mm)
    s = len(scan.positions_mm)
    if abs(scan.spacing_mm[0] - step) < 1e-6:  # slices are each other's neighbours; beyond the ends there are none
        index = torch.arange(s)[:, None] + torch.tensor([-1, 0, 1])
        return scan.positions_mm, index.clamp(0, s - 1), NEIGHBOUR_MM / step
    along = (scan.positions_mm[:, None] + torch.tensor([-step, 0.0, step])).flatten()
    return along, torch.arange(3 * s).view(s, 3), NEIGHBOUR_MM / step


def lattice_of(scan: Scan, along: Tensor, size: int, device: torch.device) -> Lattice:
    """The lattice of a scan."""
    line = (torch.arange(size) - (size - 1) / 2) * scan.spacing_mm[1]
    return Lattice(scan.plane, along.to(device), (ROWS[scan.plane][1] * line).to(device), (COLUMNS[scan.plane][1] * line).to(device))


def draw_remap(g: torch.Generator, scan: Scan, *, hyperintensities: bool) -> Tensor:
    """(NUM_CODES,) uint8: what each code becomes in this person: atrophy, and what a skull stripper leaves.

    Args:
        hyperintensities: Whether those of the label map stay. Most are rims of 1 or 2 mm around the ventricles, as healthy people have.
    """
    table = BASE_OF_CODE.clone()
    if not hyperintensities:
        for side in ("left", "right"):
            table[CODE[f"{side} wmh"]] = CODE[f"{side} cerebral white matter"]
    for k in range(1, WHITE_SHELLS + 1):
        for side in ("left", "right"):
            table[CODE[f"{side} periventricular {k}"]] = CODE[f"{side} periventricular {k}"]
    if uniform(g, 0, 1) < 0.3 * scan.variation:
        depth = pick(g, (1, 2), (0.85, 0.15))
        for side in ("left", "right"):
            for k in range(1, min(depth, CORTEX_SHELLS) + 1):
                table[CODE[f"{side} cortex {k}"]] = CODE["CSF"]
    if uniform(g, 0, 1) < 0.3 * scan.variation:
        for side, width in zip(("left", "right"), pick(g, ((1, 1), (2, 2), (3, 3), (1, 2), (2, 1))), strict=True):
            for k in range(1, width + 1):
                table[CODE[f"{side} periventricular {k}"]] = CODE[f"{side} lateral ventricle"]
    if scan.stripped:
        left = {CODE["dura"]} if uniform(g, 0, 1) < 0.5 else set()  # strippers often leave the venous sinuses
        table[[c for c in HEAD_CODES if c not in left]] = 0
        style = pick(g, ("all fluid", "near fluid", "no fluid", "tight"), (0.4, 0.35, 0.2, 0.05))
        kept = {"all fluid": FLUID_SHELLS + 1, "near fluid": pick(g, (1, 2))}.get(style, 0)
        for k in range(1, FLUID_SHELLS + 1):
            if k > kept:
                table[CODE[f"fluid {k}"]] = 0
        if kept <= FLUID_SHELLS:
            table[CODE["CSF"]] = 0
        if style == "tight":
            for side in ("left", "right"):
                table[CODE[f"{side} cortex 1"]] = 0
        if not left:
            table[CODE["vessel"]] = 0
    return table


def distort(g: torch.Generator, points: Tensor, scan: Scan, head_low: Tensor, head_high: Tensor) -> Tensor:
    """Shift points (3, P, H, W) of the head in place along one in-plane axis, as echo-planar images are near air; (P, H, W) dropout."""
    axis = ROWS[scan.plane][0] if uniform(g, 0, 1) < 0.7 else COLUMNS[scan.plane][0]
    span = head_high - head_low
    field = torch.zeros_like(points[0])
    for share in ((0.5, 0.85, 0.25), (0.15, 0.5, 0.15), (0.85, 0.5, 0.15)):  # above the sphenoid sinus and the ears
        middle = head_low + span * torch.tensor(share)
        off = points - middle.to(points.device).view(3, 1, 1, 1)
        field += torch.exp(-off.square().sum(0) / (2 * 18.0**2))
    amount = uniform(g, -9, 9) * min(1.5, scan.protocol.field_t / 3) * scan.variation
    points[axis] += amount * field
    return (1 - uniform(g, 0.1, 0.7) * field.square()).clamp(min=0.1)


def scan_record(
    g: torch.Generator,
    scan: Scan,
    lookup: Lookup,
    *,
    brain_box: tuple[Tensor, Tensor],
    ventricles: Tensor | None,
    size: int,
    num_samples: int,
    kspace_size: int,
    device: torch.device,
    thick: ThickSlices | None = None,
) -> Record:
    """Acquire one study: everything but its text."""
    along, index, share = planes_of(scan)
    lattice = lattice_of(scan, along, size, device)
    disease = [] if scan.normal else draw_kinds(g)
    hydrocephalus = not scan.normal and ventricles is not None and uniform(g, 0, 1) < 0.06
    warp = draw_warp(g, scan.centre_mm, float(along.max() - along.min()), mirrored=scan.mirrored, hydrocephalus=hydrocephalus,
                     variation=scan.variation)
    points = warp(lattice.points(), along, ventricles)
    dropout = distort(g, points, scan, *brain_box) if scan.protocol.technique in ("DWI", "ADC", "T2*") else None
    small_vessels = disease[:1] == ["white-matter hyperintensity"]
    remap = draw_remap(g, scan, hyperintensities=small_vessels).to(device)
    if scan.mirrored:
        remap = swap_sides(remap)
    pixel = torch.tensor([scan.thickness_mm, scan.spacing_mm[1], scan.spacing_mm[2]])
    offsets = torch.zeros(num_samples, 3)
    offsets[:, list(lattice.axes)] = SAMPLES[:num_samples] * pixel
    inner = offsets @ warp.matrix.T * torch.tensor([-1.0 if scan.mirrored else 1.0, 1.0, 1.0])
    low, high = (corner.to(device).view(3, 1, 1, 1) for corner in brain_box)
    relative = (points - low) / (high - low)
    spots = []
    if disease:
        coarse = remap[lookup(points[:, :, 2::4, 2::4], torch.zeros(1, 3))[0].int()]
        for kind in disease:
            found = torch.nonzero(seeds_of(kind, coarse).to("cpu"))
            if len(found) < 4:
                continue
            p, r, c = found[int(torch.randint(len(found), (), generator=g))].tolist()
            centre = lattice.points((slice(p, p + 1), slice(4 * r + 2, 4 * r + 3), slice(4 * c + 2, 4 * c + 3))).flatten().cpu()
            at = relative[:, p, 4 * r + 2, 4 * c + 2].cpu()
            side = int(SIDE_OF_CODE[int(coarse[p, r, c])])
            spot, pushes = draw_spot(g, kind, centre, side=side, at=at, variation=scan.variation)
            spots.append(spot)
            for push in pushes:
                push(points, lattice)
    codes = lookup(points, inner)
    neckless = uniform(g, 0, 1) < 0.3 * scan.variation
    if scan.stripped or neckless:
        codes = torch.where(points[2] < float(brain_box[0][2]) - (2 if scan.stripped else uniform(g, 0, 60)), 0, codes)
    codes = remap.index_select(0, codes.view(-1).int()).view(codes.shape)
    plain = CLASS_OF_CODE.to(device).index_select(0, codes[0].view(-1).int()).view(codes[0].shape)
    owner = torch.zeros_like(codes[0])
    for number, spot in enumerate(spots, 1):
        write(spot, number, codes, owner, lattice, offsets, relative)
    if hydrocephalus or (small_vessels and uniform(g, 0, 1) < 0.6):
        periventricular(g, codes, "oedema" if hydrocephalus else "wmh")
    kinds = ["hydrocephalus with transependymal oedema" if hydrocephalus else "white-matter hyperintensity", *(s.kind for s in spots)]
    mean, texture = signals(g, scan.protocol, scan.variation)
    quality = draw_quality(g, technique=scan.protocol.technique, field_t=scan.protocol.field_t, stripped=scan.stripped, size=size,
                           variation=scan.variation)
    taken = replace(quality, noise=thick.noisier(quality.noise, scan.spacing_mm[1])) if thick else quality
    volume = acquire(g, codes, mean, texture, taken, pixel_mm=scan.spacing_mm[1], planes=along, stripped=scan.stripped)
    if thick:
        volume = thick.seen(volume, scan.spacing_mm[1])
    if dropout is not None:
        volume = volume * dropout
    middle = index[:, 1].to(device)
    own = volume[middle]
    below, above = (torch.lerp(own, volume[index[:, c].to(device)], share) for c in (0, 2))
    images = torch.stack([below, own, above], 1)
    if quality.wrap:
        for labels in (plain, codes[0], owner):
            labels.narrow(quality.phase_axis, labels.shape[quality.phase_axis] - quality.wrap, quality.wrap).zero_()
    lesions, places, told = lesions_of(codes[0][middle], plain[middle], owner[middle], own, kinds, scan.protocol.sequence, quality.noise)
    lobes = tuple(lobe_of(place, relative[:, middle][:, lesions == r].mean(1)) for r, place in enumerate(places, 1))
    if uniform(g, 0, 1) < BURNT_SHARE * (scan.variation >= 1):
        images = burn(g, images)
    record = Record(
        images=images,
        positions_mm=scan.positions_mm,
        plane=scan.plane,
        spacing_mm=scan.spacing_mm,
        sequence=scan.protocol.sequence,
        technique=scan.protocol.technique,
        parameters=scan.protocol.parameters(),
        labels=plain[middle],
        lesions=lesions,
        lesion_places=places,
        lesion_kinds=told,
        lesion_lobes=lobes,
    )
    if kspace_size:
        plane = slice(int(middle[len(middle) // 2]), int(middle[len(middle) // 2]) + 1)
        still = replace(quality, noise=0.0, motion=(), ghost=0.0, spike=0.0, wrap=0)
        clean = acquire(g, codes[:, plane], mean, texture, still, pixel_mm=scan.spacing_mm[1], planes=along[plane], stripped=scan.stripped)
        record = replace(record, kspace=simulate_kspace(g, clean[0], size=min(kspace_size, size), variation=scan.variation))
    return record


def periventricular(g: torch.Generator, codes: Tensor, tissue: str) -> None:
    """Turn (K, P, H, W) shells around the lateral ventricles into lesion in place: a lining, a halo, or more (Fazekas 1 to 3)."""
    _, p, h, w = codes.shape
    reach = pick(g, (1.5, 2.5, 4.5))
    coarse = torch.randn(p, 1, 6, 6, generator=g).to(codes.device)
    rough = F.interpolate(coarse, size=(h, w), mode="bicubic", align_corners=True)[:, 0]
    for side in ("left", "right"):
        name = f"{side} wmh" if tissue == "wmh" else tissue
        shell = codes - CODE[f"{side} periventricular 1"]  # what is no shell wraps round to high numbers
        codes[(shell < WHITE_SHELLS) & (shell + 1 + rough < reach)] = CODE[name]


def burn(g: torch.Generator, images: Tensor) -> Tensor:
    """(S, C, H, W) with bright marks the size of letters over every slice, mostly at its upper or lower edge."""
    h, w = images.shape[-2:]
    lines, letters, size = pick(g, (1, 2, 3, 5)), pick(g, (4, 9, 16, 28)), pick(g, (1, 1, 2))
    page = F.pad((torch.rand(lines, letters, 5, 3, generator=g) < 0.55).float(), (0, 1, 0, 3))
    page = page.transpose(1, 2).reshape(lines * 8, letters * 4).repeat_interleave(size, 0).repeat_interleave(size, 1)[: h - 4, : w - 4]
    top = pick(g, (2, h - 2 - len(page), int(uniform(g, 0, h - len(page)))), (0.45, 0.3, 0.25))
    left = int(uniform(g, 0, w - page.shape[1]))
    drawn = torch.zeros(h, w)
    drawn[top : top + len(page), left : left + page.shape[1]] = page
    return torch.where(drawn.to(images.device) > 0, images.amax() * uniform(g, 0.7, 1.5), images)


def lesion_mask(codes: Tensor, sequence: str) -> Tensor:
    """Bool mask of what counts as lesion on this sequence: oedema is separate on contrast-enhanced T1."""
    return (codes >= FIRST_LESION) & (codes < AFTER_LESIONS) & ((codes != CODE["oedema"]) | (sequence != "T1w-Gd"))


def lesions_of(
    codes: Tensor, plain: Tensor, owner: Tensor, image: Tensor, kinds: list[str], sequence: str, noise: float
) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    """Lesions by rank, (S, H, W) uint8 with 255 for those that this image cannot show, their places and their kinds.

    Args:
        kinds: Kind of each number in `owner`; number 0 is what the label map or the ventricles' border brought.
        noise: Standard deviation of the image's noise.
    """
    ranks, areas = rank_components(lesion_mask(codes, sequence), least=LEAST_PIXELS)
    solid = (plain > 0) & ((codes < FIRST_LESION) | (codes >= AFTER_LESIONS))
    for n in (n for n in NAMES if "ventricle" in n or n == "CSF"):
        solid &= plain != 1 + NAMES.index(n)
    found = torch.where(ranks == 255, 255, 0).to(torch.uint8)
    places, told = [], []
    for r in range(1, len(areas) + 1):
        where = ranks == r
        at = torch.nonzero(where)
        (first, *low), (last, *high) = at.amin(0).tolist(), at.amax(0).tolist()
        box = (slice(first, last + 1), *(slice(max(0, a - 5), b + 6) for a, b in zip(low, high, strict=True)))
        inner = where[box]
        ring = (F.max_pool2d(inner[:, None].float(), 11, 1, 5)[:, 0] > 0) & solid[box] & ~inner
        contrast = float((image[where].median() - image[box][ring].median()).abs()) if int(ring.sum()) >= LEAST_PIXELS else 1.0
        if contrast < max(LEAST_CONTRAST, 1.2 * noise):
            found[where] = 255
            continue
        places.append(place_of(torch.bincount(plain[where].long(), minlength=NUM_STRUCTURES + 1)[1:].cpu()) or "CSF")
        told.append(kinds[int(torch.mode(owner[where].flatten()).values)])
        found[where] = len(places)
    return found, tuple(places), tuple(told)
