"""The chat template's loss mask: the patch, an independent reference, the audit of every row."""

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from atlas_lib import artifacts, data, model, runtime
from atlas_lib import config as configuration

STAGE, ROWS = "02_template_audit", "sft_template_audit.jsonl"
COUNTED = (
    "rows_ok", "rows_excluded", "rows_dropped", "rows_failed", "rows_truncated", "n_tokens",
    "n_supervised", "n_supervised_by_trl", "straddling", "turns", "turns_cut",
    "turns_without_im_end",
)  # fmt: skip
PER_ROW = ("n_tokens", "n_supervised", "n_supervised_by_trl", "straddling")
IGNORED = -100  # the label that PyTorch's cross-entropy skips
END_OF_TURN = "<|im_end|>"

# Qwen2.5's template, edited by structure: (what is looked for, pattern, replacement), each found
# exactly once. The loss must see what the model has to emit after "<|im_start|>assistant\n":
# the content (or the tool calls) and <|im_end|>, not the newline before, not the newline after.
_EDITS = (
    (
        '`or (message.role == "assistant" and not message.tool_calls)` in the first branch',
        r"\s+or\s+\(?\s*\(?message\.role\s*==\s*(['\"])assistant\1\s+and\s+not\s+message\.tool_calls\s*\)",
        "",
    ),
    (
        '`elif message.role == "assistant"` followed by its header',
        r"\{%-?\s*elif\s+message\.role\s*==\s*(['\"])assistant\1\s*-?%\}\s*"
        r"\{\{-?\s*(['\"])<\|im_start\|>\2\s*\+\s*message\.role\s*-?\}\}",
        '{%- elif message.role == "assistant" and not message.tool_calls %}'
        r"{{- '<|im_start|>assistant\\n' }}{%- generation %}"
        r"{{- message.content + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
        r"""{%- elif message.role == "assistant" %}{{- '<|im_start|>assistant\\n' }}"""
        r"{%- generation %}",
    ),
    (
        "`'\\n' + message.content` of a tool-calling turn",
        r"\{\{-?\s*(['\"])\\n\1\s*\+\s*message\.content\s*-?\}\}",
        r"{{- message.content }}",
    ),
    (
        "`'\\n<tool_call>\\n` of a tool-calling turn",
        r"\{\{-?\s*(['\"])\\n<tool_call>",
        r"{{- ('' if loop.first and not message.content else '\\n') + \1<tool_call>",
    ),
    (
        "`endfor` and the `'<|im_end|>\\n'` that closes a tool-calling turn",
        r"(\{%-?\s*endfor\s*-?%\}\s*)\{\{-?\s*(['\"])<\|im_end\|>\\n\2\s*-?\}\}(?=\s*\{%-?\s*elif)",
        r"\1{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}",
    ),
)
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASSISTANT_TURN = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


def patch_chat_template_for_assistant_mask(tokenizer: Any) -> bool:
    """Mark the assistant's tokens in `tokenizer.chat_template`. False: it already was.

    Rendered text stays identical. Raises ValueError for a template that is not Qwen2.5's.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError(
            "The tokenizer has no single chat template; set model.chat_template: qwen2_5."
        )
    if _MARKER.search(template):
        return False
    for sought, pattern, replacement in _EDITS:
        template, count = re.subn(pattern, replacement, template)
        if count != 1:
            raise ValueError(
                f"Not Qwen2.5's chat template: {sought} was found {count} times instead of once; "
                "set model.chat_template: qwen2_5, or bring a template that has {% generation %}."
            )
    tokenizer.chat_template = template
    return True


def assistant_spans(text: str) -> list[tuple[int, int]]:
    """Character spans to supervise, from the ChatML grammar alone: content and <|im_end|>."""
    return [match.span(1) for match in _ASSISTANT_TURN.finditer(text)]


def mask_of_spans(
    spans: list[tuple[int, int]], offsets: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Mask (n_tokens,) bool and token range of each span, from offsets (n_tokens, 2) in characters.

    A token counts if it overlaps a span. So a token that straddles the newline before an answer
    is supervised: it carries the first characters, which would go unlearned without it.
    """
    mask, turns = np.zeros(len(offsets), dtype=bool), []
    for start, end in spans:
        first = int(np.searchsorted(offsets[:, 1], start, side="right"))
        last = int(np.searchsorted(offsets[:, 0], end, side="left"))
        mask[first:last] = True
        turns.append((first, last))
    return mask, turns


def labels_of(input_ids: Any, mask: Any, max_length: int) -> list[int]:
    """What the trainer's loss sees: ids where `mask`, IGNORED elsewhere, cut to `max_length`."""
    return np.where(mask, input_ids, IGNORED)[:max_length].tolist()


def labels_sha256(input_ids: list[int], labels: list[int]) -> str:
    """One hash of a row's ids and labels, both already truncated."""
    return hashlib.sha256(np.asarray([input_ids, labels], dtype=np.int32).tobytes()).hexdigest()


