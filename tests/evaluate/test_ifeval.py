"""atlas_lib/ifeval.py: hand-written answers, determinism, refusals, lm-eval, the commands."""

import json
import os
import random
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from atlas_lib import artifacts
from atlas_lib.evaluate import ifeval, significance

ROOT = Path(__file__).resolve().parents[2]
OFFICIAL = ROOT.parent / "shared" / "data" / "ifeval_input_data.jsonl"
official = pytest.mark.skipif(
    not OFFICIAL.is_file(), reason="NOT TESTED: IFEval's official prompts: not in ../shared/data"
)

# (instruction, kwargs, an answer that follows it, one that does not), written by hand
EXAMPLES = [
    ("change_case:capital_word_frequency",
     {"capital_relation": "at least", "capital_frequency": 2}, "VERY GOOD tea.", "Very GOOD tea."),
    ("change_case:english_capital", {},
     "THE WEATHER IS LOVELY AND EVERYBODY WANTS TO GO OUTSIDE.", "The WEATHER IS LOVELY."),
    ("change_case:english_lowercase", {},
     "the tea is ready, so sit down with us.", "The tea is ready, so sit down with us."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Name a tea."},
     "Name a tea. Assam.", "Assam. Name a tea."),
    ("combination:two_responses", {}, "Assam.\n******\nCeylon.", "Assam.\n***\nCeylon."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2},
     "Dear [name], come at [time].", "Dear [name], come at noon."),
    ("detectable_content:postscript", {"postscript_marker": "P.S."},
     "Come at noon.\nP.S. Bring tea.", "Come at noon and bring tea."),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:json_format", {}, '{"tea": "Assam"}', '{"tea": "Assam"'),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     "Section 1\nAssam.\nSection 2\nCeylon.", "Section 1\nAssam and Ceylon."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2},
     "* Assam\n* Ceylon", "* Assam\n* Ceylon\n* Keemun"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
     "*Assam* before *Ceylon*.", "*Assam* before Ceylon."),
    ("detectable_format:title", {}, "<<On tea>>\nIt is hot.", "<On tea>\nIt is hot."),
    ("keywords:existence", {"keywords": ["kettle", "cup"]}, "A kettle and a cup.", "A kettle."),
    ("keywords:forbidden_words", {"forbidden_words": ["coffee"]}, "Tea.", "Tea, not coffee."),
    ("keywords:frequency", {"relation": "at least", "keyword": "tea", "frequency": 2},
     "Tea is tea.", "Tea is hot."),
    ("keywords:letter_frequency", {"letter": "a", "let_relation": "at least", "let_frequency": 3},
     "Assam tea.", "Green tea."),
    ("language:response_language", {"language": "de"},
     "Der Tee ist fertig, und wir setzen uns jetzt zusammen an den Tisch.",
     "The tea is ready, and we sit down together at the table now."),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "ceylon"},
     "Assam first.\n\nCeylon second.", "Ceylon first.\n\nAssam second."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
     "Assam.\n***\nCeylon.", "Assam.\n\nCeylon."),
    ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3},
     "Dr. Smith drinks tea. It is hot.", "He drinks tea. It is hot. He waits."),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 4},
     "Tea is very hot.", "Tea is hot."),
    ("punctuation:no_comma", {}, "Tea and milk.", "Tea, milk."),
    ("startend:end_checker", {"end_phrase": "That is all."},
     "Tea. That is all.", "That is all. Tea."),
    ("startend:quotation", {}, '"Tea is hot."', "Tea is hot."),
]  # fmt: skip


def prompt(key=1, ids=("punctuation:no_comma",), kwargs=({},), text="Name a tea."):
    return {"key": key, "prompt": text, "instruction_id_list": list(ids), "kwargs": list(kwargs)}


def verdict(key, passed):
    """A verdict on one instruction."""
    return {"key": key, "instruction_id_list": ["startend:quotation"], "strict": [passed],
            "loose": [passed], "prompt_strict": passed, "prompt_loose": passed}  # fmt: skip


def write(folder, *lines, name="prompts.jsonl"):
    path = folder / name
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return str(path)


