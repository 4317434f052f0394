"""IFEval by command: summaries, files that are accepted, files that are refused."""

import json
import re

import pytest
from ifeval_cases import prompt, python, verdict, write

from atlas_lib import artifacts
from atlas_lib.evaluate import ifeval, ifeval_files, significance

# --- summaries


def test_summarise_counts_and_accuracies():
    ids = ["punctuation:no_comma", "startend:quotation"]
    prompts = [prompt(1, ids, [{}, {}]), prompt(2), prompt(3)]
    found = ifeval.summarise(ifeval.score(prompts, ['Sure\n"Tea"', "Tea.", "Tea, hot.\nTea."]))
    assert found["counts"] == {"prompt_strict": 1, "prompt_loose": 3, "inst_strict": 2,
                               "inst_loose": 4, "instructions": 4}  # fmt: skip
    assert found["n"] == 3
    assert found["prompt_level_strict_acc"] == pytest.approx(1 / 3)
    assert found["prompt_level_loose_acc"] == 1.0
    assert (found["inst_level_strict_acc"], found["inst_level_loose_acc"]) == (0.5, 1.0)
    assert found["by_type"] == {"punctuation:no_comma": [2, 3], "startend:quotation": [0, 1]}
    assert found["ci95"] == significance.proportion_ci(1, 3)
    assert found["inst_ci95"] == [0.0, 1.0], "1 of 2, 1 of 1 and 0 of 1, drawn anew: anything"
    assert found["intervals"]["prompt_level_loose_acc"] == significance.proportion_ci(3, 3)
    json.dumps(found)


def test_metrics_of_the_grid_and_of_a_subset():
    prompts, texts = [prompt(key) for key in range(40)], ["Tea, hot.", "Tea."] * 20
    responses = [{"response": text, "stop": None, "n_tokens": 2} for text in texts]
    verdicts = ifeval.score(prompts, texts)
    grid = {("SFT", "raw"): responses}, {("SFT", "raw"): verdicts}
    [whole], [half] = ifeval.grid_metrics(*grid), ifeval.grid_metrics(*grid, [1, 3, 5])
    assert whole.items() >= ifeval.summarise(verdicts).items()
    assert (whole["model"], whole["format"], whole["at_cap"]) == ("SFT", "raw", 1.0)
    assert (half["n"], half["ci95"]) == (3, significance.proportion_ci(3, 3))


# --- prompts


def test_load_prompts_drops_none_kwargs_and_stops_at_the_limit(tmp_path):
    none_filled = {"num_words": 4, "relation": "at least", "keywords": None}
    rows = [prompt(1, ["length_constraints:number_words"], [none_filled]), prompt(2), prompt(3)]
    path = write(tmp_path, *rows, name="needs no suffix")
    loaded = ifeval_files.load_prompts(path, None, limit=2)
    assert [row["key"] for row in loaded] == [1, 2]
    assert loaded[0]["kwargs"] == [{"num_words": 4, "relation": "at least"}]
    assert set(loaded[0]) == {"key", "prompt", "instruction_id_list", "kwargs"}


def test_load_prompts_from_a_folder_with_a_dataset_card(tmp_path):
    files = "{split: train, path: p.parquet}"
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - {files}\n---\n"
    (tmp_path / "README.md").write_text(card)
    import datasets

    rows = [prompt(1), prompt(2, ["startend:end_checker"], [{"end_phrase": "Bye."}])]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")  # fills kwargs with None
    assert ifeval_files.load_prompts(str(tmp_path), None) == rows


# --- the commands

ASKED = [prompt(key, text=f"Name tea {key}.") for key in range(1, 6)]
TEXTS = ["Tea.", "Tea, hot.", "A.", "Sure,\nTea.", ""]
GIVEN = [{"prompt": row["prompt"], "response": text, "n_tokens": 3}
         for row, text in zip(ASKED, TEXTS, strict=True)]  # fmt: skip
KEYED = [{"key": row["key"]} | given for row, given in zip(ASKED, GIVEN, strict=True)]


