"""Grounded dialogue: text, and every head driven by the hidden states of its tokens; stages 3 and 4 differ in what
is said and what may move.

Shapes: B studies, S slices, K standing queries, E language width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data_recipes.mixture import Mixture
from data_recipes.recipe import generator, uniform
from omnimri.anatomy import NAMES
from omnimri.example import LESION_CLASS, Example, collate, prepare
from omnimri.grounding import pool_evidence
from omnimri.model.omnimri import OmniMRI
from omnimri.tasks import Detect, Reconstruct, Report, Segment
from omnimri.tasks.segment import UNKNOWN

from .engine import Objective, Term

WEIGHTS = {"match": 0.5, "text": 1.0, "sequence": 0.2, "segment": 1.0, "dice": 1.0, "lesion": 1.0, "lesion_dice": 0.5, "detect": 0.1,
           "box": 0.05, "reconstruct": 0.5}


class DialogueSource:
    """Studies with one conversation each."""

    def __init__(self, mixture: Mixture, tokenizer: Any, model: OmniMRI, *, report_share: float) -> None:
        """Take conversations from a mixture.

        Args:
            report_share: Share of examples whose conversation is the report; the rest are chats.
        """
        self.mixture, self.tokenizer, self.report_share = mixture, tokenizer, report_share
        self.sizes = {"max_slices": model.config.max_slices, "tokens_per_slice": model.config.tokens_per_slice}

    def example(self, index: int) -> Example:
        """Record `index` with its conversation; half of the cards hide the sequence."""
        record = self.mixture.record(index)
        g = generator(self.mixture.seed, "dialogue", index)
        conversation = record.conversations[0 if uniform(g, 0, 1) < self.report_share else 1]
        shown = uniform(g, 0, 1) < 0.5
        return prepare(record, conversation, self.tokenizer, show_sequence=shown, **self.sizes)

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Pad and stack."""
        return collate(examples, pad_id=self.tokenizer.pad_token_id)


