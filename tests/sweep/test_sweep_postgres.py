"""Sweeps on a real PostgreSQL server, as many machines share it: nothing lost, nothing doubled."""

from pathlib import Path

import postgres
import pytest
from sweep_studies import Study, command, finished, kill_at_random, wait_for

from tools import sweep_study

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(
        postgres.programs() is None,
        reason="NOT TESTED: no PostgreSQL server; install one: apt-get install postgresql",
    ),
]
SMALL = {"seeds": [1], "space": {"lora.r": [4]}}


@pytest.fixture(scope="module")
def url():
    with postgres.server() as server:
        yield server.url


@pytest.fixture
def study(url, tmp_path, request):
    def make(machine: str = "home", **changes) -> Study:
        return Study(tmp_path / machine, url, name=request.node.name, **changes)

    return make


def test_20_kills_lose_and_double_nothing(study):
    rates = [n * 1e-3 for n in range(1, 31)]
    space, label = {"train.learning_rate": rates, "lora.r": [4, 8]}, '{"sleep": 1}'
    found = study(space=space, seeds=[1], set={"label": label})
    kill_at_random(found, workers=4, kills=20, seed=1)
    assert found.each_point_once()
    assert found.count("started") > 60
    assert not found.count("overlapped")


def test_another_machine_takes_over_what_a_lost_one_left(study):
    """Two homes share no file: only the server knows that the first worker is gone."""
    changes = SMALL | {"set": {"label": '{"sleep": 2}', "train.learning_rate": 1e-3}}
    here, there = study("here", **changes), study("there", **changes)
    worker = here.worker()
    wait_for(lambda: here.count("started") == 1)
    assert not there.take()
    worker.kill()
    worker.wait()
    finished(there.worker())
    assert there.each_point_once()
    assert there.count("started") == 1


def test_machines_divide_the_work(study):
    here, there = study("here"), study("there")
    outputs = [finished(worker) for worker in [here.worker(), there.worker()]]
    assert all("every trial has ended" in output for output in outputs)
    assert here.each_point_once()
    assert not set(here.events()) & set(there.events())


def test_the_password_reaches_no_file_and_no_output(study, url):
    found = study(**SMALL, set={"train.learning_rate": 1e-3})
    worker = found.worker()
    command_line = Path(f"/proc/{worker.pid}/cmdline").read_text("utf-8")
    output = finished(worker)
    files = [p.read_text("utf-8") for p in found.home.rglob("*") if p.is_file()]
    assert not [text for text in (output, command_line, *files) if postgres.PASSWORD in text]


def test_a_wrong_password_is_one_sentence_without_it(url, tmp_path):
    wrong = url.replace(postgres.PASSWORD, "wrong-pw-7")
    arguments = ("status", "--study", "x", "--home", tmp_path / "home")
    process = command(*arguments, ATLAS_SWEEP_STORAGE=wrong)
    output = finished(process)
    assert process.returncode == 1
    assert output.startswith("error: The storage does not answer")
    assert output.count("\n") == 1
    assert "wrong-pw-7" not in output


def test_a_server_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ConnectionError, match="The storage does not answer"):
        sweep_study.open_storage("postgresql://atlas@127.0.0.1:9/atlas", tmp_path)


def test_a_server_that_restarts_ends_workers_in_words_and_loses_nothing(tmp_path):
    changes = SMALL | {"set": {"label": '{"sleep": 2}', "train.learning_rate": 1e-3}}
    with postgres.server() as server:
        found = Study(tmp_path / "home", server.url, **changes)
        worker = found.worker()
        wait_for(lambda: found.count("started") == 1)
        server.restart()
        outputs = [finished(worker), finished(found.worker())]
        assert found.each_point_once()
    assert not [output for output in outputs if "Traceback" in output]
