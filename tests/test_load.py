"""A server as a process of its own: sessions side by side, nothing that piles up, killed mid-answer, no word to another machine."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from . import load, watched


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    pytest.importorskip("gradio_client")
    made = load.Server(tmp_path_factory.mktemp("server"), checkpoint)
    yield made
    made.kill()
    assert not made.elsewhere.exists(), made.elsewhere.read_text()


def test_sessions_do_not_meet(server, tmp_path):
    found = load.many(server, 3, tmp_path, asks=("/detect", "/segment"))
    assert found["foreign"] == []
    assert found["answers"] == [2] * 3
    assert found["answers_that_speak_of_slices"] >= 1, "else nothing could have met"
    assert found["last_place"] >= 1, "who waits is told the place"
    before, after = found["memory_mib"]
    assert after < 1.2 * before


def test_what_is_foreign_is_seen():
    assert load.foreign("64 × 64 × 13 voxels, slice 3 of 13", 13) == []
    assert load.foreign("64 × 64 × 14 voxels, slice 3 of 15", 13) == ["14", "15"]


def test_uploads_do_not_pile_up(server, tmp_path):
    found = load.uploads(server, 20, tmp_path)
    memory, disk = found["memory_mib"], found["disk_mib"]
    assert max(memory[5:]) < 1.1 * memory[4] + 20
    assert max(disk) <= disk[0] + 0.05
    assert found["disk_after_forget_mib"] < 0.05


def test_a_cancelled_answer_frees_the_server(server, tmp_path):
    assert load.cancelled(server, load.study(tmp_path / "long.nii.gz", 228)) < 5


def test_a_killed_server_loses_no_decision(server, tmp_path):
    found = load.killed(server, load.study(tmp_path / "a.nii.gz", 0))
    assert "1 accepted" in found["report"]
    assert [row[2:] for row in found["audit"]] == [["state", "open", "accepted"]]
    assert found["answers"] == 1


def test_the_watch_sees_what_leaves_the_machine(tmp_path):
    code = f"""
import pathlib, socket
from tests.watched import watch
watch(pathlib.Path({str(tmp_path / "seen")!r}))
for host in ("127.0.0.1", "192.0.2.1"):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((host, 9))
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    # Without a way to it the connection fails; it was seen all the same.
    assert (tmp_path / "seen").read_text() == "socket.connect 192.0.2.1\n"
    assert watched.is_elsewhere("socket.getaddrinfo", ("example.org", 443, 0, 0, 0)) == "example.org"
    assert watched.is_elsewhere("socket.connect", (socket.socket(), ("::1", 80, 0, 0))) == ""
