"""Sweeps: what a file may say, who works on what, and that nothing is lost, doubled or peeked at.

Studies here run in real processes on the journal file, with a runner that needs no model
(trivial_run.py); test_sweep_postgres.py does the same on a database server.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import optuna
import psutil
import pytest
import yaml
from sweep_studies import TRIVIAL, Study, command, finished, kill_at_random, starts, wait_for

from atlas_lib.config import CONFIGS, load_config
from atlas_lib.evaluate import ifeval
from atlas_lib.sweep import analysis, definition
from tools import dev_prompts, sweep_storage, sweep_study, sweep_trial, sweep_worker

ROOT = Path(__file__).resolve().parents[2]
OFFICIAL_PROMPTS = ROOT.parent / "shared" / "data" / "ifeval_input_data.jsonl"
COMPLETE, FAIL = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL

# --- the files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", definition.available())
def test_a_shipped_sweep_is_valid(name):
    sweep = definition.load(name)
    config = load_config(
        sweep.config,
        sweep.overlay,
        definition.overrides(
            sweep, {k: definition.encode(v[0]) for k, v in sweep.space.items()}, 7
        ),
    )
    assert config.eval.prompts == sweep.prompts
    assert config.output.hub_repo is None
    assert config.train.seed == 7
    assert config.eval.formats == ["chat"]


def test_the_shipped_sweeps_ask_what_they_say():
    assert {"lr_rank", "targets", "rows", "lr_rank_offline"} == set(definition.available())
    assert definition.load("lr_rank").space == {
        "train.learning_rate": [5e-5, 1e-4, 2e-4, 5e-4],
        "lora.r": [8, 16, 32],
    }
    assert definition.n_trials(definition.load("lr_rank_offline")) <= 12


ERRORS = {
    "unknown key": ({"spcae": {}}, "Unknown key 'spcae'; the nearest known one is 'space'."),
    "missing key": ({"objective": None}, "objective is None"),
    "unknown parameter": ({"space": {"lora.rank": [1]}}, "Unknown key 'lora.rank'"),
    "a section": ({"space": {"lora": [{"r": 4}]}}, "lora is a section"),
    "wrong type": ({"space": {"lora.r": ["many"]}}, "lora.r is 'many'"),
    "empty space": ({"space": {}}, "space is {}"),
    "empty values": ({"space": {"lora.r": []}}, "space.lora.r is empty"),
    "one value, no list": ({"space": {"lora.r": 4}}, "space.lora.r must be a list"),
    "duplicates": ({"space": {"lora.r": [4, 8, 4]}}, "space.lora.r lists 4 twice"),
    "duplicates in words": (
        {"space": {"train.learning_rate": [1e-3, "1e-3"]}},
        "space.train.learning_rate lists 0.001 twice",
    ),
    "reversed bounds": (
        {"sampler": "tpe", "space": {"train.learning_rate": {"log_uniform": [1e-2, 1e-3]}}},
        "0 < low < high",
    ),
    "a range in a grid": (
        {"space": {"train.learning_rate": {"log_uniform": [1e-4, 1e-3]}}},
        "a grid cannot list",
    ),
    "an objective nobody writes": (
        {"objective": {"metric": "accuracy", "direction": "maximize"}},
        "'accuracy', which no stage writes",
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
        "would take the worst; minimize validation_loss",
    ),
    "negative budget": ({"budget": {"trials": -3}}, "budget.trials is -3"),
    "no hours": ({"budget": {"hours": 0}}, "budget.hours is 0"),
    "endless": ({"sampler": "tpe"}, "budget.trials is not set"),
    "unknown stage": ({"stages": ["05_dpo"]}, "stages has '05_dpo'"),
    "no seeds": ({"seeds": []}, "seeds is []"),
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
        "follows lora.bias, which is no number",
    ),
    "unknown overlay": ({"overlay": "nope"}, "Unknown config 'nope'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_wrong_file_is_one_sentence(name):
    changes, words = ERRORS[name]
    with pytest.raises(ValueError, match=r".") as caught:
        definition.validate(TRIVIAL | {"name": "wrong"} | changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_key_says_which():
    with pytest.raises(ValueError, match="does not set 'objective'"):
        definition.validate({k: v for k, v in TRIVIAL.items() if k != "objective"} | {"name": "x"})


def test_a_rank_takes_its_alpha_along():
    sweep = definition.load("lr_rank")
    chosen = definition.overrides(sweep, {"train.learning_rate": 1e-4, "lora.r": 32}, seed=1)
    assert chosen["lora.lora_alpha"] == 64


def test_a_list_survives_the_storage():
    sweep = definition.load("targets")
    seven = sweep.space["lora.target_modules"][1]
    stored = {"lora.target_modules": definition.encode(seven)}
    assert definition.overrides(sweep, stored, 1)["lora.target_modules"] == seven


# --- the dev prompts ------------------------------------------------------------------------------


def test_the_dev_prompts_are_the_ones_that_their_script_writes():
    rows = [json.loads(line) for line in dev_prompts.PATH.read_text("utf-8").splitlines()]
    assert rows == dev_prompts.prompts()


def test_the_dev_prompts_are_usable_and_all_different():
    prompts = ifeval.load_prompts(str(dev_prompts.PATH), None)
    assert len({p["prompt"] for p in prompts}) == len(prompts) >= 100


def test_no_dev_prompt_is_a_test_prompt():
    if not OFFICIAL_PROMPTS.is_file():
        pytest.skip(f"NOT TESTED: IFEval's own prompts are not at {OFFICIAL_PROMPTS}")
    official = {p["prompt"].strip() for p in ifeval.load_prompts(str(OFFICIAL_PROMPTS), None)}
    assert not official & {p["prompt"].strip() for p in dev_prompts.prompts()}


# --- studies --------------------------------------------------------------------------------------


def write_sweep(folder: Path, **changes) -> Path:
    path = folder / "trivial.yaml"
    path.write_text(yaml.safe_dump(TRIVIAL | changes), "utf-8")
    return path


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A study that one worker has gone through, and what the worker said."""
    study = Study(tmp_path_factory.mktemp("sweep") / "home")
    return study, finished(study.worker())


