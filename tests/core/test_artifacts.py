"""The hand-over between stages: manifest last, every fault named, nothing read half-written."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from atlas_lib import artifacts, sources
from atlas_lib.config import load_config

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND = "01_data_prep", "02_template_audit"


@pytest.fixture(scope="module")
def config():
    return load_config("sft_qwen05b")


@pytest.fixture(autouse=True)
def kaggle_input(tmp_path, monkeypatch) -> Path:
    """A Kaggle input folder of our own, empty at first."""
    monkeypatch.setattr(artifacts, "KAGGLE_INPUT", tmp_path / "kaggle-input")
    return tmp_path / "kaggle-input"


def finish(name, config, out: Path, text="row", inputs=()) -> Path:
    """A finished stage of two files."""
    with artifacts.stage(name, config, out, inputs) as folder:
        artifacts.write_jsonl(folder / "rows.jsonl", [{"text": text}])
        artifacts.write_json(folder / "deep" / "card.json", {"n": 1})
    return folder


def refusal(folder, config, upstream=None) -> str:
    """The one sentence with which a finished stage is refused."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\.\Z") as caught:
        artifacts.check(folder, config, upstream)
    return str(caught.value)


# --- the manifest is written last -----------------------------------------------------------------


def test_a_finished_stage_is_described_and_intact(config, tmp_path):
    folder = finish(FIRST, config, tmp_path)
    manifest = artifacts.check(folder, config)
    assert folder == tmp_path / FIRST
    assert manifest["stage"] == FIRST
    assert manifest["digest"] == artifacts.config_digest(config, FIRST)
    assert manifest["outputs"].keys() == {"rows.jsonl", "deep/card.json"}
    assert manifest["outputs"]["rows.jsonl"] == sources.sha256(folder / "rows.jsonl")
    assert manifest["inputs"] == {}
    assert {"commit", "versions", "platform", "hardware"} <= manifest.keys()
    assert not list(tmp_path.rglob("*.part"))


def test_inputs_are_recorded_by_what_they_made(config, tmp_path):
    first = finish(FIRST, config, tmp_path)
    second = finish(SECOND, config, tmp_path, inputs=[first])
    manifest = artifacts.check(second, config, {FIRST: first})
    assert manifest["inputs"] == {FIRST: artifacts.result_digest(first)}
    again = finish(FIRST, config, tmp_path)  # the same files from another commit are the same
    path = again / artifacts.MANIFEST
    path.write_text(path.read_text("utf-8").replace('"commit": "', '"commit": "other-'), "utf-8")
    artifacts.check(second, config, {FIRST: again})


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_leaves_no_manifest(fault, config, tmp_path):
    finish(FIRST, config, tmp_path)  # an earlier, finished run must not vouch for the later one

    def interrupted():
        with artifacts.stage(FIRST, config, tmp_path) as folder:
            artifacts.write_jsonl(folder / "rows.jsonl", [{}])
            raise fault

    with pytest.raises(fault):
        interrupted()
    assert not (tmp_path / FIRST / artifacts.MANIFEST).exists()
    assert artifacts.find(FIRST, tmp_path) == []


def test_a_kill_in_the_middle_leaves_no_manifest(config, tmp_path):
    finish(FIRST, config, tmp_path)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from atlas_lib import artifacts\nfrom atlas_lib.config import load_config\n"
        "with artifacts.stage(sys.argv[1], load_config('sft_qwen05b'), Path(sys.argv[2])) as f:\n"
        "    artifacts.write_json(f / 'first.json', {})\n"
        "    print('inside', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, FIRST, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "inside\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert (tmp_path / FIRST / "first.json").is_file()
    assert artifacts.find(FIRST, tmp_path) == []
    built = artifacts.require(FIRST, config, tmp_path, lambda c, out: finish(FIRST, c, out))
    artifacts.check(built, config)


def test_files_of_an_earlier_run_are_not_passed_off_as_outputs(config, tmp_path):
    """04 asked for fewer formats the second time must not hand over the first time's answers."""
    with artifacts.stage(FIRST, config, tmp_path) as folder:
        artifacts.write_json(folder / "responses" / "raw.json", {})
    assert artifacts.check(finish(FIRST, config, tmp_path), config)["outputs"].keys() == {
        "rows.jsonl",
        "deep/card.json",
    }


