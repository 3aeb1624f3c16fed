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
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from omnimri.assistant import Assistant
from omnimri.grid import closest_axes
from omnimri.io import open_study
from omnimri.physics import cg_sense, estimate_coils, fft2c, sense_adjoint
from omnimri.reconstruction import Reconstruction
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
WEIGHTS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
"""Of the peers' regularisation."""
OURS = "OmniMRI"
TUNING = "Colin27"
"""The case that every peer's weight is chosen on; it is in no table."""
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


def rebuilt(assistant: Assistant, a: Acquired) -> Reconstruction:
    """What the assistant makes of one slice."""
    affine = torch.diag(torch.tensor([1.0, 1.0, 5.0, 1.0], dtype=torch.float64))
    return assistant.reconstruct(KSpace(a.kspace[None], a.mask, affine))


def _ours(assistant: Assistant) -> Method:
    return lambda a, _: rebuilt(assistant, a).image.voxels[0, ..., 0].T.numpy()


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
        found["BART L1-wavelet"] = (lambda a, w: _bart(a, "-l1", "-r", str(w)), WEIGHTS)
        found["BART TV"] = (lambda a, w: _bart(a, "-R", f"T:3:0:{w}", "-u", "0.01"), WEIGHTS)
        try:
            import sigpy  # noqa: F401
        except ImportError:
            return found
        found["sigpy L1-wavelet"] = (_sigpy("L1WaveletRecon"), WEIGHTS)
        found["sigpy TV"] = (_sigpy("TotalVariationRecon"), WEIGHTS)
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


def images_of(scans: Sequence[Path], maps: Path, synthetic: int) -> tuple[list[Case], dict[str, np.ndarray]]:
    """The cases, and a slice of each."""
    cases = [c for s in ("individuals", "freesurfer", "colin", "mni") for c in cases_of(s, scans=scans)]
    cases += [c for c in cases_of("brats", scans=scans) if c.name.endswith("flair")]
    cases += cases_of("synthetic", maps=maps, count=synthetic)
    return cases, {c.name: slice_of(c) for c in cases}


def benchmark(
    assistant: Assistant,
    *,
    scans: Sequence[Path],
    maps: Path,
    coils: Sequence[int] = (8,),
    noise: Sequence[str] = ("moderate",),
    accelerations: Sequence[int] = ACCELERATIONS,
    synthetic: int = 4,
) -> dict[str, Any]:
    """Every method on a slice of every case, with the weight that was best on Colin27's, in every setting."""
    cases, images = images_of(scans, maps, synthetic)
    known = methods(assistant)
    own = {method for name, (method, _) in known.items() if name in (OURS, "zero-filled", "CG-SENSE")}
    rows, chosen, explained = [], {}, []
    for c, level, acceleration in product(coils, noise, accelerations):
        at = {"coils": c, "noise": level, "acceleration": acceleration}
        acquired = {
            name: acquire(image, coils=c, acceleration=acceleration, noise=NOISE[level], seed=sum(map(ord, name)))
            for name, image in images.items()
        }

        def score(method: Method, weight: float, a: Acquired) -> dict[str, float]:
            tick = time.perf_counter()
            image = method(a, weight)
            first = seconds = time.perf_counter() - tick
            if method in own:  # torch plans for a matrix size once; a volume has many slices of one size
                tick = time.perf_counter()
                image = method(a, weight)
                seconds = time.perf_counter() - tick
            return measure_images(scaled(image, a.truth)[None], a.truth[None]) | {"seconds": seconds, "first_seconds": first}

        for name, (method, weights) in known.items():
            score(method, weights[0], acquired[TUNING])  # what is paid once is paid here
            best = weights[0]
            if len(weights) > 1:
                best = max(weights, key=lambda w: score(method, w, acquired[TUNING])["psnr_db"])
                chosen[f"{name}, {c} coils, {level} noise, {acceleration}x"] = best
            for case in (x for x in cases if x.name != TUNING):
                about = {"method": name, "case": case.name, "patient": case.patient, "group": GROUPS[case.suite], **at}
                rows.append(about | score(method, best, acquired[case.name]))
            print(f"{c} coils, {level} noise, {acceleration}x {name}: weight {best}", flush=True)
        explained += [
            {"case": case.name, "group": GROUPS[case.suite], **at}
            | _explained(rebuilt(assistant, acquired[case.name]), acquired[case.name], NOISE[level])
            for case in cases
        ]
    return {"weights": chosen, "rows": rows, "explained": explained}


