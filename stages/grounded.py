"""Grounded dialogue: text, and every head driven by the hidden states of its tokens; stages 3 and 4 differ in what
may move and in how often masks or words are trained alone.

Shapes: B studies, S slices, K standing queries, E language width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from data_recipes.mixture import Mixture
from data_recipes.recipe import generator
from omnimri.conversation import IGNORE, Message, render
from omnimri.example import LESION_CLASS, Example, Record, collate, prepare
from omnimri.grounding import pool_evidence
from omnimri.measure import signal_profile
from omnimri.model.omnimri import OmniMRI
from omnimri.tasks import Detect, Reconstruct, Report, Segment
from omnimri.tasks.segment import UNKNOWN

from .engine import Objective, Term

WEIGHTS = {"match": 0.4, "text": 1.0, "sequence": 0.5, "sequence_head": 0.5, "segment": 1.0, "dice": 1.0, "lesion": 2.0, "lesion_dice": 1.0,
           "detect": 0.1, "box": 0.05, "reconstruct": 0.5, "spread": 0.05, "coils": 0.25}

Losses = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum, count)."""


TALK_TOKENS = 280
"""Most tokens of exchanges a study; attention costs their square."""


def dialogue(record: Record, g: torch.Generator, tokenizer: Any) -> list[Message]:
    """Exchanges of a record in a drawn order, as many as fit."""
    chosen: list[Message] = []
    left = TALK_TOKENS
    for k in torch.randperm(len(record.conversations), generator=g).tolist():
        left -= len(render(record.conversations[k], tokenizer).ids)
        if chosen and left < 0:
            break
        chosen += record.conversations[k]
    return chosen


