"""The Gradio page on 127.0.0.1. Nothing leaves the machine."""

from __future__ import annotations

import argparse
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

import gradio as gr

from omnimri.anatomy import PLANES
from omnimri.answer import NOTICE
from omnimri.assistant import Assistant

from .session import REQUESTS, Session

FILE_TYPES = [".npy", ".nii", ".gz", ".mgh", ".mgz", ".nrrd", ".mha", ".mnc", ".h5", ".hdf5", ".dcm", ".ima", ".zip", ".png", ".jpg",
              ".jpeg"]
MAX_SESSIONS = 8
IDLE_SECONDS = 3600
HEAD = f"""# OmniMRI
**{NOTICE}** Answers are made by a small model and can be wrong; the study stays on this machine."""


class Sessions:
    """A bounded number of sessions, each under a key only its browser holds."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self._held: dict[str, tuple[Session, float]] = {}
        self._lock = threading.Lock()

    def of(self, key: str) -> Session:
        """The session of a key; idle ones are closed, and the oldest when there are too many."""
        with self._lock:
            now = time.monotonic()
            for old in [k for k, (_, used) in self._held.items() if now - used > IDLE_SECONDS]:
                self._held.pop(old)[0].close()
            if key not in self._held:
                while len(self._held) >= MAX_SESSIONS:
                    oldest = min(self._held, key=lambda k: self._held[k][1])
                    self._held.pop(oldest)[0].close()
                self._held[key] = (Session(self.assistant), now)
            session = self._held[key][0]
            self._held[key] = (session, now)
            return session


def example_file() -> str:
    """The MNI152 T1 template that nilearn carries, as a NIfTI file: an average of 152 people's real scans."""
    from nilearn.datasets import load_mni152_template

    path = Path(tempfile.gettempdir()) / f"omnimri-example-{os.getuid() if hasattr(os, 'getuid') else 0}.nii.gz"
    if not path.exists():
        partial = path.with_name(f"{uuid.uuid4().hex}.nii.gz")
        load_mni152_template(resolution=1).to_filename(partial)
        partial.replace(path)
    return str(path)


