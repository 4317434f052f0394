"""Check on this machine's GPU what README claims of kernels, memory, training and decoding.

    python -m tools.gpu_check [--json FILE]   # by default results/gpu_<card>.json
    python -m tools.gpu_check --dry           # the same code on tiny shapes, on a CPU

It takes at most nine minutes and asks no hub: the weights are random, in Qwen2.5-0.5B's shape. Each
check is a process with a time limit, so that a failure does not affect the next one; what a check
does not need of its time, the next ones may use.
A check fails if it ends in an error or refutes a claim. Exit codes: 0 no check failed, 1 a check
failed, 2 there is no GPU, it is too old, or its memory is in use.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlas_lib import artifacts, bootstrap, devices

LIMITS = {  # seconds, with about twenty for the imports of each process, more for the first one
    "card": 60,
    "kernels": 70,
    "memory": 80,
    "training": 170,
    "decoding": 100,
    "gpus": 60,
}
NEEDED_GIB = 8.5  # a batch of the recipe without recomputing, its loss and the weights
SILENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"} | bootstrap.ENVIRONMENT
FIRST_GPU = {devices.VISIBLE: "0", devices.NARROWED: "0"}


@dataclass(frozen=True)
class Claim:
    """A figure of a check and its limit. `cards`: where it is judged, else it is only shown."""

    check: str
    text: str
    figure: str
    least: float = float("-inf")
    most: float = float("inf")
    cards: str = "any"  # any: the dry run's CPU too; GPU: any GPU; else a part of the card's name

    def limit(self) -> str:
        """The limit as text."""
        if self.least == float("-inf"):
            return f"<= {self.most:,g}"
        return f">= {self.least:,g}" + (f", <= {self.most:g}" if self.most < float("inf") else "")

    def judge(self, figures: dict[str, Any], card: str | None) -> str:
        """confirmed, refuted or "not judged"; `card` is None in a dry run."""
        here = self.cards == "any" or (card and (self.cards == "GPU" or self.cards in card.split()))
        if not here or self.figure not in figures:
            return "not judged"
        return "confirmed" if self.least <= figures[self.figure] <= self.most else "refuted"


# The limits of a T4 are those of its arithmetic, for the recipe's 4.57 million tokens and IFEval's
# 541 prompts; 1.33 is what devices.HEADROOM leaves.
CLAIMS = (
    Claim("kernels", "TRL's loss runs on Triton", "loss_on_triton", least=1, cards="GPU"),
    Claim("kernels", "TRL's loss is that of full logits", "loss_error", most=0.01),
    Claim("kernels", "and so is its gradient", "loss_gradient_error", most=0.02),
    Claim("kernels", "attention, training", "attention_error_training", most=0.02),
    Claim("kernels", "attention, decoding", "attention_error_decoding", most=0.02),
    Claim("kernels", "NF4 loses a tenth of a weight", "nf4_rounding", most=0.1),
    Claim("kernels", "NF4 products are exact", "nf4_product_error", most=0.01),
    Claim("memory", "a batch takes what 03 foresees", "batch_over_foreseen", 0.5, 1.33, "GPU"),
    Claim("memory", "03 need not recompute", "foreseen_share_of_free", most=0.75, cards="T4"),
    Claim("training", "memory without recomputing", "peak_gib", most=13.9, cards="T4"),
    Claim("training", "5,000 rows in 11 min", "real_tokens_per_second", 7_000, cards="T4"),
    Claim("training", "float16 skips few steps", "skipped_steps", most=1, cards="GPU"),
    Claim("decoding", "responses of generate()", "rows_as_generate", least=1),
    Claim("decoding", "six rows in 6 min", "tokens_per_second", 11_500, cards="T4"),
    Claim("decoding", "no copies of keys", "seconds_over_floor_with_copies", most=1, cards="T4"),
    Claim("gpus", "each process has its own", "share_of_gpus_used", least=1),
    Claim("gpus", "and computes the same", "share_of_gpus_equal", least=1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, to test the code")
    args = parser.parse_args()
    notice = "Dry run with tiny shapes on a CPU: nothing printed here is about a GPU."
    if args.dry:
        print(notice)
    started = time.monotonic()
    measured = run_checks(args.dry)
    provenance = measured["card"]["figures"].get("provenance", {})
    name = None if args.dry else provenance["hardware"]
    claims = judge_claims(measured, name)
    result = {
        "card": name,
        "dry": args.dry,
        "seconds": time.monotonic() - started,
        "checks": {check: verdict_on(check, found, claims) for check, found in measured.items()},
        "claims": claims,
        **provenance,
    }
    print(table(result))
    default = None if args.dry else bootstrap.ROOT / "results" / file_name(name)
    if file := args.json or default:
        artifacts.write_json(file, result)
        print(f"Results: {file}")
    if args.dry:
        print(notice)
    sys.exit(any(check["verdict"] == "failed" for check in result["checks"].values()))


def run_checks(dry: bool) -> dict[str, dict[str, Any]]:
    """{check: {figures, error, seconds}}; a process a check, or in a dry run one for all.

    Exits with 2 and one sentence if there is no GPU to check.
    """
    measured: dict[str, dict[str, Any]] = {}
    end = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as scratch:
        for names in [list(LIMITS)] if dry else [[name] for name in LIMITS]:
            end += sum(LIMITS[name] for name in names)
            limit = end - time.monotonic()
            print(f"{', '.join(names)}: at most {limit:.0f} s", flush=True)
            measured |= run_process(names, Path(scratch), dry, limit)
            if refusal := refusal_of(measured["card"], dry):
                print(f"error: {refusal}", file=sys.stderr)
                sys.exit(2)
    return measured


def run_process(
    names: list[str], folder: Path, dry: bool, limit: float
) -> dict[str, dict[str, Any]]:
    """What one process found, which is ended, with those it has started, after `limit` seconds."""
    process = subprocess.Popen(
        measuring(folder, dry, names),
        cwd=bootstrap.ROOT,
        env=environment(dry),
        start_new_session=True,
    )
    try:
        reason = f"its process ended with status {process.wait(limit)}"
    except subprocess.TimeoutExpired:
        reason = f"not finished within {limit:.3g} seconds"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    measured = {}
    for name in names:
        file, found = folder / f"{name}.json", {"done": False, "figures": {}, "seconds": None}
        found |= artifacts.read_json(file) if file.is_file() else {}
        measured[name] = found if found.pop("done") else found | {"error": reason}
    return measured


def environment(dry: bool) -> dict[str, str]:
    """That of a process: one GPU, before any library looks for them; the user's choice is kept."""
    hidden = {devices.VISIBLE: ""} if dry else {}
    first = {} if devices.VISIBLE in os.environ else FIRST_GPU
    return os.environ | first | hidden | SILENT


