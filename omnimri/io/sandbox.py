"""The decoding child, seen from its parent: files are decoded in a spawned process with limits, and arrays come back mapped.

A child reads one path and ends. It has no torch, no network of its own to ask, and a folder of its own that is removed
whatever happens. Its arrays lie in memory that both share (where the system has no such memory, in a file of that folder).
One may be started ahead (`warm`), so that its imports are paid before it is needed.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

TIME_S = 180.0
"""Longest a child may take."""
ROOM = "omnimri-in-"
"""Children's folders are named so, with their parent's process id after it."""
MAX_ANSWER_BYTES = 64 * 2**20
UNTOLD = "expected a file that can be decoded safely, got one on which the decoder {}; export it again, or choose one series"


def environment(room: Path) -> dict[str, str]:
    """What a child that decodes in a folder of its own may know of this process's environment; one thread."""
    kept = {k: os.environ[k] for k in ("PATH", "SYSTEMROOT", "LANG", "LD_LIBRARY_PATH") if k in os.environ}
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"), "1")
    return {**kept, **one_thread, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(room), "PYTHONDONTWRITEBYTECODE": "1"}


class Child:
    """A decoding process that waits for its one request."""

    def __init__(self) -> None:
        self.room = Path(tempfile.mkdtemp(prefix=f"{ROOM}{os.getpid()}-"))
        shared = (os.memfd_create("arrays"),) if hasattr(os, "memfd_create") else ()
        self.arrays = os.fdopen(shared[0], "r+b") if shared else (self.room / "arrays").open("w+b")
        # -P: nothing from the folder it runs in. Its messages may hold header text: they go nowhere.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "omnimri.io.child", *map(str, shared)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, cwd=self.room, env=environment(self.room), pass_fds=shared, start_new_session=True,
        )

    def ask(self, request: dict[str, Any], time_s: float) -> dict[str, Any]:
        """The answer to the one request.

        Raises:
            ValueError: the child refused, died, or took too long.
        """
        timer = threading.Timer(time_s, self.process.kill)
        timer.start()
        try:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            try:
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                self.process.stdin.close()
            except OSError:
                pass
            data = self.process.stdout.read(MAX_ANSWER_BYTES + 1)
            late = not timer.is_alive()
        finally:
            timer.cancel()
            self.process.kill()
            self.process.wait()
        try:
            answer = json.loads(data) if len(data) <= MAX_ANSWER_BYTES else None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ValueError(UNTOLD.format(f"took longer than {time_s:g} s" if late else "broke or ran out of its memory"))
        if "error" in answer:
            raise ValueError(str(answer["error"]))
        return answer

    def close(self) -> None:
        """End the process and remove its folder."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.arrays):
            if file is not None:
                file.close()
        shutil.rmtree(self.room, ignore_errors=True)


_lock = threading.Lock()
_idle: list[Child] = []


def warm(*, wait: bool = False) -> None:
    """Start a child ahead, unless one waits already.

    Args:
        wait: Until it has paid for its imports.
    """
    with _lock:
        if not _idle:
            _idle.append(Child())
        if wait:
            assert _idle[0].process.stdout is not None
            select.select([_idle[0].process.stdout], [], [])  # it says a line when it is ready


def tidy() -> None:
    """Remove folders that children of killed processes left; only where the system tells which processes live."""
    for room in Path(tempfile.gettempdir()).glob(f"{ROOM}*") if Path("/proc/self").exists() else ():
        parent = room.name.removeprefix(ROOM).split("-")[0]
        if parent.isdigit() and not Path("/proc", parent).exists():
            shutil.rmtree(room, ignore_errors=True)


def take() -> Child:
    """A child that waits for a request; a new one where none is warm."""
    with _lock:
        child = _idle.pop() if _idle else None
    if child is not None and child.process.poll() is None:
        return child
    if child is not None:
        child.close()
    return Child()


@atexit.register
def _close_idle() -> None:
    while _idle:
        _idle.pop().close()
