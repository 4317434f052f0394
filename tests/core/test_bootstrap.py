"""The bootstrap on bare machines: fake distributions, and a pip that installs nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checks import ROOT

from atlas_lib import bootstrap

FLOORS = {name.partition("[")[0]: floor for name, floor in bootstrap.floors().items()}
# Should the real pip run after all, it refuses: no test may change the machine it runs on.
NO_PIP = {"PIP_REQUIRE_VIRTUALENV": "1", "PIP_NO_INDEX": "1"}
FAKE_PIP = "import json, pathlib, sys\npathlib.Path(__file__).with_name('asked.json').write_text("


@pytest.fixture
def machine(tmp_path) -> Path:
    """A folder of installed packages that meet every floor, and a pip that installs nothing."""
    site = tmp_path / "site"
    (site / "pip").mkdir(parents=True)
    (site / "pip" / "__init__.py").touch()  # without it the real pip, a package, would win
    (site / "pip" / "__main__.py").write_text(f"{FAKE_PIP}json.dumps(sys.argv[1:]))\n", "utf-8")
    for package, version in FLOORS.items():
        install(site, package, version)
    return site


def install(site: Path, package: str, version: str, lines: str = "") -> None:
    """Make importlib.metadata find `package` at `version`."""
    remove(site, package)
    folder = site / f"{package}-{version}.dist-info"
    folder.mkdir()
    text = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n{lines}"
    (folder / "METADATA").write_text(text, "utf-8")


def install_module(site: Path, package: str, version: str) -> None:
    """The same, with a module that has its old version, 0.15.2."""
    install(site, package, version)
    (site / f"{package}-{version}.dist-info" / "RECORD").write_text(f"{package}.py,,\n", "utf-8")
    (site / f"{package}.py").write_text("__version__ = '0.15.2'", "utf-8")


def remove(site: Path, package: str) -> None:
    for folder in site.glob(f"{package}-*.dist-info"):
        shutil.rmtree(folder)


def start(site: Path, code="bootstrap.ensure()", root=ROOT, **environment: str):
    """Run `code` in an interpreter that sees the standard library, `site` and the checkout only."""
    hidden = ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "PYTHONHOME", "VIRTUAL_ENV")
    inherited = {k: v for k, v in os.environ.items() if k not in hidden}
    return subprocess.run(
        [sys._base_executable, "-S", "-c", f"from atlas_lib import bootstrap; {code}"],
        cwd=root,
        env=inherited | NO_PIP | {"PYTHONPATH": f"{site}{os.pathsep}{root}"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def asked_of_pip(site: Path) -> list[str]:
    path = site / "pip" / "asked.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else []


def test_this_environment_lacks_nothing():
    assert bootstrap.missing() == []


def test_a_machine_that_has_all_is_left_alone(machine):
    done = start(machine, KAGGLE_KERNEL_RUN_TYPE="Batch")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert asked_of_pip(machine) == []


COLAB = {"COLAB_RELEASE_TAG": "release-colab"}


@pytest.mark.parametrize("environment", [{"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, COLAB])
def test_a_hosted_session_gets_what_it_lacks_and_only_that(environment, machine):
    """`lm_eval[ifeval]` brings langdetect, too, which Kaggle's image lacks as well."""
    for package in ("trl", "lm_eval"):
        remove(machine, package)
    install(machine, "peft", "0.15.2")
    (machine / "google" / "colab").mkdir(parents=True)
    done = start(machine, **environment)
    asked = asked_of_pip(machine)
    assert done.returncode == 0, done.stderr
    assert asked[0] == "install"
    pins = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    exact = {pin for pin in pins if pin.startswith(("trl=", "peft=", "lm-eval[ifeval]="))}
    assert len(exact) == 3
    assert {a for a in asked if "=" in a} == exact
    assert "-c" in asked  # the constraints of the next test
    assert done.stdout.startswith("Installing ")
    assert "done in" in done.stdout