def python(code, **environment):
    return subprocess.run([sys.executable, *code], cwd=ROOT, env=os.environ | environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip


# --- verdicts


def test_the_examples_cover_all_25_types():
    known = ifeval._checkers().instructions_registry.INSTRUCTION_DICT
    assert sorted(known) == sorted(name for name, *_ in EXAMPLES)


@pytest.mark.parametrize(("name", "kwargs", "gold", "wrong"), EXAMPLES, ids=lambda x: str(x)[:30])
def test_gold_passes_and_wrong_fails(name, kwargs, gold, wrong):
    asked = prompt(ids=[name], kwargs=[kwargs])
    passed, failed, empty = ifeval.score([asked] * 3, [gold, wrong, " \n"])
    assert passed["strict"] == passed["loose"] == [True] and passed["prompt_strict"]
    assert failed["strict"] == [False] and not failed["prompt_strict"]
    assert not empty["prompt_strict"] and not empty["prompt_loose"]


def test_verdict_keeps_one_bool_an_instruction_in_order():
    ids = ["punctuation:no_comma", "startend:quotation", "detectable_format:title"]
    [found] = ifeval.score([prompt(7, ids, [{}, {}, {}])], ['"<<Tea>>, hot"'])
    assert found == {
        "key": 7, "instruction_id_list": ids, "strict": [False, True, True],
        "loose": [False, True, True], "prompt_strict": False, "prompt_loose": False,
    }  # fmt: skip


@pytest.mark.parametrize("response", ['*"Tea is hot."*', 'Sure:\n"Tea is hot."'])
def test_loose_forgives_asterisks_and_a_first_line(response):
    [found] = ifeval.score([prompt(ids=["startend:quotation"])], [response])
    assert (found["prompt_strict"], found["prompt_loose"]) == (False, True)


def test_one_response_a_prompt():
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        ifeval.score([prompt(), prompt(2)], ["Tea."])


# --- determinism

# '#' is no letter: lm-eval draws one. The short mixed texts make langdetect's sampling waver.
RESCORE = """
import json
from atlas_lib import ifeval
letter = {"letter": "#", "let_relation": "at least", "let_frequency": 4}
prompts = [{"key": key, "prompt": "", "instruction_id_list": [name], "kwargs": [kwargs]}
           for name, kwargs in [("keywords:letter_frequency", letter),
                                ("language:response_language", {"language": "en"})]
           for key in range(20)]
texts = ["Attend the meeting at ten, he said.", "Menu: tea, pain, vino, tapas, chat, die, no"]
verdicts = ifeval.score(prompts, [text for text in texts for _ in range(20)])
print(json.dumps([(v["strict"], v["loose"]) for v in verdicts]))
"""


def test_same_verdicts_over_processes_and_hash_seeds():
    runs = [python(["-c", RESCORE], PYTHONHASHSEED=seed) for seed in ("1", "2")]
    assert not any(run.returncode for run in runs), runs[0].stderr
    first, second = (run.stdout for run in runs)
    assert first == second
    letters = [strict for strict, _ in json.loads(first)][:20]
    assert {True, False} == {passed for [passed] in letters}, "the drawn letters must matter here"
    assert all(strict == loose for strict, loose in json.loads(first)), "one letter for both modes"


def test_score_leaves_the_global_random_state_alone():
    kwargs = {"letter": "!", "let_relation": "at least", "let_frequency": 6}
    random.seed(5)
    before = random.getstate()
    ifeval.score([prompt(ids=["keywords:letter_frequency"], kwargs=[kwargs])], ["Tea!"])
    assert random.getstate() == before


def test_nothing_is_logged_where_no_language_is_found(caplog):
    asked = prompt(ids=["language:response_language"], kwargs=[{"language": "de"}])
    [found] = ifeval.score([asked], ["1 2"])
    assert found["prompt_strict"] and not caplog.records


def test_checkers_load_neither_torch_nor_transformers_and_claim_no_download():
    code = "import sys; from atlas_lib import ifeval; ifeval._checkers(); "
    run = python(["-c", code + "print({'torch', 'transformers'} & set(sys.modules))"])
    assert (run.stdout, run.stderr) == ("set()\n", "")


# --- prompts


def test_load_prompts_drops_none_kwargs_and_stops_at_the_limit(tmp_path):
    none_filled = {"num_words": 4, "relation": "at least", "keywords": None}
    rows = [prompt(1, ["length_constraints:number_words"], [none_filled]), prompt(2), prompt(3)]
    loaded = ifeval.load_prompts(write(tmp_path, *rows), None, limit=2)
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
    assert ifeval.load_prompts(str(tmp_path), None) == rows


WORDS = ["length_constraints:number_words"]
BAD_FILES = {
    "no rows": ([], r"gives no prompts \(limit: None\)"),
    "broken JSON": ([prompt(), '{"key": 2'], "line 2: not JSON"),
    "not an object": (["[]"], "line 1 lacks a usable 'key'"),
    "no prompt": ([prompt() | {"prompt": None}], "line 1 lacks a usable 'prompt'"),
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


@pytest.mark.parametrize(("lines", "sentence"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_prompts_files_are_named(tmp_path, lines, sentence):
    path = write(tmp_path, *lines)
    with pytest.raises(ValueError, match=sentence) as error:
        ifeval.load_prompts(path, None)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_a_missing_prompts_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        ifeval.load_prompts(str(tmp_path / "none.jsonl"), None)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder\.jsonl is no file"):
        ifeval.load_prompts(str(tmp_path / "folder.jsonl"), None)


def test_prompts_that_are_no_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(json.dumps(prompt()).encode() + b'\n{"key": "\xff"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2: not JSON"):
        ifeval.load_prompts(str(path), None)


def test_prompts_need_no_jsonl_suffix(tmp_path):
    assert ifeval.load_prompts(write(tmp_path, prompt(), name="p.txt"), None) == [prompt()]


# --- statistics


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
    json.dumps(found)


def test_measure_carries_both_intervals():
    prompts, texts = [prompt(key) for key in range(40)], ["Tea, hot.", "Tea."] * 20
    answers = [{"response": text, "stop": None, "n_tokens": 2} for text in texts]
    verdicts = ifeval.score(prompts, texts)
    [whole] = ifeval.measure({("SFT", "raw"): answers}, {("SFT", "raw"): verdicts})
    [half] = ifeval.measure({("SFT", "raw"): answers}, {("SFT", "raw"): verdicts}, [1, 3, 5])
    assert whole["ci95"] == ifeval.intervals(verdicts)["prompt_level_strict_acc"]
    assert whole["inst_ci95"] == significance.instruction_ci(verdicts, "strict")
    assert (half["n"], half["ci95"]) == (3, significance.proportion_ci(3, 3))


# --- the commands

ASKED = [prompt(key, text=f"Name tea {key}.") for key in range(1, 6)]
SAID = [{"prompt": row["prompt"], "response": text, "n_tokens": 3}
        for row, text in zip(ASKED, ["Tea.", "Tea, hot.", "A.", "Sure,\nTea.", ""],
                             strict=True)]  # fmt: skip
KEYED = [{"key": row["key"]} | said for row, said in zip(ASKED, SAID, strict=True)]


def command(capsys, *arguments):
    """(exit code, stdout, stderr) of `python -m atlas_lib.ifeval ...`, in this process."""
    code = 0
    try:
        ifeval.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = 1 if isinstance(error.code, str) else error.code
        message = f"{error.code}\n" if isinstance(error.code, str) else ""
        said = capsys.readouterr()
        return code, said.out, said.err + message
    return code, *capsys.readouterr()


def score_files(capsys, folder, said, asked=ASKED, out="scores"):
    prompts = write(folder, *asked)
    responses = write(folder, *said, name="responses.jsonl")
    return command(capsys, "score", "--prompts", prompts, "--responses", responses,
                   "--out", folder / out)  # fmt: skip


@pytest.mark.parametrize("said", [SAID, KEYED], ids=["without keys", "with keys"])
def test_score_command_writes_what_score_returns(tmp_path, capsys, said):
    code, shown, warned = score_files(capsys, tmp_path, said)
    assert (code, warned) == (0, "")
    verdicts = ifeval.score(ASKED, [row["response"] for row in SAID])
    assert artifacts.read_jsonl(tmp_path / "scores" / "verdicts.jsonl") == verdicts
    assert ifeval.load_verdicts(tmp_path / "scores") == verdicts
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary.items() >= ifeval.summarise(verdicts).items()
    assert summary["counts"]["prompt_strict"] == 2 and summary["counts"]["prompt_loose"] == 3
    assert summary["intervals"]["prompt_level_loose_acc"] == significance.proportion_ci(3, 5)
    assert summary["prompts"] == "prompts.jsonl"
    assert summary["responses"].startswith("responses.jsonl sha256 ")
    assert str(tmp_path) not in json.dumps(summary), "no paths of this machine"
    assert "5 prompts, 5 instructions" in shown
    for name in ifeval.ACCURACIES:
        low, high = summary["intervals"][name]
        interval = f"(95 %: {100 * low:.1f} to {100 * high:.1f})"
        percent = f"{summary[name]:.4f}   {100 * summary[name]:.1f} %"
        assert any(line.startswith(name) and percent in line and interval in line
                   for line in shown.splitlines())  # fmt: skip


def test_score_command_as_a_program_writes_nothing_unasked(tmp_path):
    prompts, responses = write(tmp_path, *ASKED), write(tmp_path, *SAID, name="r.jsonl")
    arguments = ["-m", "atlas_lib.ifeval", "score", "--prompts", prompts, "--responses"]
    run = python([*arguments, responses])
    assert (run.returncode, run.stderr) == (0, "") and "prompt_level_strict_acc" in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "r.jsonl"]
    run = python([*arguments, f"{tmp_path}/none.jsonl"])
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.endswith("none.jsonl does not exist; give an existing .jsonl file\n")


def many(n=200):
    asked = [prompt(key, text=f"Name tea {key}.") for key in range(n)]
    return asked, [{"key": p["key"], "prompt": p["prompt"], "response": "Tea."} for p in asked]


def test_a_text_that_differs_is_a_warning_up_to_one_percent(tmp_path, capsys):
    asked, said = many()
    said[7]["prompt"], said[150]["prompt"] = "Name tea 7", "Name tea 150!"
    code, _, warned = score_files(capsys, tmp_path, said, asked)
    assert code == 0 and len(warned.splitlines()) == 2
    told = "the prompt's text differs from the one to score by"
    assert warned.startswith(f"warning: {tmp_path / 'responses.jsonl'}, line 8 (key 7): {told}\n")
    assert "line 151 (key 150)" in warned
    said[199]["prompt"] = ""
    code, shown, warned = score_files(capsys, tmp_path, said, asked, out="other")
    assert (code, shown, warned.count("\n")) == (1, "", 1), "no warnings before an error"
    assert "line 8 (key 7) is the first of 3 of 200 prompt texts that differ" in warned
    assert not (tmp_path / "other").exists()


def test_a_prompt_that_is_asked_twice_is_answered_twice(tmp_path, capsys):
    asked = [prompt(1), prompt(2), prompt(3, text="Name a cup.")]
    said = [{"prompt": row["prompt"], "response": "Tea."} for row in asked]
    assert score_files(capsys, tmp_path, said, asked)[0] == 0
    code, _, told = score_files(capsys, tmp_path, [said[0], *said], asked)
    assert code == 1 and "line 3 repeats the prompt of line 1" in told


def with_row(line, **changed):
    return [row | changed if n == line else row for n, row in enumerate(KEYED, start=1)]


ELSE = [{"prompt": f"Name cup {n}.", "response": "Cup."} for n in range(5)]
BAD_RESPONSES = {
    "empty": ([], "has 0 rows for 5 prompts: line 1 is the first too many or missing"),
    "last missing": (SAID[:4], "has 4 rows for 5 prompts: line 5 is the first too many or missing"),
    "one missing": (
        SAID[:2] + SAID[3:],
        r"line 3 does not answer key 3, .* \(4 rows for 5 prompts",
    ),
    "keyed missing": (KEYED[1:], r"line 1 does not answer key 1, .* \(4 rows for 5 prompts"),
    "too many": ([*SAID, ELSE[0]], "has 6 rows for 5 prompts: line 6 is the first too many"),
    "same row twice": ([*SAID[:2], *SAID[1:]], "line 3 repeats the prompt of line 2"),
    "repeated instead": ([*SAID[:4], SAID[0]], "line 5 repeats the prompt of line 1"),
    "same key twice": (with_row(4, key=2), "line 4 repeats the key of line 2"),
    "key as text twice": (with_row(4, key="2"), "line 4 repeats the key of line 2"),
    "unknown key": (with_row(2, key=77), "line 2 has key 77, which no prompt has"),
    "null key": (with_row(2, key=None), "line 2 has key None, which no prompt has"),
    "missing key": ([*KEYED[:2], SAID[2], *KEYED[3:]], "line 3 lacks the 'key' that other rows"),
    "swapped": ([SAID[1], SAID[0], *SAID[2:]], "line 1 does not answer key 1"),
    "swapped keys": ([KEYED[1], KEYED[0], *KEYED[2:]], "line 1 does not answer key 1"),
    "another text's": (
        with_row(2, prompt="Name tea 6."),
        r"line 2 \(key 2\) is the first of 1 of 5",
    ),
    "another file's": (ELSE, r"line 1 \(key 1\) is the first of 5 of 5 prompt texts that differ"),
    "no response": (with_row(3, response=None), "line 3 lacks a usable 'response'"),
    "no prompt": ([*SAID[:4], {"response": "Tea."}], "line 5 lacks a usable 'prompt'"),
    "response of words": (with_row(3, response=["Tea."]), "line 3 lacks a usable 'response'"),
    "not an object": ([*SAID[:4], "[]"], "line 5 lacks a usable 'prompt'"),
    "broken JSON": ([*SAID[:2], '{"prompt": "Na', *SAID[3:]], "line 3: not JSON"),
    "blank line": ([*SAID[:2], "", *SAID[2:]], "line 3: not JSON"),
}


@pytest.mark.parametrize(("said", "sentence"), BAD_RESPONSES.values(), ids=BAD_RESPONSES)
def test_bad_responses_are_one_sentence_and_write_nothing(tmp_path, capsys, said, sentence):
    code, shown, told = score_files(capsys, tmp_path, said)
    assert (code, shown, told.count("\n")) == (1, "", 1)
    assert told.startswith(f"error: {tmp_path / 'responses.jsonl'}") and re.search(sentence, told)
    assert not (tmp_path / "scores").exists()


BAD_PROMPTS = {name: BAD_FILES[name] for name in ("unknown id", "kwargs name", "broken JSON")}


@pytest.mark.parametrize(("asked", "sentence"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompts_stop_the_score_command(tmp_path, capsys, asked, sentence):
    code, shown, told = score_files(capsys, tmp_path, SAID, asked)
    assert (code, shown, told.count("\n")) == (1, "", 1) and re.search(sentence, told)
    assert not (tmp_path / "scores").exists()


def test_responses_that_are_no_utf8_are_named_by_line(tmp_path, capsys):
    prompts, path = write(tmp_path, *ASKED), tmp_path / "latin1.jsonl"
    lines = [json.dumps(row | {"response": "thé"}, ensure_ascii=False) for row in SAID]
    path.write_bytes("\n".join(lines).encode("latin-1"))
    code, _, told = command(capsys, "score", "--prompts", prompts, "--responses", path)
    assert code == 1 and told.startswith(f"error: {path}, line 1: not JSON ('utf-8' codec")


def test_a_failed_write_leaves_no_summary_of_other_verdicts(tmp_path, capsys):
    score_files(capsys, tmp_path, SAID)
    (tmp_path / "scores" / "verdicts.jsonl").unlink()
    (tmp_path / "scores" / "verdicts.jsonl").mkdir()
    code, shown, told = score_files(capsys, tmp_path, SAID)
    assert (code, shown) == (1, "") and "verdicts.jsonl" in told
    assert not (tmp_path / "scores" / "summary.json").exists()


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    code, _, told = score_files(capsys, tmp_path, SAID, out="taken")
    assert code == 1 and "Not a directory" in told and str(tmp_path / "taken") in told
    assert (tmp_path / "taken").read_text() == "mine"


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
    theirs = significance.paired(ifeval.load_verdicts(a), ifeval.load_verdicts(b))
    assert found.items() >= json.loads(json.dumps(theirs)).items()
    assert found["sensitivity"] == significance.sensitivity(theirs, 541)
    assert (found["n"], found["verdict"]) == (541, "clear margin")
    for told in ["both 0, only A 17, only B 37, neither 487", "+3.70 points", "37 won  17 lost",
                 "effect with 80 % power: 605", "needed among as many discordant prompts: 16",
                 "B against A: clear margin (net +20, exact McNemar p = 0.00907"]:  # fmt: skip
        assert told in shown, shown
    command(capsys, "compare", a, b, "--json", report, "--alpha", "0.001")
    assert json.loads(report.read_text())["verdict"] == "not distinguishable"
    command(capsys, "compare", a, b, "--json", report, "--clear-share", "0.1")
    assert json.loads(report.read_text())["verdict"] == "better, but small"


def test_score_and_compare_go_together(tmp_path, capsys):
    score_files(capsys, tmp_path, SAID, out="a")
    score_files(capsys, tmp_path, [row | {"response": "Tea."} for row in SAID], out="b")
    code, shown, _ = command(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert code == 0 and "only A 0, only B 3" in shown and "won: [2, 4, 5]" in shown


GOOD = [verdict(key, key > 2) for key in range(5)]
BAD_VERDICTS = {
    "other prompts": (
        [verdict(key + 1, True) for key in range(5)],
        r"row 1 is key \d .* and key \d ",
    ),
    "fewer": (GOOD[:3], r"same order \(\d and \d rows\)"),
    "same key twice": ([*GOOD[:4], GOOD[0]], "line 5 repeats key 0 of line 1"),
    "responses": (SAID, "line 1 is no verdict as the `score` command writes it"),
    "not an object": (['"text"'], "line 1 is no verdict"),
    "numbers": ([GOOD[4] | {"strict": [1]}], "line 1 is no verdict"),
    "too few": ([GOOD[4] | {"strict": []}], "line 1 is no verdict"),
    "too many": ([GOOD[4] | {"loose": [True, True]}], "line 1 is no verdict"),
    "ids of numbers": ([GOOD[4] | {"instruction_id_list": [5]}], "line 1 is no verdict"),
    "prompt level other": ([GOOD[0], GOOD[1] | {"prompt_loose": True}], "line 2 is no verdict"),
    "no loose": ([{k: v for k, v in GOOD[0].items() if k != "loose"}], "line 1 is no verdict"),
    "broken JSON": ([*GOOD[:2], "{"], "line 3: not JSON"),
    "empty": ([], "is empty: score again"),
}


@pytest.mark.parametrize("bad_side", ["a", "b"])
@pytest.mark.parametrize(("rows", "sentence"), BAD_VERDICTS.values(), ids=BAD_VERDICTS)
def test_bad_verdicts_are_one_sentence(tmp_path, capsys, rows, sentence, bad_side):
    good = write(tmp_path, *GOOD, name="good.jsonl")
    bad = write(tmp_path, *rows, name="bad.jsonl")
    sides = (good, bad) if bad_side == "b" else (bad, good)
    code, shown, told = command(capsys, "compare", *sides, "--json", tmp_path / "report.json")
    assert (code, shown, told.count("\n")) == (1, "", 1)
    assert bad in told and re.search(sentence, told)
    assert not (tmp_path / "report.json").exists()


def test_compare_command_refuses_what_is_not_there(tmp_path, capsys):
    a, b = verdict_files(tmp_path, 1, 1, 3)
    for sides in [(a, tmp_path / "none"), (tmp_path, b)]:
        code, _, told = command(capsys, "compare", *sides)
        assert code == 1 and "does not exist" in told
    code, _, told = command(capsys, "compare", a, b, "--alpha", "5")
    assert code == 1 and told == "error: alpha is 5.0: it must lie between 0 and 1\n"


# --- punkt


def wheel_with_punkt(folder, change=lambda content: content):
    """A wheel of the pinned name and version that holds the four files at the same place."""
    name, version = ifeval.PUNKT_PACKAGE.replace("-", "_").split("==")
    files = {f"cache/{ifeval.PUNKT}{p.name}": change(p.read_bytes()) for p in punkt_files()}
    files["METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files["WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, content in (files | {"RECORD": ""}).items():
            wheel.writestr(path if "/" in path else f"{name}-{version}.dist-info/{path}", content)


def punkt_files():
    return list(ifeval.ensure_punkt().iterdir())


def punkt_run(tmp_path):
    """`python -m atlas_lib.ifeval punkt` with an empty home, and pip that sees tmp_path only."""
    return python(
        ["-m", "atlas_lib.ifeval", "punkt"],
        HOME=str(tmp_path / "home"), XDG_CACHE_HOME=str(tmp_path / "cache"), NLTK_DATA="",
        PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path), PIP_CONFIG_FILE=os.devnull,
    )  # fmt: skip


def test_punkt_is_fetched_verified_and_mended(tmp_path):
    wheel_with_punkt(tmp_path)
    assert punkt_run(tmp_path).returncode == 0
    cached = tmp_path / "cache" / "atlas" / "nltk_data" / ifeval.PUNKT
    assert {path.name for path in cached.iterdir()} == set(ifeval.PUNKT_SHA256)
    (cached / "ortho_context.tab").write_bytes(b"torn")
    mended = punkt_run(tmp_path)
    assert mended.stdout == f"punkt_tab: {cached}\n"
    assert (cached / "ortho_context.tab").stat().st_size > 200_000
    next(tmp_path.glob("*.whl")).unlink()
    assert punkt_run(tmp_path).returncode == 0, "found again without any source"


@pytest.mark.parametrize("planted", ["nothing in reach", "other contents"])
def test_punkt_that_cannot_be_had_is_one_sentence(tmp_path, planted):
    if planted == "other contents":
        wheel_with_punkt(tmp_path, change=lambda content: content + b"x")
    run = punkt_run(tmp_path)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("error: IFEval needs nltk's English punkt_tab files")
    assert run.stderr.count("\n") == 1 and "set NLTK_DATA" in run.stderr


# --- the official prompts


@official
def test_official_prompts_load_whole():
    prompts = ifeval.load_prompts(str(OFFICIAL), None)
    sizes = Counter(len(row["instruction_id_list"]) for row in prompts)
    assert sizes == {1: 305, 2: 179, 3: 57}
    assert prompts == [json.loads(line) for line in OFFICIAL.read_text("utf-8").splitlines()]


@official
@pytest.mark.parametrize(
    "text", ["", "* \n\n***\n\n\"''\" [x] <<>>", "漢字 \u2028 😀\x00", "Tea is hot. " * 50]
)
def test_official_prompts_score_any_text(text):
    prompts = [json.loads(line) for line in OFFICIAL.open(encoding="utf-8")]
    verdicts = ifeval.score(prompts, [text] * len(prompts))
    assert all(v["loose"] >= v["strict"] for v in verdicts)
    assert ifeval.summarise(verdicts)["counts"]["instructions"] == 834


@official
def test_official_prompts_agree_with_lm_eval_where_it_draws_nothing():
    checkers = ifeval._checkers()
    for asked in ifeval.load_prompts(str(OFFICIAL), None):
        if asked["key"] not in (1122, 1129):  # there lm-eval draws the letter
            text = f"{asked['prompt']}\n\n* Tea, hot *and* black.\n\nP.S. [name]"
            [found], theirs = ifeval.score([asked], [text]), checkers.process_results(asked, [text])
            assert found["strict"] == theirs["inst_level_strict_acc"], asked["key"]
            assert found["loose"] == theirs["inst_level_loose_acc"], asked["key"]


SENTENCES = [
    "The tea is ready, so sit down with us.", "Der Tee ist fertig, also setzt euch zu uns.",
    "Le thé est prêt, alors asseyez-vous avec nous.", "El té está listo, así que siéntate.",
    "Il tè è pronto, quindi sedetevi con noi.", "O chá está pronto, senta-te connosco.",
    "Чай готов, так что садитесь с нами.", "茶が入りましたので、どうぞお座りください。",
    "차가 준비되었으니 우리와 함께 앉으세요.", "چای آماده است، پس با ما بنشینید.",
    "चाय तैयार है, तो हमारे साथ बैठिए।", "ชาพร้อมแล้ว เชิญนั่งกับเรา", "Chai iko tayari, keti nasi.",
    "Menu: tea, pain, vino, tapas, chat, die, no",
]  # fmt: skip
FORMS = [
    "{0}", "{0} {0} {0}\n\n***\n\n{0}", "* {0}\n* {0}\n* *{0}*", '"{0}"', '{{"tea": "{0}"}}',
    "<<{0}>>\n\n{0}\n\nP.S. [name] {0}", "Section 1\n{0}\nSECTION 2\n{0}", "{0}\n******\n{0}",
    "Sure, here it is:\n{0}\n", "{1}\n\n{0}", "My answer is yes. {0}", "", " \n\t", "1 2 3 #!",
    "```json\n{{\"a\": [{0!r}]}}\n```", "{0}\r\n\u2028\x00😀",
]  # fmt: skip


def synthesised(prompts, round_=0):
    """A text a prompt: 14 languages, 16 forms, capitals or not; many oblige with what is asked."""
    texts = []
    for asked in prompts:
        draw = random.Random(f"{round_} {asked['key']}")
        pool = SENTENCES[:1] if draw.random() < 0.5 else SENTENCES
        body = " ".join(draw.choices(pool, k=draw.choice([1, 2, 5, 40])))
        given = [value for kwargs in asked["kwargs"] for value in kwargs.values()]
        given += [word for value in given if isinstance(value, list) for word in value]
        words = [value for value in given if isinstance(value, str)]
        numbers = [min(value, 60) for value in given if isinstance(value, int)]
        if numbers and draw.random() < 0.5:
            parts = [f"{(words or [''])[-1]} {n} [{body}]" for n in range(1, numbers[0] + 1)]
            body = draw.choice(["\n\n", "\n***\n", "\n* "]).join(parts)
        text = draw.choice(["{0}", *FORMS]).format(body, asked["prompt"])
        change = draw.choice([str, str, str.upper, str.lower, lambda text: text.replace(",", "")])
        texts.append("\n".join([change(text).strip(), *words * draw.choice([0, 0, 1, 3])]))
    return texts


@official
def test_official_prompts_score_to_the_same_bytes_in_every_process(tmp_path):
    prompts = ifeval.load_prompts(str(OFFICIAL), None)
    texts = synthesised(prompts)
    said = [{"prompt": p["prompt"], "response": t} for p, t in zip(prompts, texts, strict=True)]
    responses = write(tmp_path, *said, name="responses.jsonl")
    written = []
    for seed in ("0", "1", "random"):
        run = python(["-m", "atlas_lib.ifeval", "score", "--prompts", str(OFFICIAL),
                      "--responses", responses, "--out", str(tmp_path / seed)],
                     PYTHONHASHSEED=seed)  # fmt: skip
        assert run.returncode == 0, run.stderr
        files = sorted((tmp_path / seed).iterdir())
        written.append([run.stdout, *((path.name, path.read_bytes()) for path in files)])
    assert written[0] == written[1] == written[2]
    assert ifeval.load_verdicts(tmp_path / "0") == ifeval.score(prompts, texts)


@pytest.fixture
def lm_eval_task(tmp_path, monkeypatch):
    """lm-eval's own task, from the packaged YAML, with the official prompts read from the file.

    Two things are ours, so that both sides draw alike: langdetect's seed (set for the process by
    ifeval._checkers), and `random`, which is seeded by the prompt's key before each check.
    """
    from lm_eval.tasks import TaskManager

    packaged = Path(ifeval._checkers().__file__).with_name("ifeval.yaml")
    kwargs = {"data_files": str(OFFICIAL), "cache_dir": str(tmp_path / "cache")}
    derived = {"include": str(packaged), "dataset_path": "json", "dataset_kwargs": kwargs}
    (tmp_path / "ifeval.yaml").write_text(json.dumps(derived))
    tasks = TaskManager(include_defaults=False).load([str(tmp_path / "ifeval.yaml")])["tasks"]
    names = tasks["ifeval"].config.process_results.__globals__

    def seeded(check):
        return lambda case, text: random.seed(str(case.key)) or check(case, text)

    for mode in ifeval.MODES:
        name = f"test_instruction_following_{mode}"
        monkeypatch.setitem(names, name, seeded(names[name]))
    return tasks["ifeval"]


def replayed(task, answers):
    """(metrics, samples) of lm-eval's whole evaluation of a model that knows its answers."""
    from lm_eval import evaluator
    from lm_eval.api.model import LM

    class Replay(LM):
        def generate_until(self, requests):
            return [answers[request.args[0]] for request in requests]

        def loglikelihood(self, requests):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    found = evaluator.simple_evaluate(Replay(), tasks=[task], bootstrap_iters=0)
    samples = sorted(found["samples"]["ifeval"], key=lambda sample: sample["doc_id"])
    return found["results"]["ifeval"], samples


@official
def test_official_prompts_agree_with_lm_evals_whole_task(lm_eval_task):
    prompts, before = ifeval.load_prompts(str(OFFICIAL), None), random.getstate()
    seen = set()
    for round_ in range(2):
        texts = synthesised(prompts, round_)
        asked = [row["prompt"] for row in prompts]
        metrics, samples = replayed(lm_eval_task, dict(zip(asked, texts, strict=True)))
        verdicts = ifeval.score(prompts, texts)
        summary = ifeval.summarise(verdicts)
        for name in ifeval.ACCURACIES:
            assert metrics[f"{name},none"] == pytest.approx(summary[name], abs=1e-12), name
        for found, theirs in zip(verdicts, samples, strict=True):
            assert found["key"] == theirs["doc"]["key"]
            for mode in ifeval.MODES:
                where = (found["key"], mode)
                seen.update(zip(found["instruction_id_list"], found[mode], strict=True))
                assert found[mode] == theirs[f"inst_level_{mode}_acc"], where
                assert found[f"prompt_{mode}"] == theirs[f"prompt_level_{mode}_acc"], where
    assert len(seen) == 2 * 25, "each type is followed somewhere, and somewhere not"
    random.setstate(before)