def test_a_sweep_runs_each_point_and_seed_once(swept):
    study, output = swept
    assert "every trial is taken" in output
    assert study.each_point_once()
    assert starts(study) == {0: 1, 1: 1, 2: 1, 3: 1}
    for trial in study.trials():
        losses = [run["validation_loss"] for run in sweep_study.runs(trial).values()]
        assert trial.value == pytest.approx(sum(losses) / 2)
        assert len(set(losses)) == 2
    assert study.study.best_params == {"train.learning_rate": 1e-3, "lora.r": 4}


def test_nothing_is_left_for_another_worker(swept):
    assert "every trial is taken" in swept[0].claim()


def test_trials_are_runs_of_one_group(swept):
    told = [json.loads(p.read_bytes()) for p in swept[0].home.glob("trials/*/*/environment.json")]
    assert {environment["WANDB_RUN_GROUP"] for environment in told} == {"trivial"}
    assert len({environment["WANDB_NAME"] for environment in told}) == 8


def test_shared_stages_are_built_once(swept):
    [shared] = (swept[0].home / "shared").glob("*/starts.txt")
    assert shared.read_text() == "started\n"


def test_killed_workers_lose_and_double_nothing(tmp_path):
    rates = [n * 1e-3 for n in range(1, 13)]
    study = Study(
        tmp_path / "home",
        space={"train.learning_rate": rates, "lora.r": [4, 8]},
        seeds=[1],
        set={"label": '{"sleep": 0.1}'},
    )
    kill_at_random(study, workers=3, kills=5, seed=0)
    assert study.each_point_once()
    assert len(study.trials()) == 24  # an interrupted trial is taken over, not replaced


