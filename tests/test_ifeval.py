"""atlas_lib/ifeval.py: verdicts on hand-written answers, determinism, refusals, statistics."""

import json
import math
import os
import random
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from atlas_lib import ifeval

ROOT = Path(__file__).resolve().parents[1]
OFFICIAL = ROOT.parent / "shared" / "data" / "ifeval_input_data.jsonl"
official = pytest.mark.skipif(
    not OFFICIAL.is_file(), reason="IFEval's official prompts are not in ../shared/data"
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


def paired(both, only_a, only_b, neither):
    """Two sets of verdicts with these counts."""
    outcomes = [(True, True)] * both + [(True, False)] * only_a
    outcomes += [(False, True)] * only_b + [(False, False)] * neither
    return [[verdict(key, pair[side]) for key, pair in enumerate(outcomes)] for side in (0, 1)]


def write(folder, *lines):
    path = folder / "prompts.jsonl"
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
    "broken JSON": ([prompt(), '{"key": 2'], "line 2 is not JSON"),
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
    json.dumps(found)


@pytest.mark.parametrize(("passed", "n"), [(67, 541), (0, 20), (20, 20)])
def test_ci95_is_wilsons(passed, n):
    p, z = passed / n, stats.norm.ppf(0.975)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = ifeval.summarise([verdict(key, key < passed) for key in range(n)])
    assert found["ci95"] == pytest.approx([centre - half, centre + half], abs=1e-9)


def test_compare_worked_by_hand():
    """10 discordant, 8 of them won: p = 2 (45 + 10 + 1) / 2^10 = 0.109375."""
    found = ifeval.compare(*paired(both=5, only_a=2, only_b=8, neither=85))
    assert {k: found[k] for k in ("both", "only_a", "only_b", "neither", "net")} == {
        "both": 5, "only_a": 2, "only_b": 8, "neither": 85, "net": 6,
    }  # fmt: skip
    assert found["mcnemar_p"] == pytest.approx(0.109375, abs=1e-12)
    assert found["difference_points"] == pytest.approx(6.0)
    json.dumps(found)


@pytest.mark.parametrize(("only_a", "only_b"), [(5, 15), (21, 39), (60, 60), (0, 3), (39, 61)])
def test_mcnemar_p_against_the_binomial_tail(only_a, only_b):
    tail = stats.binom(only_a + only_b, 0.5).cdf(min(only_a, only_b))
    found = ifeval.compare(*paired(30, only_a, only_b, 300))
    assert found["mcnemar_p"] == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_difference_interval_against_scipy_and_the_normal_formula():
    sides = paired(both=60, only_a=20, only_b=45, neither=416)
    low, high = ifeval.compare(*sides)["difference_ci95"]
    gain = np.array(
        [100.0 * (b["prompt_strict"] - a["prompt_strict"]) for a, b in zip(*sides, strict=True)]
    )
    reference = stats.bootstrap((gain,), np.mean, method="percentile", n_resamples=9999, rng=1)
    one_prompt = 100 / gain.size  # resampled differences are multiples of this
    theirs = list(reference.confidence_interval)
    assert [low, high] == pytest.approx(theirs, abs=1.5 * one_prompt)
    half = 1.96 * gain.std() / math.sqrt(gain.size)
    assert [low, high] == pytest.approx([gain.mean() - half, gain.mean() + half], abs=0.3)
    assert ifeval.compare(*sides)["difference_ci95"] == [low, high], "seeded"


def test_compare_of_equal_verdicts_finds_nothing():
    found = ifeval.compare(*paired(3, 0, 0, 4))
    assert (found["mcnemar_p"], found["net"], found["difference_ci95"]) == (1.0, 0, [0.0, 0.0])


def test_compare_refuses_other_prompts():
    first, second = paired(1, 1, 1, 1)
    for other in (second[::-1], second[:3]):
        with pytest.raises(ValueError, match="not of the same prompts in the same order"):
            ifeval.compare(first, other)


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
