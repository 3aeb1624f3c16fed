"""From a run to a checkpoint to ship: what is calibrated, kept, fitted anew and written down."""

from __future__ import annotations

import json

import pytest
import torch

from omnimri.checkpoint import load_model
from stages.release import main


@pytest.fixture
def small(monkeypatch):
    """Few and small studies: what is chosen on them is no matter here."""
    monkeypatch.setattr("stages.release.SCOPE_SLICES", (4, 6))
    monkeypatch.setattr("stages.release.HEAD_SLICES", 4)
    monkeypatch.setattr("stages.sequence.EPOCHS", 2)


def test_a_release_calibrates_then_keeps_that_and_fits_the_head_of_sequences_alone(checkpoint, tmp_path, small, capsys):
    before, *_ = load_model(checkpoint)
    assert float(before.scope_limit) == 0
    assert main([str(checkpoint), "--out", str(tmp_path / "a"), "--count", "12", "--heads", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    first, *_ = load_model(tmp_path / "a")
    assert float(first.scope_limit) == pytest.approx(told["scope_limit"], rel=0.01) != 0
    assert first.config.lesion_rule["sure"] == 2.0  # from two heads no rule may come: no lesion is ever shown
    assert first.config.lesion_sensitivity == 0
    assert "Research use only" in (tmp_path / "a" / "README.md").read_text()
    weights = {k: v for k, v in before.state_dict().items() if not k.startswith("scope_")}
    assert all(torch.equal(first.state_dict()[k], v.to(torch.bfloat16).float()) for k, v in weights.items())

    assert main([str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--keep-calibration", "--profiles", "20"]) == 0
    second, *_ = load_model(tmp_path / "b")
    moved = {k for k, v in first.state_dict().items() if not torch.equal(v, second.state_dict()[k])}
    assert moved
    assert all(k.startswith("heads.sequence.") for k in moved)
    assert second.config.lesion_rule == first.config.lesion_rule
    provenance = json.loads((tmp_path / "b" / "provenance.json").read_text())
    assert provenance["sequence_head"]["studies"] == 20
    assert provenance["calibration"]["scope_limit"] == told["scope_limit"]
    assert provenance["calibration"]["sequence"]["studies"] == 10 != told["sequence"]["studies"]


def test_what_was_never_calibrated_cannot_keep_its_calibration(checkpoint, tmp_path, capsys):
    assert main([str(checkpoint), "--out", str(tmp_path / "a"), "--keep-calibration"]) == 2
    assert "leave --keep-calibration out" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_mean_is_of_both_weights(checkpoint, tmp_path, small, config, tokenizer, capsys):
    from omnimri.checkpoint import save_model
    from omnimri.digests import write_digests
    from omnimri.model.omnimri import OmniMRI

    torch.manual_seed(77)
    other = OmniMRI(config).eval()
    save_model(other, tokenizer, tmp_path / "other", provenance={"stage": "none"})
    write_digests(tmp_path / "other")
    size = ("--count", "2", "--heads", "0")
    assert main([str(checkpoint), "--mean-with", str(tmp_path / "other"), "--out", str(tmp_path / "mean"), *size]) == 0
    one, two, mean = (load_model(p)[0].state_dict()["heads.pixels.fine.weight"]
                      for p in (checkpoint, tmp_path / "other", tmp_path / "mean"))
    assert torch.allclose(mean, (one + two) / 2, atol=2e-3)
    assert not torch.allclose(mean, one, atol=2e-3)
