"""The reading room: a Gradio page around one session a browser. Nothing leaves the machine."""

from __future__ import annotations

import json
import logging
import os
import queue
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# oneDNN keeps what it compiles for every new shape, 1,024 of them: hundreds of MB after some twenty studies of different sizes.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import gradio as gr
from gradio.processing_utils import save_file_to_cache, save_img_array_to_cache
from gradio.utils import get_upload_folder

from omnimri.answer import NOTICE
from omnimri.io import warm

from . import export, views
from .session import REQUESTS, Session
from .store import MOST_BYTES, MOST_SESSIONS, ROOM, Store
from .words import answer_markdown, last_question, numbered, suggestions

LOOKING = "Looking at the study …"
log = logging.getLogger("omnimri.chat")
HEAD = f"""# OmniMRI
**{NOTICE}** Answers are made by a small model and can be wrong; the study stays on this machine."""
NONE_OPEN = "No study is open (one that was not used for long is forgotten). Drop an MRI on the left, or load an example."
STATIC = Path(__file__).parent / "static"
SCRIPTS = (
    '<link rel="stylesheet" href="omnimri/static/viewer.css"><script src="omnimri/static/niivue.umd.js" defer></script>'
    '<script src="omnimri/static/viewer.js" defer></script><script src="omnimri/static/folder.js" defer></script>'
)
SHOW = "(scene) => { const wait = () => window.omnimri ? window.omnimri.show(scene) : setTimeout(wait, 100); wait(); }"
FIND = "(choice) => { if (choice && window.omnimri) window.omnimri.finding(Number(choice)); }"


def key_of(request: gr.Request) -> str:
    """The session of a request: the browser's cookie, or for a client of the API its own session."""
    import hashlib

    cookie = request.cookies.get("omnimri", "") if request is not None else ""
    return cookie or hashlib.sha256(str(getattr(request, "session_hash", "")).encode()).hexdigest()[:32]


def example_file() -> str:
    """The MNI152 T1 template that nilearn carries, as a NIfTI file: an average of 152 people's real scans."""
    from nilearn.datasets import load_mni152_template

    path = Path(tempfile.gettempdir()) / f"omnimri-example-{os.getuid() if hasattr(os, 'getuid') else 0}.nii.gz"
    if not path.exists():
        partial = path.with_name(f"{uuid.uuid4().hex}.nii.gz")
        load_mni152_template(resolution=1).to_filename(partial)
        partial.replace(path)
    return str(path)


EXAMPLES = {
    "template": (example_file, "Example: the MNI152 T1 template (an average of 152 real scans, through nilearn)."),
    "patient": (lambda: str(STATIC / "patient.nii.gz"), "Example: a simulated FLAIR study of a patient with a lesion (no real person)."),
}


