"""The findings of an audit of any tokenizer on any conversations, and how to print them."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atlas_lib.loss_mask import labelling
from atlas_lib.loss_mask.audit import Auditor, Judged, with_tools
from atlas_lib.loss_mask.token_rows import TokenRow
from atlas_lib.loss_mask.turns import STATUS, ChatTemplate

# Variables of known templates that may make a row exact, with the values to try.
SWITCHES = {
    "enable_thinking": (False, True),
    "thinking": (False, True),
    "preserve_thinking": (True,),
    "clear_thinking": (False,),
    "truncate_history_thinking": (False,),
    "is_training": (True,),
}
SHOWN_FINDINGS = 5


@dataclass
class Report:
    """What an audit of conversations found; `findings` is empty if every row is exact."""

    stops: tuple[str, ...]
    generation_stops: list[str]
    stops_source: str  # where generation_stops stand
    trl: bool  # whether TRL has a training template for this one
    counts: Counter = field(default_factory=Counter)
    status: Counter = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)  # status -> where it was first seen
    dropped: Counter = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The report in lines of text."""
        count = self.counts
        share = count["n_supervised"] / max(count["n_tokens"], 1)
        yield (
            f"{count['rows']:,} conversations, {count['turns']:,} responses; "
            f"{count['n_supervised']:,} of {count['n_tokens']:,} tokens are learned ({share:.0%})"
        )
        stops, ends = (", ".join(map(repr, s)) for s in (self.stops, self.generation_stops))
        yield f"responses end with {stops}; generation stops at {ends} ({self.stops_source})"
        for status, number in self.status.most_common():
            where = f"first in {self.example[status]}"
            yield f"responses of status {status!r}: {number:,}, {where}: {STATUS[status]}"
        rows = f"training rows: {count['training_rows']:,}"
        if alone := count["rows_of_one_turn"]:
            rows += f", {alone:,} of them with one response, as the template rewrites earlier turns"
        yield rows
        alone = count["judged_by_prefixes_alone"]
        yield f"rows on which two methods agree: {count['training_rows'] - alone:,}" + (
            f"; {alone:,} could be judged by prefixes alone, as the template looks into texts"
            if alone
            else ""
        )
        if self.dropped:
            fields = ", ".join(f"{name} ({number:,})" for name, number in self.dropped.items())
            yield f"texts that the template leaves out: {fields}"
        if count["turns_cut"]:
            yield f"responses that lose their end to --max-length: {count['turns_cut']:,}"
        yield self.trl_line()
        yield from (f"FINDING {finding}" for finding in self.findings[:SHOWN_FINDINGS])
        if (more := len(self.findings) - SHOWN_FINDINGS) > 0:
            yield f"... and {more:,} more"
        yield from (f"ADVICE {sentence}" for sentence in self.advice)
        yield "NOT EXACT" if self.findings else "EXACT"

    def trl_line(self) -> str:
        """What TRL's assistant_only_loss would do with these conversations."""
        if not self.trl:
            return "TRL's assistant_only_loss: no training template for this one, raises ValueError"
        if not (rows := self.counts["trl_rows"]):
            return "TRL's assistant_only_loss: renders no row as it is here, so nothing to compare"
        more, fewer = self.counts["trl_extra"], self.counts["trl_missing"]
        found = f"{more:,} tokens too many, {fewer:,} too few"
        return f"TRL's assistant_only_loss: {found} in the {rows:,} rows that it renders alike"


def examine(
    auditor: Auditor,
    judged: Iterable[Judged],
    conversations: Sequence,
    generation_stops: tuple[list[str], str],
) -> Report:
    """What is wrong with `conversations` as `auditor` judged them, and what to do about it."""
    endings = (auditor.template.ending, auditor.template.call_ending)
    stops = tuple(dict.fromkeys(ending.stop for ending in endings))
    report = Report(stops, *generation_stops, auditor.trl_template is not None)
    for record, rows, opinions in judged:
        where = f"row {record['idx']}"
        report.counts.update(_counts(record, rows, auditor))
        report.status.update(record["turn_status"])
        for opinion in filter(None, opinions):
            report.dropped.update({text.key for text in opinion.dropped})
        if record["error"]:
            report.findings.append(f"{where}: {record['error']}")
        if "prompt" in record["turn_status"] and "prompt" not in report.example:
            report.advice += _switch_advice(auditor.template, conversations[record["idx"]])
        for status in record["turn_status"]:
            report.example.setdefault(status, where)
    report.advice += _advice(report)
    return report


