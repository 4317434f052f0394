"""What the whole audit costs, in multiples of tokenising every row once; memory; linearity.

    python -m benchmarks.audit [--rows 5000] [--memory-rows 50000] [--json results/bench_audit.json]

Real Qwen2.5 tokenizer, synthetic conversations with UltraChat's lengths (median about 1,150
tokens). All ratios come from one run on one machine.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from atlas_lib import artifacts, session, template
from atlas_lib.config import load_config
from atlas_lib.loss_mask import audit
from atlas_lib.loss_mask.turns import ChatTemplate
from atlas_lib.standin import corpus
from tools import npm_tokenizers


def conversations(rows: int, seed: int = 0) -> Iterator[list[dict]]:
    """User and assistant turns of made-up sentences, one to five exchanges, log-normal lengths."""
    draw = random.Random(seed)
    taught = load_config("sft_qwen05b").offline.taught
    words = sorted({w for text in corpus.plain_text(0, 400, taught) for w in text.split()})
    for _ in range(rows):
        chat = []
        for _ in range(draw.choice([2, 3, 3, 4, 5])):
            for role, median in (("user", 25), ("assistant", 130)):
                length = max(3, int(draw.lognormvariate(0, 0.8) * median))
                text = " ".join(draw.choices(words, k=length))
                chat.append({"role": role, "content": text})
        yield chat


def loaded() -> tuple:
    """(patched tokenizer, original template, config)."""
    from transformers import AutoTokenizer

    folder = npm_tokenizers.tokenizer_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    original = tokenizer.chat_template
    template.patch_chat_template_for_assistant_mask(tokenizer)
    return tokenizer, original, load_config("sft_qwen05b")


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def audit_to_disk(tokenizer, original, config, chats) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        rows = audit.audit_rows(ChatTemplate(tokenizer, original), chats, config)
        return audit.write_audit(Path(scratch), rows, config)


def limit(tokenizer, original, chats) -> None:
    """Render and tokenise every row once, in batches, with offsets: nobody can do with less."""
    for first in range(0, len(chats), 64):
        batch = chats[first : first + 64]
        texts = tokenizer.apply_chat_template(batch, chat_template=original, tokenize=False)
        tokenizer(texts, return_offsets_mapping=True)


def plain(tokenizer, chats) -> None:
    """The plain way to the template's mask alone: row by row."""
    for chat in chats:
        tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)


def peak_of(rows: int) -> float:
    """Peak resident MiB of a fresh process that audits a stream of `rows` conversations."""
    command = [sys.executable, "-m", "benchmarks.audit", "--only-audit", str(rows)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--memory-rows", type=int, default=50_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only-audit", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    tokenizer, original, config = loaded()
    if args.only_audit:
        audit_to_disk(tokenizer, original, config, conversations(args.only_audit))
        # Not getrusage: its peak survives exec, so a child would report its parent's.
        [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        print(int(peak) / 1024)
        return
    chats = list(conversations(args.rows))
    limit(tokenizer, original, chats[:200])  # warm up
    times = {
        "limit": seconds(lambda: limit(tokenizer, original, chats)),
        "plain_mask_only": seconds(lambda: plain(tokenizer, chats)),
    }
    summary = {}
    times["audit"] = seconds(
        lambda: summary.update(audit_to_disk(tokenizer, original, config, chats))
    )
    tenth = chats[: args.rows // 10]
    part = {}
    times["audit_of_a_tenth"] = seconds(
        lambda: part.update(audit_to_disk(tokenizer, original, config, tenth))
    )
    lengths = [len(tokenizer.apply_chat_template(chat)["input_ids"]) for chat in tenth]
    per_token = [times["audit"] / summary["n_tokens"], times["audit_of_a_tenth"] / part["n_tokens"]]
    result = {
        "rows": args.rows,
        "tokens": summary["n_tokens"],
        "median_tokens": statistics.median(lengths),
        "seconds": times,
        "audit_over_limit": times["audit"] / times["limit"],
        "plain_mask_over_limit": times["plain_mask_only"] / times["limit"],
        "seconds_per_token_whole_over_tenth": per_token[0] / per_token[1],
        "peak_mib": {n: peak_of(n) for n in (500, args.memory_rows)},
        **session.provenance(),
    }
    print(json.dumps(result, indent=1))
    if args.json:
        artifacts.write_json(args.json, result)


if __name__ == "__main__":
    main()
