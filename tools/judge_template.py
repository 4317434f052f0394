"""Judge one chat template by random conversations: two methods, and what TRL would train.

Texts only: no tokenizer is needed.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from tokenizers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

from atlas_lib import template
from atlas_lib.loss_mask.sentinels import Opinion, Sentinels
from atlas_lib.loss_mask.turns import NEXT, ONE_ROW_PER_TURN, RESPONSE, USER, ChatTemplate, Row
from tools.random_chats import ARGUMENTS, FIELDS, QUOTED, TOOLS, Conversations, Shape, answer, call

STAND_IN = (
    "Stops and headers without the models' tokenizers: the added tokens are taken to be the markers "
    "in a template's text and in what it renders, and BOS and EOS are called <|bos_token|> and "
    "<|eos_token|>."
)
MARKER = re.compile(
    r"<(?!/?(?:think|tool))[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]|\[\|[a-z]+\|\]|\[e~\[|\]~b\]"
)
PER_TURN = "one row per turn"
GOOD = ("exact", PER_TURN)  # statuses of templates that can be trained, best first
SWITCHES = ("enable_thinking", "thinking")  # variables that, if false, may make a template exact
CHATS = {"plain": 15, "tools": 6, "reasoning": 6}  # conversations of each kind
REFUSALS = (TemplateError, TypeError, ValueError, KeyError)
QUESTION = {"role": "user", "content": USER}


class StandIn:
    """What ChatTemplate needs of a tokenizer, guessed from the template; see STAND_IN."""

    special_tokens_map = {"bos_token": "<|bos_token|>", "eos_token": "<|eos_token|>"}

    def __init__(self, text: str):
        self.chat_template = text
        try:
            chat = [QUESTION, answer(RESPONSE, ""), QUESTION]
            shown, _ = render_jinja_template([chat], chat_template=text, **self.special_tokens_map)
        except REFUSALS:
            shown = []  # ChatTemplate says why
        found = set(MARKER.findall(text + "".join(shown))) | set(self.special_tokens_map.values())
        self.markers = sorted(found)
        self.added_tokens_decoder = dict(enumerate(map(AddedToken, self.markers)))


class Verdict(NamedTuple):
    """What the two methods say of one conversation, and what TRL's markers would train."""

    status: str
    rows: Sequence[Row] = ()
    judged: int = 0  # rows that sentinels can judge, too
    contradictions: Sequence[dict] = ()
    dropped: Sequence[str] = ()


def survey_template(text: str) -> dict[str, Any]:
    """What is found of one template: its record without names."""
    try:
        judge = Judge(ChatTemplate(StandIn(text)))
    except ValueError as error:
        return {"status": "refused", "reason": str(error).splitlines()[0][:200]}
    verdicts = judge.kind("plain")
    record = {
        **summary_of(verdicts),
        "stop": "".join(judge.template.stops),
        "header": judge.template.header,
        "lead": judge.lead(),
        "takes_system": judge.takes_system,
        "trl": judge.by_trl([row for v in verdicts if len(v.rows) == 1 for row in v.rows]),
    }
    if record["status"] not in GOOD[:1]:
        record["exact_with"] = best_switch(text, record["status"])
    return record | judge.tools() | judge.reasoning()


def best_switch(text: str, status: str) -> dict[str, str] | None:
    """The variable that makes a template exact, or trainable, if it is false."""
    for switch in SWITCHES:
        if re.search(rf"\b{switch}\b", text):
            judge = Judge(ChatTemplate(StandIn(text), **{switch: False}))
            better = status_of(Counter(verdict.status for verdict in judge.kind("plain")))
            if better in GOOD and better != status:
                return {"variable": f"{switch}=false", "status": better}
    return None


