"""BERTScore and the similarity of mean embeddings, from a model in a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .metric import Metric, mean_of, mean_score


class Encoder:
    """A text encoder of transformers in a local folder: tokenizer and weights as safetensors; no network, no code of others."""

    def __init__(self, folder: Path) -> None:
        """Load it.

        Raises:
            ValueError: the folder holds no such model.
        """
        from transformers import AutoModel, AutoTokenizer

        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            self.model = AutoModel.from_pretrained(folder, use_safetensors=True, **local).eval()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"expected a folder with a tokenizer and a model in safetensors, got {folder.name!r} that cannot be loaded "
                f"({type(error).__name__}); save one with save_pretrained"
            ) from None
        self.name = folder.name
        self._kept: dict[str, Tensor] = {}

    @torch.inference_mode()
    def tokens(self, text: str) -> Tensor:
        """(T, D) unit vectors of the tokens of a text, special tokens left out; long texts are cut to what the model takes."""
        if text not in self._kept:
            longest = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 512))
            coded = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=longest, return_special_tokens_mask=True)
            inside = coded.pop("special_tokens_mask")[0] == 0
            hidden = self.model(**coded).last_hidden_state[0][inside] if bool(inside.any()) else torch.zeros(0, 1)
            self._kept[text] = torch.nn.functional.normalize(hidden.float(), dim=-1)
        return self._kept[text]

    def bertscore(self, said: str, true: str) -> float:
        """F1 of greedy matches of tokens by cosine (Zhang et al., ICLR 2020); last layer, no baseline, no idf."""
        a, b = self.tokens(said), self.tokens(true)
        if not len(a) or not len(b):
            return float(len(a) == len(b))
        cosine = a @ b.T
        precision, recall = float(cosine.max(1).values.mean()), float(cosine.max(0).values.mean())
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    def similarity(self, said: str, true: str) -> float:
        """Cosine of the mean token vectors."""
        a, b = self.tokens(said), self.tokens(true)
        if not len(a) or not len(b):
            return float(len(a) == len(b))
        return float(torch.cosine_similarity(a.mean(0), b.mean(0), dim=0))

    def metrics(self) -> list[Metric]:
        """Both, as metrics: the mean over samples of the best over references."""

        def best(pair):
            def statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
                return mean_of(np.array([max(pair(p, r) for r in refs) for p, refs in zip(predictions, references, strict=True)]))

            return statistics

        return [
            Metric(
                "BERTScore",
                f"F1 of greedy token matches by cosine, last layer of {self.name}, no baseline",
                best(self.bertscore),
                mean_score,
                range=(-1.0, 1.0),
            ),
            Metric(
                "embedding similarity", f"cosine of mean token vectors of {self.name}", best(self.similarity), mean_score, range=(-1.0, 1.0)
            ),
        ]
