"""The guardrail tasks through lm-eval, on a task small enough to be scored independently."""

import json

import pytest
import torch
from checks import refusal

from atlas_lib import devices, models
from atlas_lib.evaluate import guardrails

CPU = devices.Device("cpu", "float32", "test")
QUESTIONS = [
    {"question": f"What comes after {n}?", "choices": [str(n + 1), str(n), "x"], "answer": n % 3}
    for n in range(12)
]
TASK = """
task: after
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
    train: {rows}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path):
    """A folder with one multiple-choice task."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), "utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "after.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"), "utf-8")
    return str(folder)


def by_hand(base, tokenizer, questions) -> float:
    """Share of questions whose right choice is the likeliest continuation."""
    right = 0
    for asked in questions:
        scores = []
        for choice in asked["choices"]:
            prompt = tokenizer(asked["question"])["input_ids"]
            ids = torch.tensor([prompt + tokenizer(f" {choice}")["input_ids"]])
            with torch.no_grad():
                chances = base(ids).logits[0].log_softmax(-1)
            scores.append(sum(chances[i - 1, ids[0, i]] for i in range(len(prompt), ids.shape[1])))
        right += int(torch.stack(scores).argmax()) == asked["answer"]
    return right / len(questions)


def test_a_task_is_measured_as_by_hand(tasks, tiny_config):
    base = models.load_weights("base", tiny_config, CPU, in_4bit=False)
    tokenizer = models.load_tokenizer(tiny_config)
    settings = {"after": {"num_fewshot": 0, "limit": 10, "metric": "acc,none"}}
    [row] = guardrails.run_tasks(base, tokenizer, 4, settings, tasks)
    assert (row["task"], row["n"], row["num_fewshot"]) == ("after", 10, 0)
    assert row["value"] == pytest.approx(by_hand(base, tokenizer, QUESTIONS[:10]))
    assert row["stderr"] >= 0


def test_lm_eval_knows_the_tasks():
    from lm_eval.tasks import TaskManager

    assert guardrails.TASKS.keys() == guardrails.PUBLISHED.keys()
    assert set(guardrails.TASKS) <= set(TaskManager().all_tasks)


def outcomes(*scores, task="gsm8k"):
    return {"task": task, "outcomes": {f"{task} {i}": score for i, score in enumerate(scores)}}


def test_the_outcomes_are_those_that_the_mean_is_of(tasks, tiny_config):
    base = models.load_weights("base", tiny_config, CPU, in_4bit=False)
    settings = {"after": {"num_fewshot": 0, "limit": None, "metric": "acc,none"}}
    [row] = guardrails.run_tasks(base, models.load_tokenizer(tiny_config), 4, settings, tasks)
    assert list(row["outcomes"]) == [f"after {i}" for i in range(12)]
    assert set(row["outcomes"].values()) <= {0.0, 1.0}
    assert row["value"] == pytest.approx(sum(row["outcomes"].values()) / 12)
    [same] = guardrails.compare_tasks([row], [row])
    assert (same["only_a"], same["only_b"], same["mcnemar_p"]) == (0, 0, 1.0)


def test_two_models_are_compared_item_by_item():
    """Equal means can hide changes; 1 loss and 9 wins among 30 items: McNemar's p is 0.0215."""
    a = outcomes(1, *[0] * 9, *[1] * 10, *[0] * 10)
    b = outcomes(0, *[1] * 9, *[1] * 10, *[0] * 10)
    [found] = guardrails.compare_tasks([a], [b])
    assert (found["n"], found["only_a"], found["only_b"]) == (30, 1, 9)
    assert found["mcnemar_p"] == pytest.approx(22 / 2**10)
    assert found["difference_points"] == pytest.approx(100 * 8 / 30)
    low, high = found["difference_ci95"]
    assert 0 < low < found["difference_points"] < high


def test_fractions_have_an_interval_and_no_mcnemar_test():
    a, b = outcomes(0.2, 0.5, 0.9), outcomes(0.3, 0.5, 0.8)
    [found] = guardrails.compare_tasks([a], [b])
    assert found["mcnemar_p"] is None
    assert found["difference_points"] == pytest.approx(0)


def test_models_that_were_asked_other_items_are_not_compared():
    message = refusal(guardrails.compare_tasks, [outcomes(1, 0)], [outcomes(1)])
    assert message == "gsm8k: the two models were not asked the same items."
