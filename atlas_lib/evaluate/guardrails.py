"""What fine-tuning should leave alone: MMLU, GSM8K and TruthfulQA through lm-eval."""

from typing import Any

# As the published recipe measured them (github agaonker/post-training-lab, docs/methods/sft.md);
# `limit` is lm-eval's: for MMLU it counts in each of the 57 subjects.
TASKS = {
    "mmlu": {"num_fewshot": 5, "limit": 1000, "metric": "acc,none"},
    "gsm8k": {"num_fewshot": 8, "limit": None, "metric": "exact_match,strict-match"},
    "truthfulqa_mc2": {"num_fewshot": 0, "limit": None, "metric": "acc,none"},
}
# The same page's figures, base and SFT: asked without a chat template, as here.
PUBLISHED = {
    "mmlu": {"base": 0.481, "SFT": 0.471},
    "gsm8k": {"base": 0.339, "SFT": 0.345},
    "truthfulqa_mc2": {"base": 0.399, "SFT": 0.389},
}


def measure(
    model: Any, tokenizer: Any, batch_size: int, tasks: dict = TASKS, folder: str | None = None
) -> list[dict]:
    """One {task, n, value, stderr, num_fewshot} a task; `folder` may hold tasks of one's own."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    answering = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    manager = TaskManager(include_path=folder)
    rows = []
    for task, settings in tasks.items():
        metric, filtered = settings["metric"].split(",")
        found = simple_evaluate(
            model=answering,
            tasks=[task],
            num_fewshot=settings["num_fewshot"],
            limit=settings["limit"],
            task_manager=manager,
            random_seed=0, numpy_random_seed=0, torch_random_seed=0, fewshot_random_seed=1234,
        )  # fmt: skip
        scores = found["results"][task]
        samples = [count["effective"] for count in found["n-samples"].values()]
        rows.append(
            {
                "task": task,
                "n": sum(samples),
                "value": scores[f"{metric},{filtered}"],
                "stderr": scores.get(f"{metric}_stderr,{filtered}"),
                "num_fewshot": settings["num_fewshot"],
            }
        )
    return rows