def command(capsys, *arguments):
    """(exit code, stdout, stderr) of `python -m atlas_lib.ifeval ...`, in this process."""
    code, message = 0, ""
    try:
        ifeval.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code, message = (1, f"{error}\n") if isinstance(error.code, str) else (error.code, "")
    shown = capsys.readouterr()
    return code, shown.out, shown.err + message


def score_files(capsys, folder, given, asked=ASKED, out="scores"):
    prompts = write(folder, *asked)
    responses = write(folder, *given, name="responses.jsonl")
    return command(capsys, "score", "--prompts", prompts, "--responses", responses,
                   "--out", folder / out)  # fmt: skip


@pytest.mark.parametrize("given", [GIVEN, KEYED], ids=["without keys", "with keys"])
def test_score_command_writes_what_score_returns(tmp_path, capsys, given):
    code, shown, warned = score_files(capsys, tmp_path, given)
    assert (code, warned) == (0, "")
    verdicts = ifeval.score(ASKED, TEXTS)
    assert artifacts.read_jsonl(tmp_path / "scores" / "verdicts.jsonl") == verdicts
    assert ifeval_files.load_verdicts(tmp_path / "scores") == verdicts
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary.items() >= ifeval.summarise(verdicts).items()
    assert summary["counts"]["prompt_strict"] == 2 and summary["counts"]["prompt_loose"] == 3
    assert summary["prompts"] == "prompts.jsonl"
    assert summary["responses"].startswith("responses.jsonl sha256 ")
    assert str(tmp_path) not in json.dumps(summary), "no paths of this machine"
    assert re.search(r"^prompts +5$", shown, re.M)
    for name, (low, high) in summary["intervals"].items():
        interval = rf"\({low:.3f} to {high:.3f}\)"
        assert re.search(rf"^{name} +{summary[name]:.4f} {interval}$", shown, re.M)


def test_score_command_as_a_program_writes_nothing_unasked(tmp_path):
    prompts, responses = write(tmp_path, *ASKED), write(tmp_path, *GIVEN, name="r.jsonl")
    arguments = ["-m", "atlas_lib.ifeval", "score", "--prompts", prompts, "--responses"]
    run = python([*arguments, responses])
    assert (run.returncode, run.stderr) == (0, "") and "prompt_level_strict_acc" in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "r.jsonl"]
    run = python([*arguments, f"{tmp_path}/none.jsonl"])
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"error: [Errno 2] No such file or directory: '{tmp_path}/none.jsonl'\n"


def test_a_text_that_differs_is_a_warning_up_to_one_percent(tmp_path, capsys):
    asked = [prompt(key, text=f"Name tea {key}.") for key in range(200)]
    given = [{"key": p["key"], "prompt": p["prompt"], "response": "Tea."} for p in asked]
    given[7]["prompt"], given[150]["prompt"] = "Name tea 7", "Name tea 150!"
    code, _, warned = score_files(capsys, tmp_path, given, asked)
    assert code == 0 and len(warned.splitlines()) == 2
    differs = "the prompt's text differs from the one to score by"
    first = f"warning: {tmp_path / 'responses.jsonl'}, line 8 (key 7): {differs}\n"
    assert warned.startswith(first) and "line 151 (key 150)" in warned
    given[199]["prompt"] = ""
    code, shown, warned = score_files(capsys, tmp_path, given, asked, out="other")
    assert (code, shown, warned.count("\n")) == (1, "", 1), "no warnings before an error"
    assert "line 8 (key 7) is the first of 3 of 200 prompt texts that differ" in warned
    assert not (tmp_path / "other").exists()


def test_a_prompt_that_is_asked_twice_has_two_responses(tmp_path, capsys):
    asked = [prompt(1), prompt(2), prompt(3, text="Name a cup.")]
    given = [{"prompt": row["prompt"], "response": "Tea."} for row in asked]
    assert score_files(capsys, tmp_path, given, asked)[0] == 0
    code, _, error = score_files(capsys, tmp_path, [given[0], *given], asked)
    assert code == 1 and "line 3 does not match key 3" in error


