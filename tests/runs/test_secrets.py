"""Canary secrets go through notebook 03 with the real clients and are found in no file or line."""

import json
from pathlib import Path

import pytest
import stub_hub
from checks import run_python
from tiny import TINY

WANDB_KEY = "canary7d3e5b" * 4
SECRETS = (stub_hub.TOKEN, WANDB_KEY)
GIVEN = TINY | {"output.hub_repo": "{user}/atlas-test", "train.report_to": "wandb"}


def train(hub, out: Path, home: Path, **more):
    """Notebook 03 with both secrets in its environment."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in (GIVEN | more).items()]
    command = ["01_data_prep", "02_template_audit", "03_sft_train", "--overlay", "offline"]
    command += ["--out", out, *(part for text in overrides for part in ("--set", text))]
    variables = {"HF_TOKEN": SECRETS[0], "WANDB_API_KEY": SECRETS[1], "WANDB_MODE": "offline"}
    variables |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    variables |= {"NO_PROXY": "*", "no_proxy": "*"}
    return run_python("-m", "tools.run", *command, **variables)


def leaks(folder: Path) -> list[str]:
    """Files below `folder` that hold a secret."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    contents = {path: path.read_bytes() for path in files}
    return [str(p) for p, c in contents.items() if any(s.encode() in c for s in SECRETS)]


def test_a_leak_would_be_found(tmp_path):
    (tmp_path / "log").write_bytes(b"\x00key=" + WANDB_KEY.encode())
    assert leaks(tmp_path) == [str(tmp_path / "log")]


@pytest.mark.slow
def test_no_secret_is_in_a_file_or_in_printed_text(tmp_path):
    out, home = tmp_path / "out", tmp_path / "home"
    with stub_hub.serve() as hub:
        early = train(hub, out, home, **{"run.session_hours": 0.001})
        assert early.returncode == 1
        assert "the session's end is near" in early.stderr
        checkpoints = list(out.glob("checkpoints/*/checkpoint-*/training_args.bin"))
        assert checkpoints  # they are searched too
        assert leaks(out) == []
        done = train(hub, out, home)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert leaks(out) == []
    for shown in (early.stdout, early.stderr, done.stdout, done.stderr):
        assert not any(secret in shown for secret in SECRETS)
    # both secrets were used
    assert "W&B: on" in done.stdout
    [first, second] = out.glob("wandb/offline-run-*/run-*.wandb")
    assert first.stat().st_size and second.stat().st_size
    adapter = out / "03_sft_train" / "adapter"
    files = [path for path in adapter.rglob("*") if path.is_file()]
    on_disk = {path.relative_to(adapter).as_posix(): path.read_bytes() for path in files}
    assert hub.files["alice/atlas-test"] == on_disk
    assert hub.private["alice/atlas-test"]
