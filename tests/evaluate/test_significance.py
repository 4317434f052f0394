"""Every statistic against an independent computation."""

import json
import math
from math import comb

import numpy as np
import pytest
from ifeval_cases import verdict
from scipy import stats

from atlas_lib.evaluate import significance


def sides(both, only_a, only_b, neither):
    """Two sets of one-instruction verdicts with these counts, in this order."""
    outcomes = [(True, True)] * both + [(True, False)] * only_a
    outcomes += [(False, True)] * only_b + [(False, False)] * neither
    return [[verdict(key, pair[side]) for key, pair in enumerate(outcomes)] for side in (0, 1)]


def clustered(n=541, seed=3):
    """Verdicts on 1 to 3 instructions a prompt that mostly pass or fail together."""
    draw = np.random.default_rng(seed)
    shares = draw.beta(0.4, 0.8, size=n)
    return [
        verdict(key, *(bool(draw.random() < share) for _ in range(draw.choice([1, 2, 3]))))
        for key, share in enumerate(shares)
    ]


def improved(verdicts, share=0.2, seed=4):
    """New verdicts on the same prompts: `share` of the instructions fall the other way, most up."""
    draw = np.random.default_rng(seed)
    flip = {True: share / 2, False: share}
    return [verdict(v["key"], *(ok ^ bool(draw.random() < flip[ok]) for ok in v["strict"]))
            for v in verdicts]  # fmt: skip


def interval(verdicts):
    """The interval of the instruction-level accuracy."""
    passed, sizes = ([f(v["strict"]) for v in verdicts] for f in (sum, len))
    return significance.share_ci(passed, sizes)


# --- intervals


@pytest.mark.parametrize(("passed", "n"), [(67, 541), (0, 20), (20, 20), (0, 1), (1, 1)])
def test_wilsons_formula(passed, n):
    p, z = passed / n, stats.norm.ppf(0.975)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = significance.proportion_ci(passed, n)
    assert found == pytest.approx([centre - half, centre + half], abs=1e-9)


def test_instruction_intervals_against_the_ratio_estimators_standard_error():
    a = clustered()
    b = improved(a)
    compared = significance.paired(a, b)
    sizes = np.array([len(v["strict"]) for v in a])
    passed = np.array([sum(v["strict"]) for v in a])
    gains = np.array([sum(v["strict"]) for v in b]) - passed
    difference_ci95 = [bound / 100 for bound in compared["inst_difference_ci95"]]
    for values, found in [(passed, interval(a)), (gains, difference_ci95)]:
        ratio, n = values.sum() / sizes.sum(), len(a)
        error = math.sqrt(np.sum((values - ratio * sizes) ** 2) / (n - 1) / n) / sizes.mean()
        assert found == pytest.approx([ratio - 1.96 * error, ratio + 1.96 * error], abs=0.003)
    assert compared["inst_difference_points"] == pytest.approx(100 * ratio)
    share = passed.sum() / sizes.sum()
    naive = math.sqrt(share * (1 - share) / sizes.sum())
    low, high = interval(a)
    assert high - low > 1.15 * 2 * 1.96 * naive, "instructions of a prompt are not independent"
    assert [low, high] == interval(a), "seeded"


def test_instruction_interval_resamples_the_number_of_instructions_too():
    """Half of each prompt's instructions, whatever their number: the ratio cannot vary."""
    verdicts = [verdict(key, *[True, False] * (1 + key % 3)) for key in range(60)]
    assert interval(verdicts) == [0.5, 0.5]


@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("n", [1, 12])
def test_instruction_interval_has_a_width_where_resamples_do_not_vary(ok, n):
    found = interval([verdict(key, ok, ok) for key in range(n)])
    assert found == significance.proportion_ci(n if ok else 0, n)
    assert found[1] - found[0] > 0.2


# --- McNemar


