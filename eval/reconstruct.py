"""Reconstruction against its peers in one run: simulated acquisitions of real and simulated heads.

The simulator is not the one that training uses: coils are loops by Biot and Savart, phase is a polynomial, masks are fastMRI's.
Every peer's weight is chosen on another scan. Shapes: c coils, H rows, W columns (the phase-encoded axis).
"""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnimri.assistant import Assistant
from omnimri.grid import closest_axes
from omnimri.physics import cg_sense, estimate_coils, fft2c, sense_adjoint
from omnimri.volume import KSpace

from .cases import Case, cases_of, open_case
from .metrics.reconstruction import MEASURES, measure_images
from .reports import NOTICE, row
from .resampling import mean_estimate

ACCELERATIONS = (2, 4, 8, 12)
CENTRE = {2: 0.16, 4: 0.08, 8: 0.04, 12: 0.03}
"""Share of the lines around the middle that are all sampled."""
NOISE = {"low": 0.005, "moderate": 0.015, "high": 0.04}
"""Standard deviation in a coil's image over the brightest pixel."""
OURS = "OmniMRI"
GROUPS = {
    "individuals": "individual",
    "freesurfer": "individual",
    "brats": "individual",
    "mni": "average",
    "colin": "average",
    "synthetic": "synthetic",
}
Method = Callable[["Acquired", float], np.ndarray]


@dataclass(frozen=True)
class Acquired:
    """One slice as a scanner would give it."""

    kspace: torch.Tensor
    """(c, H, W) complex64"""
    mask: torch.Tensor
    """(1, W) bool"""
    truth: np.ndarray
    """(H, W)"""


def loop_coils(count: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(c, H, W) receive fields of loops around the head by Biot and Savart, root-sum-of-squares 1."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width) * width / height, indexing="ij")
    out = []
    turn = rng.uniform(0, 2 * math.pi)
    for k in range(count):
        angle = turn + 2 * math.pi * k / count + rng.normal(0, 0.05)
        normal, along = np.array([math.cos(angle), math.sin(angle), 0]), np.array([-math.sin(angle), math.cos(angle), 0])
        centre, radius = rng.uniform(1.1, 1.25) * normal, rng.uniform(0.35, 0.5)
        t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        wire = centre + radius * (np.cos(t)[:, None] * along + np.sin(t)[:, None] * np.array([0, 0, 1.0]))
        step = np.roll(wire, -1, 0) - wire
        off = np.stack([x, y, np.zeros_like(x)], -1)[None] - (wire + step / 2)[:, None, None]
        field = (np.cross(step[:, None, None], off) / np.linalg.norm(off, axis=-1, keepdims=True) ** 3).sum(0)
        out.append(field[..., 0] - 1j * field[..., 1])
    coils = np.stack(out)
    return (coils / np.sqrt((np.abs(coils) ** 2).sum(0))).astype(np.complex64)


def line_mask(width: int, acceleration: int, rng: np.random.Generator) -> np.ndarray:
    """(W,) fastMRI's random lines with a sampled middle."""
    centre = round(width * CENTRE[acceleration])
    mask = np.zeros(width, bool)
    first = (width - centre + 1) // 2
    mask[first : first + centre] = True
    rest = np.flatnonzero(~mask)
    mask[rng.permutation(rest)[: round(width / acceleration) - centre]] = True
    return mask


def acquire(image: np.ndarray, *, coils: int, acceleration: int, noise: float, seed: int) -> Acquired:
    """Measure a magnitude image (H, W)."""
    rng = np.random.default_rng(seed)
    truth = (image / image.max()).astype(np.float32)
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in truth.shape), indexing="ij")
    phase = sum(rng.normal(0, 1.0 / (1 + i + j)) * x**i * y**j for i in range(4) for j in range(4) if 0 < i + j < 4)
    seen = truth * np.exp(1j * phase) * loop_coils(coils, *truth.shape, rng)
    full = fft2c(torch.from_numpy(seen.astype(np.complex64)))
    full = full + noise * torch.from_numpy((rng.normal(size=full.shape) + 1j * rng.normal(size=full.shape)).astype(np.complex64)) / 2**0.5
    mask = torch.from_numpy(line_mask(truth.shape[1], acceleration, rng))[None]
    return Acquired(full * mask, mask, truth)


