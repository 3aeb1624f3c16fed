"""Assistant: (Study, question) -> Answer in scanner space. Evidence first, then words, then every number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .anatomy import LESION, LESION_LABEL, NAMES, STRUCTURES, by_known_names, resolve_names
from .answer import SIDES_UNKNOWN, UNLIKE, Answer, Finding, StructureVolume, fill_slots, lesion_measures, sentences
from .checkpoint import EMBEDDED, load_model
from .conversation import IGNORE, Message, Rendered, card, render
from .examination import Examination, answer_labels, examine
from .example import LESION_CLASS, language_slices, named_class, segment_classes
from .factcheck import ground_findings, ground_words, of_lesions
from .generation import generate
from .knowledge import GENERAL, as_known
from .lesions import LesionRule
from .measure import measure
from .memory import give_back_memory, keep_freed_memory
from .reconstruction import Reconstruction, asks_to_reconstruct, reconstruct
from .tasks import TASKS
from .tokens import digit_ids
from .volume import KSpace, Study, Volume

MAX_QUESTION = 2000
MAX_HISTORY = 8
"""Messages of a conversation that the model is shown again."""
KEPT_EXAMINATIONS = 2
LEAST_VISIBLE = 25
"""Voxels of a mask from which on its structure may be called visible."""
NO_RAW_DATA = "This study holds an image and no raw data: there is nothing to reconstruct."
LEAST_SENSITIVITY = 0.5
"""A checkpoint that found fewer of the held-out lesions may not say that there are none."""


class StoppedError(ValueError):
    """Whoever listened did not want the answer any more."""


class Assistant:
    """A loaded model that answers questions about studies. Thread-safe: one question at a time."""

    def __init__(self, checkpoint: str | Path | None = None, *, device: str = "cpu") -> None:
        """Load a checkpoint, the embedded one by default.

        Raises:
            ValueError: the checkpoint is missing, damaged or of another kind.
        """
        keep_freed_memory()
        self.model, self.tokenizer, self.digest = load_model(checkpoint or EMBEDDED, device=device)
        self.name = "OmniMRI embedded" if checkpoint is None else Path(checkpoint).name
        self.rule = LesionRule.of(self.model.config)
        self.can_deny = getattr(self.model.config, "lesion_sensitivity", 0.0) >= LEAST_SENSITIVITY
        self.no_digits = digit_ids(self.tokenizer)
        self._seen: OrderedDict[int, tuple[Volume, Examination]] = OrderedDict()
        self._lock = Lock()

    # --- looking ----------------------------------------------------------------------------------------------

    def examine(self, volume: Volume, on_text: Callable[[str], bool] | None = None) -> Examination:
        """The examination of a volume; the last few are kept.

        Raises:
            StoppedError: `on_text`, which is called now and then, returned False.
        """
        key = id(volume)
        kept = self._seen.get(key)
        if kept is None or kept[0] is not volume:
            seen = examine(self.model, self.tokenizer, volume, rule=self.rule, check=_stopper(on_text))
            give_back_memory()
            # Another thread may forget at any time: what is returned is held here.
            self._seen[key] = kept = (volume, seen)
            while len(self._seen) > KEPT_EXAMINATIONS:
                self._seen.popitem(last=False)
        return kept[1]

    @property
    def answering(self) -> bool:
        """Whether a question is being answered."""
        return self._lock.locked()

    def forget(self, study: Study | None = None) -> None:
        """Drop everything kept of a study, or of all."""
        gone = [id(v) for v in study.volumes] if study is not None else list(self._seen)
        for key in gone:
            self._seen.pop(key, None)

    def reconstruct(self, kspace: KSpace, *, coils: str = "learned", on_text: Callable[[str], bool] | None = None) -> Reconstruction:
        """Reconstruct k-space (`omnimri.reconstruction.reconstruct`).

        Raises:
            StoppedError: `on_text`, which is called between slices, returned False.
        """
        return reconstruct(self.model, kspace, coils=coils, check=_stopper(on_text))

    @torch.inference_mode()
    def segment(self, study: Study, structures: str = "all") -> Answer:
        """Label map of the named structures (FreeSurfer ids; lesions 25 and 57), without words.

        Raises:
            ValueError: a structure is not known, or the study has no image.
        """
        wanted = resolve_names(structures)
        with self._lock:
            seen = self.examine(study.primary)
            return self._answer(study, seen, "" if seen.in_scope else UNLIKE, "segment", seen.labels, wanted)

    # --- answering --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def answer(
        self,
        study: Study,
        question: str,
        *,
        history: Sequence[Message] = (),
        task: str | None = None,
        on_text: Callable[[str], bool] | None = None,
        beams: int = 1,
    ) -> Answer:
        """Answer one question about a study.

        Args:
            history: Earlier turns, with slots (`Answer.raw`), never filled text.
            task: Forces a task token; the model chooses where None.
            on_text: Called with the text so far, which is empty while the study is looked at; return False to stop.
            beams: Beams of the search; streaming needs 1.

        Raises:
            ValueError: the question is empty or too long, the task is unknown, or the answer was stopped before it began.
        """
        question = question.strip()
        if not question:
            raise ValueError("expected a question, got none; ask for instance 'Write a report.'")
        if len(question) > MAX_QUESTION:
            raise ValueError(f"expected a question of at most {MAX_QUESTION} characters, got {len(question)}; shorten it")
        if task is not None and task not in TASKS:
            raise ValueError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
        with self._lock:
            asked, rest = asks_to_reconstruct(question)
            asked = asked or task == "reconstruct"
            if study.kspace is not None and (asked or not study.volumes):
                return self._rebuild(study, rest, history, None if asked else task, on_text, beams)
            if asked:
                seen = self.examine(study.primary)
                return self._answer(study, seen, NO_RAW_DATA, "text", torch.zeros_like(seen.labels), ())
            return self._speak(study, question, history, task, on_text, beams)

    def _rebuild(self, study: Study, rest: str, history: Sequence[Message], task: str | None,
                 on_text: Callable[[str], bool] | None, beams: int) -> Answer:
        """Reconstruct, and answer what else is asked on the image."""
        assert study.kspace is not None
        found = self.reconstruct(study.kspace, on_text=on_text)
        rebuilt = replace(study, kspace=None, volumes=(found.image,), warnings=(*study.warnings, *found.warnings))
        if on_text is not None:
            on_text(found.sentence())
        if rest:
            hear = None if on_text is None else lambda text: on_text(f"{found.sentence()} {text}")
            told = self._speak(rebuilt, rest, history, task, hear, beams, made=True)
        else:
            seen = self.examine(found.image, on_text)
            told = self._answer(rebuilt, seen, "", "reconstruct", torch.zeros_like(seen.labels), (), raw="<reconstruct>")
        return replace(told, text=f"{found.sentence()} {told.text}".strip(), reconstruction=found)

    def _speak(
        self,
        study: Study,
        question: str,
        history: Sequence[Message],
        task: str | None,
        on_text: Callable[[str], bool] | None,
        beams: int,
        made: bool = False,
    ) -> Answer:
        """Look, write, hold what was written against what was seen.

        Args:
            made: The image was reconstructed for this very question.
        """
        wanted = study.asked_for(question)
        asked = [question] if wanted else [question, *(m.text for m in reversed(history) if m.role == "user")]
        named = next((v for q in asked if (v := study.named(q)) is not None), None)  # a follow-up is about the series before
        seen = self.examine(named or study.primary, on_text)
        if not seen.in_scope:
            return self._answer(study, seen, UNLIKE, task or "text", torch.zeros_like(seen.labels), ())
        study_card = card(seen.grid.plane, seen.sequence, seen.record.lesion_places, seen.record.signal)
        prefix = "" if task in (None, "segment") else TASKS[task].token
        tokens = len(language_slices(seen.grid.size[0], self.model.config.max_slices)) * self.model.config.tokens_per_slice
        messages = [*history[-MAX_HISTORY:], Message("user", by_known_names(question))]
        while True:
            rendered = render(messages, self.tokenizer, study=study_card, num_image_tokens=tokens, answer_prefix=prefix)
            if len(rendered.ids) < self.model.config.text_config.max_position_embeddings - 400 or len(messages) == 1:
                break
            messages = messages[2:]
        ids = torch.tensor([rendered.ids])
        opening = self.tokenizer(f" {seen.grid.plane.capitalize()}", add_special_tokens=False)["input_ids"]
        written = generate(self.model, self.tokenizer, ids, seen, self.no_digits, on_text, beams, opening)
        raw = prefix + self.tokenizer.decode(written, skip_special_tokens=False).replace("<|im_end|>", "")
        raw = as_known(raw.replace("<|endoftext|>", "").strip(), question if task is None else "")
        if task == "segment" and "<segment>" not in raw:
            raw = "Every structure is outlined <segment>."
            written = self.tokenizer(raw, add_special_tokens=False)["input_ids"]
        if raw in GENERAL:
            return self._answer(study, seen, raw, "text", torch.zeros_like(seen.labels), ())
        counts = torch.bincount(seen.labels.flatten(), minlength=256)
        visible = {s.name for s in STRUCTURES if int(counts[s.label]) >= LEAST_VISIBLE}
        notes: tuple[str, ...] = ()
        if named is None and wanted and (wanted == "other" or wanted != seen.sequence):
            notes = (f"no series is known to be the one that was named: this is said of {seen.volume.name or 'the only image'}",)
        before = history[-1].text if history else ""
        raw, more = ground_words(question, before, raw, sequence=(seen.sequence, seen.sequence_source), plane=seen.plane, visible=visible)
        notes += more
        if more:
            written = self.tokenizer(raw, add_special_tokens=False)["input_ids"]
        chosen = next((t.name for t in TASKS.values() if raw.startswith(t.token)), None)
        if chosen is None:  # a part of a report carries no task token
            chosen = "detect" if of_lesions(raw) else "segment" if "<segment>" in raw else "text"
        if chosen == "reconstruct":
            if study.kspace is not None:
                return self._rebuild(study, "", history, None, on_text, beams)
            nothing = torch.zeros_like(seen.labels)
            return self._answer(study, seen, "", chosen, nothing, (), raw=raw) if made else self._answer(
                study, seen, NO_RAW_DATA, "text", nothing, ())
        labels, drawn = self._draw(seen, ids[0].tolist(), written, chosen)
        grounded = ground_findings(question, TASKS["report"].read(raw), chosen, seen.lesions, sequence=seen.sequence, visible=visible,
                                   signal=dict(s.split(": ") for s in seen.record.signal), can_deny=self.can_deny)
        some = f"{len(visible)} of {len(NAMES)} structures are outlined; the others are not in this image."
        text = some if set(drawn) >= set(NAMES) > visible else grounded.raw
        return self._answer(study, seen, text, chosen, labels, drawn, notes=(*grounded.notes, *notes), lesions=grounded.lesions, raw=raw)

    def _draw(self, seen: Examination, prompt: list[int], written: list[int], chosen: str) -> tuple[Tensor, tuple[str, ...]]:
        """Masks of the structures that the answer's own `<segment>` states ask for: labels in scan space, and the names shown."""
        full = prompt + written
        classes = segment_classes(Rendered(full, [IGNORE] * len(prompt) + written), self.tokenizer)
        own = [(i, k) for i, k in enumerate(classes) if 0 < k < LESION_CLASS]
        everything = chosen == "segment" and not own
        names: tuple[str, ...] = tuple(dict.fromkeys(NAMES[k - 1] for _, k in own))
        if chosen in ("detect", "report"):
            return seen.labels, (LESION,)
        if everything and "<segment>" in self.tokenizer.decode(written):
            return seen.labels, (*NAMES, LESION)
        if not own:
            return seen.labels, ()
        ids = torch.tensor([full])
        hidden = self.model(input_ids=ids, visual=seen.visual, evidence=seen.evidence, logits_to_keep=1).hidden_states[0]
        queries = {k: self.model.heads["segment"].queries(hidden[0, i]) for i, k in own}
        return answer_labels(self.model, seen, queries), names

    def _answer(
        self,
        study: Study,
        seen: Examination,
        text: str,
        task: str,
        labels: Tensor,
        wanted: tuple[str, ...],
        *,
        notes: tuple[str, ...] = (),
        lesions: Sequence[Any] = (),
        raw: str = "",
    ) -> Answer:
        """Measure, fill slots and put everything into scanner space."""
        volume = seen.volume
        lesion_map = seen.lesion_label_map()
        shown_map = torch.zeros_like(labels)
        structures: list[StructureVolume] = []
        for structure in STRUCTURES:
            if structure.name in wanted:
                mask = labels == structure.label
                shown_map[mask] = structure.label
        covered = shown_map
        if LESION in wanted or lesions:
            shown_map = torch.where(lesion_map > 0, lesion_map, shown_map)
        for structure in STRUCTURES:
            if structure.name in wanted:
                voxels = int((covered == structure.label).sum())  # with the lesions in it, as sentences say
                structures.append(StructureVolume(structure.label, structure.name, voxels, voxels * volume.voxel_ml))
        if LESION in wanted:
            for side, label in (("left", LESION_LABEL["left"]), ("right", LESION_LABEL["right"])):
                voxels = int((shown_map == label).sum())
                structures.append(StructureVolume(label, f"{side} {LESION}", voxels, voxels * volume.voxel_ml))
        measures, kept_text, empty = self._measures(text, labels, lesions, seen)
        filled = fill_slots(kept_text, measures, seen, seen.lesions) if kept_text else _segment_text(structures)
        told = seen.lesions if LESION in wanted or task in ("detect", "report") else lesions
        if len(study.volumes) > 1:
            notes = (f"answered on {volume.name} ({seen.sequence}) of {len(study.volumes)} series; name another to ask about it", *notes)
        if not seen.in_scope:
            notes = ("nothing is outlined: the study is unlike the images the model was trained on", *notes)
        warnings = (*study.warnings, *seen.notes, *notes, *(f"{name}: empty mask, sentence removed" for name in empty))
        if not volume.oriented:
            warnings = (*warnings, SIDES_UNKNOWN)
        return Answer(
            text=filled,
            raw=raw or text,
            task=task,
            study=self.describe(study, seen),
            scope={
                "in_scope": seen.in_scope,
                "score": round(seen.scope_score, 3),
                "reason": self._scope_reason(seen),
            },
            model={"name": self.name, "checkpoint_sha256": self.digest},
            findings=tuple(self._finding(x, seen) for x in told),
            structures=tuple(structures),
            warnings=tuple(dict.fromkeys(warnings)),
            labels=shown_map,
            covered=covered,
            lesion_ranks=seen.lesion_ranks,
            affine=volume.affine,
            brain_ml=float((seen.labels > 0).sum()) * volume.voxel_ml,
        )

    def _measures(
        self, text: str, labels: Tensor, lesions: Sequence[Any], seen: Examination
    ) -> tuple[list[dict[str, str]], str, list[str]]:
        """Slot texts for each `<segment>`; sentences on a structure whose mask is empty are replaced."""
        by_name = {s.name: s for s in STRUCTURES}
        measures: list[dict[str, str]] = []
        kept: list[str] = []
        empty: list[str] = []
        waiting = list(lesions)
        slices = seen.volume.shape[seen.slice_axis]
        for sentence in sentences(text):
            parts = sentence.split("<segment>")[:-1]
            found: list[dict[str, str]] = []
            for part in parts:
                k = named_class(part)
                if k == LESION_CLASS and waiting:
                    found.append(lesion_measures(waiting.pop(0), slices))
                elif 0 < k < LESION_CLASS:
                    mask = labels == by_name[NAMES[k - 1]].label
                    if bool(mask.any()):
                        m = measure(mask, seen.volume, slice_axis=seen.slice_axis)
                        found.append({"<ml>": f"{m.volume_ml:.1f}", "<mm>": f"{m.diameter_mm:.0f}",
                                      "<slice>": str(m.slice_index + 1),
                                      "cite": f"(largest on slice {m.slice_index + 1} of {slices})"})
                    else:
                        empty.append(NAMES[k - 1])
                else:
                    found.append({})
            if len(found) == len(parts):
                kept.append(sentence)
                measures += found
                continue
            for name in (NAMES[named_class(p) - 1] for p in parts):
                gone = name in empty
                kept.append(f"The {name} could not be outlined in this study." if gone else f"Outlined: the {name} <segment>, <ml> ml.")
            measures += found
        return measures, " ".join(kept), empty

    def _scope_reason(self, seen: Examination) -> str:
        if float(self.model.scope_limit) == 0:
            return "this checkpoint is not calibrated: it cannot tell what lies outside its scope"
        return "" if seen.in_scope else "the image is unlike those of the training data"

    def _finding(self, lesion: Any, seen: Examination) -> Finding:
        label = LESION_LABEL.get(lesion.side)
        source = seen.volume.source
        index = lesion.measured.slice_index
        cited = source[index] if seen.slice_axis == 2 and index < len(source) else None
        return Finding(lesion, label, cited)

    def describe(self, study: Study, seen: Examination) -> dict[str, Any]:
        """The contract's `study` object."""
        return {
            "sequence": seen.sequence,
            "sequence_source": seen.sequence_source,
            "plane": seen.plane,
            "shape": list(seen.volume.shape),
            "spacing_mm": [round(v, 3) for v in seen.volume.spacing_mm],
            "series": len(study.volumes),
            "used": seen.volume.name,
            "oriented": seen.volume.oriented,
        }


def _stopper(on_text: Callable[[str], bool] | None) -> Callable[[], None]:
    """What ends the work where nobody listens any more."""

    def check() -> None:
        if on_text is not None and on_text("") is False:
            raise StoppedError("the answer was stopped")

    return check


def _segment_text(structures: Sequence[StructureVolume]) -> str:
    found = sum(s.voxels > 0 for s in structures if s.name in NAMES)
    return f"{found} structures are outlined." if structures else ""
