"""What verdicts on the same prompts allow to conclude: intervals, paired tests, sensitivity.

A verdict is {key, instruction_id_list, strict, loose, prompt_strict, prompt_loose}, as
`ifeval.score` returns it. Prompts are the unit of chance everywhere: the one to three instructions
of a prompt share one answer, so they are never counted as independent.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable

ALPHA = 0.05
CLEAR_SHARE = 20 / 541  # the net win that is significant among as many as 80 discordant prompts
POWER = 0.8
RESAMPLES, BLOCK = 10_000, 500  # a block of resamples at a time: 2 MB of draws, not 43

# (role, A, B): fixed before anybody looks, so that one comparison needs no correction
PLAN = [
    ("primary", ("base", "chat"), ("SFT", "chat")),
    ("secondary", ("base", "raw"), ("SFT", "raw")),
    *(
        ("other", (model, form), ("Instruct", form))
        for form in ("chat", "raw")
        for model in ("SFT", "base")
    ),
    *(("other", (model, "raw"), (model, "chat")) for model in ("base", "SFT", "Instruct")),
]


def proportion_ci(passed: int, n: int) -> list[float]:
    """Wilson's 95 % interval of passed / n, as fractions."""
    from scipy.stats import binomtest

    if not 0 <= passed <= n or n == 0:
        raise ValueError(f"{passed} of {n} is no proportion: need 0 <= passed <= n and n > 0")
    return [float(bound) for bound in binomtest(passed, n).proportion_ci(method="wilson")]


def instruction_ci(verdicts: list[dict], mode: str, resamples: int = RESAMPLES) -> list[float]:
    """95 % interval of the instruction-level accuracy, as fractions: bootstrap over prompts."""
    passed = [sum(v[mode]) for v in verdicts]
    sizes = [len(v[mode]) for v in verdicts]
    if sum(passed) in (0, sum(sizes)):  # resamples never vary: Wilson, every prompt counted once
        return proportion_ci(len(verdicts) if sum(passed) else 0, len(verdicts))
    return bootstrap(passed, sizes, resamples)


def bootstrap(gains: list[int], sizes: list[int], resamples: int) -> list[float]:
    """95 % percentile interval of sum(gains) / sum(sizes) over prompts drawn with replacement."""
    import numpy as np

    generator, (gains, sizes), n = np.random.default_rng(0), np.array([gains, sizes]), len(gains)
    blocks = [min(BLOCK, resamples - first) for first in range(0, resamples, BLOCK)]
    drawn = (generator.integers(n, size=(rows, n)) for rows in blocks)
    ratios = [gains[rows].sum(axis=1) / sizes[rows].sum(axis=1) for rows in drawn]
    return np.quantile(np.concatenate(ratios), [0.025, 0.975]).tolist()


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Exact two-sided p that wins and losses are coin flips; 1 where there are none."""
    from scipy.stats import binomtest

    return float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired(verdicts_a: list[dict], verdicts_b: list[dict], resamples: int = RESAMPLES) -> dict:
    """What B gains over A, strict: counts, exact McNemar p, points with ci95, types, keys.

    Differences are in points (percent) at prompt and instruction level, their intervals bootstraps
    over prompts. `by_type` counts instructions, `won` and `lost` list the discordant prompts' keys.
    """
    _require_same_prompts(verdicts_a, verdicts_b)
    both = list(zip(verdicts_a, verdicts_b, strict=True))
    tally = _tally((a["prompt_strict"], b["prompt_strict"]) for a, b in both)
    gains = [int(b["prompt_strict"]) - int(a["prompt_strict"]) for a, b in both]
    return {
        **tally,
        "net": tally["only_b"] - tally["only_a"],
        "mcnemar_p": mcnemar_p(tally["only_a"], tally["only_b"]),
        **_difference("difference", gains, [1] * len(both), resamples),
        **_difference(
            "inst_difference",
            [sum(b["strict"]) - sum(a["strict"]) for a, b in both],
            [len(a["strict"]) for a, _ in both],
            resamples,
        ),
        "by_type": _by_type(both),
        "won": [a["key"] for (a, _), gain in zip(both, gains, strict=True) if gain > 0],
        "lost": [a["key"] for (a, _), gain in zip(both, gains, strict=True) if gain < 0],
    }


def _require_same_prompts(*sides: list[dict]) -> None:
    a, b = ([(v["key"], v["instruction_id_list"]) for v in side] for side in sides)
    if a and a == b:
        return
    row = next((row for row, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    where = f"{len(a)} and {len(b)} rows"
    if row is not None:
        where = f"row {row + 1} is key {a[row][0]} {a[row][1]} and key {b[row][0]} {b[row][1]}"
    raise ValueError(
        f"the verdicts are not of the same prompts in the same order ({where}): score both again"
    )


def _tally(pairs: Iterable[tuple[bool, bool]]) -> dict[str, int]:
    """How many (A passed, B passed) there are of each kind."""
    counts = Counter(pairs)
    names = {(1, 1): "both", (1, 0): "only_a", (0, 1): "only_b", (0, 0): "neither"}
    return {name: counts[pair] for pair, name in names.items()}


def _difference(name: str, gains: list[int], sizes: list[int], resamples: int) -> dict:
    """Points gained and their 95 % interval."""
    return {
        f"{name}_points": 100 * sum(gains) / sum(sizes),
        f"{name}_ci95": [100 * bound for bound in bootstrap(gains, sizes, resamples)],
    }


def _by_type(both: list[tuple[dict, dict]]) -> dict[str, dict[str, int]]:
    """{instruction id: tally of the instructions of that type}."""
    pairs = defaultdict(list)
    for a, b in both:
        for name, *pair in zip(a["instruction_id_list"], a["strict"], b["strict"], strict=True):
            pairs[name].append(tuple(pair))
    return {name: _tally(pairs[name]) for name in sorted(pairs)}


def holm(p_values: dict[Hashable, float]) -> dict[Hashable, float]:
    """Holm's adjusted p of every hypothesis, in the given order."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.get)):
        if not 0 <= p_values[name] <= 1:
            raise ValueError(f"the p-value of {name!r} is {p_values[name]}: it must be 0 to 1")
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def verdict(
    paired: dict,
    n: int,
    alpha: float = ALPHA,
    clear_share: float = CLEAR_SHARE,
    p_adjusted: float | None = None,
) -> str:
    """In words, from McNemar's p or an adjusted one; clear means a net win of clear_share * n."""
    p = paired["mcnemar_p"] if p_adjusted is None else p_adjusted
    if p >= alpha or not paired["net"]:
        return "not distinguishable"
    if paired["net"] < 0:
        return "worse"
    enough = paired["net"] >= clear_share * n - 1e-9  # 0.037 * 1000 is 36.99...
    return "clear margin" if enough else "better, but small"


