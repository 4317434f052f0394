"""The built site in a real browser: phone and desktop, light and dark."""

import contextlib
import functools
import html.parser
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE, SCREENSHOTS = ROOT / "build" / "site", ROOT / "build" / "screenshots"
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_a_browser = pytest.mark.skipif(
    not CHROMIUM or os.environ.get("ATLAS_TEST_DOWNLOADS") != "1",
    reason="NOT TESTED: the site is looked at in a chromium of PATH by `make test-all` only",
)
LOOK = """() => {
  const found = [], root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) found.push("it scrolls sideways");
  for (const image of document.images) {
    if (!image.complete || !image.naturalWidth) found.push("image not loaded " + image.src);
    if (!image.alt) found.push("no alternative text for " + image.src);
  }
  for (const formula of document.querySelectorAll(".math")) {
    const drawn = formula.querySelector("mjx-container > svg");
    if (!drawn || !drawn.getBoundingClientRect().width || formula.querySelector("mjx-merror"))
      found.push("formula not rendered " + formula.textContent.slice(0, 60));
  }
  return found;
}"""
# What can be clicked, is seen, and has not been focused by pressing Tab.
UNREACHED = """() => [...document.querySelectorAll("a[href], button, summary, input, select")]
  .filter(e => e.checkVisibility({visibilityProperty: true}) && e.getBoundingClientRect().width)
  .filter(e => !window.reached.has(e))
  .map(e => "not reached by keyboard: " + (e.innerText || e.outerHTML).slice(0, 60))"""


@pytest.fixture(scope="session")
def site():
    done = subprocess.run(
        [sys.executable, "-m", "tools.website"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return SITE


class Page(html.parser.HTMLParser):
    """Targets of links, places of anchors, and what a browser would load, of one HTML file."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors, self.loaded = set(), set(), set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.add(given.get("id"))
        if tag == "a" and given.get("href"):
            self.links.add(given["href"])
        loads = tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "prefetch")
        self.loaded |= {given.get("src"), given.get("href") if loads else None} - {None}


def dead_links(folder: Path) -> list[str]:
    """Links and loads of a folder of HTML that lead nowhere, and loads from elsewhere."""
    pages = {path.as_uri(): Page(path) for path in folder.rglob("*.html")}
    found = []
    for uri, page in pages.items():
        for link in page.links | page.loaded:
            address, anchor = urldefrag(urljoin(uri, link))
            path, known = Path(unquote(urlparse(address).path)), pages.get(address)
            if urlparse(address).scheme in ("http", "https", "mailto"):
                found += [f"{uri} loads {link}"] if link in page.loaded else []
            elif not path.is_file() or (anchor and known and unquote(anchor) not in known.anchors):
                found.append(f"{uri} links to {link}")
    return found


def test_every_internal_link_is_alive_and_nothing_loads_from_elsewhere(site):
    assert (site / "index.html").is_file()
    assert dead_links(site) == []


def test_every_page_says_what_the_published_run_is(site):
    import json

    label = json.loads((ROOT / "results" / "run.json").read_bytes())["label"]
    for path in site.rglob("*.html"):
        assert label in path.read_text("utf-8"), path


def test_a_dead_link_and_a_load_from_elsewhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#x"></a><a href="c.html"></a>')
    (tmp_path / "b.html").write_text('<img src="https://example.org/x.png"><p id="y"></p>')
    assert len(dead_links(tmp_path)) == 3


@contextlib.contextmanager
def served(folder: Path):
    """The address of a web server of the files in `folder`."""
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def problems(browser, address: str, names: list[str], size: str, scheme: str, pictures=None):
    """What a browser of this size and colour scheme finds wrong with the pages."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
    )
    found = []
    for name in names:
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda m, said=said: said.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error, said=said: said.append(f"script: {error}"))
        page.on("requestfailed", lambda r, said=said: said.append(f"request failed: {r.url}"))
        page.on(
            "request",
            lambda r, said=said: (
                None if r.url.startswith((address, "data:")) else said.append(f"external: {r.url}")
            ),
        )
        page.goto(address + name)
        page.evaluate("() => window.MathJax?.startup?.promise")
        if pictures:
            pictures.mkdir(parents=True, exist_ok=True)
            stem = name.removesuffix(".html").replace("/", "-")
            page.screenshot(path=pictures / f"{stem}-{size}-{scheme}.png", full_page=True)
        said += page.evaluate(LOOK) + serious(page)
        said += unreached(page) if scheme == "light" else []  # colours move nothing
        found += [f"{name}: {what}" for what in said]
        page.close()
    context.close()
    return found


def serious(page) -> list[str]:
    """axe-core's serious and critical findings."""
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    return [
        f"axe {v['id']}: {node['html'][:120]}"
        for v in violations
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"]
    ]


def unreached(page) -> list[str]:
    """Visible controls that pressing Tab from the top to the end does not reach."""
    page.evaluate(
        """() => { window.reached = new Set();
        addEventListener("focusin", event => window.reached.add(event.target)); }"""
    )
    for _ in range(50):
        for _ in range(10):
            page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement === document.body"):
            break
    return page.evaluate(UNREACHED)


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_page_in_a_browser(site, browser, size, scheme):
    names = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    with served(site) as address:
        assert problems(browser, address, names, size, scheme, SCREENSHOTS) == []


PLANTED = {
    "it scrolls sideways": '<div style="width: 3000px">wide</div>',
    "no alternative text": '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">',
    "image not loaded": '<img alt="gone" src="gone.png">',
    "formula not rendered": r'<div class="math">\[x\]</div>',
    "external: http://127.0.0.2:9": '<script src="http://127.0.0.2:9/x.js"></script>',
    "request failed": '<script src="http://127.0.0.2:9/x.js"></script>',
    "script: ": "<script>undefined.x</script>",
    "not reached by keyboard": '<button tabindex="-1">press</button>',
    "axe color-contrast": '<p style="color: #eee; background: #fff">pale</p>',
    "the server responded with a status of 404": '<script src="gone.js"></script>',
}


@in_a_browser
@pytest.mark.parametrize(("problem", "fault"), PLANTED.items(), ids=PLANTED)
def test_a_planted_fault_is_found(problem, fault, browser, tmp_path):
    head = '<!doctype html><html lang="en"><head><title>x</title></head><body><main><h1>x</h1>'
    (tmp_path / "x.html").write_text(f"{head}{fault}</main></body></html>")
    with served(tmp_path) as address:
        found = problems(browser, address, ["x.html"], "phone", "light")
    assert any(problem in what for what in found), found
