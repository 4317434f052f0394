"""The notebooks' style gates and their pairing; what they compute is tested in test_pipeline.py."""

import ast
import re
import shutil
import tomllib
from pathlib import Path

import jupytext
import pytest

from atlas_lib import notebooks, session
from atlas_lib.config import STAGES

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
NAMES = [path.stem for path in SOURCES]
MOST_LINES, MOST_FUNCTIONS, MOST_PLOTS = 15, 2, 3


def cells_of(path: Path, kind: str) -> list:
    return [cell for cell in jupytext.read(path).cells if cell.cell_type == kind]


def problems(path: Path) -> list[str]:
    """Everything in which one notebook source breaks the house style."""
    code, prose = cells_of(path, "code"), cells_of(path, "markdown")
    sources = [cell.source for cell in code]
    trees = [ast.parse(re.sub(r"^[!%].*$", "pass", source, flags=re.M)) for source in sources]
    text = "\n".join(sources)
    found = []
    if not re.match(r"# [A-Z][a-z]+ ", prose[0].source):
        found.append("the first cell is not an H1 that starts with a verb")
    for source in sources:
        lines = sum(bool(line.strip()) for line in source.splitlines())
        if lines > MOST_LINES and "SFTConfig(" not in source:
            found.append(f"a cell of {lines} lines starts with {source.splitlines()[0]!r}")
    functions = sum(isinstance(node, ast.FunctionDef) for tree in trees for node in ast.walk(tree))
    if functions > MOST_FUNCTIONS:
        found.append(f"{functions} functions")
    if text.count("figures.show(") > MOST_PLOTS:
        found.append("too many plots")
    if "plt.show(" in text:
        found.append("plt.show() shows a figure without text and label: take figures.show")
    if re.search(r"^[!%]", text, flags=re.M):
        found.append("a ! or % line")
    if sum(len(c.source.split()) for c in prose) < sum(len(source.split()) for source in sources):
        found.append("more code than prose")
    if "display_id=True" not in text or "headline.update(" not in sources[-2]:
        found.append("the last cell but one does not update the headline")
    if sources[-1] != f'notebooks.keep("{path.stem}", out)':
        found.append("the last cell does not keep the page")
    if "assert " not in text:
        found.append("no gate: nothing is asserted")
    for cell in prose:
        found += [f"a result in the prose: {n}" for n in re.findall(r"\b0\.\d{3,}\b", cell.source)]
    return found


def test_there_are_four_stages_and_a_report():
    assert [*STAGES, "05_sweep_report"] == NAMES


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_style(path):
    assert problems(path) == []


PLANTED = {
    "a ! or % line": "!pip list",
    "more code than prose": "x = [" + ", ".join(map(str, range(3000))) + "]",
    "a cell of 16 lines starts with 'x = 0'": "\n".join(f"x = {i}" for i in range(16)),
    "3 functions": "def f(): ...\ndef g(): ...\ndef h(): ...",
    "plt.show() shows a figure without text and label: take figures.show": "plt.show()",
    "too many plots": "figures.show()\n" * 4,
    "the last cell but one does not update the headline": "print()",
    "the last cell does not keep the page": "headline.update(1)",
}


@pytest.mark.parametrize(("problem", "cell"), PLANTED.items(), ids=PLANTED.keys())
def test_a_planted_style_fault_is_found(problem, cell, tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text(SOURCES[0].read_text("utf-8") + f"\n# %%\n{cell}\n", "utf-8")
    assert problem in problems(planted)


def test_a_planted_result_in_the_prose_is_found(tmp_path):
    planted = tmp_path / "planted.py"
    text = "\n# %% [markdown]\n# It reached 0.653.\n"
    planted.write_text(SOURCES[0].read_text("utf-8") + text, "utf-8")
    assert "a result in the prose: 0.653" in problems(planted)


def paired_differences(source: Path, page: Path) -> list[str]:
    """Where a .py and its .ipynb differ in cells, tags, kernel or committed outputs."""
    text, notebook = jupytext.read(source), jupytext.read(page)
    here, there = (
        [(c.cell_type, c.source, tuple(c.metadata.get("tags", []))) for c in n.cells]
        for n in (text, notebook)
    )
    found = ["cells differ: run `make notebooks`"] if here != there else []
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("no python3 kernelspec: papermill and Kaggle would die")
    if any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells):
        found.append("committed outputs: they belong to results/")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_pair_agrees(path):
    assert paired_differences(path, path.with_suffix(".ipynb")) == []


def test_a_stale_pair_is_found(tmp_path):
    stale = tmp_path / "stale.py"
    stale.write_text(SOURCES[0].read_text("utf-8").replace("Cut the", "Slice the"), "utf-8")
    assert paired_differences(stale, SOURCES[0].with_suffix(".ipynb"))


@pytest.fixture
def kaggle(tmp_path, monkeypatch) -> Path:
    """/kaggle/working with the page of 01 as it is while it runs."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(session, "KAGGLE", tmp_path)
    working = tmp_path / "working"
    working.mkdir()
    shutil.copy(SOURCES[0].with_suffix(".ipynb"), working / "__notebook__.ipynb")
    return working


def test_on_kaggle_the_running_page_is_kept(kaggle):
    notebooks.keep("01_data_prep", kaggle)
    kept = kaggle / "notebooks" / "01_data_prep.ipynb"
    assert kept.read_bytes() == SOURCES[0].with_suffix(".ipynb").read_bytes()
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_a_page_that_runs_inside_another_does_not_keep_the_other(kaggle):
    notebooks.keep("03_sft_train", kaggle)
    assert not (kaggle / "notebooks").exists()


def test_elsewhere_nothing_is_kept(kaggle, monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    notebooks.keep("01_data_prep", kaggle)
    assert not (kaggle / "notebooks").exists()


def test_parameters_and_bootstrap_are_the_same_everywhere():
    tagged = {
        tag: {
            c.source
            for p in SOURCES
            for c in cells_of(p, "code")
            if tag in c.metadata.get("tags", [])
        }
        for tag in ("parameters", "bootstrap")
        if all(any(tag in c.metadata.get("tags", []) for c in cells_of(p, "code")) for p in SOURCES)
    }
    assert {tag: len(sources) for tag, sources in tagged.items()} == {
        "parameters": 1,
        "bootstrap": 1,
    }


def test_the_bootstrap_cell_names_the_repository_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for path in SOURCES:
        assert f'"{project["urls"]["Repository"]}"' in path.read_text("utf-8")