def test_paired_worked_by_hand():
    """10 discordant, 8 of them won: p = 2 (45 + 10 + 1) / 2^10 = 0.109375."""
    found = significance.paired(*sides(both=5, only_a=2, only_b=8, neither=85))
    assert [found[k] for k in ("both", "only_a", "only_b", "neither", "net")] == [5, 2, 8, 85, 6]
    assert found["mcnemar_p"] == pytest.approx(0.109375, abs=1e-12)
    assert found["difference_points"] == pytest.approx(6.0)
    assert (found["lost"], found["won"]) == ([5, 6], [7, 8, 9, 10, 11, 12, 13, 14])
    json.dumps(found)


@pytest.mark.parametrize(("only_a", "only_b"), [(5, 15), (21, 39), (60, 60), (0, 3), (39, 61)])
def test_mcnemar_p_by_summing_binomial_coefficients(only_a, only_b):
    n = only_a + only_b
    tail = sum(comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    assert significance.mcnemar_p(only_a, only_b) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_by_type_counts_instructions():
    names = ["punctuation:no_comma", "startend:quotation"]
    a = [verdict(1, True, False, names=names), verdict(2, False, names=names[:1])]
    b = [verdict(1, True, True, names=names), verdict(2, False, names=names[:1])]
    found = significance.paired(a, b)
    assert found["by_type"] == {
        "punctuation:no_comma": {"both": 1, "only_a": 0, "only_b": 0, "neither": 1},
        "startend:quotation": {"both": 0, "only_a": 0, "only_b": 1, "neither": 0},
    }
    assert found["won"] == [1] and found["lost"] == []
    assert found["inst_difference_points"] == pytest.approx(100 / 3)


def test_prompt_interval_against_a_plain_bootstrap_and_the_normal_formula():
    a, b = sides(both=60, only_a=20, only_b=45, neither=416)
    low, high = significance.paired(a, b)["difference_ci95"]
    pairs = zip(a, b, strict=True)
    gain = np.array([100.0 * (y["prompt_strict"] - x["prompt_strict"]) for x, y in pairs])
    drawn = np.random.default_rng(1).choice(gain, size=(9999, gain.size)).mean(axis=1)
    one_prompt = 100 / gain.size  # resampled differences are multiples of this
    assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1.5 * one_prompt)
    half = 1.96 * gain.std() / math.sqrt(gain.size)
    assert [low, high] == pytest.approx([gain.mean() - half, gain.mean() + half], abs=0.3)
    assert significance.paired(a, b)["difference_ci95"] == [low, high], "seeded"


def test_swapping_a_and_b_mirrors_everything():
    a = clustered()
    b = improved(a)
    there, back = significance.paired(a, b), significance.paired(b, a)
    assert there["net"] == -back["net"] != 0 and there["mcnemar_p"] == back["mcnemar_p"]
    assert (there["won"], there["lost"]) == (back["lost"], back["won"])
    for name in ("difference", "inst_difference"):
        assert there[f"{name}_points"] == pytest.approx(-back[f"{name}_points"])
        mirrored = [-bound for bound in reversed(back[f"{name}_ci95"])]
        assert there[f"{name}_ci95"] == pytest.approx(mirrored, abs=1e-9)


@pytest.mark.parametrize("outcomes", [(3, 0, 0, 4), (0, 0, 0, 1)])
def test_no_discordant_pair_finds_nothing(outcomes):
    found = significance.paired(*sides(*outcomes))
    assert (found["mcnemar_p"], found["net"]) == (1.0, 0)
    assert found["difference_ci95"] == found["inst_difference_ci95"] == [0.0, 0.0]
    assert significance.smallest_effect(sum(outcomes), 0.0, 0.05) is None


def test_one_prompt():
    found = significance.paired(*sides(0, 0, 1, 0))
    assert (found["mcnemar_p"], found["difference_points"]) == (1.0, 100.0)
    assert significance.smallest_effect(1, 1.0, 0.05) is None


def test_other_prompts_are_refused():
    a, b = sides(1, 1, 1, 1)
    other_ids = [*b[:3], verdict(3, True, names=["punctuation:no_comma"])]
    for other in (b[::-1], b[:3], other_ids):
        with pytest.raises(ValueError, match="not of the same prompts in the same order"):
            significance.paired(a, other)