def _explained(found: Reconstruction, a: Acquired, noise: float) -> dict[str, float]:
    """The residual over the noise, as the data show it and as it was added, and how well the spread foretells the error."""
    image, spread = (v.voxels[0, ..., 0].T.numpy() for v in (found.image, found.spread))
    factor = float((image * a.truth).sum() / max(float((image * image).sum()), 1e-12))
    error = np.abs(image * factor - a.truth)
    return {
        "network_residual": found.network_residuals[0],
        "residual": found.residuals[0],
        "residual_over_added": found.residuals[0] * found.noise / noise,
        "spread_over_error": float(spread.mean() * factor / error.mean()),
        "rank_correlation": float(spearmanr(spread[::3, ::3].ravel(), error[::3, ::3].ravel()).statistic),
    }


def markdown(results: dict[str, Any]) -> str:
    """A table a group of cases at the first number of coils and noise, the gain over the best peer at all others, and what is explained."""
    rows = results["rows"]
    c, level = rows[0]["coils"], rows[0]["noise"]
    lines = [
        "# Reconstruction of simulated acquisitions",
        "",
        (
            f"{NOTICE} A slice of every case; mean over cases with 95 % intervals by patient. The simulator is not that of training. Every "
            f"peer's weight was chosen on {TUNING} at the same coils, noise and acceleration; seconds a slice include coil maps, and leave "
            f"out what torch plans once for a matrix size (the first slice of a size takes {OURS} {_first(rows):.2f} s)."
        ),
        "",
        f"Tables at {c} coils and {level} noise; weights there: "
        + ", ".join(
            f"{k.split(',')[0]} {k.split(', ')[-1]} {v:g}" for k, v in results["weights"].items() if f"{c} coils, {level} noise" in k
        )
        + ".",
        "",
    ]
    for group in dict.fromkeys(r["group"] for r in rows):
        lines += [f"## {group}", "", row("acceleration", "method", *MEASURES, "seconds", "n"), row(*["---"] * (len(MEASURES) + 4))]
        here = [r for r in rows if (r["group"], r["coils"], r["noise"]) == (group, c, level)]
        for acceleration, method in product(dict.fromkeys(r["acceleration"] for r in here), dict.fromkeys(r["method"] for r in here)):
            some = [r for r in here if (r["acceleration"], r["method"]) == (acceleration, method)]
            found = [mean_estimate([r[m] for r in some], [r["patient"] for r in some]) for m in MEASURES]
            cells = [f"{e.value:.3g}" + ("" if np.isnan(e.low) else f" [{e.low:.3g}, {e.high:.3g}]") for e in found]
            lines.append(row(f"{acceleration}x", method, *cells, f"{np.median([r['seconds'] for r in some]):.3f}", len(some)))
        lines.append("")
    names = ("group", "coils", "noise", "acceleration")
    gains = ("psnr_db", "best peer", "gain [dB]", "ssim", "best peer", "gain", "time over the peer's", "below a peer's PSNR")
    lines += ["## Against the best peer", "", row(*names, *gains), row(*["---"] * 12)]
    for key in dict.fromkeys(tuple(r[n] for n in names) for r in rows):
        some = [r for r in rows if tuple(r[n] for n in names) == key]
        lines.append(row(*key[:3], f"{key[3]}x", *_gains(some)))
    if results.get("explained"):
        lines += ["", "## What the image explains, and what its uncertainty foretells", ""]
        told = (
            "The residual on the acquired samples over the noise that the data show (a real scan brings noise of its own): what the "
            "network gives, what is given after it was brought to the data, and the same over the noise that was added."
        )
        lines += [
            told,
            "",
            row(*names, "network", "given", "largest", "over the noise added", "mean spread over mean error", "rank correlation"),
            row(*["---"] * 10),
        ]
        for key in dict.fromkeys(tuple(r[n] for n in names) for r in results["explained"]):
            some = [r for r in results["explained"] if tuple(r[n] for n in names) == key]
            mean = lambda k, some=some: np.mean([r[k] for r in some])  # noqa: E731
            cells = [mean("network_residual"), mean("residual"), max(r["residual"] for r in some), mean("residual_over_added")]
            cells += [mean("spread_over_error"), mean("rank_correlation")]
            lines.append(row(*key[:3], f"{key[3]}x", *(f"{v:.2f}" for v in cells)))
    return "\n".join([*lines, ""])


