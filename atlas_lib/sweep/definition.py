"""A parameter sweep as configs/sweeps/*.yaml describes it: space, seeds, budget, objective."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from atlas_lib import artifacts, sources
from atlas_lib.bootstrap import CONFIGS
from atlas_lib.config import load_config, parse_yaml, validate
from atlas_lib.schema import Config, Section
from atlas_lib.stages import STAGES

SWEEPS = CONFIGS / "sweeps"
# Objective -> the stage that writes it and the direction in which it improves.
OBJECTIVES = {
    "validation_loss": ("03_sft_train", "minimize"),
    "dev_strict": ("04_ifeval_eval", "maximize"),
    "dev_inst_strict": ("04_ifeval_eval", "maximize"),
}
# The trainer's seed: initial adapter, dropout, order of the rows. The config's own `seed` also
# determines the weights of the tiny model, so each seed would need a base model of its own.
SEED_KEY = "train.seed"
# A trial is evaluated on the dev prompts, in the format that it was trained in, and not published.
FIXED = {
    "eval.prompts_revision": None,
    "eval.benchmarks": ["ifeval"],
    "eval.limit": None,
    "eval.formats": ["chat"],
    "eval.guardrails": False,
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
    """One file of configs/sweeps; `validate_sweep` checks what types cannot express."""

    name: str
    config: str
    overlay: str = ""
    set: dict[str, Any] = Field(default={})
    space: dict[str, Any] = Field(min_length=1)
    multiples: dict[str, Multiple] = Field(default={})
    sampler: Literal["grid", "tpe"]
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(min_length=1)  # NumPy's range
    budget: Budget = Budget()
    objective: Objective
    stages: list[str] = Field(min_length=1)
    prompts: str
    workers: PositiveInt | None = None


def sweep_names() -> list[str]:
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def load_sweep(name: str) -> Sweep:
    """configs/sweeps/<name>.yaml, or a path to such a file. Raises ValueError, one sentence."""
    path = Path(name) if name.endswith(".yaml") else SWEEPS / f"{name}.yaml"
    given = parse_yaml(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None
    if not isinstance(given, dict):
        raise ValueError(
            f"{name!r} is not a sweep file with keys and values; there are: "
            f"{', '.join(sweep_names())}."
        )
    return validate_sweep(given | {"name": path.stem})


def validate_sweep(given: dict) -> Sweep:
    """The sweep that a mapping describes, values coerced to their key's type. Raises ValueError."""
    missing = "The sweep does not set {key!r}; see configs/sweeps/lr_rank.yaml."
    sweep = validate(Sweep, given, missing)
    for problem in _problems(sweep):
        raise ValueError(problem)
    return _coerced(sweep)


def _problems(sweep: Sweep) -> Iterator[str]:
    """Each problem as a sentence; a check may rely on those before it."""
    yield from _objective_problems(sweep)
    for key in sweep.space:
        yield from _shape_problems(sweep, key)
    coerced = _coerced(sweep)
    for key in sweep.space:
        yield from _value_problems(coerced, key)
    for key, multiple in sweep.multiples.items():
        yield from _multiple_problems(coerced, key, multiple.of)
    yield from _other_problems(sweep)


def _objective_problems(sweep: Sweep) -> Iterator[str]:
    metric = sweep.objective.metric
    for stage in sweep.stages:
        if stage not in STAGES:
            yield f"stages has {stage!r}; there are: {', '.join(STAGES)}."
    if metric not in OBJECTIVES:
        yield f"objective.metric is {metric!r}; known metrics: {', '.join(OBJECTIVES)}."
    stage, direction = OBJECTIVES[metric]
    if stage not in sweep.stages:
        yield f"objective.metric is {metric!r}, which only {stage} writes; add that stage."
    if sweep.objective.direction != direction:
        yield f"objective.direction must be {direction} for {metric}."


def _shape_problems(sweep: Sweep, key: str) -> Iterator[str]:
    values = _values(sweep, key)
    if not isinstance(values, list) or not values:
        yield f"space.{key} must be a list of values or {{log_uniform: [low, high]}}."
    if any(isinstance(value, dict) for value in values):
        yield f"space.{key} is a section; name one of its keys."
    if isinstance(sweep.space[key], dict) and sweep.sampler == "grid":
        yield f"space.{key} is log_uniform, which a grid cannot list; use sampler: tpe."


def _value_problems(sweep: Sweep, key: str) -> Iterator[str]:
    values = _values(sweep, key)
    if isinstance(sweep.space[key], dict):
        if not all(isinstance(value, float) for value in values):
            yield f"space.{key} is no fraction, which log_uniform draws; list its values."
        if not (len(values) == 2 and 0 < values[0] < values[1]):
            yield f"space.{key}: log_uniform needs two numbers, 0 < low < high."
    stage, unlabelled = max(sweep.stages), {"label": ""}  # it is recorded, but changes no score
    configs = [_config(sweep, {key: value} | unlabelled) for value in values]
    digests = {artifacts.config_digest(config, stage) for config in configs}
    if len(digests) < len(values):
        yield f"space.{key}: some values give {stage} the same result; drop them, or the key."


