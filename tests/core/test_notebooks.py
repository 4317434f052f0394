"""The notebooks: house style, pairing of .py and .ipynb, and the copy that Kaggle returns.

Their results are tested in tests/runs/test_pipeline.py.
"""

import ast
import functools
import json
import os
import re
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jupytext
import nbformat
import papermill
import pytest
from checks import ROOT, run_python
from IPython.display import HTML
from nbclient import NotebookClient
from tiny import TINY

from atlas_lib import artifacts, notebooks, session, stages
from atlas_lib.config import load_config
from atlas_lib.data_prep import subset
from atlas_lib.evaluate import benchmarks

SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
NAMES = [path.stem for path in SOURCES]
MOST_LINES, MOST_FUNCTIONS, MOST_PLOTS = 15, 2, 3
KEEP = 'notebooks.keep("{}", out)'


def cells_of(path: Path, kind: str) -> list:
    return [cell for cell in jupytext.read(path).cells if cell.cell_type == kind]


def problems(path: Path) -> list[str]:
    """Everything in which one notebook source breaks the house style."""
    prose, code = ([cell.source for cell in cells_of(path, k)] for k in ("markdown", "code"))
    text, written = "\n".join(code), "\n".join(prose)
    long_cells = [cell.splitlines()[0] for cell in code if lines_of(cell) > MOST_LINES]
    functions = re.findall(r"^\s*def ", text, flags=re.M)
    checks = {
        "no H1 that starts with a verb": re.match(r"# [A-Z][a-z]+ ", prose[0]),
        f"{len(functions)} functions": len(functions) <= MOST_FUNCTIONS,
        "too many plots": text.count("show_figure(") <= MOST_PLOTS,
        "plt.show(): show_figure adds text and label": "plt.show(" not in text,
        "a ! or % line": not re.search(r"^[!%]", text, flags=re.M),
        "more code than prose": len(written.split()) >= len(text.split()),
        "the last cell but one does not update the headline": "headline.update(" in code[-2],
        "the last cell does not keep the notebook": code[-1] == KEEP.format(path.stem),
        "no gate: nothing is asserted": re.search(r"^\s*assert ", text, flags=re.M),
    }
    found = [problem for problem, passed in checks.items() if not passed]
    found += [f"a long cell starts with {line!r}" for line in long_cells]
    return found + [f"a result in the prose: {n}" for n in re.findall(r"\b0\.\d{3,}\b", written)]


def lines_of(cell: str) -> int:
    """Lines that count: none where the recipe itself is written down."""
    return 0 if "SFTConfig(" in cell else sum(bool(line.strip()) for line in cell.splitlines())


def test_there_are_the_stages_and_a_report():
    assert [*stages.STAGES, "05_sweep_report"] == NAMES


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_a_notebook_follows_the_house_style(path):
    assert problems(path) == []
    for cell in cells_of(path, "code"):
        ast.parse(cell.source)


PLANTED = {
    "a ! or % line": "!pip list",
    "more code than prose": "x = [" + ", ".join(map(str, range(3000))) + "]",
    "a long cell starts with 'x = 0'": "\n".join(f"x = {i}" for i in range(16)),
    "3 functions": "def f(): ...\ndef g(): ...\ndef h(): ...",
    "plt.show(): show_figure adds text and label": "plt.show()",
    "too many plots": "show_figure()\n" * 4,
    "the last cell but one does not update the headline": "print()",
    "the last cell does not keep the notebook": "headline.update(1)",
}


@pytest.mark.parametrize(("problem", "cell"), PLANTED.items(), ids=PLANTED.keys())
def test_a_planted_style_fault_is_found(problem, cell, tmp_path):
    planted = tmp_path / "planted.py"
    text = SOURCES[0].read_text("utf-8").replace("# # Select", "# # 01").replace("assert ", "")
    planted.write_text(f"{text}\n# %% [markdown]\n# It was 0.653.\n\n# %%\n{cell}\n", "utf-8")
    expected = {"a result in the prose: 0.653", "no H1 that starts with a verb", problem}
    assert expected | {"no gate: nothing is asserted"} <= set(problems(planted))


def paired_differences(source: Path, pair: Path) -> list[str]:
    """Where a .py and its .ipynb differ in cells, tags, kernel or committed outputs."""
    here, there = (
        [(c.cell_type, c.source, tuple(c.metadata.get("tags", []))) for c in notebook.cells]
        for notebook in (jupytext.read(source), jupytext.read(pair))
    )
    notebook = jupytext.read(pair)
    found = ["cells differ: run `make notebooks`"] if here != there else []
    for key in ("accelerator", "colab", "kaggle"):  # jupytext would keep the pair's
        if jupytext.read(source).metadata.get(key) != notebook.metadata.get(key):
            found.append(f"metadata differ: {key}")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("no python3 kernelspec, which papermill and Kaggle need")
    if any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells):
        found.append("committed outputs: they belong in results/")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_py_and_ipynb_have_the_same_cells(path):
    assert paired_differences(path, path.with_suffix(".ipynb")) == []


