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


@pytest.mark.parametrize(
    ("model", "value", "should_agree", "expected"),
    [
        ("base", 0.26, True, ("0.2500", "yes")),
        ("base", 0.9, True, ("0.2500", "no")),
        ("base", 0.9, False, ("0.2500", "-")),
        ("Instruct", 0.2, True, ("not run", "-")),
    ],
)
def test_published_figures_beside_ours(metrics, model, value, should_agree, expected):
    known = {"model": model, "format": "chat", "value": value, "should_agree": should_agree}
    [row] = tables.beside_ours([known], metrics)
    assert (row["ours"], row["agrees"]) == expected and row.items() >= known.items()
