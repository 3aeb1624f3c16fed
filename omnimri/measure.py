"""Numbers and places from masks and affines; nothing else makes numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .anatomy import NAMES, STRUCTURES, WHITE_CLASSES, join
from .volume import Volume

MAX_INSTANCES = 250
LEAST_BRAIN_MM = 100.0
"""Of a brain that is smaller in any direction a part is missing."""
FLUID_LABEL = 24
"""FreeSurfer's number of fluid that is in no ventricle."""
FLUID_LABELS = tuple(s.label for s in STRUCTURES if s.tissue == "csf")
"""Of that and of the ventricles."""


def rank_components(mask: Tensor, *, least: int = 1, seeds: Tensor | None = None) -> tuple[Tensor, list[int]]:
    """Split a (X, Y, Z) bool mask into connected components (26 neighbours), the largest first.

    Args:
        least: Smaller components, in voxels, become 255 (neither lesion nor not).
        seeds: Components that hold none of these voxels are dropped (hysteresis).

    Returns:
        uint8 ranks from 1, of the mask's shape, and the size of each kept component in voxels.
    """
    from scipy import ndimage

    labelled, number = ndimage.label(mask.cpu().numpy(), structure=np.ones((3, 3, 3)))
    sizes = np.bincount(labelled.ravel(), minlength=number + 1)[1:]
    order = np.argsort(-sizes, kind="stable")
    seeded = np.ones(number, dtype=bool) if seeds is None else np.isin(np.arange(1, number + 1), labelled[seeds.cpu().numpy()])
    table = np.zeros(number + 1, dtype=np.uint8)
    kept = [int(k) for k in order if sizes[k] >= least and seeded[k]][:MAX_INSTANCES]
    table[1:][seeded] = 255
    for rank, k in enumerate(kept, 1):
        table[k + 1] = rank
    return torch.from_numpy(table[labelled]).to(mask.device), [int(sizes[k]) for k in kept]


def brain_mask(labels: Tensor, spacing_mm: Sequence[float], *, sulcus_mm: float = 5.0) -> Tensor:
    """The brain as strippers draw it, bool, from a (X, Y, Z) label map: tissue and ventricles with the sulci between them, without holes,
    and without the fluid around it, which SynthSeg's maps count in.

    Args:
        labels: FreeSurfer's; lesions (25, 57) are tissue.
        sulcus_mm: Gaps of up to twice this width are closed, on voxels of 1 mm or more.
    """
    from scipy import ndimage

    tissue = ((labels > 0) & (labels != FLUID_LABEL)).cpu().numpy()
    if not tissue.any():
        return torch.from_numpy(tissue)
    step = [max(1, int(1 / mm)) for mm in spacing_mm]
    mm = [s * k for s, k in zip(spacing_mm, step, strict=True)]
    pad = [int(sulcus_mm / x) + 2 for x in mm]
    box = tuple(slice(int(w.min()), int(w.max()) + 1) for w in np.nonzero(tissue))
    inside = np.pad(tissue[box][tuple(slice(None, None, k) for k in step)], [(p, p) for p in pad])
    near = ndimage.distance_transform_edt(~inside, sampling=mm) <= sulcus_mm
    closed = ndimage.distance_transform_edt(near, sampling=mm) > sulcus_mm
    whole = tissue.copy()
    filled = closed[tuple(slice(p, -p) for p in pad)]
    for axis, k in enumerate(step):
        filled = np.repeat(filled, k, axis)
    whole[box] |= filled[tuple(slice(0, s.stop - s.start) for s in box)]
    whole[box] = ndimage.binary_fill_holes(whole[box])
    return torch.from_numpy(whole)


@dataclass(frozen=True)
class Measured:
    """One mask, measured in scanner space."""

    volume_ml: float
    diameter_mm: float
    """Longest distance between two voxel centres of one slice, plus one pixel."""
    box_mm: tuple[tuple[float, float, float], tuple[float, float, float]]
    """RAS+ mm, lowest and highest corner at voxel edges."""
    slice_index: int
    """Slice of largest area, 0-based along the slice axis in position order."""
    centre_mm: tuple[float, float, float]


