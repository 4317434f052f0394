"""The audit of every row: which tokens the loss will see, written down before a weight is loaded.

python -m atlas_lib.audit sft_qwen05b --overlay offline     # notebook 02 without the notebook
"""

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
from transformers.utils.chat_template_utils import render_jinja_template

from atlas_lib import artifacts, data, models, session, stages, template
from atlas_lib.config import load_config, parse_assignments, parse_command
from atlas_lib.schema import Config

AUDIT_ROWS = "sft_template_audit.jsonl"
PER_ROW = ("n_tokens", "n_supervised", "n_supervised_by_trl", "straddling")
COUNTED = (
    "rows_ok", "rows_excluded", "rows_dropped", "rows_failed", "rows_truncated", *PER_ROW,
    "turns", "turns_cut", "turns_without_im_end",
)  # fmt: skip


def audit_rows(
    tokenizer: PreTrainedTokenizerBase, original: str, conversations: Iterable, config: Config
) -> Iterator[dict]:
    """Yield one row per conversation, with the fields of sft_template_audit.jsonl.

    `tokenizer` has the patched template, from whose markers transformers makes the mask. The
    reference is independent of it: the text comes from the unpatched `original`, the turns from
    the ChatML grammar, the tokens from the tokenizer's offsets. No marker is involved.
    """
    trl_template = template.shipped_template("qwen2_5_training")
    auditor = _Auditor(tokenizer, config)
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
            yield auditor.row(idx, chat, *row)


class _Auditor:
    """What the rows of one audit share, and how one of them is judged."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Config):
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.config = config
        self.limit = config.train.max_length or sys.maxsize  # None: TRL truncates nothing
        self.end_id = tokenizer.convert_tokens_to_ids(template.END_OF_TURN)
        self.special = re.compile("|".join(map(re.escape, special)))
        self.special_ids = set(tokenizer.convert_tokens_to_ids(special))
        self.known_lengths = {row["idx"]: row["n_tokens"] for row in data.known_rows(config)}
        self.decode = cache(tokenizer.decode)

    def row(self, idx, chat, text, patched, trl_spans, ids, mask, offsets) -> dict[str, Any]:
        """One row of the audit's file."""
        limit, head = self.limit, self.config.audit.head_tokens
        mask, offsets = np.asarray(mask, dtype=bool), np.asarray(offsets)
        spans = template.assistant_spans(text)
        reference, turns = template.mask_of_spans(spans, offsets)
        verdict, error = self.verdict(idx, chat, text, patched, ids, mask, reference)
        starts = zip(turns, spans, strict=True)
        return {
            "idx": idx,
            "tokenizer_repo": self.config.model.tokenizer,
            "n_tokens": len(ids),
            "n_supervised": int(mask[:limit].sum()),
            "n_supervised_by_trl": int(template.mask_of_spans(trl_spans, offsets)[0][:limit].sum()),
            "truncated": len(ids) > limit,
            "turns": [self.turn(first, end, ids) for first, end in turns],
            "straddling": sum(int(offsets[first, 0]) < start for (first, _), (start, _) in starts),
            "input_ids_head": ids[:head],
            "assistant_mask_head": mask[:head].astype(int).tolist(),
            "decoded_head": [self.decode(token) for token in ids[:head]],
            "rendered_text": text[: self.config.audit.rendered_characters],
            "labels_sha256": template.labels_sha256(
                ids[:limit], template.labels_of(ids, mask, limit)
            ),
            "verdict": verdict,
            "error": error,
        }

    def turn(self, first: int, end: int, ids: list[int]) -> dict[str, Any]:
        """One assistant turn, as a range of tokens."""
        ends = ids[end - 1] == self.end_id
        return {"start": first, "end": end, "ends_with_im_end": ends, "cut": end > self.limit}

    def verdict(self, idx, chat, text, patched, ids, mask, reference) -> tuple[str, str | None]:
        """One of "ok", "excluded", "dropped" (nothing to learn once truncated), "failed"; why."""
        if len(ids) != self.known_lengths.get(idx, len(ids)):
            return "failed", f"{len(ids)} tokens where {self.known_lengths[idx]} were published"
        if patched != text:
            return "failed", "the marked template renders another text than the original one"
        written = len(self.special.findall(text))
        if written != (tokens := sum(i in self.special_ids for i in ids)):
            return "failed", f"{tokens} special tokens where the text has {written}"
        forged = self.special.search(json.dumps(chat, ensure_ascii=False))
        if forged and self.config.audit.exclude_forged_turns:
            return "excluded", f"a message contains the special token {forged[0]}"
        wrong = np.flatnonzero(mask != reference)
        if wrong.size and not forged:
            first = int(wrong[0])
            should = "should" if reference[first] else "should not"
            return "failed", (
                f"template and reference differ at {wrong.size} tokens: token {first} "
                f"({self.decode(ids[first])!r}) {should} be supervised"
            )
        if not reference.any():
            return "failed", "no assistant turn found"
        if not mask[: self.limit].any():
            return "dropped", f"nothing to learn within {self.limit} tokens"
        return "ok", None


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
        "turns_without_im_end": sum(not turn["ends_with_im_end"] for turn in row["turns"]),
    }


def run_audit(config: Config, out: Path) -> Path:
    """Stage 02 without a notebook: audit the whole subset. Returns its folder."""
    source = artifacts.require(stages.DATA_PREP, config, out, data.prepare_subset)
    tokenizer = models.load_tokenizer(config)
    models.check_vocabulary(tokenizer, config)
    original = tokenizer.chat_template
    template.patch_chat_template_for_assistant_mask(tokenizer)
    with artifacts.stage(stages.TEMPLATE_AUDIT, config, out, [source]) as folder:
        rows = audit_rows(tokenizer, original, data.read_subset(source), config)
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


def read_verdicts(folder: Path) -> dict[int, str]:
    """{index of a conversation: its verdict}."""
    return {row["idx"]: row["verdict"] for row in artifacts.read_jsonl(folder / AUDIT_ROWS)}


def check_trainer(train_dataset: Iterable[dict], folder: Path) -> int:
    """Compare every row of `trainer.train_dataset` with the audit; the number of rows compared.

    Raises ValueError if ids or labels of a row differ.
    """
    rows = [row for row in artifacts.read_jsonl(folder / AUDIT_ROWS) if row["verdict"] == "ok"]
    found = [template.labels_sha256(row["input_ids"], row["labels"]) for row in train_dataset]
    pairs = zip(rows, found, strict=False)
    differing = [row["idx"] for row, labels in pairs if row["labels_sha256"] != labels]
    if differing or len(found) != len(rows):
        where = f"conversation {differing[0]}" if differing else "some conversations"
        raise ValueError(
            f"The trainer's labels of {where} are not those of the audit ({len(found)} rows in "
            f"the trainer, {len(rows)} in the audit): training would learn other tokens. Run "
            "02_template_audit again in this environment."
        )
    return len(found)


def main() -> None:
    about = "Audit the loss mask without a notebook."
    args = parse_command(about, "words", nargs="+", metavar="CONFIG")  # also: audit CONFIG
    name = args.words[-1]
    try:
        config = load_config(name, args.overlay, parse_assignments(args.set))
        folder = run_audit(config, session.output_folder(args.out, name, args.overlay))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    summary = read_summary(folder)
    print(json.dumps({k: v for k, v in summary.items() if k != "length_histogram"}, indent=1))
    raise SystemExit(f"error: {summary['errors'][0]}" if summary["rows_failed"] else 0)


if __name__ == "__main__":
    main()
