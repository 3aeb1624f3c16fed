"""Reconstruction with the embedded model: what is planted is found, what is not is not, data are explained, errors are foretold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_recipes import Phantom
from eval.reconstruct import acquire
from omnimri.assistant import NO_RAW_DATA, Assistant
from omnimri.physics import fft2c
from omnimri.reconstruction import asks_to_reconstruct, explain, noise_of, reconstruct
from omnimri.volume import KSpace, Study

NOISE = 0.01


@pytest.fixture(scope="module")
def assistant():
    return Assistant()


@pytest.fixture(scope="module")
def images():
    """Six slices without lesions, (160, 144)."""
    source = Phantom(image_size=160, num_slices=3, kspace_size=160)
    found = [source.record(5, i).kspace["image"].numpy()[:, 8:152] for i in range(6)]
    return [f / f.max() for f in found]


def kspace_of(images, acceleration=4, coils=8, noise=NOISE):
    """Acquisitions with one mask and one set of coils, and what they are of."""
    made = [acquire(i, coils=coils, acceleration=acceleration, noise=noise, seed=7) for i in images]
    return KSpace(torch.stack([a.kspace for a in made]), made[0].mask, torch.eye(4, dtype=torch.float64)), np.stack([a.truth for a in made])


def slices(volume):
    return volume.voxels[0].permute(2, 1, 0).numpy()


@pytest.mark.parametrize("acceleration", [2, 4, 8])
def test_better_than_zero_filling_and_true_to_the_data(assistant, images, acceleration):
    kspace, truth = kspace_of(images, acceleration)
    found = assistant.reconstruct(kspace)
    error = np.square(slices(found.image) - truth).mean()
    assert error < (0.8 if acceleration == 8 else 0.5) * np.square(slices(found.zero_filled) - truth).mean()
    assert found.noise == pytest.approx(NOISE, rel=0.3)
    assert min(found.residuals) > 0.7
    assert max(found.residuals) < 1.01
    assert found.warnings == ()


def test_planted_lesions_are_there_and_no_others(assistant, images):
    """Fifty small bright spots, one at a time, against the same acquisition without it."""
    image = images[0] * 0.7
    inside = np.argwhere((image > 0.15) & (image < 0.5))
    spots = inside[np.random.default_rng(0).choice(len(inside), 50, replace=False)]
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    masks = [(y - r) ** 2 + (x - c) ** 2 <= 2.5**2 for r, c in spots]
    # The largest value stays, so that all are scaled alike.
    spotted = [image, *(np.where(m, 0.9, image) for m in masks)]
    kspace, truth = kspace_of([np.where(image == image.max(), 1.0, s) for s in spotted])
    said = slices(assistant.reconstruct(kspace).image)
    plain = said[0]
    for mask, with_spot, made in zip(masks, truth[1:], said[1:], strict=True):
        meant = (with_spot - truth[0])[mask].mean()
        assert (made - plain)[mask].mean() > 0.6 * meant
        assert abs((plain - truth[0])[mask].mean()) < 0.35 * meant


def test_what_was_smoothed_away_comes_back_until_the_noise_is_reached(assistant, images):
    kspace, truth = kspace_of(images[:2], noise=0.002)
    data, mask = kspace.data, kspace.mask.expand(2, *kspace.mask.shape)
    with torch.inference_mode():
        exact = assistant.model.heads["reconstruct"](data, mask, None)
        # A network that smooths a little too much.
        blurred = replace(exact, image=0.9 * exact.image + 0.05 * (exact.image.roll(1, 1) + exact.image.roll(-1, 1)))
        level = explain(blurred, data, mask, torch.ones(2))[1] / 1.2
        image, before, left = explain(blurred, data, mask, level)
    error = lambda x: np.square(x.abs().numpy() - truth).mean()  # noqa: E731
    assert before.tolist() == pytest.approx([1.2, 1.2])
    assert float(left.max()) < 1.1
    assert error(image) < error(blurred.image)
    assert torch.equal(explain(blurred, data, mask, torch.ones(2))[0], blurred.image), "what is explained stays"
    assert torch.equal(explain(blurred, data, mask, level / 2)[0], blurred.image), "what disagrees is warned of and stays"
    one = explain(replace(blurred, image=blurred.image * torch.tensor([1.0, 0.0])[:, None, None]), data, mask, level)
    assert all(bool(torch.isfinite(x.abs()).all()) for x in one)
    assert torch.allclose(one[0][0], image[0], atol=1e-5), "a slice is brought to its data alone"
    dead = data.clone()
    dead[:, 3] = 0
    assert torch.isfinite(explain(blurred, dead, mask, level)[0].abs()).all()


def test_errors_are_foretold(assistant, images):
    kspace, truth = kspace_of(images)
    found = assistant.reconstruct(kspace)
    error, spread = np.abs(slices(found.image) - truth), slices(found.spread)
    assert 0.5 < spread.mean() / error.mean() < 2
    large = spread > np.quantile(spread, 0.9)
    assert error[large].mean() > 2 * error[~large].mean()


def test_damaged_samples_are_warned_of(assistant, images):
    kspace, _ = kspace_of(images[:2])
    lines = torch.nonzero(kspace.mask[0]).flatten()[::3]
    data = kspace.data.clone()
    # The head moved between lines.
    data[1, :, :, lines] *= torch.exp(1j * torch.randn(len(lines), generator=torch.Generator().manual_seed(0)))
    found = assistant.reconstruct(replace(kspace, data=data))
    assert found.residuals[1] > 1.25 > found.residuals[0]
    assert "disagree on slice 2" in found.warnings[0]


def test_lines_along_the_other_axis_are_the_same_turned(assistant, images):
    kspace, _ = kspace_of(images[:1])
    turned = replace(kspace, data=kspace.data.transpose(2, 3), mask=kspace.mask.expand(*kspace.data.shape[2:]).T.contiguous())
    a, b = assistant.reconstruct(kspace), assistant.reconstruct(turned)
    assert torch.allclose(a.image.voxels.transpose(1, 2), b.image.voxels, atol=1e-5)


def test_slabs_and_whole_are_equal(assistant, images):
    kspace, _ = kspace_of(images)
    part = lambda first: replace(kspace, data=kspace.data[first : first + 2], num_slices=6, rest=part)  # noqa: E731
    whole, slabs = assistant.reconstruct(kspace), assistant.reconstruct(part(0))
    assert torch.allclose(whole.image.voxels, slabs.image.voxels, atol=2e-3)
    assert len(slabs.residuals) == 6


@pytest.mark.parametrize(("coils", "height", "width"), [(1, 97, 81), (16, 64, 96), (3, 81, 150)])
def test_any_number_of_coils_and_any_size(assistant, images, coils, height, width):
    image = torch.nn.functional.interpolate(torch.from_numpy(images[1])[None, None], size=(height, width), mode="bilinear")[0, 0].numpy()
    kspace, truth = kspace_of([image], acceleration=2, coils=coils)
    found = assistant.reconstruct(kspace)
    assert found.image.shape == (width, height, 1)
    assert np.square(slices(found.image) - truth).mean() < np.square(slices(found.zero_filled) - truth).mean()


def test_given_sensitivities_and_espirit(assistant, images):
    kspace, truth = kspace_of(images[:1], acceleration=4)
    error = lambda f: float(np.square(slices(f.image) - truth).mean())  # noqa: E731
    learned = error(assistant.reconstruct(kspace))
    assert error(assistant.reconstruct(kspace, coils="espirit")) < 3 * learned
    full, _ = kspace_of(images[:1], acceleration=2, noise=0.0)
    del full
    with pytest.raises(ValueError, match="learned"):
        reconstruct(assistant.model, kspace, coils="guessed")


def test_noise_is_read_off_the_ends_of_the_readout():
    g = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.complex(*torch.randn(2, 1, 4, 96, 80, generator=g)) / 2**0.5
    signal = torch.zeros(96, 80)
    signal[20:76, 20:60] = torch.hann_window(56)[:, None]
    assert noise_of(fft2c(signal) + noise).tolist() == pytest.approx([0.02], rel=0.05)
    assert noise_of(noise).tolist() == pytest.approx([0.02], rel=0.05)
    unequal = noise * torch.tensor([0.5, 0.8, 1.0, 1.6])[:, None, None]
    assert noise_of(torch.cat([unequal, 0 * noise])).tolist() == pytest.approx([float(unequal.abs().square().mean().sqrt()), 0], rel=0.05)


@pytest.mark.parametrize(
    ("question", "asked", "rest"),
    [
        ("Reconstruct this and describe it", True, "Describe it"),
        ("Please reconstruct the image.", True, ""),
        ("Reconstruct, then write a report", True, "Write a report"),
        ("Undersampled data: reconstruct, please.", True, ""),
        ("Is there a lesion? Reconstruct it.", True, "Is there a lesion"),
        ("What does it mean to reconstruct an image?", False, "What does it mean to reconstruct an image?"),
        ("Do not reconstruct it", False, "Do not reconstruct it"),
        ("Is there a lesion?", False, "Is there a lesion?"),
        ("How good is the reconstruction?", False, "How good is the reconstruction?"),
    ],
)
def test_what_a_question_asks_for(question, asked, rest):
    assert asks_to_reconstruct(question) == (asked, rest)


def test_reconstructing_and_describing_in_one_go(assistant, images):
    kspace, _ = kspace_of(images[:3])
    study = Study(kspace=replace(kspace, affine=torch.diag(torch.tensor([1.0, 1, 20, 1])).double()))
    heard = []
    answer = assistant.answer(study, "Reconstruct this and describe it", on_text=lambda t: heard.append(t) or True)
    assert answer.text.startswith("3 slices of 144 × 160 reconstructed from 8 coils")
    assert len(answer.text) > len(answer.reconstruction.sentence()) + 20
    assert heard
    assert answer.to_json()["reconstruction"]["residual_over_noise"]
    again = assistant.answer(Study(volumes=(answer.reconstruction.image,)), "Reconstruct this.")
    assert again.text == NO_RAW_DATA
