"""Stages on disk: the manifest is written last, and a result that does not fit is refused."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from checks import refusal
from hypothesis import example, given
from hypothesis import strategies as st

from atlas_lib import artifacts, notebooks
from atlas_lib.config import load_config

FIRST, SECOND = "01_data_prep", "02_template_audit"


@pytest.fixture(scope="module")
def config():
    return load_config("sft_qwen05b")


def finish(name, config, out: Path, text="row", inputs=()) -> Path:
    """A finished stage of two files."""
    with artifacts.stage(name, config, out, inputs) as folder:
        artifacts.write_jsonl(folder / "rows.jsonl", [{"text": text}])
        artifacts.write_json(folder / "deep" / "card.json", {"n": 1})
    return folder


# --- the manifest is written last -----------------------------------------------------------------


def test_a_finished_stage_is_described_and_intact(config, tmp_path):
    folder = finish(FIRST, config, tmp_path)
    manifest = artifacts.check(folder, config)
    rows = hashlib.sha256((folder / "rows.jsonl").read_bytes()).hexdigest()
    assert folder == tmp_path / FIRST
    assert manifest["stage"] == FIRST
    assert manifest["digest"] == artifacts.config_digest(config, FIRST)
    assert manifest["outputs"].keys() == {"rows.jsonl", "deep/card.json"}
    assert manifest["outputs"]["rows.jsonl"] == rows
    assert manifest["inputs"] == {}
    assert {"commit", "versions", "platform", "hardware"} <= manifest.keys()
    assert not list(tmp_path.rglob("*.part"))


def test_the_ledger_is_recorded_and_identifies_nothing(config, tmp_path):
    first = finish(FIRST, config, tmp_path)
    with artifacts.stage(SECOND, config, tmp_path, [first], tokens=1024) as second:
        artifacts.write_json(second / "summary.json", {})
    path = first / artifacts.MANIFEST
    manifest, digest = artifacts.read_json(path), artifacts.result_digest(first)
    ledger = artifacts.read_manifest(second)["ledger"]
    assert ledger["tokens"] == 1024
    assert 0 <= ledger["minutes"] < 1 / 60 < 60 * manifest["ledger"]["minutes"]  # own time only
    assert 0 < ledger["process_gib"] < 64
    artifacts.write_json(path, manifest | {"ledger": {"minutes": 99.0}})
    assert artifacts.result_digest(first) == digest
    artifacts.check(second, config, {FIRST: first})
    table = notebooks.ledger(tmp_path)
    assert table[FIRST].to_dict() == dict.fromkeys(ledger, "-") | {"minutes": "99.00"}
    assert table[SECOND]["tokens"] == "1,024"


def test_an_input_is_identified_by_its_result_and_not_by_its_commit(config, tmp_path):
    first = finish(FIRST, config, tmp_path)
    second = finish(SECOND, config, tmp_path, inputs=[first])
    manifest = artifacts.check(second, config, {FIRST: first})
    assert manifest["inputs"] == {FIRST: artifacts.result_digest(first)}
    path = finish(FIRST, config, tmp_path) / artifacts.MANIFEST
    path.write_text(path.read_text("utf-8").replace('"commit": "', '"commit": "other-'), "utf-8")
    artifacts.check(second, config, {FIRST: first})


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_stage_has_no_manifest_and_is_not_found(fault, config, tmp_path):
    finish(FIRST, config, tmp_path)  # the manifest of the earlier run must go first

    def interrupted():
        with artifacts.stage(FIRST, config, tmp_path) as folder:
            assert not (folder / artifacts.MANIFEST).exists()
            artifacts.write_jsonl(folder / "rows.jsonl", [{}])
            raise fault

    with pytest.raises(fault):
        interrupted()
    assert (tmp_path / FIRST / "rows.jsonl").is_file()
    assert artifacts.find(FIRST, tmp_path) == []


def test_files_of_an_earlier_run_are_removed(config, tmp_path):
    """Responses of 04 in two formats, then in one: the other format's must be gone."""
    with artifacts.stage(FIRST, config, tmp_path) as folder:
        artifacts.write_json(folder / "responses" / "raw.json", {})
    outputs = artifacts.check(finish(FIRST, config, tmp_path), config)["outputs"]
    assert outputs.keys() == {"rows.jsonl", "deep/card.json"}


# --- what does not fit is named -------------------------------------------------------------------


