"""The audit of every row: which tokens the loss will see, recorded before weights are loaded."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from atlas_lib import artifacts, models, stages
from atlas_lib.data_prep import subset
from atlas_lib.loss_mask import labelling, markers
from atlas_lib.loss_mask.sentinels import Leaf, Opinion, Sentinels, judged, left_out
from atlas_lib.loss_mask.token_rows import TokenRow, tokenise
from atlas_lib.loss_mask.turns import Chat, ChatTemplate, Row, Turn
from atlas_lib.schema import Config

Judged = tuple[dict, list[TokenRow], list[Opinion | None]]  # of one conversation
AUDIT_ROWS = "sft_template_audit.jsonl"
PER_ROW = ("n_tokens", "n_supervised", "n_supervised_by_trl", "straddling", "training_rows")
COUNTED = (
    "rows_ok", "rows_excluded", "rows_dropped", "rows_failed", "rows_truncated", *PER_ROW,
    "turns", "turns_cut", "judged_by_prefixes_alone",
)  # fmt: skip


def audit_rows(
    chat_template: ChatTemplate, conversations: Iterable[Chat], config: Config, split: str = "train"
) -> Iterator[dict]:
    """Yield one row per conversation, with the fields of sft_template_audit.jsonl.

    If the tokenizer's template is marked, transformers makes the mask from the markers; otherwise
    training rows are made by prefixes. Prefixes, sentinels and (with markers) the grammar of ChatML
    must agree on every token.
    """
    stop, eos_token = chat_template.ending.stop, chat_template.tokenizer.eos_token
    if eos_token != stop:
        raise ValueError(
            f"Responses end with {stop!r}, but the tokenizer's eos token is {eos_token!r}, at "
            "which decoding stops: set model.eos_token."
        )
    auditor = Auditor(chat_template, config, split)
    return (record for record, _, _ in auditor.judge(conversations))


class Auditor:
    """What the rows of one audit share, and how one of them is judged."""

    def __init__(self, chat_template: ChatTemplate, config: Config, split: str = "train"):
        tokenizer = chat_template.tokenizer
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.template, self.config = chat_template, config
        _, self.trl_template = markers.trl_markers(chat_template.text)
        self.sentinels = Sentinels(chat_template)
        self.limit = config.train.max_length or sys.maxsize  # None: TRL truncates nothing
        self.special = chat_template.special
        self.special_ids = set(tokenizer.convert_tokens_to_ids(special))
        known = subset.known_rows(config) if split == "train" else []
        self.known_lengths = {row["idx"]: row["n_tokens"] for row in known}
        self.decode = cache(tokenizer.decode)

    def judge(self, conversations: Iterable[Chat | dict]) -> Iterator[Judged]:
        """The audit's row of each conversation, its training rows and the sentinels' opinions.

        A conversation is a list of messages, or a dict with `messages` and `tools`.
        """
        numbered = enumerate(conversations)
        while batch := list(islice(numbered, 64)):
            yield from self._batch([(idx, *with_tools(given)) for idx, given in batch])

    def _batch(self, batch: list[tuple[int, Chat, list[dict] | None]]) -> Iterator[Judged]:
        found = [(idx, chat, *self.training_rows(idx, chat, tools)) for idx, chat, tools in batch]
        tokens = tokenise(self.template, [row for *_, rows, _ in found for row in rows])
        for idx, chat, turns, rows, problem in found:
            of_chat = list(islice(tokens, len(rows)))
            opinions = [self.sentinels.judge(row.row) for row in of_chat]
            verdict = self.verdict(idx, chat, of_chat, opinions, problem)
            yield self.record(idx, turns, of_chat, opinions, *verdict), of_chat, opinions

    def training_rows(
        self, idx: int, chat: Chat, tools: list[dict] | None
    ) -> tuple[list[Turn], list[Row], str | None]:
        """Turns and training rows of a conversation, or why it has no rows."""
        try:
            turns = self.template.turns(chat, tools)
        except ValueError as error:
            raise ValueError(f"Conversation {idx}: {error}") from None
        try:
            rows = self.template.rows(chat, turns, tools)
        except ValueError as error:
            return turns, [], str(error)
        if self.template.marked and len(rows) > 1:
            return turns, [], "the marked template cannot train one row per turn"
        return turns, rows, None if rows else "no assistant turn found"

    def record(
        self,
        idx: int,
        turns: list[Turn],
        rows: list[TokenRow],
        opinions: list[Opinion | None],
        verdict: str,
        error: str | None,
    ) -> dict[str, Any]:
        """One row of the audit's file."""
        limit, head = self.limit, self.config.audit.head_tokens
        ids, mask, text = [], np.zeros(0), ""
        if rows:
            ids, mask, text = rows[0].ids[:head], rows[0].mask[:head], rows[0].row.text
        return {
            "idx": idx,
            "tokenizer_repo": self.config.model.tokenizer,
            "n_tokens": sum(len(row.ids) for row in rows),
            "n_supervised": sum(int(row.mask[:limit].sum()) for row in rows),
            "n_supervised_by_trl": self.supervised_by_trl(rows),
            "training_rows": len(rows),
            "truncated": any(len(row.ids) > limit for row in rows),
            "turns": [
                {"start": first, "end": end, "cut": end > limit}
                for row in rows
                for first, end in row.ranges
            ],
            "turn_status": [turn.status for turn in turns],
            "judged_by_prefixes_alone": sum(
                not judged(row.row, opinion) for row, opinion in zip(rows, opinions, strict=True)
            ),
            "straddling": sum(row.straddling() for row in rows),
            "input_ids_head": ids,
            "assistant_mask_head": mask.astype(int).tolist(),
            "decoded_head": [self.decode(token) for token in ids],
            "rendered_text": text[: self.config.audit.rendered_characters],
            "labels_sha256": [row.labels_sha256(limit) for row in rows if row.mask[:limit].any()],
            "verdict": verdict,
            "error": error,
        }

    def supervised_by_trl(self, rows: list[TokenRow]) -> int:
        """Tokens within the limit that TRL's own training template marks; 0 if it has none."""
        return sum(int(self.trl_mask(row)[: self.limit].sum()) for row in rows)

    def trl_mask(self, row: TokenRow) -> np.ndarray:
        """The mask (n_tokens,) of TRL's own training template; zeros if it renders another text."""
        text, spans = None, []
        if self.trl_template:
            text, spans = self.template.render_marked(row.row, self.trl_template)
        return labelling.mask_of_spans(spans if text == row.row.text else [], row.offsets)

    def verdict(self, idx, chat, rows, opinions, problem) -> tuple[str, str | None]:
        """One of "ok", "excluded", "dropped" (nothing to learn once truncated), "failed"; why."""
        forged = self.special.search(json.dumps(chat, ensure_ascii=False))
        if forged and self.config.audit.exclude_forged_turns:
            return "excluded", f"a message contains the special token {forged[0]}"
        n_tokens = sum(len(row.ids) for row in rows)
        if n_tokens != (known := self.known_lengths.get(idx, n_tokens)):
            problem = f"{n_tokens} tokens where {known} were published"
        for row, opinion in zip(rows, opinions, strict=True):
            problem = problem or self.problem(row, opinion, bool(forged))
        if problem:
            return "failed", problem
        if not any(row.mask[: self.limit].any() for row in rows):
            return "dropped", f"nothing to learn within {self.limit} tokens"
        return "ok", None

    def problem(self, row: TokenRow, opinion: Opinion | None, forged: bool) -> str | None:
        """What is wrong with one training row, or None."""
        if row.rendered != row.row.text:
            return "the marked template renders another text than the original one"
        written = len(self.special.findall(row.row.text))
        if written != (tokens := sum(i in self.special_ids for i in row.ids)):
            return f"{tokens} special tokens where the text has {written}"
        dropped = left_out(row.row, opinion) if opinion else _rewritten(row.row)
        if text := next(iter(dropped), None):
            return f"the template leaves out {text.key} of message {text.message}"
        for method, mask in {} if forged else self.references(row, opinion).items():
            wrong = np.flatnonzero(mask != row.mask)
            if wrong.size:
                first = int(wrong[0])
                should = "should" if mask[first] else "should not"
                return (
                    f"mask and {method} differ at {wrong.size} tokens: token {first} "
                    f"({self.decode(row.ids[first])!r}) {should} be supervised"
                )
        return None

    def references(self, row: TokenRow, opinion: Opinion | None) -> dict[str, np.ndarray]:
        """The masks of the independent methods that can judge this row."""
        spans = {"sentinels": opinion.spans.values()} if judged(row.row, opinion) else {}
        if self.template.marked:
            spans["the grammar of ChatML"] = labelling.assistant_spans(row.row.text)
        added = np.isin(row.ids, self.template.added_ids)
        by_offsets = {
            method: labelling.mask_of_spans(places, row.offsets, added)
            for method, places in spans.items()
        }
        return {"prefixes": row.prefixes()} | by_offsets


