"""lm-eval's whole harness on the same model: the same texts, and `compare` reads its log."""

import json
from pathlib import Path

import lm_eval.tasks
import pytest
from checks import refusal
from ifeval_cases import python
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig

from atlas_lib import artifacts, devices, models
from atlas_lib.config import load_config
from atlas_lib.evaluate import decoding, ifeval, ifeval_files
from atlas_lib.standin import tiny_model

CAP = 48
CPU = devices.Device("cpu", "float32", "test")
# Every text is a document of its own, so that the model learns to stop.
CONFIG = load_config(
    "sft_qwen05b", "offline", {"offline.texts_per_document": 1, "offline.pretrain_steps": 120}
)
TASK = """
include: {shipped}
task: ifeval_local
dataset_path: json
dataset_kwargs:
  data_files:
    train: {prompts}
"""


@pytest.fixture(scope="module")
def prompts():
    return ifeval_files.load_prompts(str(tiny_model.build("ifeval", CONFIG)), limit=120)


@pytest.fixture(scope="module")
def loaded():
    """Model and tokenizer; the model's generation config names both stops, as Atlas's does."""
    model, tokenizer = (
        models.load_weights("base", CONFIG, CPU, False),
        models.load_tokenizer(CONFIG),
    )
    stops = models.stop_ids(tokenizer, model)
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=stops[1])
    return model, tokenizer


@pytest.fixture(scope="module")
def logs(loaded, prompts, tmp_path_factory):
    """{prompt format: file that lm-eval's --log_samples writes}."""
    folder, found = tmp_path_factory.mktemp("lm_eval"), {}
    artifacts.write_jsonl(folder / "prompts.jsonl", prompts)
    shipped = Path(lm_eval.tasks.__file__).parent / "ifeval" / "ifeval.yaml"
    text = TASK.format(shipped=shipped, prompts=folder / "prompts.jsonl")
    (folder / "local.yaml").write_text(text, "utf-8")
    for form in ("raw", "chat"):
        done = simple_evaluate(
            HFLM(loaded[0], tokenizer=loaded[1], batch_size=16),
            tasks=["ifeval_local"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            apply_chat_template=form == "chat",
            gen_kwargs=f"max_gen_toks={CAP}",
            log_samples=True,
            bootstrap_iters=0,
        )
        tracker = EvaluationTracker(output_path=str(folder / form))
        tracker.general_config_tracker.model_name_sanitized = "tiny"
        tracker.date_id = "now"
        tracker.save_results_samples("ifeval_local", done["samples"]["ifeval_local"])
        [found[form]] = (folder / form).rglob("samples_*.jsonl")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("form", ["raw", "chat"])
def test_lm_eval_gives_the_same_texts_and_verdicts(loaded, prompts, logs, form):
    texts = [prompt["prompt"] for prompt in prompts]
    ours = decoding.generate(*loaded, texts, form, CAP)
    rows = list(artifacts.read_jsonl(logs[form]))
    assert [row["doc"]["key"] for row in rows] == [prompt["key"] for prompt in prompts]
    assert [row["filtered_resps"][0] for row in rows] == [row["response"] for row in ours]
    verdicts = ifeval.score(prompts, [row["response"] for row in ours])
    for mode in ("strict", "loose"):
        theirs = [bool(row[f"prompt_level_{mode}_acc"]) for row in rows]
        assert theirs == [verdict[f"prompt_{mode}"] for verdict in verdicts]
    assert ifeval_files.load_verdicts(logs[form]) == verdicts
    assert 0 < sum(verdict["prompt_strict"] for verdict in verdicts) < len(verdicts)


@pytest.mark.slow
def test_two_logs_are_compared(logs, tmp_path):
    report = tmp_path / "report.json"
    arguments = ["compare", logs["raw"], logs["chat"], "--json", report]
    done = python(["-m", "atlas_lib.ifeval", *map(str, arguments)])
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text("utf-8"))["n"] == 120


def test_a_log_of_another_task_is_refused(tmp_path):
    artifacts.write_jsonl(tmp_path / "samples.jsonl", [{"doc": {"question": "2+2?"}}])
    sentence = refusal(ifeval_files.load_verdicts, tmp_path / "samples.jsonl")
    assert "samples.jsonl, row 1: it needs key, prompt, instruction_id_list, kwargs" in sentence
