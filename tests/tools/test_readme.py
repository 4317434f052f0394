"""README and the other texts: their figures, commands, links and paths exist."""

import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from checks import ROOT

from atlas_lib.stages import STAGES
from tools import publish, website

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
README = (ROOT / "README.md").read_text("utf-8")
PROSE = [
    ROOT / "README.md",
    *sorted((ROOT / "experiments").glob("*.md")),
    *sorted((ROOT / "site").glob("*.md*")),
]
# A decimal, a percentage, a number with thousands: what a reader would take to be a result.
FIGURE = re.compile(r"(?<![\w.,:/-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w/]|\.\d|,\d)")
NO_RESULTS = (
    r"```.*?```|~~~.*?~~~",  # code, commands
    r"`[^`]*`|\]\([^)]*\)|https?://\S+|arXiv:\S+",  # names, links
    r"\{\{.*?\}\}|\{%.*?%\}|\$[^$]*\$",  # templates, formulas
    r"Python 3\.\d+ to 3\.\d+|Apache-2\.0|\d{4}-\d\d-\d\d|95 %|seed \d+|sm_\d+",
)


def figures(text: str) -> set[str]:
    """The numbers in prose that look like results."""
    for pattern in NO_RESULTS:
        text = re.sub(pattern, " ", text, flags=re.S)
    found = {match.rstrip(",") for match in FIGURE.findall(text)}
    return {f for f in found if "." in f or "," in f or len(f) > 3}


def numbers(value) -> Iterator[float]:
    """All numbers in a tree of JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


@pytest.fixture(scope="module")
def known() -> set[float]:
    """Every number in results/, the cited ones and the configured ones."""
    files = [*sorted((ROOT / "results").rglob("*.json")), ROOT / "configs" / "published.json"]
    found = {n for path in files for n in numbers(json.loads(path.read_text("utf-8")))}
    for path in (ROOT / "configs").glob("*.yaml"):
        found |= set(numbers(yaml.safe_load(path.read_text("utf-8"))))
    return found


def unfounded(text: str, known: set[float]) -> list[str]:
    """Figures of a text that are no rounded known number, as it is, in percent or in millions."""
    found = []
    for figure in sorted(figures(text)):
        decimals = len(figure.partition(".")[2].partition("e")[0])
        value = float(figure.replace(",", ""))
        scaled = (x for n in known for x in (n, 100 * n, n / 1e6))
        if not any(f"{x:.{decimals}f}" == f"{value:.{decimals}f}" for x in scaled):
            found.append(figure)
    return found


@pytest.mark.parametrize("path", PROSE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_figure_has_its_source(path, known):
    assert unfounded(path.read_text("utf-8"), known) == []


@pytest.mark.parametrize("wrong", ["0.777777", "strict accuracy 98.76 %", "1,234,567 rows", "9999"])
def test_a_wrong_figure_is_found(wrong, known):
    assert unfounded(f"{README}\nIt reached {wrong}.", known)


def test_numbers_in_names_are_not_figures():
    text = "Qwen2.5-0.5B, `0.123`, 2026-11-24 and 12 of 0.240, 5,000."
    assert figures(text) == {"0.240", "5,000"}


def table_faults(text: str, rows: list[dict]) -> list[str]:
    """Where README's table differs from the rows of the published run."""
    lines = [publish.readme_row(row) for row in rows]
    shown = re.findall(r"^\| (?:base|SFT) \|.*$", text, flags=re.M)
    return sorted(set(lines) ^ set(shown))


def test_the_table_is_the_published_run():
    rows = website.template_values()["metrics"]
    assert rows
    assert table_faults(README, rows) == []
    rows[-1]["prompt_level_strict_acc"] += 0.001
    assert table_faults(README, rows)


def test_every_published_row_names_its_clean_commit_and_run():
    metrics = json.loads((ROOT / "results" / "metrics.json").read_text("utf-8"))
    for row in metrics:
        assert re.fullmatch(r"[0-9a-f]{12}", row["commit"])
        assert row.keys() >= {"model", "format", "data", "hardware", "label"}
        assert {"digest", "config_digest"} & row.keys()


