"""Run the notebooks headless: all stages or some of them, reusing results that are up to date.

python -m tools.run --overlay offline
python -m tools.run 03_sft_train --set train.learning_rate=1e-4 --force
"""

import argparse
import sys
import time
from pathlib import Path

from atlas_lib import artifacts, devices, notebooks, session
from atlas_lib.config import load_config, parse_assignments
from atlas_lib.schema import Config
from atlas_lib.stages import STAGES

LISTED = ("metrics.json", "notebooks", "03_sft_train/adapter", "02_template_audit")


def main() -> None:
    args = parse_arguments()
    try:
        overrides = parse_assignments(args.set)
        config = load_config(args.config, args.overlay, overrides)
        out = session.output_folder(args.out, args.config, args.overlay)
        if config.run.require_gpu and any(STAGES[stage].gpu for stage in args.stages):
            devices.gpu_available(config)  # before anything is downloaded
        parameters = {"CONFIG": args.config, "OVERLAY": args.overlay, "SET": overrides}
        for stage in args.stages:
            run_stage(stage, config, out, parameters, args.force)
        if (out / "metrics.json").is_file():
            print(metrics_table(artifacts.read_json(out / "metrics.json")))
        print(f"results in {out}: {', '.join(name for name in LISTED if (out / name).exists())}")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command continues at the unfinished stage.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--config", default="sft_qwen05b", help="the recipe, a file of configs/")
    parser.add_argument("--overlay", default="", help="a layer on top of it, such as offline")
    parser.add_argument("--out", default="", help="folder of the results, by default below runs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--force", action="store_true", help="run finished stages again")
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {min(unknown)}; there are: {', '.join(STAGES)}")
    args.stages = [stage for stage in STAGES if stage in args.stages or not args.stages]
    return args


def run_stage(stage: str, config: Config, out: Path, parameters: dict, force: bool) -> None:
    """Execute one notebook unless its result is up to date."""
    reason = "forced" if force else why_not_reused(stage, config, out)
    if not reason:
        print(f"── {stage}: finished and unchanged, reused", flush=True)
        return
    print(f"── {stage}: {reason}", flush=True)
    started = time.monotonic()
    (out / stage / artifacts.MANIFEST).unlink(missing_ok=True)
    notebooks.execute(stage, out, parameters)
    print(f"── {stage}: took {time.monotonic() - started:.0f} s", flush=True)


def why_not_reused(stage: str, config: Config, out: Path) -> str | None:
    """Why the stage has to run, or None if its folder matches config, inputs and files."""
    folder = out / stage
    if not (folder / artifacts.MANIFEST).is_file() or not notebooks.ran_through(stage, out):
        return "not run yet, or not to its end"
    try:
        inputs = artifacts.read_manifest(folder)["inputs"]
        artifacts.check(folder, config, {name: out / name for name in inputs})
    except (ValueError, OSError) as error:
        return f"out of date ({error})"
    return None


def metrics_table(metrics: list[dict]) -> str:
    """The rows of metrics.json, formatted for a terminal."""
    heads = f"{'strict':>9}{'95 %':>17}{'loose':>9}{'EOS':>8}{'distinct':>10}"
    lines = [f"\n{'model':<10}{'format':<8}{'n':>5}{heads}"]
    for row in metrics:
        interval = "{:.3f} to {:.3f}".format(*row["ci95"])
        lines.append(
            f"{row['model']:<10}{row['format']:<8}{row['n']:>5}"
            f"{row['prompt_level_strict_acc']:>9.3f}{interval:>17}"
            f"{row['prompt_level_loose_acc']:>9.3f}{row['eos_rate']:>8.2f}{row['distinct']:>10}"
        )
    return "\n".join([*lines, *{row["label"] for row in metrics}])


if __name__ == "__main__":
    main()
