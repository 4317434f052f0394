"""The four notebooks as Kaggle kernels: build, push, wait, fetch, or all of it stage by stage.

python -m tools.kernels build --set train.learning_rate=1e-4
python -m tools.kernels chain                 # push each stage, wait for it, fetch its results
python -m tools.kernels push 03_sft_train --alone   # one kernel that builds its missing inputs

`build` writes build/kaggle/<stage>/, which `kaggle kernels push -p` accepts as well. The other
verbs read that folder and keep what was pushed in its pushed.json, so that a verb can be repeated.

Exit codes:
  0  done
  1  the kernel failed or was cancelled, or its results are not what was asked for
  2  wrong input, or a check refused before anything was sent
  3  Kaggle refused: credentials, quota, a name, a source that it dropped
  4  Kaggle or the connection to it was unavailable, also after retries
  5  the deadline passed
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atlas_lib.config import parse_assignments
from atlas_lib.stages import STAGES
from tools import leaks
from tools.kaggle import bundle, errors, runs, service


def main() -> None:
    args = command_line()
    try:
        sys.exit(args.verb(args) or 0)
    except ModuleNotFoundError as error:
        leaks.log(f"error: {error.name} is not installed; run `make kernels`.", sys.stderr)
        sys.exit(errors.WRONG_INPUT)
    except (errors.Problem, ValueError, OSError) as error:
        leaks.log(f"error: {error}", sys.stderr)
        sys.exit(getattr(error, "code", errors.WRONG_INPUT))
    except KeyboardInterrupt:
        leaks.log("interrupted; the same command continues", sys.stderr)
        sys.exit(130)


def command_line() -> argparse.Namespace:
    about, _, codes = __doc__.partition("Exit codes:")
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels",
        description=about.splitlines()[0],
        epilog=f"exit codes:{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, (function, stages, options) in VERBS.items():
        verb = verbs.add_parser(name, help=function.__doc__, allow_abbrev=False)
        verb.set_defaults(verb=function)
        verb.add_argument("stages", nargs=stages, metavar="STAGE", help=", ".join(STAGES))
        for option in options:
            verb.add_argument(option, **OPTIONS[option])
    args = parser.parse_args()
    for unknown in set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {unknown}; there are: {', '.join(STAGES)}")
    args.stages = [stage for stage in STAGES if stage in args.stages or not args.stages]
    return args


def build_stages(args: argparse.Namespace) -> None:
    """write build/kaggle/<stage>: the notebook with the library in it, and its metadata"""
    choice = {"config": args.config, "overlay": args.overlay, "set": parse_assignments(args.set)}
    for stage in args.stages:
        folder = args.folder / stage
        bundle.build_kernel(stage, choice, folder, args.allow_dirty)
        size = (folder / bundle.NOTEBOOK).stat().st_size
        print(f"{folder}: {size / 1000:.0f} kB, {bundle.T4 if STAGES[stage].gpu else 'no GPU'}")


def push_stages(args: argparse.Namespace) -> None:
    """send a new build, provided that its upstream stages are complete"""
    check = functools.partial(bundle.pushable, allow_dirty=args.allow_dirty)
    each_stage(args, check, runs.push_version, args.alone)


def wait_for_stages(args: argparse.Namespace) -> None:
    """follow the version that was pushed until it ends"""
    each_stage(args, runs.known_version, runs.follow)


def fetch_stages(args: argparse.Namespace) -> None:
    """download the results of that version and check every file by its hash"""
    each_stage(args, runs.known_version, runs.fetch_results, args.out)


def chain_stages(args: argparse.Namespace) -> None:
    """push, wait and fetch stage by stage; repeated, it continues where it was"""
    check = functools.partial(bundle.pushable, allow_dirty=args.allow_dirty)
    each_stage(args, check, runs.push_and_fetch, args.alone, args.out)


def each_stage(
    args: argparse.Namespace, check: Callable[[Path], dict], step: Callable, *more: Any
) -> None:
    """Check the folders of all stages before the first request, then take the step for each."""
    checked = {args.folder / stage: check(args.folder / stage) for stage in args.stages}
    kaggle = service.connect(args.retries, args.poll, args.deadline)
    for folder, found in checked.items():
        step(kaggle, folder, found, *more)


def show_states(args: argparse.Namespace) -> int:
    """the state of each stage's kernel, of the pushed version where one is known"""
    kaggle, states = service.connect(args.retries, args.poll, args.deadline), []
    for stage in args.stages:
        name = runs.push_record(args.folder / stage).get("name")
        name = name or bundle.kernel_metadata(stage)["id"]
        state, failure = kaggle.state(name)
        leaks.log(f"{stage}: {name} {state} {failure}".rstrip())
        states.append(state)
    failed = any(state.startswith(runs.FAILED) for state in states)
    return errors.KERNEL_FAILED if failed else 0


OPTIONS: dict[str, dict] = {
    "--config": {"default": "sft_qwen05b"},
    "--overlay": {"default": ""},
    "--set": {"action": "append", "default": [], "metavar": "KEY=VALUE"},
    "--allow-dirty": {"action": "store_true", "help": "although changes are not committed"},
    "--alone": {"action": "store_true", "help": "attach nothing; missing inputs are built"},
    "--out": {"type": Path, "default": Path("runs/kaggle"), "metavar": "FOLDER"},
    "--out-folder": {
        "dest": "folder",
        "type": Path,
        "default": Path("build/kaggle"),
        "metavar": "FOLDER",
        "help": "where the builds are (build/kaggle)",
    },
    "--retries": {"type": int, "default": 8, "help": "of a request that fails (8)"},
    "--poll": {"type": float, "default": 20, "help": "seconds between two looks (20)"},
    "--deadline": {
        "type": float,
        "default": 180,
        "help": "minutes that a stage may take or run (180)",
    },
}
PATIENCE = ["--retries", "--poll", "--deadline"]
BUILDS = "--out-folder"
PUSH = [BUILDS, "--allow-dirty", "--alone", *PATIENCE]
VERBS: dict[str, tuple[Callable, str, list[str]]] = {  # function, number of stages, options
    "build": (build_stages, "*", ["--config", "--overlay", "--set", "--allow-dirty", BUILDS]),
    "push": (push_stages, "+", PUSH),
    "wait": (wait_for_stages, "*", [BUILDS, *PATIENCE]),
    "fetch": (fetch_stages, "*", [BUILDS, "--out", *PATIENCE]),
    "chain": (chain_stages, "*", [*PUSH, "--out"]),
    "status": (show_states, "*", [BUILDS, *PATIENCE]),
}

if __name__ == "__main__":
    main()