# --- several comparisons


def test_holm_by_hand():
    """Sorted 0.01 0.02 0.03 0.5: times 4, 3, 2, 1, never falling: 0.04 0.06 0.06 0.5."""
    found = significance.holm({"a": 0.03, "b": 0.01, "c": 0.5, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]
    assert found == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.5, "d": 0.06})
    assert significance.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert significance.holm({}) == {} and significance.holm({"a": 0.2}) == {"a": 0.2}


@pytest.mark.parametrize(
    ("net", "low", "p", "words"),
    [
        (20, 3.8, 0.033, "clear margin"),
        (20, 3.69, 0.033, "better"),  # 20 of 541 is 3.697 points
        (-20, -6.0, 0.033, "worse"),
        (20, 3.8, 0.05, "not distinguishable"),  # p < alpha, not p <= alpha
        (0, 0.0, 1.0, "not distinguishable"),
    ],
)
def test_verdict_in_words(net, low, p, words):
    found = {"net": net, "difference_ci95": [low, low + 5]}
    assert significance.verdict(found, p, 0.05, significance.CLEAR_SHARE) == words


@pytest.mark.parametrize("n", [20, 121, 541, 2000])
def test_a_significant_gain_is_not_always_a_clear_margin(n):
    """The smallest net win that is significant, at every number of prompts: 6 wins, 0 losses."""
    found = significance.paired(*sides(both=n - 6, only_a=0, only_b=6, neither=0))
    assert found["mcnemar_p"] < 0.05
    clear = significance.CLEAR_SHARE
    words = significance.verdict(found, found["mcnemar_p"], 0.05, clear)
    assert words == ("clear margin" if n == 20 else "better")


def test_comparisons_follow_the_plan():
    outcomes = {"base": 0.1, "SFT": 0.4, "Instruct": 0.7}
    draw = np.random.default_rng(0)
    verdicts = {
        (model, form): [verdict(key, bool(draw.random() < share)) for key in range(60)]
        for model, share in outcomes.items()
        for form in ("raw", "chat")
    }
    found = significance.compare_grid(verdicts, 0.05, 0.05)
    assert [c["role"] for c in found] == ["primary", "secondary", *["other"] * 7]
    assert [(c["a"], c["b"]) for c in found[:2]] == [
        (["base", form], ["SFT", form]) for form in ("chat", "raw")
    ]
    primary, secondary = (c["mcnemar_p"] for c in found[:2])
    assert [c["p_adjusted"] for c in found[:2]] == [primary, max(primary, secondary)]
    others = {str(i): c["mcnemar_p"] for i, c in enumerate(found[2:])}
    assert [c["p_adjusted"] for c in found[2:]] == list(significance.holm(others).values())
    for c in found:
        pair = verdicts[tuple(c["a"])], verdicts[tuple(c["b"])]
        assert c.items() >= significance.paired(*pair).items()
        assert c["verdict"] == significance.verdict(c, c["p_adjusted"], 0.05, 0.05)
    json.dumps(found)


def test_comparisons_leave_out_what_is_not_there():
    a, b = sides(3, 1, 9, 3)
    found = significance.compare_grid({("base", "raw"): a, ("SFT", "raw"): b}, 0.05, 0.04)
    assert [(c["role"], c["a"], c["b"]) for c in found] == [
        ("secondary", ["base", "raw"], ["SFT", "raw"])
    ]
    assert significance.compare_grid({("base", "chat"): a, ("SFT", "raw"): b}, 0.05, 0.04) == []


def test_an_adjusted_p_decides_the_verdict_of_the_others():
    a, b = sides(0, 5, 16, 79)  # p = 0.027: significant alone, not as the smaller of two
    rows = {("SFT", "chat"): a, ("Instruct", "chat"): b, ("SFT", "raw"): a, ("Instruct", "raw"): b}
    [first, *_] = significance.compare_grid(rows, 0.05, 0.04)
    assert first["mcnemar_p"] < 0.05 < first["p_adjusted"]
    assert first["verdict"] == "not distinguishable"


