"""Many browsers at once on a server of their own, and what it does with cancelled, killed and repeated work.

`python -m tests.load --sessions 20 --uploads 200 [--checkpoint DIR]` prints the figures; the tests run the same with small numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from data_recipes import Phantom
from data_recipes.phantom import record_volume
from omnimri.conversation import Message
from omnimri.io.nifti import write_nifti


class Server:
    """`tests.watched`, which is the chat server with the connections it makes written down, as a process of its own."""

    def __init__(self, room: Path, checkpoint: Path | None = None) -> None:
        self.room = room
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url, self.elsewhere = f"http://127.0.0.1:{self.port}", room / "elsewhere"
        self.command = [sys.executable, "-W", "ignore", "-m", "tests.watched", "--port", str(self.port)]
        self.command += ["--checkpoint", str(checkpoint)] if checkpoint else []
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        env = os.environ | {
            "OMNIMRI_STATE": str(self.room / "state"),
            "GRADIO_TEMP_DIR": str(self.room / "gradio"),
            "WATCHED": str(self.elsewhere),
        }
        self.log = (self.room / "log").open("a")
        self.process = subprocess.Popen(self.command, env=env, stdout=self.log, stderr=self.log)
        for _ in range(1200):
            try:
                self.health()
                return
            except OSError:
                assert self.process.poll() is None, (self.room / "log").read_text()[-2000:]
                time.sleep(0.1)
        raise AssertionError("the server does not answer")

    def health(self) -> dict[str, Any]:
        """What the monitor's page says."""
        with urlopen(f"{self.url}/omnimri/health") as r:
            return json.loads(r.read())

    def wait(self, *, answering: bool, seconds: float = 120) -> None:
        """Until a question is being answered, or none is."""
        end = time.monotonic() + seconds
        while self.health()["answering"] != answering:
            assert time.monotonic() < end, "the server does not begin, or does not end, to answer"
            time.sleep(0.02)

    def kill(self) -> None:
        """As a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def memory_mib(self) -> float:
        """Resident memory of the server and its children."""
        main = psutil.Process(self.process.pid)
        return sum(p.memory_info().rss for p in (main, *main.children(recursive=True))) / 2**20

    def disk_mib(self) -> float:
        """What lies in the server's folders."""
        return sum(p.stat().st_size for n in ("state", "gradio") for p in (self.room / n).rglob("*") if p.is_file()) / 2**20

    def client(self, key: str | None = None) -> Any:
        """A client with a browser's cookie."""
        from gradio_client import Client

        return Client(self.url, verbose=False, headers={"Cookie": f"omnimri={key or secrets.token_hex(16)}"})


def study(path: Path, number: int, size: int = 64) -> Path:
    """A phantom's head; its number of slices is its marker. The first is the tests' `scan`: their untrained model finds lesions in it."""
    volume = record_volume(Phantom(image_size=size, num_slices=12 + number, kspace_size=0).record(3, 5 + number))
    write_nifti(path, volume.voxels[0] * 700, volume.affine)
    return path


def foreign(told: str, slices: int) -> list[str]:
    """Where a text speaks of a study with another number of slices."""
    return [n for n in spoken_of(told) if int(n) != slices]


def spoken_of(told: str) -> list[str]:
    """The numbers of slices that a text speaks of, in overviews and in answers."""
    return re.findall(r"\d+ × \d+ × (\d+) voxels", told) + re.findall(r"slice \d+ of (\d+)", told)


ASKS = ("/report", "/detect", "/segment")


def one_browser(server: Server, path: Path, slices: int, begin: threading.Barrier, asks: Sequence[str] = ASKS) -> dict[str, Any]:
    """Open, ask, read the state again, forget."""
    from gradio_client import handle_file

    client, told, places = server.client(), [], []
    begin.wait()
    told.append(client.predict(handle_file(str(path)), api_name="/open"))
    for api in asks:
        job = client.submit(api_name=api)
        while not job.done():
            rank = job.status().rank
            if rank is not None:
                places.append(rank + 1)
            time.sleep(0.1)
        told.append(job.result())
    told.append(client.predict(api_name="/state"))
    text = json.dumps(told, ensure_ascii=False)
    assert f"× {slices} voxels" in text
    state = told[-1]
    client.predict(api_name="/forget")
    return {
        "foreign": foreign(text, slices),
        "spoken": len(spoken_of(json.dumps(state[1]))),
        "answers": len(state[1]) // 2,
        "place": max(places, default=0),
    }


def many(server: Server, sessions: int, room: Path, asks: Sequence[str] = ASKS) -> dict[str, Any]:
    """Browsers with different studies at once."""
    paths = [study(room / f"{k}.nii.gz", k) for k in range(sessions)]
    one_browser(server, paths[0], 12, threading.Barrier(1), asks)
    before = server.memory_mib()
    begin = threading.Barrier(sessions)
    with ThreadPoolExecutor(sessions) as pool:
        found = list(pool.map(lambda k: one_browser(server, paths[k], 12 + k, begin, asks), range(sessions)))
    time.sleep(1)
    return {
        "sessions": sessions,
        "foreign": [n for f in found for n in f["foreign"]],
        "answers": [f["answers"] for f in found],
        "answers_that_speak_of_slices": sum(f["spoken"] > 0 for f in found),
        "last_place": max(f["place"] for f in found),
        "memory_mib": [round(before), round(server.memory_mib())],
    }


