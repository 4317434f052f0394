"""Run the notebooks headless: all stages or some of them, reusing results that are up to date.

python -m tools.run --overlay offline
python -m tools.run 03_sft_train --set train.learning_rate=1e-4 --force
python -m tools.run --overlay offline --seeds 42,1,2    # one run a seed, and a test over the seeds
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

try:
    import platformdirs
    import psutil

    from atlas_lib import artifacts, devices, notebooks, session
    from atlas_lib.config import load_config, parse_assignments
    from atlas_lib.schema import Config
    from atlas_lib.stages import IFEVAL_EVAL, SFT_TRAIN, STAGES
    from atlas_lib.sweep.definition import SEED_KEY
    from tools.sweep_trial import copy_once
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; install the environment again: `rm -rf .venv && make setup`.")

CONTINUES = "the same command continues at the unfinished stage."
FULL = 1_000_000  # bytes: a disk with less left is full
SEEDS = "seeds.json"
# In the OUT of a run, as patterns of file names.
DECIDED_BY_SEED = (
    f"{SFT_TRAIN}*", f"{IFEVAL_EVAL}*", "SFT-*", "metrics.json", "report.md", "wandb", ".lock*",
)  # fmt: skip
LISTED = (
    SEEDS, "report.md", "metrics.json", "notebooks", "03_sft_train/adapter", "02_template_audit",
)  # fmt: skip


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGINT, interrupt)
    try:
        run_notebooks(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        sys.exit(f"error: the reader of the output has ended; {CONTINUES}")
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        if signal.getsignal(signal.SIGINT) is interrupt:
            sys.exit(f"error: {sentence_of(error, Path(args.out))}")
        print(f"error: interrupted; {CONTINUES}", file=sys.stderr)
        sys.exit(130)


def interrupt(number: int, frame: FrameType | None) -> None:
    """On Ctrl-C, end the notebook too: its client sometimes swallows a KeyboardInterrupt."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing disturbs the end
    for notebook in psutil.Process().children():
        notebook.terminate()
    raise KeyboardInterrupt


def run_notebooks(args: argparse.Namespace) -> None:
    """Run the stages, then print the metrics and where the results are."""
    overrides = parse_assignments(args.set)
    config = load_config(args.config, args.overlay, overrides)
    local = {"output.hub_repo": None}  # on the hub, one seed would replace another
    each = {seed: overrides | local | {SEED_KEY: seed} for seed in args.seeds}
    for changed in each.values():
        load_config(args.config, args.overlay, changed)  # refuses a seed before any of them runs
    if args.seeds and config.model.adapter:
        raise ValueError("--seeds trains adapters; model.adapter names one, so leave one out.")
    out = session.output_folder(args.out, args.config, args.overlay)
    if config.run.require_gpu and any(STAGES[stage].gpu for stage in args.stages):
        devices.gpu_available(config)  # before anything is downloaded
    with session.hold(out / session.LOCK, f"OUT {out}"):
        if args.seeds:
            run_seeds(args, each, out)
        elif metrics := run_in(args, overrides, out):
            print(metrics_table(metrics), after_the_table(out), sep="\n")
    print(f"results in {out}: {', '.join(name for name in LISTED if (out / name).exists())}")


def run_in(args: argparse.Namespace, overrides: dict, out: Path) -> list[dict]:
    """Run the stages in OUT; the metrics, if there are any for this configuration."""
    config = load_config(args.config, args.overlay, overrides)
    parameters = {"CONFIG": args.config, "OVERLAY": args.overlay, "SET": overrides}
    for stage in args.stages:
        run_stage(stage, config, out, parameters, args.force)
    return current_metrics(config, out)


def run_seeds(args: argparse.Namespace, each: dict[int, dict], out: Path) -> None:
    """Run the stages once a seed, below OUT; compare the seeds if all are evaluated.

    The first seed's folder lends the others what no seed decides: the stages before training, and
    the responses of the models that are not trained.
    """
    from atlas_lib.evaluate import seeds

    (out / SEEDS).unlink(missing_ok=True)
    folders = {seed: out / f"seed-{seed}" for seed in each}
    first, *others = folders.values()
    first.mkdir(exist_ok=True)
    measured = []
    for seed, folder in folders.items():
        print(f"── seed {seed}: {folder}", flush=True)
        try:
            if folder in others:
                copy_once(first, folder, *DECIDED_BY_SEED)
            with session.hold(folder / session.LOCK, f"OUT {folder}"):
                measured.append(run_in(args, each[seed], folder))
        except (ValueError, OSError, RuntimeError) as error:
            raise RuntimeError(f"seed {seed}: {error}") from error
    if all(measured):
        config = load_config(args.config, args.overlay, each[args.seeds[0]])
        prompt_format = "chat" if "chat" in config.eval.formats else "raw"
        found = seeds.compare_seeds(folders, prompt_format, config.eval.alpha)
        origin = artifacts.read_json(first / IFEVAL_EVAL / "ifeval.json")["origin"]
        artifacts.write_json(out / SEEDS, found | origin)
        print(seeds.seeds_text(found), config.label, sep="\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--config", default="sft_qwen05b", help="the recipe, a file of configs/")
    parser.add_argument("--overlay", default="", help="a layer on top of it, such as offline")
    parser.add_argument("--out", default="", help="folder of the results, by default below runs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", default="", metavar="N,N,...", help="train once with each seed")
    parser.add_argument("--force", action="store_true", help="run finished stages again")
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {min(unknown)}; there are: {', '.join(STAGES)}")
    args.stages = [stage for stage in STAGES if stage in args.stages or not args.stages]
    if problem := next(seed_problems(args.seeds, args.set), None):
        parser.error(problem)
    args.seeds = [int(seed) for seed in args.seeds.split(",") if seed]
    return args


