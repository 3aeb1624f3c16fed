"""Examination: one look at one volume: lattice, sequence, masks, lesions, evidence, scope. Words come after it.

Shapes: S lattice slices, C pixel width, K standing queries, X Y Z the scan's own voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .anatomy import LESION_LABEL, NAMES, PLANES, SEQUENCE_WORDS, SEQUENCES
from .conversation import MAX_LESION_EVIDENCE, card, query_messages, render
from .example import LESION_CLASS, Example, Record, classes_of, prepare
from .grid import Grid, plane_of
from .grounding import pool_evidence
from .lesions import LESION_EDGE, Lesion, LesionRule, lesion_ranks, measured_lesion, without_sides
from .measure import FLUID_LABELS, brain_box, bright_fluid, lesion_signals, right_of_midline, signal_profile, signal_words
from .model.omnimri import OmniMRI
from .model.pixel_decoder import Pixels
from .overlay import BURNT, without_overlay
from .tasks import Detect, Segment
from .tasks.reconstruct import fast_bf16
from .volume import Volume

CHUNK = 8
"""Slices decoded at a time."""
LOOKS_ALIKE = "FLAIR was read off the brightness of tissue and fluid; a diffusion-weighted image can look the same"
"""Said where no header tells the sequence."""
SURE = 0.9
"""Probability of a sequence from which on a header that says another is doubted."""
MORE_SPACING_MM = 2.0
"""Distance of slices in the planes that a volume is looked at besides its own."""
SAME_QUERY = 0.1
"""Relative distance up to which an answer's query is the standing one of its structure, whose mask is there already."""
LEAST_EXTENT_MM, LEAST_CUBIC_MM = 105.0, 64.0
"""A slab thinner than this, the second where no voxel side is over 1.5 times another, is looked at in its own plane only."""
WIDEST_MM = 8.5
"""Slices further apart than this are looked at in their own plane only."""


@dataclass(frozen=True)
class View:
    """The volume on one lattice, with the standing queries that the language model gave for it."""

    grid: Grid
    fine: Tensor
    """(S, 4 C, H/2, W/2) half precision pixel features."""
    queries: Tensor
    """(1, K, C + 1) standing queries."""


@dataclass(frozen=True)
class Examination:
    """What was seen in one volume, before any words."""

    volume: Volume
    views: tuple[View, ...]
    """The acquisition plane first; the other two planes too where the volume is no thin slab (`more_planes`)."""
    record: Record
    """On the first lattice, with the sequence and the lesion places that the masks gave."""
    sequence: str
    sequence_source: str
    plane: str
    visual: Tensor
    """(1, tokens, E)"""
    evidence: Tensor
    """(1, N, E)"""
    labels: Tensor
    """(X, Y, Z) int32 FreeSurfer labels of structures, no lesions."""
    lesion_ranks: Tensor
    """(X, Y, Z) uint8, 0 or the lesion's rank."""
    lesions: tuple[Lesion, ...]
    scope_score: float
    """Distance from the training distribution relative to its limit; above 1 is out of scope."""
    notes: tuple[str, ...] = ()
    """What a person should know of how the image was read."""
    likely: tuple[tuple[str, float], ...] = ()
    """What sequence the image looks like, whatever its header says (`likely_sequences`)."""

    @property
    def in_scope(self) -> bool:
        """Whether the model may speak about this image."""
        return self.scope_score <= 1.0

    @property
    def grid(self) -> Grid:
        """The lattice of the acquisition plane."""
        return self.views[0].grid

    @property
    def slice_axis(self) -> int:
        """Voxel axis that counts slices."""
        return self.grid.axes[0]

    def lesion_label_map(self) -> Tensor:
        """(X, Y, Z) int32: 25 and 57 for lesion voxels left and right of the midline."""
        answer = torch.zeros_like(self.labels)
        where = torch.nonzero(self.lesion_ranks)
        if len(where):
            right = right_of_midline(where, self.labels, self.volume.affine)
            values = torch.where(right, LESION_LABEL["right"], LESION_LABEL["left"]).to(torch.int32)
            answer[tuple(where.T)] = values
        return answer


