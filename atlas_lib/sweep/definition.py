"""A parameter sweep as configs/sweeps/*.yaml describes it: space, seeds, budget, objective."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from atlas_lib import sources
from atlas_lib.config import CONFIGS, STAGES, first_problem, flatten, load_config, parse_yaml
from atlas_lib.schema import Section

FOLDER = CONFIGS / "sweeps"
# What a trial may be judged by, and the stage that writes it.
METRICS = {
    "validation_loss": "03_sft_train",
    "dev_strict": "04_ifeval_eval",
    "dev_inst_strict": "04_ifeval_eval",
}
BETTER = {"validation_loss": "minimize", "dev_strict": "maximize", "dev_inst_strict": "maximize"}
# The trainer's own: the initial adapter, dropout and the order of rows. `seed` would also give the
# offline stand-in other weights, and then every seed would need a base of its own.
SEED_KEY = "train.seed"
# A trial is measured on the dev prompts, in the format it was trained in, and published nowhere.
PER_TRIAL = {
    "eval.prompts_revision": None,
    "eval.limit": None,
    "eval.formats": ["chat"],
    "eval.guardrails": False,
    "eval.nf4_row": False,
    "model.instruct": None,
    "output.hub_repo": None,
}


class Objective(Section):
    metric: str
    direction: Literal["minimize", "maximize"]


class Budget(Section):
    trials: PositiveInt | None = None
    hours: PositiveFloat | None = None
    consecutive_failures: PositiveInt = 3


class Multiple(Section):
    of: str
    times: PositiveFloat


class Sweep(Section):
    """One file of configs/sweeps; `load` checks what a type cannot say."""

    name: str
    config: str
    overlay: str = ""
    set: dict[str, Any] = Field(default={})
    space: dict[str, Any] = Field(min_length=1)
    multiples: dict[str, Multiple] = Field(default={})
    sampler: Literal["grid", "tpe"]
    seeds: list[int] = Field(min_length=1)
    budget: Budget = Budget()
    objective: Objective
    stages: list[str] = Field(min_length=1)
    prompts: str
    workers: PositiveInt | None = None
    runner: str = "tools.run"


def available() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Sweep:
    """configs/sweeps/<name>.yaml, or a path to such a file. Raises ValueError, one sentence."""
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"Unknown sweep {name!r}; there are: {', '.join(available())}.")
    given = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold keys and values; see configs/sweeps/lr_rank.yaml.")
    return validate(given | {"name": path.stem})


def validate(given: dict) -> Sweep:
    """The sweep that a mapping describes, values coerced to their key's type. Raises ValueError."""
    try:
        sweep = Sweep.model_validate(given)
    except ValidationError as error:
        missing = "The sweep does not set {key!r}; see configs/sweeps/lr_rank.yaml."
        raise ValueError(first_problem(error, Sweep, missing)) from None
    _check_objective(sweep)
    sweep = sweep.model_copy(update={"space": {k: _dimension(sweep, k) for k in sweep.space}})
    _check_plan(sweep)
    return sweep


def _check_objective(sweep: Sweep) -> None:
    metric, stages = sweep.objective.metric, list(STAGES)
    if unknown := [stage for stage in sweep.stages if stage not in stages]:
        raise ValueError(f"stages has {unknown[0]!r}; there are: {', '.join(stages)}.")
    if metric not in METRICS:
        known = ", ".join(METRICS)
        raise ValueError(f"objective.metric is {metric!r}, which no stage writes; known: {known}.")
    if sweep.objective.direction != BETTER[metric]:
        raise ValueError(f"objective.direction would take the worst; {BETTER[metric]} {metric}.")
    if METRICS[metric] not in sweep.stages:
        raise ValueError(
            f"objective.metric is {metric!r}, which only {METRICS[metric]} writes; add that stage."
        )


def _dimension(sweep: Sweep, key: str) -> Any:
    """A key's values as the configuration takes them. Raises ValueError."""
    values = sweep.space[key]
    bounds = values.get("log_uniform") if isinstance(values, dict) else None
    if bounds is not None and len(values) == 1:
        low, high = _coerced(sweep, key, bounds, at_least=2)
        if len(bounds) != 2 or not 0 < low < high:
            raise ValueError(f"space.{key}: log_uniform needs two numbers, 0 < low < high.")
        if sweep.sampler == "grid":
            raise ValueError(f"space.{key} is log_uniform, which a grid cannot list; use tpe.")
        return {"log_uniform": [low, high]}
    if not isinstance(values, list):
        raise ValueError(f"space.{key} must be a list of values or {{log_uniform: [low, high]}}.")
    coerced = _coerced(sweep, key, values, at_least=1)
    for position, value in enumerate(coerced):
        if value in coerced[:position]:
            raise ValueError(f"space.{key} lists {value!r} twice; a point is tried once.")
    return coerced