def test_a_stale_pair_is_found(tmp_path):
    stale = tmp_path / "stale.py"
    stale.write_text(SOURCES[0].read_text("utf-8").replace("Select the", "Cut the"), "utf-8")
    assert paired_differences(stale, SOURCES[0].with_suffix(".ipynb"))


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_badge_opens_a_notebook_with_internet_and_the_gpu_that_it_needs(stage):
    """Kaggle and Colab read this of the committed pair; the default is a CPU."""
    metadata = jupytext.read(ROOT / "notebooks" / f"{stage}.ipynb").metadata
    gpu = stages.STAGES[stage].gpu
    assert metadata.get("accelerator") == ("GPU" if gpu else None)
    assert metadata.get("colab") == ({"gpuType": "T4"} if gpu else None)
    accelerator = "nvidiaTeslaT4" if gpu else "none"
    assert metadata.get("kaggle") == {"accelerator": accelerator, "isInternetEnabled": True}


def test_parameters_and_bootstrap_are_the_same_everywhere():
    for tag in ("parameters", "bootstrap"):
        tagged = [
            [c.source for c in cells_of(path, "code") if tag in c.metadata.get("tags", [])]
            for path in SOURCES
        ]
        assert all(cells == tagged[0] and len(cells) == 1 for cells in tagged), tag


def test_the_bootstrap_cell_names_the_repository_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for path in SOURCES:
        assert f'"{project["urls"]["Repository"]}"' in path.read_text("utf-8")