def _ours(assistant: Assistant) -> Method:
    def run(a: Acquired, _: float) -> np.ndarray:
        affine = torch.diag(torch.tensor([1.0, 1.0, 5.0, 1.0], dtype=torch.float64))
        return assistant.reconstruct(KSpace(a.kspace[None], a.mask, affine)).image.voxels[0, ..., 0].T.numpy()

    return run


def _zero_filled(a: Acquired, _: float) -> np.ndarray:
    data = a.kspace[None]
    return sense_adjoint(data, a.mask[None], estimate_coils(data, a.mask[None]))[0].abs().numpy()


def _cg_sense(a: Acquired, weight: float) -> np.ndarray:
    data = a.kspace[None]
    return cg_sense(data, a.mask[None].float(), estimate_coils(data, a.mask[None]), weight=weight, iterations=20)[0].abs().numpy()


def write_cfl(path: Path, array: np.ndarray) -> None:
    """BART's pair of files: dimensions as text, complex64 with the first axis fastest."""
    path.with_suffix(".hdr").write_text(f"# Dimensions\n{' '.join(map(str, [*array.shape, *[1] * (16 - array.ndim)]))}\n")
    array.astype(np.complex64).ravel(order="F").tofile(path.with_suffix(".cfl"))


def read_cfl(path: Path) -> np.ndarray:
    """What `write_cfl` or BART wrote."""
    shape = [int(n) for n in path.with_suffix(".hdr").read_text().split("\n")[1].split()]
    return np.fromfile(path.with_suffix(".cfl"), np.complex64).reshape(shape, order="F").squeeze()


def _centre_lines(mask: np.ndarray) -> int:
    """Lines around the middle that are sampled without a gap."""
    missing = np.flatnonzero(~mask)
    middle = len(mask) // 2
    below, above = missing[missing < middle], missing[missing > middle]
    return int((above.min() if len(above) else len(mask)) - (below.max() if len(below) else -1) - 1)


def _bart(a: Acquired, *regularisation: str, keep_maps: bool = False) -> np.ndarray:
    """ESPIRiT and `pics`; the maps alone (H, W, c) with `keep_maps`."""
    with tempfile.TemporaryDirectory() as room:
        k, maps, out = (Path(room) / n for n in ("k", "maps", "out"))
        write_cfl(k, a.kspace.permute(1, 2, 0)[:, :, None].numpy())
        lines = int(_centre_lines(a.mask[0].numpy()))
        fine = ["-r", str(min(lines, 24))] if lines >= 16 else ["-k", "4", "-r", str(max(lines, 6)), "-c", "0"]
        quiet = {"check": True, "capture_output": True}
        subprocess.run(["bart", "ecalib", "-m1", *fine, str(k), str(maps)], **quiet)
        if keep_maps:
            return read_cfl(maps)
        subprocess.run(["bart", "pics", "-d0", "-i", "60", *regularisation, str(k), str(maps), str(out)], **quiet)
        return np.abs(read_cfl(out))


def _sigpy(name: str) -> Method:
    def run(a: Acquired, weight: float) -> np.ndarray:
        from sigpy.mri import app

        maps = np.moveaxis(_bart(a, keep_maps=True), -1, 0)
        return np.abs(getattr(app, name)(a.kspace.numpy(), maps, weight, show_pbar=False).run())

    return run


def methods(assistant: Assistant) -> dict[str, tuple[Method, tuple[float, ...]]]:
    """Name -> (method, weights to choose from); those whose program is not installed are left out."""
    found: dict[str, tuple[Method, tuple[float, ...]]] = {
        OURS: (_ours(assistant), (0.0,)),
        "zero-filled": (_zero_filled, (0.0,)),
        "CG-SENSE": (_cg_sense, (0.001, 0.003, 0.01, 0.03, 0.1)),
    }
    if shutil.which("bart"):
        found["BART L1-wavelet"] = (lambda a, w: _bart(a, "-l1", "-r", str(w)), (0.0003, 0.001, 0.003, 0.01, 0.03))
        found["BART TV"] = (lambda a, w: _bart(a, "-R", f"T:3:0:{w}", "-u", "0.01"), (0.0003, 0.001, 0.003, 0.01, 0.03))
        try:
            import sigpy  # noqa: F401
        except ImportError:
            return found
        found["sigpy L1-wavelet"] = (_sigpy("L1WaveletRecon"), (0.0003, 0.001, 0.003, 0.01, 0.03))
        found["sigpy TV"] = (_sigpy("TotalVariationRecon"), (0.0003, 0.001, 0.003, 0.01, 0.03))
    return found