class Judge:
    """Judges conversations by one chat template."""

    def __init__(self, chat_template: ChatTemplate):
        self.template, self.sentinels = chat_template, Sentinels(chat_template)
        self.takes_system = self.shows([{"role": "system", "content": "x"}, QUESTION])

    def shows(self, chat: list[dict], shown: str = "", tools: list[dict] | None = None) -> bool:
        """Whether the template renders `chat`, and `shown` in it."""
        try:
            return shown in self.template.render([chat], tools=tools)[0]
        except REFUSALS:
            return False

    def lead(self) -> str | None:
        """What every response begins with before its content; None if its prompt is not known."""
        [turn] = self.template.turns([QUESTION, answer(RESPONSE, "")])
        if turn.status == "prompt" or RESPONSE not in turn.answered:
            return None
        return turn.answered[len(turn.prompt) :].split(RESPONSE)[0]

    def tools(self) -> dict[str, Any]:
        for arguments in ARGUMENTS:
            if self.shows([QUESTION, call(RESPONSE, arguments)], RESPONSE, TOOLS):
                found = summary_of(self.kind("tools", arguments=arguments))
                return {"tools": {"arguments": arguments} | found}
        return {}

    def reasoning(self) -> dict[str, Any]:
        if not re.search("think|reasoning", self.template.text):
            return {}
        shown = [f for f in FIELDS if self.shows([QUESTION, answer(RESPONSE, NEXT, f)], NEXT)]
        found = summary_of(self.kind("reasoning", reasoning=shown[0])) if shown else {}
        return {"reasoning": {"fields": shown} | found}

    def kind(self, kind: str, **shape: Any) -> list[Verdict]:
        """Verdicts on random conversations of one kind; every third quotes markers."""
        markers = (*QUOTED, *self.template.tokenizer.markers)
        shape = Shape(system=self.takes_system, **shape)
        drawn = (
            Conversations(f"{kind} {number}", markers if number % 3 == 2 else ()).draw(shape)
            for number in range(CHATS[kind])
        )
        return [self.conversation(chat, TOOLS if kind == "tools" else None) for chat in drawn]

    def conversation(self, chat: list[dict], tools: list[dict] | None = None) -> Verdict:
        try:
            turns = self.template.turns(chat, tools)
        except ValueError:
            return Verdict("raises")
        if wrong := [turn.status for turn in turns if turn.status not in ONE_ROW_PER_TURN]:
            return Verdict(wrong[0])
        rows = self.template.rows(chat, turns)
        opinions = [self.sentinels.judge(row, tools) for row in rows]
        both = [(row, opinion) for row, opinion in zip(rows, opinions, strict=True) if opinion]
        dropped = [name for pair in both for name in dropped_by(*pair)]
        status = GOOD[any(turn.status != "exact" for turn in turns)]
        found = [each for pair in both for each in contradictions(*pair)]
        return Verdict("dropped" if dropped else status, rows, len(both), found, dropped)

    def by_trl(self, rows: Sequence[Row]) -> dict[str, Any] | None:
        """What TRL trains beyond the responses of whole conversations; None if it refuses."""
        if not (markers := trl_markers(self.template.text)):
            return None
        counts = {"beyond": Counter(), "missing": Counter(), "other_text": 0, "responses": 0}
        for row in rows:
            text, trained = spans_by_trl(row, markers[1], self.template.tokenizer)
            if text != row.text:
                counts["other_text"] += 1
                continue
            wanted = characters(row.spans.values())
            counts["responses"] += len(row.spans)
            counts["beyond"].update(pieces(text, trained - wanted))
            counts["missing"].update(pieces(text, wanted - trained))
        shown = {key: dict(counts[key].most_common(5)) for key in ("beyond", "missing")}
        return {"template": markers[0], "rows": len(rows)} | counts | shown


def dropped_by(row: Row, opinion: Opinion) -> list[str]:
    """Texts that the row should show or teach and does not; earlier reasoning may be left out."""
    return [
        f"{row.chat[text.message]['role']} {text.key}"
        for text in opinion.dropped
        if text.message in row.spans or text.key in ("content", "tool_calls")
    ]


def contradictions(row: Row, opinion: Opinion) -> Iterator[dict[str, Any]]:
    """The responses of a row for which the methods find different spans."""
    for message, span in row.spans.items():
        if opinion.spans[message] != span:
            texts = {"prefixes": row.text[slice(*span)]}
            texts["sentinels"] = row.text[slice(*opinion.spans[message])]
            yield {"message": message, "row": row.text} | texts


def trl_markers(text: str) -> tuple[str, str] | None:
    """Name and text of the template with markers that TRL trains with; None if it refuses."""
    if "generation" in re.findall(r"\{%-?\s*(\w+)\s*-?%\}", text):
        return "its own markers", text
    training = template.trl_training_template(text)
    names = (name for name, each in template.trl_templates().items() if each == training)
    return (next(names), training) if training else None


def spans_by_trl(row: Row, markers: str, tokenizer: Any) -> tuple[str, set[int]]:
    """The text that a template with markers renders, and the characters that it marks."""
    [text], [spans] = render_jinja_template(
        [row.chat],
        chat_template=markers,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return text, characters(spans)


def characters(spans: Iterable[tuple[int, int]]) -> set[int]:
    return {at for start, end in spans for at in range(start, end)}


def pieces(text: str, at: set[int]) -> list[str]:
    """The runs of `text` at these positions."""
    runs = re.findall("1+|0+", "".join("01"[i in at] for i in range(len(text))))
    starts = accumulate(map(len, runs), initial=0)
    pairs = zip(runs, starts, strict=False)
    return [text[start : start + len(run)] for run, start in pairs if run[0] == "1"]


def status_of(chats: Mapping[str, int]) -> str:
    """The status of a template from those of its conversations."""
    if set(chats) <= set(GOOD):
        return GOOD[PER_TURN in chats]
    return next(iter(chats)) if len(chats) == 1 else "mixed"


def summary_of(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    chats = Counter(verdict.status for verdict in verdicts)
    return {
        "status": status_of(chats),
        "chats": dict(chats),
        "rows": sum(len(verdict.rows) for verdict in verdicts),
        "judged_by_both": sum(verdict.judged for verdict in verdicts),
        "dropped": sorted({name for verdict in verdicts for name in verdict.dropped}),
        "contradictions": [
            {"chat": number} | found
            for number, verdict in enumerate(verdicts)
            for found in verdict.contradictions
        ],
    }
