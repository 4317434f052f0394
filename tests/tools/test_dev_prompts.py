"""The dev prompts: apart from IFEval's, varied, and each of them can be satisfied."""

import itertools
import json
import re

import pytest
from dev_answers import constructed
from ifeval_cases import OFFICIAL, official

from atlas_lib.evaluate import checkers, ifeval, ifeval_files
from tools import dev_prompts


@pytest.fixture(scope="module")
def prompts():
    return ifeval_files.load_prompts(str(dev_prompts.PATH))


def relations(prompts) -> list[str]:
    kwargs = [kwargs for row in prompts for kwargs in row["kwargs"]]
    return [value for k in kwargs for name, value in k.items() if name.endswith("relation")]


def largest(prompts, name: str) -> int:
    return max(kwargs.get(name, 0) for row in prompts for kwargs in row["kwargs"])


def grams(prompts) -> set[tuple[str, ...]]:
    found = set()
    for row in prompts:
        words = re.findall(r"[^\W_]+", row["prompt"].lower())
        found |= set(zip(*(words[i:] for i in range(13)), strict=False))
    return found


def arguments(prompts) -> set[tuple[str, str]]:
    """Pairs (instruction type, its arguments) of types that have arguments."""
    return {
        (name, json.dumps(kwargs, sort_keys=True))
        for row in prompts
        for name, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True)
        if kwargs
    }


def test_the_file_is_what_its_script_writes():
    rows = [json.loads(line) for line in dev_prompts.PATH.read_text("utf-8").splitlines()]
    assert rows == dev_prompts.dev_prompts()


def test_there_are_many_and_they_differ(prompts):
    assert len({row["prompt"] for row in prompts}) == len(prompts) >= 400
    openings = {" ".join(row["prompt"].split()[:3]) for row in prompts}
    assert len(openings) >= 150
    assert len({word for row in prompts for word in row["prompt"].lower().split()}) >= 900


def test_they_ask_for_as_much_as_ifeval_does(prompts):
    sizes = [len(row["instruction_id_list"]) for row in prompts]
    assert 0.45 <= sum(size > 1 for size in sizes) / len(sizes) <= 0.55
    assert max(sizes) == 3
    assert 0.32 <= relations(prompts).count("less than") / len(relations(prompts)) <= 0.42
    assert largest(prompts, "num_words") >= 600
    assert largest(prompts, "num_sentences") >= 30
    assert largest(prompts, "num_paragraphs") >= 8


def test_each_type_stands_alone_and_all_but_one_are_combined(prompts):
    registry = checkers.lm_eval_checkers().instructions_registry
    alone = {r["instruction_id_list"][0] for r in prompts if len(r["instruction_id_list"]) == 1}
    beside = {i for r in prompts for i in r["instruction_id_list"] if len(r["kwargs"]) > 1}
    assert alone == set(registry.INSTRUCTION_DICT)
    assert alone - beside == {"detectable_format:constrained_response"}


def test_none_is_contradictory_by_ifevals_own_table(prompts):
    registry = checkers.lm_eval_checkers().instructions_registry
    conflicts = registry.conflict_make(dict(registry.INSTRUCTION_CONFLICTS))
    for row in prompts:
        for one, other in itertools.combinations(row["instruction_id_list"], 2):
            assert other not in conflicts[one], row["prompt"]


def test_each_can_be_satisfied_and_not_by_another_ones_response(prompts):
    responses = [constructed(row) for row in prompts]
    verdicts = ifeval.score(prompts, responses)
    failed = [row for row, v in zip(prompts, verdicts, strict=True) if not v["prompt_strict"]]
    assert failed == []
    shifted = ifeval.score(prompts, responses[1:] + responses[:1])
    assert sum(verdict["prompt_strict"] for verdict in shifted) < 0.25 * len(prompts)


@official
@pytest.mark.parametrize("shared", [grams, arguments])
def test_none_has_a_text_or_arguments_of_ifeval(prompts, shared):
    theirs = ifeval_files.load_prompts(str(OFFICIAL))
    assert not shared(prompts) & shared(theirs)
    assert not {row["prompt"].strip() for row in prompts} & {r["prompt"].strip() for r in theirs}
