"""Tissue codes: what a voxel of a simulated head is made of, and how each tissue relaxes and diffuses.

Codes 1 to 32 are the structures, then come tissues without a class of their own, pathology, and shells: parts of a structure
within some millimetres of another, which a study may turn into something else (atrophy, skull stripping, periventricular lesions).
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnimri.anatomy import NAMES, STRUCTURES

NUM_STRUCTURES = len(NAMES)
BRAIN = {"wm": (0.70, 840.0, 75.0, 51.0, 0.75), "gm": (0.82, 1350.0, 88.0, 60.0, 0.85), "csf": (1.0, 4200.0, 1800.0, 900.0, 3.0)}
"""PD, T1, T2, T2* in ms at 3 T, ADC in 1e-3 mm^2/s (Stanisz et al., MRM 2005; Bojorquez et al., MRI 2017; Peters et al., MRI 2007)."""
DEEP = {"thalamus": 0.7, "pallidum": 0.4, "putamen": 0.85, "caudate": 0.95, "ventral DC": 0.45, "brain-stem": 0.15}
"""How far a structure lies from white (0) to grey matter (1), where it is neither."""
IRON = {"pallidum": 0.5, "putamen": 0.8, "caudate": 0.85, "ventral DC": 0.75}
"""Factor on T2*, and its root on T2, of structures that hold iron."""
EXTRA = {
    # name: (PD, T1, T2, T2*, ADC, lowest and highest random factor on the signal)
    "vessel": (0.75, 1500.0, 120.0, 60.0, 2.5, 0.1, 1.6),
    "chiasm": (0.72, 900.0, 80.0, 50.0, 0.9, 0.9, 1.1),
    "fifth ventricle": (1.0, 4200.0, 1800.0, 900.0, 3.0, 0.9, 1.1),
    "skin": (0.75, 500.0, 60.0, 30.0, 0.6, 0.4, 1.2),
    "soft tissue": (0.75, 900.0, 45.0, 25.0, 1.2, 0.4, 1.4),
    "bone": (0.1, 800.0, 20.0, 3.0, 0.4, 0.3, 2.5),
    "marrow": (0.8, 350.0, 60.0, 20.0, 0.4, 0.4, 1.4),
    "dura": (0.7, 1300.0, 60.0, 30.0, 0.8, 0.4, 1.6),
    "eye": (1.0, 4000.0, 1200.0, 400.0, 2.9, 0.8, 1.1),
    "optic nerve": (0.72, 900.0, 80.0, 50.0, 1.0, 0.8, 1.2),
    "mucosa": (0.9, 1400.0, 120.0, 50.0, 1.6, 0.5, 1.5),
    "cord": (0.7, 850.0, 75.0, 45.0, 0.9, 0.9, 1.1),
}
PATHOLOGY = {
    "left wmh": (0.85, 1400.0, 145.0, 105.0, 1.1),
    "right wmh": (0.85, 1400.0, 145.0, 105.0, 1.1),
    "enhancing": (0.86, 1500.0, 125.0, 80.0, 1.0),
    "necrosis": (0.98, 3000.0, 400.0, 250.0, 2.2),
    "oedema": (0.88, 1500.0, 155.0, 115.0, 1.4),
    "glioma": (0.90, 1800.0, 185.0, 130.0, 1.4),
    "meningioma": (0.84, 1400.0, 105.0, 70.0, 0.85),
    "acute infarct": (0.87, 1550.0, 150.0, 105.0, 0.42),
    "gliosis": (0.88, 1600.0, 175.0, 120.0, 1.3),
    "cavity": (1.0, 4000.0, 1500.0, 800.0, 2.9),
    "hyperacute blood": (0.92, 1700.0, 150.0, 45.0, 0.8),
    "acute blood": (0.88, 1500.0, 42.0, 10.0, 0.6),
    "early subacute blood": (0.88, 500.0, 42.0, 10.0, 0.6),
    "late subacute blood": (0.95, 450.0, 260.0, 120.0, 1.2),
    "haemosiderin": (0.70, 1200.0, 28.0, 5.0, 0.7),
    "pus": (0.93, 2000.0, 220.0, 150.0, 0.5),
    "capsule": (0.82, 1200.0, 68.0, 45.0, 0.9),
    "plaque": (0.88, 1500.0, 165.0, 120.0, 1.2),
    "active plaque": (0.88, 1500.0, 165.0, 120.0, 1.2),
}
"""Bradley, Radiology 1993, for blood; Just and Thelen, Radiology 1988, for tumour and oedema."""
ENHANCED = {"enhancing": (260, 520), "meningioma": (280, 480), "capsule": (300, 560), "active plaque": (350, 650), "vessel": (200, 400),
            "dura": (400, 800), "mucosa": (350, 600)}
"""T1 in ms after contrast agent, lowest and highest."""
BOUND = {"wm": 1.0, "gm": 0.6, "csf": 0.0}
"""Magnetization transfer relative to white matter: by how much water is bound to what is no water."""
BOUND_ELSEWHERE = {"soft tissue": 1.0, "cord": 1.0, "chiasm": 1.0, "optic nerve": 1.0, "left wmh": 0.6, "right wmh": 0.6, "gliosis": 0.5,
                   "plaque": 0.6, "active plaque": 0.6, "oedema": 0.5, "glioma": 0.5, "enhancing": 0.5, "meningioma": 0.5,
                   "acute infarct": 0.5, "capsule": 0.5}  # fmt: skip

CODE: dict[str, int] = {name: k for k, name in enumerate((*NAMES, *EXTRA, *PATHOLOGY), 1)}
FIRST_LESION = CODE["left wmh"]
AFTER_LESIONS = CODE["active plaque"] + 1
CORTEX_SHELLS, WHITE_SHELLS, FLUID_SHELLS = 2, 4, 2
"""Millimetres of cortex from its outer border, of white matter from the lateral ventricle, of fluid from the brain."""
for _side in ("left", "right"):
    for _k in range(1, CORTEX_SHELLS + 1):
        CODE[f"{_side} cortex {_k}"] = len(CODE) + 1
    for _k in range(1, WHITE_SHELLS + 1):
        CODE[f"{_side} periventricular {_k}"] = len(CODE) + 1
for _k in range(1, FLUID_SHELLS + 1):
    CODE[f"fluid {_k}"] = len(CODE) + 1
NUM_CODES = len(CODE) + 1
HEAD_CODES = tuple(CODE[n] for n in ("skin", "soft tissue", "bone", "marrow", "dura", "eye", "mucosa", "cord", "optic nerve"))


def _bases() -> Tensor:
    base = torch.arange(NUM_CODES, dtype=torch.uint8)
    for side in ("left", "right"):
        for k in range(1, CORTEX_SHELLS + 1):
            base[CODE[f"{side} cortex {k}"]] = CODE[f"{side} cerebral cortex"]
        for k in range(1, WHITE_SHELLS + 1):
            base[CODE[f"{side} periventricular {k}"]] = CODE[f"{side} cerebral white matter"]
    for k in range(1, FLUID_SHELLS + 1):
        base[CODE[f"fluid {k}"]] = CODE["CSF"]
    return base


BASE_OF_CODE = _bases()
"""(NUM_CODES,) uint8: a shell's structure; every other code is its own."""
CLASS_OF_CODE = torch.where(BASE_OF_CODE <= NUM_STRUCTURES, BASE_OF_CODE, 0)
CLASS_OF_CODE[CODE["left wmh"]] = CODE["left cerebral white matter"]
CLASS_OF_CODE[CODE["right wmh"]] = CODE["right cerebral white matter"]
SIDE_OF_CODE = torch.zeros(NUM_CODES, dtype=torch.uint8)
for _name, _k in CODE.items():
    SIDE_OF_CODE[_k] = 1 if _name.startswith("left") else 2 if _name.startswith("right") else 0
