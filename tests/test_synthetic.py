"""The synthetic recipe: physics by closed forms, lesions that lie where their masks say, text that the image can show."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from copy import copy
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch

from data_recipes import Synthetic
from data_recipes.__main__ import main
from data_recipes.acquisition import Quality, ThickSlices, acquire, blurred, simulate_kspace
from data_recipes.describe import LOOKS, Facts, finding, level5
from data_recipes.head import PAD, Lattice, read_head
from data_recipes.pathology import KINDS, draw_spot, write
from data_recipes.protocol import MOST_TRANSFER, Protocol, draw_protocol, signals
from data_recipes.recipe import generator
from data_recipes.scanner import burn, draw_remap, draw_scan
from data_recipes.tissue import CODE, NUM_CODES, SIDE_OF_CODE
from data_recipes.wording import REQUESTS, Voice
from omnimri.anatomy import NAMES, SEQUENCES
from omnimri.physics import diffusion_weighted, inversion_recovery, spin_echo, spoiled_gradient_echo, t1_at, t2_star_at

CLEAN = Quality(resolution=(1.0, 1.0), partial_fourier=1.0, phase_axis=1, taper=0.0, noise=0.0, amplification=1.0, bias=0.0)
WHITE, GREY, FLUID = (CODE[n] for n in ("left cerebral white matter", "left cerebral cortex", "left lateral ventricle"))


@pytest.fixture(scope="module")
def recipe(maps):
    return Synthetic(maps, numbers=(1,), image_size=96, num_slices=4)


def one(value):
    return torch.tensor(float(value))


def test_signal_equations_agree_with_closed_forms():
    pd, t1, t2 = one(0.8), one(1000), one(80)
    assert float(spin_echo(pd, t1, t2, tr_ms=one(1e7), te_ms=one(80))) == pytest.approx(0.8 / math.e, rel=1e-5)
    assert float(inversion_recovery(pd, t1, t2, tr_ms=one(1e7), te_ms=one(0), ti_ms=one(1000 * math.log(2)))) == pytest.approx(0, abs=1e-6)
    ernst = torch.arccos(torch.exp(one(-20 / 1000)))
    gre = [float(spoiled_gradient_echo(pd, t1, one(50), tr_ms=one(20), te_ms=one(0), flip_rad=ernst + d)) for d in (-0.02, 0.0, 0.02)]
    assert gre[1] == max(gre)
    assert gre[1] == pytest.approx(0.8 * math.sqrt((1 - math.exp(-0.02)) / (1 + math.exp(-0.02))), rel=1e-4)
    assert float(diffusion_weighted(one(1), one(1.0), b_value=one(1000))) == pytest.approx(1 / math.e, rel=1e-5)
    assert float(t1_at(t1, one(0.38), field_t=3.0)) == pytest.approx(1000)
    assert float(t1_at(t1, one(0.38), field_t=1.5)) == pytest.approx(1000 * 0.5**0.38, rel=1e-5)
    assert float(t2_star_at(one(80), one(40), field_t=3.0)) == pytest.approx(40)
    assert float(t2_star_at(one(80), one(40), field_t=1.5)) == pytest.approx(1 / (1 / 80 + 0.5 / 80), rel=1e-5)


@pytest.mark.parametrize("sequence", ["T1w", "T1w-Gd", "T2w", "FLAIR", "PDw"])
def test_tissues_are_in_the_order_of_each_weighting(sequence):
    """In every head at every field strength; on FLAIR grey and white matter are alike, and fluid is dark. Magnetization transfer in spin
    echoes of many slices takes of white matter most, so that it can be as dark as grey matter there.
    """
    right, oedema, wet = 0, 0, 0
    for i in range(150):
        g = generator(0, sequence, i)
        protocol = draw_protocol(g, sequence)
        mean, _ = signals(g, protocol)
        white, grey, fluid = (float(mean[k]) for k in (WHITE, GREY, FLUID))
        if sequence.startswith("T1w"):
            right += white > (0.94 if protocol.technique == "SE" else 1.0) * grey and grey > fluid
        elif sequence == "T2w":
            right += fluid > grey > white
        else:
            right += grey > white
        oedema += float(mean[CODE["oedema"]]) > grey
        wet += fluid > white
    if sequence != "FLAIR":
        assert right >= (142 if sequence == "PDw" else 150)
    else:
        assert oedema >= 147
        assert wet == 0


def test_spin_echoes_lose_to_magnetization_transfer_what_is_bound():
    plain = Protocol("T1w", "SE", tr_ms=600.0, te_ms=12.0)
    ratios, fluid = [], []
    for i in range(200):
        free = replace(plain, technique="TSE")  # the same equation without the loss, and the same draws before it
        lossy, whole = (signals(generator(3, i), p)[0] for p in (plain, free))
        loss = lossy / lossy[FLUID] / (whole / whole[FLUID])
        ratios.append([float(loss[WHITE]), float(loss[GREY])])
        fluid.append(float(loss[CODE["CSF"]]))
    white, grey = torch.tensor(ratios).T
    assert float(white.min()) == pytest.approx(1 - MOST_TRANSFER, abs=0.01)
    assert float(white.max()) == pytest.approx(1, abs=0.01)
    assert torch.allclose(1 - grey, 0.6 * (1 - white), atol=1e-4)
    assert fluid == pytest.approx([1.0] * 200, abs=1e-4)


def test_contrast_agent_brightens_what_enhances_and_nothing_else():
    with_agent, without = [], []
    for i in range(40):
        for sequence, found in (("T1w", without), ("T1w-Gd", with_agent)):
            mean, _ = signals(generator(1, i), draw_protocol(generator(2, i), sequence))
            found.append(mean / mean[WHITE])
    ratio = (torch.stack(with_agent).mean(0) / torch.stack(without).mean(0).clamp(min=1e-6))
    assert all(float(ratio[CODE[n]]) > 1.3 for n in ("enhancing", "meningioma", "capsule", "active plaque"))
    assert all(0.8 < float(ratio[CODE[n]]) < 1.2 for n in ("glioma", "oedema", "left cerebral cortex", "gliosis"))


def test_partial_volume_is_the_fraction_of_tissues():
    codes = torch.full((4, 1, 16, 16), WHITE, dtype=torch.uint8)
    codes[:1, :, 8] = FLUID
    mean = torch.zeros(NUM_CODES)
    mean[WHITE], mean[FLUID] = 1.0, 0.2
    image = acquire(torch.Generator(), codes, mean, torch.zeros(NUM_CODES), CLEAN, pixel_mm=1.0, planes=torch.zeros(1), stripped=False)
    assert torch.allclose(image[0, 8], torch.tensor(0.8), atol=1e-4)
    assert torch.allclose(image[0, 2], torch.tensor(1.0), atol=1e-4)


def test_acquisition_keeps_what_it_must():
    image = torch.zeros(1, 64, 64)
    image[:, 20:44, 24:40] = 1.0
    assert torch.allclose(blurred(image, CLEAN, 1.0), image, atol=1e-5)
    coarse = blurred(image, Quality((0.4, 0.4), 1.0, 1, 0.0, 0.0, 1.0, 0.0), 1.0)
    assert float(coarse.sum()) == pytest.approx(float(image.sum()), rel=1e-3)
    assert float(coarse.max()) > 1.05  # Gibbs ringing
    assert float(blurred(image, Quality((0.4, 0.4), 1.0, 1, 1.0, 0.0, 1.0, 0.0), 1.0).max()) < 1.02
    assert torch.allclose(blurred(image, Quality((1.0, 1.0), 0.75, 1, 0.0, 0.0, 1.0, 0.0), 1.0)[0, 32, 32], torch.tensor(1.0), atol=0.1)
    moved = blurred(image, Quality((1.0, 1.0), 1.0, 1, 0.0, 0.0, 1.0, 0.0, motion=((1.0, 3.0, -2.0),)), 1.0)
    assert torch.allclose(moved, torch.roll(image, (3, -2), (1, 2)), atol=1e-3)


def test_a_lesions_edge_in_the_image_lies_on_its_mask():
    """Within a pixel, for every kind, in a block of white matter."""
    line = torch.arange(80) - 39.5
    lattice = Lattice("axial", line[::4].clone(), line, line)
    offsets = torch.tensor([[0.0, 0, 0], [0.3, -0.25, 0.1], [-0.3, 0.25, -0.1]])
    relative = torch.full((3, 20, 80, 80), 0.5)
    for kind in KINDS:
        codes = torch.full((3, 20, 80, 80), WHITE, dtype=torch.uint8)
        owner = torch.zeros(20, 80, 80, dtype=torch.uint8)
        spot, _ = draw_spot(generator(3, kind), kind, torch.tensor([2.0, -3.0, 1.0]), side=1, at=torch.full((3,), 0.5), variation=1.0)
        write(spot, 1, codes, owner, lattice, offsets, relative)
        mean = torch.where(torch.arange(NUM_CODES) >= CODE["left wmh"], 1.0, 0.2)
        image = acquire(torch.Generator(), codes, mean, torch.zeros(NUM_CODES), CLEAN, pixel_mm=1.0, planes=lattice.along, stripped=False)
        mask = codes[0] >= CODE["left wmh"]
        assert int(mask.sum()) > 3, kind
        assert bool((owner[mask] == 1).all()), kind
        bright = image > 0.6
        grown = torch.nn.functional.max_pool2d(mask[:, None].float(), 3, 1, 1)[:, 0] > 0
        shrunk = torch.nn.functional.max_pool2d((~mask)[:, None].float(), 3, 1, 1)[:, 0] == 0
        assert not bool((bright & ~grown).any()), kind
        assert not bool((shrunk & ~bright).any()), kind


def test_lesions_stay_on_their_side():
    line = torch.arange(64) * 2.0 - 63
    lattice = Lattice("axial", torch.zeros(1), line, -line)
    for kind in ("glioblastoma", "acute infarct"):
        codes = torch.full((1, 1, 64, 64), WHITE, dtype=torch.uint8)
        codes[..., :32] = CODE["right cerebral white matter"]
        owner = torch.zeros(1, 64, 64, dtype=torch.uint8)
        at = torch.tensor([0.45, 0.3, 0.6])
        spot, _ = draw_spot(generator(0, kind), kind, torch.tensor([-4.0, 0.0, 0.0]), side=1, at=at, variation=1.0)
        write(spot, 1, codes, owner, lattice, torch.zeros(1, 3), at.view(3, 1, 1, 1).expand(3, 1, 64, 64))
        assert int((codes[..., 32:] >= CODE["left wmh"]).sum()) > 0
        assert bool((codes[..., :32] == CODE["right cerebral white matter"]).all())


def test_a_record_is_pure_and_its_masks_fit(recipe, maps):
    """The same bytes again, in another process without vector instructions as well: labels exactly, intensities within 1e-4."""
    first = recipe.record(3, 5)
    again = Synthetic(maps, numbers=(1,), image_size=96, num_slices=4).record(3, 5)
    assert torch.equal(first.images, again.images)
    assert first.conversations == again.conversations
    code = ("import hashlib, torch; from data_recipes import Synthetic;"
            f"r = Synthetic({str(maps)!r}, numbers=(1,), image_size=96, num_slices=4).record(3, 5);"
            "print(hashlib.sha256(r.labels.numpy().tobytes() + r.lesions.numpy().tobytes() + r.caption.encode()).hexdigest());"
            "print(*r.images.double().mean((0, 2, 3)).tolist())")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}).stdout.split()
    digest = hashlib.sha256(first.labels.numpy().tobytes() + first.lesions.numpy().tobytes() + first.caption.encode()).hexdigest()
    assert out[0] == digest
    assert [float(v) for v in out[1:]] == pytest.approx(first.images.double().mean((0, 2, 3)).tolist(), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_studies(recipe, maps):
    """Draws are made on the CPU: labels agree but for pixels on a border, intensities within 1e-3 of the brightest."""
    other = Synthetic(maps, numbers=(1,), image_size=96, num_slices=4, device="cuda")
    for k in range(3):
        here, there = recipe.record(3, k), other.record(3, k)
        assert float((here.labels != there.labels.cpu()).float().mean()) < 1e-3
        assert float((here.images - there.images.cpu()).abs().median()) < 1e-3 * float(here.images.max())


def test_thick_slices_of_another_plane(maps, recipe):
    """Tissue is averaged over a slice and interpolated between slices; a study differs in nothing else but what that hides."""
    thick = ThickSlices(axis=1, gap_mm=4.0, thickness_mm=4.0, first_mm=2.0)
    ramp = torch.arange(24.0)[:, None].expand(24, 6)
    seen = thick.seen(ramp[None], 1.0)[0]
    torch.testing.assert_close(seen[2:20], ramp[2:20], atol=0.51, rtol=0)  # a slice's mean is its middle's value
    torch.testing.assert_close(seen[:, 0].diff()[3:18], torch.ones(15), atol=0.05, rtol=0)
    step = thick.seen((ramp >= 12).float()[None], 1.0)[0, :, 0]
    assert 4 <= int(((step > 0.01) & (step < 0.99)).sum()) <= 8
    rows, columns = (ThickSlices(axis, 4.0, 3.0, 1.0) for axis in (1, 2))
    torch.testing.assert_close(columns.seen(ramp.T[None], 1.0)[0].T, rows.seen(ramp[None], 1.0)[0])
    other = Synthetic(maps, numbers=(1,), image_size=96, num_slices=4, across_share=0.5)
    changed = 0
    for i in range(12):
        plain, across = recipe.record(3, i), other.record(3, i)
        assert torch.equal(plain.labels, across.labels)
        assert (plain.sequence, plain.spacing_mm) == (across.sequence, across.spacing_mm)
        changed += not torch.equal(plain.images, across.images)
    assert 1 <= changed <= 9


def test_hyperintensities_of_the_map_are_of_one_disease(recipe):
    """Healthy people have rims around their ventricles: without small-vessel disease they are white matter, and no lesion."""
    scan = draw_scan(generator(0), num_slices=4, size=96, brain_box=(recipe.heads[0].low, recipe.heads[0].high),
                     head_centre=recipe.heads[0].centre, mirror=False)
    for side in ("left", "right"):
        kept, gone = (int(draw_remap(generator(0), scan, hyperintensities=h)[CODE[f"{side} wmh"]]) for h in (True, False))
        assert (kept, gone) == (CODE[f"{side} wmh"], CODE[f"{side} cerebral white matter"])
    head = recipe.heads[0]
    codes = head.codes.clone()
    x, y, z = ((head.low + head.high) / 2 + PAD).int().tolist()
    block = codes[x - 60 : x - 20, y - 40 : y + 40, z + 10 : z + 40]  # a map with white-matter lesions of its own
    block[block == CODE["left cerebral white matter"]] = CODE["left wmh"]
    assert int((codes == CODE["left wmh"]).sum()) > 1000
    sick = copy(recipe)
    sick.heads = [replace(head, codes=codes)]
    told = [set(sick.record(0, i).lesion_kinds) for i in range(40)]
    assert {"white-matter hyperintensity"} in told
    assert not any("white-matter hyperintensity" in kinds and len(kinds) > 1 for kinds in told)


def test_speed_is_told(maps, capsys, monkeypatch):
    """Slices a second, by processes that each make studies."""
    from data_recipes import speed

    monkeypatch.setattr(speed, "MAPS", (1,))
    monkeypatch.setattr(speed, "SECONDS", 0.5)
    assert main(["speed", "--data", str(maps), "--slices", "2"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("cpu, processes 1, studies of 2 slices: ")
    assert float(told.split(": ")[1].split()[0]) > 0
    for wrong, word in ((["speed"], "--data"), (["speed", "--data", str(maps), "--device", "abacus"], "'abacus'")):
        assert main(wrong) == 2
        assert word in capsys.readouterr().err


def test_studies_hold_together(recipe):
    """Lesions are ranked and described, sides are right, a third is normal, every plane and sequence comes."""
    normal, planes, sequences = 0, set(), set()
    for i in range(50):
        r = recipe.record(0, i)
        number = int(r.lesions[r.lesions < 255].max())
        assert number == len(r.lesion_places) == len(r.lesion_kinds) == len(r.lesion_lobes)
        normal += number == 0
        planes.add(r.plane)
        sequences.add(r.sequence)
        assert all(lobe.split()[0] == place.split()[0] for lobe, place in zip(r.lesion_lobes, r.lesion_places, strict=True) if lobe)
        assert ("no " in r.caption.lower().split("impression")[-1]) == (number == 0)
        columns = torch.nonzero(r.labels == CODE["left cerebral white matter"])[:, 2].float()
        others = torch.nonzero(r.labels == CODE["right cerebral white matter"])[:, 2].float()
        if r.plane != "sagittal" and min(len(columns), len(others)) > 50:
            assert float(columns.mean()) > float(others.mean())
    assert 13 <= normal <= 35
    assert len(planes) == 3
    assert len(sequences) == len(SEQUENCES)


def test_looks_are_told_only_where_the_sequence_shows_them():
    for sequence in SEQUENCES:
        for technique in ("", "DWI", "ADC", "T2*"):
            if technique and sequence != "other":
                continue
            for kind in KINDS:
                f = Facts("axial", sequence, NAMES, ("left cerebral white matter",), (kind,), ("",), technique, ("brighter",),
                          {"lesion": "brighter"})
                voice = Voice(generator(0, sequence, technique, kind), True)
                said = " ".join(finding(voice, f, 0) + level5(voice, f) for _ in range(20))
                assert ("enhancing" in said) <= (sequence == "T1w-Gd")
                assert ("diffusion" in said) <= (technique in ("DWI", "ADC"))
                assert ("perhaps" in said) == (sequence in LOOKS[kind] or technique in LOOKS[kind])
                assert said.count("<segment>") == 20


def test_wordings_are_many_and_name_what_they_are_about():
    for name, request in REQUESTS.items():
        voice = Voice(generator(0, name), True)
        said = {voice.ask(name, "left putamen") for _ in range(400)}
        assert len(said) > min(100, request.count() / 3)
        if "{x}" in request.plain[0]:
            assert all("left putamen" in s.lower() for s in said)
        assert len({Voice(generator(0, i), False).ask(name, "x") for i in range(100)}) <= len(request.plain)
    assert sum(r.count() for r in REQUESTS.values()) > 1000


def test_burnt_letters_cover_little_and_are_bright():
    image = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    for i in range(30):
        marked = burn(torch.Generator().manual_seed(i), image)
        changed = marked != image
        assert 10 < int(changed[0, 0].sum()) < 0.4 * 96 * 96
        assert bool((changed == changed[0, 0]).all()), "in every slice alike"
        assert float(marked[changed].min()) >= 0.7 * float(image.max())


def test_kspace_has_drawn_coils_and_masks():
    image = torch.rand(64, 64)
    made = [simulate_kspace(torch.Generator().manual_seed(i), image, size=48) for i in range(30)]
    assert {len(k["coils"]) for k in made} > {4, 8}
    for k in made:
        assert torch.allclose(k["coils"].abs().square().sum(0), torch.ones(48, 48), atol=1e-4)
        assert bool((k["kspace"][:, :, ~k["mask"][0]] == 0).all())
        assert 4 <= int(k["mask"].sum()) <= 40


def test_label_maps_that_cannot_be_used_are_one_sentence(maps, tmp_path, capsys):
    good = nibabel.load(maps / "training_seg_01.nii.gz")
    labels = np.asarray(good.dataobj)

    def read(array, affine=good.affine):
        nibabel.save(nibabel.Nifti1Image(array.astype(np.int16), affine), tmp_path / "training_seg_01.nii.gz")
        return read_head(tmp_path / "training_seg_01.nii.gz", torch.device("cpu"))

    for wrong, said in (
        (lambda: read(np.where(labels == 2, 999, labels)), r"got \[999\]"),
        (lambda: read(labels, np.diag([2.0, 2, 2, 1])), "voxels of 1 mm"),
        (lambda: read(labels[:20, :20, :20]), "voxels of 1 mm"),
        (lambda: read(np.zeros_like(labels)), "a whole brain"),
        (lambda: read(labels[::-1]), "left on the left"),
        (lambda: Synthetic(tmp_path / "none", numbers=(1,)), "a folder of label maps"),
        (lambda: Synthetic(maps, numbers=(1, 2)), "training_seg_02.nii.gz"),
    ):
        with pytest.raises(ValueError, match=said) as found:
            wrong()
        assert str(found.value).startswith("expected")
        assert str(tmp_path) not in str(found.value).replace(str(maps), "")
    (tmp_path / "training_seg_01.nii.gz").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="cannot be read"):
        read_head(tmp_path / "training_seg_01.nii.gz", torch.device("cpu"))
    assert main(["show", "synthetic", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "o")]) == 2
    assert "obtain" in capsys.readouterr().err


def test_shells_belong_to_their_structure(maps):
    head = read_head(maps / "training_seg_01.nii.gz", torch.device("cpu"))
    counts = torch.bincount(head.codes.flatten().int(), minlength=NUM_CODES)
    assert all(int(counts[CODE[n]]) > 100 for n in ("left cortex 1", "right periventricular 2", "fluid 1"))
    left = torch.nonzero(head.codes == CODE["left cortex 1"]).float()
    right = torch.nonzero(head.codes == CODE["right cortex 1"]).float()
    assert float(left[:, 0].mean()) < float(right[:, 0].mean())
    assert int(SIDE_OF_CODE[CODE["left cortex 1"]]) == 1