def measure(mask: Tensor, volume: Volume, *, slice_axis: int) -> Measured:
    """Measure one non-empty (X, Y, Z) bool mask.

    Raises:
        ValueError: the mask is empty.
    """
    where = torch.nonzero(mask)
    if len(where) == 0:
        raise ValueError("expected a mask with voxels, got an empty one")
    areas = torch.bincount(where[:, slice_axis], minlength=mask.shape[slice_axis])
    largest = int(areas.argmax())
    affine = volume.affine
    low, high = where.min(0).values.double() - 0.5, where.max(0).values.double() + 0.5
    corners = torch.cartesian_prod(*(torch.stack([a, b]) for a, b in zip(low, high, strict=True)))
    world = corners @ affine[:3, :3].T + affine[:3, 3]
    centre = where.double().mean(0) @ affine[:3, :3].T + affine[:3, 3]
    box = world.min(0).values.tolist(), world.max(0).values.tolist()
    return Measured(
        volume_ml=len(where) * volume.voxel_ml,
        diameter_mm=_longest(where, areas, volume, slice_axis),
        box_mm=(tuple(box[0]), tuple(box[1])),
        slice_index=largest,
        centre_mm=(float(centre[0]), float(centre[1]), float(centre[2])),
    )


def _longest(where: Tensor, areas: Tensor, volume: Volume, slice_axis: int) -> float:
    """Longest in-plane distance over all slices, from the convex hull of each slice's border."""
    from scipy.spatial import ConvexHull, QhullError
    from scipy.spatial.distance import pdist

    inplane = [a for a in range(3) if a != slice_axis]
    spacing = torch.tensor(volume.spacing_mm, dtype=torch.float64)
    pixel = float(spacing[inplane].mean())
    best = 0.0
    for index in torch.nonzero(areas).flatten().tolist():
        flat = (where[where[:, slice_axis] == index][:, inplane].double() * spacing[inplane]).numpy()
        if len(flat) > 3:
            try:
                flat = flat[ConvexHull(flat).vertices]
            except QhullError:
                flat = flat[[int(flat[:, k].argmin()) for k in (0, 1)] + [int(flat[:, k].argmax()) for k in (0, 1)]]
        if len(flat) > 1:
            best = max(best, float(pdist(flat).max()))
    return best + pixel


def midplane(labels: Tensor, affine: Tensor) -> tuple[Tensor, Tensor] | None:
    """A point on the head's midplane and its unit normal to the right, mm, from the sided structures.

    Returns:
        None where too little of both sides is seen.
    """
    centres = {}
    for side in ("left", "right"):
        wanted = torch.tensor([s.label for s in STRUCTURES if s.side == side], dtype=labels.dtype)
        where = torch.nonzero(torch.isin(labels, wanted))
        if len(where) < 100:
            return None
        centres[side] = where.double().mean(0) @ affine[:3, :3].T + affine[:3, 3]
    across = centres["right"] - centres["left"]
    if float(torch.linalg.vector_norm(across)) < 5:
        return None
    return (centres["left"] + centres["right"]) / 2, across / torch.linalg.vector_norm(across)


def right_of_midline(where: Tensor, labels: Tensor, affine: Tensor) -> Tensor:
    """(N,) bool: which of (N, 3) voxels lie right of the midline (world x = 0 where no midplane is found)."""
    world = where.double() @ affine[:3, :3].T + affine[:3, 3]
    plane = midplane(labels, affine)
    if plane is None:
        return world[:, 0] > 0
    return (world - plane[0]) @ plane[1] > 0


def side_of(right: Tensor) -> str:
    """`left`, `right`, `midline` (a third or more on each side) from voxels' sides."""
    share = float(right.double().mean())
    return "right" if share > 2 / 3 else "left" if share < 1 / 3 else "midline"


def location(mask: Tensor, labels: Tensor) -> str:
    """Name of the structure that most of the mask lies in, or `unlabelled region` (`place_of`)."""
    inside = labels[mask]
    return place_of(torch.stack([(inside == s.label).sum() for s in STRUCTURES])) or "unlabelled region"


def place_of(counts: Tensor) -> str:
    """Name of the structure with the highest of (len(NAMES),) voxel counts; empty where all are zero.

    What presses on the brain from outside lies in its fluid; it is named by the tissue it touches, where that is a tenth of it.
    """
    tissue = counts * torch.tensor([s.tissue != "csf" for s in STRUCTURES], device=counts.device)
    counts = tissue if 10 * int(tissue.sum()) >= int(counts.sum()) else counts
    return NAMES[int(counts.argmax())] if int(counts.max()) else ""


def signal_sentence(signal: Mapping[str, str]) -> str:
    """`signal_words` as a sentence on tissues; empty where there are none."""
    said = [f"{k} is {v} {'to' if v == 'similar' else 'than'} white matter" for k, v in signal.items() if k != "lesion"]
    return f"{join(said).capitalize()}." if said else ""


