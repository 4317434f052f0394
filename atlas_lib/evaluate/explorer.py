"""One self-contained HTML page with every response of an evaluation."""

from pathlib import Path

import jinja2

from atlas_lib import notebooks
from atlas_lib.evaluate.checkers import described

TEMPLATE = Path(__file__).with_suffix(".html.jinja")
SHOWN_CHARACTERS = 600_000  # characters of responses on a page, which then stays below 1 MB
CUTS = (100_000, 4_000, 2_000, 1_000, 500, 250)  # of one response, the first that fits is taken
OUTCOMES = ("won", "lost", "neither", "both")


def render_responses(
    prompts: list[dict],
    responses: dict[tuple[str, str], list[dict]],
    verdicts: dict[tuple[str, str], list[dict]],
    primary: dict,
    label: str,
) -> str:
    """The HTML text; prompts are grouped by the outcome of the comparison `primary`.

    A response is shown up to the largest of CUTS that keeps the page within SHOWN_CHARACTERS.
    """
    lengths = [len(r["response"]) for given in responses.values() for r in given]
    fitting = (limit for limit in CUTS if sum(min(n, limit) for n in lengths) <= SHOWN_CHARACTERS)
    limit = next(fitting, CUTS[-1])
    a, b = tuple(primary["a"]), tuple(primary["b"])
    responses = {row: responses[row] for row in (b, a, *responses)}  # the two come first
    groups: dict[str, list[dict]] = {outcome: [] for outcome in OUTCOMES}
    for index, prompt in enumerate(prompts):
        passed = {row: verdicts[row][index]["prompt_strict"] for row in responses}
        outcome = ("neither", "lost", "won", "both")[passed[a] + 2 * passed[b]]
        answered = {row: (given[index], verdicts[row][index]) for row, given in responses.items()}
        groups[outcome].append(_shown(prompt, answered, limit))
    template = jinja2.Template(TEMPLATE.read_text("utf-8"), autoescape=True, trim_blocks=True)
    types = sorted({name for prompt in prompts for name in prompt["instruction_id_list"]})
    models = [" ".join(row) for row in responses]
    by_type = sorted(
        primary["by_type"].items(), key=lambda row: row[1]["only_a"] - row[1]["only_b"]
    )
    shown = {"groups": groups, "types": types, "models": models, "by_type": by_type}
    return template.render(shown, primary=primary, label=label)


def _shown(prompt: dict, answered: dict[tuple[str, str], tuple[dict, dict]], limit: int) -> dict:
    """One prompt as the template reads it; `answered`: (response, verdict) of each model."""
    return {
        "prompt": notebooks.printable(prompt["prompt"]),
        "types": prompt["instruction_id_list"],
        "demands": described(prompt),
        "responses": [
            {
                "model": " ".join(row),
                "text": notebooks.printable(response["response"][:limit]),
                "cut": len(response["response"]) - limit,
                "tokens": response["n_tokens"],
                "stop": response["stop"] or "the length limit",
                "passed": verdict["prompt_strict"],
                "followed": verdict["strict"],
            }
            for row, (response, verdict) in answered.items()
        ],
    }