def wins_needed(discordant, alpha: float):
    """Fewest wins of so many discordant prompts (a number or an array) with McNemar's p < alpha."""
    from scipy.stats import binom

    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}: it must lie between 0 and 1")
    return binom.isf(alpha / 2 * (1 - 1e-12), discordant, 0.5) + 1  # p < alpha, not p <= alpha


def power(n: int, win_share: float, loss_share: float, alpha: float = ALPHA) -> float:
    """Chance that n prompts show the winner by McNemar's exact test; exact over all outcomes."""
    import numpy as np
    from scipy.stats import binom

    share = win_share + loss_share
    few, many = binom.ppf([1e-9, 1 - 1e-9], n, share)  # other numbers of discordant: never
    discordant = np.arange(max(few, 1), many + 1)
    found = binom.sf(wins_needed(discordant, alpha) - 1, discordant, win_share / share)
    return float(binom.pmf(discordant, n, share) @ found)


def sensitivity(paired: dict, n: int, alpha: float = ALPHA) -> dict:
    """What this comparison could have seen, and what it would take to see an effect of its size.

    `net_needed`: the smallest net win that is significant among as many discordant prompts (None:
    none is). `prompts_needed`: for the observed shares of wins and losses to be found with 80 %
    power, exactly computed (None: there is no net to find).
    """
    discordant = paired["only_a"] + paired["only_b"]
    wins = int(wins_needed(discordant, alpha)) if discordant else 1
    return {
        "net_needed": 2 * wins - discordant if wins <= discordant else None,
        "prompts_needed": _prompts_needed(paired, n, alpha) if paired["net"] else None,
        "power": POWER,
    }


def _prompts_needed(paired: dict, n: int, alpha: float) -> int:
    wins, losses = sorted((paired["only_a"], paired["only_b"]), reverse=True)
    few, many = 0, 8
    while power(many, wins / n, losses / n, alpha) < POWER:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        enough = power(middle, wins / n, losses / n, alpha) >= POWER
        few, many = (few, middle) if enough else (middle, many)
    return many


def comparisons(
    verdicts: dict[tuple[str, str], list[dict]],
    alpha: float = ALPHA,
    clear_share: float = CLEAR_SHARE,
) -> list[dict]:
    """One {a, b, role, **paired, p_adjusted, verdict} for every planned pair that is there.

    The primary and the secondary comparison keep their p; the others are adjusted together (Holm).
    """
    rows = [
        {"a": list(a), "b": list(b), "role": role} | paired(verdicts[a], verdicts[b])
        for role, a, b in PLAN
        if a in verdicts and b in verdicts
    ]
    adjusted = holm({i: row["mcnemar_p"] for i, row in enumerate(rows) if row["role"] == "other"})
    for position, row in enumerate(rows):
        row["p_adjusted"] = adjusted.get(position, row["mcnemar_p"])
        n = len(verdicts[tuple(row["a"])])
        row["verdict"] = verdict(row, n, alpha, clear_share, row["p_adjusted"])
    return rows


def in_points(row: dict) -> str:
    """A comparison's difference and interval, to be read."""
    low, high = row["difference_ci95"]
    return f"{row['difference_points']:+.1f} points ({low:+.1f} to {high:+.1f})"
