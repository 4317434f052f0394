"""The study of a sweep, kept by Optuna: which point is next, and what became of each.

Every point of the sweep is queued as a waiting trial with the point's number, and workers only run
waiting trials. Optuna fails a trial whose worker sends no heartbeats any more and queues it again
with what it has recorded. Several trials may therefore stand for one point: its complete trial
counts, else its last one.
"""

import contextlib
import datetime
import heapq
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.samplers import TPESampler
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState

from atlas_lib import artifacts
from atlas_lib.config import load_config
from atlas_lib.sweep import definition
from atlas_lib.sweep.definition import Sweep

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

# Seconds between the heartbeats of a running trial; the tests set fewer. A trial is taken over when
# four of them are missing: two minutes after its worker was killed.
HEARTBEAT = int(os.environ.get("ATLAS_SWEEP_HEARTBEAT", "30"))
MAX_RETRIES = 10  # of a trial that is interrupted: what kills every worker is given up
retry = RetryHeartbeatStaleTrialCallback(MAX_RETRIES)
# Attributes of a trial: the number of its point, its own number once it has a heartbeat, its error,
# and for each finished seed the results.
POINT, BEGUN, ERROR, SEED = "point", "begun", "error", "seed "
# The server closes the connections of a machine that is gone, and so frees its locks.
KEEPALIVE = "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"
optuna.logging.set_verbosity(optuna.logging.ERROR)


class TrialError(Exception):
    """A trial ended without a value."""


class Storage(optuna.storages.RDBStorage):
    """Optuna's storage; a heartbeat that cannot be written is skipped: the next one suffices."""

    def record_heartbeat(self, trial_id: int) -> None:
        with contextlib.suppress(StorageInternalError, sqlalchemy.exc.SQLAlchemyError):
            super().record_heartbeat(trial_id)


class OpenStudy(NamedTuple):
    study: optuna.Study
    sweep: Sweep
    storage: Storage
    home: Path  # folder of the runs


# --- storage --------------------------------------------------------------------------------------


def open_storage(url: str, home: Path) -> Storage:
    """The SQLite file in `home`, or PostgreSQL by URL. Raises ValueError or ConnectionError."""
    scheme, _, rest = url.partition("://")
    if url and (not rest or scheme.partition("+")[0] not in ("postgresql", "postgres")):
        raise ValueError(
            f"--storage is {scheme!r}; give a postgresql:// URL, or nothing for a file."
        )
    address = f"postgresql+psycopg://{rest}" if url else f"sqlite:///{home / 'study.db'}"
    connect = {"options": KEEPALIVE} if url else {"timeout": 100}
    home.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(home / "study.lock"):  # tables are created by one process
            return Storage(
                address,
                engine_kwargs={"pool_pre_ping": True, "connect_args": connect},
                heartbeat_interval=HEARTBEAT,
                grace_period=4 * HEARTBEAT,
                heartbeat_stale_trial_callback=retry,
            )
    except sqlalchemy.exc.DatabaseError as error:
        reason = " ".join(str(error.orig).split())
    except ValueError:  # of SQLAlchemy, which quotes it
        reason = "its port is not a number"
    store, fix = ("The storage", "check --storage")
    if not url:
        store, fix = (home / "study.db", "restore it, or move it away to begin anew")
    raise ConnectionError(f"{store} does not answer ({reason}); {fix}.")


@contextlib.contextmanager
def exclusive(opened: OpenStudy) -> Iterator[None]:
    """Let one process at a time queue and take trials.

    Optuna alone does not prevent that two take or queue the same trial: on SQLite it reads and
    writes a trial's state without a lock, and `enqueue_trial` has none on any database.
    """
    with filelock.FileLock(opened.home / "study.lock"), contextlib.ExitStack() as stack:
        engine = opened.storage.engine
        if engine.dialect.name == "postgresql":
            connection = stack.enter_context(engine.begin())
            lock = sqlalchemy.text("SELECT pg_advisory_xact_lock(hashtext(:name))")
            connection.execute(lock, {"name": opened.study.study_name})
        yield


