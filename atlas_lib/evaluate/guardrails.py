"""Benchmarks that fine-tuning should not change: MMLU, GSM8K and TruthfulQA through lm-eval."""

from typing import Any

from atlas_lib.evaluate import significance

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
    """One {task, n, value, stderr, num_fewshot, outcomes} per task; `folder` may define others.

    `outcomes` is {item: score}, 0 or 1 but for TruthfulQA's, which are fractions.
    """
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
        outcomes = _outcomes(found["samples"], metric)
        rows.append(row | {"num_fewshot": settings["num_fewshot"], "outcomes": outcomes})
    return rows


def _outcomes(samples: dict[str, list[dict]], metric: str) -> dict[str, float]:
    """{"subtask number": score} of one metric and filter, as lm-eval names the two."""
    name, _, chosen = metric.partition(",")
    return {
        f"{task} {sample['doc_id']}": float(sample[name])
        for task, rows in samples.items()
        for sample in rows
        if sample["filter"] == chosen
    }


def compare_tasks(a: list[dict], b: list[dict]) -> list[dict]:
    """What B gains over A on each task, in points with an interval, paired by item.

    `mcnemar_p` is None for a task whose scores are fractions; its interval still holds. MMLU's
    value weights subjects by their size, as the mean over items does. Raises ValueError.
    """
    rows = []
    for one, other in zip(a, b, strict=True):
        if one["outcomes"].keys() != other["outcomes"].keys():
            raise ValueError(f"{one['task']}: the two models were not asked the same items.")
        pairs = [(score, other["outcomes"][item]) for item, score in one["outcomes"].items()]
        gains = [after - before for before, after in pairs]
        binary = all(score in (0, 1) for pair in pairs for score in pair)
        won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        row = {"task": one["task"], "n": len(pairs), "only_a": lost, "only_b": won}
        row["difference_points"] = 100 * sum(gains) / len(gains)
        row["difference_ci95"] = [100 * x for x in significance.bootstrap(gains, [1] * len(gains))]
        rows.append(row | {"mcnemar_p": significance.mcnemar_p(lost, won) if binary else None})
    return rows