def uploads(server: Server, number: int, room: Path) -> dict[str, Any]:
    """One browser that opens study after study."""
    from gradio_client import handle_file

    client, path = server.client(), study(room / "again.nii.gz", 3)
    memory, disk = [], []
    for k in range(number):
        client.predict(handle_file(str(path)), api_name="/open")
        if k % max(1, number // 10) == max(1, number // 10) - 1:
            memory.append(round(server.memory_mib()))
            disk.append(round(server.disk_mib(), 2))
    client.predict(api_name="/forget")
    return {"uploads": number, "memory_mib": memory, "disk_mib": disk, "disk_after_forget_mib": round(server.disk_mib(), 2)}


def cancelled(server: Server, path: Path) -> float:
    """Seconds from a cancelled answer until the server is free, the look at the study being under way."""
    from gradio_client import handle_file

    client = server.client()
    client.predict(handle_file(str(path)), api_name="/open")
    job = client.submit(api_name="/segment")
    server.wait(answering=True)
    time.sleep(0.7)
    assert server.health()["answering"], "over before it could be cancelled: take a larger study"
    job.cancel()
    tick = time.perf_counter()
    server.wait(answering=False)
    seconds = time.perf_counter() - tick
    client.predict(api_name="/forget")
    return round(seconds, 2)


def killed(server: Server, path: Path, key: str = "0123456789abcdef" * 2) -> dict[str, Any]:
    """Accept a finding, ask again, kill the server mid-answer, start it: what is left of the decision."""
    from gradio_client import handle_file

    client = server.client(key)
    client.predict(handle_file(str(path)), api_name="/open")
    number = client.predict(api_name="/detect")[3]["value"]
    client.predict(number, api_name="/accepted")
    client.submit(api_name="/report")
    server.wait(answering=True)
    server.kill()
    server.start()
    state = server.client(key).predict(api_name="/state")
    audit = state[6]
    server.client(key).predict(api_name="/forget")
    return {"report": state[5], "audit": audit["data"] if isinstance(audit, dict) else audit, "answers": len(state[1]) // 2}


def first_word(server: Server, checkpoint: Path | None, path: Path, question: str, times: int = 7) -> dict[str, float]:
    """Milliseconds to the first text of a follow-up on a study that was looked at: by the library alone, and through the page."""
    from gradio_client import handle_file

    from omnimri import Assistant, open_study

    assistant, opened = Assistant(checkpoint), open_study(path)
    first = assistant.answer(opened, question)
    history = [Message("user", question), Message("assistant", first.raw)]
    client = server.client()
    client.predict(handle_file(str(path)), api_name="/open")
    client.predict(question, api_name="/ask")
    alone, paged = [], []

    for _ in range(times):
        tick = time.perf_counter()

        def hear(text: str, tick: float = tick) -> bool:
            if text and len(alone) < len(paged) + 1:
                alone.append(time.perf_counter() - tick)
            return True

        # As on the page, the conversation grows.
        answer = assistant.answer(opened, question, history=history, on_text=hear)
        history += [Message("user", question), Message("assistant", answer.raw)]
        tick = time.perf_counter()
        job = client.submit(question, api_name="/ask")
        for out in job:
            chat = out[1]
            if isinstance(chat, list) and chat and "Looking at the study" not in json.dumps(chat[-1]):
                paged.append(time.perf_counter() - tick)
                break
        job.result()
    client.predict(api_name="/forget")
    ms = [round(1000 * statistics.median(x)) for x in (alone, paged)]
    return {"library_ms": ms[0], "page_ms": ms[1], "added_ms": ms[1] - ms[0]}


def main() -> None:
    """Print every figure as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--uploads", type=int, default=200)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--scan", type=Path, help="a scan large enough to be cancelled in (default: the MNI152 template)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        scan = args.scan
        if scan is None:
            from nilearn.datasets import load_mni152_template

            scan = room / "template.nii.gz"
            load_mni152_template(resolution=1).to_filename(scan)
        server = Server(room, args.checkpoint)
        try:
            print(json.dumps(many(server, args.sessions, room)), flush=True)
            print(json.dumps(uploads(server, args.uploads, room)), flush=True)
            print(json.dumps({"cancelled_s": [cancelled(server, scan) for _ in range(3)]}), flush=True)
            print(json.dumps(first_word(server, args.checkpoint, scan, "What sequence and plane is this?")), flush=True)
            print(json.dumps({"elsewhere": server.elsewhere.read_text() if server.elsewhere.exists() else ""}), flush=True)
        finally:
            server.kill()


if __name__ == "__main__":
    main()
