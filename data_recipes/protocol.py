"""Protocol: how a sequence is set up, and the signal of every tissue under it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from omnimri.anatomy import STRUCTURES
from omnimri.physics import diffusion_weighted, inversion_recovery, spin_echo, spoiled_gradient_echo, t1_at, t2_star_at

from .recipe import pick, uniform
from .tissue import (
    BASE_OF_CODE,
    BRAIN,
    CODE,
    ENHANCED,
    EXTRA,
    FIELD_POWER,
    NUM_CODES,
    NUM_STRUCTURES,
    SIDED,
    TISSUE,
    TRANSFER,
)

SHARES = {"T1w": 0.38, "T1w-Gd": 0.13, "T2w": 0.14, "PDw": 0.05, "FLAIR": 0.17, "other": 0.13}
"""Share of each of `anatomy.SEQUENCES` in the recipe of label maps."""
OTHER = {"random": 0.35, "DWI": 0.3, "ADC": 0.1, "T2*": 0.25}
"""What `other` is made of."""
MOST_TRANSFER = 0.2
"""White matter's largest loss by magnetization transfer from the pulses of other slices, in spin echoes of many (Dixon et al., Magnetic
Resonance Imaging 1990; Santyr, Magnetic Resonance Imaging 1993): with it and a long TR grey and white matter can be alike."""


@dataclass(frozen=True)
class Protocol:
    """One sequence with its parameters; 0 where a parameter has no meaning."""

    sequence: str
    """One of `anatomy.SEQUENCES`."""
    technique: str
    """MPRAGE, SPGR, SE, TSE, IR-TSE, DWI, ADC, T2* or random."""
    field_t: float = 3.0
    tr_ms: float = 0.0
    te_ms: float = 0.0
    ti_ms: float = 0.0
    flip_deg: float = 90.0
    b_value: float = 0.0
    """s/mm^2"""

    def parameters(self) -> dict[str, float]:
        """What is known of it, as a header would tell."""
        known = {"field_t": self.field_t, "tr_ms": self.tr_ms, "te_ms": self.te_ms, "ti_ms": self.ti_ms, "b_value": self.b_value}
        return {k: round(v, 1) for k, v in known.items() if v and self.technique != "random"}


def draw_protocol(g: torch.Generator, sequence: str) -> Protocol:
    """Draw field strength and parameters from clinical ranges."""
    field = pick(g, (0.5, 1.0, 1.5, 3.0, 7.0), (0.06, 0.06, 0.41, 0.42, 0.05))
    longer = (field / 3.0) ** 0.3  # inversion and repetition times follow T1
    if sequence in ("T1w", "T1w-Gd"):
        technique = pick(g, ("MPRAGE", "SPGR", "SE"), (0.5, 0.3, 0.2))
        if technique == "MPRAGE":
            ti = longer * uniform(g, 850, 1250)
            return Protocol(sequence, technique, field, ti * uniform(g, 2.0, 2.6), uniform(g, 2, 5), ti, uniform(g, 7, 12))
        if technique == "SPGR":
            return Protocol(sequence, technique, field, longer * uniform(g, 8, 35), uniform(g, 1.5, 6), 0.0, uniform(g, 18, 35))
        return Protocol(sequence, technique, field, longer * uniform(g, 350, 900), uniform(g, 8, 18))
    if sequence == "T2w":
        return Protocol(sequence, "TSE", field, uniform(g, 3000, 7000), uniform(g, 80, 120))
    if sequence == "PDw":
        return Protocol(sequence, pick(g, ("TSE", "SE")), field, uniform(g, 2200, 4500), uniform(g, 10, 30))
    if sequence == "FLAIR":
        tr = uniform(g, 7000, 11000)
        null = math.log(2 / (1 + math.exp(-tr / BRAIN["csf"][1]))) * BRAIN["csf"][1]
        return Protocol(sequence, "IR-TSE", field, tr, uniform(g, 85, 140), null * uniform(g, 0.94, 1.04))
    technique = pick(g, tuple(OTHER), tuple(OTHER.values()))
    if technique in ("DWI", "ADC"):
        field = max(field, 1.0)
        return Protocol(sequence, technique, field, uniform(g, 3500, 8000), uniform(g, 60, 100), b_value=uniform(g, 800, 1200))
    if technique == "T2*":
        te = uniform(g, 15, 28) * (3.0 / field) ** 0.5
        return Protocol(sequence, technique, field, uniform(g, 400, 900), te, flip_deg=uniform(g, 15, 25))
    return Protocol(sequence, technique)


def signals(g: torch.Generator, protocol: Protocol, variation: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean signal and texture of every code, (NUM_CODES,) each, by the sequence's equation.

    Tissues differ from head to head: each has its own parameters, brain tissues of one kind vary together, and both sides agree.
    """
    narrow = variation * torch.tensor([0.4, 1.0, 1.0, 1.0, 1.0])  # proton density differs least
    spread = 1 + 0.06 * narrow * torch.randn(NUM_CODES, 5, generator=g)
    person = 1 + 0.06 * narrow * torch.randn(5, generator=g)
    shared = {t: (person if t != "csf" else 1.0) * (1 + 0.03 * narrow * torch.randn(5, generator=g)) for t in BRAIN}
    for k, s in enumerate(STRUCTURES, 1):
        spread[k] = 1 + (spread[k] - 1) * 0.4
        spread[k] *= shared[s.tissue]
    for left, right in SIDED:
        spread[right] = spread[left]
    tissue = TISSUE * spread[BASE_OF_CODE.long()].clamp(0.65, 1.45)
    tissue[:, 0].clamp_(max=1.05)
    pd, t1, t2, t2s, adc = tissue.T
    t1, t2s = t1_at(t1, FIELD_POWER, field_t=protocol.field_t), t2_star_at(t2, t2s, field_t=protocol.field_t)
    if protocol.sequence == "T1w-Gd":
        t1 = t1.clone()
        for name, (low, high) in ENHANCED.items():
            t1[CODE[name]] = uniform(g, low, high)
    one = torch.ones(())
    tr, te, ti, flip = (one * v for v in (protocol.tr_ms, protocol.te_ms, protocol.ti_ms, math.radians(protocol.flip_deg)))
    if protocol.technique == "MPRAGE":
        mean = inversion_recovery(pd, t1, t2s, tr_ms=tr, te_ms=te, ti_ms=ti)
    elif protocol.technique == "IR-TSE":
        mean = inversion_recovery(pd, t1, t2, tr_ms=tr, te_ms=te, ti_ms=ti)
    elif protocol.technique in ("SPGR", "T2*"):
        mean = spoiled_gradient_echo(pd, t1, t2s, tr_ms=tr, te_ms=te, flip_rad=flip)
    elif protocol.technique == "ADC":
        mean = adc.clone()
    elif protocol.technique == "random":
        mean = torch.rand(NUM_CODES, generator=g)[BASE_OF_CODE.long()]
        for left, right in SIDED:
            mean[right] = mean[left]
        mean[0] = 0.0
    else:
        mean = spin_echo(pd, t1, t2, tr_ms=tr, te_ms=te)
        if protocol.technique == "SE":
            mean = mean * (1 - uniform(g, 0, MOST_TRANSFER) * TRANSFER)
        if protocol.technique == "DWI":
            mean = diffusion_weighted(mean, adc, b_value=one * protocol.b_value)
    for name, (*_, low, high) in EXTRA.items():
        mean[CODE[name]] *= uniform(g, low, high)
    mean = mean / mean[1 : NUM_STRUCTURES + 1].max().clamp(min=1e-6)
    texture = mean * uniform(g, 0.1, 1.0) * (0.01 + 0.04 * torch.rand(NUM_CODES, generator=g))
    for name in ("soft tissue", "mucosa", "enhancing", "necrosis"):
        texture[CODE[name]] = 0.2 * mean[CODE[name]]
    return mean, texture[BASE_OF_CODE.long()]
