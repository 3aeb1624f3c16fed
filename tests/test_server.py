"""The server and its page: headers, what a client may not name, the API, and the whole way in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from chat_app.server import create_app
from chat_app.store import Store
from omnimri.assistant import Assistant
from omnimri.io.kspace import write_kspace
from omnimri.physics import fft2c, gaussian_coils, line_mask
from omnimri.volume import KSpace

from .conftest import write_dicom
from .test_room import zipped

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def assistant(checkpoint):
    """Untrained: in one plane it finds many lesions, none of them real and none that three planes agree on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("omnimri.examination.more_planes", lambda volume, plane: ())
        yield Assistant(checkpoint)


@pytest.fixture(scope="module")
def server(assistant, tmp_path_factory):
    import uvicorn

    cache = tmp_path_factory.mktemp("gradio")
    before, os.environ["GRADIO_TEMP_DIR"] = os.environ.get("GRADIO_TEMP_DIR"), str(cache)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    store = Store(assistant, tmp_path_factory.mktemp("state"))
    running = uvicorn.Server(uvicorn.Config(create_app(assistant, store), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}", store
    running.should_exit = True
    thread.join(10)
    os.environ.pop("GRADIO_TEMP_DIR")
    if before is not None:
        os.environ["GRADIO_TEMP_DIR"] = before


def get(url, **headers):
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(url, headers=headers)) as r:
            return r.status, dict(r.headers), r.read()
    except HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_headers_health_and_files(server):
    url, _ = server
    status, headers, _ = get(url)
    assert status == 200
    assert "frame-ancestors 'self'" in headers["content-security-policy"]
    assert "HttpOnly" in headers["set-cookie"]
    assert "SameSite=strict" in headers["set-cookie"]
    told = json.loads(get(f"{url}/omnimri/health")[2])
    assert told["status"] == "ok"
    assert "Research use only" in told["notice"]
    assert get(f"{url}/omnimri/file/{'0' * 32}.nii")[0] == 404
    assert get(f"{url}/omnimri/static/niivue.umd.js")[0] == 200
    assert get(f"{url}/omnimri/static/../page.py")[0] == 404


def test_a_name_and_a_password_are_asked_for(assistant, tmp_path):
    from starlette.testclient import TestClient

    with TestClient(create_app(assistant, Store(assistant, tmp_path / "s"), auth=("reader", "secret"))) as client:
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "reader", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "reader", "password": "secret"}).status_code == 200
        assert client.get("/config").status_code == 200


def test_a_proxy_may_serve_it_under_a_path(assistant, tmp_path):
    from starlette.testclient import TestClient

    with TestClient(create_app(assistant, Store(assistant, tmp_path / "s"), root_path="/mri")) as client:
        page = client.get("/")
        assert "/mri" in page.text
        assert re.search(r'src=\\?"omnimri/static/viewer\.js', page.text), "relative: it follows the path"
        assert "omnimri=" in page.headers["set-cookie"]
        assert client.get("/omnimri/health").json()["status"] == "ok"
        again = client.get("/")
        assert client.cookies["omnimri"] in again.headers["set-cookie"], "kept for a day after its last use"


def test_the_same_over_the_api(server, scan_file):
    gradio_client = pytest.importorskip("gradio_client")
    url, _ = server
    client = gradio_client.Client(url, verbose=False)
    out = client.predict(gradio_client.handle_file(str(scan_file)), api_name="/open")
    assert "64 × 64 × 12" in out[0]
    out = client.predict(api_name="/detect")
    assert "Research use only" in str(out[1])
    number = out[3]["value"]
    client.predict(number, api_name="/accepted")
    files = client.predict(api_name="/export_report")
    assert any(f.endswith("report.pdf") for f in files)
    copies = [p for s in server[1]._held.values() for p in s.outside]
    assert any(Path(p).exists() for p in copies)
    stranger = gradio_client.Client(url, verbose=False)
    assert "No study" in stranger.predict(api_name="/state")[0]
    client.predict(api_name="/forget")
    assert not any(Path(p).exists() for p in copies)
    assert "No study" in client.predict(api_name="/state")[0]


@pytest.mark.parametrize("path", ["/etc/passwd", "SCAN", "http://127.0.0.1:1/x.nii"])
def test_a_client_names_no_file_or_address(server, scan_file, path):
    from urllib.request import Request, urlopen

    url, _ = server
    given = {"path": str(scan_file) if path == "SCAN" else path, "meta": {"_type": "gradio.FileData"}}
    asked = Request(f"{url}/gradio_api/call/open", json.dumps({"data": [given]}).encode(), {"Content-Type": "application/json"})
    event = json.loads(urlopen(asked).read())["event_id"]
    told = urlopen(f"{url}/gradio_api/call/open/{event}").read().decode()
    assert "64 × 64" not in told
    assert "64 \\u00d7 64" not in told
    assert "root:" not in told
    assert "error" in told or "cannot be used" in told
    assert scan_file.exists()


