"""The study of a sweep: which trial is next, whose it is, and what became of it.

A trial is one point of the space with all of its seeds. Whoever works on it holds its lease: a lock
that ends with the process, however that ends. A running trial whose lease is free has lost its
worker; the next one adopts that very trial, so that no point is ever tried or counted twice.
"""

import contextlib
import datetime
import heapq
import json
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from atlas_lib.sweep import definition
from atlas_lib.sweep.definition import Sweep
from tools.sweep_storage import ASK

MOST_DEATHS = 5  # of a trial's workers: what kills every worker would otherwise never end
FAILED_SECONDS = "failed_seconds"  # what the seed that failed a trial has cost
SEED = "seed "  # before a seed, the name of the attribute with its results
NO_SAMPLER_YET = optuna.samplers.RandomSampler(seed=0)  # `use_sampler` brings the real one
optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def create(name: str, sweep: Sweep, storage: Any, fingerprint: str) -> optuna.Study:
    """The study `name`, created if absent. Raises ValueError if it is of another sweep."""
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        sampler=NO_SAMPLER_YET,
        direction=sweep.objective.direction,
        load_if_exists=True,
    )
    given, there = sweep.model_dump(mode="json"), study.user_attrs.get("sweep")
    for key in sorted(given.keys() - {"budget", "workers"}) if there else []:
        if given[key] != there.get(key):
            raise ValueError(
                f"Study {name!r} was made with another {key} ({json.dumps(there.get(key))}); "
                "choose another --study, or delete its folder."
            )
    if given != there:  # a larger budget continues the same sweep
        study.set_user_attr("sweep", given)
    if "fingerprint" not in study.user_attrs:
        study.set_user_attr("fingerprint", fingerprint)
    return study


def join(name: str, storage: Any) -> tuple[optuna.Study, Sweep]:
    """A study that is there, and its sweep. Raises ValueError."""
    try:
        study = optuna.load_study(study_name=name, storage=storage, sampler=NO_SAMPLER_YET)
        given = study.user_attrs["sweep"]
    except KeyError:
        known = ", ".join(sorted(s.study_name for s in optuna.get_all_study_summaries(storage)))
        raise ValueError(
            f"No study {name!r} in this storage; there are: {known or 'none'}."
        ) from None
    return study, Sweep.model_validate(given)


def use_sampler(study: optuna.Study, sweep: Sweep, asked: int) -> None:
    """Give a study its sampler before this process asks first; it remembers what it has seen.

    Asks come one after another, so a TPE seeded by their count never repeats another worker's.
    """
    if not isinstance(study.sampler, optuna.samplers.RandomSampler):
        return
    if sweep.sampler == "tpe":
        study.sampler = optuna.samplers.TPESampler(
            seed=asked, multivariate=True, constant_liar=True
        )
    else:
        space = {key: [definition.encode(v) for v in values] for key, values in sweep.space.items()}
        study.sampler = optuna.samplers.GridSampler(space, seed=0)


def suggest(trial: Trial, sweep: Sweep) -> dict[str, Any]:
    """The trial's parameters as stored; those that it already has stay."""
    return {
        key: trial.suggest_categorical(key, [definition.encode(v) for v in values])
        if isinstance(values, list)
        else trial.suggest_float(key, *values["log_uniform"], log=True)
        for key, values in sweep.space.items()
    }


def retried(trials: list[FrozenTrial]) -> set[int]:
    """Failed trials that a later one repeats: they count no more."""
    return {t.user_attrs["retry_of"] for t in trials if "retry_of" in t.user_attrs}


def retry_failed(study: optuna.Study, held: Callable) -> int:
    """Queue every failed point once more; how many."""
    with held(ASK, wait=True):
        failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        before = retried(study.get_trials(deepcopy=False))
        again = [trial for trial in failed if trial.number not in before]
        for trial in again:
            study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
    return len(again)


def too_many_failures(sweep: Sweep, trials: list[FrozenTrial]) -> str | None:
    """The last error, if the trials that ended last have all failed, as many as are allowed."""
    again, most = retried(trials), sweep.budget.consecutive_failures
    counted = [t for t in trials if t.state.is_finished() and t.number not in again]
    ended = heapq.nlargest(most, counted, key=lambda trial: trial.datetime_complete)
    if len(ended) == most and all(trial.state == TrialState.FAIL for trial in ended):
        reason = ended[0].user_attrs.get("error", "unknown")
        return f"{most} trials failed one after another, the last one because: {reason}"
    return None