class DialogueSource:
    """Studies with their conversations."""

    def __init__(self, mixture: Mixture, tokenizer: Any, model: OmniMRI) -> None:
        self.mixture, self.tokenizer = mixture, tokenizer
        self.sizes = {"max_slices": model.config.max_slices, "tokens_per_slice": model.config.tokens_per_slice}

    def example(self, index: int) -> Example:
        """Record `index` with exchanges in a drawn order."""
        record = self.mixture.record(index)
        conversation = dialogue(record, generator(self.mixture.seed, "dialogue", index), self.tokenizer)
        return prepare(record, conversation, self.tokenizer, **self.sizes)

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Pad and stack."""
        return collate(examples, pad_id=self.tokenizer.pad_token_id)


NAMED = 8
"""Studies of a batch whose sequence is told from their masks: sorting intensities takes longer than learning from them."""
GIVEN_COILS = 0.1
"""Share of the reconstructions whose sensitivities are given."""


class GroundedDialogue(Objective):
    """Next tokens, masks, boxes and reconstruction over a batch. Some steps train masks, words or reconstruction alone: they
    are cheaper, and want many images and many conversations.

    Masks teach the pixel features and a learned table of queries. The language model's own queries meet the same features
    (`asked`), which they do not move, and are drawn to the table (`match`), so that names teach it which query is meant
    long before masks could.
    """

    def __init__(self, model: OmniMRI, *, mask_share: float = 0.0, word_share: float = 0.0, image_share: float = 0.0,
                 tellings: int = 1) -> None:
        """Take a model.

        Args:
            mask_share: Share of the steps that train masks alone, against the table.
            word_share: Share of the steps that train words alone.
            image_share: Share of the steps that train reconstruction alone.
            tellings: How many rows of a batch, one after another, are of one study: steps of words alone see it once.

        Raises:
            ValueError: no step is left for boxes.
        """
        super().__init__()
        if mask_share + word_share + image_share >= 1:
            raise ValueError(f"expected mask_share + word_share + image_share below 1, got {mask_share} + {word_share} + {image_share}")
        self.model, self.mask_share, self.word_share, self.image_share = model, mask_share, word_share, image_share
        self.tellings = tellings

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Term]:
        """Loss terms of this step's tasks; what takes no part gets no gradient, and the optimizer leaves it as it is."""
        phase, draw = int(torch.randint(4, ())), float(torch.rand(()))
        masks, words = True, True
        if self.training:
            words = draw >= self.mask_share
            masks = not self.mask_share <= draw < self.mask_share + self.word_share
        alone = self.training and draw >= 1 - self.image_share
        if alone or not words:  # what no word takes part in sees every study once
            batch = {k: v[:: self.tellings] for k, v in batch.items()}
        if alone:
            return self.terms(self.reconstruct(batch))
        seen = self.see(batch, phase, masks)
        losses = self.outline(batch, phase, seen) if masks else {}
        if words:
            losses |= self.speak(batch, phase, seen) | {"sequence": self.name_sequence(batch)}
            losses |= self.ask(batch, phase, seen) if masks else self.stand(batch, seen, 1)[0]
        return self.terms(losses)

    def dense_parts(self) -> list[torch.nn.Module]:
        """The encoder and the pixel decoder."""
        return [self.model.vision, self.model.heads["pixels"]]

    def word_parts(self) -> list[torch.nn.Module]:
        """The blocks of the language model."""
        return list(self.model.language.model.layers)

    def terms(self, losses: Losses) -> dict[str, Term]:
        """Weighted."""
        return {k: Term(total, count.float(), WEIGHTS[k.removeprefix("asked_")]) for k, (total, count) in losses.items()}

    def reconstruct(self, batch: dict[str, Tensor]) -> Losses:
        """What becomes of k-space, where there is any."""
        if not batch["kspace"].numel():
            return {}
        given = batch["coils"] if float(torch.rand(())) < GIVEN_COILS else None
        image = self.model.heads["reconstruct"](batch["kspace"], batch["kspace_mask"], given)
        return Reconstruct().loss(image, Reconstruct().target(batch))

    def see(self, batch: dict[str, Tensor], phase: int, masks: bool) -> dict[str, Any]:
        """Patch and pixel features, language tokens of the image, and mask logits against the table.

        Args:
            phase: Which pixel of each 2 x 2 block is predicted.
            masks: Whether patch and pixel features learn.
        """
        model, head = self.model, self.model.heads["segment"]
        told = 1 if masks else self.tellings
        images, positions, plane, chosen = (batch[k][::told] for k in ("images", "positions_mm", "plane", "chosen"))
        with torch.set_grad_enabled(masks and torch.is_grad_enabled()):
            patches = model.encode(images, positions, plane)
            pixels = model.pixels(images, patches, positions)
        feature = pixels.phase(phase)
        logits = head.logits(head.table.expand(len(images), -1, -1), feature) if masks else None
        visual = model.look(patches, chosen).repeat_interleave(told, 0)
        return {"visual": visual, "pixels": pixels, "feature": feature, "masks": logits, "told": told}

    def outline(self, batch: dict[str, Tensor], phase: int, seen: dict[str, Any]) -> Losses:
        """Masks by the table, and the sequence by how bright the masks are that it gives."""
        structures, lesion = seen["masks"]
        cut = (slice(NAMED), slice(None), slice(phase // 2, None, 2), slice(phase % 2, None, 2))
        images = batch["images"][:, :, 1][cut]
        shape = images.shape[0] * images.shape[1]
        found = structures[:shape].detach().argmax(1), (lesion[:shape].detach() > 0).long()
        profiles = torch.stack([signal_profile(*study) for study in zip(images, *(x.view(images.shape) for x in found), strict=True)])
        sequence = batch["sequence"][:NAMED]
        told = F.cross_entropy(self.model.heads["sequence"](profiles).float(), sequence, ignore_index=IGNORE, reduction="sum")
        return Segment().loss(seen["masks"], Segment().target(batch, phase)) | {"sequence_head": (told, (sequence != IGNORE).sum())}

    def speak(self, batch: dict[str, Tensor], phase: int, seen: dict[str, Any]) -> Losses:
        """Next tokens, with the evidence of the true masks; the queries at their `<segment>` go to `seen["spoken"]`."""
        model = self.model
        told = seen["told"]
        cut = (slice(None, None, told), slice(None), slice(phase // 2, None, 2), slice(phase % 2, None, 2))
        pooled = pool_evidence(seen["feature"].detach(), batch["labels"][cut], batch["lesions"][cut], batch["positions_mm"][::told])
        pooled = pooled.repeat_interleave(told, 0)
        index = batch["evidence_places"].clamp(max=pooled.shape[1] - 1)
        picked = torch.gather(pooled, 1, index[..., None].expand(-1, -1, pooled.shape[-1]))
        evidence = model.evidence(picked, index.clamp(max=LESION_CLASS))
        out = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], visual=seen["visual"], evidence=evidence
        )
        where = torch.nonzero(batch["segment_class"])
        queries = model.heads["segment"].queries(out.hidden_states[0][where[:, 0], where[:, 1]])
        named = batch["segment_class"][where[:, 0], where[:, 1]]
        seen["spoken"] = (where[:, 0], named, queries)
        return Report().loss(out.logits, Report().target(batch))

    def stand(self, batch: dict[str, Tensor], seen: dict[str, Any], first: int) -> tuple[Losses, dict[str, Tensor]]:
        """The standing exchange of the first studies of a batch: every structure's query.

        Returns:
            Losses, and hidden states by task token.
        """
        ids = batch["query_ids"][:first]
        mask, visual = batch["query_mask"][:first], seen["visual"][:first]
        out = self.model(input_ids=ids, attention_mask=mask, visual=visual, logits_to_keep=1)
        states = {t: self.model.hidden_at(ids, out.hidden_states[0], t)[1] for t in ("<segment>", "<detect>")}
        queries = self.model.heads["segment"].queries(states["<segment>"].view(first, LESION_CLASS, -1))
        classes = torch.arange(1, LESION_CLASS + 1, device=ids.device).repeat(first)
        _, named, spoken = seen["spoken"]
        match = self.match(torch.cat([queries.flatten(0, 1), spoken]), torch.cat([classes, named]))
        return {"match": match}, {**states, "queries": queries}

    def name_sequence(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Next tokens of the sequence's words, after the signal of the true masks."""
        told = self.model(input_ids=batch["sequence_ids"], attention_mask=batch["sequence_mask"])
        return Report().loss(told.logits, batch["sequence_labels"])["text"]

    def ask(self, batch: dict[str, Tensor], phase: int, seen: dict[str, Any], swap: float = 0.5) -> Losses:
        """What the standing exchange drives: masks of its queries and boxes; and reconstruction.

        Args:
            swap: Share of the queries spoken in answers that stand in for the standing query of their class.
        """
        losses, states = self.stand(batch, seen, len(batch["images"]))
        study, named, spoken = seen["spoken"]
        place = study * LESION_CLASS + named
        newest = torch.full((len(batch["images"]) * LESION_CLASS + 1,), -1).to(place.device).scatter_reduce(
            0, place, torch.arange(len(place)).to(place.device), "amax")
        which = newest[newest >= 0]
        which = which[(torch.rand(len(which)) < swap).to(which.device)]
        study, named, spoken = study[which], named[which], spoken[which]
        queries = states["queries"].index_put((study, named - 1), spoken.to(states["queries"].dtype))
        seen["asked"] = self.model.heads["segment"].logits(queries, seen["feature"].detach())
        boxes = self.model.heads["detect"](states["<detect>"], seen["pixels"].coarse)
        segment, detect = Segment(), Detect()
        return {
            **losses,
            **{f"asked_{k}": v for k, v in segment.loss(seen["asked"], segment.target(batch, phase)).items()},
            **detect.loss(boxes, detect.target(batch)),
            **self.reconstruct(batch),
        }

    def match(self, queries: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance to the table's queries, relative to their own size."""
        meant = self.model.heads["segment"].table.detach()[classes - 1].float()
        count = torch.tensor(float(max(1, meant.numel())), device=queries.device)
        return (queries.float() - meant).square().sum() / self.model.heads["segment"].table.detach().square().mean(), count

    def metrics(self, batch: dict[str, Tensor]) -> dict[str, Term]:
        """Dice of structures pooled over the batch, with the table, the standing queries and the answers' own; of lesions."""
        target = Segment().target(batch)
        seen = self.see(batch, 0, masks=True)
        self.speak(batch, 0, seen)
        predicted = {"table": seen["masks"]}
        for name, swap in (("queries", 0.0), ("answers", 1.0)):
            self.ask(batch, 0, seen, swap)
            predicted[name] = seen["asked"]
        found = {}
        for name, (structures, _) in predicted.items():
            said, dice = structures.argmax(1), []
            for k in range(1, structures.shape[1]):
                truth = target.labels == k
                if int(truth.sum()) >= 25:
                    dice.append(2 * (truth & (said == k)).sum() / (truth.sum() + ((said == k) & (target.labels != UNKNOWN)).sum()))
            found[f"dice_{name}"] = Term(torch.stack(dice).sum(), torch.tensor(float(len(dice))))
        truth, said = target.lesion == 1, (predicted["queries"][1] > 0) & (target.lesion != UNKNOWN)
        found["dice_lesions"] = Term(2.0 * (truth & said).sum(), (truth.sum() + said.sum()).float())
        return found
