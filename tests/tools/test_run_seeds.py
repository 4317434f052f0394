"""`tools.run --seeds`: one run a seed, shared stages and responses, killed and repeated."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checks import ROOT, run_python
from tiny import TINY

from atlas_lib import session

pytestmark = pytest.mark.slow

STAGES = ["01_data_prep", "02_template_audit", "03_sft_train", "04_ifeval_eval"]
SHORT = TINY | {"offline.pretrain_steps": 60, "train.learning_rate": 0.05}
COMMAND = ["-m", "tools.run", "--overlay", "offline", "--seeds", "7,8"]
COMMAND += [f"--set={key}={value}" for key, value in SHORT.items()]


def kill_after(lines: list[str], out: Path) -> str:
    """Kill the command as soon as it has printed lines that begin like these; its output."""
    command = [sys.executable, *COMMAND, "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    expected, printed = list(lines), ""
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        for line in process.stdout:
            printed += line
            if line.startswith(expected[0]):
                expected.pop(0)
            if not expected:
                process.send_signal(signal.SIGKILL)
                break
        printed += process.communicate()[0]
    assert not expected, printed[-3000:]
    return printed


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """OUT, and what was printed by a command killed in the second seed's training."""
    out = tmp_path_factory.mktemp("seeds")
    printed = kill_after(["── seed 8", "── 03_sft_train", "training step"], out)
    assert not (out / "seeds.json").exists()
    return out, printed


@pytest.fixture(scope="module")
def repeated(killed):
    """OUT after the same command again, and what that printed."""
    done = run_python(*COMMAND, "--out", killed[0])
    assert done.returncode == 0, done.stderr[-3000:]
    return killed[0], done.stdout


def test_the_same_command_continues_at_the_unfinished_seed(killed, repeated):
    out, printed = repeated
    first, second = printed.split("── seed 8")
    assert first.count("finished and unchanged, reused") == len(STAGES)
    assert second.count("finished and unchanged, reused") == 2
    found = json.loads((out / "seeds.json").read_bytes())
    assert [row["seed"] for row in found["seeds"]] == [7, 8]
    assert "the recipe against base, seeds and prompts random: " + found["verdict"] in second
    assert f"results in {out}: seeds.json" in second


def test_what_no_seed_decides_is_made_once(killed, repeated):
    printed = killed[1] + repeated[1]
    assert printed.count("── 01_data_prep: took") == 1
    assert printed.count("── 02_template_audit: took") == 1
    assert printed.count("0 responses are stored") == 2 + 2 * 2  # base, and each seed's SFT
    folders = [repeated[0] / f"seed-{seed}" for seed in (7, 8)]
    files = [{path.name for path in (folder / "responses").glob("*.jsonl")} for folder in folders]
    assert {name[:4] for name in files[0] & files[1]} == {"base"}


def test_the_seeds_train_different_adapters_on_one_base(repeated):
    weights, losses = set(), set()
    for seed in (7, 8):
        stage = repeated[0] / f"seed-{seed}" / "03_sft_train"
        weights.add((stage / "adapter" / "adapter_model.safetensors").read_bytes())
        summary = json.loads((stage / "manifest.json").read_bytes())
        losses.add(json.loads((stage / "summary.json").read_bytes())["validation_loss"])
        assert (summary["config"]["train"]["seed"], summary["config"]["seed"]) == (seed, 42)
    assert len(weights) == len(losses) == 2


def test_a_seed_that_fails_is_named_and_no_old_result_is_left(repeated):
    out = repeated[0]
    with session.hold(out / "seed-8" / session.LOCK, "OUT"):
        done = run_python(*COMMAND, "--out", out)
    assert done.returncode == 1
    [sentence] = done.stderr.splitlines()
    assert sentence.startswith(f"error: seed 8: OUT {out / 'seed-8'} is in use")
    assert not (out / "seeds.json").exists()
    shutil.rmtree(out / "seed-8")  # it begins again with what the first seed lends
    done = run_python(*COMMAND, "--out", out, "01_data_prep", "02_template_audit")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished and unchanged, reused") == 4
