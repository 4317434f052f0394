"""Statistics on verdicts of the same prompts: intervals, paired tests, sensitivity.

A verdict is {key, instruction_id_list, strict, loose, prompt_strict, prompt_loose}, as
`ifeval.score` returns it. The prompt is the sampling unit everywhere: the one to three instructions
of a prompt share one response, so they are never counted as independent.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ALPHA = 0.05
# A margin is clear if its 95 % interval lies above this share of the prompts: 20 of 541, about
# the smallest effect that IFEval's 541 show with 80 % power where a tenth of them are discordant.
CLEAR_SHARE = 20 / 541
POWER = 0.8
DISCORDANT = (0.05, 0.1, 0.15, 0.2, 0.25)  # shares for which the smallest effect is stated
IN_ORDER = ("primary", "secondary")
RESAMPLES, BLOCK = 10_000, 500  # a block of resamples at a time: 2 MB of draws, not 43

# (role, A, B), fixed before the responses are read. The named two are tested in this order.
PLAN = [
    ("primary", ("base", "chat"), ("SFT", "chat")),
    ("secondary", ("base", "raw"), ("SFT", "raw")),
    ("other", ("SFT", "chat"), ("Instruct", "chat")),
    ("other", ("base", "chat"), ("Instruct", "chat")),
    ("other", ("SFT", "raw"), ("Instruct", "raw")),
    ("other", ("base", "raw"), ("Instruct", "raw")),
    *(("other", (model, "raw"), (model, "chat")) for model in ("base", "SFT", "Instruct")),
]


def proportion_ci(passed: int, n: int) -> list[float]:
    """Wilson's 95 % interval of passed / n, as fractions."""
    from scipy.stats import binomtest

    return [float(bound) for bound in binomtest(passed, n).proportion_ci(method="wilson")]


def share_ci(passed: Sequence[int], sizes: Sequence[int]) -> list[float]:
    """95 % interval of sum(passed) / sum(sizes), as fractions: a bootstrap over prompts."""
    if sum(passed) in (0, sum(sizes)):  # resamples do not vary: Wilson, every prompt counted once
        return proportion_ci(len(passed) if sum(passed) else 0, len(passed))
    return bootstrap(passed, sizes)