class Page:
    """The handlers behind the page; each finds its session by the request."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def session(self, request: gr.Request) -> Session:
        """The session of a request."""
        return self.store.of(key_of(request))

    def everything(self, session: Session, understood: str | None = None) -> tuple[Any, ...]:
        """What changes when a study or a decision does: overview, chat, scene, findings, table, report, suggestions, exports."""
        rows = [[r["name"], round(r["ml"], 1), r["percent"]] for r in export.structures(session)]
        choices = numbered(session)
        dicom, why = bool(export.source_uids(session)), export.why_no_segmentation(session)
        asked = suggestions(session)
        return (
            understood or session.overview(),
            session.chat,
            session.scene(),
            gr.update(choices=choices, value=choices[0][1] if choices else None),
            rows,
            session.review.report(session.num_slices()) if session.upload else "",
            [[e.time, e.finding, e.change, e.before, e.after] for e in session.review.audit],
            *(gr.update(value=q or "…", interactive=bool(q)) for q in asked),
            gr.update(interactive=not why),
            gr.update(interactive=dicom),
            why if session.upload else "",
            *self.rebuilt(session),
        )

    def rebuilt(self, session: Session) -> tuple[Any, ...]:
        """The reconstruction's part of the page: shown or not, its slices, and the middle one before and after."""
        if session.zero_filled is None:
            return gr.update(visible=False), gr.skip(), gr.skip()
        number = session.num_slices()
        middle = number // 2
        return gr.update(visible=True), gr.update(maximum=max(2, number), value=middle + 1), self.pictures(session, middle)

    def pictures(self, session: Session, index: int) -> Any:
        """Both images of a slice as files that go when the study is forgotten."""
        both = session.before_after(index)
        if both is None:
            return gr.skip()
        paths = [save_img_array_to_cache(image, get_upload_folder(), format="png") for image in both]
        session.hand_out_copies(paths)
        return tuple(paths)

    def before_after(self, number: float, request: gr.Request) -> Any:
        """A slice of the zero-filled and of the reconstructed image."""
        return self.pictures(self.session(request), int(number) - 1)

    def opened(self, request: gr.Request) -> tuple[Any, ...]:
        """What a reloaded page shows."""
        session = self.session(request)
        return self.everything(session, None if session.upload else NONE_OPEN)

    def open_file(self, path: str | None, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Open an uploaded study."""
        session = self.session(request)
        if path is None:
            yield self.everything(session)
            return
        yield "Reading the study …", *(gr.skip(),) * 15
        try:
            session.load(path)
        except ValueError as error:
            yield self.everything(session, f"**This file cannot be used.** {error}")
        except OSError as error:
            log.error(json.dumps({"error": type(error).__name__}))
            yield self.everything(session, "**This file cannot be kept on the server.** Its disk may be full.")
        else:
            yield self.everything(session)

    def open_example(self, name: str, request: gr.Request) -> tuple[Any, ...]:
        """Open a bundled example: `template` or `patient`."""
        if name not in EXAMPLES:
            raise gr.Error(f"expected one of {', '.join(EXAMPLES)}")
        session = self.session(request)
        make, told = EXAMPLES[name]
        session.load(make(), keep=False, told=told)
        return self.everything(session)

    def ask(self, question: str, task: str | None, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Ask; the text streams, and the work ends when nobody listens any more."""
        session = self.session(request)
        opened, began = session.opened, time.monotonic()
        task = task or next((t for words, t in REQUESTS.values() if words == question), None)
        chat = [*session.chat, {"role": "user", "content": question}, {"role": "assistant", "content": LOOKING}]
        keep = (gr.skip(),) * 14
        yield gr.skip(), chat, *keep, ""
        pieces: queue.Queue = queue.Queue()
        stopped = threading.Event()

        def hear(text: str) -> bool:
            pieces.put(("text", text))
            return not stopped.is_set() and session.opened == opened

        def work() -> None:
            try:
                pieces.put(("done", session.ask(question, task=task, on_text=hear)))
            except ValueError as error:
                pieces.put(("error", f"⚠ {error}"))
            except Exception as error:  # the page must not die with one question
                pieces.put(("error", f"⚠ The question could not be answered ({type(error).__name__})."))

        threading.Thread(target=work, daemon=True).start()
        try:
            while True:
                try:
                    kind, value = pieces.get(timeout=0.5)
                except queue.Empty:
                    kind, value = "text", ""  # a stopped generator ends at its next yield
                if kind != "text":
                    break
                waiting = chat[-1]["content"].startswith(LOOKING)
                chat[-1]["content"] = value or (f"{LOOKING} {time.monotonic() - began:.0f} s" if waiting else chat[-1]["content"])
                yield gr.skip(), chat, *keep, ""
        except GeneratorExit:
            if session.opened == opened:
                session.say(question, "*(stopped)*")  # what was written so far was not held against the masks yet
            raise
        finally:
            stopped.set()
        if session.opened == opened:
            session.say(question, value if kind == "error" else answer_markdown(value, linked=session.is_of_shown(value)))
        yield *self.everything(session), ""

    def decide(self, number: str | None, state: str, request: gr.Request) -> tuple[Any, ...]:
        """Accept, reject or reopen a finding."""
        session = self.session(request)
        try:
            session.decide(int(number or 0), state)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        found = self.everything(session)
        return *found[:3], gr.update(choices=numbered(session), value=number), *found[4:]

    def edit(self, number: str | None, place: str, comment: str, request: gr.Request) -> tuple[Any, ...]:
        """Change the words of a finding."""
        session = self.session(request)
        try:
            session.edit(int(number or 0), place=place, comment=comment)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        found = self.everything(session)
        return *found[:3], gr.update(choices=numbered(session), value=number), *found[4:]

    def detail(self, number: str | None, request: gr.Request) -> tuple[str, str, str]:
        """What is known of one finding, and its words."""
        item = self.session(request).review.items.get(int(number or 0))
        if item is None:
            return "No finding is chosen.", "", ""
        uid = f"\n\nSOPInstanceUID {item.sop_instance_uid}" if item.sop_instance_uid else ""
        told = (
            f"**{item.state}** · {item.side} · confidence {item.confidence:.2f} · {item.diameter_mm:.0f} mm · {item.volume_ml:.2f} ml · "
            f"slice {item.slice_index + 1}{uid}"
        )
        return told, item.place, item.comment

    def files(self, kind: str, request: gr.Request) -> list[str]:
        """Exports: `report`, `dicom` or `deidentify`."""
        session = self.session(request)
        if kind == "dicom" and not session.review.in_state("accepted"):
            gr.Info("No finding is accepted: the SEG is made, an SR is not.")
        try:
            task = "segmentation" if kind == "dicom" else "deidentify"
            made = (
                export.write_files(session, session.folder / "export")
                if kind == "report"
                else export.write_dicom(session, session.folder / f"export-{task}", task)
            )
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        copies = [save_file_to_cache(p, get_upload_folder()) for p in made]
        session.hand_out_copies(copies)
        return copies

    def forget(self, request: gr.Request) -> tuple[Any, ...]:
        """Remove everything of this session."""
        session = self.session(request)
        session.reset()
        return self.everything(session, "The study is forgotten.")


def build(store: Store) -> gr.Blocks:
    """The page."""
    page = Page(store)
    with gr.Blocks(title="OmniMRI", delete_cache=(600, 3600), analytics_enabled=False) as blocks:
        gr.Markdown(HEAD)
        with gr.Row():
            with gr.Column(scale=6, min_width=420):
                with gr.Row():
                    upload = gr.File(label="MRI: NIfTI, DICOM folder or zip, k-space ...", height=104, scale=3, elem_id="omni-upload")
                    with gr.Column(scale=2, min_width=150):
                        template = gr.Button("Example: template", size="sm")
                        patient = gr.Button("Example: patient with a lesion", size="sm")
                        clear = gr.Button("Forget this study", size="sm", variant="stop")
                gr.HTML('<div id="omni-viewer" aria-label="Viewer"></div>', min_height=420)
                with gr.Accordion("What was understood of the study", open=True):
                    understood = gr.Markdown(NONE_OPEN)
                with gr.Accordion("Reconstruction", open=True, visible=False) as rebuilt:
                    compare = gr.ImageSlider(
                        label="Zero-filled (left) against reconstructed (right)",
                        type="filepath",
                        format="png",
                        interactive=False,
                        height=views.VIEW_PIXELS,  # in a lower frame the two pictures do not lie on each other (Gradio 6.31)
                        buttons=[],
                    )
                    which_slice = gr.Slider(1, 2, value=1, step=1, label="Slice")
                gr.Markdown(ROOM.format(hours=store.kept_hours, most=MOST_SESSIONS, gib=MOST_BYTES / 2**30))
            with gr.Column(scale=5, min_width=380):
                with gr.Tab("Chat"):
                    chat = gr.Chatbot(
                        label="Conversation",
                        height=430,
                        buttons=["copy", "copy_all"],
                        elem_id="omni-chat",
                        placeholder="Ask about the open study.",
                    )
                    with gr.Row():
                        asked = [gr.Button("…", size="sm", interactive=False) for _ in range(3)]
                    with gr.Row():
                        buttons = {name: gr.Button(name, size="sm") for name in REQUESTS}
                    question = gr.Textbox(label="Question", placeholder="What sequence and plane is this?", max_length=2000)
                    with gr.Row():
                        send = gr.Button("Ask", variant="primary")
                        stop = gr.Button("Stop")
                with gr.Tab("Findings"):
                    finding = gr.Radio([], label="Findings, the largest first: choose one to see it", elem_id="omni-findings")
                    told = gr.Markdown("No finding is chosen.")
                    with gr.Row():
                        decisions = {
                            "accepted": gr.Button("Accept", variant="primary", size="sm"),
                            "rejected": gr.Button("Reject", size="sm"),
                            "open": gr.Button("Reopen", size="sm"),
                        }
                    place = gr.Textbox(label="Place", max_length=200)
                    comment = gr.Textbox(label="Comment", max_length=200)
                    save = gr.Button("Save words", size="sm")
                    report = gr.Markdown(label="Report of what was accepted", container=True)
                    with gr.Accordion("Every decision", open=False):
                        audit = gr.Dataframe(headers=["time (UTC)", "finding", "change", "before", "after"], interactive=False)
                with gr.Tab("Volumes"):
                    gr.Markdown("The volume inside the skull is all that the last look outlined, fluid included.")
                    table = gr.Dataframe(headers=["structure", "ml", "% of the volume inside the skull"], interactive=False, max_height=520)
                with gr.Tab("Export"):
                    gr.Markdown(
                        "Report (PDF, Markdown, JSON), table (CSV), masks (NIfTI) and key images (PNG); for DICOM studies also SEG and, of "
                        "accepted findings, SR on the source's instances, and a de-identified copy. "
                        "**A face can be rebuilt from a whole head.**"
                    )
                    make = gr.Button("Make report and masks", size="sm")
                    seg = gr.Button("Make DICOM SEG and SR", size="sm", interactive=False)
                    bare = gr.Button("Make de-identified DICOM copy", size="sm", interactive=False)
                    why = gr.Markdown()
                    files = gr.File(label="Files", file_count="multiple", interactive=False)
        scene = gr.JSON(visible="hidden", elem_id="omni-scene")
        shown = [understood, chat, scene, finding, table, report, audit, *asked, seg, bare, why, rebuilt, which_slice, compare]
        which_slice.change(page.before_after, which_slice, compare, show_progress="hidden", api_name="before_after")
        scene.change(None, scene, None, js=SHOW)
        finding.change(None, finding, None, js=FIND)
        finding.change(page.detail, finding, [told, place, comment], show_progress="hidden", api_name="finding")
        blocks.load(page.opened, None, shown, show_progress="hidden", api_name="state")
        upload.upload(page.open_file, upload, shown, show_progress="full", api_name="open").then(
            lambda: None, None, upload, show_progress="hidden", api_name=False
        )  # the box is empty again: the study is told of below it, and the next one can be dropped
        for made, name in ((template, "template"), (patient, "patient")):
            which = gr.State(name)
            made.click(page.open_example, which, shown, api_name=f"example_{name}")
        clear.click(page.forget, None, shown, api_name="forget")
        answered = [*shown, question]
        no_task = gr.State(None)
        one = {"concurrency_id": "ask", "concurrency_limit": 1}  # one line for all who wait, so that the place shown is true
        running = [
            question.submit(page.ask, [question, no_task], answered, api_name=False, **one),
            send.click(page.ask, [question, no_task], answered, api_name="ask", **one),
            chat.retry(last_question, chat, question).then(page.ask, [question, no_task], answered, api_name=False, **one),
        ]
        running += [made.click(page.ask, [made, no_task], answered, api_name=False, **one) for made in asked]
        for name, (words, task) in REQUESTS.items():
            running.append(buttons[name].click(page.ask, [gr.State(words), gr.State(task)], answered, api_name=task, **one))
        stop.click(None, None, None, cancels=running)
        for state, made in decisions.items():
            made.click(page.decide, [finding, gr.State(state)], shown, api_name="reopen" if state == "open" else state)
        save.click(page.edit, [finding, place, comment], shown, api_name="edit")
        for made, kind in ((make, "report"), (seg, "dicom"), (bare, "deidentify")):
            made.click(page.files, gr.State(kind), files, api_name=f"export_{kind}")
        gr.Markdown(f"{NOTICE} Independent implementation of ideas from arXiv 2508.17524.")
    warm()
    return blocks