def with_tools(conversation: Chat | dict) -> tuple[Chat, list[dict] | None]:
    """The messages and the tools of a conversation."""
    if isinstance(conversation, dict):
        return conversation["messages"], conversation.get("tools") or None
    return conversation, None


def _rewritten(row: Row) -> Iterator[Leaf]:
    """The trained contents that are not in the row, line by line and apart from tags."""
    for message in row.spans:
        content = row.chat[message].get("content") or ""
        if any(piece.strip() not in row.text for piece in re.split(r"\n|</?\w+>", content)):
            yield Leaf(message, "content", content)


def write_audit(folder: Path, rows: Iterable[dict], config: Config) -> dict[str, Any]:
    """Stream `rows` to sft_template_audit.jsonl and their summary to summary.json; return it."""
    lengths, count, excluded, errors = [], Counter(), [], []

    def tally() -> Iterator[dict]:
        for row in rows:
            lengths.append(row["n_tokens"])
            count[f"rows_{row['verdict']}"] += 1
            errors.extend([f"row {row['idx']}: {row['error']}"] * (row["verdict"] == "failed"))
            excluded.extend([row["idx"]] * (row["verdict"] == "excluded"))
            if row["verdict"] != "excluded":  # never trained on, so its tokens are not counted
                count.update(_counts_of(row))
            yield row

    artifacts.write_jsonl(folder / AUDIT_ROWS, tally())
    counts, edges = np.histogram(lengths, bins=40)
    summary = {
        "label": config.label,
        "max_length": config.train.max_length,
        "rows": len(lengths),
        **{key: int(count[key]) for key in COUNTED},
        "supervised_share": count["n_supervised"] / max(count["n_tokens"], 1),
        "excluded_idx": excluded,
        "errors": errors[:20],
        "length_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
    artifacts.write_json(folder / "summary.json", summary)
    return summary


def _counts_of(row: dict) -> dict[str, int]:
    """What one row adds to the summary."""
    return {key: row[key] for key in PER_ROW} | {
        "rows_truncated": row["truncated"],
        "turns": len(row["turns"]),
        "turns_cut": sum(turn["cut"] for turn in row["turns"]),
        "judged_by_prefixes_alone": row["judged_by_prefixes_alone"],
    }


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Config) -> int:
    """The size of the vocabulary that the tokenizer shares with the base model's own tokenizer.

    Raises ValueError where the two differ: an id must mean the same token to the weights.
    """
    own = models.tokenizer_of(config.model.base, config.model.base_revision, config)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"The vocabulary of {config.model.tokenizer} is not that of {config.model.base}: ids "
            "would mean other tokens to the weights. Name a tokenizer of the same family."
        )
    return len(tokenizer)


