"""Fixtures for tests in a browser: the book's pages as they are published, and Chromium to read them with.

`site` is the address of the pages, `new_page` opens one of them, `open_html` opens a page given as text. A page keeps
what went wrong on it in `page.problems`: errors on the console and in scripts, requests that failed or led elsewhere.
Chromium reaches this machine only.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import web_assets
from filelock import FileLock
from playwright.sync_api import Browser, Page, sync_playwright

PREFIX = "/some-project/"  # a project's pages do not lie at the root of their host
AXE = web_assets.ROOT / "node_modules" / "axe-core" / "axe.min.js"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-proxy-server",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder below PREFIX."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm"}

    def translate_path(self, path: str) -> str:
        return super().translate_path("/" + path[len(PREFIX):] if path.startswith(PREFIX) else "/outside-the-site")

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the program."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("Chromium is not installed: apt-get install chromium")


@pytest.fixture(scope="session")
def site_folder(chromium, tmp_path_factory) -> Path:
    """The book's pages, made from the committed notebooks, once for all processes of a run."""
    if failure := web_assets.install():
        pytest.skip(f"{failure}, so the pages' scripts and axe-core are not here: apt-get install npm")
    import build_book  # takes seconds, and most runs of a single test do without

    run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each process has its own folder below that of the run
        run = run.parent
    folder, built = run / "book", run / "book is built"
    with FileLock(run / "book.lock"):
        if not built.exists():
            shutil.rmtree(folder, ignore_errors=True)
            build_book.build_committed(folder)
            built.touch()
    return folder / "_build" / "html"


@pytest.fixture(scope="session")
def site(site_folder):
    """The address of the book's pages, served below PREFIX."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site_folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}{PREFIX}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")  # playwright runs an event loop, which is not to last while other modules are tested
def browser(chromium):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


def blank_page(browser: Browser, width: int = 1280, dark: bool = False) -> Page:
    """An empty page in a fresh profile, with `problems` (lines of text) and `requests` (those that ended well)."""
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.problems, page.requests = [], []
    page.on("console", lambda m: m.type == "error" and page.problems.append(f"console: {m.text}"))
    page.on("pageerror", lambda error: page.problems.append(f"script: {error}"))
    page.on("requestfailed", lambda r: page.problems.append(f"request failed: {r.url} ({r.failure})"))
    page.on("response", lambda r: r.status >= 400 and page.problems.append(f"request failed: {r.url} ({r.status})"))
    page.on("requestfinished", lambda request: page.requests.append(request))

    def here(request) -> None:
        if not request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            page.problems.append(f"request to another origin: {request.url}")

    page.on("request", here)
    return page


def open_page(browser: Browser, address: str, width: int = 1280, dark: bool = False) -> Page:
    """Opens an address in a fresh profile; returns the page when its formulas are set and its fonts are there."""
    page = blank_page(browser, width, dark)
    page.goto(address)
    page.evaluate("async () => { await window.MathJax?.startup?.promise; await document.fonts.ready; }")
    return page


@pytest.fixture
def new_page(browser, site):
    """new_page(url, width=1280, dark=False) -> a page of the site, at `url` relative to it."""
    pages = []

    def new(url: str, width: int = 1280, dark: bool = False) -> Page:
        pages.append(open_page(browser, site + url, width, dark))
        return pages[-1]

    yield new
    for page in pages:
        page.context.close()


@pytest.fixture
def open_html(browser):
    """open_html(text, width=1280, dark=False) -> a page whose body is `text`; it needs neither a build nor npm."""
    pages = []

    def new(text: str, width: int = 1280, dark: bool = False) -> Page:
        page = blank_page(browser, width, dark)
        pages.append(page)
        head = '<!doctype html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">'
        head += '<meta name="viewport" content="width=device-width"><title>test</title>'
        page.route("http://127.0.0.1/", lambda route: route.fulfill(body=head + text, content_type="text/html"))
        page.goto("http://127.0.0.1/")
        return page

    yield new
    for page in pages:
        page.context.close()


def settle(page: Page) -> None:
    """Waits until everything that is sliding or fading has arrived."""
    page.evaluate("""async () => { await Promise.allSettled(document.getAnimations().filter(
        a => a.effect.getComputedTiming().endTime < Infinity).map(a => a.finished)); }""")


def axe(page: Page, within: str = "html") -> list[str]:
    """What axe-core finds serious or critical in an element: a line for each place."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text())
    settle(page)  # what fades in has little contrast until then
    return page.evaluate("""async within => {
        const {violations} = await axe.run(within, {resultTypes: ["violations"]});
        return violations.filter(v => ["serious", "critical"].includes(v.impact)).flatMap(
            v => v.nodes.map(n => `${v.id}: ${n.target} (${n.failureSummary.replace(/\\s+/g, " ")})`));
    }""", within)


def transferred(page: Page) -> dict[str, int]:
    """Bytes of every answer that the page has had so far, uncompressed: address -> bytes of its body."""
    return {r.url: r.sizes()["responseBodySize"] for r in page.requests if r.url.startswith("http")}