def _coerced(sweep: Sweep, key: str, values: Any, at_least: int) -> list:
    if not isinstance(values, list) or len(values) < at_least:
        raise ValueError(f"space.{key} is empty or too short: nothing to choose from.")
    known = [_flat(sweep, {key: value}) for value in values]
    if any(key not in flat for flat in known):
        raise ValueError(f"space.{key} is a section; name one of its keys.")
    return [flat[key] for flat in known]


def _flat(sweep: Sweep, overrides: dict) -> dict:
    """The resolved configuration, dotted; an unknown key or a wrong type is a ValueError."""
    loaded = load_config(sweep.config, sweep.overlay, sweep.set | overrides)
    return flatten(loaded.as_dict())


def _check_plan(sweep: Sweep) -> None:
    """What only the keys together show."""
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise ValueError(f"seeds lists a seed twice: {sweep.seeds}; one run cannot count double.")
    reserved = {SEED_KEY, "eval.prompts", *PER_TRIAL}
    if clash := reserved & {*sweep.space, *sweep.set, *sweep.multiples}:
        raise ValueError(f"{min(clash)} is set by the sweep itself; leave it out.")
    if twice := {*sweep.multiples} & {*sweep.space}:
        raise ValueError(f"{min(twice)} is both in space and in multiples; keep one.")
    for key, multiple in sweep.multiples.items():
        if multiple.of not in sweep.space:
            raise ValueError(f"multiples.{key} follows {multiple.of!r}, which is not in space.")
        values = sweep.space[multiple.of]
        for value in values if isinstance(values, list) else values["log_uniform"]:
            if not isinstance(value, int | float):
                raise ValueError(f"multiples.{key} follows {multiple.of}, which is no number.")
            _flat(sweep, point(sweep, {multiple.of: value}))
    if sweep.sampler == "tpe" and sweep.budget.trials is None:
        raise ValueError("budget.trials is not set; a tpe sweep has no end of its own.")
    if sweep.prompts.endswith(".jsonl") and not Path(sources.locate(sweep.prompts)).is_file():
        raise ValueError(f"prompts is {sweep.prompts!r}, which does not exist; give a .jsonl file.")
    if sweep.prompts == _flat(sweep, {})["eval.prompts"]:
        raise ValueError(
            f"prompts is {sweep.prompts!r}, the test prompts themselves; choose on dev prompts."
        )


def n_trials(sweep: Sweep) -> int:
    """How many points are tried: the budget's, for a grid at most all of them."""
    size = 1
    for values in sweep.space.values():
        size *= len(values)
    trials = sweep.budget.trials or size
    return min(trials, size) if sweep.sampler == "grid" else trials


def encode(value: Any) -> Any:
    """A value as Optuna can store it: a list or a mapping as JSON text."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def varied(sweep: Sweep, params: dict[str, Any]) -> dict[str, Any]:
    """A trial's stored `params` as values of the configuration; those that it has."""
    listed = {key: v if isinstance(v, list) else [] for key, v in sweep.space.items()}
    return {
        key: next((v for v in listed[key] if encode(v) == params[key]), params[key])
        for key in sweep.space
        if key in params
    }


def point(sweep: Sweep, params: dict[str, Any]) -> dict[str, Any]:
    """The overrides that a trial's `params` mean, those that follow others included."""
    chosen = varied(sweep, params)
    for key, multiple in sweep.multiples.items():
        if multiple.of in chosen:
            product = multiple.times * chosen[multiple.of]
            chosen[key] = int(product) if product == int(product) else product
    return chosen


def overrides(sweep: Sweep, params: dict[str, Any], seed: int) -> dict[str, Any]:
    """SET of one run: the sweep's own, the point's, the seed's, and the dev prompts."""
    fixed = PER_TRIAL | {"eval.prompts": sweep.prompts, SEED_KEY: seed}
    return sweep.set | point(sweep, params) | fixed


def winning_overrides(sweep: Sweep, params: dict[str, Any], seed: int) -> dict[str, Any]:
    """SET of the winner's look at the test prompts, which are the configuration's own."""
    return sweep.set | point(sweep, params) | {SEED_KEY: seed, "output.hub_repo": None}