def test_a_lost_trial_is_taken_over_in_its_own_folder(tmp_path):
    study = Study(tmp_path / "home", seeds=[1], space={"lora.r": [4]}, set=SLOW)
    first = study.worker()
    wait_for(lambda: starts(study) == {0: 1})
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    # Its run goes on by itself and keeps the trial, so that two never write into one folder.
    assert study.claim() is None
    assert finished(study.worker())
    [trial] = study.trials()
    assert trial.state == COMPLETE
    assert trial.user_attrs["deaths"] == 1
    assert starts(study) == {0: 2}


SLOW = {"label": '{"sleep": 3}', "train.learning_rate": 1e-3}


def test_a_seed_that_is_recorded_is_not_run_again(tmp_path):
    study = Study(tmp_path / "home", space={"lora.r": [4]}, set=SLOW)
    worker = study.worker()
    second = tmp_path / "home" / "trials" / "0000" / "seed-2" / "starts.txt"
    wait_for(second.is_file)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    finished(study.worker())
    assert study.each_point_once()
    assert starts(study) == {0: 1}
    assert second.read_text() == "started\n" * 2


def test_a_run_that_is_killed_is_done_again(tmp_path):
    study = Study(tmp_path / "home", seeds=[1], space={"lora.r": [4]}, set=SLOW)
    worker = study.worker()
    wait_for(lambda: starts(study) == {0: 1})
    [run] = psutil.Process(worker.pid).children()
    run.kill()
    assert "failed" not in finished(worker)
    assert study.each_point_once()
    assert starts(study) == {0: 2}


def test_the_runner_says_that_a_notebook_was_killed_as_the_sweep_expects():
    assert sweep_trial.KILLED in (ROOT / "atlas_lib" / "notebooks.py").read_text("utf-8")


def test_stopping_a_worker_stops_its_run_and_is_no_death(tmp_path):
    study = Study(tmp_path / "home", seeds=[1], space={"lora.r": [4]}, set=SLOW)
    worker = study.worker()
    wait_for(lambda: starts(study) == {0: 1})
    worker.terminate()
    assert "the same command goes on" in finished(worker)
    claimed = study.claim()  # at once: nobody holds it any more
    assert claimed.trial.number == 0
    assert claimed.trial.user_attrs["deaths"] == 0
    claimed.lease.close()


def test_what_kills_every_worker_is_given_up(tmp_path):
    study = Study(tmp_path / "home", space={"lora.r": [4]}, set={"train.learning_rate": 1e-3})
    for _ in range(sweep_study.MOST_DEATHS + 1):
        study.claim().lease.close()  # the lease ends, the trial has not: as after a kill
    assert "every trial is taken" in study.claim()
    [trial] = study.trials()
    assert trial.state == FAIL
    assert "died" in trial.user_attrs["error"]


def test_a_held_trial_is_nobody_elses(tmp_path):
    study = Study(tmp_path / "home", space={"lora.r": [4]}, set={"train.learning_rate": 1e-3})
    first = study.claim()
    assert study.claim() is None
    with first.lease:
        assert sweep_study.complete(study.study, first.trial, 1.0)
    assert "every trial is taken" in study.claim()


def test_a_trial_that_another_worker_ended_is_not_counted_again(tmp_path):
    study = Study(tmp_path / "home", space={"lora.r": [4]}, set={"train.learning_rate": 1e-3})
    claimed = study.claim()
    assert sweep_study.complete(study.study, claimed.trial, 1.0)
    assert not sweep_study.complete(study.study, claimed.trial, 2.0)
    assert study.study.best_value == 1.0


def test_a_failed_trial_has_its_error_and_stops_nothing(tmp_path):
    study = Study(tmp_path / "home", set={"label": '{"fails": [8]}'})
    output = finished(study.worker())
    assert "failed: rank 8 was told to fail" in output
    assert len(study.trials(COMPLETE)) == 2
    assert {t.user_attrs["error"] for t in study.trials(FAIL)} == {"rank 8 was told to fail"}
    assert all(sweep_study.spent_hours(trial) > 0 for trial in study.trials(FAIL))