# --- the whole way in a browser ----------------------------------------------------------------------------------


@pytest.fixture
def page(server):
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium")
    with playwright.sync_playwright() as p:
        # No other host can be resolved: a request to one would fail and be counted.
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[
            "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"])
        made = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True).new_page()
        asked, wrong = [], []
        made.on("request", lambda r: asked.append(r.url))
        made.on("pageerror", lambda e: wrong.append(f"{e} {e.stack}"))
        made.goto(server[0])
        yield made
        elsewhere = [u for u in asked if not u.startswith((server[0], "data:", "blob:"))]
        assert elsewhere == []
        assert wrong == []
        browser.close()


def shown(page, wanted, seconds=90):
    page.wait_for_function(wanted, timeout=seconds * 1000)


LOADED = "window.omnimri && window.omnimri.view.nv && window.omnimri.view.nv.volumes.length"


def test_from_upload_to_export_in_a_browser(page, scan, tmp_path):
    path = zipped(write_dicom(scan, tmp_path / "d"), tmp_path / "study.zip")
    page.set_input_files("input[type=file]", str(path))
    shown(page, f"{LOADED} >= 1")
    page.get_by_role("button", name="Find lesions", exact=True).click()
    page.wait_for_selector('a[href*="#finding-"]', timeout=90_000)
    shown(page, f"{LOADED} == 2")
    at = "JSON.stringify(window.omnimri.view.mm.map(Math.round))"
    before = page.evaluate(at)
    page.locator('a[href*="#finding-2"]').first.click()
    shown(page, f"{at} != {json.dumps(before)}")
    wanted = page.evaluate("JSON.stringify(window.omnimri.view.scene.findings.find(f => f.number == 2).mm.map(Math.round))")
    assert np.abs(np.subtract(json.loads(page.evaluate(at)), json.loads(wanted))).max() <= 4  # to the voxel's middle
    page.locator(".omni-canvases").focus()
    page.keyboard.press("o")
    assert page.evaluate("window.omnimri.view.overlay") is False
    page.keyboard.press("o")
    shown(page, "window.omnimri.view.lit === null")
    page.locator(".omni-legend button").first.click()
    page.locator('input[aria-label^="Opacity of "]').fill("0.25")
    assert page.evaluate("[...window.omnimri.view.alpha.values()]") == [0.25]
    alphas = page.evaluate("[...window.omnimri.view.nv.volumes[1].colormapLabel.lut].filter((_, k) => k % 4 === 3)")
    assert 64 in alphas
    assert 255 in alphas
    page.locator(".omni-legend button").first.click()
    page.locator(".omni-canvases").focus()
    page.keyboard.press("1")
    assert page.evaluate("window.omnimri.view.layout") == "1"
    page.get_by_role("tab", name="Findings").click()
    page.locator("#omni-findings label").first.click()
    page.get_by_role("button", name="Accept", exact=True).click()
    page.get_by_text("1 accepted, 0 rejected").wait_for(timeout=30_000)
    page.locator("#omni-findings label").nth(1).click()
    page.get_by_role("button", name="Reject", exact=True).click()
    page.get_by_text("1 accepted, 1 rejected").wait_for(timeout=30_000)
    page.get_by_role("tab", name="Export").click()
    page.get_by_role("button", name="Make DICOM SEG and SR").click()
    page.locator('a[href*="segmentation.dcm"]').wait_for(timeout=90_000)
    page.locator('a[href*="report.dcm"]').wait_for(timeout=30_000)
    page.get_by_role("button", name="Make report and masks").click()
    page.locator('a[href*="report.pdf"]').wait_for(timeout=60_000)
    page.reload()
    shown(page, f"{LOADED} == 2")
    page.get_by_role("tab", name="Findings").click()
    page.get_by_text("1 accepted, 1 rejected").wait_for(timeout=30_000)
    page.get_by_role("button", name="Forget this study").click()
    page.get_by_text("The study is forgotten.").wait_for(timeout=30_000)
    shown(page, f"{LOADED} == 0")
    # Gradio leaves the empty files that uploads were spooled to.
    left = [p.name for p in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*") if p.is_file() and p.stat().st_size]
    assert left == [], "something of the study is left"


def test_the_simulated_patient_opens_with_a_click(page):
    page.get_by_role("button", name="Example: patient with a lesion").click()
    page.get_by_text("no real person").wait_for(timeout=60_000)
    shown(page, f"{LOADED} >= 1")
    assert page.get_by_text("R on the left of the image").is_visible()


def test_the_whole_way_on_the_example(page):
    page.get_by_role("button", name="Example: patient with a lesion").click()
    page.get_by_text("no real person").first.wait_for(timeout=60_000)
    shown(page, f"{LOADED} >= 1")
    box = page.get_by_label("Question")
    box.fill("Find lesions.")
    box.press("Enter")
    page.wait_for_selector('a[href*="#finding-"]', timeout=90_000)
    shown(page, f"{LOADED} == 2")
    assert page.get_by_text("no real person").first.is_visible(), "still said after an answer"
    page.locator('a[href*="#finding-1"]').first.click()
    at = "JSON.stringify(window.omnimri.view.mm.map(Math.round))"
    wanted = page.evaluate("JSON.stringify(window.omnimri.view.scene.findings.find(f => f.number == 1).mm.map(Math.round))")
    shown(page, f"Math.max(...JSON.parse({at}).map((v, k) => Math.abs(v - JSON.parse({json.dumps(wanted)})[k]))) <= 6")
    assert page.evaluate("window.omnimri.view.lit") == page.evaluate("window.omnimri.view.scene.findings[0].label")
    place = page.evaluate(at)
    page.get_by_role("tab", name="Findings").click()
    page.locator("#omni-findings label").first.click()
    page.get_by_role("button", name="Accept", exact=True).click()
    page.get_by_text("1 accepted, 0 rejected").wait_for(timeout=30_000)
    shown(page, "window.omnimri.view.loaded === window.omnimri.view.scene.revision")
    assert page.evaluate(at) == place, "a decision moves nothing"
    page.get_by_role("tab", name="Export").click()
    assert page.get_by_role("button", name="Make DICOM SEG and SR").is_disabled()
    assert page.get_by_text("need a DICOM study").is_visible()
    page.get_by_role("button", name="Make report and masks").click()
    page.locator('a[href*="report.pdf"]').wait_for(timeout=60_000)
    page.reload()
    page.get_by_role("tab", name="Findings").click()
    page.get_by_text("1 accepted, 0 rejected").wait_for(timeout=30_000)
    page.get_by_role("button", name="Forget this study").click()
    page.get_by_text("The study is forgotten.").wait_for(timeout=30_000)


def test_a_folder_becomes_a_zip_in_the_browser(page, scan, tmp_path):
    import base64

    folder = write_dicom(scan, tmp_path / "d")
    files = [[f"study/{p.name}", base64.b64encode(p.read_bytes()).decode()] for p in sorted(folder.iterdir())]
    shown(page, "window.omnimriFolder && document.querySelector('.omni-canvases')")  # the page listens
    page.evaluate(
        """async (files) => window.omnimriFolder.give(files.map(([name, text]) => [name,
        new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name.split("/").pop())]))""",
        files,
    )
    shown(page, f"{LOADED} >= 1")
    page.get_by_text("64 × 64 × 12").first.wait_for(timeout=30_000)


@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 800, "light"), (820, 1180, "dark")])
def test_it_fits_the_screen(page, width, height, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": height})
    page.reload()
    shown(page, "document.querySelector('.omni-canvases')")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('.omni-canvases').getBoundingClientRect().bottom") <= height
    assert page.evaluate("document.body.classList.contains('dark')") is (scheme == "dark")


def test_before_and_after_lie_on_each_other(page, tmp_path):
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    image, mask = ((x**2 + y**2) < 0.6).float() + 0.1, line_mask(64, 2.0, g)[None]
    kspace = KSpace(fft2c(image * gaussian_coils(4, 64, 64, g))[None] * mask, mask, torch.eye(4).double())
    write_kspace(tmp_path / "k.h5", kspace)
    page.set_input_files("input[type=file]", str(tmp_path / "k.h5"))
    page.get_by_text("k-space: 1 slices").wait_for(timeout=30_000)
    page.get_by_role("button", name="Reconstruct", exact=True).click()
    pictures = "[...document.querySelectorAll('img')].filter((i) => i.naturalWidth === 512)"
    shown(page, f"{pictures}.length === 2")
    boxes = page.evaluate(f"{pictures}.map((i) => i.getBoundingClientRect()).map((r) => [r.x, r.y, r.width, r.height])")
    assert boxes[0] == pytest.approx(boxes[1], abs=1)
    shown(page, "window.omnimri.view.other && window.omnimri.view.other.volumes.length === 1")
    assert page.locator(".omni-sides").inner_text().startswith("Sides are unknown")
    page.get_by_role("button", name="Forget this study").click()
    page.get_by_text("The study is forgotten.").wait_for(timeout=30_000)
    left = [p.name for p in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*.png") if p.stat().st_size]
    assert left == [], "pictures of the study are left"
