"""The test over prompts and seeds: against hand-made tables, its two limits, and its size."""

import numpy as np
import pytest
from checks import ROOT
from ifeval_cases import verdict
from scipy import stats

from atlas_lib import artifacts
from atlas_lib.evaluate import seeds, significance
from benchmarks.seeds import ALPHA, simulate


def outcomes(won: int, lost: int, n: int = 541, start: int = 0) -> np.ndarray:
    """Gains on n prompts, the discordant ones from `start` on."""
    row = np.array([1] * won + [-1] * lost + [0] * (n - won - lost))
    return np.roll(row, start)


def test_a_table_computed_by_hand():
    gains = np.array([[1, 0, 0, 1], [1, 0, -1, 0]])
    # means of seeds 1/2 and 0, of prompts 1, 0, -1/2 and 1/2
    by_seed, by_prompt = (1 / 8) / 2, (1.25 / 3) / 4
    error, share = (by_seed + by_prompt) ** 0.5, by_seed / (by_seed + by_prompt)
    assert share == pytest.approx(0.375)
    critical = 0.375 * 12.7062 + 0.625 * 3.18245  # t of 1 and of 3 degrees of freedom, 5 %
    found = seeds.two_way_test(gains, 0.05)
    assert found["mean"] == 0.25
    assert found["interval"] == pytest.approx(
        [0.25 - error * critical, 0.25 + error * critical], rel=1e-5
    )
    assert seeds.critical_value(share, 2, 4, found["p"]) == pytest.approx(0.25 / error)


def test_equal_seeds_leave_the_test_over_prompts():
    gains = np.array([outcomes(63, 9, 121)] * 3)
    found, expected = seeds.two_way_test(gains, 0.05), stats.ttest_1samp(gains[0], 0)
    assert found["p"] == pytest.approx(expected.pvalue, rel=1e-9)
    assert found["interval"] == pytest.approx(list(expected.confidence_interval(0.95)))


def test_prompts_that_all_agree_leave_the_test_over_seeds():
    gains = np.array([[1] * 50, [0] * 50, [1] * 50, [1] * 50])
    found = seeds.two_way_test(gains, 0.05)
    assert found["p"] == pytest.approx(stats.ttest_1samp(gains[:, 0], 0).pvalue, rel=1e-9)


def test_noise_between_seeds_alone_is_no_gain_of_the_recipe():
    gains = np.array([outcomes(62, 20), outcomes(40, 38, start=90), outcomes(36, 42, start=200)])
    assert significance.mcnemar_p(20, 62) < 0.001  # the first seed's adapter is better
    assert stats.ttest_1samp(gains.mean(axis=0), 0).pvalue < 0.05  # so are these three adapters
    assert seeds.two_way_test(gains, 0.05)["p"] > 0.2


@pytest.mark.parametrize("k", [2, 3, 4, 6])
@pytest.mark.parametrize("shift", [0.0, 0.001, 0.3, 3.0, 1e4])
def test_p_agrees_with_the_interval_at_every_level(k, shift):
    gains = np.random.default_rng(k).normal(shift, 1, (k, 40))
    p = seeds.two_way_test(gains, 0.05)["p"]
    low, high = seeds.two_way_test(gains, p)["interval"]
    assert min(abs(low), abs(high)) <= 1e-6 * max(abs(low), abs(high))


def test_a_gain_of_every_seed_is_found():
    gains = np.array([outcomes(62, 20), outcomes(60, 21, start=90), outcomes(58, 22, start=9)])
    found = seeds.two_way_test(gains, 0.05)
    assert found["p"] < 0.01
    assert found["interval"][0] > 0


@pytest.mark.parametrize(("gain", "p"), [(0, 1.0), (1, 0.0), (-1, 0.0)])
def test_gains_without_any_variance(gain, p):
    found = seeds.two_way_test(np.full((3, 5), gain), 0.05)
    assert found == {"mean": gain, "interval": [gain, gain], "p": p}


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("seed_sd", [0.0, 0.03])
def test_seeds_without_a_gain_are_rarely_significant(k, seed_sd):
    simulations = 400
    rng = np.random.default_rng(k)
    found = simulate(541, k, 0.15, 0.0, seed_sd, 0.5, simulations, rng)
    noise = (ALPHA * (1 - ALPHA) / simulations) ** 0.5
    assert found["two_way"] <= ALPHA + 2 * noise
    if seed_sd:
        assert found["one_seed"] > 0.2  # one adapter does differ, which is another question


def test_no_published_setting_rejects_too_often():
    found = artifacts.read_json(ROOT / "results" / "seeds.json")
    assert max(found["largest_size_by_seeds"]["two_way"].values()) <= found["within_noise"]
    assert len([row for row in found["rows"] if row["effect"] == 0]) == 144


def write_scores(out, base: list[int], sft: list[int]):
    for name, passed in (("base", base), ("SFT", sft)):
        rows = [verdict(key, bool(ok)) for key, ok in enumerate(passed)]
        artifacts.write_jsonl(out / "04_ifeval_eval" / "scores" / f"{name}-chat.jsonl", rows)
    return out


def test_the_scores_of_all_seeds_are_one_table(tmp_path):
    base = [1, 0, 0, 0]
    second = write_scores(tmp_path / "b", base, [0, 1, 0, 0])
    runs = {42: write_scores(tmp_path / "a", base, [1, 1, 1, 0]), 1: second}
    found = seeds.compare_seeds(runs, "chat", 0.05)
    gains = np.array([[0, 1, 1, 0], [-1, 1, 0, 0]])
    assert found["p"] == seeds.two_way_test(gains, 0.05)["p"]
    assert found["verdict"] == "not distinguishable"
    assert [row["SFT"] for row in found["seeds"]] == [0.75, 0.25]
    assert [(row["won"], row["lost"]) for row in found["seeds"]] == [(2, 0), (1, 1)]
    assert (found["mean_SFT"], found["difference_points"]) == (0.5, 25.0)
    text = seeds.seeds_text(found).split("\n")
    assert text[2].split() == ["42", "0.250", "0.750", "2", "0", "+50.0", "0.5"]
    assert text[4].split()[:3] == ["mean", "0.500", "+25.0"]


@pytest.mark.parametrize(
    ("runs", "n", "words"), [(1, 4, "not tested: one seed"), (2, 1, "not tested: one prompt")]
)
def test_too_little_to_test_is_said(runs, n, words, tmp_path):
    out = {seed: write_scores(tmp_path / str(seed), [0] * n, [1] * n) for seed in range(runs)}
    found = seeds.compare_seeds(out, "chat", 0.05)
    assert found["verdict"] == words
    assert "p" not in found
    assert seeds.seeds_text(found).endswith(words)


@pytest.mark.parametrize(("sft", "word"), [(1, "better"), (0, "worse")])
def test_the_verdict_names_the_direction(sft, word, tmp_path):
    base, changed = [1 - sft] * 30, [sft] * 29 + [1 - sft]
    runs = {seed: write_scores(tmp_path / str(seed), base, changed) for seed in (1, 2)}
    assert seeds.compare_seeds(runs, "chat", 0.05)["verdict"] == word