def test_failures_in_a_row_stop_the_sweep_and_can_be_tried_again(tmp_path):
    path, home = write_sweep(tmp_path, set={"label": '{"fails": [4, 8]}'}), tmp_path / "home"
    path.write_text(path.read_text("utf-8") + "budget: {consecutive_failures: 2}\n", "utf-8")
    process = command("run", path, "--home", home)
    output = finished(process)
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("error: 2 trials failed one after another")
    study = sweep_study.join("trivial", sweep_storage.open_storage("", home))[0]
    assert len(study.get_trials()) == 2
    held = sweep_storage.locks(study._storage, study, home)
    assert sweep_study.retry_failed(study, held) == 2
    assert sweep_study.retry_failed(study, held) == 0  # they are queued already


def test_the_budget_of_hours_ends_it(tmp_path):
    study = Study(tmp_path / "home", budget={"hours": 0.5})
    first = study.claim()
    with first.lease:
        first.trial.set_user_attr("seed 1", {"seconds": 3600})
        sweep_study.complete(study.study, first.trial, 1.0)
    assert study.claim() == "the budget of 0.5 device hours is spent"


def test_a_grid_larger_than_its_budget_tries_different_points(tmp_path):
    study = Study(tmp_path / "home", budget={"trials": 3})
    claims = [study.claim() for _ in range(3)]
    assert len({json.dumps(c.trial.params, sort_keys=True) for c in claims}) == 3
    assert study.claim() is None
    for claimed in claims:
        claimed.lease.close()


def test_tpe_stays_in_its_space_and_never_repeats_another_worker(tmp_path):
    space = {"train.learning_rate": {"log_uniform": [1e-4, 1e-2]}, "lora.r": [4, 8]}
    study = Study(tmp_path / "home", sampler="tpe", space=space, budget={"trials": 12})
    claims = [study.claim() for _ in range(12)]
    rates = {c.trial.params["train.learning_rate"] for c in claims}
    assert len(rates) == 12
    assert min(rates) >= 1e-4
    assert max(rates) <= 1e-2
    for number, claimed in enumerate(claims):
        with claimed.lease:
            sweep_study.complete(study.study, claimed.trial, float(number))
    assert "every trial is taken" in study.claim()


def test_every_look_at_the_test_prompts_is_counted_once(tmp_path):
    study = Study(tmp_path / "home")
    for trial in (0, 0, 2):  # interrupted and continued, then another winner
        sweep_study.record_look(study.study, study.held, {"trial": trial, "seed": 1})
    assert [look["trial"] for look in study.study.user_attrs["looks"]] == [0, 2]


def test_of_equal_points_the_first_wins(tmp_path):
    study = Study(tmp_path / "home")
    for value in (2.0, 1.0, 1.0, 3.0):
        claimed = study.claim()
        with claimed.lease:
            sweep_study.complete(study.study, claimed.trial, value)
    assert sweep_study.winner(study.study, study.sweep).number == 1


@pytest.mark.slow
def test_killed_workers_are_replaced_until_the_sweep_is_over(tmp_path):
    """The only worker is killed, more than once; the command that started it sees it through."""
    path, home = (
        write_sweep(tmp_path, set={"label": '{"sleep": 0.5}'}, seeds=[1]),
        tmp_path / "home",
    )
    sweep = command("run", path, "--home", home, "--workers", "1")
    for number in (0, 1):
        wait_for(lambda number=number: (home / "trials" / f"{number:04d}").is_dir())
        [worker] = psutil.Process(sweep.pid).children()
        worker.kill()
    output = finished(sweep)
    assert sweep.returncode == 0, output
    exported = json.loads((home / "study.json").read_bytes())
    assert [row["state"] for row in exported["trials"]] == ["COMPLETE"] * 4
    assert (home / "notebooks" / "05_sweep_report.ipynb").is_file()


def test_a_sweep_that_was_edited_is_not_mixed_with_its_old_study(tmp_path):
    Study(tmp_path / "home")
    with pytest.raises(ValueError, match="made with another seeds"):
        Study(tmp_path / "home", seeds=[3])
    larger = Study(tmp_path / "home", budget={"trials": 4, "hours": 2})
    assert larger.study.user_attrs["sweep"]["budget"]["hours"] == 2


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
        sweep_storage.open_storage(url, tmp_path)


