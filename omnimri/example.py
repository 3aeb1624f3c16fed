"""Record (what a recipe or a scan gives) -> Example (tensors) -> Batch (padded); prepare() and collate()."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .anatomy import CLASS_OF_LABEL, CLASS_OF_NAME, LESION, NAMES, PLANES, SEQUENCES
from .conversation import IGNORE, Message, Rendered, card, query_messages, render, sequence_messages
from .volume import quantiles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LESION_CLASS = len(NAMES) + 1
"""Row of the lesion query; rows 1..len(NAMES) are structures, 0 is unused."""


@dataclass(frozen=True)
class Record:
    """A study on the model's lattice with whatever is known about it."""

    images: Tensor
    """(S, 3, H, W) float32, any units; the middle channel is the slice, the outer ones neighbours (see `Grid`)."""
    positions_mm: Tensor
    """(S,) relative to the middle of the study."""
    plane: str
    spacing_mm: tuple[float, float, float]
    """Slice, row, column."""
    sequence: str | None = None
    labels: Tensor | None = None
    """(S, H, W) uint8 structure classes, 0 background; the structure a lesion grew in is kept under it."""
    lesions: Tensor | None = None
    """(S, H, W) uint8: 0, or the lesion's rank by volume, from 1."""
    lesion_places: tuple[str, ...] | None = None
    """Place of each lesion by rank, such as `left cerebral white matter`."""
    lesion_kinds: tuple[str, ...] | None = None
    """What each lesion was made as, such as `meningioma`; for describing it where its look tells."""
    lesion_lobes: tuple[str, ...] | None = None
    """Lobe of each lesion, such as `left frontal lobe`; empty where it lies in none or near a border."""
    technique: str = ""
    """How the sequence was made, such as `MPRAGE` or `DWI`."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Of the acquisition: `field_t`, `tr_ms`, `te_ms`, `ti_ms`, `b_value`."""
    signal: tuple[str, ...] = ()
    """How bright masks are against white matter, in words (`measure.signal_words`)."""
    caption: str = ""
    conversations: tuple[tuple[Message, ...], ...] = ()
    kspace: Mapping[str, Tensor] = field(default_factory=dict)
    """`kspace` and `coils` (coils, h, w) complex64, `mask` (1, w) bool, `image` (h, w) float32; or nothing."""
    facts: tuple[str, ...] = ()
    """What the caption says; records with equal facts are each other's positives in contrast."""


@dataclass(frozen=True)
class Example:
    """One study as tensors; every field is what `Batch` stacks."""

    images: Tensor
    """(S, 3, H, W) float32, normalised."""
    positions_mm: Tensor
    plane: Tensor
    """() long, index into `PLANES`."""
    chosen: Tensor
    """(L,) long: the slices the language model sees."""
    input_ids: Tensor
    """(T,) long: the conversation."""
    text_labels: Tensor
    """(T,) long, IGNORE where nothing is learnt."""
    segment_class: Tensor
    """(T,) long: at each `<segment>` of an answer the class it must draw; 0 elsewhere."""
    query_ids: Tensor
    """(Q,) long: the standing query exchange."""
    sequence_ids: Tensor
    """(Q,) long: the exchange about the sequence, after a card with the signal of the masks and no image."""
    sequence_labels: Tensor
    """(Q,) long: learns the words for the sequence, where it is known."""
    sequence: Tensor
    """() long, index into `SEQUENCES`; IGNORE where it is not known."""
    caption_ids: Tensor
    """(C,) long: the caption alone, for contrast."""
    evidence_places: Tensor
    """(E,) long: which mask each evidence slot pools: class of a structure, or `LESION_CLASS` + rank - 1."""
    labels: Tensor
    """(S, H, W) uint8, 255 where unknown."""
    lesions: Tensor
    """(S, H, W) uint8, 255 where unknown."""
    spacing_mm: Tensor
    """(3,)"""
    facts: Tensor
    """() long: a hash of the caption's facts."""
    kspace: Tensor
    coils: Tensor
    kspace_mask: Tensor
    kspace_image: Tensor