@pytest.fixture
def kaggle(tmp_path, monkeypatch) -> Path:
    """/kaggle/working with notebook 01 as it is while it runs."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(session, "KAGGLE", tmp_path)
    (tmp_path / "working").mkdir()
    shutil.copy(SOURCES[0].with_suffix(".ipynb"), tmp_path / "working" / "__notebook__.ipynb")
    return tmp_path / "working"


def test_on_kaggle_the_running_notebook_is_copied_to_out(kaggle):
    notebooks.keep("01_data_prep", kaggle)
    [kept] = (kaggle / "notebooks").iterdir()
    assert kept.name == "01_data_prep.ipynb"
    assert kept.read_bytes() == SOURCES[0].with_suffix(".ipynb").read_bytes()


@pytest.mark.parametrize("nested", [True, False])
def test_nested_or_elsewhere_no_notebook_is_copied(nested, kaggle, monkeypatch):
    if nested:
        monkeypatch.setenv(session.NESTED, "1")
    else:
        monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    notebooks.keep("03_sft_train", kaggle)
    assert not (kaggle / "notebooks").exists()


FIGURE = """
import matplotlib.pyplot as plt
from atlas_lib import notebooks
figure, axes = plt.subplots()
notebooks.show_figure(figure, "a line that rises", "not a result")
figure.get_suptitle()
"""


def test_a_figure_is_shown_once_with_its_text_and_label():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(FIGURE)])
    NotebookClient(notebook, kernel_name="python3").execute()
    [shown, title] = notebook.cells[0].outputs
    assert shown.metadata["image/png"] == {"alt": "a line that rises"}
    assert title.data["text/plain"] == "'not a result'"


DOLLARS = """
import matplotlib.pyplot as plt
from atlas_lib import notebooks
figure, axes = plt.subplots(layout="constrained")
axes.bar([r"$\\foo$"], [1])
axes.set_title(r"$\\foo$ rises")
notebooks.show_figure(figure, "a bar", r"$\\foo$")
"""


def test_a_dollar_in_a_name_starts_no_formula():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(DOLLARS)])
    NotebookClient(notebook, kernel_name="python3").execute()
    [shown] = notebook.cells[0].outputs
    assert shown.metadata["image/png"] == {"alt": "a bar"}


def test_control_characters_of_data_are_shown_escaped():
    text = "\x1b]0;title\x07 Tee\r\n\t\x9b31m für 茶 \x00\x7f"
    shown = r"\x1b]0;title\x07 Tee\r" + "\n\t" + r"\x9b31m für 茶 \x00\x7f"
    assert notebooks.printable(text) == shown


ESCAPE = "\x1b]0;title\x07"


def run_cell(name: str, words: str, **names) -> dict:
    """The names after the one cell of a notebook that has these words is executed."""
    cells = cells_of(ROOT / "notebooks" / f"{name}.py", "code")
    [source] = [cell.source for cell in cells if words in cell.source]
    exec(source, names)
    return names


@pytest.mark.parametrize(
    ("name", "words"), [("01_data_prep", "load_subset("), ("04_ifeval_eval", "evaluation_prompts(")]
)
def test_no_control_character_of_data_reaches_the_terminal(name, words, tmp_path, capsys):
    turns = [{"role": role, "content": ESCAPE} for role in ("user", "assistant")]
    artifacts.write_jsonl(tmp_path / "data.jsonl", [{"messages": turns}] * 2)
    row = {"key": 1, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    artifacts.write_jsonl(tmp_path / "prompts.jsonl", [row | {"prompt": ESCAPE}])
    given = {"data.n_samples": 1, "data.n_validation": 1, "eval.prompts_revision": None}
    given |= {"data.dataset": f"{tmp_path}/data.jsonl", "eval.prompts": f"{tmp_path}/prompts.jsonl"}
    config = load_config("sft_qwen05b", "offline", given)
    run_cell(name, words, config=config, subset=subset, benchmarks=benchmarks, notebooks=notebooks)
    shown = capsys.readouterr().out
    assert repr(ESCAPE)[1:-1] in shown
    assert not {"\x1b", "\x07"} & set(shown)


def test_a_conversation_in_colour_has_no_control_characters():
    tokenizer = SimpleNamespace(decode="".join)
    names = {"tokenizer": tokenizer, "notebooks": notebooks, "HTML": HTML}
    as_html = run_cell("02_template_audit", "def as_html", **names)
    shown = as_html["as_html"]([*ESCAPE, "\n", "<"], [0, 0, 1, 1, *[0] * (len(ESCAPE) - 2)])
    assert repr(ESCAPE)[1:-1] in re.sub("<[^>]*>", "", shown.data)
    assert "\n" in shown.data
    assert "&lt;" in shown.data


WITHOUT_TRAINER = """
import sys, pathlib
from atlas_lib.loss_mask import audit
from atlas_lib.config import load_config
from atlas_lib.data_prep import subset
audit.run_audit(load_config("sft_qwen05b", "offline", {tiny}), pathlib.Path(sys.argv[1]))
assert not {{"trl", "peft", "bitsandbytes"}} & set(sys.modules), set(sys.modules)
"""


def test_the_first_two_stages_import_neither_trl_nor_peft(tmp_path):
    """The audit has to be independent of the trainer."""
    done = run_python("-c", WITHOUT_TRAINER.format(tiny=TINY), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "02_template_audit" / "summary.json").is_file()


@pytest.mark.parametrize("argv", [["sleep", "9"], ["false"]], ids=["no answer", "ends at once"])
def test_a_kernel_that_does_not_answer_names_cause_and_fix(argv, tmp_path, monkeypatch):
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    impatient = functools.partial(papermill.execute_notebook, start_timeout=1)
    monkeypatch.setattr(papermill, "execute_notebook", impatient)
    with pytest.raises(RuntimeError, match=r"01_data_prep stopped: its process did not") as e:
        notebooks.execute("01_data_prep", tmp_path / "out", {})
    assert "`ip link set lo up`" in str(e.value)
    assert "run it again" in str(e.value)


IN_JUPYTER = """
import nbformat, nbclient
notebook = nbformat.read("01_data_prep.ipynb", as_version=4)
[cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
cell.source = "CONFIG, OVERLAY, OUT, SET = 'sft_qwen05b', 'offline', {out!r}, {given}"
nbclient.NotebookClient(notebook, kernel_name="python3").execute()
"""


@pytest.mark.slow
def test_a_relative_out_is_the_same_for_jupyter_children_and_tools(tmp_path):
    """As in Jupyter, 01 runs in notebooks/; a tool then finds its result from elsewhere."""
    out = os.path.relpath(tmp_path / "out", ROOT / "notebooks")
    code = IN_JUPYTER.format(out=out, given=TINY)
    done = run_python("-c", code, cwd=ROOT / "notebooks")
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "out" / "01_data_prep" / "train.jsonl").read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    given = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    given += ["--overlay", "offline", "--out", "../out"]
    for _ in range(2):
        done = run_python(
            "-m", "tools.run", "01_data_prep", *given, cwd=elsewhere, PYTHONPATH=str(ROOT)
        )
        assert done.returncode == 0, done.stderr
        assert f"results in {tmp_path / 'out'}: notebooks" in done.stdout
    assert "finished and unchanged, reused" in done.stdout
    assert (tmp_path / "out" / "01_data_prep" / "train.jsonl").read_bytes() == first
    assert list(elsewhere.iterdir()) == []


@pytest.mark.slow
def test_a_relative_file_is_the_same_for_a_tool_and_its_notebooks(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"messages": [*chat[:1], {"role": "assistant", "content": f"{n}"}]} for n in range(9)]
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = {"data.dataset": "chats.jsonl", "data.n_samples": 6, "data.n_validation": 3}
    sets = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    command = ["-m", "tools.run", "01_data_prep", "--overlay", "offline", "--out", "out", *sets]
    done = run_python(*command, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out" / "01_data_prep" / "train.jsonl").read_text().splitlines()) == 6
