"""Run the notebooks headless: all stages or some, reusing what is finished and still fits.

python -m tools.run --overlay offline
python -m tools.run 03_sft_train --set train.learning_rate=1e-4 --force
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

from atlas_lib import artifacts, devices, notebooks, session
from atlas_lib.config import STAGES, load_config, parse_assignments


def main() -> None:
    args = parse()
    try:
        overrides = parse_assignments(args.set)
        config = load_config(args.config, args.overlay, overrides)
        out = session.output_folder(args.out, args.config, args.overlay)
        if config.run.require_gpu and set(args.stages) & {"03_sft_train", "04_ifeval_eval"}:
            devices.gpu_available(config)  # now, not after the download
        parameters = {"CONFIG": args.config, "OVERLAY": args.overlay, "SET": overrides}
        timings = {
            stage: run_stage(stage, config, out, parameters, args.force) for stage in args.stages
        }
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    report(out, timings)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--config", default="sft_qwen05b")
    parser.add_argument("--overlay", default="")
    parser.add_argument("--out", default="")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--force", action="store_true", help="run again what is finished")
    args = parser.parse_args()
    unknown = set(args.stages) - set(STAGES)
    if unknown:
        parser.error(f"unknown stage {min(unknown)}; there are: {', '.join(STAGES)}")
    args.stages = sorted(set(args.stages)) or list(STAGES)
    return args


def run_stage(stage: str, config, out: Path, parameters: dict, force: bool) -> str:
    """Execute one notebook unless its result still fits; returns how long it took, or "reused"."""
    reason = "forced" if force else why_not_reused(stage, config, out)
    if not reason:
        print(f"── {stage}: finished and unchanged, reused", flush=True)
        return "reused"
    print(f"── {stage}: {reason}", flush=True)
    started = time.monotonic()
    (out / stage / artifacts.MANIFEST).unlink(missing_ok=True)
    notebooks.execute(stage, out, parameters)
    return f"{time.monotonic() - started:.0f} s"


def why_not_reused(stage: str, config, out: Path) -> str | None:
    """Why the stage has to run, or None if its folder fits config, inputs and files."""
    folder = out / stage
    if not (folder / artifacts.MANIFEST).is_file() or not notebooks.ran_through(stage, out):
        return "not run yet, or not to its end"
    earlier = {name: out / name for name in STAGES if name < stage}
    try:
        made_from = artifacts.check(folder, config)["inputs"]
        artifacts.check_inputs(folder, {n: p for n, p in earlier.items() if n in made_from})
    except (ValueError, OSError, KeyError) as error:
        return f"stale ({error})"
    return None


def report(out: Path, timings: dict[str, str]) -> None:
    """The table and the paths to look at."""
    print("\nwhere the time went: " + " · ".join(f"{stage} {t}" for stage, t in timings.items()))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak /= 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    if peak and set(timings.values()) != {"reused"}:
        print(f"largest process: {peak:.2f} GiB resident")
    if (out / "metrics.json").is_file():
        print(table(json.loads((out / "metrics.json").read_text(encoding="utf-8"))))
    print(f"results in {out}: metrics.json, notebooks/, 03_sft_train/adapter, 02_template_audit")


def table(metrics: list[dict]) -> str:
    """metrics.json for a terminal."""
    heads = f"{'strict':>9}{'95 %':>17}{'loose':>9}{'stops':>8}{'distinct':>10}"
    lines = [f"\n{'model':<10}{'format':<8}{'n':>5}{heads}"]
    for row in metrics:
        low, high = row["ci95"]
        lines.append(
            f"{row['model']:<10}{row['format']:<8}{row['n']:>5}{row['prompt_level_strict_acc']:>9.3f}"
            f"{f'{low:.3f} to {high:.3f}':>17}{row['prompt_level_loose_acc']:>9.3f}"
            f"{row['stop_rate']:>8.2f}{row['distinct']:>10}"
        )
    return "\n".join([*lines, metrics[0]["label"] if metrics else ""])


if __name__ == "__main__":
    main()
