"""Session: one person's study, conversation and views. No web framework in it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Lock, RLock
from typing import Any

import numpy as np
import torch

from omnimri.answer import Answer
from omnimri.assistant import Assistant
from omnimri.conversation import Message
from omnimri.grid import closest_axes, foreground, plane_of
from omnimri.io import open_study, warm
from omnimri.io.nifti import write_nifti
from omnimri.memory import give_back_memory
from omnimri.volume import Study, Volume

from . import views
from .files import HandedOut, in_use, plain_name, write_json
from .review import Review
from .views import FINDING, LESIONS

REQUESTS = {
    "Report": ("Write a report.", "report"),
    "Segment": ("Segment everything.", "segment"),
    "Find lesions": ("Find lesions.", "detect"),
    "Reconstruct": ("Reconstruct this.", "reconstruct"),
}
"""What each button asks, and its task."""


OTHER_MODEL = "The model has changed since: its images, masks, findings and what was decided about them are gone. Ask again."
FACE_SHARE = 1.5
"""A head whose foreground is this much larger than the brain is shown with skin and face."""


class Session:
    """A study that was opened, what was asked about it, what was decided, and what may be shown of it.

    Everything that must survive a restart lies in its folder: the uploaded file, masks, conversation, review. What is in memory
    can be read from there again.
    """

    def __init__(self, assistant: Assistant, folder: Path) -> None:
        self.assistant, self.folder = assistant, folder
        self.study: Study | None = None
        self.shown: Volume | None = None
        self.history: list[Message] = []
        self.chat: list[dict[str, str]] = []
        """What the page shows, filled text."""
        self.labels: torch.Tensor | None = None
        self.ranks: torch.Tensor | None = None
        """(X, Y, Z) uint8: 0, or the number of a finding."""
        self.covered: torch.Tensor | None = None
        """(X, Y, Z) int32: structures under the findings."""
        self.review = Review()
        self.upload: str | None = None
        """Name of the study's file in `upload/`, or of an example."""
        self.outside: list[str] = []
        """Copies of exports that the server hands out from its own cache."""
        self.handed_out = HandedOut(folder / "viewer")
        self.told = ""
        """What the study is, where the page knows it: a bundled example."""
        self.brain_ml = 0.0
        """All that the last answer outlined inside the skull."""
        self.face = False
        """Whether much more than the brain is in the image."""
        self.zero_filled: Volume | None = None
        """What the samples of k-space give without any model."""
        self._saving = Lock()
        self.revision = 0
        self.opened = secrets.token_hex(8)
        """Changes with the study: what belongs to another is dropped."""
        self.busy = RLock()
        """Held while a question is answered: the study stays in memory until then."""
        self.users = 0
        """Requests that need the study in memory now (`in_use`)."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._restore()

    # --- one study --------------------------------------------------------------------------------------------

    @in_use
    def load(self, path: str | Path, *, keep: bool = True, told: str = "") -> str:
        """Open a study and tell what was understood.

        Args:
            keep: Take the file into the session's folder; a bundled example stays where it is.
            told: What to say of the study before all else.

        Raises:
            ValueError: it cannot be used; the session is empty then.
        """
        self.reset()
        path = Path(path)
        if keep:
            place = self.folder / "upload"
            place.mkdir()
            shutil.move(str(path), place / plain_name(path.name))
            path = place / plain_name(path.name)
        try:
            self.study = open_study(path)
        except ValueError:
            self.reset()
            raise
        warm()
        self.upload, self.told = str(path), told
        if self.study.kspace is not None and self.study.kspace.num_slices > len(self.study.kspace.data):
            self.reset()
            raise ValueError("expected k-space that fits into memory on this page, got a larger file; use 'omnimri reconstruct'")
        if self.study.volumes:
            self.shown = self.study.primary
        self._save()
        return self.overview()

    def _open_again(self) -> None:
        """Read the study from disk where it was unloaded."""
        if self.study is not None or self.upload is None:
            return
        self.study = open_study(self.upload)
        if (self.folder / "reconstruction.nii").exists():
            rebuilt = open_study(self.folder / "reconstruction.nii").primary
            oriented = self.study.kspace.oriented if self.study.kspace is not None else False
            self.shown = replace(rebuilt, oriented=oriented, name="reconstruction")
            if (self.folder / "zero_filled.nii").exists():  # earlier versions kept none
                self.zero_filled = replace(open_study(self.folder / "zero_filled.nii").primary, oriented=oriented, name="zero-filled")
            self.study = replace(self.study, volumes=(self.shown,))
        elif self.study.volumes:
            self.shown = self.study.primary
        if (self.folder / "masks.npz").exists():
            with np.load(self.folder / "masks.npz", allow_pickle=False) as f:
                self.labels = torch.from_numpy(f["labels"].astype(np.int32))
                self.ranks = torch.from_numpy(f["ranks"])
                self.covered = torch.from_numpy(f["covered"].astype(np.int32)) if "covered" in f else None

    def unload(self) -> None:
        """Leave memory; what is on disk stays."""
        if self.study is not None:
            self.assistant.forget(self.study)
        self.study = self.shown = self.labels = self.ranks = self.covered = self.zero_filled = None
        self.handed_out.clear()
        give_back_memory()

    def voxel_bytes(self) -> int:
        """Memory of the images held."""
        study = self.study
        arrays = [v.voxels for v in study.volumes] + ([study.kspace.data] if study.kspace is not None else []) if study else []
        return sum(a.numel() * a.element_size() for a in arrays)

    def touch(self) -> None:
        """Count as used now."""
        with contextlib.suppress(OSError):
            os.utime(self.folder)

    def reset(self) -> None:
        """Forget the study and everything said about it."""
        self.unload()
        self.opened = secrets.token_hex(8)
        self.history, self.chat, self.review, self.upload = [], [], Review(), None
        self.told, self.brain_ml, self.face = "", 0.0, False
        for name in self.outside:
            Path(name).unlink(missing_ok=True)
        self.outside = []
        self.revision += 1
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Forget everything and remove the session's folder."""
        self.reset()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- on disk ----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        with self._saving:  # an answer and a decision may be kept at once; the newest must be the last
            self.revision += 1
            told = {
                "upload": self.upload,
                "model": self.assistant.digest,
                "told": self.told,
                "brain_ml": self.brain_ml,
                "face": self.face,
                "history": [[m.role, m.text] for m in self.history],
                "chat": self.chat,
                "review": self.review.to_json(),
                "outside": self.outside,
                "revision": self.revision,
            }
            write_json(self.folder / "session.json", told)

    def _restore(self) -> None:
        try:
            told = json.loads((self.folder / "session.json").read_text())
        except (OSError, ValueError):
            return
        self.upload, self.chat, self.revision = told["upload"], told["chat"], told["revision"]
        self.outside, self.told = told["outside"], told.get("told", "")
        self.brain_ml, self.face = told.get("brain_ml", 0.0), told.get("face", False)
        self.history = [Message(r, t) for r, t in told["history"]]
        self.review = Review.from_json(told["review"])
        if self.upload is None or not Path(self.upload).exists():
            self.reset()
        elif told.get("model") != self.assistant.digest and self.chat:
            # What another model outlined and a person decided about it does not pass for this one's.
            self.history, self.review, self.brain_ml = [], Review(), 0.0
            for name in ("masks.npz", "reconstruction.nii", "zero_filled.nii"):
                (self.folder / name).unlink(missing_ok=True)
            self.chat.append({"role": "assistant", "content": OTHER_MODEL})
            self._save()

    # --- conversation -----------------------------------------------------------------------------------------

    def overview(self) -> str:
        """What was understood of the study, in Markdown."""
        self._open_again()
        return "No study is open." if self.study is None else views.described(self.study, self.told, self.face)

    def ask(self, question: str, *, task: str | None = None, on_text: Callable[[str], bool] | None = None) -> Answer:
        """Ask about the open study; the conversation remembers slots, never filled text.

        Raises:
            ValueError: no study is open, it was forgotten meanwhile, or the question cannot be used.
        """
        with self.busy:
            self._open_again()
            study, opened = self.study, self.opened
            if study is None:
                raise ValueError("no study is open; upload an MRI or load an example first")
            try:
                answer = self.assistant.answer(study, question, history=self.history, task=task, on_text=on_text)
            finally:
                if self.opened != opened:
                    self.assistant.forget()  # whatever was looked at meanwhile
            if self.opened != opened:
                raise ValueError("the study was forgotten before the answer was ready")
            self._take(study, question, answer)
            return answer

    def _take(self, study: Study, question: str, answer: Answer) -> None:
        """Keep what an answer says, shows and finds."""
        self.history += [Message("user", question), Message("assistant", answer.raw)]
        if answer.reconstruction is not None:
            self.assistant.forget(study)
            self.shown, self.zero_filled = answer.reconstruction.image, answer.reconstruction.zero_filled
            warnings = tuple(dict.fromkeys((*study.warnings, *answer.reconstruction.warnings)))
            self.study = replace(study, volumes=(self.shown,), warnings=warnings)
            for name, volume in (("zero_filled", self.zero_filled), ("reconstruction", self.shown)):
                write_nifti(self.folder / f"{name}.nii", volume.voxels[0], volume.affine)
        if not self.is_of_shown(answer):  # another series was asked about: what is said stays, masks and findings do not mix
            self._save()
            return
        if answer.brain_ml and self.shown is not None:
            self.brain_ml = answer.brain_ml
            self.face = float(foreground(self.shown).sum()) * self.shown.voxel_ml > FACE_SHARE * self.brain_ml
        if answer.labels is not None and bool(answer.labels.any()):
            labels = answer.labels
            if not answer.findings and self.ranks is not None and self.labels is not None:  # what was found stays outlined
                found = (self.ranks > 0) & torch.isin(self.labels, torch.tensor(LESIONS, dtype=self.labels.dtype))
                labels = torch.where(found, self.labels, labels)
            covered = answer.covered
            if self.covered is not None and (covered is None or not bool(covered.any())):  # lesions alone: structures stay outlined
                covered, labels = self.covered, torch.where(labels > 0, labels, self.covered)
            self.labels, self.covered = labels, covered
        if answer.findings:
            self.ranks = answer.lesion_ranks
        self.review.take(answer)
        if self.labels is not None:
            ranks = self.ranks if self.ranks is not None else torch.zeros_like(self.labels, dtype=torch.uint8)
            partial = self.folder / f".{secrets.token_hex(4)}.npz"
            covered = {} if self.covered is None else {"covered": self.covered.numpy().astype(np.uint16)}
            np.savez_compressed(partial, labels=self.labels.numpy().astype(np.uint16), ranks=ranks.numpy(), **covered)
            os.replace(partial, self.folder / "masks.npz")
        self._save()

    def is_of_shown(self, answer: Answer) -> bool:
        """Whether an answer's masks are of the series that the viewer shows: another on the same lattice has other findings."""
        if self.shown is not None and answer.study.get("used", self.shown.name) != self.shown.name:
            return False
        if answer.labels is None or answer.affine is None or self.shown is None:
            return True
        return answer.labels.shape == self.shown.shape and torch.equal(answer.affine, self.shown.affine)

    def say(self, question: str, answer: str) -> None:
        """Add to what the page shows of the conversation."""
        self.chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        self._save()

    @in_use
    def decide(self, number: int, state: str) -> None:
        """Accept or reject a finding, or open it again; kept on disk before this returns."""
        self.review.decide(number, state)
        self._save()

    def edit(self, number: int, *, place: str, comment: str) -> None:
        """Change the words of a finding; kept on disk before this returns."""
        self.review.edit(number, place=place, comment=comment)
        self._save()

    def hand_out_copies(self, paths: list[str]) -> None:
        """Remember copies that lie elsewhere, so that they go when the study is forgotten."""
        self.outside += [p for p in paths if p not in self.outside]
        self._save()

    def num_slices(self) -> int:
        """Slices along the axis that findings are cited by."""
        self._open_again()
        return 1 if self.shown is None else views.slices(self.shown, plane_of(self.shown)[0])

    # --- the viewer -------------------------------------------------------------------------------------------

    @in_use
    def scene(self) -> dict[str, Any]:
        """What the viewer shows: where to fetch volumes and masks, labels with their colours, places of findings."""
        self._open_again()
        if self.study is None or self.shown is None:
            return {"revision": self.revision}
        listed = [(v.name or "study", v) for v in (self.shown, *(v for v in self.study.volumes if v is not self.shown))]
        if self.zero_filled is not None:
            listed.append(("zero-filled", self.zero_filled))
        volumes = [{"name": name, "url": self.handed_out.address(name, v.voxels, v.affine)} for name, v in listed]
        overlay, drawn = None, self.drawn()
        if drawn is not None:
            overlay = {
                "url": self.handed_out.address("masks", drawn[None], self.shown.affine),
                "labels": views.segments(drawn),
                "of": listed[0][0],
            }
        home = self.shown.affine @ torch.tensor([*((n - 1) / 2 for n in self.shown.shape), 1.0], dtype=torch.float64)
        first = next(iter(self.review.in_state("accepted") or self.review.in_state("open")), None)
        return {
            "revision": self.revision,
            "study": self.opened,
            "volumes": volumes,
            "overlay": overlay,
            "oriented": self.shown.oriented,
            "home": list(first.centre_mm) if first else home[:3].tolist(),
            "step_mm": [self.shown.spacing_mm[a] for a in closest_axes(self.shown.affine)],
            "findings": [
                {"number": i.number, "label": self.finding_label(i.number), "mm": list(i.centre_mm)} for i in self.review.items.values()
            ],
            "compare": "zero-filled" if self.zero_filled is not None else "",
        }

    def drawn(self) -> torch.Tensor | None:
        """(X, Y, Z) int32: the masks as reviewed: each finding that was not rejected under its own label, structures under FreeSurfer's."""
        return self._masks({k: self.finding_label(k) for k in self.review.items})

    def reviewed(self) -> torch.Tensor | None:
        """(X, Y, Z) int32: FreeSurfer's labels without the findings that were rejected."""
        return self._masks({})

    def _masks(self, findings: dict[int, int]) -> torch.Tensor | None:
        """The masks with other labels for some findings; for those that were rejected, the structures they lie on."""
        self._open_again()
        if self.labels is None or self.shown is None or self.labels.shape != self.shown.shape:
            return None
        if self.ranks is None or self.ranks.shape != self.labels.shape:
            return self.labels
        table = torch.full((256,), -1, dtype=self.labels.dtype)
        for number, label in (findings | {i.number: -2 for i in self.review.in_state("rejected")}).items():
            table[number] = label
        wanted = table[self.ranks.long()]
        under = torch.zeros_like(self.labels) if self.covered is None else self.covered
        return torch.where(wanted >= 0, wanted, torch.where(wanted == -2, under, self.labels))

    @staticmethod
    def finding_label(number: int) -> int:
        """The label of a finding in `drawn`."""
        return FINDING + number

    @in_use
    def key_image(self, plane: str) -> np.ndarray:
        """The slice of a plane that shows most of what was not rejected, with masks."""
        assert self.shown is not None
        labels = self.reviewed()
        return views.draw(self.shown, plane, views.best_slice(self.shown, labels, plane), labels=labels)

    @in_use
    def before_after(self, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        """A slice, in the file's order, of the zero-filled and of the reconstructed image; None where nothing was reconstructed."""
        self._open_again()
        if self.zero_filled is None or self.shown is None:
            return None
        plane = plane_of(self.shown)[0]
        index = views.recount(self.shown, plane, index)
        return views.draw(self.shown, plane, index, voxels=self.zero_filled.voxels[0]), views.draw(self.shown, plane, index)
