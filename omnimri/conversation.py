"""Message and render(): the only code that knows the chat template, the study card and the loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .anatomy import LESION, NAMES, SEQUENCE_WORDS
from .tokens import END, EVIDENCE, IMAGE, START

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
COUNT_WORDS = ("no", "one", "two", "three", "four")
MAX_LESION_EVIDENCE = 4


@dataclass(frozen=True)
class Message:
    """One turn. Text holds slots, never filled numbers."""

    role: str
    """`user` or `assistant`."""
    text: str


@dataclass(frozen=True)
class Rendered:
    """Token ids with the labels of the loss and the places where a head is driven."""

    ids: list[int]
    labels: list[int]
    """`ids` where the model has to predict, IGNORE elsewhere."""


def card(
    plane: str, sequence: str | None = None, lesion_places: Sequence[str] | None = None, signal: Sequence[str] = ()
) -> str:
    """The study card: what is known before words are spoken.

    Args:
        plane: Plane of the lattice, from the affine.
        sequence: One of `anatomy.SEQUENCES`; None before it is known.
        lesion_places: Place of each lesion mask by falling volume; None before the masks exist. Where they exist,
            one evidence slot per structure and per lesion stands in the text.
        signal: What `measure.signal_words` says of the masks.
    """
    words = f"Plane: {plane}. Sequence: {SEQUENCE_WORDS[sequence] if sequence else 'unknown'}."
    if signal:
        words = f"{words} Signal against white matter: {'; '.join(signal)}."
    if lesion_places is None:
        return words
    shown = list(lesion_places)[:MAX_LESION_EVIDENCE]
    more = " and more" if len(lesion_places) > len(shown) else ""
    listed = "; ".join(f"{EVIDENCE} {place}" for place in shown)
    count = f"{COUNT_WORDS[len(shown)]}{more}"
    return f"{words} Structures: {EVIDENCE * len(NAMES)}. Lesions: {count}{': ' if shown else ''}{listed}."


def num_evidence(lesion_places: Sequence[str]) -> int:
    """Number of evidence slots in the card for these lesions."""
    return len(NAMES) + min(len(lesion_places), MAX_LESION_EVIDENCE)


QUERY_REQUEST = "Every structure."
QUERY_NAMES = (*NAMES, LESION)


def query_messages() -> tuple[Message, Message]:
    """The exchange whose hidden states are the study's standing queries: one `<segment>` for each of `QUERY_NAMES`,
    then `<detect>`.
    """
    named = " ".join(f"{name} <segment>" for name in QUERY_NAMES)
    return Message("user", QUERY_REQUEST), Message("assistant", f"{named} <detect>")


def sequence_messages(sequence: str) -> tuple[Message, Message]:
    """The exchange that reads the sequence off the signal of the masks, where no header tells it."""
    return Message("user", "Which sequence?"), Message("assistant", f"{SEQUENCE_WORDS[sequence]}.")


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    study: str = "",
    num_image_tokens: int = 0,
    answer_prefix: str | None = None,
) -> Rendered:
    """Turn a conversation about one study into token ids (ChatML).

    Args:
        study: The study card, put before the first user turn.
        num_image_tokens: Image placeholders before the card.
        answer_prefix: When given, an assistant turn is opened with this text and left open (for generation).
    """
    ids: list[int] = []
    labels: list[int] = []

    def put(text: str, learn: bool) -> None:
        # User text must not be able to write control tokens.
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.extend(new)
        labels.extend(new if learn else [IGNORE] * len(new))

    first = True
    for message in messages:
        if message.role == "user":
            lead = f"{IMAGE * num_image_tokens}{study}\n" if first and (study or num_image_tokens) else ""
            put(f"{START}user\n{lead}", learn=False)
            new = plain_ids(message.text, tokenizer)
            ids.extend(new)
            labels.extend([IGNORE] * len(new))
            put(f"{END}\n", learn=False)
            first = False
        else:
            put(f"{START}assistant\n", learn=False)
            put(f"{message.text}{END}", learn=True)
            put("\n", learn=False)
    if answer_prefix is not None:
        put(f"{START}assistant\n{answer_prefix}", learn=False)
    return Rendered(ids, labels)


def plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize text from a person: control, task and slot tokens in it become ordinary characters."""
    return tokenizer(text.replace("<", "‹").replace("|>", "|›"), add_special_tokens=False)["input_ids"]
