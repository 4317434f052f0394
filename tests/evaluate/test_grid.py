"""The grid: its models, the origin of responses, and the same responses from several processes."""

import json
import os
import re
import shutil
import signal
import stat
import sys
from pathlib import Path

import filelock
import psutil
import pytest
from checks import refusal, run_python
from ifeval_cases import random_adapter
from tiny import TINY

from atlas_lib import devices, models
from atlas_lib.config import load_config
from atlas_lib.evaluate import benchmarks, grid

CPU = devices.Device("cpu", "float32", "test")
SHORT = TINY | {"eval.limit": 6, "eval.max_new_tokens": 12}


@pytest.fixture(scope="module")
def config():
    return load_config("sft_qwen05b", "offline", SHORT)


@pytest.fixture(scope="module")
def adapter(config, tmp_path_factory):
    return random_adapter(config, tmp_path_factory.mktemp("adapter"))


def generate_all(config, adapter, out):
    prompts = benchmarks.evaluation_prompts(config)
    return grid.generate_all(config, CPU, adapter, prompts, out)["ifeval"]


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """An nvidia-smi that lists two GPUs, first on the PATH."""
    stub, folder = tmp_path / "nvidia-smi", tmp_path
    lines = "".join(f"echo 'GPU {i}: Tesla T4 (UUID: GPU-{i})'\n" for i in range(2))
    stub.write_text(f"#!{os.path.realpath('/bin/sh')}\n{lines}", "utf-8")
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture(scope="module")
def generated(config, adapter, tmp_path_factory):
    """(the grid, OUT) from this process."""
    out = tmp_path_factory.mktemp("one")
    return generate_all(config, adapter, out), out


def test_every_model_responds_to_every_prompt_in_every_format(generated):
    found, _ = generated
    assert grid.model_names(load_config("sft_qwen05b")) == ["base", "SFT", "Instruct"]
    assert list(found) == [(n, f) for n in ("base", "SFT") for f in ("raw", "chat")]
    assert {len(responses) for responses in found.values()} == {6}
    assert found["base", "chat"] != found["SFT", "chat"]


def test_two_processes_give_the_same_responses_each_generated_once(
    config, generated, adapter, two_gpus, tmp_path, capsys, monkeypatch
):
    """The adapter's path is relative to this process's working folder."""
    monkeypatch.chdir(adapter.parent)
    assert generate_all(config, adapter.name, tmp_path) == generated[0]
    begun = re.findall(r"GPU (\d) \| (\S+)-\w{12}.jsonl: 0 responses", capsys.readouterr().out)
    assert sorted(row for _, row in begun) == ["SFT-chat", "SFT-raw", "base-chat", "base-raw"]
    assert {gpu for gpu, _ in begun} <= {"0", "1"}  # a slow start may leave one without a row


def test_a_process_takes_the_rows_that_no_other_one_has(config, generated, adapter, tmp_path):
    """In order, the base first; the row of the other process stays as it is."""
    store = Path(shutil.copytree(generated[1] / grid.STORE, tmp_path / grid.STORE))
    [taken], [absent] = store.glob("base-raw-*.jsonl"), store.glob("SFT-chat-*.jsonl")
    whole, header = absent.read_bytes(), taken.read_bytes().splitlines(keepends=True)[0]
    taken.write_bytes(header)
    absent.unlink()
    command = grid.command(config, adapter, tmp_path, grid.model_names(config))
    with filelock.FileLock(taken.with_suffix(".lock")):
        done = run_python(*command[1:])
    assert done.returncode == 0, done.stderr
    assert taken.read_bytes() == header
    assert sorted(absent.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_an_interrupt_ends_the_processes(config, adapter, two_gpus, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 2)  # they still import
    try:
        with pytest.raises(KeyboardInterrupt):
            generate_all(config, adapter, tmp_path)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert psutil.Process().children(recursive=True) == []
    assert not list((tmp_path / grid.STORE).glob("*.jsonl"))


def test_a_process_that_fails_is_named_and_the_error_is_that_of_this_one(
    config, adapter, two_gpus, tmp_path, capsys
):
    (tmp_path / grid.STORE).write_text("a file where the folder of responses belongs")
    with pytest.raises(FileExistsError):
        generate_all(config, adapter, tmp_path)
    assert "The process on GPU 1 failed (exit code 1)" in capsys.readouterr().out


def test_what_killed_processes_leave_is_generated_by_this_one(
    config, generated, adapter, two_gpus, tmp_path, capsys, monkeypatch
):
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(grid, "command", lambda *_: [sys.executable, "-c", dies])
    assert generate_all(config, adapter, tmp_path) == generated[0]
    assert "The process on GPU 0 failed (exit code -9)" in capsys.readouterr().out


def test_what_is_on_disk_needs_no_model(config, generated, adapter, monkeypatch):
    found, out = generated
    monkeypatch.setattr(models, "load_weights", lambda *a, **k: pytest.fail("a model was loaded"))
    assert generate_all(config, adapter, out) == found


def test_in_float32_no_response_depends_on_the_batch_and_a_change_is_counted(
    config, generated, adapter
):
    prompts = benchmarks.evaluation_prompts(config)["ifeval"]
    given = generated[0]["SFT", "chat"]
    found = grid.decoding_noise(config, CPU, adapter, prompts, given)
    assert list(found.values()) == [len(prompts), 0, 0]
    planted = [given[0] | {"response": ""}, *given[1:]]
    found = grid.decoding_noise(config, CPU, adapter, prompts, planted)
    assert found["responses_changed"] == 1


def test_a_prompt_longer_than_the_context_is_named(config, adapter, tmp_path):
    prompts = [{"key": key, "prompt": "tea " * words} for key, words in ((3, 9), (8, 4000))]
    collect = grid.collector("base", config, CPU, adapter, {"ifeval": prompts}, tmp_path)
    message = refusal(collect, "ifeval", "raw")
    assert "The prompts with the keys [8] do not fit the model's context of" in message
    assert "remove them from eval.prompts" in message


def test_an_adapter_is_merged_unless_in_4_bits(config, adapter):
    merged = grid.load_model("SFT", config, CPU, adapter)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    in_4bit = load_config("sft_qwen05b", "offline", SHORT | {"eval.load_in_4bit": True})
    kept = grid.load_model("SFT", in_4bit, CPU, adapter)
    assert any("lora" in name for name, _ in kept.named_parameters())
    assert any(type(module).__name__ == "Linear4bit" for module in kept.modules())


def test_everything_that_decides_responses_starts_another_file(
    config, adapter, tokenizer, tmp_path
):
    one = grid.response_origin("SFT", "chat", config, CPU, adapter, tokenizer)
    json.dumps(one)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"trained anew")
    half = devices.Device("cuda", "float16", "test")
    others = [
        grid.response_origin("SFT", "chat", config, CPU, tmp_path, tokenizer),
        grid.response_origin("SFT", "raw", config, CPU, adapter, tokenizer),
        grid.response_origin("SFT", "chat", config, half, adapter, tokenizer),
        grid.response_origin("base", "chat", config, CPU, adapter, tokenizer),
    ]
    changes = {
        "eval.max_new_tokens": 13,
        "eval.load_in_4bit": True,
        "seed": 7,  # another tiny model
    }
    for key, value in changes.items():
        other = load_config("sft_qwen05b", "offline", SHORT | {key: value})
        others.append(grid.response_origin("SFT", "chat", other, CPU, adapter, tokenizer))
    tokenizer.chat_template += " "
    others.append(grid.response_origin("SFT", "chat", config, CPU, adapter, tokenizer))
    assert all(other != one for other in others)


