"""Sweeps: what a file may hold, and that workers lose nothing and double nothing.

Studies run in real processes on SQLite, with a runner that needs no model (trivial_run.py);
test_sweep_postgres.py runs them on a database server.
"""

import json
import random
import shutil
from pathlib import Path

import jupytext
import optuna
import pytest
import yaml
from checks import refusal
from optuna.trial import TrialState
from scipy import stats
from sweep_studies import (
    TRIVIAL,
    Study,
    command,
    finished,
    kill_at_random,
    processes_of,
    wait_for,
)

from atlas_lib.config import CONFIGS, load_config
from atlas_lib.sweep import analysis, definition
from tools import sweep, sweep_study, sweep_trial, sweep_worker

ROOT = Path(__file__).resolve().parents[2]
COMPLETE, FAIL = TrialState.COMPLETE, TrialState.FAIL
ONE_POINT = {"space": {"lora.r": [4]}, "set": {"train.learning_rate": 1e-3}}
SLOW = {"space": {"lora.r": [4]}, "set": {"label": '{"sleep": 3}', "train.learning_rate": 1e-3}}

# --- the files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", definition.sweep_names())
def test_a_shipped_sweep_is_valid(name):
    found = definition.load_sweep(name)
    params = {key: definition.to_stored(values[0]) for key, values in found.space.items()}
    overrides = definition.trial_overrides(found, params, 7)
    config = load_config(found.config, found.overlay, overrides)
    assert config.eval.prompts == found.prompts
    assert config.output.hub_repo is None
    assert config.train.seed == 7
    assert config.eval.formats == ["chat"]


def test_the_shipped_sweeps_hold_what_they_say():
    assert {"lr_rank", "targets", "rows", "lr_rank_offline"} == set(definition.sweep_names())
    assert definition.load_sweep("lr_rank").space == {
        "train.learning_rate": [5e-5, 1e-4, 2e-4, 5e-4],
        "lora.r": [8, 16, 32],
    }
    assert len(definition.planned(definition.load_sweep("lr_rank_offline"))) <= 12


