"""The texts of the offline overlay: gold responses that score, all 25 types, disjoint topics."""

import collections
import inspect
import itertools
import random

import pytest

from atlas_lib.evaluate import ifeval
from atlas_lib.evaluate.checkers import lm_eval_checkers
from atlas_lib.standin import corpus


@pytest.fixture(scope="module")
def options(offline_config):
    return offline_config.offline


@pytest.fixture(scope="module")
def conversations(options):
    return corpus.conversations(options.corpus_seed, options.n_conversations, options.taught)


@pytest.fixture(scope="module")
def rows(conversations, options):
    """Split -> rows in IFEval's schema with their gold response."""
    turns = [turn for row in conversations for turn in row["turns"] if turn["instruction_id_list"]]
    seed, taught = options.corpus_seed, options.taught
    return {
        "conversations": [{"key": key} | turn for key, turn in enumerate(turns)],
        "prompts": corpus.prompts(seed, "prompts", *options.n_prompts_per_type, taught),
        "dev": corpus.prompts(seed, "dev", *options.n_dev_prompts_per_type, taught),
    }


@pytest.fixture(scope="module")
def checkers():
    """Instruction type -> IFEval's class that checks it."""
    return lm_eval_checkers().instructions_registry.INSTRUCTION_DICT


def types_of(rows) -> collections.Counter:
    return collections.Counter(name for row in rows for name in row["instruction_id_list"])


@pytest.mark.parametrize("split", corpus.SPLITS)
def test_every_gold_response_scores_one_and_that_of_another_prompt_mostly_not(
    rows, split, checkers
):
    gold = [row["answer"] for row in rows[split]]
    verdicts = ifeval.score(rows[split], gold)
    failed = [row for row, v in zip(rows[split], verdicts, strict=True) if not v["prompt_strict"]]
    assert failed == []
    shifted = ifeval.score(rows[split], gold[1:] + gold[:1])
    assert sum(verdict["prompt_strict"] for verdict in shifted) < 0.4 * len(gold)


@pytest.mark.parametrize("split", corpus.SPLITS[1:])
def test_prompts_cover_all_types_with_ifevals_own_kwargs(rows, split, checkers):
    for row in rows[split]:
        for instruction, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            describe = inspect.signature(checkers[instruction].build_description)
            assert set(kwargs) == set(describe.parameters) - {"self"}, instruction
    assert set(types_of(rows[split])) == set(checkers) and len(checkers) == 25


def test_conversations_are_of_every_kind(conversations, rows, options):
    assert set(types_of(rows["conversations"])) == set(options.taught)
    roles = [[message["role"] for message in row["messages"]] for row in conversations]
    assert sum(found[0] == "system" for found in roles) >= 50
    assert sum(found.count("user") > 1 for found in roles) >= 50
    assert sum(not t["instruction_id_list"] for row in conversations for t in row["turns"]) >= 30


def test_conversations_alternate_and_contain_the_gold_responses(conversations):
    for row in conversations:
        messages = [m for m in row["messages"] if m["role"] != "system"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * len(row["turns"])
        assert [m["content"] for m in messages[1::2]] == [turn["answer"] for turn in row["turns"]]
        assert row["prompt"] == messages[0]["content"]
    assert len({row["prompt_id"] for row in conversations}) == len(conversations)


def test_topics_of_the_splits_share_no_word():
    topics = corpus.words()["topics"]
    used = {split: {word for topic in topics[split] for word in topic.split()} for split in topics}
    assert tuple(used) == corpus.SPLITS
    for one, other in itertools.combinations(corpus.SPLITS, 2):
        assert not used[one] & used[other]


def test_the_seed_alone_decides(options, conversations):
    random.seed(99)
    arguments = options.n_conversations, options.taught
    assert corpus.conversations(options.corpus_seed, *arguments) == conversations
    assert corpus.conversations(options.corpus_seed + 1, *arguments) != conversations
    one, same, other = (corpus.plain_text(seed, 20, options.taught) for seed in (0, 0, 1))
    assert one == same != other


def test_plain_text_has_no_chat_tokens_and_no_topic_of_the_prompts(options):
    texts = " ".join(corpus.plain_text(0, 500, options.taught))
    topics = corpus.words()["topics"]
    assert "<|" not in texts
    assert not [t for t in topics["prompts"] + topics["dev"] if t in texts.lower()]
