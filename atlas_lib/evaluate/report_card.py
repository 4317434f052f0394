"""One page about a run, from its recipe to its cost, and its scores for the model card."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from atlas_lib import artifacts, stages
from atlas_lib.evaluate import tables
from atlas_lib.schema import Config

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
)


def write_report(path: Path, out: Path, config: Config, results: dict[str, Any]) -> None:
    """Write the page in Markdown; `results` as in ifeval.json. Stages not in `out` are left out."""
    text = TEMPLATES.get_template("report_card.md.jinja").render(
        config=config,
        results=results,
        verdict=tables.verdict_line(results["comparisons"][0]),
        audit=_summary(out / stages.TEMPLATE_AUDIT),
        training=_summary(out / stages.SFT_TRAIN),
        ledger=artifacts.read_ledgers(out),
        not_run=list(_not_run(config)),
    )
    artifacts.write_lines(path, [text.rstrip("\n")])


def write_model_card(path: Path, card: Path, results: dict[str, Any]) -> None:
    """Write the adapter's model card, followed by the verdict and the scores of the evaluation."""
    scores = TEMPLATES.get_template("scores.md.jinja").render(results=results)
    verdict = tables.verdict_line(results["comparisons"][0])
    artifacts.write_lines(
        path, [card.read_text("utf-8").rstrip(), "", scores.rstrip(), "", verdict]
    )


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    return artifacts.read_json(path) if path.is_file() else {}


def _not_run(config: Config) -> Iterator[str]:
    if not config.model.instruct:
        yield "the vendor's Instruct model (model.instruct is not set)"
    if not config.eval.guardrails:
        yield "MMLU, GSM8K and TruthfulQA (eval.guardrails is off)"
    if "ifbench" not in config.eval.benchmarks:
        yield "IFBench (eval.benchmarks)"
    elif config.eval.other_limit:
        yield f"IFBench beyond {config.eval.other_limit} of its prompts (eval.other_limit)"
    yield "other training seeds (`python -m tools.run --seeds`)"
