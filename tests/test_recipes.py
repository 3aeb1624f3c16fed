"""Records: pure in (seed, index), sided, described truthfully, stored and mixed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data_recipes import RECIPES, Mixture, Phantom, Recipe
from data_recipes.__main__ import main
from data_recipes.mixture import WINDOW
from data_recipes.store import Stored, build
from data_recipes.tissue import CLASS_OF_CODE, NUM_CODES, SIDED, swap_sides
from data_recipes.variation import vary
from omnimri.anatomy import NAMES
from omnimri.grid import COLUMNS, Grid
from omnimri.tasks import Segment


def same(a, b):
    tensors = ("images", "labels", "lesions", "positions_mm")
    words = ("caption", "conversations", "facts", "lesion_places", "spacing_mm")
    equal = all(torch.equal(getattr(a, k), getattr(b, k)) for k in tensors)
    return equal and all(getattr(a, k) == getattr(b, k) for k in words)


def test_a_record_depends_on_seed_and_index_alone(phantom):
    torch.manual_seed(1)
    first = phantom.record(4, 17)
    torch.manual_seed(2)
    phantom.record(4, 3)
    assert same(first, phantom.record(4, 17))
    assert not torch.equal(first.images, phantom.record(4, 18).images)
    assert not torch.equal(first.images, phantom.record(5, 17).images)


def test_left_structures_lie_on_the_left(phantom):
    """In the radiological lattice the left lies at higher columns: in every record, mirrored ones too."""
    checked = 0
    for i in range(40):
        record = phantom.record(0, i)
        if record.plane == "sagittal":
            continue
        left, right = (1 + NAMES.index(f"{s} cerebral white matter") for s in ("left", "right"))
        sides = [torch.nonzero(record.labels == k).float()[:, 2].mean() for k in (left, right)]
        if all(torch.isfinite(torch.stack(sides))):
            assert COLUMNS[record.plane] == (0, -1)
            assert float(sides[0]) > float(sides[1])
            checked += 1
    assert checked > 10


def test_swapping_sides_twice_is_identity():
    codes = torch.arange(NUM_CODES, dtype=torch.uint8)
    assert torch.equal(swap_sides(swap_sides(codes)), codes)
    for left, right in SIDED:
        assert int(swap_sides(codes)[left]) == right
    assert int(CLASS_OF_CODE.max()) == len(NAMES)


def test_text_says_what_the_masks_hold(phantom):
    for i in range(60):
        record = phantom.record(1, i)
        number = int(record.lesions[record.lesions < 255].max())
        assert number == len(record.lesion_places)
        assert ("no" in record.caption.split("Impression:")[1]) == (number == 0)
        assert record.caption.count("<segment>") == min(number, 4)
        for place in record.lesion_places[:1]:
            assert place in record.caption


def test_kspace_is_of_the_image(phantom):
    from omnimri.physics import ifft2c

    record = phantom.record(0, 1)
    k = record.kspace
    assert bool((k["kspace"][:, :, ~k["mask"][0]] == 0).all())
    zero_filled = (ifft2c(k["kspace"]) * k["coils"].conj()).sum(0).abs()
    a, b = zero_filled.flatten() - zero_filled.mean(), k["image"].flatten() - k["image"].mean()
    assert float((a @ b) / (a.norm() * b.norm())) > 0.8


def test_a_third_or_more_is_normal(phantom):
    normal = sum(not phantom.record(0, i).lesion_places for i in range(60))
    assert 20 <= normal <= 48


def test_mixture_is_pure_and_weighted(phantom):
    other = Phantom(image_size=64, num_slices=4, mirror=False)
    mixture = Mixture({phantom: 3.0, other: 1.0}, seed=3)
    assert same(mixture.record(5), Mixture({phantom: 3.0, other: 1.0}, seed=3).record(5))
    with pytest.raises(ValueError, match="positive weights"):
        Mixture({}, seed=0)


def test_a_record_is_shown_again_and_varied(phantom):
    plain, again = Mixture({phantom: 1.0}, seed=3), Mixture({phantom: 1.0}, seed=3, reuse=3)
    assert same(again.record(5), plain.record(5))
    look = again.record(5 + WINDOW)
    assert same(look, Mixture({phantom: 1.0}, seed=3, reuse=3).record(5 + WINDOW)), "what was kept before changes nothing"
    assert not torch.equal(look.images, plain.record(5).images)
    assert not torch.equal(look.images, again.record(5 + 2 * WINDOW).images)
    assert look.conversations == plain.record(5).conversations
    assert same(again.record(3 * WINDOW), plain.record(WINDOW))
    with pytest.raises(ValueError, match="at least once"):
        Mixture({phantom: 1.0}, seed=0, reuse=0)


def test_a_study_is_told_more_than_once(phantom):
    told = Mixture({phantom: 1.0}, seed=3, reuse=2, tellings=3)
    first, second, other = (told.record(i) for i in (3, 4, 6))
    plain = Mixture({phantom: 1.0}, seed=3).record(1)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.images, plain.images)
    assert len({r.conversations for r in (first, second, plain)}) == 3
    assert not torch.equal(first.images, other.images)
    assert same(second, Mixture({phantom: 1.0}, seed=3, reuse=2, tellings=3).record(4)), "what was kept before changes nothing"
    again = told.record(3 * (WINDOW + 1))
    assert not torch.equal(again.images, first.images), "shown once more, varied"
    assert again.lesion_places == first.lesion_places
    with pytest.raises(ValueError, match="at least once"):
        Mixture({phantom: 1.0}, seed=0, tellings=0)


def test_a_varied_mask_lies_on_its_image(phantom):
    for i in range(8):
        record = phantom.record(1, i)
        # Drawn as image and as mask: they must move alike.
        marked = replace(record, images=(record.labels > 0).float()[:, None].expand(-1, 3, -1, -1).clone())
        look = vary(marked, torch.Generator().manual_seed(i))
        drawn, meant = look.images[:, 1] > 0.5 * float(look.images.max()), look.labels > 0
        assert float((drawn & meant).sum()) > 0.95 * float((drawn | meant).sum())
        assert set(look.labels.unique().tolist()) <= set(record.labels.unique().tolist())
        ratio = (torch.count_nonzero(look.labels) / torch.count_nonzero(record.labels)).item()
        assert ratio == pytest.approx((record.spacing_mm[1] / look.spacing_mm[1]) ** 2, rel=0.15)


def test_records_survive_the_disk(phantom, tmp_path):
    assert build(phantom, seed=2, count=3, out=tmp_path / "rows") == 3
    stored = Stored(tmp_path / "rows")
    for i in range(3):
        assert same(stored.record(0, i), phantom.record(2, i))
    assert same(stored.record(0, 4), phantom.record(2, 1))
    with pytest.raises(ValueError, match="expected a folder"):
        Stored(tmp_path)


def test_a_recipe_without_licence_cannot_be_defined():
    with pytest.raises(TypeError, match="licence"):
        type("Bare", (Recipe,), {"name": "bare"})
    assert all(r.licence and r.citation and r.obtain for r in RECIPES.values())


def test_show_writes_a_page(tmp_path, capsys):
    assert main(["show", "phantom", "--count", "2", "--out", str(tmp_path)]) == 0
    assert "lesion" in (tmp_path / "index.html").read_text()
    assert main(["build", "nothing", "--out", str(tmp_path)]) == 2
    assert "expected a recipe" in capsys.readouterr().err


def test_phantom_volume_gives_its_own_labels_back(scan):
    grid = Grid.fit(scan, size=64)
    flat = torch.zeros(33, *grid.size)
    flat[5] = 1
    assert int((Segment().read((flat, grid)) > 0).sum()) > 0.9 * scan.voxels[0].numel() * 0.5