def classes_of(labels: Tensor) -> Tensor:
    """FreeSurfer labels below 256 of any shape -> uint8 structure classes; 0 where a label is no structure."""
    table = torch.zeros(256, dtype=torch.uint8)
    for label, k in CLASS_OF_LABEL.items():
        table[label] = k
    return table[labels.long()]


def normalise(images: Tensor) -> Tensor:
    """Scale a study so that its foreground's 1st and 99th percentiles become 0 and 1; clip to [-0.1, 1.5].

    Args:
        images: (S, 3, H, W), any units; or (S, 1, H, W) for slices without neighbours.

    Raises:
        ValueError: the study has no contrast or holds values that are not finite.
    """
    sample = images[:: max(1, len(images) // 64), images.shape[1] // 2, ::3, ::3].flatten()
    if not bool(torch.isfinite(sample).all()):
        raise ValueError("expected finite intensities, got NaN or infinity; export the series again")
    floor, top = quantiles(sample, (0.01, 0.995))
    fore = sample[sample > floor + 0.1 * (top - floor)]
    if fore.numel() < 16 or top <= floor:
        raise ValueError("expected an image with contrast, got a nearly constant one")
    low, high = quantiles(fore, (0.01, 0.99))
    low = min(low, floor + 0.1 * (top - floor))
    return (images - low).div_(max(high - low, 1e-6 * abs(high), 1e-12)).clamp_(-0.1, 1.5)


def language_slices(num_slices: int, most: int) -> Tensor:
    """(L,) long: at most `most` slices, evenly over the study; of two that lie as near, the one nearer its middle."""
    if num_slices <= most:
        return torch.arange(num_slices)
    place = (torch.arange(most) + 0.5) * num_slices / most - 0.5
    return torch.where(place < (num_slices - 1) / 2, (place + 0.5).floor(), (place - 0.5).ceil()).long()


def place_class(place: str) -> int:
    """The class of a place such as `left cerebral white matter`, or the lesion class."""
    return LESION_CLASS if place == LESION else CLASS_OF_NAME[place]


def segment_classes(rendered: Rendered, tokenizer: PreTrainedTokenizerBase, *, learnt_only: bool = True) -> list[int]:
    """The class named before each `<segment>`: the longest structure name that ends nearest to it, else lesion."""
    token = tokenizer.convert_tokens_to_ids("<segment>")
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    classes = [0] * len(rendered.ids)
    since = 0
    for i, (t, label) in enumerate(zip(rendered.ids, rendered.labels, strict=True)):
        if t == start:
            since = i
        if t == token and (label != IGNORE or not learnt_only):
            classes[i] = named_class(tokenizer.decode(rendered.ids[since:i]))
            since = i + 1
    return classes


def named_class(text: str) -> int:
    """Class of the structure whose name is the last in `text`; the lesion class when none is named in it."""
    clause = text.split(".")[-1]
    found = [(clause.rfind(name) + len(name), len(name), name) for name in (*NAMES, LESION) if name in clause]
    if not found:
        return LESION_CLASS
    name = max(found)[2]
    return LESION_CLASS if name == LESION or LESION in clause else CLASS_OF_NAME[name]


@lru_cache(maxsize=256)
def _standing_exchange(tokenizer: PreTrainedTokenizerBase, plane: str, num_image_tokens: int) -> list[int]:
    return render(query_messages(), tokenizer, study=card(plane), num_image_tokens=num_image_tokens).ids


@lru_cache(maxsize=1024)
def sequence_exchange(tokenizer: PreTrainedTokenizerBase, plane: str, signal: tuple[str, ...], sequence: str) -> Rendered:
    """The exchange about the sequence: its card holds the signal of the masks, and no image."""
    return render(sequence_messages(sequence), tokenizer, study=card(plane, signal=signal))


def prepare(
    record: Record,
    conversation: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_slices: int,
    tokens_per_slice: int,
    answer_prefix: str | None = None,
) -> Example:
    """Make tensors of a record and a conversation: the same for training and for serving.

    Args:
        answer_prefix: Opens an assistant turn for generation.
    """
    images = normalise(record.images)
    chosen = language_slices(len(images), max_slices)
    num_image_tokens = len(chosen) * tokens_per_slice
    study = card(record.plane, record.sequence, record.lesion_places, record.signal)
    rendered = render(
        conversation, tokenizer, study=study, num_image_tokens=num_image_tokens, answer_prefix=answer_prefix
    )
    places: list[int] = []
    if record.lesion_places is not None:
        places = [*range(1, len(NAMES) + 1)]
        places += [LESION_CLASS + k for k in range(min(len(record.lesion_places), 4))]
    unknown = torch.full((len(images), *images.shape[-2:]), 255, dtype=torch.uint8)
    asked = sequence_exchange(tokenizer, record.plane, record.signal, record.sequence or "other")
    empty = torch.zeros(0)
    long = lambda values: torch.tensor(values, dtype=torch.long)  # noqa: E731
    return Example(
        images=images,
        positions_mm=record.positions_mm.float(),
        plane=long(PLANES.index(record.plane)),
        chosen=chosen,
        input_ids=long(rendered.ids),
        text_labels=long(rendered.labels),
        segment_class=long(segment_classes(rendered, tokenizer)),
        query_ids=long(_standing_exchange(tokenizer, record.plane, num_image_tokens)),
        sequence_ids=long(asked.ids),
        sequence_labels=long(asked.labels if record.sequence else [IGNORE] * len(asked.ids)),
        sequence=long(SEQUENCES.index(record.sequence) if record.sequence in SEQUENCES else IGNORE),
        caption_ids=long(render([Message("assistant", record.caption)], tokenizer).ids),
        evidence_places=long(places),
        labels=unknown if record.labels is None else record.labels,
        lesions=unknown if record.lesions is None else record.lesions,
        spacing_mm=torch.tensor(record.spacing_mm),
        facts=long(stable_hash(" ".join(record.facts))),
        kspace=record.kspace.get("kspace", empty),
        coils=record.kspace.get("coils", empty),
        kspace_mask=record.kspace.get("mask", empty),
        kspace_image=record.kspace.get("image", empty),
    )


def stable_hash(text: str) -> int:
    """A 62-bit hash that is the same in every process."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


Batch = dict[str, Tensor]
"""Stacked `Example` fields, `attention_mask` beside each id field. Ids are right-padded."""

_IDS = {"input_ids": "attention_mask", "query_ids": "query_mask", "sequence_ids": "sequence_mask", "caption_ids": "caption_mask"}
_FILL = {"text_labels": IGNORE, "sequence_labels": IGNORE}


def collate(examples: Sequence[Example], *, pad_id: int) -> Batch:
    """Stack examples of equal slice number and image size; token fields are padded on the right, receive coils with empty ones.

    Raises:
        ValueError: the examples' images differ in shape.
    """
    shapes = {tuple(e.images.shape) for e in examples}
    if len(shapes) != 1:
        raise ValueError(f"expected examples of one shape in a batch, got {sorted(shapes)}")
    batch: dict[str, Any] = {}
    for f in fields(Example):
        values: list[Tensor] = [getattr(e, f.name) for e in examples]
        if len({tuple(v.shape) for v in values}) == 1 and f.name not in _IDS:
            batch[f.name] = torch.stack(values)
        else:
            longest = max(len(v) for v in values)
            fill = pad_id if f.name in _IDS else _FILL.get(f.name, 0)
            stacked = values[0].new_full((len(values), longest, *values[0].shape[1:]), fill)
            mask = torch.zeros(len(values), longest, dtype=torch.long)
            for i, v in enumerate(values):
                stacked[i, : len(v)] = v
                mask[i, : len(v)] = 1
            batch[f.name] = stacked
            if f.name in _IDS:
                batch[_IDS[f.name]] = mask
    return batch