def _multiple_problems(sweep: Sweep, key: str, of: str) -> Iterator[str]:
    if of not in sweep.space:
        yield f"multiples.{key} follows {of!r}, which is not in space."
    for value in _values(sweep, of):
        if not isinstance(value, int | float):
            yield f"multiples.{key} follows {of}, which is not a number."
        _config(sweep, point(sweep, {of: value}))


def _other_problems(sweep: Sweep) -> Iterator[str]:
    if len(set(sweep.seeds)) < len(sweep.seeds):
        yield f"seeds lists a seed twice: {sweep.seeds}; list each seed once."
    for key in {SEED_KEY, "eval.prompts", *FIXED} & {*sweep.space, *sweep.set, *sweep.multiples}:
        yield f"{key} is set by the sweep itself; leave it out."
    if "data.exclude_overlap" in sweep.space or _config(sweep, {}).data.exclude_overlap:
        yield "data.exclude_overlap would drop other rows for dev than for test prompts; unset it."
    if sweep.sampler == "tpe" and sweep.budget.trials is None:
        yield "budget.trials is not set; a tpe sweep needs a number of trials."
    if sweep.prompts.endswith(".jsonl") and not sources.locate(sweep.prompts):
        yield f"prompts is {sweep.prompts!r}, which does not exist; give a .jsonl file."
    if sweep.prompts == _config(sweep, {}).eval.prompts:
        yield f"prompts is {sweep.prompts!r}, the test prompts themselves; use dev prompts."


def _values(sweep: Sweep, key: str) -> Any:
    """The listed values of a key, or the bounds of its range."""
    choices = sweep.space[key]
    return choices.get("log_uniform") if isinstance(choices, dict) else choices


def _config(sweep: Sweep, above: dict[str, Any]) -> Config:
    """The configuration with overrides. Raises ValueError: unknown key or wrong type."""
    return load_config(sweep.config, sweep.overlay, sweep.set | above)


def _coerced(sweep: Sweep) -> Sweep:
    """The sweep with the values of its space converted to the types of the configuration."""
    space = {}
    for key, choices in sweep.space.items():
        values = [_config(sweep, {key: value}).flat()[key] for value in _values(sweep, key)]
        space[key] = {"log_uniform": values} if isinstance(choices, dict) else values
    return sweep.model_copy(update={"space": space})


def planned(sweep: Sweep) -> list[dict[str, Any]]:
    """The parameters of every point as Optuna stores them; {} where the sampler chooses them."""
    if sweep.sampler == "tpe":
        return [{} for _ in range(sweep.budget.trials)]
    stored = [[to_stored(value) for value in values] for values in sweep.space.values()]
    grid = [dict(zip(sweep.space, values, strict=True)) for values in itertools.product(*stored)]
    random.Random(0).shuffle(grid)  # a budget smaller than the grid still covers all of it
    return grid[: sweep.budget.trials]


def to_stored(value: Any) -> Any:
    """A value as Optuna can store it: a list or a mapping as JSON text."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def varied(sweep: Sweep, params: dict[str, Any]) -> dict[str, Any]:
    """A trial's stored `params` as values of the configuration."""
    found = {}
    for key, stored in params.items():
        choices = sweep.space[key] if isinstance(sweep.space[key], list) else []
        found[key] = next((value for value in choices if to_stored(value) == stored), stored)
    return found


def point(sweep: Sweep, params: dict[str, Any]) -> dict[str, Any]:
    """The overrides that a trial's `params` stand for, multiples included."""
    chosen = varied(sweep, params)
    for key, multiple in sweep.multiples.items():
        if multiple.of in chosen:
            product = multiple.times * chosen[multiple.of]
            chosen[key] = int(product) if product == int(product) else product
    return chosen


def trial_overrides(sweep: Sweep, params: dict[str, Any], seed: int) -> dict[str, Any]:
    """SET of one run: the sweep's own, the point's, the seed's, and the dev prompts."""
    fixed = FIXED | {"eval.prompts": sweep.prompts, SEED_KEY: seed}
    return sweep.set | point(sweep, params) | fixed


def winner_overrides(sweep: Sweep, params: dict[str, Any], seed: int) -> dict[str, Any]:
    """SET of the winner's evaluation on the test prompts, which are the configuration's own."""
    return sweep.set | point(sweep, params) | {SEED_KEY: seed, "output.hub_repo": None}
