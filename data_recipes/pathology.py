"""Pathology: what grows in a head. A lesion chooses its place, pushes tissue away, and writes its tissues.

Shapes are ellipsoids whose border is bent by random waves; each tissue lies between two of its level sets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .head import Lattice, Push
from .recipe import pick, uniform
from .tissue import AFTER_LESIONS, BASE_OF_CODE, CODE, FIRST_LESION, NUM_CODES, NUM_STRUCTURES, SIDE_OF_CODE

KINDS = {
    # name: (share, where it begins)
    "glioblastoma": (0.20, "white"),
    "glioma": (0.10, "white"),
    "meningioma": (0.08, "surface"),
    "metastasis": (0.11, "junction"),
    "white-matter hyperintensity": (0.13, "white"),
    "acute infarct": (0.10, "any"),
    "old infarct": (0.08, "any"),
    "haemorrhage": (0.09, "deep"),
    "abscess": (0.04, "junction"),
    "demyelination": (0.07, "periventricular"),
}
"""What a study with lesions may hold, beside what its label map holds."""
BLOOD = ("hyperacute blood", "acute blood", "early subacute blood", "late subacute blood", "haemosiderin")


def _table(*names: str) -> Tensor:
    table = torch.zeros(NUM_CODES, dtype=torch.bool)
    table[[CODE[n] for n in names]] = True
    return table[BASE_OF_CODE.long()]


WHITE = _table("left cerebral white matter", "right cerebral white matter")
CORTEX = _table("left cerebral cortex", "right cerebral cortex")
DEEP = _table(*(f"{s} {n}" for s in ("left", "right") for n in ("thalamus", "caudate", "putamen", "pallidum")))
LOW = _table("brain-stem", *(f"{s} cerebellum {n}" for s in ("left", "right") for n in ("white matter", "cortex")))
WET = _table("CSF", "left lateral ventricle", "right lateral ventricle", "3rd ventricle", "4th ventricle",
             "left inferior lateral ventricle", "right inferior lateral ventricle")
BRAIN = torch.arange(NUM_CODES) > 0
BRAIN &= BASE_OF_CODE <= NUM_STRUCTURES
SOLID = BRAIN & ~WET
SOLID[FIRST_LESION:AFTER_LESIONS] = True
ROOM = SOLID | _table("CSF", "dura")
RIM = torch.zeros(NUM_CODES, dtype=torch.bool)
RIM[[CODE[f"{s} cortex 1"] for s in ("left", "right")]] = True
PERIVENTRICULAR = torch.zeros(NUM_CODES, dtype=torch.bool)
PERIVENTRICULAR[[CODE[f"{s} periventricular {k}"] for s in ("left", "right") for k in range(1, 5)]] = True


@dataclass(frozen=True)
class Spot:
    """One lesion before it is written."""

    kind: str
    centre_mm: Tensor
    """(3,) in scan space."""
    axes_mm: Tensor
    """(3,) half axes of the ellipsoid whose level 1 is the lesion's border, without its oedema."""
    turn: Tensor
    """(3, 3)"""
    waves: Tensor
    """(N, 4): wave vector over the half axes, phase."""
    roughness: float
    side: int
    """It does not cross the midline: 1 left, 2 right, 0 where it began in neither."""
    territory: int
    """An infarct stays in the territory of one artery (`territory_of`); 0 for what is none."""
    layers: tuple[tuple[float, str, str], ...]
    """(level, tissue, what it may replace: white, solid, room), from the outermost inwards."""

    @property
    def reach_mm(self) -> float:
        """Beyond it nothing is written."""
        return float(self.axes_mm.max()) * (self.layers[0][0] + 2.5 * self.roughness)


def draw_kinds(g: torch.Generator) -> list[str]:
    """Kinds of the lesions of one study: one disease, few or many lesions of it."""
    kind = pick(g, tuple(KINDS), tuple(v[0] for v in KINDS.values()))
    number = {"metastasis": (1, 2, 3, 5), "white-matter hyperintensity": (2, 4, 8, 14), "demyelination": (3, 5, 9),
              "acute infarct": (1, 1, 2), "old infarct": (1, 1, 2)}.get(kind, (1,))
    return [kind] * pick(g, number)


