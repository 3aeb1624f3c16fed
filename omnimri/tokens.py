"""Task tokens, slot tokens and placeholders, and the tokenizer that knows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE, EVIDENCE = "<image>", "<evidence>"
TASK_TOKENS = ("<segment>", "<detect>", "<reconstruct>", "<report>")
SLOTS = ("<ml>", "<mm>", "<count>", "<percent>", "<slice>", "<tr>", "<te>", "<ti>", "<tesla>", "<size>")
"""Slots are filled from masks or from the whitelisted header; `<size>` becomes small, medium or large."""
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
NAMES_WITH_DIGITS = ("T1", "T2", "3rd", "4th")
"""The only text with digits that an answer about a study may hold."""


def added_tokens() -> list[str]:
    """Every special token this project adds to a tokenizer, in order."""
    return [PAD, START, END, IMAGE, EVIDENCE, *TASK_TOKENS, *SLOTS]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on `texts` and add this project's tokens; digits stay single."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=added_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left")
    return extend_tokenizer(fast)


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Add this project's tokens to any tokenizer; those it has already keep their ids."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in added_tokens()], special_tokens=True)
    tokenizer.add_tokens([AddedToken(n, normalized=False) for n in NAMES_WITH_DIGITS])
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of this project's special tokens."""
    return {t: tokenizer.convert_tokens_to_ids(t) for t in added_tokens()}


def digit_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids whose text holds a digit and is not one of `NAMES_WITH_DIGITS`."""
    return [
        i
        for i in range(len(tokenizer))
        if any(c.isdigit() for c in tokenizer.decode([i])) and tokenizer.decode([i]).strip() not in NAMES_WITH_DIGITS
    ]
