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


def type_table(by_type: dict[str, dict[str, int]]) -> pd.DataFrame:
    """Instructions won, lost, passed by both and by neither, a row per type, best net first."""
    frame = pd.DataFrame(by_type).T.rename(columns=SIDES)
    frame = frame[["won", "lost", "both", "neither"]].assign(net=frame["won"] - frame["lost"])
    return frame.sort_values("net", ascending=False)


def beside_ours(known: list[dict], metrics: list[dict]) -> list[dict]:
    """Published figures beside ours; where agreement is expected, whether ours includes them."""
    measured = {(row["model"], row["format"]): row for row in metrics}
    rows = []
    for row in known:
        ours = measured.get((row["model"], row["format"]))
        shown = {"ours": f"{ours['prompt_level_strict_acc']:.4f}" if ours else "not run"}
        if ours and row["should_agree"]:
            low, high = ours["ci95"]
            shown["agrees"] = "yes" if low <= row["value"] <= high else "no"
        rows.append(row | {"agrees": "-"} | shown)
    return rows


def comparison_text(found: dict) -> str:
    """One comparison as lines of text."""
    sensitivity = found["sensitivity"]
    lines = [
        f"{found['n']} prompts: both {found['both']}, only A {found['only_a']}, "
        f"only B {found['only_b']}, neither {found['neither']}",
        f"prompt level, strict:      {in_points(found)}",
        f"instruction level, strict: {in_points(found, 'inst_difference')}",
        type_table(found["by_type"]).to_string(),
        f"won: {found['won']}",
        f"lost: {found['lost']}",
        f"net win needed among as many discordant prompts: {sensitivity['net_needed']}",
        f"prompts needed to detect this effect with 80 % power: {sensitivity['prompts_needed']}",
        f"B against A: {found['verdict']} (net {found['net']:+d}, exact McNemar "
        f"p = {found['mcnemar_p']:.3g}, alpha {found['alpha']:g})",
    ]
    return "\n".join(lines)