ERRORS = {
    "unknown key": ({"spcae": {}}, "Unknown key 'spcae'; the nearest known one is 'space'."),
    "missing key": ({"objective": None}, "objective is None"),
    "unknown parameter": ({"space": {"lora.rank": [1]}}, "Unknown key 'lora.rank'"),
    "a section": ({"space": {"lora": [{"r": 4}]}}, "lora is a section"),
    "wrong type": ({"space": {"lora.r": ["many"]}}, "lora.r is 'many'"),
    "empty space": ({"space": {}}, "space is {}"),
    "empty values": ({"space": {"lora.r": []}}, "space.lora.r must be a list"),
    "one value, no list": ({"space": {"lora.r": 4}}, "space.lora.r must be a list"),
    "duplicates": (
        {"space": {"lora.r": [4, 8, 4]}},
        "space.lora.r: some values give 03_sft_train the same result; drop them",
    ),
    "duplicates in words": (
        {"space": {"train.learning_rate": [1e-3, "1e-3"]}},
        "space.train.learning_rate: some values give",
    ),
    "reversed bounds": (
        {"sampler": "tpe", "space": {"train.learning_rate": {"log_uniform": [1e-2, 1e-3]}}},
        "0 < low < high",
    ),
    "three bounds": (
        {"sampler": "tpe", "space": {"train.learning_rate": {"log_uniform": [1e-4, 1e-3, 1e-2]}}},
        "log_uniform needs two numbers",
    ),
    "a range of whole numbers": (
        {"sampler": "tpe", "space": {"lora.r": {"log_uniform": [4, 64]}}},
        "space.lora.r is no fraction, which log_uniform draws; list its values",
    ),
    "a range of words": (
        {"sampler": "tpe", "space": {"lora.bias": {"log_uniform": ["all", "none"]}}},
        "space.lora.bias is no fraction",
    ),
    "how to run": ({"space": {"run.eval_slots": [1, 2]}}, "run.eval_slots: some values give"),
    "names": ({"space": {"label": ["a", "b"]}}, "space.label: some values give 03"),
    "a service": (
        {"space": {"train.report_to": ["none", "wandb"]}},
        "space.train.report_to: some values give",
    ),
    "a key of a later stage": (
        {"space": {"eval.max_new_tokens": [8, 16]}},
        "eval.max_new_tokens: some values give 03_sft_train the same result",
    ),
    "a range in a grid": (
        {"space": {"train.learning_rate": {"log_uniform": [1e-4, 1e-3]}}},
        "a grid cannot list",
    ),
    "an unknown objective": (
        {"objective": {"metric": "accuracy", "direction": "maximize"}},
        "objective.metric is 'accuracy'; known metrics",
    ),
    "an objective of a stage not run": (
        {"objective": {"metric": "dev_strict", "direction": "maximize"}},
        "only 04_ifeval_eval writes",
    ),
    "unknown direction": (
        {"objective": {"metric": "validation_loss", "direction": "up"}},
        "objective.direction is 'up'",
    ),
    "the wrong direction": (
        {"objective": {"metric": "validation_loss", "direction": "maximize"}},
        "must be minimize for validation_loss",
    ),
    "negative budget": ({"budget": {"trials": -3}}, "budget.trials is -3"),
    "no hours": ({"budget": {"hours": 0}}, "budget.hours is 0"),
    "endless": ({"sampler": "tpe"}, "budget.trials is not set"),
    "unknown stage": ({"stages": ["05_dpo"]}, "stages has '05_dpo'"),
    "no seeds": ({"seeds": []}, "seeds is []"),
    "a negative seed": ({"seeds": [-1]}, "seeds.0 is -1 (int); it should be greater than or"),
    "a seed of 40 bits": ({"seeds": [1, 2**40]}, "seeds.1 is 1099511627776 (int); it should be"),
    "a seed twice": ({"seeds": [1, 1]}, "seeds lists a seed twice"),
    "the seed as a parameter": ({"space": {"train.seed": [1]}}, "train.seed is set by the sweep"),
    "publishing": ({"set": {"output.hub_repo": "me/x"}}, "output.hub_repo is set by the sweep"),
    "the test prompts": ({"prompts": "embedded:ifeval"}, "the test prompts themselves"),
    "prompts that are not there": ({"prompts": "configs/none.jsonl"}, "which does not exist"),
    "a multiple of nothing": (
        {"multiples": {"lora.lora_alpha": {"of": "lora.rank", "times": 2}}},
        "follows 'lora.rank'",
    ),
    "a multiple that is no whole number": (
        {"multiples": {"lora.lora_alpha": {"of": "lora.r", "times": 0.3}}},
        "lora.lora_alpha is 1.2",
    ),
    "a multiple of a word": (
        {
            "space": {"lora.bias": ["none", "all"]},
            "multiples": {"lora.lora_alpha": {"of": "lora.bias", "times": 2}},
        },
        "follows lora.bias, which is not a number",
    ),
    "unknown overlay": ({"overlay": "nope"}, "Unknown config 'nope'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_wrong_file_is_one_sentence(name):
    changes, words = ERRORS[name]
    with pytest.raises(ValueError, match=r".") as caught:
        definition.validate_sweep(TRIVIAL | {"name": "wrong"} | changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_key_says_which():
    with pytest.raises(ValueError, match="does not set 'objective'"):
        definition.validate_sweep(
            {k: v for k, v in TRIVIAL.items() if k != "objective"} | {"name": "x"}
        )


def test_an_unknown_or_empty_file_names_the_sweeps_there_are(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    for name in ("nope", str(tmp_path / "empty.yaml")):
        with pytest.raises(ValueError, match=r"is not a sweep file .* lr_rank, lr_rank_offline"):
            definition.load_sweep(name)


def test_a_rank_takes_its_alpha_along():
    chosen = definition.trial_overrides(
        definition.load_sweep("lr_rank"), {"train.learning_rate": 1e-4, "lora.r": 32}, seed=1
    )
    assert chosen["lora.lora_alpha"] == 64


def test_a_list_survives_the_storage():
    found = definition.load_sweep("targets")
    seven = found.space["lora.target_modules"][1]
    stored = {"lora.target_modules": definition.to_stored(seven)}
    assert definition.trial_overrides(found, stored, 1)["lora.target_modules"] == seven


def test_a_smaller_budget_tries_a_part_and_a_larger_one_the_rest():
    few, all_ = (
        definition.validate_sweep(TRIVIAL | {"name": "x", "budget": budget})
        for budget in ({"trials": 3}, {})
    )
    assert definition.planned(few) == definition.planned(all_)[:3]
    assert len(definition.planned(all_)) == 4


# --- studies --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A study that one worker has finished, and what the worker printed."""
    study = Study(tmp_path_factory.mktemp("sweep") / "home")
    return study, finished(study.worker())


def test_a_sweep_runs_each_point_and_seed_once(swept):
    study, output = swept
    assert "every trial has ended" in output
    assert study.each_point_once()
    assert set(study.events()) == {(point, seed) for point in range(4) for seed in (1, 2)}
    assert all(events == ["started", "ended"] for events in study.events().values())
    assert study.study.best_params == {"train.learning_rate": 1e-3, "lora.r": 4}


def test_nothing_is_left_for_another_worker(swept):
    assert not swept[0].take()


def test_trials_are_runs_of_one_group(swept):
    paths = swept[0].home.glob("trials/*/*/environment.json")
    environments = [json.loads(path.read_bytes()) for path in paths]
    assert {environment["WANDB_RUN_GROUP"] for environment in environments} == {"trivial"}
    assert len({environment["WANDB_NAME"] for environment in environments}) == 8


def test_shared_stages_are_built_once(swept):
    [shared] = swept[0].home.glob("shared/*/*.events")
    assert shared.read_text().split() == ["started", "ended"]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_kills_lose_and_double_nothing(kills, tmp_path):
    rates = [n * 1e-3 for n in range(1, kills * 3 // 2 + 1)]
    space, label = {"train.learning_rate": rates, "lora.r": [4, 8]}, '{"sleep": 1}'
    study = Study(tmp_path / "home", space=space, seeds=[1], set={"label": label})
    kill_at_random(study, workers=4, kills=kills, seed=0)
    assert study.each_point_once()
    assert study.count("started") > 2 * len(rates)
    assert not study.count("overlapped")
    assert (study.home / "notebooks" / "05_sweep_report.ipynb").is_file()


def test_a_killed_workers_trial_waits_for_its_run_and_keeps_its_seeds(tmp_path):
    longer_than_a_takeover = {"label": '{"sleep": 7}', "train.learning_rate": 1e-3}
    study = Study(tmp_path / "home", space={"lora.r": [4]}, set=longer_than_a_takeover)
    worker = study.worker()
    wait_for(lambda: (0, 2) in study.events())
    worker.kill()
    worker.wait()
    assert not study.take()  # its heartbeat is too young
    finished(study.worker())
    assert study.each_point_once()
    assert [trial.state for trial in study.trials()] == [FAIL, COMPLETE]
    assert study.events()[0, 1] == ["started", "ended"]
    assert study.events()[0, 2] == ["started", "ended"] * 2  # the lost run went on to its end


def test_a_worker_killed_before_its_first_heartbeat_loses_nothing(tmp_path):
    study = Study(tmp_path / "home", **ONE_POINT)
    sweep_study.queue_next(study.opened)
    study.study.ask()
    assert study.take()
    assert [trial.state for trial in study.trials()] == [FAIL, COMPLETE]


def test_a_worker_killed_while_it_queues_a_lost_trial_loses_nothing(tmp_path):
    study = Study(tmp_path / "home", **ONE_POINT)
    sweep_study.queue_next(study.opened)
    study.study.tell(study.study.ask().number, state=FAIL)
    assert study.take()
    assert not study.take()


def test_a_run_or_a_notebook_that_is_killed_is_done_again(tmp_path):
    label = '{"sleep": 2, "dies": [8]}'
    space, rate = {"lora.r": [4, 8]}, {"train.learning_rate": 1e-3}
    study = Study(tmp_path / "home", seeds=[1], space=space, set={"label": label} | rate)
    worker = study.worker()
    wait_for(lambda: (0, 1) in study.events())
    for run in processes_of(study, "tools.sweep_trial"):
        run.kill()
    output = finished(worker)
    assert "failed" not in output
    assert output.count("is queued again: its process was killed") == 2
    assert [trial.state for trial in study.trials()].count(COMPLETE) == 2


def test_a_stopped_worker_stops_its_run_and_its_trial_is_free_at_once(tmp_path):
    study = Study(tmp_path / "home", seeds=[1], **SLOW)
    worker = study.worker()
    wait_for(lambda: (0, 1) in study.events())
    worker.terminate()
    assert "the same command resumes it" in finished(worker)
    assert not processes_of(study, "tools.sweep_trial")
    assert study.take()
    assert study.events() == {(0, 1): ["started"]}


def test_what_interrupts_every_worker_is_given_up(tmp_path):
    def interrupt(trial):
        raise sweep_study.TrialError

    study = Study(tmp_path / "home", **ONE_POINT)
    for _ in range(sweep_study.MAX_RETRIES + 1):
        assert study.take(interrupt)
    assert not study.take(interrupt)
    assert "interrupted" in sweep_study.error_of(study.trials()[-1])
    assert sweep_study.retry_failed(study.opened) == 1
    assert study.take()


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_trial_that_was_taken_over_is_not_counted_twice(value, tmp_path, capsys):
    def lose(trial):
        study.study.tell(trial.number, state=FAIL)
        return value

    study = Study(tmp_path / "home", **ONE_POINT)
    assert study.take(lose)
    assert "taken over by another worker" in capsys.readouterr().out
    assert study.take(lambda trial: 2.0)
    assert [trial.value for trial in study.trials()] == [None, 2.0]


def test_an_error_of_the_sweep_itself_is_not_taken_for_a_lost_trial(tmp_path):
    study = Study(tmp_path / "home", **ONE_POINT)
    with pytest.raises(ZeroDivisionError):
        study.take(lambda trial: 1 / 0)


def test_two_processes_never_take_one_trial(tmp_path):
    study = Study(tmp_path / "home", **ONE_POINT)
    assert study.take(lambda trial: float(Study(tmp_path / "home", **ONE_POINT).take()))
    assert [trial.value for trial in study.trials()] == [0.0]


def test_a_failed_trial_has_its_error_and_stops_nothing(tmp_path):
    study = Study(tmp_path / "home", set={"label": '{"fails": [8]}'})
    output = finished(study.worker())
    assert "failed: rank 8 was told to fail" in output
    assert len(study.trials(COMPLETE)) == 2
    errors = {sweep_study.error_of(trial) for trial in study.trials(FAIL)}
    assert errors == {"rank 8 was told to fail"}
    assert sweep_study.device_seconds(study.trials(FAIL)) > 0


def test_failures_in_a_row_stop_the_sweep_and_can_be_tried_again(tmp_path):
    budget = {"consecutive_failures": 2}
    study = Study(tmp_path / "home", set={"label": '{"fails": [4, 8]}'}, budget=budget)
    process = study.run()
    output = finished(process)
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("error: 2 trials failed one after another")
    assert len(study.trials()) == 2
    assert sweep_study.retry_failed(study.opened) == 2
    assert sweep_study.retry_failed(study.opened) == 0  # they are queued already
    assert study.take()


def test_the_budget_of_hours_ends_it(tmp_path):
    study = Study(tmp_path / "home", budget={"hours": 1e-9})
    assert study.take()
    assert sweep_study.why_over(study.opened) == "the budget of 1e-09 device hours is spent"


def test_tpe_stays_in_its_space_and_never_repeats_another_worker(tmp_path):
    space = {"train.learning_rate": {"log_uniform": [1e-4, 1e-2]}, "lora.r": [4, 8]}
    tpe = {"sampler": "tpe", "space": space, "budget": {"trials": 12}}
    study = Study(tmp_path / "home", **tpe)

    def nested(trial):
        """While it runs, another process takes the next one."""
        return 1.0 + Study(tmp_path / "home", **tpe).take(nested)

    study.take(nested)
    rates = {trial.params["train.learning_rate"] for trial in study.trials(COMPLETE)}
    assert len(rates) == 12
    assert min(rates) >= 1e-4
    assert max(rates) <= 1e-2
    assert not study.take()


def test_every_test_set_evaluation_is_counted_once(tmp_path):
    study = Study(tmp_path / "home")
    for trial in (0, 0, 2):  # interrupted and resumed, then another winner
        sweep_study.record_test_evaluation(study.opened, {"trial": trial, "seed": 1})
    recorded = study.study.user_attrs["test_evaluations"]
    assert [evaluation["trial"] for evaluation in recorded] == [0, 2]


def test_of_equal_points_the_first_wins(tmp_path):
    study = Study(tmp_path / "home")
    for value in (2.0, 1.0, 1.0, 3.0):
        study.take(lambda trial, value=value: value)
    assert sweep_study.winner(study.opened).user_attrs["point"] == 1


def test_a_sweep_that_was_edited_is_not_mixed_with_its_old_study(tmp_path):
    Study(tmp_path / "home")
    with pytest.raises(ValueError, match=r"made with seeds \[1, 2\], not \[3\]"):
        Study(tmp_path / "home", seeds=[3])
    larger = Study(tmp_path / "home", budget={"trials": 4, "hours": 2})
    assert larger.study.user_attrs["sweep"]["budget"]["hours"] == 2


def test_a_study_of_an_earlier_version_is_refused(tmp_path):
    storage = sweep_study.open_storage("", tmp_path)
    old = optuna.create_study(study_name="old", storage=storage)
    old.set_user_attr("sweep", TRIVIAL | {"name": "old", "runner": "tools.run"})
    with pytest.raises(ValueError, match="made with study format null, not 2"):
        sweep_study.join("old", storage, tmp_path)
    with pytest.raises(ValueError, match="made with study format null, not 2"):
        Study(tmp_path, name="old")


def test_another_configuration_is_refused(tmp_path):
    study = Study(tmp_path / "home")
    changed = sweep_study.sweep_made_from(study.sweep) | {"resolved configuration": "another"}
    study.study.set_user_attr("made_from", changed)
    with pytest.raises(ValueError, match='resolved configuration "another", not'):
        sweep_study.join("trivial", study.opened.storage, study.home)


def test_a_study_that_is_not_there_is_one_sentence(tmp_path):
    process = command("work", "--study", "nope", "--home", tmp_path / "home")
    output = finished(process)
    assert process.returncode == 1
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("url", ["mysql://host/atlas", "host", "sqlite:///study.db"])
def test_another_storage_is_refused(url, tmp_path):
    with pytest.raises(ValueError, match="postgresql:// URL"):
        sweep_study.open_storage(url, tmp_path)


STORES = {
    "host:port/atlas": "The storage does not answer (its port is not a number); check --storage.",
    "localhost/atlas?foo=bar": 'The storage does not answer (invalid connection option "foo")',
    "": "study.db does not answer (file is not a database); restore it, or move it away",
}


@pytest.mark.parametrize(("address", "words"), STORES.items())
def test_a_storage_that_cannot_be_opened_is_one_sentence(address, words, tmp_path):
    (tmp_path / "study.db").write_bytes(b"damaged" * 1000)
    url = address and f"postgresql://me:canary@{address}"
    message = refusal(sweep_study.open_storage, url, tmp_path, kind=ConnectionError)
    assert words in message
    assert "canary" not in message


def test_a_study_that_is_damaged_inside_is_one_sentence(tmp_path):
    Study(tmp_path / "home")
    path = tmp_path / "home" / "study.db"
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"damaged!" * (len(whole) // 8 - 512))
    process = command("status", "--study", "trivial", "--home", tmp_path / "home")
    output = finished(process)
    assert (process.returncode, output.count("\n")) == (1, 1), output
    assert output.startswith(f"error: {path} does not answer (database disk image is malformed)")


def test_status_lists_values_and_errors(tmp_path):
    study = Study(tmp_path / "home", set={"label": '{"fails": [8]}'})
    finished(study.worker())
    output = finished(command("status", "--study", "trivial", "--home", tmp_path / "home"))
    assert "2 complete" in output.splitlines()[0]
    assert "2 fail" in output.splitlines()[0]
    assert "learning_rate 0.001, r 4" in output
    assert "failed: rank 8 was told to fail" in output


# --- runs and devices -----------------------------------------------------------------------------


def test_other_data_are_another_shared_folder(tmp_path):
    space = {"data.n_samples": [100, 200], "lora.r": [4]}
    study = Study(tmp_path / "home", space=space, set={"train.learning_rate": 1e-3}, seeds=[1])
    finished(study.worker())
    assert len(list((tmp_path / "home" / "shared").glob("*/ready"))) == 2


def test_a_run_begins_as_a_copy_and_keeps_what_it_wrote(tmp_path):
    shared, out = tmp_path / "shared", tmp_path / "trials" / "out"
    (shared / "01_data_prep").mkdir(parents=True)
    file = Path("01_data_prep", "train.jsonl")
    (shared / file).write_text("shared")
    (tmp_path / "trials" / "out.part" / "01_data_prep").mkdir(parents=True)  # of a killed copy
    sweep_trial.copy_once(shared, out)
    assert (out / file).read_text() == "shared"
    (out / file).write_text("own")
    sweep_trial.copy_once(shared, out)
    assert (out / file).read_text() == "own"
    assert (shared / file).read_text() == "shared"


def test_a_worker_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    """By UUID, whatever CUDA_VISIBLE_DEVICES calls it."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'GPU-aa\\nGPU-bb\\nGPU-cc\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep_worker.gpus() == ["GPU-aa", "GPU-bb", "GPU-cc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert sweep_worker.gpus() == ["GPU-cc", "GPU-aa"]
    opened = Study(tmp_path / "home").opened
    with sweep_worker.contextlib.ExitStack() as stack:
        taken = [sweep_worker.take_device(stack, opened).environment for _ in range(2)]
    assert [given["CUDA_VISIBLE_DEVICES"] for given in taken] == ["GPU-cc", "GPU-aa"]


def test_the_cells_that_train_and_generate_are_tagged():
    """An untagged cell would count as overhead."""
    tags = {
        stage: [
            tag
            for cell in jupytext.read(ROOT / "notebooks" / f"{stage}.py").cells
            for tag in cell.metadata.get("tags", [])
            if tag in sweep_trial.WORK_TAGS
        ]
        for stage in ("03_sft_train", "04_ifeval_eval")
    }
    assert tags == {"03_sft_train": ["train", "sample-responses"], "04_ifeval_eval": ["generate"]}


def test_the_time_of_a_run_is_split_by_tags(tmp_path):
    cells = [
        {"metadata": {"tags": tags, "papermill": {"duration": seconds}}}
        for tags, seconds in ((["train"], 60.0), ([], 3.0), (["keep"], None), ([], 4.0))
    ]
    (tmp_path / "notebooks").mkdir()
    path = tmp_path / "notebooks" / "03_sft_train.ipynb"
    path.write_text(json.dumps({"cells": cells}), "utf-8")
    found = sweep_trial.time_by_part(definition.load_sweep("lr_rank"), tmp_path)
    assert found == {"03_sft_train: train": 60.0, "03_sft_train: other cells": 7.0}


def test_an_unusable_result_is_an_error_not_a_value(tmp_path):
    found = definition.validate_sweep(TRIVIAL | {"name": "trivial"})
    with pytest.raises(RuntimeError, match="results are missing"):
        sweep_trial.collect_results(found, tmp_path, 1.0)


# --- the report -----------------------------------------------------------------------------------


def a_row(number: int, passed: list[list[int]], **varied) -> dict:
    """A complete trial with verdicts a seed; its losses follow its number."""
    runs = {
        str(seed): {
            "dev_strict": sum(scores) / len(scores),
            "base_dev_strict": 0.1,
            "dev_inst_strict": 0.5,
            "validation_loss": 1 + number / 10,
            "verdicts": [[key, score] for key, score in enumerate(scores)],
            "curve": [[step, 3 - step / 10 + number / 10] for step in range(10)],
            "seconds": 90.0,
            "parts": {"03_sft_train: train": 60.0, "03_sft_train: other cells": 3.0},
        }
        for seed, scores in enumerate(passed)
    }
    value = sum(run["dev_strict"] for run in runs.values()) / len(runs)
    row = {"number": number, "state": "COMPLETE", "value": value, "error": None, "trials": 1}
    return row | {"point": varied, "varied": varied, "runs": runs, "seconds": 180.0}


def an_export(rows: list[dict]) -> dict:
    given = TRIVIAL | {"name": "trivial", "stages": ["03_sft_train", "04_ifeval_eval"]}
    given |= {"objective": {"metric": "dev_strict", "direction": "maximize"}, "seeds": [0, 1]}
    export = {"study": "trivial", "trials": rows, "importance": {"lora.r": 1.0}}
    export |= {
        "sweep": definition.validate_sweep(given).model_dump(mode="json"),
        "device_hours": 0.2,
    }
    evaluations = [{"trial": 0, "seed": 1, "at": "2026-01-01"}]
    return export | {"test_evaluations": evaluations, "final": None}


def passing(n: int, of: int = 40) -> list[int]:
    return [1] * n + [0] * (of - n)


@pytest.fixture
def four_points():
    scores = {0: (30, 31), 1: (10, 11), 2: (29, 30), 3: (9, 10)}
    values = [(1e-3, 4), (1e-3, 8), (2e-3, 4), (2e-3, 8)]
    return an_export(
        [
            a_row(n, [passing(s) for s in scores[n]], **{"train.learning_rate": lr, "lora.r": r})
            for n, (lr, r) in enumerate(values)
        ]
    )


def verdicts(rows: list[dict]) -> dict[int, str]:
    return {c["trial"]: c["verdict"] for c in analysis.compare_best(rows)}


def test_only_a_real_difference_is_called_better(four_points):
    rows = analysis.ranked(four_points)
    assert [row["number"] for row in rows] == [0, 2, 1, 3]
    assert verdicts(rows) == {2: "not distinguishable", 1: "better", 3: "better"}


def test_the_noise_of_the_seeds_is_that_of_all_points():
    """The seeds of a point may agree by chance while those of the others differ by 30 prompts."""
    quiet = [a_row(0, [passing(35)] * 2, x=0), a_row(1, [passing(15)] * 2, x=1)]
    noisy = [a_row(n, [passing(0), passing(30)], x=n) for n in range(2, 6)]
    assert verdicts(quiet) == {1: "better"}
    found = analysis.compare_best([*quiet, *noisy])
    assert found[0]["p_prompts"] < 0.05 <= found[0]["p_seeds"]
    assert found[0]["verdict"] == "not distinguishable"


def test_more_points_to_choose_from_take_more_to_convince():
    """Eight wins of eight, p = 0.008, would survive the four pairs shown, but ten were possible."""
    best, other = (a_row(n, [passing(n), passing(n)], x=n) for n in (18, 10))
    assert verdicts([best, other]) == {10: "better"}
    more = [a_row(n, [passing(10)] * 2, x=n) for n in range(2, 5)]
    assert set(verdicts([best, other, *more]).values()) == {"not distinguishable"}


def test_fewer_prompts_won_is_never_better():
    """A higher mean by a few prompts that both seeds win, against many that one seed loses."""
    ours = [[1] * 12 + [0] * 28, [1] * 12 + [0] * 28]
    theirs = [[0] * 12 + [1] * 20 + [0] * 8, [0] * 40]
    [found] = analysis.compare_best([a_row(0, ours, x=0), a_row(1, theirs, x=1)])
    assert found["difference"] > 0 and found["won"] < found["lost"]
    assert found["verdict"] == "not distinguishable"


def test_one_seed_is_not_tested():
    rows = [a_row(0, [passing(40)], x=0), a_row(1, [passing(2)], x=1)]
    [found] = analysis.compare_best(rows)
    assert found["p_prompts"] < 0.05
    assert (found["p_seeds"], found["verdict"]) == (None, "not tested: one seed")
    assert list(analysis.best_table([found], rows)["p_seeds"]) == ["-"]


def test_points_are_judged_by_the_objective_of_the_sweep(four_points):
    """The losses of the fixture follow the number of the point, not its accuracy."""
    rows = sorted(four_points["trials"], key=lambda row: row["number"])
    for row in rows:
        for seed, run in row["runs"].items():
            run["validation_loss"] += 0.001 * int(seed)
    found = analysis.compare_best(rows, "validation_loss")
    assert {c["trial"]: c["verdict"] for c in found} == dict.fromkeys((1, 2, 3), "better")
    assert [round(c["difference"], 6) for c in found] == [-0.1, -0.2, -0.3]
    assert "p_prompts" not in found[0]
    for row in rows:
        for run in row["runs"].values():
            del run["verdicts"]  # a sweep of stage 03 only
    assert analysis.compare_best(rows, "validation_loss") == found
    [said] = analysis.smallest_differences(rows, "validation_loss", 0.05)
    assert said.startswith("seeds: a difference in validation_loss below 0.00")


def test_the_seeds_test_is_tukeys():
    draw = random.Random(1)
    scores = [[draw.gauss(point / 2, 1) for _ in range(3)] for point in range(5)]
    rows = [
        a_row(n, [passing(1)] * 3, x=n) | {"runs": {str(i): {"m": x} for i, x in enumerate(given)}}
        for n, given in enumerate(scores)
    ]
    expected = stats.tukey_hsd(*scores)
    assert analysis.seed_p_values(rows, "m") == pytest.approx(expected.pvalue[0, 1:])
    bounds = expected.confidence_interval(0.95)
    [said] = analysis.smallest_differences(rows, "m", 0.05)
    assert f"below {(bounds.high - bounds.low)[0, 1] / 2:.4f} is" in said


def test_what_the_prompts_of_a_sweep_can_show(four_points):
    rows = analysis.ranked(four_points)
    said = analysis.smallest_differences(rows, "dev_strict", 0.05)
    assert said[1].startswith("prompts: the smallest effect that 40 prompts show with 80 % power")
    assert "corrected for 6 pairs" in said[1]


def test_the_best_of_many_is_too_high():
    draw = random.Random(2)
    rows = [a_row(n, [[draw.random() < 0.3 for _ in range(121)]], x=n) for n in range(12)]
    many, one = analysis.winners_optimism(rows), analysis.winners_optimism(rows[:1])
    assert 0.01 < many < 0.08
    assert abs(one) < 0.003


def test_different_prompts_are_not_compared():
    rows = [a_row(0, [passing(3, 5)], x=0), a_row(1, [passing(3, 6)], x=1)]
    with pytest.raises(ValueError, match="different prompts"):
        analysis.compare_best(rows)


@pytest.mark.parametrize("config", ["sft_qwen05b", "sft_qwen05b_fast"])
@pytest.mark.parametrize("overlay", ["", "offline"])
def test_the_winner_as_a_recipe_is_the_winner(config, overlay, four_points, tmp_path, monkeypatch):
    four_points["sweep"] |= {"config": config, "overlay": overlay, "set": {"data.n_samples": 70}}
    best = analysis.ranked(four_points)[0]
    recipe = analysis.winner_yaml(four_points, best)
    won = load_config(config, overlay, {"data.n_samples": 70} | best["point"])
    folder = shutil.copytree(CONFIGS, tmp_path / "configs")
    (folder / "winner.yaml").write_text(recipe, "utf-8")
    monkeypatch.setattr("atlas_lib.config.CONFIGS", folder)
    assert load_config("winner").as_dict() == won.as_dict()


def test_the_parameter_that_matters_is_the_important_one():
    study = optuna.create_study()
    for rate, rank in ((1, 4), (1, 8), (2, 4), (2, 8)):
        study.enqueue_trial({"rate": rate, "rank": rank})
    study.optimize(
        lambda trial: trial.suggest_int("rate", 1, 2) + 9 * trial.suggest_int("rank", 4, 8),
        n_trials=4,
    )
    shares = sweep.importance(study)
    assert shares["rank"] > 0.8
    assert shares["rate"] < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 1])
def test_the_report_page(n, four_points, tmp_path):
    from atlas_lib import notebooks

    four_points["trials"] = four_points["trials"][:n]
    (tmp_path / "study.json").write_text(json.dumps(four_points), "utf-8")
    parameters = {"CONFIG": "sft_qwen05b", "OVERLAY": "offline", "SET": {}}
    page = json.loads(notebooks.execute("05_sweep_report", tmp_path, parameters).read_bytes())
    outputs = [out for cell in page["cells"] for out in cell.get("outputs", [])]
    shown = json.dumps(outputs)
    assert "learning_rate 0.001, r 4 is first with dev_strict" in shown
    assert "test-set evaluations: 1" in shown
    assert ("better than 2 of the 3 other points" if n == 4 else "not tested") in shown
    assert "too high by up to" in shown
    assert shown.count("image/png") >= 3
    assert yaml.safe_load((tmp_path / "winner.yaml").read_text("utf-8"))["lora"]["r"] == 4