def flip_first_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["rows.jsonl", "deep/card.json"])
@pytest.mark.parametrize(
    "fault", [flip_first_byte, Path.unlink, lambda p: os.truncate(p, p.stat().st_size - 1)]
)
def test_a_damaged_file_is_named(file, fault, config, tmp_path):
    folder = finish(FIRST, config, tmp_path)
    fault(folder / file)
    sentence = refusal(artifacts.check, folder, config)
    assert str(folder / file) in sentence
    assert f"run {FIRST} again" in sentence


OLDER = json.dumps({"stage": FIRST, "relevant": {}, "inputs": {}, "outputs": {}})


@pytest.mark.parametrize("text", ['{"format": ', "", "[]", OLDER])
def test_a_damaged_or_older_manifest_is_named(text, config, tmp_path):
    folder = finish(FIRST, config, tmp_path)
    (folder / artifacts.MANIFEST).write_text(text, "utf-8")
    sentence = refusal(artifacts.check, folder, config)
    assert str(folder / artifacts.MANIFEST) in sentence
    assert "another version of Atlas" in sentence


@pytest.mark.parametrize(
    ("key", "there", "here"),
    [("data.split", "train_sft", "test_sft"), ("train.weight_decay", None, 0.1)],
)
def test_another_configuration_names_key_and_both_values(key, there, here, config, tmp_path):
    folder = finish("03_sft_train", config, tmp_path)
    sentence = refusal(artifacts.check, folder, load_config("sft_qwen05b", "", {key: here}))
    assert f"{key} is {there!r} there and {here!r} here" in sentence
    assert str(folder) in sentence
    assert "run 03_sft_train again" in sentence


@pytest.mark.parametrize("recorded", [True, False])
def test_another_input_is_named(recorded, config, tmp_path):
    first = finish(FIRST, config, tmp_path)
    second = finish(SECOND, config, tmp_path, inputs=[first] if recorded else [])
    finish(FIRST, config, tmp_path, text="another row")
    sentence = refusal(artifacts.check, second, config, {FIRST: first})
    assert f"{second} was made from another {FIRST}" in sentence
    assert f"run {SECOND} again" in sentence


@pytest.mark.parametrize(
    ("key", "file", "stage"),
    [
        ("model.adapter", "adapter_model.safetensors", "04_ifeval_eval"),
        ("model.adapter", "adapter_config.json", "04_ifeval_eval"),
        ("model.base", "model.safetensors", "03_sft_train"),
        ("model.tokenizer", "tokenizer.json", "02_template_audit"),
        ("data.dataset", "data/train_sft.parquet", "01_data_prep"),
        ("data.dataset", "", "01_data_prep"),  # a local file
        ("eval.prompts", "prompts.json", "04_ifeval_eval"),
    ],
)
def test_other_content_in_the_same_place_is_another_source(key, file, stage, tmp_path):
    folder = tmp_path / "source"
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(b"first")
    config = load_config("sft_qwen05b", "", {key: str(folder)})
    finished = finish(stage, config, tmp_path)
    artifacts.check(finished, config)
    (folder / file).write_bytes(b"second")
    assert f"content of {folder}" in refusal(artifacts.check, finished, config)


# --- find and require -----------------------------------------------------------------------------


@pytest.mark.parametrize("mount", ["slug", "notebooks/owner/slug", "a/b/c/d/e"])
def test_a_stage_is_found_below_the_kaggle_input_unless_out_has_it(
    mount, kaggle_input, config, tmp_path
):
    mounted, out = finish(FIRST, config, kaggle_input / mount), tmp_path / "out"
    assert artifacts.find(FIRST, out) == [mounted]
    assert artifacts.find(SECOND, out) == []
    own = finish(FIRST, config, out)
    assert artifacts.find(FIRST, out) == [own]


def test_require_builds_a_missing_stage_once(config, tmp_path, capsys):
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


@pytest.mark.parametrize("line", [b"{", b"[]", b"not json", b'{"a": "\xff"}'])
def test_a_broken_line_is_named(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    assert f"{path}, line 2:" in refusal(artifacts.read_jsonl, path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    artifacts.write_jsonl(path, [{"old": 1}])
    with pytest.raises(TypeError):
        artifacts.write_jsonl(path, [{"new": 1}, {"new": object()}])
    assert artifacts.read_jsonl(path) == [{"old": 1}]


def test_a_reader_keeps_the_whole_old_file(tmp_path):
    path = tmp_path / "card.json"
    artifacts.write_json(path, {"old": 1})
    with path.open("rb") as file:
        artifacts.write_json(path, {"new": 1})
        assert json.load(file) == {"old": 1}
    assert artifacts.read_json(path) == {"new": 1}
