"""The checkers: hand-written responses, determinism, parity with lm-eval's task, Punkt's files."""

import json
import os
import random
import zipfile
from collections import Counter

import pytest
from ifeval_cases import OFFICIAL, official, prompt, python

from atlas_lib.evaluate import checkers, ifeval, ifeval_files

# (instruction, kwargs, a response that follows it, one that does not), written by hand, of those
# that need Punkt or langdetect; the responses of the tiny model's corpus follow all 25 types.
EXAMPLES = [
    ("change_case:english_capital", {},
     "THE WEATHER IS LOVELY AND EVERYBODY WANTS TO GO OUTSIDE.", "The WEATHER IS LOVELY."),
    ("change_case:english_lowercase", {},
     "the tea is ready, so sit down with us.", "The tea is ready, so sit down with us."),
    ("change_case:capital_word_frequency",
     {"capital_relation": "at least", "capital_frequency": 2}, "VERY GOOD tea.", "Very GOOD tea."),
    ("language:response_language", {"language": "de"},
     "Der Tee ist fertig, und wir setzen uns jetzt zusammen an den Tisch.",
     "The tea is ready, and we sit down together at the table now."),
    ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3},
     "Dr. Smith drinks tea. It is hot.", "He drinks tea. It is hot. He waits."),
]  # fmt: skip


# --- verdicts


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


def test_brackets_nested_too_deep_are_no_json():
    asked = prompt(ids=["detectable_format:json_format"])
    verdicts = ifeval.score([asked] * 2, ["[" * 100_000, "[" * 9 + "]" * 9])
    assert [verdict["prompt_strict"] for verdict in verdicts] == [False, True]


# --- determinism

# '#' is no letter: lm-eval draws one. The short mixed texts make langdetect's sampling waver.
RESCORE = """
import json
from atlas_lib.evaluate import ifeval
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
    before = random.getstate()
    ifeval.score([prompt(ids=["keywords:letter_frequency"], kwargs=[kwargs])], ["Tea!"])
    assert random.getstate() == before


def test_nothing_is_logged_where_no_language_is_found(caplog):
    asked = prompt(ids=["language:response_language"], kwargs=[{"language": "de"}])
    [found] = ifeval.score([asked], ["1 2"])
    assert found["prompt_strict"] and not caplog.records


def test_checkers_load_neither_torch_nor_transformers_and_claim_no_download():
    code = "import sys; from atlas_lib.evaluate import ifeval, checkers; "
    code += "checkers.lm_eval_checkers(); print({'torch', 'transformers'} & set(sys.modules))"
    run = python(["-c", code])
    assert (run.stdout, run.stderr) == ("set()\n", "")


# --- punkt


def wheel_with_punkt(folder, change=lambda content: content):
    """A wheel of the pinned name and version that holds the four files at the same place."""
    name, version = checkers.PUNKT_PACKAGE.replace("-", "_").split("==")
    found = list(checkers.ensure_punkt().iterdir())
    files = {f"cache/{checkers.PUNKT}{p.name}": change(p.read_bytes()) for p in found}
    files["METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files["WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, content in (files | {"RECORD": ""}).items():
            wheel.writestr(path if "/" in path else f"{name}-{version}.dist-info/{path}", content)


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
    cached = tmp_path / "cache" / "atlas" / "nltk_data" / checkers.PUNKT
    assert {path.name for path in cached.iterdir()} == set(checkers.PUNKT_FILES)
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
    message = run.stderr.splitlines()[-1]  # below those of pip
    assert message.startswith("error: IFEval needs nltk's English punkt_tab files")
    assert "set NLTK_DATA" in message


# --- the official prompts


@official
def test_official_prompts_load_whole():
    prompts = ifeval_files.load_prompts(str(OFFICIAL))
    sizes = Counter(len(row["instruction_id_list"]) for row in prompts)
    assert sizes == {1: 305, 2: 179, 3: 57}
    assert prompts == [json.loads(line) for line in OFFICIAL.read_text("utf-8").splitlines()]


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


@pytest.fixture
def lm_evals_task(monkeypatch):
    """lm-eval's task, which draws as ours does: seeded by the prompt's key before each check."""
    task = checkers.lm_eval_checkers()

    def seeded(check):
        return lambda case, text: random.seed(str(case.key)) or check(case, text)

    for name in (f"test_instruction_following_{mode}" for mode in checkers.MODES):
        monkeypatch.setattr(task, name, seeded(getattr(task, name)))
    return task


@official
@pytest.mark.parametrize("round_", [0, 1])
def test_official_prompts_agree_with_lm_evals_task(lm_evals_task, round_):
    prompts = ifeval_files.load_prompts(str(OFFICIAL))
    names = {name for row in prompts for given in row["kwargs"] for name in given}
    texts = synthesised(prompts, round_)
    verdicts = ifeval.score(prompts, texts)
    rows = []
    for prompt_, text, found in zip(prompts, texts, verdicts, strict=True):
        padded = [dict.fromkeys(names) | given for given in prompt_["kwargs"]]  # as on the hub
        rows.append(lm_evals_task.process_results(prompt_ | {"kwargs": padded}, [text]))
        assert found["loose"] >= found["strict"]
        for mode in checkers.MODES:
            assert found[mode] == rows[-1][f"inst_level_{mode}_acc"], (found["key"], mode)
            assert found[f"prompt_{mode}"] == rows[-1][f"prompt_level_{mode}_acc"]
    summary = ifeval.summarise(verdicts)
    for name in summary["intervals"]:
        values = [row[name] for row in rows]
        whole = name.startswith("prompt")
        theirs = sum(values) / 541 if whole else lm_evals_task.agg_inst_level_acc(values)
        assert theirs == pytest.approx(summary[name], abs=1e-12), name
    assert len(summary["by_type"]) == 25
    kinds = [0 < passed < n for passed, n in summary["by_type"].values()]
    assert sum(kinds) >= 23, "most types are followed somewhere, and somewhere not"
