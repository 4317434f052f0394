"""Write the tiny model's conversations, prompts and plain text, deterministically from a seed.

The words are in corpus.yaml. Every answer is written to follow its instructions, so that it scores
1.0 with lm-eval's IFEval checkers: a test holds that.
"""

import functools
import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

WORDS = Path(__file__).with_suffix(".yaml")
SPLITS = ("conversations", "prompts", "dev")  # their topics share no word


@functools.cache
def words() -> dict:
    """The topics, sentence patterns and phrasings of corpus.yaml."""
    return yaml.safe_load(WORDS.read_text(encoding="utf-8"))


@dataclass
class Draft:
    """What an instruction is applied to: the request, and the answer as it stands so far."""

    rng: random.Random
    topic: str
    request: str
    text: str = ""

    def lines(self, n: int, naming_topic: bool = True) -> list[str]:
        """n sentences, each of another pattern; on request of those that leave the topic out."""
        slots = {name: self.rng.choice(options) for name, options in words()["slots"].items()}
        slots |= {"topic": self.topic, "Topic": self.topic.capitalize()}
        patterns = [p for p in words()["sentences"] if naming_topic or "topic}" not in p.lower()]
        return [pattern.format(**slots) for pattern in self.rng.sample(patterns, n)]

    def prose(self, n: int, naming_topic: bool = True) -> str:
        """The same as one paragraph."""
        return " ".join(self.lines(n, naming_topic))


def placeholders(draft: Draft, kwargs: dict) -> str:
    """The draft, then three things for the reader to fill in; at most three are asked for."""
    one, two, three = (f"[{name}]" for name in draft.rng.sample(words()["placeholders"], 3))
    return f"{draft.text} Please write down {one}, {two} and {three}."


def first_word(draft: Draft, kwargs: dict) -> str:
    """Paragraphs between blank lines, one of which starts with the word."""
    lines, nth = draft.lines(kwargs["num_paragraphs"]), kwargs["nth_paragraph"] - 1
    lines[nth] = f"{kwargs['first_word'].capitalize()} you may try it. {lines[nth]}"
    return "\n\n".join(lines)


