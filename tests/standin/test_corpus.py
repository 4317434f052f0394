"""The stand-in's texts: gold answers that follow, all 25 types, disjoint topics, determinism."""

import collections
import inspect
import itertools
import random

import pytest

from atlas_lib.evaluate import ifeval
from atlas_lib.standin import corpus


@pytest.fixture(scope="module")
def options(offline_config):
    return offline_config.offline


@pytest.fixture(scope="module")
def conversations(options):
    return corpus.conversations(options.corpus_seed, options.n_conversations, options.taught)


def prompts_of(options, split: str) -> list[dict]:
    counts = {"prompts": options.n_prompts_per_type, "dev": options.n_dev_prompts_per_type}
    return corpus.prompts(options.corpus_seed, split, *counts[split], options.taught)


@pytest.fixture(scope="module")
def asked(conversations, options):
    """Split -> rows in IFEval's schema with their gold answer."""
    turns = [turn for row in conversations for turn in row["turns"] if turn["instruction_id_list"]]
    turns = [{"key": key} | turn for key, turn in enumerate(turns)]
    return {"conversations": turns} | {
        name: prompts_of(options, name) for name in corpus.SPLITS[1:]
    }


@pytest.fixture(scope="module")
def instruction_classes():
    try:
        ifeval.ensure_punkt()
    except FileNotFoundError as error:
        pytest.skip(f"NOT TESTED, the checkers need nltk's punkt_tab: {error}")
    from lm_eval.tasks.ifeval import instructions_registry

    return instructions_registry.INSTRUCTION_DICT


@pytest.mark.parametrize("split", corpus.SPLITS)
def test_every_gold_answer_scores_one(asked, split, instruction_classes):
    verdicts = ifeval.score(asked[split], [row["answer"] for row in asked[split]])
    failed = [
        (row["prompt"], row["answer"])
        for row, verdict in zip(asked[split], verdicts, strict=True)
        if not verdict["prompt_strict"]
    ]
    assert failed == []


def test_an_answer_to_another_prompt_fails(asked, instruction_classes):
    rows = asked["prompts"]
    verdicts = ifeval.score(rows, [row["answer"] for row in rows[1:] + rows[:1]])
    assert sum(verdict["prompt_strict"] for verdict in verdicts) < 0.4 * len(rows)


@pytest.mark.parametrize("split", corpus.SPLITS[1:])
def test_prompts_cover_all_types_with_ifevals_own_kwargs(asked, split, instruction_classes):
    seen = set()
    for row in asked[split]:
        for instruction, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            describe = inspect.signature(instruction_classes[instruction].build_description)
            assert set(kwargs) == set(describe.parameters) - {"self"}, instruction
            seen.add(instruction)
    assert seen == set(instruction_classes) and len(seen) == 25


def test_there_is_enough_of_each_kind(conversations, asked, options):
    taught = collections.Counter(
        i for row in asked["conversations"] for i in row["instruction_id_list"]
    )
    assert set(taught) == set(options.taught) and len(taught) >= 12
    assert min(taught.values()) >= 20
    assert len(conversations) >= 700 and len(asked["prompts"]) >= 100 and len(asked["dev"]) >= 50
    roles = collections.Counter(tuple(m["role"] for m in row["messages"]) for row in conversations)
    assert sum(n for key, n in roles.items() if key[0] == "system") >= 50
    assert sum(n for key, n in roles.items() if key.count("user") > 1) >= 50
    assert sum(not t["instruction_id_list"] for row in conversations for t in row["turns"]) >= 30
    asked_for = collections.Counter(
        i for row in asked["prompts"] for i in row["instruction_id_list"]
    )
    assert min(asked_for[i] for i in options.taught) >= 3 and min(asked_for.values()) >= 2


def test_conversations_alternate_and_carry_the_gold_answers(conversations):
    for row in conversations:
        said = [m for m in row["messages"] if m["role"] != "system"]
        assert [m["role"] for m in said] == ["user", "assistant"] * len(row["turns"])
        assert [m["content"] for m in said[1::2]] == [turn["answer"] for turn in row["turns"]]
        assert row["prompt"] == said[0]["content"]
    assert len({row["prompt_id"] for row in conversations}) == len(conversations)


def test_topics_of_the_splits_share_no_word():
    topics = corpus.words()["topics"]
    used = {split: {word for topic in topics[split] for word in topic.split()} for split in topics}
    assert tuple(used) == corpus.SPLITS
    for one, other in itertools.combinations(corpus.SPLITS, 2):
        assert not used[one] & used[other]


def test_keys_are_unique_over_prompts_and_dev(asked):
    keys = [row["key"] for name in corpus.SPLITS[1:] for row in asked[name]]
    assert len(keys) == len(set(keys))


def test_the_seed_alone_decides(options, conversations):
    random.seed(99)
    arguments = options.n_conversations, options.taught
    assert corpus.conversations(options.corpus_seed, *arguments) == conversations
    assert corpus.conversations(options.corpus_seed + 1, *arguments) != conversations
    texts = corpus.plain_text(0, 20, options.taught)
    assert (
        texts
        == corpus.plain_text(0, 20, options.taught)
        != corpus.plain_text(1, 20, options.taught)
    )


def test_plain_text_holds_no_chat_tokens_and_no_held_out_topic(options):
    texts = " ".join(corpus.plain_text(0, 500, options.taught))
    topics = corpus.words()["topics"]
    assert "<|" not in texts
    assert not [t for t in topics["prompts"] + topics["dev"] if t in texts.lower()]
