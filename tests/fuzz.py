"""Coverage-guided fuzzing of a reader: python -m tests.fuzz KIND --seconds 1800 [--corpus DIR].

Needs atheris (`pip install atheris`). Runs the decoding child's own code in this process; what it raises must be its one
kind of sentence, whatever the bytes. Files that once failed are kept in tests/corpus and read by tests/test_hostile.py.
"""

from __future__ import annotations

import argparse
import gzip
import io
import logging
import os
import shutil
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np

SUFFIX = {"nifti": ".nii.gz", "mgh": ".mgz", "nrrd": ".nrrd", "dicom": ".dcm", "kspace": ".h5", "zip": ".zip", "par": ".PAR",
          "metaimage": ".mha", "minc": ".mnc", "picture": ".png"}
CORPUS = Path(__file__).parent / "corpus"


def write_ismrmrd(path: Path, chunk: int = 1) -> tuple[np.ndarray, list[int]]:
    """ISMRMRD readouts of four lines of twelve, `chunk` at a time (0: all at once) as its library appends them.

    Returns the lines, complex [2 slices, 3 coils, 16, 4], and where they lie.
    """
    counters = [(n, "<u2") for n in ("kspace_encode_step_1", "kspace_encode_step_2", "average", "slice", "contrast", "phase",
                                     "repetition", "set", "segment")]
    head = np.dtype([("flags", "<u8"), ("number_of_samples", "<u2"), ("active_channels", "<u2"), ("center_sample", "<u2"),
                     ("idx", counters)])
    rng, lines = np.random.default_rng(0), [1, 5, 8, 11]
    truth = (rng.normal(size=(2, 3, 16, 4)) + 1j * rng.normal(size=(2, 3, 16, 4))).astype(np.complex64)
    xml = ("<ismrmrdHeader><encoding><trajectory>cartesian</trajectory><encodedSpace><matrixSize><x>16</x><y>12</y><z>1</z>"
           "</matrixSize></encodedSpace></encoding></ismrmrdHeader>")
    values = h5py.vlen_dtype(np.float32)
    kept = [(0, line, part, truth[part, :, :, n]) for part in range(2) for n, line in enumerate(lines)]
    with h5py.File(path, "w") as f:
        rows = f.create_dataset("dataset/data", (0 if chunk else 9,), np.dtype([("head", head), ("traj", values), ("data", values)]),
                                chunks=(chunk,) if chunk else None, maxshape=(None,) if chunk else None)
        for k, (flags, line, part, samples) in enumerate([*kept, (1 << 18, 0, 0, truth[0, :, :, 0])]):  # the last measures noise
            if chunk:
                rows.resize((k + 1,))
            rows[k] = (np.array((flags, 16, 3, 8, (line, 0, 0, part, 0, 0, 0, 0, 0)), head), np.zeros(0, np.float32),
                       np.ascontiguousarray(samples).view(np.float32).ravel())
        f.create_dataset("dataset/xml", data=np.array([xml.encode()]))
    return truth, lines


def seeds(kind: str, folder: Path) -> None:
    """Small valid files to begin with."""
    import nibabel
    import PIL.Image
    import pydicom

    array = np.random.default_rng(0).random((6, 5, 4)).astype(np.float32)
    if kind in ("nifti", "mgh"):
        made = nibabel.Nifti1Image(array, np.eye(4)) if kind == "nifti" else nibabel.MGHImage(array, np.eye(4))
        nibabel.save(made, folder / f"seed{SUFFIX[kind]}")
        # The fuzzer changes what is inside the gzip container, which would refuse anything else.
        (folder / "plain").write_bytes(gzip.decompress((folder / f"seed{SUFFIX[kind]}").read_bytes()))
    elif kind == "nrrd":
        head = ("NRRD0004", "type: float", "dimension: 3", "sizes: 6 5 4", "encoding: raw", "endian: little",
                "space: left-posterior-superior", "space directions: (1,0,0) (0,1,0) (0,0,1)", "space origin: (0,0,0)", "", "")
        (folder / "seed").write_bytes("\n".join(head).encode() + array.T.tobytes())
    elif kind == "dicom":
        here = Path(pydicom.__file__).parent / "data" / "test_files"
        for name in ("MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "test-SR.dcm"):
            shutil.copy(here / name, folder / name)
    elif kind == "kspace":
        with h5py.File(folder / "seed", "w") as f:
            f["kspace"] = np.random.default_rng(0).random((2, 3, 12, 10)).astype(np.complex64)
        write_ismrmrd(folder / "ismrmrd")
    elif kind == "zip":
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as z:
            z.write(Path(pydicom.__file__).parent / "data" / "test_files" / "MR_small.dcm", "a.dcm")
        (folder / "seed").write_bytes(data.getvalue())
    elif kind == "metaimage":
        head = ("ObjectType = Image", "NDims = 3", "BinaryData = True", "BinaryDataByteOrderMSB = False", "CompressedData = False",
                "TransformMatrix = 1 0 0 0 1 0 0 0 1", "Offset = 0 0 0", "ElementSpacing = 1 1 1", "DimSize = 6 5 4",
                "ElementType = MET_FLOAT", "ElementDataFile = LOCAL", "")
        (folder / "seed").write_bytes("\n".join(head).encode() + array.T.tobytes())
    elif kind == "picture":
        for name in ("png", "jpeg"):
            PIL.Image.fromarray((array[:, :, 0] * 255).astype(np.uint8)).save(folder / name, name)
    else:
        here = Path(nibabel.__file__).parent / "tests" / "data"
        for name in {"par": ["phantom_EPI_asc_CLEAR_2_1.PAR"], "minc": ["tiny.mnc", "minc2_1_scale.mnc"]}[kind]:
            shutil.copy(here / name, folder / name)


def lay(kind: str, data: bytes, folder: Path) -> Path:
    """Write bytes as the file of a kind, compressed where its container is."""
    packed = SUFFIX[kind] in (".nii.gz", ".mgz") and data[:2] != b"\x1f\x8b"
    path = folder / f"in{SUFFIX[kind]}"
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    if kind == "par":
        path.with_suffix(".REC").write_bytes(bytes(range(256)) * 864)
    return path


def main() -> None:
    """Fuzz one reader until the time is up or something fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=list(SUFFIX))
    parser.add_argument("--seconds", type=int, default=1800)
    parser.add_argument("--corpus", type=Path, help="where inputs that reach new code are kept from run to run")
    args = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=["omnimri", "nibabel", "pydicom"]):
        import pydicom  # noqa: F401

        from omnimri.io import child, intake  # noqa: F401
        from omnimri.io.series import UnusableError
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    room = Path(tempfile.mkdtemp())
    corpus = args.corpus or room / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    seeds(args.kind, corpus)
    place = room / "work"

    def one(data: bytes) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        os.chdir(place)
        try:
            with (place / "arrays").open("w+b") as arrays:
                child.answer({"path": str(lay(args.kind, data, place)), "series": None}, arrays)
        except UnusableError as error:
            if not str(error).startswith("expected"):
                raise
        except MemoryError:
            pass

    child.limit(cpu_s=args.seconds + 3600)
    atheris.Setup([sys.argv[0], str(corpus), f"-max_total_time={args.seconds}", "-timeout=20", "-rss_limit_mb=6000", "-max_len=65536",
                   f"-artifact_prefix={CORPUS}/{args.kind}-"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