@pytest.mark.parametrize(
    ("primary", "verdict_of_secondary"),
    [((5, 25), "better"), ((25, 5), "better"), ((10, 14), "not tested")],
)
def test_the_secondary_comparison_waits_for_the_primary(primary, verdict_of_secondary):
    """Both at alpha, whatever the first says, would make one of them significant in 7 % of runs."""
    only_a, only_b = primary
    base, sft = sides(0, only_a, only_b, 121 - only_a - only_b)
    raw_base, raw_sft = sides(30, 4, 16, 71)
    rows = {("base", "chat"): base, ("SFT", "chat"): sft}
    rows |= {("base", "raw"): raw_base, ("SFT", "raw"): raw_sft}
    first, second, *_ = significance.compare_grid(rows, 0.05, 0.04)
    assert second["mcnemar_p"] < 0.05
    assert second["verdict"] == verdict_of_secondary
    assert second["p_adjusted"] == max(first["mcnemar_p"], second["mcnemar_p"])


def test_one_of_the_named_comparisons_is_significant_by_chance_in_one_of_twenty_runs():
    draw, runs = np.random.default_rng(5), 20_000
    discordant = draw.binomial(541, 0.15, size=(2, runs))
    wins = draw.binomial(discordant, 0.5)
    primary, secondary = significance.mcnemar_p(discordant - wins, wins)
    assert np.mean(np.minimum(primary, secondary) < 0.05) > 0.06, "without the order"
    in_order = (primary < 0.05) | (np.maximum(primary, secondary) < 0.05)
    assert np.mean(in_order) <= 0.05


def test_parts_are_compared_apart():
    a, b = sides(both=2, only_a=3, only_b=4, neither=1)
    parts = {"lost": [2, 3, 4], "empty": [], "rest": [0, 1, 5, 6, 7, 8, 9]}
    found = significance.compare_parts(a, b, parts)
    assert [(row["part"], row["n"], row["net"]) for row in found] == [
        ("lost", 3, -3),
        ("rest", 7, 4),
    ]
    assert found[1]["won"] == [5, 6, 7, 8]


# --- what can be detected


@pytest.mark.parametrize("alpha", [0.05, 0.01, 0.0625])  # 0.0625 is p of 5 wins of 5: not below it
def test_wins_needed_by_trying_all(alpha):
    for discordant in range(1, 130):
        p = {wins: 2 * sum(comb(discordant, k) for k in range(wins, discordant + 1))
             / 2**discordant for wins in range(discordant // 2 + 1, discordant + 1)}  # fmt: skip
        enough = [wins for wins, value in p.items() if value < alpha]
        assert significance.wins_needed(discordant, alpha) == (enough or [discordant + 1])[0]


@pytest.mark.parametrize(("n", "discordant"), [(541, 0.1), (541, 0.25), (121, 0.15)])
def test_the_smallest_effect_has_80_percent_power_by_simulation(n, discordant):
    """100,000 experiments of that size, each with its own exact test."""
    effect = significance.smallest_effect(n, discordant, 0.05) / 100
    shares = [(discordant + effect) / 2, (discordant - effect) / 2, 1 - discordant]
    wins, losses, _ = np.random.default_rng(0).multinomial(n, shares, size=100_000).T
    p = 2 * stats.binom.cdf(losses, wins + losses, 0.5)  # where wins are more
    assert np.mean((wins > losses) & (p < 0.05)) == pytest.approx(0.8, abs=0.006)


def test_the_smallest_effect_of_ifeval():
    """In points, at 5 to 25 % of discordant prompts."""
    found = [significance.smallest_effect(541, d, 0.05) for d in significance.DISCORDANT]
    assert found == pytest.approx([2.8, 3.9, 4.8, 5.5, 6.2], abs=0.05)
    assert significance.smallest_effect(121, 0.05, 0.05) is None, "six wins of 121 are rare"
