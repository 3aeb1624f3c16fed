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
    labels = np.repeat([0, 2, 41, 3, 4], 12)[None, None].repeat(40, 1)  # (1, 40, 60)
    image = np.vectorize({0: 10.0, 2: 110.0, 41: 110.0, 3: 80.0, 4: 20.0}.get)(labels)
    image[:, :13, 13:35], image[:, 27:, 13:35] = 90.0, 130.0
    image[..., [12, 35, 36, 47, 48, 59]] = 500.0  # what lies at a border is mixed
    none = np.zeros(labels.shape, dtype=bool)
    told = contrasts(image, labels, none)
    assert told == pytest.approx({"grey/white": 0.7, "fluid/white": 0.1, "white spread": 0.4})
    assert contrasts(3 * image + 5, labels, none) == pytest.approx(told)
    ill = none.copy()
    ill[:, 12:, 36:48] = True
    image[:, 7:, 37:47] = 400.0  # a lesion and what is beside it
    assert contrasts(image, labels, ill) == pytest.approx(told)
    assert contrasts(image, labels, none)["grey/white"] == pytest.approx(3.9)
    assert contrasts(image[..., :48], labels[..., :48], none[..., :48]) == {}  # no ventricle


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