def why_nothing_to_ask(sweep: Sweep, trials: list[FrozenTrial]) -> str | None:
    """Too many failures in a row, or the budget; None while there is more to try."""
    if failures := too_many_failures(sweep, trials):
        return failures
    if any(t.state == TrialState.WAITING for t in trials):
        return None
    if sweep.budget.hours and sum(map(spent_hours, trials)) >= sweep.budget.hours:
        return f"the budget of {sweep.budget.hours:g} device hours is spent"
    counted = len(trials) - len(retried(trials))
    return "every trial is taken" if counted >= definition.n_trials(sweep) else None


def runs(trial: FrozenTrial) -> dict[str, dict]:
    """{seed: its results} of the seeds that are finished."""
    found = {k: v for k, v in trial.user_attrs.items() if k.startswith(SEED)}
    return {key.removeprefix(SEED): value for key, value in found.items()}


def spent_hours(trial: FrozenTrial) -> float:
    seconds = sum(run["seconds"] for run in runs(trial).values())
    return (seconds + trial.user_attrs.get(FAILED_SECONDS, 0.0)) / 3600


class Claim(NamedTuple):
    """A trial, and what keeps it: the lease ends with the stack; runs inherit the file."""

    trial: Trial
    lease: contextlib.ExitStack
    file: Any


def claim(study: optuna.Study, sweep: Sweep, held: Callable) -> Claim | str | None:
    """A trial to work on; or why there is none; or None: others are at work, ask again later.

    A trial that lost its worker comes first.
    """
    with held(ASK, wait=True):
        for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            lease = contextlib.ExitStack()
            file = lease.enter_context(held(frozen.number))
            if file and (trial := _adopt(study, sweep, frozen)):
                return Claim(trial, lease, file)
            lease.close()
        trials = study.get_trials(deepcopy=False)
        if reason := why_nothing_to_ask(sweep, trials):
            return None if any(t.state == TrialState.RUNNING for t in trials) else reason
        use_sampler(study, sweep, len(trials))
        trial, lease = study.ask(), contextlib.ExitStack()
        file = lease.enter_context(held(trial.number, wait=True))
        suggest(trial, sweep)
        return Claim(trial, lease, file)


def _adopt(study: optuna.Study, sweep: Sweep, frozen: FrozenTrial) -> Trial | None:
    """The running trial whose worker is gone, unless it ended meanwhile or has cost too many."""
    storage, trial_id = study._storage, frozen._trial_id
    now = storage.get_trial(trial_id)
    if now.state != TrialState.RUNNING:
        return None
    deaths = now.user_attrs.get("deaths", 0) + 1
    storage.set_trial_user_attr(trial_id, "deaths", deaths)
    if deaths > MOST_DEATHS:
        fail(study, trial_id, f"its worker died {deaths} times; the last lines of its log say why")
        return None
    use_sampler(study, sweep, frozen.number)
    trial = Trial(study, trial_id)
    suggest(trial, sweep)
    return trial


def stopped(trial: Trial) -> None:
    """Its worker ends on purpose: that is no death."""
    trial.set_user_attr("deaths", trial.user_attrs.get("deaths", 0) - 1)


def fail(study: optuna.Study, trial_id: int, reason: str, seconds: float = 0.0) -> None:
    """Record a failed trial with its error and what it has cost beside its finished seeds."""
    study._storage.set_trial_user_attr(trial_id, FAILED_SECONDS, seconds)
    study._storage.set_trial_user_attr(trial_id, "error", reason)
    study._storage.set_trial_state_values(trial_id, TrialState.FAIL)


def complete(study: optuna.Study, trial: Trial, value: float) -> bool:
    """Record the value; false if another worker has ended this trial in the meantime."""
    try:
        study._storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [value])
    except optuna.exceptions.UpdateFinishedTrialError:
        return False
    return True


def winner(study: optuna.Study, sweep: Sweep) -> FrozenTrial:
    """The best complete trial, of equal ones the first: a database has no order of its own."""
    sign = -1 if sweep.objective.direction == "maximize" else 1
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min(complete, key=lambda trial: (sign * trial.value, trial.number))


def record_look(study: optuna.Study, held: Callable, looked: dict[str, int]) -> None:
    """Count a look at the test prompts: one that was interrupted and goes on counts once."""
    with held(ASK, wait=True):
        looks = study.user_attrs.get("looks", [])
        if not any(looked.items() <= look.items() for look in looks):
            at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            study.set_user_attr("looks", [*looks, looked | {"at": at}])
