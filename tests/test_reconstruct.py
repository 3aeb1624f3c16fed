"""Reconstruction against peers: the simulator, the peers that are the project's own, and the table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from eval import reconstruct
from eval.metrics.reconstruction import psnr_db
from omnimri.physics import cg_sense, fft2c, ifft2c, sense_adjoint, sense_normal


def head(height=64, width=48):
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(height, width)), 3)
    return np.where((x / 0.7) ** 2 + (y / 0.8) ** 2 < 1, 1 + 4 * noise, 0).clip(0).astype(np.float32)


def test_coils_are_smooth_and_together_one():
    coils = reconstruct.loop_coils(8, 64, 48, np.random.default_rng(0))
    assert np.allclose((np.abs(coils) ** 2).sum(0), 1, atol=1e-4)
    assert np.abs(np.diff(coils, axis=1))[:, (head() > 0)[1:]].max() < 0.3  # wires run through the corners of the image
    assert np.abs(coils).mean((1, 2)).std() < 0.1
    strongest = np.abs(coils).argmax(0)
    assert len(np.unique(strongest)) == 8


@pytest.mark.parametrize("acceleration", reconstruct.ACCELERATIONS)
def test_masks_have_as_many_lines_as_they_say(acceleration):
    mask = reconstruct.line_mask(196, acceleration, np.random.default_rng(0))
    assert mask.sum() == round(196 / acceleration)
    assert reconstruct._centre_lines(mask) >= round(196 * reconstruct.CENTRE[acceleration])


def test_the_adjoint_is_one_and_conjugate_gradients_solve_what_is_sampled_enough():
    rng = np.random.default_rng(1)
    a = reconstruct.acquire(head(), coils=8, acceleration=2, noise=0.0, seed=0)
    coils = torch.from_numpy(reconstruct.loop_coils(8, 64, 48, np.random.default_rng(0)))[None]
    x, y = (torch.from_numpy((rng.normal(size=s) + 1j * rng.normal(size=s)).astype(np.complex64)) for s in ((1, 64, 48), (1, 8, 64, 48)))
    mask = a.mask[None].float()
    measured = fft2c(x[:, None] * coils) * mask[:, None]
    assert complex((measured.conj() * y).sum()) == pytest.approx(complex((x.conj() * sense_adjoint(y, mask, coils)).sum()), rel=1e-3)
    assert torch.allclose(sense_normal(x, torch.ones(1, 1, 48), coils), x, atol=1e-4)
    assert torch.allclose(ifft2c(fft2c(x)), x, atol=1e-5)
    found = cg_sense(measured, mask, coils, weight=0.0, iterations=100)
    assert float((found - x).norm()) < 0.05 * float(x.norm())
    assert float((sense_normal(found, mask, coils) - sense_adjoint(measured, mask, coils)).norm()) < 1e-2 * float(x.norm())


def test_noise_is_as_large_as_it_says():
    quiet, loud = (reconstruct.acquire(head(), coils=4, acceleration=2, noise=n, seed=0) for n in (0.0, 0.04))
    off = ifft2c(loud.kspace - quiet.kspace)
    assert float(off.abs().square().mean().sqrt()) == pytest.approx(0.04 * 0.5**0.5, rel=0.1)  # half of the lines


def test_peers_beat_zero_filling():
    a = reconstruct.acquire(head(), coils=8, acceleration=4, noise=0.005, seed=0)
    score = lambda image: psnr_db(reconstruct.scaled(image, a.truth), a.truth)  # noqa: E731
    zero = score(reconstruct._zero_filled(a, 0))
    assert score(reconstruct._cg_sense(a, 0.01)) > zero + 1


def test_cfl_returns(tmp_path):
    array = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.complex64)
    reconstruct.write_cfl(tmp_path / "a", array)
    assert np.array_equal(reconstruct.read_cfl(tmp_path / "a"), array)


def test_the_table_has_a_row_for_every_method():
    rows = [
        {
            "method": m,
            "case": c,
            "patient": c,
            "group": "individual",
            "coils": 8,
            "noise": "moderate",
            "acceleration": 4,
            "psnr_db": 30.0,
            "ssim": 0.9,
            "nmse": 0.1,
            "high_frequency_error": 0.2,
            "seconds": 1.0,
            "first_seconds": 0.25,
        }
        for m in ("OmniMRI", "zero-filled")
        for c in ("a", "b")
    ]
    rows[0]["psnr_db"] = rows[1]["psnr_db"] = 32.0
    rows[1]["seconds"] = rows[0]["seconds"] = 0.1
    told = {"group": "individual", "coils": 8, "noise": "moderate", "acceleration": 4}
    figures = {"network_residual": 1.2, "residual_over_added": 1.05, "spread_over_error": 1.5, "rank_correlation": 0.7}
    explained = [told | figures | {"case": c, "residual": r} for c, r in (("a", 0.9), ("b", 1.1))]
    weights = {"zero-filled, 8 coils, moderate noise, 4x": 0.01}
    text = reconstruct.markdown({"rows": rows, "weights": weights, "explained": explained})
    assert "| 4x | OmniMRI | 32 [32, 32] |" in text
    assert "| individual | 8 | moderate | 4x | 32.00 | zero-filled 30.00 | +2.00 |" in text
    assert "| 0.10 | 0 of 2 |" in text
    assert "| individual | 8 | moderate | 4x | 1.20 | 1.00 | 1.10 | 1.05 | 1.50 | 0.70 |" in text
    assert "zero-filled 4x 0.01" in text
    assert "| 4x | zero-filled |" in text
    assert "takes OmniMRI 0.25 s" in text
    assert "Research use only" in text