def build(assistant: Assistant) -> gr.Blocks:
    """The page."""
    sessions = Sessions(assistant)

    def view_of(session: Session, plane: str, index: int, overlay: bool) -> tuple:
        both = session.before_after(plane, int(index) - 1)
        return session.view(plane, int(index) - 1, overlay=overlay), gr.update(value=both, visible=both is not None)

    def legend_of(session: Session) -> str:
        chips = (f'<span style="display:inline-block;margin:2px 8px 2px 0"><span style="display:inline-block;width:12px;'
                 f'height:12px;background:rgb{colour};margin-right:4px"></span>{name}</span>'
                 for name, colour in session.legend())
        return "".join(chips)

    def refresh(session: Session, plane: str, overlay: bool) -> tuple:
        index = session.best_slice(plane) + 1
        slider = gr.update(minimum=1, maximum=max(2, session.slices(plane)), value=index)
        return slider, *view_of(session, plane, index, overlay), legend_of(session)

    def open_file(key: str, path: str | None, plane: str, overlay: bool) -> tuple:
        session = sessions.of(key)
        if path is None:
            return ("No study is open.", [], *refresh(session, plane, overlay), None)
        try:
            told = session.load(path)
            if session.shown is not None:
                plane_now = session.best_slice(plane)
                assert plane_now >= 0
        except ValueError as error:
            session.reset()
            told = f"**This file cannot be used.** {error}"
        return (told, [], *refresh(session, plane, overlay), None)

    def open_example(key: str, plane: str, overlay: bool) -> tuple:
        told = open_file(key, example_file(), plane, overlay)
        return (f"Example: the MNI152 T1 template (an average of 152 real scans, through nilearn).\n\n{told[0]}", *told[1:])

    def ask(key: str, question: str, chat: list, plane: str, overlay: bool, task: str | None = None) -> Iterator[tuple]:
        session = sessions.of(key)
        chat = [*chat, {"role": "user", "content": question}, {"role": "assistant", "content": "Looking at the study …"}]
        keep = gr.update()
        waiting = (keep,) * 5
        yield chat, "", *waiting
        pieces: queue.Queue = queue.Queue()
        stopped = threading.Event()

        def hear(text: str) -> bool:
            pieces.put(("text", text))
            return not stopped.is_set()

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
                kind, value = pieces.get()
                if kind == "text":
                    chat[-1]["content"] = value or "…"
                    yield chat, "", *waiting
                    continue
                if kind == "error":
                    chat[-1]["content"] = value
                    yield chat, "", *waiting
                    return
                break
        finally:
            stopped.set()
        chat[-1]["content"] = answer_markdown(value)
        yield (chat, "", *refresh(session, plane, overlay), session.export())

    def show(key: str, plane: str, index: int, overlay: bool) -> tuple:
        return view_of(sessions.of(key), plane, index, overlay)

    def turn(key: str, plane: str, overlay: bool) -> tuple:
        return refresh(sessions.of(key), plane, overlay)

    def forget(key: str, plane: str, overlay: bool) -> tuple:
        session = sessions.of(key)
        session.reset()
        return ("The study is forgotten.", [], *refresh(session, plane, overlay), None)

    with gr.Blocks(title="OmniMRI", delete_cache=(600, IDLE_SECONDS), analytics_enabled=False) as page:
        key = gr.State(lambda: uuid.uuid4().hex)
        gr.Markdown(HEAD)
        with gr.Row():
            with gr.Column(scale=5):
                with gr.Row():
                    upload = gr.File(label="MRI: NIfTI, DICOM zip, NRRD, MGH, k-space .h5 or .npy ...", file_types=FILE_TYPES, height=110)
                    with gr.Column(min_width=120):
                        example = gr.Button("Load the example scan")
                        clear = gr.Button("Forget this study")
                understood = gr.Markdown("No study is open.")
                with gr.Row():
                    plane = gr.Radio(list(PLANES), value="axial", label="Plane")
                    overlay = gr.Checkbox(True, label="Overlay")
                index = gr.Slider(1, 2, value=1, step=1, label="Slice")
                image = gr.Image(label="Slice", type="numpy", format="png", interactive=False, height=512, buttons=[])
                compare = gr.ImageSlider(label="Zero-filled (left) against reconstructed (right)", type="numpy", format="png",
                                         interactive=False, height=512, visible=False, buttons=[])
                legend = gr.HTML(label="Legend")
            with gr.Column(scale=4):
                chat = gr.Chatbot(label="Conversation", height=560, buttons=["copy"])
                with gr.Row():
                    buttons = {name: gr.Button(name) for name in REQUESTS}
                question = gr.Textbox(label="Question", placeholder="What sequence and plane is this?", max_length=2000)
                with gr.Row():
                    send = gr.Button("Ask", variant="primary")
                    stop = gr.Button("Stop")
                files = gr.File(label="Download: masks, report, JSON", file_count="multiple", interactive=False)
        opened = [understood, chat, index, image, compare, legend, files]
        upload.upload(open_file, [key, upload, plane, overlay], opened, show_progress="full")
        example.click(open_example, [key, plane, overlay], opened)
        clear.click(forget, [key, plane, overlay], opened)
        answered = [chat, question, index, image, compare, legend, files]
        inputs = [key, question, chat, plane, overlay]
        running = [question.submit(ask, inputs, answered), send.click(ask, inputs, answered)]
        for name, (words, task) in REQUESTS.items():

            def request(k: str, c: list, p: str, o: bool, words: str = words, task: str = task) -> Iterator[tuple]:
                yield from ask(k, words, c, p, o, task)

            running.append(buttons[name].click(request, [key, chat, plane, overlay], answered, api_name=task))
        stop.click(None, None, None, cancels=running)
        index.change(show, [key, plane, index, overlay], [image, compare], show_progress="hidden")
        overlay.change(show, [key, plane, index, overlay], [image, compare], show_progress="hidden")
        plane.change(turn, [key, plane, overlay], [index, image, compare, legend], show_progress="hidden")
        gr.Markdown(f"{NOTICE} Independent implementation of ideas from arXiv 2508.17524.")
    return page


def answer_markdown(answer: Any) -> str:
    """An answer for the chat: text, findings, and what to be warned of."""
    lines = [answer.text]
    if answer.findings:
        lines += ["", "| lesion | side | location | ml | mm | slice |", "|---|---|---|---|---|---|"]
        for k, f in enumerate((f.to_json() for f in answer.findings), 1):
            numbers = f"{f['volume_ml']:.2f} | {f['diameter_mm']:.0f} | {f['slice_index'] + 1}"
            lines.append(f"| {k} | {f['side']} | {f['location']} | {numbers} |")
    elif shown := [s for s in answer.structures if s.voxels]:
        lines += ["", "| structure | ml |", "|---|---|", *(f"| {s.name} | {s.volume_ml:.1f} |" for s in shown)]
    lines += ["", *(f"⚠ {w}" for w in answer.warnings)]
    return "\n".join(lines).strip() + f"\n\n*{answer.notice}*"


def main(argv: list[str] | None = None) -> int:
    """Omnimri chat."""
    parser = argparse.ArgumentParser(prog="omnimri chat", description=f"Start the chat page on this machine. {NOTICE}")
    parser.add_argument("--checkpoint", metavar="DIR", help="a model or run directory (default: the embedded one)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    page = build(Assistant(args.checkpoint, device=args.device))
    print(f"OmniMRI on http://127.0.0.1:{args.port}  {NOTICE}", flush=True)
    page.queue(max_size=16, default_concurrency_limit=2).launch(
        server_name="127.0.0.1",
        server_port=args.port,
        share=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size="1gb",
        quiet=True,
    )
    return 0