WORDS = ["length_constraints:number_words"]
BAD_PROMPTS = {
    "no rows": ([], "which holds no rows"),
    "broken JSON": ([prompt(), b'{"key": 2'], "line 2: not JSON"),
    "no UTF-8": ([prompt(), b'{"key": "\xff"}'], "line 2: not JSON"),
    "not an object": ([[]], "line 1 lacks a usable 'key'"),
    "no prompt": ([prompt() | {"prompt": None}], "line 1 lacks a usable 'prompt'"),
    "empty prompt": ([prompt(9, text="")], r"line 1 \(key 9\) has an empty 'prompt'"),
    "unknown id": (
        [prompt(), prompt(9, ["punctuation:no_coma"])],
        r"line 2 \(key 9\) has the unknown instruction '.*no_coma'; nearest: punct.*no_comma",
    ),
    "too few kwargs": ([prompt(9, kwargs=[])], r"\(key 9\) has 1 instruction ids and 0 kwargs"),
    "no instruction": ([prompt(9, [], [])], r"line 1 \(key 9\) has 0 instruction ids"),
    "kwargs name": ([prompt(9, WORDS, [{"words": 3}])], r"\(key 9\) has kwargs that do not fit"),
    "kwargs type": (
        [prompt(9, WORDS, [{"num_words": "3", "relation": "at least"}])],
        r"line 1 \(key 9\) has kwargs that do not fit \['length_constraints:number_words'\]",
    ),
    "kwargs missing": (
        [prompt(9, WORDS, [{"num_words": 3}])],
        r"\(key 9\) .*needed, none of them empty or 0: \['num_words', 'relation'\]; given: {'num_w",
    ),
    "kwargs of 0": (
        [prompt(9, WORDS, [{"num_words": 0, "relation": "at least"}])],
        r"\(key 9\) .*none of them empty or 0",
    ),
    "kwargs regex": (
        [prompt(9, ["keywords:existence"], [{"keywords": ["("]}])],
        r"\(key 9\) has kwargs that do not fit .*error: missing \)",
    ),
    "kwargs language": (
        [prompt(9, ["language:response_language"], [{"language": "xx"}])],
        r"\(key 9\) has kwargs that do not fit .*KeyError: 'xx'",
    ),
    "id of another type": ([prompt(9, [["punctuation:no_comma"]])], "has the unknown instruction"),
    "kwargs shape": ([prompt(9, kwargs=["x"])], r"\(key 9\) has kwargs that do not fit"),
    "same key twice": ([prompt(3), prompt(3)], "line 2 repeats key 3 of line 1"),
}


def with_row(line, **changed):
    return [row | changed if n == line else row for n, row in enumerate(KEYED, start=1)]


ELSE = [{"prompt": f"Name cup {n}.", "response": "Cup."} for n in range(5)]
BAD_RESPONSES = {
    "empty": ([], "line 1 is missing or one too many: 0 rows, 5 prompts"),
    "last missing": (GIVEN[:4], "line 5 is missing or one too many: 4 rows, 5 prompts"),
    "one missing": (GIVEN[:2] + GIVEN[3:], "line 3 does not match key 3, .* of another prompt"),
    "keyed missing": (KEYED[1:], "line 1 does not match key 1, .*: its key is 2"),
    "too many": ([*GIVEN, ELSE[0]], "line 6 is missing or one too many: 6 rows, 5 prompts"),
    "same row twice": ([*GIVEN[:2], *GIVEN[1:]], "line 3 does not match key 3"),
    "repeated instead": ([*GIVEN[:4], GIVEN[0]], "line 5 does not match key 5"),
    "same key twice": (with_row(4, key=2), "line 4 does not match key 4, .*: its key is 2"),
    "key as text twice": (with_row(4, key="2"), "line 4 does not match key 4, .*key is '2'"),
    "unknown key": (with_row(2, key=77), "line 2 does not match key 2, .*: its key is 77"),
    "null key": (with_row(2, key=None), "line 2 does not match key 2, .*: its key is None"),
    "missing key": ([*KEYED[:2], GIVEN[2], *KEYED[3:]], "line 3 does not match key 3.*is None"),
    "swapped": ([GIVEN[1], GIVEN[0], *GIVEN[2:]], "line 1 does not match key 1"),
    "swapped keys": ([KEYED[1], KEYED[0], *KEYED[2:]], "line 1 does not match key 1"),
    "another text's": (
        with_row(2, prompt="Name tea 6."),
        r"line 2 \(key 2\) is the first of 1 of 5",
    ),
    "another file's": (ELSE, r"line 1 \(key 1\) is the first of 5 of 5 prompt texts that differ"),
    "no response": (with_row(3, response=None), "line 3 lacks a usable 'response'"),
    "no prompt": ([*GIVEN[:4], {"response": "Tea."}], "line 5 lacks a usable 'prompt'"),
    "response of words": (with_row(3, response=["Tea."]), "line 3 lacks a usable 'response'"),
    "not an object": ([*GIVEN[:4], []], "line 5 lacks a usable 'prompt'"),
    "broken JSON": ([*GIVEN[:2], b'{"prompt": "Na', *GIVEN[3:]], "line 3: not JSON"),
    "blank line": ([*GIVEN[:2], b"", *GIVEN[2:]], "line 3: not JSON"),
    "no UTF-8": (['{"response": "thé"}'.encode("latin-1")], "line 1: not JSON .*'utf-8' codec"),
}
REFUSED = {f"prompts: {name}": (rows, GIVEN, error) for name, (rows, error) in BAD_PROMPTS.items()}
REFUSED |= {
    f"responses: {name}": (ASKED, rows, error) for name, (rows, error) in BAD_RESPONSES.items()
}