def test_every_cited_figure_has_a_source():
    cited = json.loads((ROOT / "configs" / "published.json").read_text("utf-8"))
    assert all(row["source"].strip() for row in [*cited["rows"], *cited["cited"]])


def paths_of_examples() -> set[str]:
    """Files and folders that the commands of README read or write, but for tracked ones."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.S))
    flags = r"(?:--out|--prompts|--responses|--json|--plot|-p OUT|score|compare|ipynb) ([\w./-]+)"
    found = {*re.findall(flags, blocks), *re.findall(r"compare \S+ (\S+)", blocks)}
    found |= set(re.findall(r"(?:dataset|prompts|base|tokenizer|adapter)=([\w./-]+)", README))
    hub = {"Qwen/Qwen2.5-0.5B", "agaonker/atlas-sft-qwen05b-v2"}
    return {name for name in found if not name.startswith("--")} - hub - {"null"}


def test_following_the_readme_leaves_the_checkout_clean():
    paths = paths_of_examples()
    assert {"runs/try", "runs/r8", "runs/scores/a", "runs/r8.ipynb", "models/mine"} <= paths
    command = ["git", "-C", str(ROOT), "check-ignore", *sorted(paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert set(done.stdout.splitlines()) == paths


def test_an_environment_that_is_a_link_is_ignored(tmp_path):
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text("utf-8"))
    (tmp_path / ".venv").symlink_to(tmp_path)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    found = subprocess.check_output(["git", "-C", str(tmp_path), "status", "--porcelain"])
    assert found == b"?? .gitignore\n"


def test_the_verbs_of_the_texts_and_of_the_makefile_are_the_same():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    verbs = set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))
    text = README + (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= verbs
    [listed] = re.findall(r"^`make` verbs: `([^`]+)`", README, flags=re.M)
    assert set(listed.split()) == verbs


def test_the_tree_is_the_repository():
    tree = re.search(r"## What is where\n\n```\n(.*?)```", README, flags=re.S)[1]
    tracked = subprocess.check_output(["git", "-C", str(ROOT), "ls-files"], text=True).splitlines()
    folders = {line.partition("/")[0] for line in tracked if "/" in line and line[0] != "."}
    rooms = {path.parent.name for path in (ROOT / "atlas_lib").glob("*/__init__.py")}
    assert folders | rooms <= set(re.findall(r"[\w.]+(?=/)", tree))
    files = re.findall(r"[\w.-]+\.(?:yaml|toml|txt|cff|json|md)\b|Makefile|LICENSE", tree)
    assert set(files) <= {Path(line).name for line in tracked}
    assert {path.stem for path in (ROOT / "notebooks").glob("*.py")} <= set(tree.split())


def test_each_notebook_has_its_badges_for_the_repository_of_pyproject():
    repository = PROJECT["urls"]["Repository"]
    on_colab = repository.replace("https://github.com", "https://colab.research.google.com/github")
    on_kaggle = f"https://kaggle.com/kernels/welcome?src={repository}"
    expected = []
    for stage, needs in STAGES.items():
        page = f"blob/main/notebooks/{stage}.ipynb"
        t4 = "&accelerator=nvidiaTeslaT4" if needs.gpu else ""
        expected += [f"{on_kaggle}/{page}{t4}", f"{on_colab}/{page}"]
    assert re.findall(r"\[!\[(?:Kaggle|Colab)\]\S+\]\(([^)]+)\)", README) == expected


def test_every_message_that_a_hosted_session_may_end_with_is_in_the_code():
    section = README.partition("## Run All on Kaggle or Colab")[2].partition("\n## ")[0]
    quoted = re.findall(r'^\| "([^"]+)"', section, flags=re.M)
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "atlas_lib").glob("*.py"))
    assert len(quoted) > 4
    for message in quoted:
        assert message.replace("HF_TOKEN", "{name}") in sources, message


def test_every_link_of_the_texts_leads_somewhere():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PROSE):
        if path.parent.name == "site":
            continue  # tests/tools/test_site.py follows those
        for link in re.findall(r"\]\(([^)#]+)", path.read_text("utf-8")):
            assert link.startswith("http") or (path.parent / link).exists(), (path, link)


def test_the_citation_file_is_valid_and_names_the_repository():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert citation["license"] == PROJECT["license"]