def audit(
    tokenizer: Any, original: str, conversations: Iterable[list[dict]], config: Any
) -> Iterator[dict]:
    """Yield one row a conversation, with the fields of sft_template_audit.jsonl.

    `tokenizer` carries the patched template, from whose markers transformers makes the mask.
    The reference is independent of it: the text comes from the unpatched `original`, the turns
    from ChatML's grammar, the tokens from the tokenizer's offsets. No marker is involved.
    """
    trl_template = model.shipped_template("qwen2_5_training")
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    context = _Context(
        config=config,
        end_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        special=re.compile("|".join(map(re.escape, special))),
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
        columns = (tokens["input_ids"], tokens["assistant_masks"], tokens["offset_mapping"])
        for (idx, chat), *row in zip(batch, texts, trl_spans, *columns, strict=True):
            audited = {"idx": idx} | _audit_row(context, chat, *row)
            published = context.known_lengths.get(idx, audited["n_tokens"])
            if audited["n_tokens"] != published:
                audited["verdict"] = "failed"
                audited["error"] = f"{audited['n_tokens']} tokens where {published} were published"
            yield audited


@dataclass
class _Context:
    """What the rows of one audit share."""

    config: Any
    end_id: int
    special: re.Pattern
    known_lengths: dict[int, int]
    decode: Callable[[int], str]


def _audit_row(context, chat, text, trl_spans, ids, mask, offsets) -> dict:
    limit, head = context.config.train.max_length, context.config.audit.head_tokens
    mask, offsets = np.asarray(mask, dtype=bool), np.asarray(offsets)
    spans = assistant_spans(text)
    reference, turns = mask_of_spans(spans, offsets)
    labels = labels_of(ids, mask, limit)
    verdict, error = _verdict(context, chat, mask, reference)
    starts = [start for start, _ in spans]
    return {
        "tokenizer_repo": context.config.model.tokenizer,
        "n_tokens": len(ids),
        "n_supervised": int(mask[:limit].sum()),
        "n_supervised_by_trl": int(mask_of_spans(trl_spans, offsets)[0][:limit].sum()),
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
        "labels_sha256": labels_sha256(ids[:limit], labels),
        "verdict": verdict,
        "error": error,
    }


def _verdict(context, chat, mask, reference) -> tuple[str, str | None]:
    """One of "ok", "excluded", "dropped" (nothing to learn once cut), "failed"; and why."""
    forged = context.special.search(json.dumps(chat, ensure_ascii=False))
    if forged and context.config.audit.exclude_forged_turns:
        return "excluded", f"a message contains the special token {forged[0]}"
    wrong = np.flatnonzero(mask != reference)
    if wrong.size and not forged:
        return "failed", f"template and reference differ at {wrong.size} tokens from {wrong[0]} on"
    if not reference.any():
        return "failed", "no assistant turn found"
    if not mask[: context.config.train.max_length].any():
        return "dropped", f"nothing to learn within {context.config.train.max_length} tokens"
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
            count.update({f"rows_{row['verdict']}": 1, "rows_truncated": row["truncated"]})
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
    tokenizer = model.load_tokenizer(config)
    original = tokenizer.chat_template
    patch_chat_template_for_assistant_mask(tokenizer)
    with artifacts.stage(STAGE, config, out, [source]) as folder:
        write_audit(folder, audit(tokenizer, original, data.read(source), config), config)
    return folder


def require_passed(config: Any, out: Path, source: Path) -> Path:
    """The folder of an audit of the slice in `source` that passed. Raises ValueError: the gate."""
    folder = artifacts.require(STAGE, config, out, prepare)
    artifacts.check(folder, config, {source.name: source})
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if summary["rows_failed"]:
        raise ValueError(
            f"The template audit failed on {summary['rows_failed']} of {summary['rows']} rows "
            f"({summary['errors'][0]}); read {folder / 'summary.json'} before you train."
        )
    return folder


def trained_rows(folder: Path) -> list[dict]:
    """The audit rows that the trainer will keep, in its order."""
    return [row for row in artifacts.read_jsonl(folder / ROWS) if row["verdict"] == "ok"]


def check_trainer(train_dataset: Iterable[dict], folder: Path) -> int:
    """Compare every row of `trainer.train_dataset` with the audit. Returns the rows compared."""
    expected = trained_rows(folder)
    actual = [labels_sha256(row["input_ids"], row["labels"]) for row in train_dataset]
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Audit the loss mask without a notebook.")
    parser.add_argument("command", choices=["audit"])
    parser.add_argument("config")
    parser.add_argument("--overlay", default="")
    parser.add_argument("--out", default="")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    try:
        config = configuration.load(
            args.config, args.overlay, configuration.parse_assignments(args.set)
        )
        folder = prepare(config, runtime.output_folder(args.out, args.config, args.overlay))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    print(json.dumps({k: v for k, v in summary.items() if k != "length_histogram"}, indent=1))
    raise SystemExit(f"error: {summary['errors'][0]}" if summary["rows_failed"] else 0)


if __name__ == "__main__":
    main()