def seed_problems(text: str, assignments: list[str]) -> Iterator[str]:
    """Why --seeds cannot be used, if it is given."""
    seeds = text.split(",") if text else []
    for seed in seeds:
        if not seed.strip().isdecimal():
            yield f"--seeds {text!r}: {seed!r} is not a seed; give whole numbers, as in 42,1,2"
    for seed, times in Counter(map(int, seeds)).items():
        if times > 1:
            yield f"--seeds {text!r} has seed {seed} twice; give each seed once"
    for key in ("seed", SEED_KEY):
        if seeds and any(given.partition("=")[0].strip() == key for given in assignments):
            yield f"--seeds and --set {key} both choose the seed; leave one of them out"


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
    if not (folder / artifacts.MANIFEST).is_file() or not ran_through(stage, out):
        return "not run yet, or not to its end"
    try:
        inputs = artifacts.read_manifest(folder)["inputs"]
        artifacts.check(folder, config, {name: out / name for name in inputs})
    except (ValueError, OSError) as error:
        return f"out of date ({error})"
    return None


def ran_through(name: str, out: Path) -> bool:
    """Whether out/notebooks has this notebook with the same code, executed without an error."""
    try:
        executed = artifacts.read_json(out / "notebooks" / f"{name}.ipynb")
        ending = executed["metadata"]["papermill"]
        source = artifacts.read_json(notebooks.NOTEBOOKS / f"{name}.ipynb")
    except (OSError, ValueError, KeyError):
        return False
    codes = [cell_sources(notebook, ("code",)) for notebook in (executed, source)]
    return bool(ending["end_time"]) and not ending["exception"] and codes[0] == codes[1]


def cell_sources(notebook: dict, kinds: tuple[str, ...]) -> list[str]:
    """The sources of the cells of these kinds, without the cell that papermill injected."""
    return [
        "".join(cell["source"])
        for cell in notebook["cells"]
        if cell["cell_type"] in kinds
        and "injected-parameters" not in cell["metadata"].get("tags", [])
    ]


def current_metrics(config: Config, out: Path) -> list[dict]:
    """The rows of metrics.json, which is rebuilt if it is not what stage 04 measured."""
    if why_not_reused(IFEVAL_EVAL, config, out):
        return []
    measured, path = artifacts.read_json(out / IFEVAL_EVAL / "ifeval.json"), out / "metrics.json"
    rows = [row | measured["origin"] for row in measured["metrics"]]
    try:
        intact = artifacts.read_json(path) == rows
    except (OSError, ValueError):
        intact = False
    if not intact:
        artifacts.write_json(path, rows)
    return rows


def after_the_table(out: Path) -> str:
    """The verdict of stage 04 on the primary comparison, and a table for each other benchmark."""
    from atlas_lib.evaluate import tables

    measured = artifacts.read_json(out / IFEVAL_EVAL / "ifeval.json")
    parts = [tables.verdict_line(measured["comparisons"][0])]
    for other in measured.get("benchmarks", {}).values():
        parts.append(f"\n{other['title']}; the response 'x' passes {other['trivial']:.3f}")
        parts.append(metrics_table([row | measured["origin"] for row in other["metrics"]]))
    return "\n".join(parts)


def sentence_of(error: Exception, out: Path) -> str:
    """The error, and which disk is full: most libraries do not name it, some not even the cause."""
    places = (out, Path(os.environ.get("TMPDIR", "/tmp")), platformdirs.user_cache_path())
    disks = [(shutil.disk_usage(place).free, str(place)) for place in places if place.exists()]
    free, place = min(disks)
    if free > FULL and "No space left" not in str(error):
        return str(error)
    full = f"The disk of {place} is full ({free:,} bytes left); free some space, then {CONTINUES}"
    return f"{str(error).removesuffix('.')}. {full}"


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
