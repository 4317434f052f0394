"""IFEval by command: summaries, files that are accepted, files that are refused."""

import json
import re
from pathlib import Path

import pytest
import stub_hub
from checks import refusal, run_python
from ifeval_cases import prompt, python, random_adapter, verdict, write
from tiny import TINY

from atlas_lib import artifacts
from atlas_lib.config import load_config
from atlas_lib.evaluate import command, ifeval, ifeval_files, significance
from atlas_lib.standin import tiny_model

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
    grid = (*grid, "<|im_end|>")
    [whole], [half] = ifeval.grid_metrics(*grid), ifeval.grid_metrics(*grid, [1, 3, 5])
    assert whole.items() >= ifeval.summarise(verdicts).items()
    assert (whole["model"], whole["format"], whole["at_cap"]) == ("SFT", "raw", 1.0)
    assert (half["n"], half["ci95"]) == (3, significance.proportion_ci(3, 3))


# --- prompts


def test_load_prompts_stops_at_the_limit(tmp_path):
    path = write(tmp_path, prompt(1), prompt(2), prompt(3), name="needs no suffix")
    assert ifeval_files.load_prompts(path, limit=2) == [prompt(1), prompt(2)]


def test_load_prompts_from_a_folder_with_a_dataset_card(tmp_path):
    files = "{split: train, path: p.parquet}"
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - {files}\n---\n"
    (tmp_path / "README.md").write_text(card)
    import datasets

    rows = [prompt(1), prompt(2, ["startend:end_checker"], [{"end_phrase": "Bye."}])]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")  # fills kwargs with None
    assert ifeval_files.load_prompts(str(tmp_path)) == rows


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("odd.parquet", b"x"),
        ("odd.json", b"{"),
        ("test.csv", b"key\n1\n"),
        ("x.py", b""),
        ("", b""),
    ],
)
def test_a_folder_without_loadable_prompts_is_named(file, content, tmp_path):
    folder = tmp_path / "prompts.jsonl"
    folder.mkdir()
    if file:
        (folder / file).write_bytes(content)
    assert str(folder) in refusal(ifeval_files.load_prompts, str(folder))


# --- the commands

ASKED = [prompt(key, text=f"Name tea {key}.") for key in range(1, 6)]
TEXTS = ["Tea.", "Tea, hot.", "A.", "Sure,\nTea.", ""]
GIVEN = [
    {"prompt": row["prompt"], "response": text, "n_tokens": 3}
    for row, text in zip(ASKED, TEXTS, strict=True)
]


def run_command(capsys, *arguments):
    """(exit code, stdout, error) of `python -m atlas_lib.ifeval ...`, in this process."""
    try:
        command.main([str(argument) for argument in arguments])
    except SystemExit as error:
        return 1, capsys.readouterr().out, error.code
    return 0, capsys.readouterr().out, ""


def score_files(capsys, folder, given, asked=ASKED, out="scores"):
    prompts = write(folder, *asked)
    responses = write(folder, *given, name="responses.jsonl")
    arguments = ["--prompts", prompts, "--responses", responses, "--out", folder / out]
    return run_command(capsys, "score", *arguments)


def test_score_command_writes_what_score_returns(tmp_path, capsys):
    code, shown, _ = score_files(capsys, tmp_path, GIVEN)
    assert code == 0
    verdicts = ifeval.score(ASKED, TEXTS)
    assert ifeval_files.load_verdicts(tmp_path / "scores") == verdicts
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary.items() >= ifeval.summarise(verdicts).items()
    assert summary["counts"]["prompt_strict"] == 2 and summary["counts"]["prompt_loose"] == 3
    assert summary["responses"].startswith("responses.jsonl sha256 ")
    assert str(tmp_path) not in json.dumps(summary), "no paths of this machine"
    assert re.search(r"^prompts +5$", shown, re.M)
    for name, (low, high) in summary["intervals"].items():
        interval = rf"\({low:.3f} to {high:.3f}\)"
        assert re.search(rf"^{name} +{summary[name]:.4f} {interval}$", shown, re.M)


