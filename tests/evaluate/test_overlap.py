"""Overlap of training turns with prompts and of validation with training, planted and found."""

import json

import pytest
from checks import refusal, run_python
from tiny import TINY

from atlas_lib import artifacts, notebooks, stages
from atlas_lib.config import load_config
from atlas_lib.data_prep import subset
from atlas_lib.evaluate import overlap
from atlas_lib.loss_mask import audit
from atlas_lib.sweep import definition

LONG = "Describe in your own words how a lighthouse keeper spends a long and stormy winter night."
SHORT = "Name three kinds of tea."
SHARED = " ".join(LONG.split()[:13])


def chat(*turns: str) -> list[dict]:
    """A conversation of these user turns, each with an answer."""
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in (("user", turn), ("assistant", f"An answer to {len(turn)} letters."))
    ]


# name: (user turns, overlaps as {number of the prompt: kind})
TURNS = {
    "verbatim": ([LONG], {0: "exact"}),
    "short prompt": ([SHORT], {1: "exact"}),
    "other case": ([LONG.upper()], {0: "exact"}),
    "other punctuation": ([LONG.replace(" ", ", ").replace(".", "?!")], {0: "exact"}),
    "markdown": ([f"**{LONG.replace(' ', '_')}**"], {0: "exact"}),
    "other whitespace": ([LONG.replace(" ", "\n\t ")], {0: "exact"}),
    "13 words of it": ([f"Now then: {SHARED.lower()} or not?"], {0: "13-gram"}),
    "in a later turn": (["Hello!", f"And {LONG}"], {0: "13-gram"}),
    "exact beside 13-gram": ([f"And {LONG}", LONG, f"And {LONG}"], {0: "exact"}),
    "both prompts": ([LONG, SHORT], {0: "exact", 1: "exact"}),
    "12 words of it": ([" ".join(LONG.split()[:12]) + " enjoys reading."], {}),
    "short prompt within a turn": ([f"Hello. {SHORT} Thank you."], {}),
    "across two turns": ([" ".join(LONG.split()[:7]), " ".join(LONG.split()[7:])], {}),
    "other text": (["What is a lighthouse?"], {}),
    "no words": (["", "?!"], {}),
}


@pytest.mark.parametrize("name", TURNS)
def test_a_planted_overlap_is_found_and_no_other(name):
    turns, expected = TURNS[name]
    found = overlap.prompt_overlaps([chat("Hello."), chat(*turns)], [LONG, SHORT])
    assert {pair["row"] for pair in found} <= {1}
    assert {pair["prompt"]: pair["kind"] for pair in found} == expected


def test_only_the_users_turns_are_compared_with_prompts():
    answered = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": LONG}]
    assert overlap.prompt_overlaps([answered], [LONG]) == []


def test_near_duplicates_are_pairs_with_most_of_their_words_in_common():
    words = [f"word{n}" for n in range(200)]
    original, other = chat(" ".join(words)), chat(" ".join(words[::-1]))
    changed = chat(" ".join([*words[:150], "new", *words[150:]]).upper())
    half_new = chat(" ".join(words[:60] + [f"new{n}" for n in range(140)]))
    found = overlap.near_duplicates([other, original], [changed, half_new, original])
    assert {(pair["train"], pair["validation"]) for pair in found} == {(1, 0), (1, 2)}
    assert [pair["shared"] for pair in found if pair["validation"] == 2] == [1.0]


def configured(tmp_path, **given):
    """Twelve rows of which four overlap with the prompts, for ten training and two other rows."""
    turns = [[f"Question {n} about the number {n}?"] for n in range(8)]
    turns += [
        TURNS[name][0] for name in ("other case", "13 words of it", "verbatim", "short prompt")
    ]
    rows = [{"messages": chat(*texts)} for texts in turns]
    artifacts.write_jsonl(tmp_path / "chats.jsonl", rows)
    artifacts.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": LONG}, {"prompt": SHORT}])
    values = {"data.dataset": f"{tmp_path}/chats.jsonl", "data.n_samples": 10}
    values |= {"data.n_validation": 2, "eval.prompts": f"{tmp_path}/prompts.jsonl"}
    return load_config("sft_qwen05b", "offline", values | given)