def run_audit(config: Config, out: Path) -> Path:
    """Stage 02 without a notebook: audit the whole subset. Returns its folder."""
    source = artifacts.require(stages.DATA_PREP, config, out, subset.prepare_subset)
    tokenizer = models.load_tokenizer(config)
    check_vocabulary(tokenizer, config)
    chat_template = ChatTemplate(tokenizer)
    markers.choose_supervision(tokenizer)
    with artifacts.stage(stages.TEMPLATE_AUDIT, config, out, [source]) as folder:
        rows = audit_rows(chat_template, subset.read_subset(source), config)
        write_audit(folder, rows, config)
    return folder


def require_passed_audit(config: Config, out: Path, source: Path) -> Path:
    """The folder of an audit of the subset in `source` that passed. Raises ValueError: the gate."""
    folder = artifacts.require(stages.TEMPLATE_AUDIT, config, out, run_audit)
    artifacts.check(folder, config, {source.name: source})
    summary = read_summary(folder)
    if summary["rows_failed"]:
        raise ValueError(
            f"The template audit failed on {summary['rows_failed']} of {summary['rows']} rows "
            f"({summary['errors'][0]}); see {folder / 'summary.json'}."
        )
    return folder


def read_summary(folder: Path) -> dict[str, Any]:
    """What write_audit returned."""
    return artifacts.read_json(folder / "summary.json")


def count_training_rows(records: Iterable[dict]) -> int:
    """The number of rows that the trainer keeps: those with something to learn."""
    return sum(len(row["labels_sha256"]) for row in records if row["verdict"] == "ok")


def read_records(folder: Path) -> list[dict]:
    """The audit's row of every conversation."""
    return artifacts.read_jsonl(folder / AUDIT_ROWS)


def check_batches(batches: Iterable[dict], records: Iterable[dict]) -> int:
    """Compare every row of an epoch of batches with the audit's rows; the number of rows compared.

    A batch holds input_ids, labels and attention_mask, each [rows, tokens]; padding is left out.
    Raises ValueError if ids or labels of a row differ.
    """
    import torch

    audited = [
        (labels, row["idx"])
        for row in records
        if row["verdict"] == "ok"
        for labels in row["labels_sha256"]
    ]
    expected = Counter(labels for labels, _ in audited)
    with torch.random.fork_rng():  # the order of the training must not change
        found = Counter(_labels_of_batches(batches))
    if found != expected:
        idx = min((idx for labels, idx in audited if labels in expected - found), default=None)
        where = "some conversations" if idx is None else f"conversation {idx}"
        raise ValueError(
            f"The trainer's labels of {where} are not those of the audit ({found.total()} rows in "
            f"its batches, {expected.total()} in the audit): training would learn other tokens. "
            "Run 02_template_audit again if its environment was another one; otherwise look for "
            "what changes the trainer's rows or its data collator."
        )
    return found.total()


def _labels_of_batches(batches: Iterable[dict]) -> Iterator[str]:
    for batch in batches:
        arrays = [batch[key].cpu().numpy() for key in ("input_ids", "labels", "attention_mask")]
        for ids, labels, attended in zip(*arrays, strict=True):
            yield labelling.labels_sha256(ids[attended == 1], labels[attended == 1])
