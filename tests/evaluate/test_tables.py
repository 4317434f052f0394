"""Tables of notebook 04: every number under the heading that it belongs to."""

import pytest
from ifeval_cases import verdict

from atlas_lib.evaluate import ifeval, significance, tables

PASSED = {"base": range(3), "SFT": range(2, 12)}  # of 12 prompts


@pytest.fixture(scope="module")
def verdicts():
    return {
        (model, "chat"): [verdict(key, key in keys) for key in range(12)]
        for model, keys in PASSED.items()
    }


@pytest.fixture(scope="module")
def metrics(verdicts):
    responses = [{"response": "Tea.", "n_tokens": 2, "stop": None}] * 12
    return ifeval.grid_metrics(dict.fromkeys(verdicts, responses), verdicts, "<|im_end|>")


def test_scores_have_a_column_per_model_and_format(metrics):
    table = tables.score_table(metrics)
    low, high = metrics[1]["ci95"]
    shown = table["SFT", "chat"]
    assert list(table) == [("base", "chat"), ("SFT", "chat")]
    assert shown["prompt_level_strict_acc"] == f"0.8333 ({low:.3f} to {high:.3f})"
    assert (shown["prompts"], shown["at_cap"], shown["mean_length"]) == (12, "1", "2")


def test_comparisons_name_wins_losses_and_the_adjusted_p(verdicts):
    [compared] = significance.compare_grid(verdicts, 0.05, 0.04)
    row = tables.comparison_table([compared | {"p_adjusted": 0.5}]).loc[
        "SFT chat against base chat"
    ]
    assert [row[name] for name in ("won", "lost", "both", "neither")] == [9, 2, 1, 0]
    assert (row["p"], row["role"]) == ("0.5", "primary")
    assert row["difference"].startswith("+58.33 points (+")
    [kind] = tables.type_table(compared["by_type"]).to_dict("records")
    assert kind == {"won": 9, "lost": 2, "both": 1, "neither": 0, "net": 7}


def test_parts_show_what_was_lost_beside_what_was_won(verdicts):
    parts = {"taught": [*range(6)], "others": [*range(6, 12)]}
    found = significance.compare_parts(verdicts["base", "chat"], verdicts["SFT", "chat"], parts)
    table = tables.part_table(found)
    assert table.loc["taught"].to_dict() == {
        "prompts": 6, "before": 3, "after": 4, "won": 3, "lost": 2, "p": "1",
    }  # fmt: skip
    assert [*table.loc["others", ["before", "after"]]] == [0, 6]


def test_the_verdict_says_that_it_is_about_one_adapter(verdicts):
    [compared] = significance.compare_grid(verdicts, 0.05, 0.04)
    line = tables.verdict_line(compared)
    assert line.startswith("SFT chat against base chat: not distinguishable. +58.33 points (")
    assert "on 12 prompts, 9 won, 2 lost, p = 0.065." in line
    assert "this one adapter" in line


PROMPT, INSTRUCTION = "prompt_level_strict_acc", "inst_level_strict_acc"


@pytest.mark.parametrize(
    ("model", "metric", "value", "expected"),
    [
        ("base", PROMPT, 0.26, ("0.2500", "+0 of 12 prompts")),
        ("base", PROMPT, 0.42, ("0.2500", "-2 of 12 prompts")),
        ("SFT", INSTRUCTION, 0.75, ("0.8333", "+1 of 12 instructions")),
        ("base", "mean of both levels", 0.3, ("not measured", "-")),
        ("Instruct", PROMPT, 0.2, ("not run", "-")),
    ],
)
def test_published_figures_beside_ours(metrics, model, metric, value, expected):
    known = {"model": model, "format": "chat", "metric": metric, "value": value}
    [row] = tables.beside_ours([known], metrics)
    assert (row["ours"], row["apart"]) == expected and row.items() >= known.items()
