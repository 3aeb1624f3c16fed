"""What frozen encoders know."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eval import probe
from eval.probe import encoders_of, markdown, mean_dice, measure, patch_features, shares
from omnimri.anatomy import NAMES
from omnimri.io.nifti import write_nifti
from omnimri.measure import STEM_OF_CLASS, STEMS

LEFT, RIGHT = (1 + NAMES.index(f"{side} thalamus") for side in ("left", "right"))


class Brightness(nn.Module):
    """An encoder whose features are a patch's mean brightness and its square, after a prefix of two tokens."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=patch)

    def forward(self, images):
        mean = F.avg_pool2d(images[:, :1], self.config.patch_size).flatten(2).transpose(1, 2)
        tokens = torch.cat([mean, mean**2], -1)
        return SimpleNamespace(last_hidden_state=torch.cat([torch.full((len(images), 2, 2), 9.0), tokens], 1))


@pytest.mark.parametrize(("patch", "grid"), [(16, 4), (14, 5)])
def test_features_lie_where_their_patches_do(patch, grid):
    images = torch.linspace(0, 1, 64)[:, None].expand(2, 3, 64, 64)
    found = patch_features(Brightness(patch), images)
    assert found.shape == (2, grid, grid, 2)
    assert bool((found[:, 1:, :, 0] > found[:, :-1, :, 0]).all())
    assert torch.allclose(found[:, :, :1], found[:, :, -1:], atol=1e-6)


def test_sides_are_one_and_shares_add_up():
    classes = torch.zeros(1, 32, 32, dtype=torch.uint8)
    classes[:, :16, :8], classes[:, :16, 8:16] = LEFT, RIGHT
    told = shares(classes, 2)
    assert told.shape == (1, 2, 2, len(STEMS) + 1)
    assert told.sum(-1).flatten().tolist() == [1.0] * 4
    assert float(told[0, 0, 0, STEM_OF_CLASS[LEFT]]) == 1.0
    said = STEM_OF_CLASS[classes[:, ::2, ::2].long()]
    assert mean_dice(said, classes) == 1.0
    said[:, :4] = 0
    assert mean_dice(said, classes) == pytest.approx(2 / 3)
    assert math.isnan(mean_dice(said, torch.zeros_like(classes)))


def test_a_probe_of_what_tells_tissues_apart_beats_one_of_noise(maps, checkpoint, scan, monkeypatch):
    from eval.realism import Case
    from omnimri import Assistant
    from omnimri.volume import Study

    monkeypatch.setattr(probe, "TRAINING_MAPS", (1,))
    monkeypatch.setattr(probe, "CHOOSING_MAPS", (1,))
    labels = torch.full(scan.shape, 2).numpy()
    study = Study((scan,))
    monkeypatch.setattr(probe, "real_scans", lambda _: [Case("scan", "T1w", study, labels), Case("unlabelled", "T1w", study, None)])
    blind = Brightness(16)
    blind.forward = lambda images: SimpleNamespace(last_hidden_state=torch.zeros(len(images), 16, 2))
    monkeypatch.setattr(probe, "encoders_of", lambda *_: {"sees": Brightness(16), "blind": blind})
    results = measure(Assistant(checkpoint), maps, (), (), count=12)
    sees, none = results["encoders"]["sees"], results["encoders"]["blind"]
    assert sees["all"]["value"] > none["all"]["value"] + 0.02
    assert set(sees["scans, few"]) == {"scan"}
    assert results["asked"] == 4
    assert sees["all"]["value"] < results["true shares"][16]["value"] <= 1
    assert f"| sees | 0.0 M | 16 | 1.0 | {sees['all']['value']:.3f}" in markdown(results)


def test_random_weights_stand_beside_every_encoder(checkpoint, tmp_path):
    from omnimri import Assistant

    made = Assistant(checkpoint)
    made.model.vision.backbone.save_pretrained(tmp_path / "other")
    found = encoders_of(made, [tmp_path / "other"])
    assert len(found) == 5
    own, other, random = found[made.name], found["other"], found["random weights of the form of other"]
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(other.parameters(), random.parameters(), strict=True))
    pixels = found[f"{made.name}, pixel decoder"]
    images = torch.rand(3, 3, 64, 64)
    alone = torch.cat([patch_features(pixels, image[None]) for image in images])
    assert torch.allclose(patch_features(pixels, images), alone, atol=1e-4)
    write_nifti(tmp_path / "scan.nii", torch.zeros(2, 2, 2), torch.eye(4))
    with pytest.raises(ValueError, match="fetch vision"):
        encoders_of(made, [tmp_path / "scan.nii"])
