"""Results of an evaluation as tables: for notebook 04 and for the commands of atlas_lib.ifeval."""

import pandas as pd

DIAGNOSTICS = ("at_cap", "eos_rate", "repetition", "empty", "mean_length", "distinct")
SIDES = {"only_b": "won", "only_a": "lost"}


def score_table(metrics: list[dict]) -> pd.DataFrame:
    """Accuracies with 95 % intervals, and diagnostics; a column per model and prompt format."""
    columns = {}
    for row in metrics:
        shown = {"prompts": row["n"], "instructions": row["counts"]["instructions"]}
        for name, (low, high) in row["intervals"].items():
            shown[name] = f"{row[name]:.4f} ({low:.3f} to {high:.3f})"
        shown |= {name: f"{row[name]:.4g}" for name in DIAGNOSTICS if name in row}
        columns[row.get("model"), row.get("format")] = shown
    return pd.DataFrame(columns)


def in_points(row: dict, name: str = "difference") -> str:
    """A comparison's difference with its 95 % interval, in percentage points."""
    low, high = row[f"{name}_ci95"]
    return f"{row[f'{name}_points']:+.2f} points ({low:+.2f} to {high:+.2f})"


def comparison_table(compared: list[dict]) -> pd.DataFrame:
    """Paired comparisons: difference, prompts won and lost, p and verdict, one row each."""
    frame = pd.DataFrame(compared).drop(columns=["won", "lost"]).rename(columns=SIDES)
    frame["difference"] = [in_points(row) for row in compared]
    frame["p"] = [f"{row['p_adjusted']:.2g}" for row in compared]
    columns = ["role", "difference", "won", "lost", "both", "neither", "p", "verdict"]
    return frame.set_index("comparison")[columns]


def part_table(parts: list[dict]) -> pd.DataFrame:
    """The comparison on parts of the prompts: how many A and B pass, won and lost, p."""
    frame = (
        pd.DataFrame(parts).drop(columns=["won", "lost"]).rename(columns=SIDES | {"n": "prompts"})
    )
    frame["before"], frame["after"] = (frame["both"] + frame[side] for side in ("lost", "won"))
    frame["p"] = [f"{row['mcnemar_p']:.2g}" for row in parts]
    return frame.set_index("part")[["prompts", "before", "after", "won", "lost", "p"]]


def verdict_line(row: dict) -> str:
    """A comparison in a sentence, and what it is about."""
    n = sum(row[name] for name in ("both", "only_a", "only_b", "neither"))
    return (
        f"{row['comparison']}: {row['verdict']}. {in_points(row)} of prompt-level strict accuracy "
        f"on {n} prompts, {row['only_b']} won, {row['only_a']} lost, p = {row['p_adjusted']:.2g}. "
        "The test is about this one adapter; another seed gives another."
    )


def type_table(by_type: dict[str, dict[str, int]]) -> pd.DataFrame:
    """Instructions won, lost, passed by both and by neither, a row per type, best net first."""
    frame = pd.DataFrame(by_type).T.rename(columns=SIDES)
    frame = frame[["won", "lost", "both", "neither"]].assign(net=frame["won"] - frame["lost"])
    return frame.sort_values("net", ascending=False)


def beside_ours(known: list[dict], metrics: list[dict]) -> list[dict]:
    """Published figures beside ours; `apart` is how many prompts or instructions lie between."""
    measured = {(row["model"], row["format"]): row for row in metrics}
    rows = []
    for row in known:
        ours = measured.get((row["model"], row["format"]), {})
        shown = {"ours": "not run" if not ours else "not measured", "apart": "-"}
        if row["metric"] in ours:
            value, whole = ours[row["metric"]], row["metric"].startswith("prompt")
            of = ours["n"] if whole else ours["counts"]["instructions"]
            unit = "prompts" if whole else "instructions"
            apart = f"{round((value - row['value']) * of):+d} of {of} {unit}"
            shown = {"ours": f"{value:.4f}", "apart": apart}
        rows.append(row | shown)
    return rows


def comparison_text(found: dict) -> str:
    """One comparison as lines of text."""
    smallest = found["smallest_effect_points"]
    lines = [
        f"{found['n']} prompts: both {found['both']}, only A {found['only_a']}, "
        f"only B {found['only_b']}, neither {found['neither']}",
        f"prompt level, strict:      {in_points(found)}",
        f"instruction level, strict: {in_points(found, 'inst_difference')}",
        type_table(found["by_type"]).to_string(),
        f"won: {found['won']}",
        f"lost: {found['lost']}",
        "smallest effect that is found with 80 % power among as many discordant prompts: "
        + (f"{smallest:.1f} points" if smallest else "none"),
        f"B against A: {found['verdict']} (net {found['net']:+d}, exact McNemar "
        f"p = {found['mcnemar_p']:.3g}, alpha {found['alpha']:g})",
    ]
    return "\n".join(lines)
