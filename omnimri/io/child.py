"""python -m omnimri.io.child [FD]: decode one path under limits, answer with JSON, arrays into open file FD. Never imports torch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, BinaryIO

MEMORY_BYTES = 8 * 2**30
CPU_S = 170
OUTPUT_BYTES = 5 * 2**30


def limit(cpu_s: int = CPU_S) -> None:
    """Bound memory, processor time, file size and core dumps, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        for kind, value in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_FSIZE, OUTPUT_BYTES),
                            (resource.RLIMIT_CORE, 0)):
            _, hard = resource.getrlimit(kind)
            resource.setrlimit(kind, (value, value) if hard < 0 or hard >= value else (hard, hard))


def answer(request: dict[str, Any], arrays: BinaryIO) -> dict[str, Any]:
    """Decode what a request asks for.

    Args:
        request: `path`; `series`, names to decode (None: whatever is a plain image of the first patient); `kspace`, how to read it.
        arrays: The file that arrays lie in, one after the other; the answer tells where each begins, its shape, order and type.
    """
    import numpy as np

    from .intake import read
    from .series import UnusableError, check_voxels, decoding
    from .study import choose

    def put(array: np.ndarray) -> dict[str, Any]:
        """Write an array, which is faster here than filling mapped memory; where the parent finds it."""
        order = "F" if array.flags.f_contiguous else "C"
        start = arrays.seek(-(-arrays.tell() // 64) * 64)
        arrays.write(np.ascontiguousarray(array.T if order == "F" else array).data.cast("B"))
        return {"offset": start, "shape": array.shape, "order": order, "type": array.dtype.name}

    room = Path.cwd() / "unpacked"
    room.mkdir()
    found = read(Path(request["path"]), room, request.get("kspace"))
    told: dict[str, Any] = {"series": [], "passed_over": found.passed_over, "kspace": None}
    if found.kspace is not None:
        told["kspace"] = {k: put(v) if isinstance(v, np.ndarray) and k != "affine" else v for k, v in found.kspace.items()}
        told["kspace"]["affine"] = found.kspace["affine"].tolist()
    wanted, reasons = choose(found.series, request.get("series"))
    for k, series in enumerate(found.series):
        row: dict[str, Any] = {
            "name": series.name, "shape": series.shape, "affine": series.affine.tolist(), "format": series.format, "kind": series.kind,
            "variant": series.variant, "sequence": series.sequence, "parameters": series.parameters, "source": series.source,
            "oriented": series.oriented, "patient": series.patient, "frame": series.frame, "warnings": list(series.warnings),
            "why": reasons[k], "voxels": None,
        }
        if series in wanted:
            try:
                with decoding(f"a readable {series.format} series"):
                    voxels, more = check_voxels(series.decode().reshape(series.shape, order="F"))
                row |= {"voxels": put(voxels), "warnings": [*series.warnings, *more]}
            except UnusableError as error:
                row["why"] = f"not used: {error}"
                if len(found.series) == 1:
                    raise
        told["series"].append(row)
    if found.series and found.kspace is None and not any(r["voxels"] for r in told["series"]):
        raise UnusableError(next((r["why"].removeprefix("not used: ") for r in told["series"] if r["why"].startswith("not used: expected")),
                            "expected an MR image, got series of which none can be used"))
    return told


def main() -> None:
    """Answer the one request on standard input."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("ignore")
    # Paid before the request comes: these are what most files need.
    import logging

    import nibabel  # noqa: F401
    import numpy  # noqa: F401
    import pydicom  # noqa: F401

    from . import intake  # noqa: F401
    from .series import UnusableError

    logging.disable(logging.CRITICAL)
    limit()
    out.write(b"\n")  # ready
    out.flush()
    line = sys.stdin.buffer.readline()
    if not line:
        return
    try:
        with open(int(sys.argv[1]) if len(sys.argv) > 1 else "arrays", "r+b") as arrays:
            said = answer(json.loads(line), arrays)
    except UnusableError as error:
        said = {"error": str(error)}
    except MemoryError:
        said = {"error": "expected a study that fits into the reader's memory, got a larger one; choose one series"}
    except Exception as error:  # whatever a decoder raises: its kind may be told, its text may hold the header's
        said = {"error": f"expected a readable study, got damaged or unsupported data ({type(error).__name__}); export it again"}
    out.write(json.dumps(said).encode())
    out.close()
    # No clean-up code of any decoder runs after hostile bytes.
    os._exit(0)


if __name__ == "__main__":
    main()
