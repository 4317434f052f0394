"""The audit of every row: what the loss will see, written down before a weight is loaded."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from atlas_lib import artifacts, data, models, template

STAGE, ROWS = "02_template_audit", "sft_template_audit.jsonl"
COUNTED = (
    "rows_ok", "rows_excluded", "rows_dropped", "rows_failed", "rows_truncated", "n_tokens",
    "n_supervised", "n_supervised_by_trl", "straddling", "turns", "turns_cut",
    "turns_without_im_end",
)  # fmt: skip
PER_ROW = ("n_tokens", "n_supervised", "n_supervised_by_trl", "straddling")


def audit_rows(
    tokenizer: Any, original: str, conversations: Iterable[list[dict]], config: Any
) -> Iterator[dict]:
    """Yield one row a conversation, with the fields of sft_template_audit.jsonl.

    `tokenizer` carries the patched template, from whose markers transformers makes the mask.
    The reference is independent of it: the text comes from the unpatched `original`, the turns
    from ChatML's grammar, the tokens from the tokenizer's offsets. No marker is involved.
    """
    trl_template = template.shipped_template("qwen2_5_training")
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    context = _Context(
        config=config,
        limit=config.train.max_length or sys.maxsize,  # None: TRL cuts nothing
        end_id=tokenizer.convert_tokens_to_ids(template.END_OF_TURN),
        special=re.compile("|".join(map(re.escape, special))),
        special_ids=frozenset(tokenizer.convert_tokens_to_ids(special)),
        known_lengths={row["idx"]: row["n_tokens"] for row in data.known_rows(config)},
        decode=cache(tokenizer.decode),
    )
    rows = enumerate(conversations)
    while batch := list(islice(rows, 64)):
        chats = [chat for _, chat in batch]
        texts = tokenizer.apply_chat_template(chats, chat_template=original, tokenize=False)
        tokens = tokenizer.apply_chat_template(
            chats,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        _, trl_spans = render_jinja_template(
            chats, chat_template=trl_template, return_assistant_tokens_mask=True
        )
        patched = tokenizer.apply_chat_template(chats, tokenize=False)
        columns = (tokens["input_ids"], tokens["assistant_masks"], tokens["offset_mapping"])
        for (idx, chat), *row in zip(batch, texts, patched, trl_spans, *columns, strict=True):
            yield _audit_row(context, idx, chat, *row)


@dataclass
class _Context:
    """What the rows of one audit share."""

    config: Any
    limit: int
    end_id: int
    special: re.Pattern
    special_ids: frozenset[int]
    known_lengths: dict[int, int]
    decode: Callable[[int], str]


def _audit_row(context, idx, chat, text, patched, trl_spans, ids, mask, offsets) -> dict:
    limit, head = context.limit, context.config.audit.head_tokens
    mask, offsets = np.asarray(mask, dtype=bool), np.asarray(offsets)
    spans = template.assistant_spans(text)
    reference, turns = template.mask_of_spans(spans, offsets)
    labels = template.labels_of(ids, mask, limit)
    verdict, error = _verdict(context, idx, chat, text, patched, ids, mask, reference)
    starts = [start for start, _ in spans]
    return {
        "idx": idx,
        "tokenizer_repo": context.config.model.tokenizer,
        "n_tokens": len(ids),
        "n_supervised": int(mask[:limit].sum()),
        "n_supervised_by_trl": int(template.mask_of_spans(trl_spans, offsets)[0][:limit].sum()),
        "truncated": len(ids) > limit,
        "turns": [
            {
                "start": s,
                "end": e,
                "ends_with_im_end": ids[e - 1] == context.end_id,
                "cut": e > limit,
            }
            for s, e in turns
        ],
        "straddling": sum(
            int(offsets[first, 0]) < start for (first, _), start in zip(turns, starts, strict=True)
        ),
        "input_ids_head": ids[:head],
        "assistant_mask_head": mask[:head].astype(int).tolist(),
        "decoded_head": [context.decode(token) for token in ids[:head]],
        "rendered_text": text[: context.config.audit.rendered_characters],
        "labels_sha256": template.labels_sha256(ids[:limit], labels),
        "verdict": verdict,
        "error": error,
    }


def _verdict(context, idx, chat, text, patched, ids, mask, reference) -> tuple[str, str | None]:
    """One of "ok", "excluded", "dropped" (nothing to learn once cut), "failed"; and why."""
    published = context.known_lengths.get(idx, len(ids))
    if len(ids) != published:
        return "failed", f"{len(ids)} tokens where {published} were published"
    if patched != text:
        return "failed", "the marked template renders another text than the original one"
    written, tokens = context.special.findall(text), [i for i in ids if i in context.special_ids]
    if len(written) != len(tokens):
        return "failed", f"{len(tokens)} special tokens where the text has {len(written)}"
    forged = context.special.search(json.dumps(chat, ensure_ascii=False))
    if forged and context.config.audit.exclude_forged_turns:
        return "excluded", f"a message contains the special token {forged[0]}"
    wrong = np.flatnonzero(mask != reference)
    if wrong.size and not forged:
        first = int(wrong[0])
        should = "should" if reference[first] else "should not"
        return "failed", (
            f"template and reference differ at {wrong.size} tokens: token {first} "
            f"({context.decode(ids[first])!r}) {should} be supervised"
        )
    if not reference.any():
        return "failed", "no assistant turn found"
    if not mask[: context.limit].any():
        return "dropped", f"nothing to learn within {context.limit} tokens"
    return "ok", None


def write_audit(folder: Path, rows: Iterable[dict], config: Any) -> dict:
    """Stream `rows` to sft_template_audit.jsonl and their summary to summary.json; return it."""
    lengths, count, excluded, errors = [], Counter(), [], []

    def tally() -> Iterator[dict]:
        for row in rows:
            lengths.append(row["n_tokens"])
            excluded.extend([row["idx"]] if row["verdict"] == "excluded" else [])
            errors.extend(
                [f"row {row['idx']}: {row['error']}"] if row["verdict"] == "failed" else []
            )
            count.update({f"rows_{row['verdict']}": 1})
            if row["verdict"] == "excluded":  # not audited any further, and never trained on
                yield row
                continue
            count.update({"rows_truncated": row["truncated"]})
            count.update({key: row[key] for key in PER_ROW})
            for turn in row["turns"]:
                count.update(
                    turns=1,
                    turns_cut=turn["cut"],
                    turns_without_im_end=not turn["ends_with_im_end"],
                )
            yield row

    artifacts.write_jsonl(folder / ROWS, tally())
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


def prepare(config: Any, out: Path) -> Path:
    """Stage 02 without a notebook: audit the whole slice. Returns its folder."""
    source = artifacts.require(data.STAGE, config, out, data.prepare)
    tokenizer = models.load_tokenizer(config)
    models.check_vocabulary(tokenizer, config)
    original = tokenizer.chat_template
    template.patch_chat_template_for_assistant_mask(tokenizer)
    with artifacts.stage(STAGE, config, out, [source]) as folder:
        write_audit(folder, audit_rows(tokenizer, original, data.read(source), config), config)
    return folder


def require_passed(config: Any, out: Path, source: Path) -> Path:
    """The folder of an audit of the slice in `source` that passed. Raises ValueError: the gate."""
    folder = artifacts.require(STAGE, config, out, prepare)
    artifacts.check_inputs(folder, {source.name: source})
    summary = read_summary(folder)
    if summary["rows_failed"]:
        raise ValueError(
            f"The template audit failed on {summary['rows_failed']} of {summary['rows']} rows "
            f"({summary['errors'][0]}); read {folder / 'summary.json'} before you train."
        )
    return folder


def read_summary(folder: Path) -> dict:
    """What write_audit returned."""
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def trained_rows(folder: Path) -> list[dict]:
    """The audit rows that the trainer will keep, in its order."""
    return [row for row in artifacts.read_jsonl(folder / ROWS) if row["verdict"] == "ok"]


def check_trainer(train_dataset: Iterable[dict], folder: Path) -> int:
    """Compare every row of `trainer.train_dataset` with the audit. Returns the rows compared."""
    expected = trained_rows(folder)
    actual = [template.labels_sha256(row["input_ids"], row["labels"]) for row in train_dataset]
    if len(actual) != len(expected):
        raise ValueError(
            f"The trainer has {len(actual)} rows, the audit predicts {len(expected)}; run 02 again."
        )
    for row, digest in zip(expected, actual, strict=True):
        if row["labels_sha256"] != digest:
            raise ValueError(
                f"The trainer's labels of conversation {row['idx']} are not those that the audit "
                "proved: this run would train on other tokens. Run 02 again with this environment."
            )
    return len(actual)
