"""README tells the truth: its table is the file it names, its verbs and paths exist."""

import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_table_is_the_file_that_it_names():
    metrics = json.loads((ROOT / "results" / "offline" / "metrics.json").read_text("utf-8"))
    for row in metrics:
        low, high = row["ci95"]
        line = (
            f"| {row['model']} | {row['format']} | {row['n']} "
            f"| {row['prompt_level_strict_acc']:.3f} | {low:.3f} to {high:.3f} "
            f"| {row['stop_rate']:.2f} |"
        )
        assert line in README
    assert len(re.findall(r"^\| (base|SFT) ", README, flags=re.M)) == len(metrics)
    assert all("-dirty" not in row["commit"] for row in metrics)


def test_the_verbs_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for verb in set(re.findall(r"\bmake ([a-z-]+)", README)):
        assert re.search(rf"^{verb}:", makefile, flags=re.M), verb


def test_every_file_of_the_tree_exists():
    tree = re.search(r"## What is where\n\n```\n(.*?)```", README, flags=re.S)[1]
    named = set(re.findall(r"\b[\w-]+\.(?:py|yaml|toml|txt)\b", tree))
    present = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts}
    assert named <= present
    modules = {path.name for path in (ROOT / "atlas_lib").glob("*.py")} - {"__init__.py"}
    assert modules <= named, modules - named


def test_each_notebook_has_its_badges_for_the_repository_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    repository = project["urls"]["Repository"]
    on_colab = repository.replace("https://github.com", "https://colab.research.google.com/github")
    on_kaggle = f"https://kaggle.com/kernels/welcome?src={repository}"
    expected = [
        f"{start}/blob/main/notebooks/{page.name}"
        for page in sorted((ROOT / "notebooks").glob("0[1-4]*.ipynb"))
        for start in (on_kaggle, on_colab)
    ]
    assert re.findall(r"\.svg\)\]\(([^)]+)\)", README) == expected