def signal_words(image: Tensor, classes: Tensor, lesions: Tensor) -> tuple[str, ...]:
    """How bright cerebrospinal fluid, grey matter and lesions are against white matter by their medians (masks are never
    exact, and their borders hold their neighbours), as `grey matter: darker`.

    Args:
        image: (S, H, W) normalised intensities (`example.normalise`).
        classes: (S, H, W) structure classes.
        lesions: (S, H, W) lesion ranks from 1; 0 or 255 elsewhere.

    Returns:
        Nothing where white matter has fewer than 50 pixels; nor what has fewer than 50 itself (lesions: 20).
    """
    sick = (lesions > 0) & (lesions < 255)

    def middle(names: tuple[str, ...]) -> float | None:
        wanted = [0, *(s.name.removeprefix("left ").removeprefix("right ") in names for s in STRUCTURES)]
        where = torch.tensor(wanted, dtype=torch.bool, device=classes.device)[classes.int()] & ~sick
        return float(image[where].median()) if int(where.sum()) >= 50 else None

    white = middle(("cerebral white matter",))
    if white is None:
        return ()
    fluid = middle(("lateral ventricle", "3rd ventricle", "4th ventricle"))
    level = {"cerebrospinal fluid": middle(("CSF",)) if fluid is None else fluid, "grey matter": middle(("cerebral cortex",)),
             "lesion": float(image[sick].median()) if int(sick.sum()) >= 20 else None}
    told = []
    for name, value in level.items():
        if value is not None:
            off = value - white
            word = "similar" if abs(off) < 0.05 else "brighter" if off > 0 else "darker"
            told.append(f"{name}: {'much ' if abs(off) > 0.3 else ''}{word}")
    return tuple(told)


def bright_fluid(image: Tensor, labels: Tensor, sick: Tensor) -> bool:
    """Whether the lateral ventricles are brighter than cerebral white matter by their medians; not where there is little of either.

    Args:
        image: (X, Y, Z) intensities.
        labels: (X, Y, Z) FreeSurfer labels.
        sick: (X, Y, Z) bool, where a lesion may be.
    """
    fluid, white = (image[torch.isin(labels, labels.new_tensor(side)) & ~sick] for side in ((4, 43), (2, 41)))
    return min(len(fluid), len(white)) >= 50 and bool(fluid.median() > white.median())


def lesion_signals(image: Tensor, classes: Tensor, lesions: Tensor, number: int) -> tuple[str, ...]:
    """Whether each lesion is `hyperintense` or `hypointense` to white matter by medians; empty where it differs by less than 0.05, or too
    little of either is there.

    Args:
        image: (S, H, W) normalised intensities (`example.normalise`).
        classes: (S, H, W) structure classes.
        lesions: (S, H, W) lesion ranks from 1; 0 elsewhere.
        number: Of lesions.
    """
    white = torch.isin(classes, torch.tensor(WHITE_CLASSES, dtype=classes.dtype)) & (lesions == 0)
    if int(white.sum()) < 50:
        return ("",) * number
    level = image[white].median()
    off = [float(image[where].median() - level) if int((where := lesions == r).sum()) >= 10 else 0.0 for r in range(1, number + 1)]
    return tuple("" if abs(x) < 0.05 else "hyperintense" if x > 0 else "hypointense" for x in off)


STEMS = sorted({s.name.removeprefix("left ").removeprefix("right ") for s in STRUCTURES})
STEM_OF_CLASS = torch.tensor([0, *(1 + STEMS.index(s.name.removeprefix("left ").removeprefix("right ")) for s in STRUCTURES)])
_SIDE_OF_CLASS = torch.tensor([0, *({"left": 1, "right": 2}.get(s.name.split()[0], 0) for s in STRUCTURES)])
_VENTRICLES = torch.tensor([k for k, s in enumerate(STEMS, 1) if "ventricle" in s])
_OUTSIDE, _INSIDE = (0.5, 0.75, 0.9, 0.97, 0.995), (0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99)
_FLUID = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9)
_LEAST_PIXELS, _LEAST_ILL, _NEAR, _MOST_SLICES = 20, 0.003, 4, 48
PROFILE_SIZE = 3 * len(STEMS) + 2 * (len(_FLUID) + 1) + 2 + len(_INSIDE) + len(_OUTSIDE)


