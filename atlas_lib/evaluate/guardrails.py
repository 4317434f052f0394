"""Benchmarks that fine-tuning should not change: MMLU, GSM8K and TruthfulQA through lm-eval."""

from typing import Any

# As the published recipe measured them (github agaonker/post-training-lab, docs/methods/sft.md);
# `limit` is lm-eval's: for MMLU it counts in each of the 57 subjects.
TASKS = {
    "mmlu": {"num_fewshot": 5, "limit": 1000, "metric": "acc,none"},
    "gsm8k": {"num_fewshot": 8, "limit": None, "metric": "exact_match,strict-match"},
    "truthfulqa_mc2": {"num_fewshot": 0, "limit": None, "metric": "acc,none"},
}
# The same page's figures for base and SFT, measured without a chat template, as here.
PUBLISHED = {
    "mmlu": {"base": 0.481, "SFT": 0.471},
    "gsm8k": {"base": 0.339, "SFT": 0.345},
    "truthfulqa_mc2": {"base": 0.399, "SFT": 0.389},
}


def run_tasks(
    model: Any, tokenizer: Any, batch_size: int, tasks: dict = TASKS, folder: str | None = None
) -> list[dict]:
    """One {task, n, value, stderr, num_fewshot} per task; `folder` may define further tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    manager = TaskManager(include_path=folder)
    rows = []
    for task, settings in tasks.items():
        limits = {key: settings[key] for key in ("num_fewshot", "limit")}
        found = simple_evaluate(wrapped, tasks=[task], task_manager=manager, **limits)
        measured, metric = found["results"][task], settings["metric"]
        row = {"task": task, "n": sum(n["effective"] for n in found["n-samples"].values())}
        row |= {"value": measured[metric], "stderr": measured[metric.replace(",", "_stderr,")]}
        rows.append(row | {"num_fewshot": settings["num_fewshot"]})
    return rows