def test_score_command_as_a_program_writes_nothing_without_out(tmp_path):
    prompts, responses = write(tmp_path, *ASKED), write(tmp_path, *GIVEN, name="r.jsonl")
    arguments = ["-m", "atlas_lib.ifeval", "score", "--prompts", prompts, "--responses"]
    run = python([*arguments, responses])
    assert (run.returncode, run.stderr) == (0, "") and "prompt_level_strict_acc" in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "r.jsonl"]
    run = python([*arguments, f"{tmp_path}/none.jsonl"])
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"error: [Errno 2] No such file or directory: '{tmp_path}/none.jsonl'\n"


WORDS = ["length_constraints:number_words"]
LANGUAGE = ["language:response_language"]
BAD_PROMPTS = {
    "no rows": ([], "prompts.jsonl holds no prompts"),
    "broken JSON": ([prompt(), b'{"key": 2'], "line 2: not JSON"),
    "no UTF-8": ([prompt(), b'{"key": "\xff"}'], "line 2: not JSON"),
    "nested too deep": (
        [prompt(), b"[" * 100_000 + b"]" * 100_000],
        "line 2: not JSON .*recursion",
    ),
    "not an object": ([[]], "line 1: not JSON Lines"),
    "no key": ([{k: v for k, v in prompt().items() if k != "key"}], "row 1: it needs key, prompt"),
    "no prompt": ([prompt() | {"prompt": None}], "row 1, key 1: it needs a text"),
    "prompt of words": ([prompt() | {"prompt": ["Tea"]}], "row 1, key 1: it needs a text"),
    "empty prompt": ([prompt(), prompt(9, text="")], "row 2, key 9: it needs a text"),
    "no instruction": ([prompt(9, [], [])], "row 1, key 9: .* instructions with"),
    "unknown id": (
        [prompt(9, ["punctuation:no_coma"])],
        "row 1, key 9: unknown instruction 'punc.*:no_coma'",
    ),
    "too few kwargs": ([prompt(9, kwargs=[])], "row 1, key 9: .* instructions with as many kwargs"),
    "too many kwargs": ([prompt(9, kwargs=[{}, {}])], "row 1, key 9: .* with as many kwargs"),
    "kwargs name": ([prompt(9, WORDS, [{"words": 3}])], "row 1, .* needs .'num_words', 'relation'"),
    "kwargs missing": ([prompt(9, WORDS, [{"num_words": 3}])], "row 1, .* needs .'num_words', 're"),
    "kwargs language": ([prompt(9, LANGUAGE, [{"language": "xx"}])], r"row 1, .*KeyError\('xx'\)"),
    "kwargs shape": ([prompt(9, kwargs=["x"])], "row 1, key 9: .*AttributeError"),
    "control characters": ([prompt("\x1b]0;x\x07", text="")], r"row 1, key '\\x1b]0;x\\x07': it"),
    "same key twice": ([prompt(3), prompt(3)], r"prompts.jsonl repeats the keys \['3'\]"),
    "a number and its text": ([prompt(0), prompt("0")], r"prompts.jsonl repeats the keys \['0'\]"),
}
EXISTENCE, FREQUENCY, SECTIONS = (
    {"keywords": ["tea"]},
    {"keyword": "tea", "frequency": 2, "relation": "at least"},
    {"num_sections": 2, "section_spliter": "Part"},
)
PARAGRAPH = {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "Tea"}
AT_LEAST_3 = {"num_words": 3, "relation": "at least"}
HANGS = "(a+)+$"
BAD_ARGUMENTS = {  # instruction, what its checker takes, what the file holds instead
    "letters of a word": ("keywords:existence", EXISTENCE, {"keywords": "abc"}),
    "no keyword": ("keywords:existence", EXISTENCE, {"keywords": []}),
    "a number among words": ("keywords:existence", EXISTENCE, {"keywords": ["tea", 3]}),
    "a keyword that hangs": ("keywords:existence", EXISTENCE, {"keywords": [HANGS]}),
    "no regular expression": ("keywords:existence", EXISTENCE, {"keywords": ["("]}),
    "a keyword of any letters": ("keywords:frequency", FREQUENCY, {"keyword": "e.g"}),
    "a blank keyword": ("keywords:frequency", FREQUENCY, {"keyword": " "}),
    "another relation": ("keywords:frequency", FREQUENCY, {"relation": "at most"}),
    "forbidden, that hangs": (
        "keywords:forbidden_words", {"forbidden_words": ["tea"]}, {"forbidden_words": [HANGS]},
    ),
    "a section that hangs": (
        "detectable_format:multiple_sections", SECTIONS, {"section_spliter": HANGS},
    ),
    "a postscript that hangs": (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        {"postscript_marker": HANGS},
    ),
    "a negative count": (*WORDS, AT_LEAST_3, {"num_words": -5}),
    "a count of 0": (*WORDS, AT_LEAST_3, {"num_words": 0}),
    "true": (*WORDS, AT_LEAST_3, {"num_words": True}),
    "a fraction": (*WORDS, AT_LEAST_3, {"num_words": 2.5}),
    "digits": (*WORDS, AT_LEAST_3, {"num_words": "3"}),
    "two letters": (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 2, "let_relation": "at least"},
        {"letter": "ee"},
    ),
    "beyond the end": (
        "length_constraints:nth_paragraph_first_word", PARAGRAPH, {"nth_paragraph": 4},
    ),
    "an empty phrase": ("startend:end_checker", {"end_phrase": "Bye."}, {"end_phrase": " "}),
    "a phrase of words": ("startend:end_checker", {"end_phrase": "Bye."}, {"end_phrase": ["Bye"]}),
}  # fmt: skip
OTHER = {"prompt": "Name cup 1.", "response": "Cup."}
BAD_RESPONSES = {
    "empty": ([], "has 0 rows for 5 prompts"),
    "last missing": (GIVEN[:4], "has 4 rows for 5 prompts"),
    "one missing": (GIVEN[:2] + GIVEN[3:], "row 3 has to hold the text of the prompt with key 3"),
    "too many": ([*GIVEN, OTHER], "has 6 rows for 5 prompts"),
    "same row twice": ([*GIVEN[:2], *GIVEN[1:]], "row 3 has to hold"),
    "swapped": ([GIVEN[1], GIVEN[0], *GIVEN[2:]], "row 1 has to hold"),
    "another text": ([*GIVEN[:3], OTHER, *GIVEN[4:]], "row 4 has to hold"),
    "no response": ([GIVEN[0] | {"response": None}, *GIVEN[1:]], "row 1 .* a text as 'response'"),
    "response of words": ([GIVEN[0] | {"response": ["Tea."]}, *GIVEN[1:]], "row 1 has to hold"),
    "no prompt": ([*GIVEN[:4], {"response": "Tea."}], "row 5 has to hold"),
    "not an object": ([*GIVEN[:4], []], "line 5: not JSON Lines"),
    "broken JSON": ([*GIVEN[:2], b'{"prompt": "Na', *GIVEN[3:]], "line 3: not JSON"),
    "nested too deep": ([*GIVEN[:4], b"[" * 100_000], "line 5: not JSON .*recursion"),
}
REFUSED = {f"prompts: {name}": (rows, GIVEN, error) for name, (rows, error) in BAD_PROMPTS.items()}
REFUSED |= {
    f"responses: {name}": (ASKED, rows, error) for name, (rows, error) in BAD_RESPONSES.items()
}


