"""The built site: links, and every page in a real browser, on phone and desktop, light and dark."""

import json
import os
import shutil
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from bs4 import BeautifulSoup
from checks import ROOT, run_python
from ifeval_cases import prompt

from atlas_lib.evaluate import explorer, ifeval, significance

SITE, SCREENSHOTS = ROOT / "build" / "site", ROOT / "build" / "screenshots"
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, BROWSERS), None)
in_a_browser = pytest.mark.skipif(
    not CHROMIUM or os.environ.get("ATLAS_TEST_DOWNLOADS") != "1",
    reason="NOT TESTED: `make test-all` opens the site in a Chromium of PATH",
)
FLAGS = ["--no-sandbox", "--allow-file-access-from-files"]  # axe-core reads the stylesheets
LOADED = ["stylesheet", "icon", "preload", "prefetch"]
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
    done = run_python("-m", "tools.website")
    assert done.returncode == 0, done.stderr[-3000:]
    return SITE


def dead_links(folder: Path) -> list[str]:
    """Links and loads in a folder of HTML that lead nowhere, and loads from other hosts."""
    paths = list(folder.rglob("*.html"))
    pages = {path: BeautifulSoup(path.read_bytes(), "html.parser") for path in paths}
    anchors = {path: {tag["id"] for tag in page.find_all(id=True)} for path, page in pages.items()}
    found = []
    for path, page in pages.items():
        loads = [tag["src"] for tag in page.find_all(src=True)]
        loads += [tag["href"] for tag in page.find_all("link", rel=LOADED)]
        found += [f"{path} loads {load}" for load in loads if urlparse(load).netloc]
        for link in loads + [tag["href"] for tag in page.find_all("a", href=True)]:
            parts = urlparse(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not parts.scheme and (
                not target.is_file() or (anchor and anchor not in anchors.get(target, {anchor}))
            ):
                found.append(f"{path} links to {link}")
    return found


def test_every_internal_link_is_alive_and_nothing_loads_from_elsewhere(site):
    assert (site / "index.html").is_file()
    assert dead_links(site) == []


def test_every_page_shows_the_label_of_the_published_run(site):
    label = json.loads((ROOT / "results" / "run.json").read_bytes())["label"]
    for path in site.rglob("*.html"):
        assert label in path.read_text("utf-8"), path


def test_a_dead_link_and_a_load_from_elsewhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#x"></a><a href="c.html"></a>')
    (tmp_path / "b.html").write_text('<img src="https://example.org/x.png"><p id="y"></p>')
    assert len(dead_links(tmp_path)) == 3


def test_every_surveyed_repository_is_in_the_table_without_a_script(site):
    survey = json.loads((ROOT / "results" / "template_survey.json").read_text("utf-8"))
    page = BeautifulSoup((site / "loss.html").read_bytes(), "html.parser")
    rows = page.select("#lookup tbody tr")
    for row, record in zip(rows, survey["templates"], strict=True):
        names = row.find("th").get_text(" ").split()
        assert set(names) == {record["repository"], *record["aliases"]}
        assert row.find("td").get_text().startswith(record["status"])
    assert page.find(id="lookup-filter").has_attr("hidden")  # without a script it does nothing


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def problems(browser, folder: Path, size: str, scheme: str, pictures: Path) -> list[str]:
    """What a browser of this size and colour scheme finds wrong with the pages in `folder`."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
    )
    found = []
    for path in sorted(folder.rglob("*.html")):
        name = path.relative_to(folder).as_posix()
        page = context.new_page()
        logged = logged_by(page)
        page.goto(path.as_uri())
        page.evaluate("() => window.MathJax?.startup?.promise")
        stem = name.removesuffix(".html").replace("/", "-")
        page.screenshot(path=pictures / f"{stem}-{size}-{scheme}.png", full_page=True)
        faults = page.evaluate(LOOK) + axe_violations(page)
        faults += unreached(page) if scheme == "light" else []  # colours change no focus
        found += [f"{name}: {fault}" for fault in logged + faults]
        page.close()
    context.close()
    return found


def logged_by(page) -> list[str]:
    """A list that collects errors, failed requests and requests to the network, as they occur."""
    found: list[str] = []

    def log_if(condition: bool, line: str) -> None:
        if condition:
            found.append(line)

    page.on("console", lambda message: log_if(message.type == "error", f"console: {message.text}"))
    page.on("pageerror", lambda error: log_if(True, f"script: {error}"))
    page.on("requestfailed", lambda request: log_if(True, f"request failed: {request.url}"))
    local = ("file:", "data:")
    page.on("request", lambda r: log_if(not r.url.startswith(local), f"external: {r.url}"))
    return found


def axe_violations(page) -> list[str]:
    """axe-core's serious and critical findings."""
    from axe_playwright_python.sync_playwright import Axe

    return [
        f"axe {violation['id']}: {node['html'][:120]}"
        for violation in Axe().run(page).response["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def unreached(page) -> list[str]:
    """Visible controls that pressing Tab from the top to the end does not reach."""
    page.evaluate(
        """() => { window.reached = new Set();
        addEventListener("focusin", event => window.reached.add(event.target)); }"""
    )
    for _ in range(500):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement === document.body"):
            break
    return page.evaluate(UNREACHED)


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_page_in_a_browser(site, browser, size, scheme):
    assert problems(browser, site, size, scheme, SCREENSHOTS) == []


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_pages_in_frames(site, browser, size, scheme, tmp_path):
    """The audited rows of notebook 02 and the responses of notebook 04, opened by themselves."""
    for path in (site / "notebooks").glob("*.html"):
        for frame in BeautifulSoup(path.read_bytes(), "html.parser").select("iframe[srcdoc]"):
            (tmp_path / f"{path.stem}.html").write_text(frame["srcdoc"], "utf-8")
    assert len(list(tmp_path.glob("*.html"))) == 2
    assert problems(browser, tmp_path, size, scheme, tmp_path) == []


@in_a_browser
def test_the_table_of_templates_is_filtered_by_repository(site, browser):
    page = browser.new_page()
    page.goto((site / "loss.html").as_uri())
    page.get_by_label("Repository contains").fill("qwen2.5-0.5b-instruct")
    shown = page.locator("#lookup tbody tr:visible")
    assert page.locator("#lookup-filter output").text_content().startswith(f"{shown.count()} of ")
    assert "Qwen/Qwen2.5-0.5B-Instruct" in " ".join(shown.all_text_contents())
    page.get_by_label("Repository contains").fill("no such repository")
    assert shown.count() == 0
    page.close()


def responses_page(folder: Path) -> Path:
    """The page of responses to three prompts: one won, one lost, one passed by both."""
    prompts, rows = [prompt(key) for key in range(3)], [("base", "chat"), ("SFT", "chat")]
    prompts[0] = prompt(0, ["punctuation:no_comma", "startend:quotation"], [{}, {}])
    given = dict(zip(rows, (["a, b", "a", "a"], ['"a"', "a, b", "a"]), strict=True))
    verdicts = {row: ifeval.score(prompts, texts) for row, texts in given.items()}
    fields = {"n_tokens": 1, "stop": None}
    responses = {row: [fields | {"response": t} for t in texts] for row, texts in given.items()}
    primary = significance.compare_grid(verdicts, 0.05, 0.03)[0]
    page = explorer.render_responses(prompts, responses, verdicts, primary, "")
    (folder / "responses.html").write_text(page, "utf-8")
    return folder / "responses.html"


FILTERS = {  # ((list, choice), ...): prompts shown
    (): 3,
    (("outcome", "won"),): 1,
    (("outcome", "neither"),): 0,
    (("type", "startend:quotation"),): 1,
    (("model", "SFT chat"),): 1,
    (("outcome", "won"), ("model", "SFT chat")): 0,
}


@in_a_browser
@pytest.mark.parametrize("scripts", [True, False])
def test_responses_are_filtered_with_and_without_scripts(scripts, browser, tmp_path):
    context = browser.new_context(java_script_enabled=scripts)
    page = context.new_page()
    page.goto(responses_page(tmp_path).as_uri())
    prompts = page.locator("section details:visible")
    for chosen, expected in FILTERS.items():
        for name in ("outcome", "type", "model"):
            choice = {"label": dict(chosen)[name]} if name in dict(chosen) else {"index": 0}
            page.locator(f"#{name}").select_option(**choice)
        assert prompts.count() == expected, chosen
        if scripts:
            assert page.locator("output").text_content() == f"{expected} of 3 prompts"
    assert page.get_by_label("Text").is_visible() == scripts
    context.close()


@in_a_browser
def test_the_types_of_instructions_are_sorted_by_any_column(browser, tmp_path):
    page = browser.new_page()
    page.goto(responses_page(tmp_path).as_uri())
    page.get_by_text("By instruction type").first.click()
    names = page.locator("tbody th")
    assert names.all_text_contents() == ["startend:quotation", "punctuation:no_comma"]  # by net
    for column in ("type", "type"):
        page.get_by_role("button", name=column).click()
    assert names.all_text_contents() == ["punctuation:no_comma", "startend:quotation"]
    page.get_by_role("button", name="lost").click()
    assert names.first.text_content() == "punctuation:no_comma"
    page.close()


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
    "console: Failed to load resource": '<script src="gone.js"></script>',
}


@in_a_browser
@pytest.mark.parametrize(("problem", "fault"), PLANTED.items(), ids=PLANTED)
def test_a_planted_fault_is_found(problem, fault, browser, tmp_path):
    head = '<!doctype html><html lang="en"><head><title>x</title></head><body><main><h1>x</h1>'
    (tmp_path / "x.html").write_text(f"{head}{fault}</main></body></html>")
    found = problems(browser, tmp_path, "phone", "light", tmp_path)
    assert any(problem in fault for fault in found), found
