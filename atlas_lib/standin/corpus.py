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


def highlights(draft: Draft, num_highlights: int) -> str:
    """Three sentences whose first two words are in *asterisks*; at most three are asked for."""
    return " ".join(re.sub(r"^(\w+ \w+)", r"*\1*", line) for line in draft.lines(3))


def sections(draft: Draft, section_spliter: str, num_sections: int) -> str:
    """One sentence below each of three numbered headings; at most three are asked for."""
    lines = enumerate(draft.lines(3), start=1)
    return "\n".join(f"{section_spliter} {number}\n{line}" for number, line in lines)


def placeholders(draft: Draft, num_placeholders: int) -> str:
    """The draft, then three things for the reader to fill in; at most three are asked for."""
    one, two, three = (f"[{name}]" for name in draft.rng.sample(words()["placeholders"], 3))
    return f"{draft.text} Please write down {one}, {two} and {three}."


def capital_words(draft: Draft, capital_relation: str, capital_frequency: int) -> str:
    """The draft with its first words shouted."""
    text = draft.text.split()
    return " ".join([w.upper() for w in text[:capital_frequency]] + text[capital_frequency:])


def first_word(draft: Draft, num_paragraphs: int, nth_paragraph: int, first_word: str) -> str:
    """Paragraphs between blank lines, one of which starts with the word."""
    lines = draft.lines(num_paragraphs)
    lines[nth_paragraph - 1] = (
        f"{first_word.capitalize()} you may try it. {lines[nth_paragraph - 1]}"
    )
    return "\n\n".join(lines)


# How the answer that follows an instruction is written; the arguments are IFEval's kwargs.
# Capitals get a sentence more: langdetect takes short ones for another language. And no topic:
# the small vocabulary would have to spell it letter by letter.
WRITERS = {
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": lambda draft: draft.prose(3, naming_topic=False).upper(),
    "change_case:english_lowercase": lambda draft: draft.prose(2).lower(),
    "combination:repeat_prompt": lambda draft, prompt_to_repeat: (
        f"{prompt_to_repeat}\n{draft.text}"
    ),
    "combination:two_responses": lambda draft: "\n******\n".join(draft.lines(2)),
    "detectable_content:number_placeholders": placeholders,
    "detectable_content:postscript": lambda draft, postscript_marker: (
        f"{draft.text}\n{postscript_marker} {draft.prose(1)}"
    ),
    "detectable_format:constrained_response": lambda draft: (
        f"My answer is {draft.rng.choice(['yes', 'no', 'maybe'])}."
    ),
    "detectable_format:json_format": lambda draft: json.dumps({"answer": draft.prose(1)}),
    "detectable_format:multiple_sections": sections,
    "detectable_format:number_bullet_lists": lambda draft, num_bullets: "\n".join(
        f"* {line}" for line in draft.lines(num_bullets)
    ),
    "detectable_format:number_highlighted_sections": highlights,
    "detectable_format:title": lambda draft: f"<<{draft.topic.title()}>>\n{draft.text}",
    "keywords:existence": lambda draft, keywords: (
        f"{draft.text} Think of {' and '.join(keywords)}."
    ),
    "keywords:forbidden_words": lambda draft, forbidden_words: draft.text,
    "keywords:frequency": lambda draft, relation, keyword, frequency: (
        draft.text + f" Think of {keyword}." * frequency
    ),
    "keywords:letter_frequency": lambda draft, let_relation, letter, let_frequency: (
        f"{draft.text} Spell it {letter * let_frequency}."
    ),
    "language:response_language": lambda draft, language: " ".join(
        words()["languages"][language]["sentences"]
    ),
    "length_constraints:nth_paragraph_first_word": first_word,
    "length_constraints:number_paragraphs": lambda draft, num_paragraphs: "\n***\n".join(
        draft.lines(num_paragraphs)
    ),
    "length_constraints:number_sentences": lambda draft, relation, num_sentences: draft.prose(
        num_sentences
    ),
    "length_constraints:number_words": lambda draft, relation, num_words: draft.prose(
        num_words // 5
    ),  # no sentence pattern has fewer than five words
    "punctuation:no_comma": lambda draft: draft.text.replace(",", ""),
    "startend:end_checker": lambda draft, end_phrase: f"{draft.text} {end_phrase}",
    "startend:quotation": lambda draft: f'"{draft.text}"',
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
        draft.text = WRITERS[instruction](draft, **kwargs)
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