@torch.inference_mode()
def examine(
    model: OmniMRI,
    tokenizer: PreTrainedTokenizerBase,
    volume: Volume,
    *,
    rule: LesionRule,
    check: Callable[[], None] = lambda: None,
) -> Examination:
    """Look at a volume: first the slices for language, then every slice for masks, then what they show.

    Args:
        check: Called every second or so; what it raises ends the look.

    Raises:
        ValueError: the volume has no contrast.
    """
    plain = without_overlay(volume)
    grid = Grid.fit(plain, size=model.config.image_size)
    notes: tuple[str, ...] = (BURNT,) if plain is not volume else ()
    example, visual, shown = _look(model, tokenizer, plain, grid)
    num_slices = len(example.chosen)
    states = _query_states(model, tokenizer, grid.plane, visual, num_slices)
    queries = model.heads["segment"].queries(states["<segment>"][None])
    fine, heat = _decode(model, example, states["<detect>"], check)
    score = scope_score(model, shown, queries, fine)
    views = [View(grid, fine, queries)]
    for plane in more_planes(volume, grid.plane) if score <= 1.0 else ():
        other = Grid.fit(plain, size=model.config.image_size, plane=plane, slice_spacing_mm=MORE_SPACING_MM)
        turned, seen_there, _ = _look(model, tokenizer, plain, other)
        asked = _query_states(model, tokenizer, plane, seen_there, len(turned.chosen))
        turned_fine, _ = _decode(model, turned, asked["<detect>"], check)
        views.append(View(other, turned_fine, model.heads["segment"].queries(asked["<segment>"][None])))
    logits = []
    for view in views:
        check()
        logits.append((structure_logits(model, view.queries, view.fine), view.grid))
    own = logits[0][0][..., ::2, ::2]  # of the acquisition plane alone, as its thresholds were chosen: others are interpolated
    profile = signal_profile(example.images[:, 1, ::2, ::2], own[:-1].max(0).indices, (own[-1] > 0).long())
    del own
    segment = Segment()
    check()
    labels = segment.read(*((x[:-1], g) for x, g in logits))
    check()
    probability = torch.zeros(volume.shape)
    for x, g in logits:
        probability += segment.read_lesion(x[-1], g) / len(logits)
    del logits
    rule = rule.alone() if len(views) == 1 else rule
    where = labels > 0
    if bright_fluid(plain.voxels[0], labels, probability > LESION_EDGE):  # what is bright in fluid that is bright is fluid
        where &= ~torch.isin(labels, labels.new_tensor(FLUID_LABELS))
    ranks, peaks = lesion_ranks(probability, where, volume.voxel_ml, rule)
    if score > 1.0:
        ranks, peaks = torch.zeros_like(ranks), []
        labels = torch.zeros_like(labels)
    boxes, brain = Detect().read(heat, grid), brain_box(labels, volume.affine)
    lesions = tuple(
        measured_lesion(rank, ranks, labels, rule.confidence(peak, max(peaks), mean), volume, grid, boxes, brain)
        for rank, peak in enumerate(peaks, 1)
        for mean in (float(probability[ranks == rank].mean()),)
    )
    places = tuple(lesion.place for lesion in lesions)
    if not volume.oriented:  # the card keeps the sides it was trained with; people are told none
        lesions = tuple(replace(lesion, place=without_sides(lesion.place)) for lesion in lesions)
    classes, seen_ranks = _on_lattice(grid, labels, ranks)
    signals = lesion_signals(example.images[:, 1], classes, seen_ranks, len(lesions))
    lesions = tuple(replace(lesion, signal=signal) for lesion, signal in zip(lesions, signals, strict=True))
    evidence = _evidence(model, example, fine, classes, seen_ranks, len(lesions))
    signal = signal_words(example.images[:, 1], classes, seen_ranks)
    source, sequence = "header", volume.sequence
    likely = tuple(likely_sequences(model, profile))
    looks_like = named_sequence(model, likely) if score <= 1.0 and signal else "other"
    if sequence == "unknown":
        source, sequence = "image", looks_like
        notes += (LOOKS_ALIKE,) if looks_like == "FLAIR" else ()
    elif "other" not in (sequence, looks_like) and looks_like.removesuffix("-Gd") != sequence.removesuffix("-Gd") and likely[-1][1] > SURE:
        notes += (f"the header says {SEQUENCE_WORDS[sequence]}, the image looks {SEQUENCE_WORDS[looks_like]}: the header is believed",)
    record = Record(
        images=example.images,
        positions_mm=grid.positions_mm,
        plane=grid.plane,
        spacing_mm=grid.spacing_mm,
        sequence=sequence,
        lesion_places=places,
        signal=signal,
    )
    return Examination(
        volume=volume,
        views=tuple(views),
        record=record,
        sequence=sequence,
        sequence_source=source,
        plane=plane_of(volume)[1],
        visual=visual,
        evidence=evidence,
        labels=labels,
        lesion_ranks=ranks,
        lesions=lesions,
        scope_score=score,
        notes=notes,
        likely=likely,
    )


