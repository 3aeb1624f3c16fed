"""Store: sessions on disk, each under a key that only its browser holds; bounded, and gone when forgotten or too old."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections import OrderedDict
from pathlib import Path

from omnimri.assistant import Assistant

from .session import Session

KEY = re.compile("[0-9a-f]{32}")
"""The form of a session's key."""
LOADED, LOADED_BYTES = 6, 4 * 2**30
"""Studies held in memory, and their voxels' bytes; others are read again from disk when they are used."""
MOST_SESSIONS = 64
MOST_BYTES = 16 * 2**30
"""Of all sessions on disk; the one unused for longest goes first."""
KEPT_HOURS = 24.0
ROOM = (
    "The server keeps each study for {hours:g} hours after its last use, and at most {most} studies and {gib:g} GiB; "
    "older ones are forgotten."
)
SWEEP_S = 600
"""How often an idle server looks for what is too old."""


def state_folder() -> Path:
    """Where sessions live: `OMNIMRI_STATE`, else the user's state folder."""
    given = os.environ.get("OMNIMRI_STATE")
    return Path(given) if given else Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "omnimri"


def size_of(folder: Path) -> int:
    """Bytes of the files under a folder; one that goes meanwhile does not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


class Store:
    """All sessions of a server. Thread-safe."""

    def __init__(self, assistant: Assistant, folder: Path | None = None, *, kept_hours: float = KEPT_HOURS) -> None:
        self.assistant, self.kept_hours = assistant, kept_hours
        self.folder = folder or state_folder() / "sessions"
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._held: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.RLock()
        threading.Thread(target=self._sweep_now_and_then, daemon=True).start()

    def of(self, key: str) -> Session:
        """The session of a key: in memory, on disk, or new.

        Raises:
            ValueError: the key is not one of this server's form.
        """
        if not (isinstance(key, str) and KEY.fullmatch(key)):
            raise ValueError("expected a session key, got something else; reload the page")
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        with self._lock:
            self.sweep(keep=name)
            session = self._held.pop(name, None)
            if session is None:
                session = Session(self.assistant, self.folder / name)
            self._held[name] = session
            session.touch()
            self._unload_some(keep=name)
            return session

    def _sweep_now_and_then(self) -> None:
        while True:
            time.sleep(SWEEP_S)
            with contextlib.suppress(OSError):
                self.sweep()

    def _unload_some(self, keep: str) -> None:
        """Leave as many studies in memory as may be; one that is in use stays. The session itself is kept: there is one for a folder."""
        loaded = {name: session.voxel_bytes() for name, session in self._held.items()
                  if session.study is not None or name == keep}
        for name in [n for n in loaded if n != keep]:
            if len(loaded) <= LOADED and sum(loaded.values()) <= LOADED_BYTES:
                break
            session = self._held[name]
            if not session.users and session.busy.acquire(blocking=False):
                try:
                    session.unload()
                    del loaded[name]
                finally:
                    session.busy.release()

    def sweep(self, keep: str = "") -> None:
        """Remove what is too old or too much; a study that is in use stays."""
        with self._lock:
            self._sweep(keep)

    def _sweep(self, keep: str) -> None:
        now = time.time()
        found = sorted((p for p in self.folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
        sizes = {p: size_of(p) for p in found}
        total = sum(sizes.values())
        for k, path in enumerate(found):
            old = now - path.stat().st_mtime > self.kept_hours * 3600
            if path.name != keep and (old or len(found) - k > MOST_SESSIONS or total > MOST_BYTES):
                held = self._held.get(path.name)
                if held is not None and (held.users or not held.busy.acquire(blocking=False)):
                    continue
                total -= sizes[path]
                self._held.pop(path.name, None)
                try:
                    (held or Session(self.assistant, path)).close()
                finally:
                    if held is not None:
                        held.busy.release()

    def find(self, token: str) -> Path | None:
        """The file that a session hands out under a token."""
        with self._lock:
            return next((path for session in self._held.values() if (path := session.handed_out.find(token)) is not None), None)

    def health(self) -> dict[str, int | bool]:
        """Numbers for a monitor; nothing of any study."""
        with self._lock:
            on_disk = sum(p.is_dir() for p in self.folder.iterdir())
            return {"answering": self.assistant.answering, "sessions_in_memory": len(self._held), "sessions_on_disk": on_disk}
