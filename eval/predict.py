"""Predictions of a suite: what each system says and outlines for each case, written once, so that scoring needs no model.

`OUT/predictions/SYSTEM/CASE/` holds `answer.json` and label maps in the scan's own space.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
import resource
import shutil
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from omnimri.assistant import Assistant
from omnimri.io.nifti import write_nifti
from omnimri.model.omnimri import OmniMRI
from omnimri.volume import Study

from .cases import Case, Truth, open_case

QUESTIONS = {
    "what": ("What sequence and plane is this?", None),
    "detect": ("Find lesions.", "detect"),
    "lobe": ("In which lobe is the largest lesion?", "detect"),
    "report": ("Write a report.", "report"),
}
MODEL, RANDOM = "model", "random weights"


def random_weights(assistant: Assistant) -> Assistant:
    """The same assistant with weights as they are before any training."""
    torch.manual_seed(0)
    assistant.model = OmniMRI(assistant.model.config).eval()
    return assistant


def peak_memory_gib() -> float:
    """The most memory this process has held, GiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def ask(assistant: Assistant, study: Study) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Answers to `QUESTIONS` with seconds, and the label map of everything."""
    told: dict[str, Any] = {"seconds": {}}
    tick = time.perf_counter()
    segmented = assistant.segment(study)
    told["seconds"]["segment"] = round(time.perf_counter() - tick, 2)
    for name, (question, task) in QUESTIONS.items():
        tick = time.perf_counter()
        told[name] = assistant.answer(study, question, task=task).to_json()
        told["seconds"][name] = round(time.perf_counter() - tick, 2)
    told["segment"] = segmented.to_json()
    told["peak_memory_gib"] = peak_memory_gib()
    assert segmented.labels is not None
    return told, {"labels": segmented.labels}


def fingerprint(study: Study) -> str:
    """A digest of what a study shows: a prediction is of these voxels and of no others."""
    digest = hashlib.sha256()
    for volume in study.volumes:
        digest.update(volume.voxels.numpy().tobytes())
        digest.update(volume.affine.numpy().tobytes())
    if study.kspace is not None:
        digest.update(study.kspace.data.numpy().tobytes())
    return digest.hexdigest()[:32]


def predict(assistant: Assistant, system: str, cases: Sequence[Case], out: Path, *, key: str) -> None:
    """Predict every case that is not there yet; one that fails is written down, does not stop the rest, and is tried again next time.

    Args:
        key: Of the checkpoint and the suites: predictions of another key are made anew.
    """
    for case in cases:
        folder = out / "predictions" / system / case.name
        told: dict[str, Any] = {"case": case.name, "suite": case.suite, "key": key}
        known = json.loads((folder / "answer.json").read_text(encoding="utf-8")) if (folder / "answer.json").exists() else {}
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            study, truth = open_case(case)
        except Exception as error:
            # A file that is no brain MRI may be refused by the reader; every other one must be read.
            told["refused" if case.suite == "refused" and isinstance(error, ValueError) else "failed"] = _sentence(error)
        else:
            told["study"] = fingerprint(study)
            if (known.get("key"), known.get("study")) == (key, told["study"]) and "failed" not in known:
                shutil.rmtree(partial)
                continue
            try:
                _answer(assistant, study, truth, told, partial)
            except Exception as error:
                told["failed"] = _sentence(error)
                traceback.print_exc()
        assistant.forget()
        (partial / "answer.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
        gc.collect()
        print(f"{system}: {case.name} {told.get('refused') or told.get('failed') or told['seconds']}", flush=True)


def _sentence(error: Exception) -> str:
    """What went wrong, without folders."""
    return re.sub(
        r"(?:/[\w.\- ]+)+/", "", " ".join((str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}").split())
    )


def _answer(assistant: Assistant, study: Study, truth: Truth, told: dict[str, Any], folder: Path) -> None:
    """Ask about one study, and write its maps."""
    if study.volumes:
        found, maps = ask(assistant, study)
        told |= found
        for name, labels in maps.items():
            write_nifti(folder / f"{name}.nii.gz", labels.to(torch.int32), study.primary.affine)
    if study.kspace is not None and truth.image is not None:
        tick = time.perf_counter()
        image = assistant.reconstruct(study.kspace).image.voxels[0].permute(2, 1, 0).numpy()
        told["seconds"]["reconstruct"] = round(time.perf_counter() - tick, 2)
        np.save(folder / "reconstruction.npy", image)


def read(out: Path, system: str, case: Case) -> tuple[dict[str, Any], np.ndarray | None]:
    """What was predicted, and the label map where there is one.

    Raises:
        ValueError: it was not predicted.
    """
    folder = out / "predictions" / system / case.name
    if not (folder / "answer.json").exists():
        raise ValueError(f"expected a prediction of {case.name!r} by {system!r}, got none; run without --score-only")
    told = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    labels = folder / "labels.nii.gz"
    return told, np.asarray(nibabel.load(labels).dataobj).astype(np.int32) if labels.exists() else None


ORDER = {"T1w": (24, 3, 2), "T1w-Gd": (24, 3, 2), "FLAIR": (24, 2, 3), "T2w": (2, 3, 24), "PDw": (2, 3, 24)}
"""Fluid (24), grey (3) and white matter (2) from dark to bright on each sequence."""


def mixture_labels(image: np.ndarray, sequence: str | None) -> np.ndarray:
    """A trivial baseline: three Gaussians on the intensities within the head, named in the true sequence's order (else T1's)."""
    from sklearn.mixture import GaussianMixture

    inside = image > image.min() + 0.05 * (np.percentile(image, 99.5) - image.min())
    values = image[inside].reshape(-1, 1)
    fitted = GaussianMixture(3, random_state=0).fit(values[:: max(1, len(values) // 20_000)])
    table = np.zeros(3, dtype=np.int32)
    table[np.argsort(fitted.means_.ravel())] = ORDER.get(sequence or "T1w", ORDER["T1w"])
    out = np.zeros(image.shape, dtype=np.int32)
    out[inside] = table[fitted.predict(values)]
    return out


def bright_lesions(image: np.ndarray) -> np.ndarray:
    """A trivial baseline: what is brighter than the head's mean by two standard deviations."""
    inside = image > image.min() + 0.05 * (np.percentile(image, 99.5) - image.min())
    return inside & (image > image[inside].mean() + 2 * image[inside].std())


def deepbet_mask(study: Study) -> np.ndarray | None:
    """The brain mask of deepbet (PyPI; Fisch et al., 2024), a peer; None where it is not installed."""
    import tempfile

    try:
        from deepbet import run_bet
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as room:
        path, mask = Path(room) / "scan.nii.gz", Path(room) / "mask.nii.gz"
        write_nifti(path, study.primary.voxels[0], study.primary.affine)
        run_bet([str(path)], mask_paths=[str(mask)], no_gpu=True)
        return np.asarray(nibabel.load(mask).dataobj) > 0


def wavelet_reconstruction(study: Study, weight: float) -> np.ndarray | None:
    """Sigpy's L1-wavelet SENSE with the same coil maps, a peer, (S, H, W); None where it is not installed."""
    try:
        from sigpy.mri.app import L1WaveletRecon
    except ImportError:
        return None
    from omnimri.physics import estimate_coils

    assert study.kspace is not None
    coils = estimate_coils(study.kspace.data, study.kspace.mask[None]).numpy()
    return np.stack(
        [np.abs(L1WaveletRecon(k, c, weight, show_pbar=False).run()) for k, c in zip(study.kspace.data.numpy(), coils, strict=True)]
    )