def measuring(folder: Path, dry: bool, names: list[str]) -> list[str]:
    """The command that measures `names` into `folder`."""
    module = [sys.executable, "-m", "tools.gpu_measure"]
    return [*module, str(folder), "dry" if dry else "full", *names]


def refusal_of(card: dict[str, Any], dry: bool) -> str | None:
    """Why this GPU cannot be checked, as a sentence with the fix, or None."""
    figures = card["figures"]
    if dry or figures.get("free_gib", 0) >= NEEDED_GIB:
        return None
    if card["error"]:
        return f"The GPU cannot be used: {card['error'].rstrip('.')}."
    if figures["device"]["name"] == "cpu":
        listed = "update the driver of the GPU that nvidia-smi lists"
        fix = listed if figures["gpus_listed"] else "run this on a machine with one"
        return f"PyTorch finds no CUDA GPU: {fix}, or add --dry to run the code on a CPU."
    return (
        f"{figures['free_gib']:.1f} of the GPU's {figures['total_gib']:.1f} GiB are free and "
        f"{NEEDED_GIB} are needed: end the processes that nvidia-smi lists, or choose another GPU "
        f"with {devices.VISIBLE}."
    )


def judge_claims(measured: dict[str, dict], card: str | None) -> list[dict[str, Any]]:
    """Every claim as a row, with what was measured and the verdict."""
    return [
        {
            "check": claim.check,
            "claim": claim.text,
            "figure": claim.figure,
            "limit": claim.limit(),
            "judged_on": claim.cards,
            "measured": measured[claim.check]["figures"].get(claim.figure),
            "verdict": claim.judge(measured[claim.check]["figures"], card),
        }
        for claim in CLAIMS
    ]


def verdict_on(check: str, found: dict[str, Any], claims: list[dict]) -> dict[str, Any]:
    """passed, failed or "not run", with the reason and the figures."""
    refuted = [c["claim"] for c in claims if c["check"] == check and c["verdict"] == "refuted"]
    verdict, reason = "passed", None
    if found["error"]:
        verdict, reason = "failed", found["error"]
    elif refuted:
        verdict, reason = "failed", f"refutes: {'; '.join(refuted)}"
    elif found["figures"].get("gpus", 2) < 2:
        verdict, reason = "not run", "it needs two GPUs"
    seconds = {"seconds": found["seconds"], "limit_seconds": LIMITS[check]}
    return {"verdict": verdict, "reason": reason, **seconds, "figures": found["figures"]}


def table(result: dict[str, Any]) -> str:
    """Claims and checks, formatted for a terminal."""
    lines = [f"\n{'check':<10}{'claim':<34}{'limit':>16}{'measured':>10}  verdict"]
    for row in result["claims"]:
        measured = "-" if row["measured"] is None else f"{row['measured']:,.4g}"
        where = "" if row["judged_on"] in ("any", "GPU") else f" ({row['judged_on']})"
        lines.append(
            f"{row['check']:<10}{row['claim'] + where:<34}{row['limit']:>16}{measured:>10}  "
            f"{row['verdict']}"
        )
    lines.append("")
    for name, check in result["checks"].items():
        reason = f" ({check['reason']})" if check["reason"] else ""
        lines.append(f"{name:<10}{check['verdict']}{reason}")
    return "\n".join(lines)


def file_name(card: str) -> str:
    """The name of a card's file of results, such as gpu_tesla_t4.json."""
    return f"gpu_{re.sub(r'[^a-z0-9]+', '_', card.lower()).strip('_')}.json"


if __name__ == "__main__":
    main()