def signal_profile(image: Tensor, classes: Tensor, lesions: Tensor) -> Tensor:
    """How bright everything is against white matter, in (PROFILE_SIZE,) numbers from which a sequence can be told.

    Of each structure with sides merged the logarithm of its median, its spread, and whether it is there; quantiles of the ventricles and of
    other fluid, whose masks spill over into tissue where fluid is scarce, and whether they are there; the median of lesions, and whether
    they are there; quantiles of the brain and of what is none. Tissue within four pixels of a lesion does not count, nor tissue of the
    side of the brain that has more of it: oedema and mass effect change tissue and masks there. Fluid counts on both sides. Of many slices
    every second or so is taken.

    Args:
        image: (S, H, W) normalised intensities (`example.normalise`).
        classes: (S, H, W) structure classes.
        lesions: (S, H, W) lesion ranks from 1; 0 elsewhere.
    """
    image, classes, lesions = (x[:: max(1, len(image) // _MOST_SLICES)] for x in (image, classes, lesions))
    classes, ill = classes.int(), lesions > 0
    near = torch.nn.functional.max_pool2d(ill.float()[:, None], 2 * _NEAR + 1, 1, _NEAR)[:, 0] > 0
    values, order = image.flatten().float().sort()
    stem, side = (table.to(classes.device)[classes].flatten()[order] for table in (STEM_OF_CLASS, _SIDE_OF_CLASS))
    ill, healthy = ill.flatten()[order], ~near.flatten()[order]
    white = stem == 1 + STEMS.index("cerebral white matter")
    left, right = (float((ill & (side == k)).sum()) / max(1, int((side == k).sum())) for k in (1, 2))
    if abs(left - right) > _LEAST_ILL and min(int((white & (side == k)).sum()) for k in (1, 2)) >= 50:
        healthy &= side != (1 if left > right else 2)
    brain = stem > 0
    level = next((v for m in (white & healthy, white & ~ill, brain) if len(v := values[m]) >= 50), values[-1:])
    middle = max(float(level[len(level) // 2]) + 0.05, 0.02)

    def at(x: Tensor, shares: Sequence[float]) -> list[float]:
        return [float(x[min(len(x) - 1, int(q * len(x)))]) + 0.05 for q in shares] if len(x) else [0.05] * len(shares)

    def logs(x: Tensor, shares: Sequence[float], least: int = _LEAST_PIXELS) -> list[float]:
        return [max(-3.0, min(3.0, math.log(max(v, 0.01) / middle))) for v in at(x, shares)] if len(x) >= least else [0.0] * len(shares)

    out: list[float] = []
    kinds = stem[healthy]
    groups = values[healthy][kinds.argsort(stable=True)].split(torch.bincount(kinds, minlength=len(STEMS) + 1).tolist())
    for x in groups[1:]:
        low, high = at(x, (0.1, 0.9))
        out += [*logs(x, (0.5,)), min(3.0, (high - low) / middle), 1.0] if len(x) >= _LEAST_PIXELS else [0.0] * 3
    ventricles = torch.isin(stem, _VENTRICLES.to(stem.device))
    for where, shares in ((ventricles & ~ill, _FLUID), ((stem == 1 + STEMS.index("CSF")) & ~ill, _FLUID), (ill, (0.5,))):
        out += [*logs(values[where], shares), float(int(where.sum()) >= _LEAST_PIXELS)]
    out += [*logs(values[brain & healthy], _INSIDE), *logs(values[~brain], _OUTSIDE, 1)]
    return torch.tensor(out, device=image.device)


def lobe_of(place: str, at: Tensor) -> str:
    """Lobe of a lesion in cerebral white matter or cortex, by planes that stand for the sulci; empty near a border.

    Args:
        place: Its structure.
        at: (3,) its middle in the brain's box: 0 left, posterior, inferior; 1 right, anterior, superior.
    """
    side, _, tissue = place.partition(" ")
    if tissue not in ("cerebral white matter", "cerebral cortex"):
        return ""
    x, y, z = at.tolist()
    central = 0.42 + 0.22 * (1 - z)  # the central sulcus runs forward as it descends
    occipital = 0.16 + 0.12 * (1 - z)
    sylvian = 0.42 + 0.12 * (0.5 - y)
    lateral = abs(x - 0.5) > 0.22
    if min(abs(y - central) + (z < sylvian), abs(y - occipital), abs(z - sylvian) + (not lateral)) < 0.05:
        return ""
    if y < occipital:
        return f"{side} occipital lobe"
    if lateral and z < sylvian and y < 0.78:
        return f"{side} temporal lobe"
    if not lateral and z < 0.4 and y < central:
        return ""
    return f"{side} frontal lobe" if y > central else f"{side} parietal lobe"


def brain_box(labels: Tensor, affine: Tensor) -> tuple[Tensor, Tensor] | None:
    """Lowest and highest corner of the brain's tissue, RAS+ mm; None where too little of it is seen to tell lobes by."""
    where = torch.nonzero((labels > 0) & (labels != FLUID_LABEL))[::7]
    if len(where) < 1000:
        return None
    world = where.double() @ affine[:3, :3].T + affine[:3, 3]
    low, high = world.quantile(0.002, 0), world.quantile(0.998, 0)
    return (low, high) if bool((high - low >= LEAST_BRAIN_MM).all()) else None


def size_word(diameter_mm: float) -> str:
    """Small below 10 mm, medium below 30 mm, large from there."""
    return "small" if diameter_mm < 10 else "medium-sized" if diameter_mm < 30 else "large"