def seeds_of(kind: str, codes: Tensor) -> Tensor:
    """(P, h, w) bool: where on a coarse lattice of codes a lesion may begin."""
    where = KINDS[kind][1]
    index = codes.long()
    if where == "surface":
        return RIM.to(codes.device)[index] | CORTEX.to(codes.device)[index] & touching(WET.to(codes.device)[index])
    if where == "periventricular":
        return PERIVENTRICULAR.to(codes.device)[index]
    if where == "junction":
        return WHITE.to(codes.device)[index] & touching(CORTEX.to(codes.device)[index])
    table = {"white": WHITE, "deep": DEEP | WHITE | LOW, "any": WHITE | CORTEX | DEEP | LOW}[where]
    return table.to(codes.device)[index]


def touching(where: Tensor) -> Tensor:
    """(P, h, w) bool grown by one step in the plane."""
    return torch.nn.functional.max_pool2d(where[:, None].float(), 3, 1, 1)[:, 0] > 0


def territory_of(at: Tensor) -> Tensor:
    """(...) uint8 artery that feeds each (3, ...) place in the brain's box (0 to 1, RAS+): 1 anterior, 2 middle, 3 posterior
    cerebral, 4 those of brain-stem and cerebellum; by planes, after Damasio, Arch Neurol 1983.
    """
    x, y, z = at
    middle = (x - 0.5).abs()
    found = torch.full(x.shape, 2, dtype=torch.uint8, device=at.device)
    found[(middle < 0.14) & (y > 0.35) & (z > 0.45)] = 1
    found[(y < 0.26) | ((middle < 0.2) & (y < 0.5) & (z < 0.5))] = 3
    found[(z < 0.33) & (y < 0.5)] = 4
    return found


def draw_spot(
    g: torch.Generator, kind: str, centre: Tensor, *, side: int, at: Tensor, variation: float
) -> tuple[Spot, list[Push]]:
    """Draw size, shape and tissues of a lesion at (3,) mm in scan space, which is at (3,) in the brain's box."""

    def size(low: float, high: float) -> float:
        return math.exp(uniform(g, math.log(low), math.log(high)))

    stretch, rough = 0.2, 0.12
    mass = 0.0
    if kind == "glioblastoma":
        radius, mass, rough = size(11, 32), uniform(g, 0.2, 0.7), 0.16
        inner = uniform(g, 0.3, 0.85)
        layers = [(uniform(g, 1.3, 2.8), "oedema", "white"), (1.0, "enhancing", "solid"), (inner, "necrosis", "solid")]
    elif kind == "glioma":
        radius, mass, layers = size(11, 40), uniform(g, 0.1, 0.5), [(1.0, "glioma", "solid")]
        rough = 0.18
    elif kind == "meningioma":
        radius, mass, rough = size(6, 26), uniform(g, 0.6, 0.95), 0.05
        layers = [(1.0, "meningioma", "room")]
        if radius > 10 and uniform(g, 0, 1) < 0.5:
            layers.insert(0, (uniform(g, 1.2, 1.7), "oedema", "white"))
    elif kind == "metastasis":
        radius, mass, rough = size(2.5, 14), uniform(g, 0.2, 0.6), 0.08
        layers = [(uniform(g, 1.4, 3.0), "oedema", "white"), (1.0, "enhancing", "solid")]
        if radius > 6 and uniform(g, 0, 1) < 0.6:
            layers.append((uniform(g, 0.4, 0.8), "necrosis", "solid"))
    elif kind == "white-matter hyperintensity":
        radius, stretch, layers = size(1.5, 9), 0.4, [(1.0, "wmh", "white")]
        rough = 0.2
    elif kind == "acute infarct":
        radius, layers, stretch, rough = size(3, 34), [(1.0, "acute infarct", "solid")], 0.35, 0.2
        mass = uniform(g, 0.0, 0.2) if radius > 12 else 0.0
    elif kind == "old infarct":
        radius, stretch, rough = size(3, 30), 0.35, 0.2
        mass = -uniform(g, 0.05, 0.3)
        layers = [(uniform(g, 1.15, 1.4), "gliosis", "white"), (1.0, "gliosis", "solid"), (uniform(g, 0.6, 0.95), "cavity", "solid")]
    elif kind == "haemorrhage":
        radius, mass, age = size(4, 24), uniform(g, 0.2, 0.6), pick(g, BLOOD)
        layers = [(1.0, age, "solid")]
        if age == "late subacute blood":
            layers = [(1.12, "haemosiderin", "solid"), *layers]
        if age == "haemosiderin":
            mass, layers = -0.1, [(1.0, age, "solid"), (uniform(g, 0.5, 0.85), "cavity", "solid")]
        elif radius > 6:
            layers = [(uniform(g, 1.25, 1.8), "oedema", "white"), *layers]
    elif kind == "abscess":
        radius, mass, rough = size(6, 18), uniform(g, 0.3, 0.7), 0.06
        layers = [(uniform(g, 1.5, 2.4), "oedema", "white"), (1.0, "capsule", "solid"), (1 - max(0.08, 1.6 / radius), "pus", "solid")]
    else:
        radius, stretch, rough = size(2, 8), 0.45, 0.1
        layers = [(1.0, pick(g, ("plaque", "active plaque"), (0.75, 0.25)), "white")]
    axes = radius * torch.exp(stretch * torch.randn(3, generator=g).clamp(-1.5, 1.5))
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=g))
    number = 5
    waves = torch.cat([torch.randn(number, 3, generator=g) * torch.linspace(1.0, 3.5, number)[:, None],
                       torch.rand(number, 1, generator=g) * 2 * math.pi], 1)
    territory = int(territory_of(at)) if "infarct" in kind else 0
    spot = Spot(kind, centre, axes, turn, waves, rough * min(1.0, 0.5 + variation / 2), side, territory, tuple(layers))
    mean = float(axes.prod()) ** (1 / 3)
    pushes = [Push(centre, mean, mean * uniform(g, 2.2, 3.2), mass)] if mass and mean > 4 else []
    return spot, pushes