@pytest.mark.parametrize(("asked", "given", "error"), REFUSED.values(), ids=REFUSED)
def test_bad_files_are_one_sentence_and_write_nothing(tmp_path, capsys, asked, given, error):
    code, shown, message = score_files(capsys, tmp_path, given, asked)
    assert (code, shown, message.count("\n")) == (1, "", 1)
    bad = "prompts.jsonl" if given is GIVEN else "responses.jsonl"
    assert message.startswith(f"error: {tmp_path / bad}, ") and re.search(error, message)
    assert not (tmp_path / "scores").exists()


def test_files_that_are_not_there_are_named(tmp_path, capsys):
    (tmp_path / "folder.jsonl").mkdir()
    good = write(tmp_path, prompt())
    for bad, error in (("none.jsonl", "No such file"), ("folder.jsonl", "Is a directory")):
        arguments = ["--prompts", tmp_path / bad, "--responses", good]
        code, _, message = command(capsys, "score", *arguments)
        assert code == 1 and error in message and f"{tmp_path / bad}" in message


def test_a_failed_write_leaves_no_summary_of_other_verdicts(tmp_path, capsys):
    score_files(capsys, tmp_path, GIVEN)
    (tmp_path / "scores" / "verdicts.jsonl").unlink()
    (tmp_path / "scores" / "verdicts.jsonl").mkdir()
    code, shown, error = score_files(capsys, tmp_path, GIVEN)
    assert (code, shown) == (1, "") and "verdicts.jsonl" in error
    assert not (tmp_path / "scores" / "summary.json").exists()


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    code, _, error = score_files(capsys, tmp_path, GIVEN, out="taken")
    assert code == 1 and "Not a directory" in error and str(tmp_path / "taken") in error
    assert (tmp_path / "taken").read_text() == "mine"


# --- comparing


def verdict_files(folder, only_a, only_b, n=541):
    passed = [(key < only_a, only_a <= key < only_a + only_b) for key in range(n)]
    for side, name in enumerate("ab"):
        rows = [verdict(key, pair[side]) for key, pair in enumerate(passed)]
        artifacts.write_jsonl(folder / name / "verdicts.jsonl", rows)
    return folder / "a", folder / "b"