HUB, FOUR_BITS = {"model.base": "org/name"}, {"eval.load_in_4bit": True}


@pytest.mark.parametrize(
    ("given", "changed"),
    [(HUB, {"model.base_revision": "a"}), (FOUR_BITS, {"quantization.bnb_4bit_quant_type": "fp4"})],
)
def test_revision_and_quantisation_determine_responses(given, changed, adapter, tokenizer):
    configs = [load_config("sft_qwen05b", "offline", each) for each in (given, given | changed)]
    one, other = (grid.response_origin("SFT", "raw", c, CPU, adapter, tokenizer) for c in configs)
    assert one != other


PARTS = [
    *(("base", file) for file in ("config.json", "model.safetensors")),
    *(("tokenizer", file) for file in ("tokenizer.json", "merges.txt")),
    *(("adapter", f"adapter_{file}") for file in ("config.json", "model.safetensors", "model.bin")),
]


@pytest.mark.parametrize(("key", "file"), PARTS)
def test_responses_of_other_files_in_the_same_folder_are_not_reused(
    key, file, adapter, tokenizer, tmp_path
):
    config = load_config("sft_qwen05b", "offline", {f"model.{key}": str(tmp_path)})
    origins = []
    for content in ("first", "other", "first"):
        (tmp_path / file).write_text(content, "utf-8")
        used = tmp_path if key == "adapter" else adapter
        origins.append(grid.response_origin("SFT", "raw", config, CPU, used, tokenizer))
    assert origins[0] == origins[2] != origins[1]


def test_published_figures_stand_beside_the_full_run_only():
    rows = grid.known_figures(load_config("sft_qwen05b"))
    prompts = [row for row in rows if row["metric"] == "prompt_level_strict_acc"]
    values = {(r["model"], r["format"]): r["value"] for r in prompts if r["should_agree"]}
    assert values == {
        ("base", "raw"): 0.1238,
        ("Instruct", "raw"): 0.1885,
        ("Instruct", "chat"): 0.279,
    }
    for row in rows:
        assert all(row[name] for name in ("metric", "protocol", "engine", "precision", "source"))


def test_the_criterion_of_the_recipe_is_quoted():
    rows = [
        r for r in grid.known_figures(load_config("sft_qwen05b")) if "criterion" in r["protocol"]
    ]
    assert {(r["metric"], r["value"]) for r in rows} == {
        ("prompt_level_strict_acc", 0.25), ("inst_level_strict_acc", 0.4),
    }  # fmt: skip
    assert all("Success criterion" in row["source"] for row in rows)


def test_published_figures_are_not_shown_beside_other_runs():
    assert grid.known_figures(load_config("sft_qwen05b", "offline")) == []
    assert grid.known_figures(load_config("sft_qwen05b", "", {"eval.limit": 40})) == []
