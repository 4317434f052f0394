"""IFEval: verdicts on responses, their summary, and the commands that score and compare files.

python -m atlas_lib.ifeval score --prompts P.jsonl --responses R.jsonl --out scores/sft
python -m atlas_lib.ifeval compare scores/base scores/sft
"""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from atlas_lib import artifacts, notebooks, sources
from atlas_lib.evaluate import decoding, ifeval_files, significance, tables
from atlas_lib.evaluate.checkers import MODES, ensure_punkt, followed


def score(
    prompts: list[dict],
    responses: list[str],
    check: Callable[[dict, str], dict[str, list[bool]]] = followed,
) -> list[dict]:
    """Verdicts {key, instruction_id_list, strict, loose, prompt_strict, prompt_loose}, in order."""
    verdicts = []
    for prompt, response in zip(prompts, responses, strict=True):
        passed = check(prompt, response)
        whole = {f"prompt_{mode}": all(passed[mode]) for mode in MODES}
        verdicts.append({k: prompt[k] for k in ("key", "instruction_id_list")} | passed | whole)
    return verdicts


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


def _score_command(args: argparse.Namespace) -> None:
    prompts = ifeval_files.load_prompts(args.prompts)
    verdicts = score(prompts, ifeval_files.load_responses(args.responses, prompts))
    summary = summarise(verdicts) | {
        "prompts": Path(args.prompts).name,
        "responses": f"{args.responses.name} sha256 {sources.sha256(args.responses)}",
    }
    if args.out:
        artifacts.write_jsonl(args.out / ifeval_files.VERDICTS_NAME, verdicts)
        artifacts.write_json(args.out / "summary.json", summary)
    print(tables.score_table([summary]).to_string(header=False))


def _compare_command(args: argparse.Namespace) -> None:
    a, b = ifeval_files.load_verdicts(args.a), ifeval_files.load_verdicts(args.b)
    found = {"a": args.a.name, "b": args.b.name, "n": len(a), **significance.paired(a, b)}
    limits = {"alpha": significance.ALPHA, "clear_share": significance.CLEAR_SHARE}
    found |= limits | {"sensitivity": significance.sensitivity(found, len(a), limits["alpha"])}
    found["verdict"] = significance.verdict(found["net"], len(a), found["mcnemar_p"], **limits)
    if args.json:
        artifacts.write_json(args.json, found)
    print(notebooks.printable(tables.comparison_text(found)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m atlas_lib.ifeval")
    commands = parser.add_subparsers(required=True)
    punkt = commands.add_parser("punkt", help="find or fetch nltk's English punkt_tab files")
    punkt.set_defaults(run=lambda args: print(f"punkt_tab: {ensure_punkt()}"))
    scoring = commands.add_parser("score", help="score a file of responses")
    scoring.add_argument("--prompts", required=True, help=".jsonl in IFEval's schema")
    scoring.add_argument("--responses", required=True, type=Path, help="{prompt, response} a line")
    scoring.add_argument("--out", type=Path, help="folder for verdicts.jsonl and summary.json")
    scoring.set_defaults(run=_score_command)
    comparing = commands.add_parser("compare", help="test B against A on the same prompts")
    comparing.add_argument("a", type=Path, help="verdicts.jsonl of the baseline, or its folder")
    comparing.add_argument("b", type=Path)
    comparing.add_argument("--json", type=Path, help="write the whole report to this file as well")
    comparing.set_defaults(run=_compare_command)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        sys.exit("error: " + notebooks.printable(str(error).replace("\n", " ")))
