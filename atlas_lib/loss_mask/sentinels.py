"""The second opinion on a row: where each text of a conversation stands in it, without prefixes.

A conversation is rendered once with a sentinel for each of its texts (contents, reasoning, names
and arguments of tool calls). Putting the texts back must give the row; then the position of each is
known. A response reaches from the generation prompt before its first text to the stop after its
last. Templates that look into texts cannot be judged in this way.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from atlas_lib.loss_mask.turns import RENDERING_ERRORS, Chat, ChatTemplate, Row, Span

SENTINEL = re.compile("\ue000(\\d+)\ue001")
SHOWN = ("content", "tool_calls")  # texts that every row must show
TEXTS = ("content", "reasoning_content", "reasoning", "thinking")


class Leaf(NamedTuple):
    """One text of a conversation: the index of its message, the key that holds it, itself."""

    message: int
    key: str
    text: str


class Opinion(NamedTuple):
    """{message: span of its response} where it was found, and texts that are left out."""

    spans: dict[int, Span]
    dropped: list[Leaf]


class Sentinels:
    """Judges rows of one chat template; rows of one shape are rendered once."""

    def __init__(self, template: ChatTemplate):
        self.template = template
        self._skeletons: dict[str, str | None] = {}

    def judge(self, row: Row) -> Opinion | None:
        """Spans of the responses that `row` trains; None if this method cannot tell."""
        marked, texts = mark(row.chat)
        skeleton = self._skeleton(marked, row.tools)
        if skeleton is None:
            return None
        present = [int(number) for number in SENTINEL.findall(skeleton)]
        literals = SENTINEL.split(skeleton)[::2]
        found = _put_back(literals, [texts[number].text for number in present], row.text)
        if found is None:
            return None
        spans_of = dict(zip(reversed(present), reversed(found), strict=True))  # the first of each
        places = [(texts[number], *span) for number, span in spans_of.items()]
        found_spans = {message: self._span(message, places, row) for message in row.spans}
        spans = {message: span for message, span in found_spans.items() if span}
        dropped = [t for number, t in enumerate(texts) if t.text and number not in present]
        return Opinion(spans, dropped)

    def _skeleton(self, marked: Chat, tools: list[dict] | None) -> str | None:
        shape = json.dumps([marked, tools])
        if shape not in self._skeletons:
            try:
                [self._skeletons[shape]] = self.template.render([marked], tools=tools)
            except RENDERING_ERRORS:
                self._skeletons[shape] = None
        return self._skeletons[shape]

    def _span(self, message: int, places: list[tuple[Leaf, int, int]], row: Row) -> Span | None:
        own = [place[1:] for place in places if place[0].message == message]
        if not own:
            return None
        before = max((end for place, _, end in places if place.message < message), default=0)
        first, last = min(start for start, _ in own), max(end for _, end in own)
        header = row.text.rfind(self.template.header, before, first)
        stop = self.template.ending_of(row.chat[message]).stop
        end = row.text.find(stop, last)
        if min(header, end) < 0:
            return None
        return header + len(self.template.header), end + len(stop)


def judged(row: Row, opinion: Opinion | None) -> bool:
    """Whether the sentinels have found every response that the row trains."""
    return opinion is not None and opinion.spans.keys() == row.spans.keys()


def left_out(row: Row, opinion: Opinion) -> list[Leaf]:
    """Texts that the row should teach or show and does not; earlier reasoning may be left out."""
    return [t for t in opinion.dropped if t.message in row.spans or t.key in SHOWN]


def mark(chat: Chat) -> tuple[Chat, list[Leaf]]:
    """`chat` with a sentinel for each text, and the texts in the order of their numbers."""
    texts: list[Leaf] = []

    def replace(value: Any, message: int, key: str) -> Any:
        if isinstance(value, str):
            texts.append(Leaf(message, key, value))
            return f"\ue000{len(texts) - 1}\ue001"
        if isinstance(value, dict):
            return {name: replace(item, message, key) for name, item in value.items()}
        if isinstance(value, list):
            return [replace(item, message, key) for item in value]
        return value

    marked = []
    for index, message in enumerate(chat):
        copy = dict(message)
        for key in (key for key in TEXTS if key in message):
            if message[key] or not message.get("tool_calls"):  # templates ask for empty contents
                copy[key] = replace(message[key], index, key)
        if calls := message.get("tool_calls"):
            functions = [replace(call["function"], index, "tool_calls") for call in calls]
            pairs = zip(calls, functions, strict=True)
            copy["tool_calls"] = [call | {"function": function} for call, function in pairs]
        marked.append(copy)
    return marked, texts


def _put_back(literals: list[str], texts: list[str], row: str) -> list[Span] | None:
    """The span of each text in `row`, which consists of `literals` with the texts in between."""
    at, spans = len(literals[0]), []
    for text, literal in zip(texts, literals[1:], strict=True):
        ends = (at + len(form) for form in _forms(text) if row.startswith(form + literal, at))
        end = next(ends, None)
        if end is None:
            return None
        spans.append((at, end))
        at = end + len(literal)
    return spans if row.startswith(literals[0]) and row[at:] == "" else None


def _forms(text: str) -> Iterator[str]:
    """A text as templates write it: as it is, trimmed, or escaped for JSON."""
    yield text
    yield from (text.strip(), text.lstrip(), text.rstrip())
    yield from (json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