# --- what does not fit is named -------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["rows.jsonl", "deep/card.json"])
@pytest.mark.parametrize("fault", [flip, truncate, Path.unlink, lambda p: os.truncate(p, 0)])
def test_a_damaged_file_is_named(file, fault, config, tmp_path):
    folder = finish(FIRST, config, tmp_path)
    fault(folder / file)
    sentence = refusal(folder, config)
    assert str(folder / file) in sentence
    assert f"run {FIRST} again" in sentence


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: os.truncate(p, p.stat().st_size // 2),
        lambda p: p.write_text("", "utf-8"),
        lambda p: p.write_text("[]", "utf-8"),
        lambda p: p.write_text("{}", "utf-8"),
        lambda p: p.write_bytes(b"\xff\xfe"),
    ],
    ids=["truncated", "empty", "list", "no keys", "not utf-8"],
)
def test_a_damaged_manifest_is_named(damage, config, tmp_path):
    folder = finish(FIRST, config, tmp_path)
    path = folder / artifacts.MANIFEST
    damage(path)
    assert str(path) in refusal(folder, config)


@pytest.mark.parametrize(
    ("key", "there", "here"),
    [("data.n_samples", 5000, 7), ("data.split", "train_sft", "test_sft")],
)
def test_another_configuration_names_key_and_both_values(key, there, here, config, tmp_path):
    folder = finish(FIRST, config, tmp_path)
    sentence = refusal(folder, load_config("sft_qwen05b", "", {key: here}))
    assert f"{key} is {there!r} there and {here!r} here" in sentence
    assert str(folder) in sentence
    assert f"run {FIRST} again" in sentence


def test_a_key_that_only_one_side_has_is_named(config, tmp_path):
    folder = finish("03_sft_train", config, tmp_path)
    more = load_config("sft_qwen05b", "", {"train.weight_decay": 0.1})
    assert "train.weight_decay is None there and 0.1 here" in refusal(folder, more)


def test_what_does_not_concern_the_stage_does_not_matter(config, tmp_path):
    folder = finish(FIRST, config, tmp_path)
    other = {"eval.limit": 3, "lora.r": 4, "run.eval_slots": 1}
    artifacts.check(folder, load_config("sft_qwen05b", "", other))


def test_another_upstream_is_named(config, tmp_path):
    first = finish(FIRST, config, tmp_path)
    second = finish(SECOND, config, tmp_path, inputs=[first])
    finish(FIRST, config, tmp_path, text="another row")
    sentence = refusal(second, config, {FIRST: first})
    assert f"another {FIRST}" in sentence
    assert str(second) in sentence
    assert f"run {SECOND} again" in sentence


def test_an_upstream_that_was_never_read_is_named(config, tmp_path):
    first = finish(FIRST, config, tmp_path)
    second = finish(SECOND, config, tmp_path)
    assert f"another {FIRST}" in refusal(second, config, {FIRST: first})


@pytest.mark.parametrize(
    ("key", "file", "stage"),
    [
        ("model.adapter", "adapter_model.safetensors", "04_ifeval_eval"),
        ("model.adapter", "adapter_config.json", "04_ifeval_eval"),
        ("model.base", "model.safetensors", "03_sft_train"),
        ("model.tokenizer", "tokenizer.json", "02_template_audit"),
        ("data.dataset", "data/train_sft.parquet", "01_data_prep"),
        ("eval.prompts", "prompts.json", "04_ifeval_eval"),
    ],
)
def test_other_content_in_the_same_place_is_another_source(key, file, stage, tmp_path):
    folder = tmp_path / "source"
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_bytes(b"first")
    config = load_config("sft_qwen05b", "", {key: str(folder)})
    finished = finish(stage, config, tmp_path)
    artifacts.check(finished, config)
    (folder / file).write_bytes(b"second")
    assert f"content of {folder}" in refusal(finished, config)


