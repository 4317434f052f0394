"""Judge one chat template by random conversations: two methods, and what TRL would train.

Texts only: no tokenizer is needed.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

from tokenizers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

from atlas_lib.loss_mask.markers import trl_markers
from atlas_lib.loss_mask.report import switches
from atlas_lib.loss_mask.sentinels import Opinion, Sentinels, judged, left_out
from atlas_lib.loss_mask.turns import (
    NEXT,
    ONE_ROW_PER_TURN,
    RENDERING_ERRORS,
    RESPONSE,
    USER,
    ChatTemplate,
    Row,
    Span,
)
from tools.random_chats import ARGUMENTS, FIELDS, QUOTED, TOOLS, Conversations, Shape, answer, call

STAND_IN = (
    "Stops and headers are found without the models' tokenizers: the markers in a template's text "
    "and in what it renders stand in for the special tokens, and BOS and EOS are called "
    "<|bos_token|> and <|eos_token|>."
)
MARKER = re.compile(
    r"<(?!/?(?:think|tool))[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]|\[\|[a-z]+\|\]|\[e~\[|\]~b\]"
)
PER_TURN = "one row per turn"
GOOD = ("exact", PER_TURN)  # statuses of templates that can be trained, best first
CHATS = {"plain": 15, "tools": 8, "reasoning": 8}  # conversations of each kind
QUESTION = {"role": "user", "content": USER}


class StandIn:
    """What ChatTemplate needs of a tokenizer, guessed from the template; see STAND_IN."""

    special_tokens_map = MappingProxyType(
        {"bos_token": "<|bos_token|>", "eos_token": "<|eos_token|>"}
    )

    def __init__(self, text: str):
        self.chat_template = text
        try:
            chat = [QUESTION, answer(RESPONSE, ""), QUESTION]
            shown, _ = render_jinja_template([chat], chat_template=text, **self.special_tokens_map)
        except RENDERING_ERRORS:
            shown = []  # ChatTemplate says why
        found = set(MARKER.findall(text + "".join(shown))) | set(self.special_tokens_map.values())
        self.markers = sorted(found)
        tokens = (AddedToken(marker, special=True) for marker in self.markers)
        self.added_tokens_decoder = dict(enumerate(tokens))


class Verdict(NamedTuple):
    """What the two methods say of one conversation; no opinion where sentinels cannot judge."""

    status: str
    rows: Sequence[Row] = ()
    opinions: Sequence[Opinion | None] = ()

    def judged_by_both(self) -> Iterator[tuple[Row, Opinion]]:
        pairs = zip(self.rows, self.opinions, strict=True)
        return ((row, opinion) for row, opinion in pairs if judged(row, opinion))

    def dropped(self) -> list[str]:
        """Texts that rows should show or teach and do not; earlier reasoning may be left out."""
        return [
            f"{row.chat[text.message]['role']} {text.key}"
            for row, opinion in zip(self.rows, self.opinions, strict=True)
            for text in (left_out(row, opinion) if opinion else ())
        ]

    def contradictions(self) -> Iterator[dict[str, Any]]:
        """The responses for which the methods find different spans."""
        for row, opinion in self.judged_by_both():
            for message, span in row.spans.items():
                if opinion.spans[message] != span:
                    other = row.text[slice(*opinion.spans[message])]
                    texts = {"prefixes": row.text[slice(*span)], "sentinels": other}
                    yield {"message": message} | texts


def survey_template(text: str) -> dict[str, Any]:
    """What is found of one template: its record without names."""
    try:
        judge = Judge(ChatTemplate(StandIn(text)))
    except ValueError as error:
        name, _ = trl_markers(text)
        trl = {"template": name} if name else None
        return {"status": "refused", "reason": str(error).splitlines()[0][:200], "trl": trl}
    shapes = judge.shapes()
    verdicts = {kind: list(judge.verdicts(kind, CHATS[kind], shapes[kind])) for kind in shapes}
    summaries = {kind: summary_of(each) for kind, each in verdicts.items()}
    whole = [row for v in verdicts["plain"] if len(v.rows) == 1 for row in v.rows]
    record = {
        **summaries.pop("plain"),
        "stop": judge.template.ending.stop,
        "header": judge.template.header,
        "lead": judge.lead(),
        "shows_system": judge.shows_system,
        "trl": judge.by_trl(whole),
    }
    if record["status"] != "exact":
        record["exact_with"] = best_switch(text, record["status"])
    if "tools" in shapes:
        record["tools"] = {"arguments": shapes["tools"].arguments} | summaries["tools"]
    if "reasoning" in shapes:
        fields = [field for field in FIELDS if judge.shows_reasoning(field)]
        record["reasoning"] = {"fields": fields} | summaries["reasoning"]
    return record


def best_switch(text: str, status: str) -> dict[str, str] | None:
    """The variable that makes a template exact or, if it was not, trainable."""
    for name, value in switches(text):
        better = status_with(text, {name: value})
        if better in GOOD and better != status:
            return {"variable": f"{name}={str(value).lower()}", "status": better}
    return None


def status_with(text: str, variables: dict[str, bool]) -> str:
    try:
        judge = Judge(ChatTemplate(StandIn(text), None, variables))
    except ValueError:
        return "refused"
    verdicts = judge.verdicts("plain", CHATS["plain"], judge.shapes()["plain"])
    return status_of(Counter(verdict.status for verdict in verdicts))


class Judge:
    """Judges conversations by one chat template."""

    def __init__(self, chat_template: ChatTemplate):
        self.template, self.sentinels = chat_template, Sentinels(chat_template)
        self.shows_system = self.template.shows(
            [{"role": "system", "content": NEXT}, QUESTION], NEXT
        )

    def lead(self) -> str | None:
        """What every response begins with before its content; None if its prompt is not known."""
        [turn] = self.template.turns([QUESTION, answer(RESPONSE, "")])
        if turn.status == "prompt" or RESPONSE not in turn.answered:
            return None
        return turn.answered[len(turn.prompt) :].split(RESPONSE)[0]

    def shows_reasoning(self, field: str) -> bool:
        return self.template.shows([QUESTION, answer(RESPONSE, NEXT, field)], NEXT)

    def shapes(self) -> dict[str, Shape]:
        """The kinds of conversations that the template renders."""
        found = {"plain": Shape(self.shows_system)}
        calls = ((given, call(RESPONSE, given)) for given in ARGUMENTS)
        shown = (
            given for given, each in calls if self.template.shows([QUESTION, each], RESPONSE, TOOLS)
        )
        if given := next(shown, None):
            found["tools"] = Shape(self.shows_system, arguments=given)
        fields = filter(self.shows_reasoning, FIELDS)
        if re.search("think|reasoning", self.template.text) and (field := next(fields, None)):
            found["reasoning"] = Shape(self.shows_system, reasoning=field)
        return found

    def verdicts(self, kind: str, count: int, shape: Shape) -> Iterator[Verdict]:
        """Verdicts on random conversations of one kind; every third quotes markers."""
        tokens = self.template.tokenizer.added_tokens_decoder.values()
        markers = (*QUOTED, *(token.content for token in tokens))
        for number in range(count):
            draw = Conversations(
                f"{kind} conversation {number}", markers if number % 3 == 2 else ()
            )
            yield self.conversation(draw.draw(shape), TOOLS if kind == "tools" else None)

    def conversation(self, chat: list[dict], tools: list[dict] | None = None) -> Verdict:
        try:
            turns = self.template.turns(chat, tools)
        except ValueError:
            return Verdict("raises")
        if wrong := [turn.status for turn in turns if turn.status not in ONE_ROW_PER_TURN]:
            return Verdict(wrong[0])
        rows = self.template.rows(chat, turns, tools)
        status = GOOD[any(turn.status != "exact" for turn in turns)]
        verdict = Verdict(status, rows, [self.sentinels.judge(row) for row in rows])
        return verdict._replace(status="dropped") if verdict.dropped() else verdict

    def by_trl(self, rows: Sequence[Row]) -> dict[str, Any] | None:
        """What TRL trains beyond the responses of whole conversations; None if it refuses."""
        name, markers = trl_markers(self.template.text)
        if not markers:
            return None
        counts = Counter(rows_compared=0, rows_with_another_text=0, responses=0)
        beyond, missing = Counter(), Counter()
        for row in rows:
            text, spans = self.template.render_marked(row, markers)
            if text != row.text:
                counts["rows_with_another_text"] += 1
                continue
            trained, wanted = characters(spans), characters(row.spans.values())
            counts.update(rows_compared=1, responses=len(row.spans))
            beyond.update(pieces(text, trained - wanted))
            missing.update(pieces(text, wanted - trained))
        shown = {"beyond": dict(beyond.most_common(5)), "missing": dict(missing.most_common(5))}
        return {"template": name, **counts, **shown}


def characters(spans: Iterable[Span]) -> set[int]:
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
        "judged_by_both": sum(1 for verdict in verdicts for _ in verdict.judged_by_both()),
        "dropped": sorted({name for verdict in verdicts for name in verdict.dropped()}),
        "contradictions": [
            {"chat": number} | found
            for number, verdict in enumerate(verdicts)
            for found in verdict.contradictions()
        ],
    }