def create(name: str, sweep: Sweep, storage: Storage, home: Path) -> OpenStudy:
    """The study `name`, created if absent. Raises ValueError if it belongs to another sweep."""
    direction = sweep.objective.direction
    study = optuna.create_study(
        study_name=name, storage=storage, direction=direction, load_if_exists=True
    )
    if not study.user_attrs:
        study.set_user_attr("made_from", sweep_made_from(sweep))
    check_same(study, sweep)
    study.set_user_attr("sweep", sweep.model_dump(mode="json"))  # a larger budget continues it
    return OpenStudy(study, sweep, storage, home)


def join(name: str, storage: Storage, home: Path) -> OpenStudy:
    """An existing study. Raises ValueError if it is missing or resolves differently here."""
    try:
        study = optuna.load_study(study_name=name, storage=storage)
        given = study.user_attrs["sweep"]
    except KeyError:
        names = ", ".join(sorted(optuna.get_all_study_names(storage)))
        raise ValueError(
            f"No study {name!r} in this storage; there are: {names or 'none'}."
        ) from None
    given.pop("runner", None)  # of an earlier version, which `check_same` refuses
    sweep = Sweep.model_validate(given)
    check_same(study, sweep)
    return OpenStudy(study, sweep, storage, home)


def sweep_made_from(sweep: Sweep) -> dict[str, Any]:
    """What determines the results of a sweep: equal on every machine that joins."""
    digest = artifacts.config_digest(load_config(sweep.config, sweep.overlay, sweep.set))
    given = sweep.model_dump(mode="json", exclude={"name", "budget", "workers"})
    return {"study format": 2, **given, "resolved configuration": digest}


def check_same(study: optuna.Study, sweep: Sweep) -> None:
    there = study.user_attrs.get("made_from", {})
    for key, here in sweep_made_from(sweep).items():
        if there.get(key) != here:
            raise ValueError(
                f"Study {study.study_name!r} was made with {key} {json.dumps(there.get(key))}, not "
                f"{json.dumps(here)}; choose another --study, or use the version that made it."
            )


# --- trials ---------------------------------------------------------------------------------------


