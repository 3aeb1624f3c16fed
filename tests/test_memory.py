"""What is kept of freed memory."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from omnimri.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(10 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_freed_tensor_of_40_mb_is_not_cleared_again_and_again():
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "given back")
    )
    assert kept < 0.1 * given_back


HELD = """
from pathlib import Path
from omnimri.memory import give_back_memory, keep_freed_memory
keep_freed_memory()
import torch
def held_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
before = held_mb()
some = [torch.ones(1 << 20) for _ in range(60)]
last = torch.ones(1 << 20)  # at the top of the heap, so that what lies below it stays
del some
kept = held_mb() - before
give_back_memory()
print(kept, held_mb() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_what_is_kept_is_given_back_between_looks():
    told = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True).stdout
    kept, left = map(float, told.split())
    assert kept > 200
    assert left < 50