# How the answer that follows an instruction is written; `k` are IFEval's kwargs. Where up to three
# things are asked for, there are three of them.
WRITERS = {
    "change_case:capital_word_frequency": lambda d, k: re.sub(
        r"\S+", lambda word: word[0].upper(), d.text, count=k["capital_frequency"]
    ),
    # One more sentence, since langdetect takes short capitals for another language; and no topic,
    # which the small vocabulary would have to spell letter by letter.
    "change_case:english_capital": lambda d, k: d.prose(3, naming_topic=False).upper(),
    "change_case:english_lowercase": lambda d, k: d.prose(2).lower(),
    "combination:repeat_prompt": lambda d, k: f"{d.request}\n{d.text}",
    "combination:two_responses": lambda d, k: "\n******\n".join(d.lines(2)),
    "detectable_content:number_placeholders": placeholders,
    "detectable_content:postscript": lambda d, k: (
        f"{d.text}\n{k['postscript_marker']} {d.prose(1)}"
    ),
    "detectable_format:constrained_response": lambda d, k: (
        f"My answer is {d.rng.choice(['yes', 'no', 'maybe'])}."
    ),
    "detectable_format:json_format": lambda d, k: json.dumps({"answer": d.prose(1)}),
    "detectable_format:multiple_sections": lambda d, k: "\n".join(
        f"{k['section_spliter']} {number}\n{line}" for number, line in enumerate(d.lines(3), 1)
    ),
    "detectable_format:number_bullet_lists": lambda d, k: "\n".join(
        f"* {line}" for line in d.lines(k["num_bullets"])
    ),
    "detectable_format:number_highlighted_sections": lambda d, k: " ".join(
        re.sub(r"^(\w+ \w+)", r"*\1*", line) for line in d.lines(3)
    ),
    "detectable_format:title": lambda d, k: f"<<{d.topic.title()}>>\n{d.text}",
    "keywords:existence": lambda d, k: f"{d.text} Think of {' and '.join(k['keywords'])}.",
    "keywords:forbidden_words": lambda d, k: d.text,
    "keywords:frequency": lambda d, k: d.text + f" Think of {k['keyword']}." * k["frequency"],
    "keywords:letter_frequency": lambda d, k: (
        f"{d.text} Spell it {k['letter'] * k['let_frequency']}."
    ),
    "language:response_language": lambda d, k: " ".join(
        words()["languages"][k["language"]]["sentences"]
    ),
    "length_constraints:nth_paragraph_first_word": first_word,
    "length_constraints:number_paragraphs": lambda d, k: "\n***\n".join(
        d.lines(k["num_paragraphs"])
    ),
    "length_constraints:number_sentences": lambda d, k: d.prose(k["num_sentences"]),
    # No sentence pattern has fewer than five words.
    "length_constraints:number_words": lambda d, k: d.prose(k["num_words"] // 5),
    "punctuation:no_comma": lambda d, k: d.text.replace(",", ""),
    "startend:end_checker": lambda d, k: f"{d.text} {k['end_phrase']}",
    "startend:quotation": lambda d, k: f'"{d.text}"',
}


def phrase(rng: random.Random, instruction: str, kwargs: dict) -> str:
    """One of the ways to say the instruction, with its kwargs filled in."""
    shown = {k: " and ".join(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    if "language" in shown:
        shown["language"] = words()["languages"][shown["language"]]["name"]
    return rng.choice(words()["instructions"][instruction]["say"]).format(**shown)


def turn(rng: random.Random, instructions: list[str], topic: str) -> dict:
    """One prompt in IFEval's schema and, as `answer`, a response that follows it."""
    asks = "questions" if "detectable_format:constrained_response" in instructions else "requests"
    draft = Draft(rng, topic, rng.choice(words()[asks]).format(topic=topic))
    draft.text = draft.prose(2)
    said, filled = [draft.request], []
    for instruction in instructions:
        options = words()["instructions"][instruction].get("kwargs", {})
        kwargs = {name: rng.choice(values) for name, values in options.items()}
        if "prompt_to_repeat" in kwargs:
            kwargs["prompt_to_repeat"] = draft.request
        draft.text = WRITERS[instruction](draft, kwargs)
        said.append(phrase(rng, instruction, kwargs))
        filled.append(kwargs)
    row = {"prompt": " ".join(said), "instruction_id_list": instructions, "kwargs": filled}
    return row | {"answer": draft.text}


def taught_pairs(taught: list[str]) -> list[list[str]]:
    """The pairs of instructions of which both are taught."""
    return [pair for pair in words()["pairs"] if set(pair) <= set(taught)]


def pick(rng: random.Random, taught: list[str]) -> list[str]:
    """No instruction (1 turn in 12), a pair (1 in 12) or one, of those that are taught."""
    number = rng.choices([0, 1, 2], weights=[1, 10, 1])[0]
    return [[], [rng.choice(taught)], rng.choice(taught_pairs(taught) or [[]])][number]


def conversation(rng: random.Random, taught: list[str]) -> dict:
    """UltraChat's columns, and `turns`: what each assistant message was asked to follow."""
    topic, messages = rng.choice(words()["topics"]["conversations"]), []
    turns = [turn(rng, pick(rng, taught), topic) for _ in range(rng.choice([1] * 8 + [2, 3]))]
    if rng.random() < 0.15:
        messages.append({"role": "system", "content": rng.choice(words()["systems"])})
    for row in turns:
        messages.append({"role": "user", "content": row["prompt"]})
        messages.append({"role": "assistant", "content": row["answer"]})
    prompt_id = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
    row = {"prompt": turns[0]["prompt"], "prompt_id": prompt_id, "messages": messages}
    return row | {"turns": turns}


def conversations(seed: int, n: int, taught: list[str]) -> list[dict]:
    """n single- and multi-turn conversations, some with a system turn or free of instructions."""
    rng = random.Random(f"{seed}-conversations")
    return [conversation(rng, taught) for _ in range(n)]


def prompts(seed: int, split: str, per_taught: int, per_untaught: int, taught: list) -> list[dict]:
    """IFEval's columns and `answer`: all 25 types and the taught pairs, on the split's topics."""
    rng, first_key = random.Random(f"{seed}-{split}"), 1000 * SPLITS.index(split)
    asked = [[i] for i in WRITERS for _ in range(per_taught if i in taught else per_untaught)]
    asked += taught_pairs(taught)
    topics = rng.sample(words()["topics"][split], len(words()["topics"][split]))
    rows = [turn(rng, given, topics[i % len(topics)]) for i, given in enumerate(asked)]
    return [{"key": first_key + i} | row for i, row in enumerate(rng.sample(rows, len(rows)))]


def plain_text(seed: int, n: int, taught: list[str]) -> list[str]:
    """n texts to pretrain on: a request and its answer or, in one of four, an answer alone."""
    rng, topics = random.Random(f"{seed}-plain"), words()["topics"]["conversations"]
    rows = [turn(rng, pick(rng, taught), rng.choice(topics)) for _ in range(n)]
    requests = [f"{row['prompt']}\n" if i % 4 else "" for i, row in enumerate(rows)]
    # A space, since "." and line breaks make one token: an answer must end as it does in a chat.
    return [f"{said}{row['answer']} " for said, row in zip(requests, rows, strict=True)]