def scope_score(model: OmniMRI, patches_NPD: Tensor, queries: Tensor, fine_NCHW: Tensor) -> float:
    """How unlike the training data a study is, 1 at the limit: the Mahalanobis distance of its mean patch feature, or that and the share
    of doubtful pixels in its masks together. A large tumour makes masks doubtful, but no image unlike others; what is no head does both.

    An uncalibrated model (limit 0) gives 0: it cannot tell.
    """
    if float(model.scope_limit) == 0:
        return 0.0
    off = patches_NPD.mean((0, 1)) - model.scope_mean
    far = float(torch.linalg.vector_norm(model.scope_whiten @ off) / model.scope_limit)
    together = getattr(model.config, "scope_together", 0.0)
    if not together:
        return far
    parts = [Pixels(fine=part, coarse=part).phase(0).float() for part in fine_NCHW.split(CHUNK)]
    doubtful = doubt(torch.cat([model.heads["segment"].logits(queries, part)[0].softmax(1) for part in parts])) / model.config.doubt_limit
    return max(far, (far + doubtful) / together)


def doubt(probability_NKHW: Tensor) -> float:
    """Share of the outlined pixels that no structure claims with more than half of the probability; 1 where none is outlined.

    Args:
        probability_NKHW: Background first.
    """
    best, k = probability_NKHW.max(1)
    return float((best[k > 0] <= 0.5).float().mean()) if bool((k > 0).any()) else 1.0


def more_planes(volume: Volume, plane: str) -> tuple[str, ...]:
    """The planes to look at besides the acquisition's: both, between thick slices by interpolation, but of a slab none."""
    spacing = volume.spacing_mm
    least = LEAST_EXTENT_MM if max(spacing) > 1.5 * min(spacing) else LEAST_CUBIC_MM
    if max(spacing) > WIDEST_MM or min(n * s for n, s in zip(volume.shape, spacing, strict=True)) < least:
        return ()
    return tuple(p for p in PLANES if p != plane)


def structure_logits(model: OmniMRI, queries: Tensor, fine_NCHW: Tensor) -> Tensor:
    """Queries (1, K, C + 1) with pixel features (S, 4 C, H/2, W/2) -> (K + 1, S, H, W) half precision: background,
    structures, and lesion last.
    """
    s, _, h, w = fine_NCHW.shape
    found = torch.empty(queries.shape[1] + 1, s, 2 * h, 2 * w, dtype=torch.half, device=fine_NCHW.device)
    for first, part in zip(range(0, s, CHUNK), fine_NCHW.split(CHUNK), strict=True):
        pixels = Pixels(fine=part.float(), coarse=part).full()
        structures, lesion = model.heads["segment"].logits(queries, pixels)
        found[:-1, first : first + CHUNK] = structures.transpose(0, 1)
        found[-1, first : first + CHUNK] = lesion
    return found


def answer_labels(model: OmniMRI, seen: Examination, own: dict[int, Tensor]) -> Tensor:
    """Labels in scan space with the standing queries of some classes replaced by an answer's own, (C + 1,) each."""
    standing = seen.views[0].queries[0]
    if all(float(torch.dist(q, standing[k - 1])) <= SAME_QUERY * float(standing[k - 1].norm()) for k, q in own.items()):
        return seen.labels
    logits = []
    for view in seen.views:
        queries = view.queries.clone()
        for k, query in own.items():
            queries[0, k - 1] = query
        logits.append((structure_logits(model, queries, view.fine)[:-1], view.grid))
    return Segment().read(*logits)


def _look(
    model: OmniMRI, tokenizer: PreTrainedTokenizerBase, volume: Volume, grid: Grid
) -> tuple[Example, Tensor, Tensor]:
    """The volume on a lattice, its slices for language as (1, tokens, E), and their patch features."""
    record = Record(
        images=grid.to_grid(volume.voxels[0]), positions_mm=grid.positions_mm, plane=grid.plane, spacing_mm=grid.spacing_mm
    )
    sizes = {"max_slices": model.config.max_slices, "tokens_per_slice": model.config.tokens_per_slice}
    example = prepare(record, (), tokenizer, **sizes)
    chosen = example.chosen
    shown = model.encode(example.images[None, chosen], example.positions_mm[None, chosen], example.plane[None])
    return example, model.look(shown, torch.arange(len(chosen))[None]), shown