SIDED = tuple((k, CODE[n.replace("left", "right")]) for n, k in CODE.items() if n.startswith("left"))


def tissue_table() -> tuple[Tensor, Tensor, Tensor]:
    """(NUM_CODES, 5) PD, T1, T2, T2*, ADC at 3 T, (NUM_CODES,) by which power of the field T1 grows, and magnetization transfer relative to
    white matter.
    """
    table, power, transfer = torch.zeros(NUM_CODES, 5), torch.full((NUM_CODES,), 0.35), torch.zeros(NUM_CODES)
    table[0] = torch.tensor([0.0, 1000.0, 50.0, 30.0, 0.0])
    for k, s in enumerate(STRUCTURES, 1):
        values, transfer[k] = torch.tensor(BRAIN[s.tissue]), BOUND[s.tissue]
        stem = s.name.removeprefix("left ").removeprefix("right ")
        if stem in DEEP:
            transfer[k] = BOUND["wm"] + DEEP[stem] * (BOUND["gm"] - BOUND["wm"])
            values = torch.lerp(torch.tensor(BRAIN["wm"]), torch.tensor(BRAIN["gm"]), DEEP[stem])
            values[2:4] *= torch.tensor([IRON.get(stem, 1.0) ** 0.5, IRON.get(stem, 1.0)])
        table[k] = values
        power[k] = 0.0 if s.tissue == "csf" else 0.38
    for name, (*values, _, _) in EXTRA.items():
        table[CODE[name]] = torch.tensor(values)
    for name, values in PATHOLOGY.items():
        table[CODE[name]] = torch.tensor(values)
    for name, bound in BOUND_ELSEWHERE.items():
        transfer[CODE[name]] = bound
    power[[CODE[n] for n in ("fifth ventricle", "eye", "cavity")]] = 0.0
    return table[BASE_OF_CODE.long()], power[BASE_OF_CODE.long()], transfer[BASE_OF_CODE.long()]


TISSUE, FIELD_POWER, TRANSFER = tissue_table()


def swap_sides(codes: Tensor) -> Tensor:
    """Exchange left and right codes: a mirrored head is another person's head with its own left and right."""
    table = torch.arange(NUM_CODES, dtype=torch.uint8, device=codes.device)
    for left, right in SIDED:
        table[left], table[right] = right, left
    return table[codes.int()]
