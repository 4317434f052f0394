"""The page about a run says what was measured and what was not."""

import pytest
from ifeval_cases import prompt

from atlas_lib.config import load_config
from atlas_lib.evaluate import ifeval, report_card, significance

ROWS = [("base", "chat"), ("SFT", "chat")]


@pytest.fixture
def results():
    prompts = [prompt(key) for key in range(4)]
    texts = {ROWS[0]: ["a, b"] * 4, ROWS[1]: ["a"] * 3 + ["a, b"]}
    responses = {
        row: [{"response": text, "n_tokens": 1, "stop": "<|im_end|>"} for text in given]
        for row, given in texts.items()
    }
    verdicts = {row: ifeval.score(prompts, given) for row, given in texts.items()}
    return {
        "metrics": ifeval.grid_metrics(responses, verdicts, "<|im_end|>"),
        "comparisons": significance.compare_grid(verdicts, 0.05, 0.0369),
        "benchmarks": {},
        "origin": {"commit": "c0ffee", "digest": "d1", "hardware": "a CPU"},
    }


def test_it_holds_scores_verdict_and_what_was_not_run(results, tmp_path):
    config = load_config("sft_qwen05b", "offline", {"eval.benchmarks": ["ifeval"]})
    report_card.write_report(tmp_path / "report.md", tmp_path, config, results)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert f"*{config.label}*" in text
    assert "| IFEval | SFT | chat | 4 | 0.750 | 0.301 to 0.954 | 1.00 |" in text
    assert "SFT chat against base chat: not distinguishable" in text
    assert "| loss mask |" not in text  # that stage is not in this folder
    not_run = text.split("## Not run")[1]
    assert "Instruct" in not_run
    assert "IFBench" in not_run


def test_the_model_card_ends_with_the_scores_of_the_report(results, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n", "utf-8")
    results["parts"] = [{"part": "other types", "n": 3, "only_a": 2, "only_b": 1}]
    report_card.write_model_card(tmp_path / "card.md", tmp_path / "README.md", results)
    card = (tmp_path / "card.md").read_text("utf-8")
    config = load_config("sft_qwen05b", "offline")
    report_card.write_report(tmp_path / "report.md", tmp_path, config, results)
    report = (tmp_path / "report.md").read_text("utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n---\n# Card\n\n## Evaluation\n\n")
    scores = card.partition("## Evaluation")[2].rpartition("\n\n")[0]
    assert "IFBench beyond 40 of its prompts" in report
    assert scores in report and "| other types | 3 | 1 | 2 |" in scores
    assert "SFT chat against base chat: not distinguishable" in card.splitlines()[-1]