@pytest.mark.parametrize(("instruction", "good", "bad"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_row_and_key(tmp_path, instruction, good, bad):
    taken, refused = prompt(4, [instruction], [good]), prompt(7, [instruction], [good | bad])
    assert ifeval_files.load_prompts(write(tmp_path, taken)) == [taken]
    message = refusal(ifeval_files.load_prompts, write(tmp_path, taken, refused))
    assert message.startswith(f"{tmp_path}/prompts.jsonl, row 2, key 7: ")
    [argument] = bad
    assert re.search(rf"\b{argument}\b", message), message


@pytest.mark.parametrize(("asked", "given", "error"), REFUSED.values(), ids=REFUSED)
def test_bad_files_are_one_sentence_and_write_nothing(tmp_path, capsys, asked, given, error):
    code, shown, message = score_files(capsys, tmp_path, given, asked)
    assert (code, shown, message.count("\n")) == (1, "", 0)
    bad = "prompts.jsonl" if given is GIVEN else "responses.jsonl"
    assert f"{tmp_path / bad}" in message and re.search(error, message), message
    assert not (tmp_path / "scores").exists()


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
    code, shown, _ = run_command(capsys, "compare", a, b / "verdicts.jsonl", "--json", report)
    assert code == 0
    found = json.loads(report.read_text())
    theirs = significance.paired(ifeval_files.load_verdicts(a), ifeval_files.load_verdicts(b))
    assert found.items() >= json.loads(json.dumps(theirs)).items()
    smallest = significance.smallest_effect(541, 54 / 541, 0.05)
    assert found["smallest_effect_points"] == pytest.approx(smallest)
    assert (found["n"], found["verdict"]) == (541, "better")
    for line in [
        "both 0, only A 17, only B 37, neither 487",
        "+3.70 points",
        "with 80 % power among as many discordant prompts: 3.9 points",
        "B against A: better (net +20, exact McNemar p = 0.00907",
    ]:
        assert line in shown, shown
    assert re.search(r"startend:quotation +37 +17 +0 +487 +20", shown)


def test_score_and_compare_go_together(tmp_path, capsys):
    score_files(capsys, tmp_path, GIVEN, out="a")
    score_files(capsys, tmp_path, [row | {"response": "Tea."} for row in GIVEN], out="b")
    code, shown, _ = run_command(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert code == 0 and "only A 0, only B 3" in shown and "won: [2, 4, 5]" in shown


GOOD = [verdict(key, key > 2) for key in range(5)]
BAD_VERDICTS = {
    "other prompts": ([verdict(key + 1, True) for key in range(5)], "not of the same prompts"),
    "fewer": (GOOD[:3], "not of the same prompts"),
    "responses": (GIVEN, "bad.jsonl holds no verdicts"),
    "not an object": (["text"], "bad.jsonl, line 1: not JSON Lines"),
    "half a verdict": ([{"key": 1, "prompt_strict": True}], "bad.jsonl holds no verdicts"),
    "a number and its text": (
        [*GOOD[:4], verdict("3", True)],
        r"bad.jsonl repeats the keys \['3'\]",
    ),
    "broken JSON": ([*GOOD[:2], b"{"], "bad.jsonl, line 3: not JSON"),
    "empty": ([], "bad.jsonl holds no verdicts"),
}


@pytest.mark.parametrize("bad_side", ["a", "b"])
@pytest.mark.parametrize(("rows", "error"), BAD_VERDICTS.values(), ids=BAD_VERDICTS)
def test_bad_verdicts_are_one_sentence(tmp_path, capsys, rows, error, bad_side):
    good = write(tmp_path, *GOOD, name="good.jsonl")
    bad = write(tmp_path, *rows, name="bad.jsonl")
    sides = (good, bad) if bad_side == "b" else (bad, good)
    code, shown, message = run_command(
        capsys, "compare", *sides, "--json", tmp_path / "report.json"
    )
    assert (code, shown, message.count("\n")) == (1, "", 0)
    assert re.search(error, message)
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [("notes.txt", b"tea"), ("a.json", b"{torn"), ("a.csv", b"a,b\n1\n2,3,4\n"), ("a.bin", b"\0")],
)
def test_a_folder_of_other_files_is_one_sentence(tmp_path, capsys, file, content):
    (folder := tmp_path / "folder").mkdir()
    (folder / file).write_bytes(content)
    responses = write(tmp_path, *GIVEN, name="r.jsonl")
    code, _, message = run_command(capsys, "score", "--prompts", folder, "--responses", responses)
    assert (code, message.count("\n")) == (1, 0)
    assert message.startswith(f"error: {folder}"), message


def test_control_characters_of_verdicts_reach_no_terminal(tmp_path, capsys):
    rows = [verdict("\x1b[31m", True, names=["\x1b]0;title\x07"])]
    a, b = (write(tmp_path, *rows, name=f"{side}.jsonl") for side in "ab")
    code, shown, _ = run_command(capsys, "compare", a, b)
    assert (code, "\x1b" in shown) == (0, False)
    assert r"\x1b]0;title\x07" in shown


@pytest.mark.parametrize(
    ("name", "words"),
    [("none", "neither a hub id nor an existing file or folder"), (".", "no adapter_config.json")],
)
def test_compare_command_refuses_what_is_not_there(name, words, tmp_path, capsys):
    a, b = verdict_files(tmp_path, 1, 1, 3)
    for sides in [(a, tmp_path / name), (tmp_path / name, b)]:
        code, _, error = run_command(capsys, "compare", *sides)
        assert (code, error.count("\n")) == (1, 0) and words in error


def test_two_models_are_evaluated_and_compared_by_one_command(tmp_path, capsys):
    """The base and an adapter in a folder; again from the stored responses; then with a file."""
    config = load_config("sft_qwen05b", "offline", TINY)
    adapter = random_adapter(config, tmp_path / "adapter")
    given = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    options = ["--overlay", "offline", "--out", tmp_path / "out", *given]
    report, plot = tmp_path / "report.json", tmp_path / "plots" / "difference.png"
    asked = ("compare", "embedded:base", adapter, *options, "--json", report, "--plot", plot)
    code, shown, error = run_command(capsys, *asked)
    assert code == 0, error
    assert "12 prompts: " in shown and "B against A: " in shown
    assert json.loads(report.read_text())["n"] == 12
    assert plot.read_bytes().startswith(b"\x89PNG") and len(list(plot.parent.iterdir())) == 1
    code, again, _ = run_command(capsys, *asked)
    assert "to generate" in shown and "to generate" not in again and shown.endswith(again)
    artifacts.write_jsonl(tmp_path / "b.jsonl", [verdict(key, True) for key in range(12)])
    code, _, error = run_command(capsys, "compare", "embedded:base", tmp_path / "b.jsonl", *options)
    assert code == 1 and "not of the same prompts" in error


def test_a_model_and_an_adapter_of_the_hub_are_compared(tmp_path):
    config = load_config("sft_qwen05b", "offline", TINY)
    folders = {
        "team/model": Path(tiny_model.build("base", config)),
        "team/adapter": random_adapter(config, tmp_path / "adapter"),
    }
    command = ["compare", *folders, "--overlay", "offline", "--out", tmp_path / "out"]
    command += [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    command += ["--json", tmp_path / "report.json"]
    with stub_hub.serve() as hub:
        for name, folder in folders.items():
            hub.hold(name, private=False)
            files = [path for path in folder.rglob("*") if path.is_file()]
            names = [path.relative_to(folder).as_posix() for path in files]
            hub.files[name] = {n: p.read_bytes() for n, p in zip(names, files, strict=True)}
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": stub_hub.TOKEN}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = run_python("-m", "atlas_lib.ifeval", *command, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("12 to generate") == 2
    assert json.loads((tmp_path / "report.json").read_text())["n"] == 12
