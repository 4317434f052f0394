"""Trainings that teach nothing, or nothing right: none of them ends in a gain.

A wrong loss mask and a learning rate of 0 are refused: the options in tests/core/test_config.py, a
collator that changes labels in tests/train/test_trl_loss.py.
"""

import itertools
import json
import random

import pytest
from checks import run_python
from ifeval_cases import random_adapter
from tiny import TINY

from atlas_lib import artifacts, devices
from atlas_lib.config import load_config
from atlas_lib.evaluate import benchmarks, grid, significance
from atlas_lib.standin import tiny_model

CPU = devices.Device("cpu", "float32", "test")
NO_GAIN = {"not distinguishable", "worse"}
PRIMARY = {"eval.formats": ["chat"], "eval.benchmarks": ["ifeval"]}

pytestmark = pytest.mark.slow


def run(out, overrides: dict) -> tuple[str, dict]:
    """What a whole offline run prints, and its primary comparison."""
    given = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    pairs = itertools.chain.from_iterable(("--set", each) for each in given)
    done = run_python("-m", "tools.run", "--overlay", "offline", "--out", out, *pairs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((out / "04_ifeval_eval" / "ifeval.json").read_text("utf-8"))
    return done.stdout, found["comparisons"][0]


def test_a_training_without_an_effect_is_warned_of_and_not_distinguishable(tmp_path):
    printed, found = run(tmp_path, TINY | PRIMARY | {"train.learning_rate": 1e-12})
    assert "warning: the adapter is still zero and changes nothing" in printed
    assert (found["only_a"], found["only_b"]) == (0, 0)
    assert "SFT chat against base chat: not distinguishable." in printed
    assert "| warning | the adapter is still zero" in (tmp_path / "report.md").read_text("utf-8")


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory):
    """(OUT, printed text, primary comparison) of a run on conversations with exchanged responses.

    The full size of the offline overlay: the format and the stop are learned, which is not enough.
    """
    folder = tmp_path_factory.mktemp("shuffled")
    built = tiny_model.build("ultrachat", load_config("sft_qwen05b", "offline"))
    rows = list(artifacts.read_jsonl(built / "train_sft.jsonl"))
    messages = [m for row in rows for m in row["messages"] if m["role"] == "assistant"]
    texts = [message["content"] for message in messages]
    random.Random(0).shuffle(texts)
    for message, text in zip(messages, texts, strict=True):
        message["content"] = text
    artifacts.write_jsonl(folder / "chats.jsonl", rows)
    given = {"data.dataset": str(folder / "chats.jsonl"), "data.revision": None}
    return folder / "out", *run(folder / "out", PRIMARY | given)


@pytest.mark.long
def test_responses_of_other_conversations_teach_no_following(shuffled):
    out, printed, found = shuffled
    assert found["verdict"] in NO_GAIN
    assert f"SFT chat against base chat: {found['verdict']}." in printed
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))
    assert metrics[1]["eos_rate"] > 0.5 > metrics[0]["eos_rate"]  # what can be learned is


@pytest.mark.long
@pytest.mark.parametrize("scale", [0.1, 0.2])
def test_a_random_adapter_is_no_gain(scale, shuffled, tmp_path):
    config = load_config("sft_qwen05b", "offline", PRIMARY)
    prompts = benchmarks.evaluation_prompts(config)
    adapter = random_adapter(config, tmp_path, scale)
    found = grid.generate_all(config, CPU, adapter, prompts, shuffled[0])["ifeval"]
    verdicts = benchmarks.score_grid("ifeval", prompts["ifeval"], found)
    limits = (config.eval.alpha, config.eval.clear_margin)
    [compared] = significance.compare_grid(verdicts, *limits)
    assert compared["only_a"] + compared["only_b"] and compared["verdict"] in NO_GAIN