def test_a_line_that_a_power_cut_tore_is_cut_away(tmp_path):
    study = Study(tmp_path / "home")
    study.claim().lease.close()
    journal = tmp_path / "home" / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "worker')
    again = Study(tmp_path / "home")
    again.study.set_user_attr("touched", 1)
    assert journal.read_bytes().startswith(whole + b'{"op_code"')
    assert Study(tmp_path / "home").study.user_attrs["touched"] == 1


# --- shared stages and places ---------------------------------------------------------------------


def test_other_data_are_another_shared_folder(tmp_path):
    space = {"data.n_samples": [100, 200], "lora.r": [4]}
    study = Study(tmp_path / "home", space=space, set={"train.learning_rate": 1e-3}, seeds=[1])
    finished(study.worker())
    assert len(list((tmp_path / "home" / "shared").glob("*/ready"))) == 2


def test_borrowed_stages_are_links_and_results_of_a_trial_stay(tmp_path):
    shared, out = tmp_path / "shared", tmp_path / "out"
    for folder, name in (("01_data_prep", "train.jsonl"), ("notebooks", "01.ipynb")):
        (shared / folder).mkdir(parents=True)
        (shared / folder / name).write_text("shared")
    (out / "notebooks").mkdir(parents=True)
    (out / "notebooks" / "03.ipynb").write_text("own")
    (out / "01_data_prep.part").mkdir()  # of a copy that was killed
    for _ in range(2):
        sweep_trial.borrow(shared, out)
    assert (out / "01_data_prep" / "train.jsonl").samefile(shared / "01_data_prep/train.jsonl")
    assert not (out / "notebooks" / "01.ipynb").samefile(shared / "notebooks" / "01.ipynb")
    assert (out / "notebooks" / "03.ipynb").read_text() == "own"
    assert not list(out.glob("*.part"))