class GroundedDialogue(Objective):
    """Next tokens, masks, boxes and reconstruction in one pass over a batch; every head is called every time.

    `match` draws the language model's queries to a learned table of queries: masks teach the table from the first
    step, and names teach the language model which query is meant long before masks could.
    """

    def __init__(self, model: OmniMRI, *, dense_share: float = 0.0) -> None:
        """Take a model.

        Args:
            dense_share: Share of the steps that train masks alone, against the table: dense tasks need many images and
                no language model.
        """
        super().__init__()
        self.model, self.dense_share = model, dense_share

    def drive(self, batch: dict[str, Tensor], phase: int, swap: float) -> dict[str, Any]:
        """Run the model: predictions of every head.

        Args:
            phase: Which pixel of each 2 x 2 block is predicted.
            swap: Share of an answer's `<segment>` states that stand in for the standing query of their class.
        """
        model = self.model
        patches = model.encode(batch["images"], batch["positions_mm"], batch["plane"])
        visual = model.look(patches, batch["chosen"])
        pixels = model.pixels(batch["images"], patches, batch["positions_mm"])
        asked = model(input_ids=batch["query_ids"], attention_mask=batch["query_mask"], visual=visual)
        states = {t: model.hidden_at(batch["query_ids"], asked.hidden_states[0], t)[1] for t in
                  ("<segment>", "<detect>", "<reconstruct>")}
        b = len(batch["images"])
        head = model.heads["segment"]
        queries = head.queries(states["<segment>"].view(b, len(NAMES) + 1, -1))
        standing = torch.arange(1, LESION_CLASS + 1, device=queries.device).repeat(b)
        feature = pixels.phase(phase)
        cut = (..., slice(phase // 2, None, 2), slice(phase % 2, None, 2))
        pooled = pool_evidence(
            feature.detach(), batch["labels"][cut], batch["lesions"][cut], batch["positions_mm"]
        )
        index = batch["evidence_places"].clamp(max=pooled.shape[1] - 1)
        kinds = index.clamp(max=LESION_CLASS)
        picked = torch.gather(pooled, 1, index[..., None].expand(-1, -1, pooled.shape[-1]))
        evidence = model.evidence(picked, kinds)
        told = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], visual=visual, evidence=evidence)
        where = torch.nonzero(batch["segment_class"])
        chosen = where[torch.rand(len(where)).to(where.device) < swap]
        if len(chosen):
            rows = batch["segment_class"][chosen[:, 0], chosen[:, 1]] - 1
            own = head.queries(told.hidden_states[0][chosen[:, 0], chosen[:, 1]])
            queries = queries.index_put((chosen[:, 0], rows), own.to(queries.dtype))
        spoken = told.hidden_states[0][where[:, 0], where[:, 1]]
        named = torch.cat([standing, batch["segment_class"][where[:, 0], where[:, 1]]])
        return {
            "match": (head.queries(torch.cat([states["<segment>"], spoken])), head.table.detach()[named - 1]),
            "text": told.logits,
            "sequence": asked.logits,
            "segment": head.logits(queries, feature),
            "feature": feature,
            "detect": model.heads["detect"](states["<detect>"], pixels.coarse),
            "reconstruct": model.heads["reconstruct"](
                states["<reconstruct>"], batch["kspace"], batch["kspace_mask"], batch["coils"]
            ),
        }

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Term]:
        """Loss terms of all tasks."""
        phase = int(torch.randint(4, ()))
        if self.training and float(torch.rand(())) < self.dense_share:
            return self.dense(batch, phase)
        out = self.drive(batch, phase, swap=0.5)
        segment, detect, reconstruct, report = Segment(), Detect(), Reconstruct(), Report()
        said, meant = (x.float() for x in out["match"])
        losses = {
            "match": ((said - meant).square().sum() / meant.square().mean(), torch.tensor(float(said.numel()), device=said.device)),
            **report.loss(out["text"], report.target(batch)),
            "sequence": report.loss(out["sequence"], batch["query_labels"])["text"],
            **segment.loss(out["segment"], segment.target(batch, phase)),
            **detect.loss(out["detect"], detect.target(batch)),
            **reconstruct.loss(out["reconstruct"], reconstruct.target(batch)),
        }
        return {k: Term(total, count.float(), WEIGHTS[k]) for k, (total, count) in losses.items()}

    def dense(self, batch: dict[str, Tensor], phase: int) -> dict[str, Term]:
        """Mask losses against fixed queries; what takes no part gets a zero gradient, so that ranks agree."""
        model = self.model
        patches = model.encode(batch["images"], batch["positions_mm"], batch["plane"])
        pixels = model.pixels(batch["images"], patches, batch["positions_mm"])
        queries = model.heads["segment"].table.expand(len(batch["images"]), -1, -1)
        segment = Segment()
        losses = segment.loss(model.heads["segment"].logits(queries, pixels.phase(phase)), segment.target(batch, phase))
        used = ("model.vision", "model.heads.pixels", "model.heads.segment.table", "model.heads.segment.background")
        idle = [p for n, p in self.named_parameters() if p.requires_grad and not n.startswith(used)]
        total, count = losses["segment"]
        losses["segment"] = (total + 0.0 * torch.stack([p.sum() for p in idle]).sum(), count)
        return {k: Term(total, count.float(), WEIGHTS[k]) for k, (total, count) in losses.items()}

    def metrics(self, batch: dict[str, Tensor]) -> dict[str, Term]:
        """Dice of structures pooled over the batch, with the table, the standing queries and the answers' own; of lesions."""
        head, target = self.model.heads["segment"], Segment().target(batch)
        standing, answers = (self.drive(batch, 0, swap) for swap in (0.0, 1.0))
        table = head.logits(head.table.expand(len(batch["images"]), -1, -1), standing["feature"])
        found = {}
        for name, (structures, _) in {"table": table, "queries": standing["segment"], "answers": answers["segment"]}.items():
            said, dice = structures.argmax(1), []
            for k in range(1, structures.shape[1]):
                truth = target.labels == k
                if int(truth.sum()) >= 25:
                    dice.append(2 * (truth & (said == k)).sum() / (truth.sum() + ((said == k) & (target.labels != UNKNOWN)).sum()))
            found[f"dice_{name}"] = Term(torch.stack(dice).sum(), torch.tensor(float(len(dice))))
        truth, said = target.lesion == 1, (standing["segment"][1] > 0) & (target.lesion != UNKNOWN)
        found["dice_lesions"] = Term(2.0 * (truth & said).sum(), (truth.sum() + said.sum()).float())
        return found