@pytest.mark.parametrize("exclude", [False, True])
def test_notebook_01_drops_the_overlapping_rows_on_request(exclude, tmp_path):
    config = configured(tmp_path, **{"data.exclude_overlap": exclude})
    train, validation = subset.load_subset(config)
    texts = [LONG, SHORT]
    overlapping = sorted({p["row"] for p in overlap.prompt_overlaps(train["messages"], texts)})
    assert overlapping
    given = {"CONFIG": "sft_qwen05b", "OVERLAY": "offline", "OUT": str(tmp_path / "out")}
    changed = {"data.exclude_overlap": exclude, "data.n_samples": 10, "data.n_validation": 2}
    changed |= {"data.dataset": config.data.dataset, "eval.prompts": config.eval.prompts}
    notebooks.execute("01_data_prep", tmp_path / "out", given | {"SET": changed})
    folder = tmp_path / "out" / stages.DATA_PREP
    card = json.loads((folder / "card.json").read_text("utf-8"))
    expected = overlapping if exclude else []
    kept = [m for row, m in enumerate(train["messages"]) if row not in expected]
    assert card["excluded_for_overlap"] == expected
    assert card["train"]["conversations"] == len(kept)
    assert subset.read_subset(folder) == kept
    assert subset.read_subset(folder, "validation") == validation["messages"][:]
    audited = audit.read_summary(audit.run_audit(config, tmp_path / "out"))
    assert audited["rows"] == len(kept)


def test_what_is_dropped_depends_on_the_prompts_and_else_the_stage_does_not(tmp_path):
    given = [{"data.exclude_overlap": on} for on in (True, False)]
    for changed, differs in zip(given, (True, False), strict=True):
        here = artifacts.made_from(stages.DATA_PREP, configured(tmp_path, **changed))
        other = changed | {"eval.prompts": "embedded:ifeval"}
        there = artifacts.made_from(stages.DATA_PREP, configured(tmp_path, **other))
        assert (here != there) == differs


def test_without_notebook_01_the_stage_is_refused_and_nothing_is_written(tmp_path):
    config = configured(tmp_path, **{"data.exclude_overlap": True})
    sentence = refusal(subset.prepare_subset, config, tmp_path / "out")
    assert "data.exclude_overlap is applied by notebook 01_data_prep; run it first" in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["set", "space"])
def test_a_sweep_cannot_drop_rows_for_prompts_that_it_exchanges(key):
    file = definition.load_sweep("lr_rank_offline").model_dump() | {"multiples": {}}
    value = True if key == "set" else [True, False]
    with pytest.raises(ValueError, match=r"data\.exclude_overlap would drop other rows"):
        definition.validate_sweep(file | {key: {"data.exclude_overlap": value}})


@pytest.mark.parametrize(
    ("prompts", "words"),
    [("none.jsonl", "none.jsonl does not exist"), ("chats.jsonl", "has no text as 'prompt'")],
)
def test_prompts_that_cannot_be_read_stop_only_a_run_that_drops_rows(
    prompts, words, tmp_path, capsys
):
    given = {"eval.prompts": f"{tmp_path}/{prompts}"}
    found = overlap.evaluation_texts(configured(tmp_path, **given))
    assert set(found) == {overlap.DEV_PROMPTS}
    assert words in capsys.readouterr().out
    config = configured(tmp_path, **given, **{"data.exclude_overlap": True})
    with pytest.raises((ValueError, OSError), match=words):
        overlap.evaluation_texts(config)


WITHOUT_TORCH = """
import sys
from atlas_lib.config import load_config
from atlas_lib.data_prep import subset
from atlas_lib.evaluate import overlap
config = load_config("sft_qwen05b", "offline", {tiny})
train, validation = subset.load_subset(config)
prompts = overlap.evaluation_texts(config)
overlaps = {{name: overlap.prompt_overlaps(train["messages"], prompts[name]) for name in prompts}}
print(overlap.overlap_table(overlaps, prompts).to_string())
assert not {{"torch", "transformers", "lm_eval"}} & set(sys.modules)
"""


def test_the_report_of_the_offline_overlay_loads_no_torch():
    done = run_python("-c", WITHOUT_TORCH.format(tiny=TINY))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "embedded:ifeval" in done.stdout
    assert overlap.DEV_PROMPTS in done.stdout
