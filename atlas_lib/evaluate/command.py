"""The commands that score responses and compare models or files of verdicts.

python -m atlas_lib.ifeval score --prompts P.jsonl --responses R.jsonl --out scores/sft
python -m atlas_lib.ifeval compare scores/base scores/sft
python -m atlas_lib.ifeval compare Qwen/Qwen2.5-0.5B me/my-adapter --format chat
"""

import argparse
import sys
import tempfile
from pathlib import Path

from atlas_lib import artifacts, devices, notebooks, session, sources
from atlas_lib.config import load_config, parse_assignments
from atlas_lib.evaluate import (
    adapter_check,
    benchmarks,
    checkers,
    grid,
    ifeval,
    ifeval_files,
    significance,
    tables,
)
from atlas_lib.schema import Config


def score_file(args: argparse.Namespace) -> None:
    """The command `score`."""
    prompts = ifeval_files.load_prompts(args.prompts)
    responses = ifeval_files.load_responses(args.responses, prompts)
    verdicts = checkers.score(prompts, responses)
    summary = ifeval.summarise(verdicts) | {
        "prompts": Path(args.prompts).name,
        "responses": f"{args.responses.name} sha256 {sources.sha256(args.responses)}",
    }
    if args.out:
        artifacts.write_jsonl(args.out / ifeval_files.VERDICTS_NAME, verdicts)
        artifacts.write_json(args.out / "summary.json", summary)
    print(tables.score_table([summary]).to_string(header=False))


def compare_sides(args: argparse.Namespace) -> None:
    """The command `compare`."""
    a, b = (verdicts_of(side, args) for side in (args.a, args.b))
    found = {"a": Path(args.a).name, "b": Path(args.b).name, "n": len(a)}
    found |= significance.paired(a, b)
    limits = {"alpha": significance.ALPHA, "clear_share": significance.CLEAR_SHARE}
    discordant = (found["only_a"] + found["only_b"]) / len(a)
    smallest = significance.smallest_effect(len(a), discordant, significance.ALPHA)
    found |= limits | {"smallest_effect_points": smallest}
    found["verdict"] = significance.verdict(found, found["mcnemar_p"], **limits)
    if args.json:
        artifacts.write_json(args.json, found)
    if args.plot:
        plot_intervals(found, args.plot)
    print(notebooks.printable(tables.comparison_text(found)))


def verdicts_of(side: str, args: argparse.Namespace) -> list[dict]:
    """Verdicts from a file, a folder that `score` wrote or a log of lm-eval, else of a model.

    A model's responses to `eval.prompts` are stored in OUT, where notebook 04 finds them as well.
    Raises ValueError.
    """
    path = Path(side)
    if path.is_file() or (path / ifeval_files.VERDICTS_NAME).is_file():
        return ifeval_files.load_verdicts(path)
    given = load_config(args.config, args.overlay, parse_assignments(args.set))
    name, overrides = model_of(side, given)
    config = load_config(args.config, args.overlay, parse_assignments(args.set) | overrides)
    if name == "SFT":
        adapter_check.check_adapter(side, config)
    out = session.output_folder(args.out, args.config, args.overlay)
    device, prompts = devices.choose_device(config), benchmarks.load_ifeval(config)
    collect = grid.collector(name, config, device, side, {"ifeval": prompts}, out)
    responses = collect("ifeval", args.format)
    return checkers.score(prompts, [row["response"] for row in responses])


def model_of(side: str, config: Config) -> tuple[str, dict[str, str | None]]:
    """The role in the grid of an adapter or a whole model, and the keys to override for it.

    An adapter is put on `model.base`; another whole model brings its tokenizer. Raises ValueError.
    """
    if side == config.model.base:
        return "base", {}
    if adapter_check.is_adapter(side, config):
        return "SFT", {"model.adapter": side}
    own = dict.fromkeys(("model.base", "model.tokenizer"), side)
    return "base", own | dict.fromkeys(("model.base_revision", "model.tokenizer_revision"))


def plot_intervals(found: dict, path: Path) -> None:
    """Draw both levels' differences with their 95 % intervals, in the format of the suffix."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 2), layout="constrained")
    levels = {"instruction level": "inst_difference", "prompt level": "difference"}
    for position, name in enumerate(levels.values()):
        axes.plot(found[f"{name}_ci95"], [position] * 2, color="#4c72b0")
        axes.plot(found[f"{name}_points"], position, "o", color="#4c72b0")
    axes.axvline(0, color="#8c8c8c", linewidth=0.8)
    axes.set_yticks(range(len(levels)), levels)
    axes.set(xlabel="difference in points, strict, 95 % interval", ylim=(-0.6, 1.6))
    title = f"{found['b']} against {found['a']}: {found['verdict']}"
    axes.set_title(notebooks.printable(title), fontsize=10, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        figure.savefig(Path(folder) / path.name, dpi=150)
        (Path(folder) / path.name).replace(path)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """The arguments of both commands."""
    found = argparse.ArgumentParser(prog="python -m atlas_lib.ifeval")
    commands = found.add_subparsers(required=True)
    punkt = commands.add_parser("punkt", help="find or fetch nltk's English punkt_tab files")
    punkt.set_defaults(run=lambda args: print(f"punkt_tab: {checkers.ensure_punkt()}"))
    scoring = commands.add_parser("score", help="score a file of responses")
    scoring.add_argument("--prompts", required=True, help=".jsonl in IFEval's schema")
    scoring.add_argument("--responses", required=True, type=Path, help="{prompt, response} a line")
    scoring.add_argument("--out", type=Path, help="folder for verdicts.jsonl and summary.json")
    scoring.set_defaults(run=score_file)
    comparing = commands.add_parser("compare", help="test B against A on the same prompts")
    side = "verdicts.jsonl or its folder, a log of lm-eval's samples, or a model or adapter to"
    comparing.add_argument("a", help=f"the baseline: {side} evaluate: a folder or a hub id")
    comparing.add_argument("b", help="what is tested against it")
    comparing.add_argument("--json", type=Path, help="write the whole report to this file as well")
    comparing.add_argument("--plot", type=Path, help="draw both intervals: .png, .svg or .pdf")
    models = comparing.add_argument_group("for models and adapters")
    models.add_argument("--format", choices=("chat", "raw"), default="chat", help="of the prompts")
    models.add_argument("--config", default="sft_qwen05b", help="the recipe, a file of configs/")
    models.add_argument("--overlay", default="", help="a layer on top of it, such as offline")
    models.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    models.add_argument("--out", default="", help="folder of the responses, by default below runs/")
    comparing.set_defaults(run=compare_sides)
    return found


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        sys.exit("error: " + notebooks.printable(str(error).replace("\n", " ")))