def _first(rows: list[dict[str, Any]]) -> float:
    """Median seconds of this model for the first slice of a matrix size."""
    return float(np.median([r["first_seconds"] for r in rows if r["method"] == OURS]))


def _gains(rows: list[dict[str, Any]]) -> list[str]:
    """PSNR and SSIM of this model and of the best peer, the time over that peer's, and on how many cases a peer has more PSNR."""
    by = {m: [r for r in rows if r["method"] == m] for m in dict.fromkeys(r["method"] for r in rows)}
    ours, peers = by.pop(OURS), by
    told: list[str] = []
    fastest = 0.0
    for measure, form in (("psnr_db", ".2f"), ("ssim", ".3f")):
        own, means = np.mean([r[measure] for r in ours]), {m: np.mean([r[measure] for r in some]) for m, some in peers.items()}
        best = max(means, key=lambda m: means[m])
        told += [f"{own:{form}}", f"{best} {means[best]:{form}}", f"{own - means[best]:+{form}}"]
        if measure == "psnr_db":
            fastest = np.median([r["seconds"] for r in ours]) / np.median([r["seconds"] for r in peers[best]])
    lost = sum(any(p["psnr_db"] > r["psnr_db"] for some in peers.values() for p in some if p["case"] == r["case"]) for r in ours)
    return [*told, f"{fastest:.2f}", f"{lost} of {len(ours)}"]


def picture(assistant: Assistant, path: Path, out: Path) -> None:
    """Measured k-space zero-filled, by BART's L1-wavelet, and by this model with its uncertainty, side by side: no score is possible."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kspace = open_study(path).kspace
    if kspace is None:
        raise ValueError("expected k-space for --raw, got an image")
    found = assistant.reconstruct(kspace)
    shown = {v.name: v.voxels[0, ..., 0].T.numpy() for v in (found.zero_filled, found.image, found.spread)}
    if shutil.which("bart"):
        scale = found.image.voxels.max()
        a = Acquired(kspace.data[0] / scale, kspace.mask, np.zeros(1))
        shown = {"zero-filled": shown["zero-filled"], "BART L1-wavelet": _bart(a, "-l1", "-r", "0.003") * float(scale)} | shown
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4 * len(shown), 5.4), layout="constrained")
    for axis, (name, image) in zip(axes, shown.items(), strict=True):
        axis.imshow(image, cmap="gray" if name != "uncertainty" else "magma", vmin=0, vmax=np.quantile(image, 0.998))
        axis.set_title(f"OmniMRI {name}" if name in ("reconstruction", "uncertainty") else name)
        axis.axis("off")
    figure.suptitle(
        f"{NOTICE} {100 * found.sampled:.0f} % of the samples, {found.coils} coils; residual {found.residuals[0]:.2f} times the noise"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)
    pyplot.close(figure)
