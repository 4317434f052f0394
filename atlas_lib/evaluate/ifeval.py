"""IFEval: verdicts on responses and their summary."""

import itertools
from collections import Counter

from atlas_lib.evaluate import decoding, significance
from atlas_lib.evaluate.checkers import MODES, score

__all__ = ["grid_metrics", "score", "summarise"]


def summarise(verdicts: list[dict]) -> dict:
    """n, four accuracies as fractions with 95 % intervals, counts, by_type {id: [passed, n]}.

    Intervals are Wilson's for prompts, a bootstrap over prompts for instructions. `ci95` and
    `inst_ci95` are those of the strict accuracies, `intervals` has all four.
    """
    total, passed = Counter(), Counter()
    for v in verdicts:
        total.update(v["instruction_id_list"])
        passed.update(itertools.compress(v["instruction_id_list"], v["strict"]))
    n, sizes = len(verdicts), [len(v["instruction_id_list"]) for v in verdicts]
    found, intervals, counts = {}, {}, {"instructions": sum(sizes)}
    for mode in MODES:
        prompts = sum(v[f"prompt_{mode}"] for v in verdicts)
        instructions = [sum(v[mode]) for v in verdicts]
        counts |= {f"prompt_{mode}": prompts, f"inst_{mode}": sum(instructions)}
        found[f"prompt_level_{mode}_acc"] = prompts / n
        found[f"inst_level_{mode}_acc"] = sum(instructions) / sum(sizes)
        intervals[f"prompt_level_{mode}_acc"] = significance.proportion_ci(prompts, n)
        intervals[f"inst_level_{mode}_acc"] = significance.share_ci(instructions, sizes)
    return {
        "n": n,
        **found,
        "counts": counts,
        "ci95": intervals["prompt_level_strict_acc"],
        "inst_ci95": intervals["inst_level_strict_acc"],
        "intervals": intervals,
        "by_type": {name: [passed[name], total[name]] for name in sorted(total)},
    }


def grid_metrics(
    responses: dict[tuple[str, str], list[dict]],
    verdicts: dict[tuple[str, str], list[dict]],
    eos_token: str,
    subset: list[int] | None = None,
) -> list[dict]:
    """One row per (model, format): its summary and diagnostics, over the prompts of `subset`."""
    rows = []
    for name, prompt_format in responses:
        given, scored = responses[name, prompt_format], verdicts[name, prompt_format]
        chosen = range(len(given)) if subset is None else subset
        row = {"model": name, "format": prompt_format, **summarise([scored[i] for i in chosen])}
        rows.append(row | decoding.diagnose([given[i] for i in chosen], eos_token))
    return rows