def level(spot: Spot, off: Tensor) -> Tensor:
    """(...) level set of (3, ...) mm from the centre: 1 on the border."""
    device = off.device
    moved = torch.einsum("ab,b...->a...", (spot.turn.T / spot.axes_mm[:, None]).to(device), off)
    bend = torch.zeros_like(moved[0])
    for n, (a, b, c, phase) in enumerate(spot.waves.tolist()):
        bend += torch.sin(moved[0] * a + moved[1] * b + moved[2] * c + phase) / (1 + 0.4 * n)
    x, y, z = moved
    return (x * x + y * y + z * z).sqrt_() + spot.roughness * bend


def write(
    spot: Spot, number: int, codes: Tensor, owner: Tensor, lattice: Lattice, offsets: Tensor, relative: Tensor
) -> None:
    """Write one lesion in place.

    Args:
        number: Its number in `owner`, from 1.
        codes: (K, P, H, W) uint8.
        owner: (P, H, W) uint8, which lesion wrote the first sample of a pixel.
        offsets: (K, 3) mm of the samples of a pixel.
        relative: (3, P, H, W) places in the brain's box.
    """
    box = lattice.near(spot.centre_mm, spot.reach_mm)
    if box is None:
        return
    device = codes.device
    off = lattice.points(box) - spot.centre_mm.to(device).view(3, 1, 1, 1)
    tables = {"white": WHITE.to(device), "solid": SOLID.to(device), "room": ROOM.to(device)}
    sides = SIDE_OF_CODE.to(device)
    fed = territory_of(relative[(slice(None), *box)]) == spot.territory if spot.territory else None
    wmh = torch.where(CODE["right cerebral white matter"] == BASE_OF_CODE, CODE["right wmh"], CODE["left wmh"]).to(device)
    for k, shift in enumerate(offsets):
        value = level(spot, off + shift.to(device).view(3, 1, 1, 1))
        here = codes[k][box]
        own = sides[here.int()]
        allowed = (own == spot.side) | (own == 0)
        if fed is not None:
            allowed &= fed
        for reach, tissue, replaces in spot.layers:
            index = here.int()
            where = (value < reach) & allowed & tables[replaces][index]
            here[where] = wmh[index[where]].to(torch.uint8) if tissue == "wmh" else CODE[tissue]
        if k == 0:
            owner[box][(value < spot.layers[0][0]) & allowed & (here >= FIRST_LESION) & (here < AFTER_LESIONS)] = number