def bootstrap(gains: Sequence, sizes: Sequence, resamples: int = RESAMPLES) -> list[float]:
    """95 % percentile interval of sum(gains) / sum(sizes) over prompts drawn with replacement."""
    from scipy import stats

    if len(gains) == 1:  # scipy wants two
        return [gains[0] / sizes[0]] * 2
    found = stats.bootstrap(
        (gains, sizes),
        lambda gains, sizes, axis: gains.sum(axis=axis) / sizes.sum(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=resamples,
        batch=BLOCK,
        rng=0,
    )
    return [float(bound) for bound in found.confidence_interval]


def mcnemar_p(only_a: "int | np.ndarray", only_b: "int | np.ndarray") -> "float | np.ndarray":
    """McNemar's exact two-sided p-value (H0: wins and losses are equally likely)."""
    import numpy as np
    from scipy.stats import binom

    return np.minimum(1.0, 2 * binom.cdf(np.minimum(only_a, only_b), only_a + only_b, 0.5))


def paired(verdicts_a: list[dict], verdicts_b: list[dict]) -> dict:
    """What B gains over A, strict: counts, exact McNemar p, points with ci95, types, keys.

    Differences are in points (percent) at prompt and instruction level, their intervals bootstraps
    over prompts. `by_type` counts instructions, `won` and `lost` list the discordant prompts' keys.
    Raises ValueError if the two are not of the same prompts.
    """
    a, b = ([(v["key"], v["instruction_id_list"]) for v in s] for s in (verdicts_a, verdicts_b))
    if a != b:
        raise ValueError(
            "the verdicts are not of the same prompts in the same order: score both again with "
            "the same --prompts"
        )
    both = list(zip(verdicts_a, verdicts_b, strict=True))
    counts = _tally((a["prompt_strict"], b["prompt_strict"]) for a, b in both)
    gains = [b["prompt_strict"] - a["prompt_strict"] for a, b in both]
    inst_gains = [sum(b["strict"]) - sum(a["strict"]) for a, b in both]
    sizes = [len(a["strict"]) for a, _ in both]
    return {
        **counts,
        "net": counts["only_b"] - counts["only_a"],
        "mcnemar_p": float(mcnemar_p(counts["only_a"], counts["only_b"])),
        "difference_points": 100 * sum(gains) / len(both),
        "difference_ci95": [100 * x for x in bootstrap(gains, [1] * len(both))],
        "inst_difference_points": 100 * sum(inst_gains) / sum(sizes),
        "inst_difference_ci95": [100 * x for x in bootstrap(inst_gains, sizes)],
        "by_type": _by_type(both),
        "won": [a["key"] for (a, _), gain in zip(both, gains, strict=True) if gain > 0],
        "lost": [a["key"] for (a, _), gain in zip(both, gains, strict=True) if gain < 0],
    }


def _tally(pairs: Iterable[tuple[bool, bool]]) -> dict[str, int]:
    """How many (A passed, B passed) there are of each kind."""
    counts = Counter(pairs)
    names = {(1, 1): "both", (1, 0): "only_a", (0, 1): "only_b", (0, 0): "neither"}
    return {name: counts[pair] for pair, name in names.items()}


def _by_type(both: list[tuple[dict, dict]]) -> dict[str, dict[str, int]]:
    """{instruction id: tally of the instructions of that type}."""
    pairs = defaultdict(list)
    for a, b in both:
        for name, *pair in zip(a["instruction_id_list"], a["strict"], b["strict"], strict=True):
            pairs[name].append(tuple(pair))
    return {name: _tally(pairs[name]) for name in sorted(pairs)}


def holm(p_values: dict[Hashable, float]) -> dict[Hashable, float]:
    """Holm's adjusted p of every hypothesis, in the given order; scipy has no such function."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def verdict(found: dict, p: float, alpha: float, clear_share: float) -> str:
    """The outcome of `paired` in words.

    A margin is clear if the lower bound of the difference's 95 % interval is above `clear_share` of
    the prompts: more than significance needs, for every number of prompts.
    """
    if p >= alpha or not found["net"]:
        return "not distinguishable"
    if found["net"] < 0:
        return "worse"
    return "clear margin" if found["difference_ci95"][0] > 100 * clear_share else "better"


def wins_needed(discordant, alpha: float):
    """Fewest wins among `discordant` prompts (a number or an array) for p < alpha."""
    from scipy.stats import binom

    return binom.isf(alpha / 2 * (1 - 1e-12), discordant, 0.5) + 1  # p < alpha, not p <= alpha


def power(n: int, win_share: float, loss_share: float, alpha: float) -> float:
    """Power of McNemar's exact test with n prompts, computed exactly."""
    import numpy as np
    from scipy.stats import binom

    share = win_share + loss_share
    few, many = binom.ppf([1e-9, 1 - 1e-9], n, share)  # other numbers of discordant: never
    discordant = np.arange(max(few, 1), many + 1)
    found = binom.sf(wins_needed(discordant, alpha) - 1, discordant, win_share / share)
    return float(binom.pmf(discordant, n, share) @ found)


def smallest_effect(n: int, discordant: float, alpha: float) -> float | None:
    """Smallest difference in points that n prompts detect with 80 % power, computed exactly.

    `discordant`: the share of prompts on which the two models differ. None: no difference is large
    enough.
    """
    from scipy.optimize import brentq

    def surplus(effect: float) -> float:
        return power(n, (discordant + effect) / 2, (discordant - effect) / 2, alpha) - POWER

    if not discordant or surplus(discordant) < 0:
        return None
    return 100 * brentq(surplus, 0, discordant, xtol=1e-5)


def compare_grid(
    verdicts: dict[tuple[str, str], list[dict]],
    alpha: float,
    clear_share: float,
    plan: list[tuple[str, tuple[str, str], tuple[str, str]]] = PLAN,
) -> list[dict]:
    """{comparison, a, b, role, **paired, p_adjusted, verdict} of every planned pair that exists.

    The named comparisons are a fixed sequence: the secondary one is tested at the same alpha, and
    only if the primary one is significant. The others are adjusted together (Holm).
    """
    planned = [(role, a, b) for role, a, b in plan if a in verdicts and b in verdicts]
    rows = [
        {"comparison": f"{' '.join(b)} against {' '.join(a)}", "a": list(a), "b": list(b)}
        | {"role": role, **paired(verdicts[a], verdicts[b])}
        for role, a, b in planned
    ]
    named = [row for row in rows if row["role"] in IN_ORDER]
    others = [row for row in rows if row["role"] not in IN_ORDER]
    in_order = itertools.accumulate((row["mcnemar_p"] for row in named), max)
    together = holm({place: row["mcnemar_p"] for place, row in enumerate(others)}).values()
    for row, p in zip(named + others, [*in_order, *together], strict=True):
        row["p_adjusted"] = p
        row["verdict"] = verdict(row, p, alpha, clear_share)
    if len(named) > 1 and named[0]["mcnemar_p"] >= alpha:
        named[1]["verdict"] = "not tested"
    return rows


def compare_parts(a: list[dict], b: list[dict], parts: dict[str, list[int]]) -> list[dict]:
    """{part, n, **paired} of B against A on each part of the prompts that is not empty."""
    return [
        {"part": name, "n": len(chosen), **paired([a[i] for i in chosen], [b[i] for i in chosen])}
        for name, chosen in parts.items()
        if chosen
    ]