def test_compare_command_reports_the_paired_test(tmp_path, capsys):
    a, b = verdict_files(tmp_path, 17, 37)
    report = tmp_path / "report.json"
    code, shown, warned = command(capsys, "compare", a, b / "verdicts.jsonl", "--json", report)
    assert (code, warned) == (0, "")
    found = json.loads(report.read_text())
    theirs = significance.paired(ifeval_files.load_verdicts(a), ifeval_files.load_verdicts(b))
    assert found.items() >= json.loads(json.dumps(theirs)).items()
    assert found["sensitivity"] == significance.sensitivity(theirs, 541, 0.05)
    assert (found["n"], found["verdict"]) == (541, "clear margin")
    for line in ["both 0, only A 17, only B 37, neither 487", "+3.70 points",
                 "effect with 80 % power: 605", "needed among as many discordant prompts: 16",
                 "B against A: clear margin (net +20, exact McNemar p = 0.00907"]:  # fmt: skip
        assert line in shown, shown
    assert re.search(r"startend:quotation +37 +17 +0 +487 +20", shown)
    command(capsys, "compare", a, b, "--json", report, "--alpha", "0.001")
    assert json.loads(report.read_text())["verdict"] == "not distinguishable"
    command(capsys, "compare", a, b, "--json", report, "--clear-share", "0.1")
    assert json.loads(report.read_text())["verdict"] == "better, but small"


def test_score_and_compare_go_together(tmp_path, capsys):
    score_files(capsys, tmp_path, GIVEN, out="a")
    score_files(capsys, tmp_path, [row | {"response": "Tea."} for row in GIVEN], out="b")
    code, shown, _ = command(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert code == 0 and "only A 0, only B 3" in shown and "won: [2, 4, 5]" in shown
    code, shown, _ = command(capsys, "compare", tmp_path / "a", tmp_path / "a")
    assert code == 0 and "no instruction moved" in shown


GOOD = [verdict(key, key > 2) for key in range(5)]
BAD_VERDICTS = {
    "other prompts": ([verdict(key + 1, True) for key in range(5)], r"row 1 is key .* and key "),
    "fewer": (GOOD[:3], r"same order \(\d and \d rows\)"),
    "same key twice": ([*GOOD[:4], GOOD[0]], "line 5 repeats key 0 of line 1"),
    "responses": (GIVEN, "line 1 lacks a usable 'key'"),
    "not an object": (["text"], "line 1 lacks a usable 'key'"),
    "numbers": ([GOOD[4] | {"strict": [1]}], r"line 1 \(key 4\) has not one verdict in 'strict'"),
    "too few": ([GOOD[4] | {"strict": []}], r"line 1 \(key 4\) has not one verdict in 'strict'"),
    "too many": ([GOOD[4] | {"loose": [True, True]}], "line 1 .* has not one verdict in 'loose'"),
    "ids of numbers": ([GOOD[4] | {"instruction_id_list": [5]}], "for each name in 'instruction_i"),
    "prompt level other": ([GOOD[0], GOOD[1] | {"prompt_loose": True}], r"line 2 .*'prompt_loose'"),
    "no loose": ([{k: v for k, v in GOOD[0].items() if k != "loose"}], "line 1 lacks .*'loose'"),
    "broken JSON": ([*GOOD[:2], b"{"], "line 3: not JSON"),
    "empty": ([], "which holds no rows"),
}


@pytest.mark.parametrize("bad_side", ["a", "b"])
@pytest.mark.parametrize(("rows", "error"), BAD_VERDICTS.values(), ids=BAD_VERDICTS)
def test_bad_verdicts_are_one_sentence(tmp_path, capsys, rows, error, bad_side):
    good = write(tmp_path, *GOOD, name="good.jsonl")
    bad = write(tmp_path, *rows, name="bad.jsonl")
    sides = (good, bad) if bad_side == "b" else (bad, good)
    code, shown, message = command(capsys, "compare", *sides, "--json", tmp_path / "report.json")
    assert (code, shown, message.count("\n")) == (1, "", 1)
    assert bad in message and re.search(error, message)
    assert not (tmp_path / "report.json").exists()


def test_compare_command_refuses_what_is_not_there(tmp_path, capsys):
    a, b = verdict_files(tmp_path, 1, 1, 3)
    for sides in [(a, tmp_path / "none"), (tmp_path, b)]:
        code, _, error = command(capsys, "compare", *sides)
        assert code == 1 and "No such file" in error
    code, _, error = command(capsys, "compare", a, b, "--alpha", "5")
    assert code == 2 and "--alpha must lie between 0 and 1" in error
