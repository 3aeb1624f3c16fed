"""K-space from files of every layout, in slabs, with its noise and geometry; and what is refused."""

from __future__ import annotations

import h5py
import nibabel
import numpy as np
import pytest
import torch

from eval.reconstruct import acquire, write_cfl
from omnimri.espirit import espirit
from omnimri.io import open_study
from omnimri.io.ismrmrd import header_of, layout_of
from omnimri.io.kspace import read_kspace
from omnimri.io.raw import Raw, geometry, slab_of, whitening
from omnimri.physics import calibration_size, estimate_coils, fft2c, fit_coils, gaussian_coils, ifft2c, sense_adjoint, sense_normal

H, W = 48, 40


def head(height=H, width=W):
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return (0.6 * ((x / 0.7) ** 2 + (y / 0.85) ** 2 < 1) + 0.4 * ((x - 0.1) ** 2 + (y / 1.2) ** 2 < 0.1)).astype(np.float32)


def measured(*, slices=2, coils=4, height=H, width=W, every=2, noise=1e-3, seed=0):
    """(S, c, H, W) complex64 with every second line and twelve in the middle, and its mask."""
    g = torch.Generator().manual_seed(seed)
    image = torch.from_numpy(head(height, width))
    full = torch.stack([fft2c(image * (1 + 0.2 * s) * gaussian_coils(coils, height, width, g)) for s in range(slices)])
    full = full + noise * torch.complex(*torch.randn(2, *full.shape, generator=g)) / 2**0.5
    mask = torch.zeros(1, width, dtype=torch.bool)
    mask[:, ::every] = True
    mask[:, width // 2 - 6 : width // 2 + 6] = True
    return full * mask, mask


def write(folder, layout, data, mask):
    array = data.numpy()
    if layout in ("h5", "h5 without mask"):
        with h5py.File(folder / "k.h5", "w") as f:
            f["kspace"] = array
            if layout == "h5":
                f["mask"] = mask[0].numpy()
        return folder / "k.h5", None
    if layout == "nifti":
        nibabel.save(nibabel.Nifti1Image(array.transpose(3, 2, 0, 1), np.diag([2.0, 3, 4, 1])), folder / "k.nii.gz")
        return folder / "k.nii.gz", None
    if layout.startswith("npy"):
        order = [("slices", "coils", "height", "width").index(n) for n in layout.split()[1].split(",")]
        np.save(folder / "k.npy", array.transpose(order))
        return folder / "k.npy", layout.split()[1]
    wide = np.zeros((H, W, 1, array.shape[1], *[1] * 9, array.shape[0]), np.complex64)
    wide[:] = array.transpose(2, 3, 1, 0).reshape(wide.shape)
    write_cfl(folder / "k", wide)
    return folder / ("k.hdr" if layout == "hdr" else "k.cfl"), None


LAYOUTS = ("h5", "h5 without mask", "nifti", "npy slices,coils,height,width", "npy width,coils,height,slices", "hdr", "cfl")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_kspace(tmp_path, layout):
    data, mask = measured()
    path, axes = write(tmp_path, layout, data, mask)
    study = open_study(path, kspace={"axes": axes} if axes else None)
    assert torch.equal(study.kspace.data, data)
    assert torch.equal(study.kspace.mask, mask)
    told = " ".join(study.warnings)
    assert ("no mask" in told) == (layout != "h5")
    if layout == "nifti":
        assert study.kspace.affine.diagonal().tolist() == [2, 3, 4, 1]
    else:
        assert "no geometry" in told


def test_three_axes_are_coils_first_and_it_is_said(tmp_path):
    data, _ = measured(slices=1)
    np.save(tmp_path / "k.npy", data[0].numpy())
    study = open_study(tmp_path / "k.npy")
    assert torch.equal(study.kspace.data, data)
    assert any("taken as coils, height, width" in w for w in study.warnings)


def test_a_mask_and_sensitivities_of_ones_own(tmp_path):
    data, mask = measured()
    np.save(tmp_path / "k.npy", data.numpy())
    fewer = mask[0].numpy().copy()
    fewer[0] = False
    np.save(tmp_path / "m.npy", fewer.astype(np.uint8))
    np.save(tmp_path / "c.npy", data.numpy() + 1)
    found = open_study(tmp_path / "k.npy", kspace={"mask": str(tmp_path / "m.npy"), "coils": str(tmp_path / "c.npy")}).kspace
    assert found.mask[0].tolist() == fewer.tolist()
    assert float(found.data[..., 0].abs().max()) == 0
    assert torch.equal(found.coils, data + 1)
    np.save(tmp_path / "m.npy", fewer[:-1])
    with pytest.raises(ValueError, match="mask of 40 columns"):
        open_study(tmp_path / "k.npy", kspace={"mask": str(tmp_path / "m.npy")})


def refused(tmp_path):
    data, _ = measured()
    array = data.numpy()

    def npy(name, values, **options):
        np.save(tmp_path / f"{name}.npy", values, **options)
        return tmp_path / f"{name}.npy"

    wrong = array.copy()
    wrong[0, 0, 0, 0] = np.nan
    yield npy("order", array[0].transpose(1, 2, 0)), "--axes"
    yield npy("slices", array.transpose(2, 3, 0, 1)), "--axes"
    yield npy("corner", np.fft.ifftshift(array, (2, 3))), "at the corners"
    yield npy("nan", wrong), "NaN"
    yield npy("zeros", np.zeros_like(array)), "zeros only"
    yield npy("real", array.real), "expected complex"
    yield npy("pickle", np.array([{"a": 1}], dtype=object), allow_pickle=True), "NumPy file"
    yield npy("small", array[..., :5, :5]), "at least 8"
    yield npy("large", array * np.float32(1e30)), "scale it"
    (tmp_path / "short.npy").write_bytes((tmp_path / "order.npy").read_bytes()[:-100])
    yield tmp_path / "short.npy", "NumPy file"
    others = {"radial": ((1, 64, 32, 4), "Cartesian"), "three": ((16, 16, 16, 4), "partition"), "maps": ((16, 16, 1, 4, 2), "dimensions")}
    for name, (shape, told) in others.items():
        write_cfl(tmp_path / name, np.ones(shape, np.complex64))
        yield tmp_path / f"{name}.cfl", told
    write_cfl(tmp_path / "cut", np.ones((16, 16, 1, 4), np.complex64))
    (tmp_path / "cut.cfl").write_bytes((tmp_path / "cut.cfl").read_bytes()[:-8])
    yield tmp_path / "cut.hdr", "bytes of BART data"
    (tmp_path / "alone.hdr").write_text("# Dimensions\n16 16 1 4\n")
    yield tmp_path / "alone.hdr", "found none"
    image = np.fft.ifft2(np.fft.ifftshift(array, (2, 3))).transpose(3, 2, 0, 1)
    nibabel.save(nibabel.Nifti1Image(image.astype(np.complex64), np.eye(4)), tmp_path / "image.nii")
    yield tmp_path / "image.nii", "complex image"


def test_what_cannot_be_used_is_refused_with_one_sentence(tmp_path):
    for path, told in refused(tmp_path):
        with pytest.raises(ValueError, match=told) as error:
            pytest.fail(f"{path.name}: {open_study(path)}")
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("layout", ["h5", "nifti", "npy slices,coils,height,width", "hdr"])
def test_a_file_that_does_not_fit_comes_in_slabs(tmp_path, layout):
    data, mask = measured(slices=5)
    path, _ = write(tmp_path, layout, data, mask)
    whole = open_study(path).kspace
    assert [len(s.data) for s in whole.slabs()] == [5]
    parts = list(open_study(path, kspace={"most": 2 * data[0].numel() + 1}).kspace.slabs())
    assert [len(s.data) for s in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([s.data for s in parts]), data)


def test_a_larger_slice_than_memory_is_refused(tmp_path):
    data, mask = measured()
    path, _ = write(tmp_path, "h5", data, mask)
    with pytest.raises(ValueError, match="samples a slice"):
        open_study(path, kspace={"most": 100})


def test_noise_is_made_equal_where_it_was_measured(tmp_path):
    rng = np.random.default_rng(0)
    mixing = np.eye(4) + 0.3 * rng.normal(size=(4, 4))
    draw = lambda *shape: (rng.normal(size=shape) + 1j * rng.normal(size=shape)) / 2**0.5  # noqa: E731
    noise = (mixing @ draw(4, 4000)).astype(np.complex64)
    white = whitening(noise) @ noise
    assert np.allclose(white @ white.conj().T / 4000, np.eye(4), atol=1e-5)
    assert whitening(np.zeros((4, 100), np.complex64)) is None
    data, mask = measured()
    with h5py.File(tmp_path / "k.h5", "w") as f:
        f["kspace"] = data.numpy() + np.einsum("ab,sbhw->sahw", mixing, draw(*data.shape)).astype(np.complex64) * mask.numpy()
        f["mask"], f["noise"] = mask.numpy(), noise
    found = open_study(tmp_path / "k.h5").kspace
    assert found.noise == 1.0
    quiet = found.data[..., ::2][:, :, :4]  # ends of the readout
    assert float(quiet.abs().square().mean()) == pytest.approx(1.0, rel=0.25)


HEADER = """<ismrmrdHeader><encoding><encodedSpace><matrixSize><x>96</x><y>40</y><z>1</z></matrixSize>
<fieldOfView_mm><x>480</x><y>240</y><z>6</z></fieldOfView_mm></encodedSpace><reconSpace><matrixSize><x>48</x><y>40</y><z>1</z></matrixSize>
<fieldOfView_mm><x>240</x><y>240</y><z>5</z></fieldOfView_mm></reconSpace><trajectory>KIND</trajectory></encoding></ismrmrdHeader>"""


def test_the_scanners_field_of_view_crops_an_oversampled_readout(tmp_path):
    header = header_of(HEADER.replace("KIND", "cartesian"))
    assert layout_of(header, 96, 40) == ((5.0, 6.0, 5.0), (48, 40))
    data, mask = measured(height=96)
    with h5py.File(tmp_path / "k.h5", "w") as f:
        f["kspace"], f["mask"], f["ismrmrd_header"] = data.numpy(), mask.numpy(), HEADER.replace("KIND", "cartesian")
    found = open_study(tmp_path / "k.h5").kspace
    assert found.crop == (48, 40)
    assert found.affine.diagonal().tolist() == [6, 5, 5, 1]
    with h5py.File(tmp_path / "s.h5", "w") as f:
        f["kspace"], f["ismrmrd_header"] = data.numpy(), HEADER.replace("KIND", "spiral")
    with pytest.raises(ValueError, match="bart nufft"):
        open_study(tmp_path / "s.h5")


def test_readouts_tell_where_the_slices_lie():
    read, phase, normal = np.array([0.0, 1, 0]), np.array([-1.0, 0, 0]), np.array([0.0, 0, 1])
    places = np.stack([np.stack([np.array([10.0, 20, 30 + 6 * s]), read, phase, normal]) for s in range(3)])
    raw = Raw((3, 4, 96, 40), lambda a, b: np.zeros(0), spacing_mm=(5.0, 6.0, 5.0), crop=(48, 40), places=places)
    affine, oriented = geometry(raw)
    assert oriented
    middle = affine @ [20, 24, 1, 1]
    assert np.allclose(middle[:3], [-10, -20, 36])  # LPS -> RAS
    assert np.allclose(affine[:3, 0], [6, 0, 0])
    assert np.allclose(affine[:3, 1], [0, -5, 0])
    assert np.allclose(affine[:3, 2], [0, 0, 6])
    raw.places = places[[0, 2, 1]]
    assert not geometry(raw)[1]
    raw.places = np.zeros_like(places)
    assert not geometry(raw)[1]


@pytest.mark.parametrize(("coils", "height", "width"), [(1, 48, 40), (3, 47, 41), (4, 40, 63)])
def test_one_coil_and_odd_sizes_are_read(tmp_path, coils, height, width):
    data, mask = measured(coils=coils, height=height, width=width)
    path, _ = write(tmp_path, "h5", data, mask)
    assert torch.equal(open_study(path).kspace.data, data)
    assert slab_of(Raw(tuple(data.shape), lambda a, b: data.numpy()[a:b]), 1, 1 << 20)["data"].shape[0] == 1


def test_kinds_that_are_not_there_are_errors(tmp_path):
    (tmp_path / "k").write_bytes(b"\x89HDF\r\n\x1a\nnothing")
    with pytest.raises(ValueError, match="cannot be read"):
        read_kspace(tmp_path / "k", "HDF5")


def test_espirit_agrees_with_sigpy():
    from sigpy.mri.app import EspiritCalib

    a = acquire(head(96, 80), coils=6, acceleration=2, noise=0.003, seed=3)
    ours, values = espirit(a.kspace, a.mask, most=13)
    theirs = EspiritCalib(a.kspace.numpy(), calib_width=13, thresh=0.02, kernel_width=6, crop=0.0, show_pbar=False).run()
    inside = head(96, 80) > 0.1
    agreement = np.abs((ours.numpy().conj() * theirs).sum(0))[inside]
    assert agreement.min() > 0.999
    assert float(values[torch.from_numpy(inside)].min()) > 0.9
    with pytest.raises(ValueError, match="at least 4 lines"):
        espirit(a.kspace, torch.arange(80)[None] % 4 == 0)


def test_estimated_sensitivities_are_those_of_the_acquisition():
    g = torch.Generator().manual_seed(1)
    for h, w in ((96, 80), (81, 97)):
        coils = gaussian_coils(4, h, w, g)
        image = torch.from_numpy(head(h, w))
        mask = torch.ones(1, 1, w, dtype=torch.bool)
        found = estimate_coils(fft2c(image * coils)[None], mask)[0]
        inside = image > 0.9
        assert float((found.conj() * coils).sum(0).abs()[inside].min()) > 0.97
    assert [int(n) for n in calibration_size(torch.tensor([[[1, 0, 1, 1, 1, 1, 0, 1]]]).bool())[1]] == [4]


def test_one_transform_along_lines_is_the_two_of_the_definition():
    g = torch.Generator().manual_seed(2)
    for h, w in ((24, 20), (23, 21)):
        coils, x = gaussian_coils(3, h, w, g)[None], torch.complex(*torch.randn(2, 1, h, w, generator=g))
        for mask in (torch.rand(1, 1, w, generator=g) < 0.5, torch.rand(1, h, w, generator=g) < 0.5):
            expected = sense_adjoint(fft2c(x[:, None] * coils), mask, coils)
            assert torch.allclose(sense_normal(x, mask.float(), coils), expected, atol=1e-5)


def test_sensitivities_are_fitted_to_an_image():
    g = torch.Generator().manual_seed(3)
    image = torch.from_numpy(head(96, 80))[None] + 0.05
    truth = gaussian_coils(4, 96, 80, g)[None]
    mask = (torch.arange(80) % 2 == 0).float()[None, None]
    seen = ifft2c(fft2c(image[:, None] * truth) * mask[:, None])
    wrong = truth * torch.polar(1 + 0.1 * torch.linspace(-1, 1, 80), 0.2 * torch.linspace(-1, 1, 80))
    _, before = fit_coils(image, wrong, seen, mask, iterations=0)
    fitted, after = fit_coils(image, wrong, seen, mask, iterations=6)
    assert float(after.norm()) < 0.25 * float(before.norm())
    assert float(((fitted - truth) * image).norm()) < float(((wrong - truth) * image).norm())
    assert torch.allclose(fit_coils(image, truth, seen, mask)[0], truth, atol=1e-4)