FLOORS_ONLY = """
if any("==" in argument for argument in sys.argv):
    raise SystemExit("ERROR: ResolutionImpossible")
"""


def test_pins_that_do_not_fit_the_image_are_replaced_by_floors(machine):
    remove(machine, "trl")
    with (machine / "pip" / "__main__.py").open("a") as pip:
        pip.write(FLOORS_ONLY)
    done = start(machine, KAGGLE_KERNEL_RUN_TYPE="Batch")
    assert done.returncode == 0, done.stderr
    assert asked_of_pip(machine)[-1] == f"trl>={FLOORS['trl']}"


def test_every_floor_has_a_pin():
    assert {bootstrap.normal(name) for name in FLOORS} <= bootstrap.pins().keys()


def test_pip_may_move_neither_torch_and_numpy_nor_what_torch_pins(machine):
    """With other versions of CUDA's libraries torch does not load."""
    pins = 'Requires-Dist: nvidia-cublas-cu12==12.8.4.1; platform_system == "Linux"\n'
    pins += 'Requires-Dist: triton==3.6.0; platform_system == "Linux"\nRequires-Dist: sympy>=1.13\n'
    install(machine, "torch", "2.11.0+cu128", pins)
    install(machine, "nvidia_cublas_cu12", "12.8.4.1")
    install(machine, "sympy", "1.14")
    held = start(machine, "print(*bootstrap.held())").stdout.split()
    assert held == [
        "torch==2.11.0+cu128", f"numpy=={FLOORS['numpy']}", "nvidia-cublas-cu12==12.8.4.1",
    ]  # fmt: skip


@pytest.mark.parametrize("package", bootstrap.UNTOUCHABLE)
def test_torch_and_numpy_are_never_upgraded(package, machine):
    install(machine, package, "1.0")
    done = start(machine, KAGGLE_KERNEL_RUN_TYPE="Batch")
    assert done.returncode != 0
    assert f"{package}>=" in done.stderr.splitlines()[-1]
    assert asked_of_pip(machine) == []


@pytest.mark.parametrize("google", [True, False])
def test_on_a_local_machine_nothing_is_installed(google, machine):
    """With and without a package `google`, in which Colab's is looked for."""
    remove(machine, "trl")
    if google:
        (machine / "google").mkdir()
    done = start(machine)
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0
    assert last.startswith("RuntimeError: Missing or too old: trl>=")
    assert "make setup" in last
    assert asked_of_pip(machine) == []


@pytest.mark.parametrize(
    ("version", "old"),
    [("2.11.0+cu128", False), ("2.8.0", False), ("10.0", False), ("2.7.1+cu126", True)],
)
def test_versions_are_compared_as_numbers(version, old, machine):
    assert FLOORS["torch"] == "2.8"
    install(machine, "torch", version)
    done = start(machine, "print(bootstrap.missing())")
    assert done.stdout.strip() == str(["torch>=2.8"] if old else [])


def test_an_installed_wheel_knows_its_floors_without_a_checkout(machine, tmp_path):
    package = tmp_path / "wheel" / "atlas_lib"
    package.mkdir(parents=True)
    for name in ("__init__.py", "bootstrap.py", "compat.py"):
        shutil.copy(ROOT / "atlas_lib" / name, package / name)
    lines = "Requires-Dist: trl>=1.16\nRequires-Dist: lm-eval[ifeval]>=0.4.13\n"
    install(machine, "atlas_sft", "0.1.0", f'{lines}Requires-Dist: ruff>=1; extra == "dev"\n')
    done = start(
        machine, "import json; print(json.dumps(list(bootstrap.floors())))", root=package.parent
    )
    assert {"trl", "lm-eval"} <= {name.partition("[")[0] for name in json.loads(done.stdout)}
    assert "torch" not in done.stdout


def test_every_dependency_has_a_floor():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = text.partition("\ndependencies = [")[2].partition("\n]")[0].split('"')[1::2]
    assert len(FLOORS) == len(listed) > 10