def named_sequence(model: OmniMRI, likely: Sequence[tuple[str, float]]) -> str:
    """The first of `likely_sequences` that may be named, or `other`: by its threshold of the release, never without one."""
    limits = getattr(model.config, "sequence_thresholds", {})
    return next((s for s, share in likely if share >= limits.get(s, 2.0)), "other")


def likely_sequences(model: OmniMRI, profile: Tensor) -> list[tuple[str, float]]:
    """The likeliest sequence by how bright masks are (`measure.signal_profile`) with its probability, then what may be said in its stead.

    With or without contrast agent it is T1-weighted; that agent was given is said only where it is likelier than not, with its own
    probability, and T1-weighted in its stead.
    """
    share = dict(zip(SEQUENCES, model.heads["sequence"](profile[None]).float().softmax(1)[0].tolist(), strict=True))
    enhanced = share.pop("T1w-Gd")
    plain, share["T1w"] = share["T1w"], share["T1w"] + enhanced
    best = max(share, key=lambda s: share[s])
    return [("T1w-Gd", enhanced)] * (best == "T1w" and enhanced > plain) + [(best, share[best])]


def _query_states(
    model: OmniMRI, tokenizer: PreTrainedTokenizerBase, plane: str, visual: Tensor, num_slices: int
) -> dict[str, Tensor]:
    """Hidden states of the standing query exchange at each task token, in order."""
    rendered = render(
        query_messages(),
        tokenizer,
        study=card(plane),
        num_image_tokens=num_slices * model.config.tokens_per_slice,
    )
    ids = torch.tensor([rendered.ids])
    hidden = model(input_ids=ids, visual=visual, logits_to_keep=1).hidden_states[0]
    return {t: model.hidden_at(ids, hidden, t)[1] for t in ("<segment>", "<detect>")}


def _decode(model: OmniMRI, example: Example, detect_state: Tensor, check: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Pixel features of every slice, (S, 4 C, H/2, W/2) half precision, and detection maps (S, 7, h, w)."""
    decoder, device = model.heads["pixels"], example.images.device
    fast = partial(torch.autocast, device.type, torch.bfloat16, enabled=fast_bf16(device))  # as in training
    waiting, mixed, fine, heat = [], [], [], []
    for part in torch.arange(len(example.positions_mm)).split(4 * CHUNK):
        check()
        images, positions = example.images[None, part], example.positions_mm[None, part]
        with fast():
            levels, x = decoder.below(images[0], model.encode(images, positions, example.plane[None]))
        waiting.append(levels)
        mixed.append(x)
    with fast():
        through = decoder.depth(torch.cat(mixed), example.positions_mm[None])
    for levels, x in zip(waiting, through.split([len(x) for x in mixed]), strict=True):
        check()
        with fast():
            pixels = decoder.above(levels, x)
        levels.clear()
        fine.append(pixels.fine.half())
        heat.append(model.heads["detect"](detect_state, pixels.coarse.float())[0])
    return torch.cat(fine), torch.cat(heat)


def _on_lattice(grid: Grid, labels: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Structure classes and lesion ranks of the scan's voxels at the lattice's points, (S, H, W) each."""
    return classes_of(grid.nearest(labels)), grid.nearest(ranks)


def _evidence(model: OmniMRI, example: Example, fine: Tensor, classes: Tensor, ranks: Tensor, num_lesions: int) -> Tensor:
    """Evidence tokens (1, N, E) of every structure and of the largest lesions."""
    pixels = Pixels(fine=fine, coarse=fine).phase(0).float()
    cut = (slice(None), slice(None, None, 2), slice(None, None, 2))
    pooled = pool_evidence(pixels, classes[cut][None], ranks[cut][None], example.positions_mm[None])
    rows = [*range(1, len(NAMES) + 1)]
    rows += [LESION_CLASS + k for k in range(min(num_lesions, MAX_LESION_EVIDENCE))]
    index = torch.tensor([rows])
    return model.evidence(pooled[:, index[0]], index.clamp(max=LESION_CLASS))