def test_a_result_of_an_older_version_is_refused(config, tmp_path):
    folder = finish(FIRST, config, tmp_path)
    old = {"stage": FIRST, "relevant": {}, "inputs": {}, "outputs": {}}
    (folder / artifacts.MANIFEST).write_text(json.dumps(old), "utf-8")
    assert "another version of Atlas" in refusal(folder, config)


# --- find and require -----------------------------------------------------------------------------


@pytest.mark.parametrize("mount", ["slug", "notebooks/owner/slug", "a/b/c/d/e"])
def test_a_stage_is_found_at_any_depth_below_the_kaggle_input(
    mount, kaggle_input, config, tmp_path
):
    folder = finish(FIRST, config, kaggle_input / mount)
    assert artifacts.find(FIRST, tmp_path / "out") == [folder]
    assert artifacts.find(SECOND, tmp_path / "out") == []


def test_out_comes_before_the_kaggle_input(kaggle_input, config, tmp_path):
    finish(FIRST, config, kaggle_input / "slug")
    own = finish(FIRST, config, tmp_path / "out")
    assert artifacts.find(FIRST, tmp_path / "out") == [own]


def test_a_stage_without_manifest_is_not_found(kaggle_input, config, tmp_path):
    for out in (kaggle_input / "slug", tmp_path):
        (finish(FIRST, config, out) / artifacts.MANIFEST).unlink()
    assert artifacts.find(FIRST, tmp_path) == []


def test_require_builds_what_is_absent_and_only_that(config, tmp_path, capsys):
    built = []

    def build(config, out):
        built.append(out)
        return finish(FIRST, config, out)

    folders = [artifacts.require(FIRST, config, tmp_path, build) for _ in range(2)]
    assert built == [tmp_path]
    assert folders == [tmp_path / FIRST] * 2
    assert "building it" in capsys.readouterr().out


def test_require_does_not_build_over_what_does_not_fit(kaggle_input, config, tmp_path):
    finish(FIRST, config, kaggle_input / "slug")
    other = load_config("sft_qwen05b", "", {"data.n_samples": 7})
    with pytest.raises(ValueError, match=r"data\.n_samples is 5000 there and 7 here"):
        artifacts.require(FIRST, other, tmp_path / "out", lambda *_: pytest.fail("built"))


# --- files ----------------------------------------------------------------------------------------


@given(st.lists(st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(), max_size=2)))
@example([{"text": "one\u2028two\u2029three\x85four\x0bfive\x1csix\r\nseven"}])
def test_jsonl_round_trips_any_text(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    rows = json.loads(json.dumps(rows).encode("utf-8", "replace"))
    artifacts.write_jsonl(path, rows)
    assert artifacts.read_jsonl(path) == rows


@pytest.mark.parametrize("line", ["{", "", "not json", '{"a": 1'])
def test_a_broken_line_is_named(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n', "utf-8")
    with pytest.raises(ValueError, match=r"\A[^\n]+\.\Z") as caught:
        artifacts.read_jsonl(path)
    assert f"{path}, line 2:" in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl"):
        artifacts.read_jsonl(path)


def test_a_failing_generator_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    artifacts.write_jsonl(path, [{"old": 1}])

    def rows():
        yield {"new": 1}
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        artifacts.write_jsonl(path, rows())
    assert artifacts.read_jsonl(path) == [{"old": 1}]


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "card.json"
    artifacts.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        artifacts.write_json(path, {"new": object()})
    assert json.loads(path.read_text("utf-8")) == {"old": 1}


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, done, seen, faults = tmp_path / "card.json", threading.Event(), set(), []
    artifacts.write_json(path, ["0"] * 20_000)

    def read():
        while not done.is_set():
            try:
                values = json.loads(path.read_text("utf-8"))
                assert len(values) == 20_000
                seen.update(values)
            except Exception as error:
                faults.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(60):
        artifacts.write_json(path, [str(turn)] * 20_000)
    done.set()
    reader.join()
    assert not faults
    assert len(seen) > 1


def test_the_hash_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sources.sha256(tmp_path / "file") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
