"""Generation: the words of an answer, token by token, with a way to stop."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .examination import Examination
from .model.omnimri import OmniMRI

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    model: OmniMRI,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    seen: Examination,
    no_digits: Sequence[int],
    on_text: Callable[[str], bool] | None,
    beams: int,
    opening: Sequence[int] = (),
) -> list[int]:
    """Greedy or beam-searched ids after the prompt (1, T); streamed where someone listens.

    Args:
        no_digits: Ids that are never written.
        opening: Ids that follow a `<report>`: a report begins with how the images were made.
        on_text: Called with the text so far; return False to stop.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    stop = {"now": False}

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
            return torch.full((len(input_ids),), stop["now"])

    report = model.token_ids["<report>"]

    def allowed(_: int, so_far: Tensor) -> list[int]:
        for n, following in enumerate(opening):
            if so_far[-n - 1 :].tolist() == [report, *opening[:n]]:
                return [following]
        return everything

    everything = list(range(len(tokenizer)))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "visual": seen.visual,
        "evidence": seen.evidence,
        "max_new_tokens": 320,
        "do_sample": False,
        "num_beams": beams,
        "eos_token_id": end,
        "pad_token_id": tokenizer.pad_token_id,
        "suppress_tokens": list(no_digits),
        "stopping_criteria": StoppingCriteriaList([Stop()]),
    }
    if opening:
        settings["prefix_allowed_tokens_fn"] = allowed
    if on_text is None or beams > 1:
        return model.generate(ids, **settings)[0, ids.shape[1] :].tolist()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=False, timeout=300)
    out: dict[str, Any] = {}

    def work() -> None:
        try:
            with torch.inference_mode():
                out["ids"] = model.generate(ids, streamer=streamer, **settings)[0, ids.shape[1] :].tolist()
        except Exception as error:  # handed to the caller's thread
            out["error"] = error
            streamer.end()

    thread = Thread(target=work)
    thread.start()
    text = ""
    for piece in streamer:
        text += piece
        if on_text(show_unfilled(text)) is False:
            stop["now"] = True
    thread.join()
    if "error" in out:
        raise out["error"]
    return out["ids"]


def show_unfilled(text: str) -> str:
    """Text as it streams: slots are dots until they are measured, task tokens are not shown."""
    text = re.sub(r"<(segment|report|detect|reconstruct|\|im_end\||\|endoftext\|)>", "", text)
    return re.sub(r" +([.,;])", r"\1", re.sub(r"<[a-z]+>", "…", text)).strip()
