"""The server around the page: viewer files, cookie, headers, health. On 127.0.0.1 unless told; no request to anywhere else."""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from omnimri.answer import NOTICE
from omnimri.assistant import Assistant
from omnimri.io import tidy

from .page import SCRIPTS, STATIC, build
from .store import KEPT_HOURS, KEY, Store

MOST_UPLOAD = "1gb"
QUEUE = 40
"""Requests that may wait; one question is answered at a time."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' blob: data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
"""Gradio's own scripts are inline and evaluated; nothing may come from, or go to, another origin."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
log = logging.getLogger("omnimri.chat")


def create_app(assistant: Assistant, store: Store, *, root_path: str = "", auth: tuple[str, str] | None = None) -> FastAPI:
    """The application: the page at `/`, files of the viewer and health under `/omnimri`."""
    import gradio as gr

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/omnimri/static", StaticFiles(directory=STATIC), name="static")

    @app.get("/omnimri/health")
    def health() -> JSONResponse:
        return JSONResponse(
            {"status": "ok", "model": assistant.name, "checkpoint_sha256": assistant.digest, **store.health(), "notice": NOTICE}
        )

    @app.get("/omnimri/file/{token}.nii")
    def file(token: str) -> Response:
        path = store.find(token)
        if path is None or not path.is_file():
            return JSONResponse({"detail": "no such file"}, status_code=404)
        return FileResponse(path, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    @app.middleware("http")
    async def around(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        began = time.perf_counter()
        response = await call(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        if request.method == "GET" and request.url.path.rstrip("/") in ("", root_path.rstrip("/")):
            held = request.cookies.get("omnimri", "")
            key = held if KEY.fullmatch(held) else secrets.token_hex(16)
            response.set_cookie("omnimri", key, httponly=True, samesite="strict", max_age=int(store.kept_hours * 3600))
        # The path of a request may hold a file's name: only what kind of request it was is written.
        kind = request.url.path.split("/")[1:3]
        told = {
            "method": request.method,
            "kind": "/".join(k for k in kind if k.isidentifier())[:40],
            "status": response.status_code,
            "ms": round(1000 * (time.perf_counter() - began)),
        }
        log.info(json.dumps(told))
        return response

    blocks = build(store)
    blocks.queue(max_size=QUEUE, default_concurrency_limit=1)
    # Darker than Gradio's own, whose white on orange falls short of WCAG's AA.
    theme = gr.themes.Default(primary_hue="blue").set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
        button_cancel_background_fill_dark="#b91c1c",
        button_cancel_text_color="#ffffff",
        body_text_color_subdued="*neutral_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
    mounted = gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        head=SCRIPTS,
        auth=auth,
        root_path=root_path or None,
        max_file_size=MOST_UPLOAD,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        show_error=False,
        ssr_mode=False,
        theme=theme,
    )
    guard(blocks)
    return mounted


def guard(blocks: Any) -> None:
    """Let a client name only what it uploaded: no path of this machine, no address.

    Gradio 6.31 checks paths of a mounted page not at all (only of one that was launched), and fetches addresses.
    """
    blocks.has_launched = True

    def only_files(move: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        async def checked(path: Any) -> Any:
            if isinstance(path, str) and "://" in path:
                raise ValueError("expected an uploaded file, got an address")
            return await move(path)

        return checked

    for block in blocks.blocks.values():
        block.async_move_resource_to_block_cache = only_files(block.async_move_resource_to_block_cache)


def main(argv: list[str] | None = None) -> int:
    """Omnimri chat."""
    import uvicorn

    parser = argparse.ArgumentParser(prog="omnimri chat", description=f"Start the chat page on this machine. {NOTICE}")
    parser.add_argument("--checkpoint", metavar="DIR", help="a model or run directory (default: the embedded one)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host", default="127.0.0.1", help="another address lets others in: use --auth, behind TLS")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--root-path", default="", help="path under which a proxy serves this page")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for a name and a password")
    parser.add_argument("--keep-hours", type=float, default=KEPT_HOURS, help="how long a study is kept after its last use")
    args = parser.parse_args(argv)
    auth: Any = tuple(args.auth.split(":", 1)) if args.auth else None
    if auth is not None and len(auth) != 2:
        parser.error("expected --auth USER:PASSWORD")
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    log.setLevel(logging.INFO)
    tidy()
    assistant = Assistant(args.checkpoint, device=args.device)
    app = create_app(assistant, Store(assistant, kept_hours=args.keep_hours), root_path=args.root_path, auth=auth)
    print(f"OmniMRI on http://{args.host}:{args.port}  {NOTICE}", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    return 0