def _counts(record: dict, rows: list[TokenRow], auditor: Auditor) -> dict[str, int]:
    limit = auditor.limit
    comparable = rows if auditor.trl_template and len(rows) == 1 else []
    pairs = [(row.mask[:limit], auditor.trl_mask(row)[:limit]) for row in comparable]
    return {
        "rows": 1,
        "n_tokens": sum(min(len(row.ids), limit) for row in rows),
        "turns": len(record["turn_status"]),
        "turns_cut": sum(turn["cut"] for turn in record["turns"]),
        "rows_of_one_turn": len(rows) if len(rows) > 1 else 0,
        "trl_rows": sum(bool(theirs.any()) for _, theirs in pairs),
        "trl_extra": sum(int((theirs & ~ours).sum()) for ours, theirs in pairs),
        "trl_missing": sum(int((ours & ~theirs).sum()) for ours, theirs in pairs if theirs.any()),
        f"rows_{record['verdict']}": 1,
    } | {key: record[key] for key in ("n_supervised", "training_rows", "judged_by_prefixes_alone")}


def _advice(report: Report) -> Iterator[str]:
    for stop in set(report.stops) - set(report.generation_stops):
        yield f"Generation does not stop at {stop!r}: add it to eos_token_id of its config."
    if report.counts["rows_of_one_turn"]:
        yield "Train one row per response: a row with a whole conversation would not be exact."
    if report.status["no stop"]:
        yield "Append the stop token to the last response: only a next message would add it."


def switches(text: str) -> Iterator[tuple[str, bool]]:
    """The SWITCHES that the template `text` has, with each value."""
    for name, values in SWITCHES.items():
        if re.search(rf"\b{name}\b", text):
            yield from ((name, value) for value in values)


def _switch_advice(chat_template: ChatTemplate, conversation: Any) -> Iterator[str]:
    """Which variables of the template would make the responses of `conversation` exact."""
    chat, tools = with_tools(conversation)
    for name, value in switches(chat_template.text):
        variables = chat_template.variables | {name: value}
        other = ChatTemplate(chat_template.tokenizer, chat_template.text, variables)
        if not any(turn.status == "prompt" for turn in other.turns(chat, tools)):
            yield f"--set {name}={str(value).lower()} makes the prompt the beginning of the row."
            return
    yield (
        "No row can show what inference shows: are there two responses in a row? Otherwise try "
        "another --template."
    )


def judge_labels(
    auditor: Auditor, judged: Iterable[Judged], labelled: Iterable[dict]
) -> Iterator[str]:
    """What is wrong with rows of `input_ids` and `labels` made elsewhere of what was judged.

    Rows are matched with conversations by their ids, so that their order does not matter.
    """
    expected = {tuple(row.ids[: auditor.limit]): row for _, rows, _ in judged for row in rows}
    matched: Counter = Counter()
    for number, given in enumerate(labelled):
        ids, labels = tuple(given["input_ids"]), np.asarray(given["labels"])
        row = expected.get(ids)
        matched[ids] += row is not None
        if problem := _unmatched(ids, expected) if row is None else _wrong(labels, row, auditor):
            yield f"labels row {number}: {problem}"
    if missing := len(expected) - sum(times > 0 for times in matched.values()):
        yield f"{missing:,} of {len(expected):,} training rows have no row of labels"
    if repeated := sum(times > 1 for times in matched.values()):
        yield f"{repeated:,} training rows have several rows of labels"


def _unmatched(ids: tuple[int, ...], expected: Iterable[tuple[int, ...]]) -> str:
    """Why no conversation has these ids."""
    whole = next((len(other) for other in expected if other[: len(ids)] == ids), None)
    if whole:
        return f"cut at {len(ids):,} of {whole:,} tokens; if that is meant, give --max-length"
    return "its ids are those of no conversation: other text, template, tokenizer or cut"


def _wrong(labels: np.ndarray, row: TokenRow, auditor: Auditor) -> str | None:
    ids, mask = np.asarray(row.ids[: auditor.limit]), row.mask[: auditor.limit]
    if len(labels) != len(ids):
        return f"{len(labels)} labels for {len(ids)} ids"
    trained = labels != labelling.IGNORED
    wrong = np.flatnonzero((trained != mask) | (trained & (labels != ids)))
    if not wrong.size:
        return None
    first = int(wrong[0])
    should = "must be" if mask[first] else "must not be"
    return (
        f"{wrong.size:,} labels are wrong, the first at token {first} "
        f"({auditor.decode(int(ids[first]))!r}), which {should} learned"
    )