def slice_of(case: Case) -> np.ndarray:
    """A slice (H, W) of a case, from zero and of even size: BART takes the middle of an odd line elsewhere."""
    study, _ = open_case(case)
    volume = study.primary
    array = volume.voxels[0].numpy()
    if case.suite != "synthetic":
        array = np.moveaxis(array, closest_axes(volume.affine)[2], -1)
    h, w = (n - n % 2 for n in array.shape[:2])
    return np.ascontiguousarray(array[:h, :w, round(0.55 * (array.shape[2] - 1))].T) - array.min()


def scaled(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The image at the truth's scale, by least squares."""
    return image * float((image * truth).sum() / max(float((image * image).sum()), 1e-12))


def benchmark(
    assistant: Assistant,
    *,
    scans: Sequence[Path],
    maps: Path,
    coils: int = 8,
    noise: str = "moderate",
    synthetic: int = 4,
    accelerations: Sequence[int] = ACCELERATIONS,
) -> dict[str, Any]:
    """Every method on a slice of every case at every acceleration, with the weight that was best on Colin27's."""
    cases = [c for s in ("individuals", "freesurfer", "colin", "mni") for c in cases_of(s, scans=scans)]
    cases += [c for c in cases_of("brats", scans=scans) if c.name.endswith("flair")]
    cases += cases_of("synthetic", maps=maps, count=synthetic)
    images = {c.name: slice_of(c) for c in cases}
    known = methods(assistant)
    tuning = "Colin27"
    rows, chosen = [], {}
    for acceleration in accelerations:
        setting = {"coils": coils, "acceleration": acceleration, "noise": NOISE[noise]}

        def score(method: Method, weight: float, name: str, setting: dict[str, Any] = setting) -> dict[str, float]:
            a = acquire(images[name], seed=sum(map(ord, name)), **setting)
            tick = time.perf_counter()
            image = method(a, weight)
            seconds = time.perf_counter() - tick
            return measure_images(scaled(image, a.truth)[None], a.truth[None]) | {"seconds": seconds}

        for name, (method, weights) in known.items():
            best = max(weights, key=lambda w: score(method, w, tuning)["psnr_db"]) if len(weights) > 1 else weights[0]
            chosen[f"{name} at {acceleration}x"] = best
            for case in (c for c in cases if c.name != tuning):
                about = {
                    "method": name,
                    "case": case.name,
                    "patient": case.patient,
                    "group": GROUPS[case.suite],
                    "acceleration": acceleration,
                }
                rows.append(about | score(method, best, case.name))
            print(f"{acceleration}x {name}: weight {best}", flush=True)
    return {"coils": coils, "noise": noise, "weights": chosen, "rows": rows}


def markdown(results: dict[str, Any]) -> str:
    """One table a group of cases."""
    lines = [
        "# Reconstruction of simulated acquisitions",
        "",
        (
            f"{NOTICE} {results['coils']} coils, {results['noise']} noise, mean over cases, a slice each, with 95 % intervals by patient; "
            "weights chosen on Colin27; seconds include coil maps."
        ),
        "",
        f"Weights: {', '.join(f'{k} {v:g}' for k, v in results['weights'].items() if v)}.",
        "",
    ]
    for group in dict.fromkeys(r["group"] for r in results["rows"]):
        lines += [f"## {group}", "", row("acceleration", "method", *MEASURES, "seconds", "n"), row(*["---"] * (len(MEASURES) + 4))]
        for acceleration in dict.fromkeys(r["acceleration"] for r in results["rows"]):
            for method in dict.fromkeys(r["method"] for r in results["rows"]):
                some = [r for r in results["rows"] if (r["group"], r["acceleration"], r["method"]) == (group, acceleration, method)]
                found = [mean_estimate([r[m] for r in some], [r["patient"] for r in some]) for m in MEASURES]
                cells = [f"{e.value:.3g}" + ("" if np.isnan(e.low) else f" [{e.low:.3g}, {e.high:.3g}]") for e in found]
                lines.append(row(f"{acceleration}x", method, *cells, f"{np.median([r['seconds'] for r in some]):.2f}", len(some)))
        lines.append("")
    return "\n".join(lines)
