"""Audit the loss mask that a tokenizer's chat template gives for a file of conversations.

python -m atlas_lib.audit --tokenizer Qwen/Qwen3-0.6B --data chats.jsonl --max-length 1024
python -m atlas_lib.audit --tokenizer FOLDER --data chats.jsonl --labels rows.parquet
python -m atlas_lib.audit sft_qwen05b --overlay offline    # notebook 02 without the notebook
"""

import argparse
import json
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atlas_lib import artifacts, data, models, session, sources, template
from atlas_lib.config import load_config, parse_assignments
from atlas_lib.loss_mask import audit, page, report
from atlas_lib.loss_mask.turns import ChatTemplate
from atlas_lib.schema import Config

EXACT, FINDINGS, BAD_INPUT = 0, 1, 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Exit status: 0 every row is exact, 1 there are findings, 2 the input is unusable.",
    )
    parser.add_argument("config", nargs="*", help="audit the subset of this config instead")
    parser.add_argument("--tokenizer", help="folder or hub id")
    parser.add_argument("--data", help=".jsonl or .parquet file, or hub id, with `messages`")
    parser.add_argument("--max-length", type=int, help="tokens at which the trainer cuts a row")
    parser.add_argument("--template", help=".jinja file, or a template of TRL by name")
    parser.add_argument("--labels", type=Path, help=".jsonl or .parquet with input_ids and labels")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("--html", type=Path, help="write a page that shows any row")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--overlay", default="", help="of a config")
    parser.add_argument("--out", default="", help="of a config")
    args = parser.parse_args()
    of_files = (args.tokenizer, args.data, args.max_length, args.template, args.labels)
    of_files += (args.json, args.html)
    if bool(args.config) == bool(args.tokenizer and args.data) or (args.config and any(of_files)):
        parser.error("give --tokenizer and --data with their options, or a config with its own")
    try:
        status = audit_config(args) if args.config else audit_file(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = BAD_INPUT
    except Exception:  # a defect of this command: neither exact nor a finding
        traceback.print_exc()
        status = BAD_INPUT
    raise SystemExit(status)


def audit_config(args: argparse.Namespace) -> int:
    """Run stage 02 for a config and print its summary."""
    name = args.config[-1]  # also: audit CONFIG
    config = load_config(name, args.overlay, parse_assignments(args.set))
    folder = audit.run_audit(config, session.output_folder(args.out, name, args.overlay))
    summary = audit.read_summary(folder)
    print(json.dumps({k: v for k, v in summary.items() if k != "length_histogram"}, indent=1))
    return FINDINGS if summary["rows_failed"] else EXACT


def audit_file(args: argparse.Namespace) -> int:
    """Audit the conversations of a file and print the report."""
    overrides = {"model.tokenizer": args.tokenizer, "model.tokenizer_revision": None}
    overrides |= {"data.dataset": args.data, "data.revision": None, "label": ""}
    overrides |= {"train.max_length": args.max_length, "model.chat_template": args.template}
    config = load_config("sft_qwen05b", "", overrides)
    tokenizer = models.tokenizer_of(args.tokenizer, None, config)
    outputs = [path.resolve() for path in (args.json, args.html) if path]
    if {Path(args.data).resolve(), args.labels and args.labels.resolve()} & set(outputs):
        raise ValueError("--json and --html would overwrite an input; name another file.")
    variables = parse_assignments(args.set)
    if args.template:
        tokenizer.chat_template = template.read_template(args.template)
    chat_template = ChatTemplate(tokenizer, None, variables)
    for name in variables:
        if not re.search(rf"\b{re.escape(name)}\b", chat_template.text):
            raise ValueError(f"The chat template has no variable {name!r}; check --set.")
    conversations = read_conversations(config)
    auditor = audit.Auditor(chat_template, config)
    judged = auditor.judge(conversations)
    if args.labels or args.html:
        judged = list(judged)  # read more than once
    stops = generation_stops(args.tokenizer, tokenizer)
    found = report.examine(auditor, judged, conversations, stops)
    if args.labels:
        found.findings += report.judge_labels(auditor, judged, read_labels(args.labels, config))
    print(*found.lines(), sep="\n")
    if args.json:
        artifacts.write_json(args.json, {"exact": not found.findings, **vars(found)})
    if args.html:
        page.write_page(args.html, auditor, judged)
    return FINDINGS if found.findings else EXACT


def generation_stops(name: str, tokenizer: Any) -> tuple[list[str], str]:
    """The tokens at which generation stops, and where they stand."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(sources.locate(name) or name).eos_token_id or []
    except (OSError, ValueError):
        return [str(tokenizer.eos_token)], "the tokenizer's eos token; no generation_config.json"
    ids = found if isinstance(found, list) else [found]
    return tokenizer.convert_ids_to_tokens(ids), "generation_config.json"


def read_rows(name: str, config: Config) -> Sequence[dict]:
    """The rows of a file, or of the split `train` of a dataset."""
    place, revision = sources.fetch(name, None, config, "dataset")
    return data.load_rows(place, revision, "train")


def read_conversations(config: Config) -> Sequence[dict]:
    """Rows with `messages` (and `tools`) of a local file or a dataset of the hub, checked."""
    name = config.data.dataset
    rows = read_rows(name, config)
    for number, row in enumerate(rows):
        if "messages" not in row:
            raise ValueError(
                f"{name}, row {number} (from 0) has no `messages`, only {', '.join(row)}."
            )
        if problem := _problem(row["messages"]):
            raise ValueError(f"{name}, row {number} (from 0): {problem}.")
    if not rows:
        raise ValueError(f"{name} holds no conversations.")
    return rows


def read_labels(path: Path, config: Config) -> Sequence[dict]:
    """Rows with `input_ids` and `labels`, as lists of integers."""
    rows = read_rows(str(path), config)
    for number, row in enumerate(rows):
        lists = [row.get(key) for key in ("input_ids", "labels")]
        if not all(isinstance(x, list) and all(type(i) is int for i in x) for x in lists):
            raise ValueError(
                f"{path}, row {number} (from 0) needs input_ids and labels, two lists of integers."
            )
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return rows


def _problem(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "`messages` is not a list, or empty"
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {index} is not an object with a role"
        for call in message.get("tool_calls") or []:
            if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
                return f"message {index} has a tool call without a function"
        content = message.get("content")
        if not isinstance(content, str) and not message.get("tool_calls"):
            kind = "a list of parts" if isinstance(content, list) else type(content).__name__
            return f"message {index} has content that is not text ({kind})"
    return None


if __name__ == "__main__":
    main()