def test_a_worker_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    """By name: a process that is given number 0 would count the others and spread over them."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'GPU-aa\\nGPU-bb\\nGPU-cc\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep_worker.gpus() == ["GPU-aa", "GPU-bb", "GPU-cc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert sweep_worker.gpus() == ["GPU-cc", "GPU-aa"]
    sweep = definition.validate(TRIVIAL | {"name": "trivial"})
    with sweep_worker.contextlib.ExitStack() as stack:
        taken = [sweep_worker.take_slot(stack, sweep, tmp_path)[1] for _ in range(2)]
    assert taken == [{"CUDA_VISIBLE_DEVICES": "GPU-cc"}, {"CUDA_VISIBLE_DEVICES": "GPU-aa"}]


def test_the_cells_that_train_and_ask_are_found_in_the_pages(tmp_path):
    """Their calls are named in sweep_trial: renamed in a notebook, its work would be overhead."""
    sweep = definition.load("lr_rank")
    for stage in sweep.stages:
        page = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_bytes())
        for cell in page["cells"]:
            cell["metadata"]["papermill"] = {"duration": 1.0}
        page["metadata"]["papermill"] = {"duration": len(page["cells"]) + 3.0}
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        (tmp_path / "notebooks" / f"{stage}.ipynb").write_text(json.dumps(page), "utf-8")
    found = sweep_trial.parts(sweep, tmp_path, seconds=1000.0)
    assert found["03_sft_train: training"] == found["03_sft_train: sample answers"] == 1.0
    assert found["04_ifeval_eval: answers"] == 1.0
    assert found["03_sft_train: kernel"] == found["04_ifeval_eval: kernel"] == 3.0
    assert sum(found.values()) == 1000.0


def test_an_unusable_result_is_an_error_not_a_value(tmp_path):
    sweep = definition.validate(TRIVIAL | {"name": "trivial"})
    with pytest.raises(RuntimeError, match="results are not there"):
        sweep_trial.collect(sweep, tmp_path)


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
            "shared_seconds": 1.0,
            "ask_seconds": 0.1,
            "parts": {
                "03_sft_train: training": 60.0,
                "03_sft_train: kernel": 3.0,
                "processes": 5.0,
            },
        }
        for seed, scores in enumerate(passed)
    }
    value = sum(run["dev_strict"] for run in runs.values()) / len(runs)
    row = {"number": number, "state": "COMPLETE", "value": value, "params": varied}
    row |= {"point": varied, "varied": varied, "runs": runs, "error": None, "deaths": 0}
    row |= {"failed_seconds": 0.0}
    return row | {"retried": False}


def an_export(rows: list[dict]) -> dict:
    sweep = TRIVIAL | {"name": "trivial", "stages": ["03_sft_train", "04_ifeval_eval"]}
    sweep |= {"objective": {"metric": "dev_strict", "direction": "maximize"}, "seeds": [0, 1]}
    given = definition.validate(sweep).model_dump(mode="json")
    export = {"study": "trivial", "sweep": given, "trials": rows, "shared_seconds": 30.0}
    return export | {"looks": [{"trial": 0, "seed": 1, "at": "2026-01-01"}], "final": None}


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
    return {c["trial"]: c["verdict"] for c in analysis.comparisons(rows)}


def test_only_a_real_difference_is_called_better(four_points):
    rows = analysis.points(four_points)
    assert [row["number"] for row in rows] == [0, 2, 1, 3]
    assert verdicts(rows) == {2: "not distinguishable", 1: "better", 3: "better"}


def test_seeds_that_overlap_forbid_the_word():
    rows = [a_row(0, [passing(40), passing(10)], x=1), a_row(1, [passing(12), passing(12)], x=2)]
    [found] = analysis.comparisons(rows)
    assert found["p_adjusted"] < 0.05
    assert found["verdict"] == "not distinguishable"


def test_more_points_to_choose_from_take_more_to_convince():
    """Eight wins of eight, p = 0.008, would survive the four pairs shown, but ten were possible."""
    best, other = a_row(0, [passing(18)], x=0), a_row(1, [passing(10)], x=1)
    assert verdicts([best, other]) == {1: "better"}
    more = [a_row(n, [passing(10)], x=n) for n in range(2, 5)]
    assert set(verdicts([best, other, *more]).values()) == {"not distinguishable"}


def test_different_prompts_are_not_compared():
    with pytest.raises(ValueError, match="different prompts"):
        analysis.compare(a_row(0, [passing(3, 5)]), a_row(1, [passing(3, 6)]))


@pytest.mark.parametrize("config", ["sft_qwen05b", "sft_qwen05b_fast"])
@pytest.mark.parametrize("overlay", ["", "offline"])
def test_the_winner_as_a_recipe_is_the_winner(config, overlay, four_points, tmp_path, monkeypatch):
    four_points["sweep"] |= {"config": config, "overlay": overlay, "set": {"data.n_samples": 70}}
    best = analysis.points(four_points)[0]
    recipe = analysis.winner_yaml(four_points, best)
    won = load_config(config, overlay, {"data.n_samples": 70} | best["point"])
    folder = shutil.copytree(CONFIGS, tmp_path / "configs")
    (folder / "winner.yaml").write_text(recipe, "utf-8")
    monkeypatch.setattr(config, "FOLDER", folder)
    assert load_config("winner").as_dict() == won.as_dict()


def test_costs_and_overhead(four_points):
    assert analysis.device_hours(four_points) == pytest.approx((8 * 90 + 30) / 3600)
    assert analysis.overhead(four_points)["overhead"] == pytest.approx(8.1)


def test_the_parameter_that_matters_is_the_important_one(four_points):
    shares = analysis.importance(four_points)
    assert shares["lora.r"] > 0.8
    assert shares["train.learning_rate"] < 0.2


def test_status_is_for_reading(four_points):
    text = analysis.as_text(four_points)
    assert "trivial: 4 complete; 1 looks at test" in text
    assert "learning_rate 0.001, r 4" in text


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
    assert "looks at the test prompts: 1" in shown
    assert shown.count("image/png") >= 3
    assert yaml.safe_load((tmp_path / "winner.yaml").read_text("utf-8"))["lora"]["r"] == 4