INSTALLING = """
for folder in pathlib.Path(__file__).parent.parent.glob('%s-*'):
    folder.rename(folder.with_name('%s-9.0.dist-info'))
    metadata = folder.with_name('%s-9.0.dist-info') / 'METADATA'
    metadata.write_text('Metadata-Version: 2.1\\nName: %s\\nVersion: 9.0\\n')
"""
SUPPRESSED = "import contextlib\nwith contextlib.suppress(RuntimeError): bootstrap.ensure()\n"


def plant_upgrade(site: Path, package: str) -> None:
    """A package at 0.15.2 that pip will replace while it installs others."""
    install_module(site, package, "0.15.2")
    with (site / "pip" / "__main__.py").open("a") as pip:
        pip.write(INSTALLING.replace("%s", package))


@pytest.mark.parametrize("again", ["", SUPPRESSED])
@pytest.mark.parametrize("package", ["peft", "pyarrow"])
def test_a_package_imported_before_its_upgrade_asks_for_a_restart(package, again, machine):
    """The old version is in memory and the new one on disk; pyarrow has no floor of its own."""
    remove(machine, "trl")
    plant_upgrade(machine, package)
    code = f"import {package}\n{again}bootstrap.ensure()"
    done = start(machine, code, KAGGLE_KERNEL_RUN_TYPE="Interactive")
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0
    assert last.startswith(f"RuntimeError: {package} 0.15.2 had been imported before")
    assert "restart" in last


def test_what_every_kernel_imports_is_no_reason_to_restart(machine):
    """jupyter_client brings dateutil into memory before the first cell, in each new session."""
    remove(machine, "trl")
    plant_upgrade(machine, "dateutil")
    install(machine, "jupyter_client", "7.4.9", "Requires-Dist: dateutil>=2.8.2\n")
    done = start(machine, "import dateutil; bootstrap.ensure()", KAGGLE_KERNEL_RUN_TYPE="Batch")
    assert done.returncode == 0, done.stderr


def test_a_package_that_was_replaced_by_the_users_own_pip_asks_for_a_restart(machine):
    install_module(machine, "peft", FLOORS["peft"])
    done = start(machine, "import peft; bootstrap.ensure()", KAGGLE_KERNEL_RUN_TYPE="Batch")
    assert "RuntimeError: peft 0.15.2 had been imported before" in done.stderr


def test_a_package_imported_after_its_upgrade_is_no_reason_to_restart(machine):
    remove(machine, "trl")
    plant_upgrade(machine, "pyarrow")
    code = "bootstrap.ensure()\nimport pyarrow\nbootstrap.ensure()"
    done = start(machine, code, KAGGLE_KERNEL_RUN_TYPE="Batch")
    assert done.returncode == 0, done.stderr


def test_without_internet_one_sentence_names_the_switch(machine):
    remove(machine, "trl")
    (machine / "pip" / "__main__.py").write_text("raise SystemExit('ERROR: no route')", "utf-8")
    done = start(machine, KAGGLE_KERNEL_RUN_TYPE="Batch")
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0
    assert last.startswith("RuntimeError: pip cannot install trl>=")
    assert "ERROR: no route" in last
    assert "Settings > Internet" in last


def test_telemetry_and_progress_bars_are_off_before_anything_is_imported(machine):
    done = start(
        machine, "bootstrap.ensure(); import os; print(os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    )
    assert done.stdout == "1\n"


@pytest.mark.parametrize(("version", "removed"), [("0.10.0", True), ("0.16.0", False)])
def test_an_old_torchao_is_removed_on_a_hosted_image(version, removed, machine):
    install(machine, "torchao", version)
    done = start(machine, KAGGLE_KERNEL_RUN_TYPE="Batch")
    assert done.returncode == 0, done.stderr
    assert (f"Removed torchao {version}" in done.stdout) == removed
    assert start(machine).returncode == 0  # elsewhere nothing is touched
