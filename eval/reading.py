"""Seconds to read a scan, side by side with other readers in one run: medians, and their ratio to the peer."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from omnimri.example import normalise
from omnimri.grid import Grid, closest_axes
from omnimri.io import open_study, warm

SIDE = 256


def head_like() -> np.ndarray:
    """(256, 256, 256) int16: smooth structure and noise, also in the air, so that it compresses as a scanner's image does."""
    rng = np.random.default_rng(0)
    line = np.linspace(-1, 1, SIDE, dtype=np.float32)
    r = np.sqrt(line[:, None, None] ** 2 + line[None, :, None] ** 2 * 0.8 + line[None, None] ** 2)
    values = np.where(r < 0.8, 400 + 300 * np.sin(9 * r) + 40 * rng.standard_normal((SIDE, SIDE, SIDE), dtype=np.float32), 0)
    noise = 12 * rng.standard_normal((2, SIDE, SIDE, SIDE), dtype=np.float32)
    return np.hypot(values + noise[0], noise[1]).astype(np.int16)


def write_series(voxels: np.ndarray, folder: Path) -> None:
    """One classic MR instance a slice."""
    import pydicom

    d = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small.dcm"))
    d.Rows = d.Columns = SIDE
    d.PixelSpacing, d.ImageOrientationPatient = [1.0, 1.0], [1, 0, 0, 0, 1, 0]
    folder.mkdir()
    for k in range(SIDE):
        d.ImagePositionPatient, d.InstanceNumber = [0.0, 0.0, float(k)], k + 1
        d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        d.PixelData = np.ascontiguousarray(voxels[:, :, k].T).tobytes()
        d.save_as(folder / f"{k:04d}.dcm")


def seconds(readers: dict[str, Callable[[], Any]], repeats: int = 9) -> dict[str, float]:
    """Median of each reader's runs after one that is not counted. They take turns, so that all meet the machine in one state."""
    found: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(repeats + 1):
        for name, read in readers.items():
            if "warm" in name:
                warm(wait=True)
            tick = time.perf_counter()
            read()
            found[name].append(time.perf_counter() - tick)
    return {name: statistics.median(runs[1:]) for name, runs in found.items()}


def benchmark() -> dict[str, dict[str, float]]:
    """Seconds of every reader for both files.

    Raises:
        ValueError: a peer is not installed.
    """
    import nibabel

    try:
        import SimpleITK as sitk  # noqa: N813
        import torchio
    except ImportError as error:
        raise ValueError(f"expected the peers to measure against, {error.name} is not installed; pip install torchio") from None

    def ours(path: Path) -> None:
        volume = open_study(path).primary
        axes = closest_axes(volume.affine)
        turned = [a for a in range(3) if float(volume.affine[a, axes[a]]) < 0]
        normalise(volume.voxels[0].permute(axes).flip(turned)[:, None]).sum()

    def as_seen(path: Path) -> None:
        volume = open_study(path).primary
        normalise(Grid.fit(volume, size=192).to_grid(volume.voxels[0])).sum()

    def peer(path: Path) -> None:
        image = torchio.Compose([torchio.ToCanonical(), torchio.RescaleIntensity(percentiles=(1, 99))])(torchio.ScalarImage(path))
        image.data.sum()

    def itk(folder: Path) -> None:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        sitk.GetArrayFromImage(reader.Execute())

    with tempfile.TemporaryDirectory() as home:
        voxels = head_like()
        nifti, series = Path(home) / "a.nii.gz", Path(home) / "series"
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.0, -1.0, 1.0, 1.0])), nifti)
        write_series(voxels, series)
        return {
            f".nii.gz {SIDE}^3, read, RAS, normalised": seconds(
                {"OmniMRI, warm child": lambda: ours(nifti), "OmniMRI, cold child": lambda: ours(nifti), "TorchIO": lambda: peer(nifti)}
            ),
            f".nii.gz {SIDE}^3, read, on the lattice of 192 x 192 pixels that a model sees": seconds(
                {"OmniMRI, warm child": lambda: as_seen(nifti)}
            ),
            f"DICOM series of {SIDE} files, read": seconds(
                {
                    "OmniMRI, warm child": lambda: open_study(series),
                    "OmniMRI, cold child": lambda: open_study(series),
                    "SimpleITK": lambda: itk(series),
                }
            ),
        }
