"""Real scans beside simulated ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from data_recipes import Synthetic
from eval import realism
from eval.realism import Case, contrasts, markdown, measure_realism, simulate
from omnimri import Assistant
from omnimri.volume import Study


def test_contrasts_are_ratios_to_white_matter_from_the_background():
    labels = np.repeat([0, 2, 41, 3, 4], 60)
    image = np.repeat([10.0, 110.0, 110.0, 80.0, 20.0], 60)
    image[60:75], image[75:90] = 90.0, 130.0  # a quarter of white matter in all on either side
    image[90:105] = 130.0
    told = contrasts(image, labels)
    assert told["grey/white"] == pytest.approx(0.7)
    assert told["fluid/white"] == pytest.approx(0.1)
    assert told["white spread"] == pytest.approx(0.05, abs=0.051)
    assert contrasts(3 * image + 5, labels) == pytest.approx(told)
    assert contrasts(image[:240], labels[:240]) == {}  # no ventricle


def test_the_table_says_what_is_outside_and_what_a_scan_is_taken_for(maps, checkpoint, scan, monkeypatch):
    monkeypatch.setattr(realism, "TRAINING_MAPS", (1,))
    monkeypatch.setattr(realism, "Synthetic", lambda *a, **k: Synthetic(*a, **k | {"image_size": 96}))
    monkeypatch.setattr(realism, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    ranges = simulate(maps, range(40))
    named = [s for s, found in ranges.items() if len(found["grey/white"]) >= 3]
    assert len(named) >= 3
    middle = np.median(ranges["T1w"]["grey/white"])
    labels = np.zeros(scan.shape, dtype=np.int64)
    labels[:, :, 1:4], labels[:, :, 4:6], labels[:, :, 6:8] = 2, 3, 4
    for name, factor in (("in", 1.0), ("out", 40.0)):
        voxels = scan.voxels.clone() * 0
        voxels[0, :, :, 1:4], voxels[0, :, :, 4:6], voxels[0, :, :, 6:8] = 1.0, float(middle) * factor, 0.2
        case = Case(name, "T1w", Study((replace(scan, voxels=voxels),)), labels)
        monkeypatch.setattr(realism, "real_scans", lambda _, case=case: [case])
        results = measure_realism(Assistant(checkpoint), maps, (), count=40)
        told = results["scans"][name]
        assert told["grey/white"]["inside"] == (name == "in")
        assert results["inside"].endswith("of 3")
        assert results["named right"] == f"{int(told['likeliest'] == 'T1w')} of 1"
        assert ("OUTSIDE" in markdown(results).split("| T1w |")[1].split("(")[1]) == (name == "out")