def counted(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The trial that counts for each point that was queued: the complete one, else the last."""
    found: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        point = trial.user_attrs[POINT]
        if point not in found or found[point].state != TrialState.COMPLETE:
            found[point] = trial
    return found


def is_interrupted(trial: FrozenTrial) -> bool:
    """Whether a trial ended without an error of its own and has to be queued again."""
    lost = trial.state == TrialState.FAIL and ERROR not in trial.user_attrs
    return lost and len(retry.retry_history(trial)) < MAX_RETRIES


def queue_next(opened: OpenStudy) -> bool:
    """Queue the first point that has no trial or an interrupted one; false if there is none."""
    trials = counted(opened.study)
    for point, params in enumerate(definition.planned(opened.sweep)):
        if point not in trials:
            opened.study.enqueue_trial(params, user_attrs={POINT: point})
            return True
        if is_interrupted(trials[point]):
            retry(opened.study, trials[point])
            return True
    return False


def retry_failed(opened: OpenStudy) -> int:
    """Queue every failed point again, with the seeds that it has finished; how many."""
    with exclusive(opened):
        failed = [t for t in counted(opened.study).values() if t.state == TrialState.FAIL]
        for trial in failed:
            attrs = {key: value for key, value in trial.user_attrs.items() if key != ERROR}
            opened.study.enqueue_trial(trial.params, user_attrs=attrs)
    return len(failed)


def run_next(opened: OpenStudy, evaluate: Callable[[Trial], float]) -> bool:
    """Take one trial and run it; false if there is none to take.

    `evaluate` returns the objective, or raises TrialError, after recording the error if the trial
    should not be queued again.
    """
    study, values = opened.study, []
    with contextlib.ExitStack() as asking:
        asking.enter_context(exclusive(opened))
        fail_lost(study)
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting and not queue_next(opened):
            return False
        if opened.sweep.sampler == "tpe":  # seeded so that no worker repeats what another has drawn
            drawn = sum(bool(trial.params) for trial in counted(study).values())
            study.sampler = TPESampler(seed=drawn, multivariate=True, constant_liar=True)

        def objective(trial: Trial) -> float:
            begin(opened, trial)
            asking.close()
            values.append(evaluate(trial))
            return values[0]

        try:
            study.optimize(objective, n_trials=1, catch=(TrialError,))
        except UnboundLocalError as error:  # optuna 5.0 hides behind it why the storage failed
            raise (error.__context__ or error) from None
        except (AssertionError, ValueError):  # how Optuna refuses to end a trial that has ended
            if not values:
                raise
            print("The trial was taken over by another worker: it is not counted here.", flush=True)
    return True


def fail_lost(study: optuna.Study) -> None:
    """Fail the running trials whose workers are gone.

    Optuna finds those whose heartbeats have ended, but not those that never had one. In
    `exclusive`, such a trial's worker was killed before it could release the lock.
    """
    optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.user_attrs.get(BEGUN) != trial.number:
            study.tell(trial.number, state=TrialState.FAIL)


def begin(opened: OpenStudy, trial: Trial) -> None:
    """Record the first heartbeat of a trial, then that it has begun, then its parameters."""
    study_id = opened.storage.get_study_id_from_name(opened.study.study_name)
    trial_id = opened.storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
    opened.storage.record_heartbeat(trial_id)
    trial.set_user_attr(BEGUN, trial.number)
    for key, choices in opened.sweep.space.items():
        if isinstance(choices, list):
            trial.suggest_categorical(key, [definition.to_stored(value) for value in choices])
        else:
            trial.suggest_float(key, *choices["log_uniform"], log=True)


# --- results --------------------------------------------------------------------------------------


def finished_runs(trial: FrozenTrial | Trial) -> dict[str, dict]:
    """{seed: its results} of the seeds that are finished."""
    attrs = trial.user_attrs.items()
    return {key.removeprefix(SEED): value for key, value in attrs if key.startswith(SEED)}


def device_seconds(trials: Iterable[FrozenTrial]) -> float:
    """How long trials have kept a device, those that were interrupted included."""
    spans = [
        (trial.datetime_complete or datetime.datetime.now()) - trial.datetime_start
        for trial in trials
        if trial.datetime_start
    ]
    return sum(span.total_seconds() for span in spans)


def error_of(trial: FrozenTrial) -> str | None:
    """Why a trial failed; None in another state."""
    if trial.state != TrialState.FAIL:
        return None
    times = f"it was interrupted {MAX_RETRIES + 1} times; log.txt in its folder may say why"
    return trial.user_attrs.get(ERROR, times)


def why_failing(opened: OpenStudy) -> str | None:
    """Why to stop, if the last `consecutive_failures` points to end have all failed; else None."""
    most = opened.sweep.budget.consecutive_failures
    ended = [t for t in counted(opened.study).values() if has_ended(t)]
    last = heapq.nlargest(most, ended, key=lambda trial: trial.datetime_complete)
    if sum(trial.state == TrialState.FAIL for trial in last) < most:
        return None
    return f"{most} trials failed one after another, the last one because: {error_of(last[0])}"


def has_ended(trial: FrozenTrial) -> bool:
    return trial.state.is_finished() and not is_interrupted(trial)


def why_over(opened: OpenStudy) -> str | None:
    """Why no trial should be started any more; None while the sweep goes on."""
    hours = opened.sweep.budget.hours
    if failing := why_failing(opened):
        return failing
    if hours and device_seconds(opened.study.get_trials(deepcopy=False)) >= 3600 * hours:
        return f"the budget of {hours:g} device hours is spent"
    ended = sum(map(has_ended, counted(opened.study).values()))
    return "every trial has ended" if ended >= len(definition.planned(opened.sweep)) else None


def winner(opened: OpenStudy) -> FrozenTrial:
    """The best complete trial, of equal ones that of the first point. Raises RuntimeError."""
    sign = -1 if opened.sweep.objective.direction == "maximize" else 1
    complete = [t for t in counted(opened.study).values() if t.state == TrialState.COMPLETE]
    if not complete:
        raise RuntimeError("No trial was completed; `status` lists their errors.")
    return min(complete, key=lambda trial: (sign * trial.value, trial.user_attrs[POINT]))


def record_test_evaluation(opened: OpenStudy, evaluated: dict[str, int]) -> None:
    """Count an evaluation on the test prompts; one that is interrupted and resumed counts once."""
    with exclusive(opened):
        recorded = opened.study.user_attrs.get("test_evaluations", [])
        if not any(evaluated.items() <= earlier.items() for earlier in recorded):
            at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            opened.study.set_user_attr("test_evaluations", [*recorded, evaluated | {"at": at}])
