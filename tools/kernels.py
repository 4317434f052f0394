"""The four notebooks as Kaggle kernels: build, push, wait, fetch, and the whole chain.

python -m tools.kernels build --set train.learning_rate=1e-4
python -m tools.kernels chain                 # push each stage, wait for it, bring its results
python -m tools.kernels push 03_sft_train --alone   # one kernel that builds what it misses

`build` writes build/kaggle/<stage>/, which `kaggle kernels push -p` takes as well. All other verbs
read that folder; what was pushed stands in its pushed.json, so that a verb typed again goes on.

Exit codes:
  0  done
  1  the kernel failed or was cancelled, or what it left is not what was asked for
  2  wrong input, or a guard refused before anything was sent
  3  Kaggle refused: credentials, quota, a name, a source that it dropped
  4  Kaggle or the way to it was out of order, also after retries
  5  the deadline passed
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

from atlas_lib.config import parse_assignments
from tools.kaggle import bundle, errors, runs, service
from tools.kaggle.bundle import Stage

T4 = "NvidiaTeslaT4"  # with it come two; a session uses one, 04 both
STAGES = {
    "01_data_prep": Stage(
        "Atlas 01 data prep", (), None, 0, "cuts and hashes rows: nothing for a GPU to do"
    ),
    "02_template_audit": Stage(
        "Atlas 02 template audit", ("01_data_prep",), None, 0, "tokenises and compares on the CPU"
    ),
    "03_sft_train": Stage(
        "Atlas 03 SFT train", ("01_data_prep", "02_template_audit"), T4, 1, "4-bit training"
    ),
    "04_ifeval_eval": Stage(
        "Atlas 04 IFEval eval", ("03_sft_train",), T4, 1, "decoding; one process a GPU"
    ),
}


def main() -> None:
    args = parse()
    try:
        sys.exit(args.verb(args))
    except errors.Problem as problem:
        errors.fail(problem)
    except ModuleNotFoundError as error:
        fix = f"{error.name} is not installed; `make kernels` sets everything up."
        errors.fail(errors.Problem(errors.WRONG_INPUT, fix))
    except (ValueError, OSError) as error:
        errors.fail(errors.Problem(errors.WRONG_INPUT, str(error)))
    except KeyboardInterrupt:
        errors.say("interrupted; the same command goes on where it was", sys.stderr)
        sys.exit(130)


def parse() -> argparse.Namespace:
    about, _, codes = __doc__.partition("Exit codes:")
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels",
        description=about.splitlines()[0],
        epilog=f"exit codes:{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, (function, options) in VERBS.items():
        verb = verbs.add_parser(name, help=function.__doc__, allow_abbrev=False)
        verb.set_defaults(verb=function)
        if name != "quota":
            verb.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
        for option in options:
            verb.add_argument(option, **OPTIONS[option])
    args = parser.parse_args()
    if "stages" in args:
        if args.verb in (push, delete) and not args.stages:
            parser.error("name the stages; there are: " + ", ".join(STAGES))
        unknown = set(args.stages) - set(STAGES)
        if unknown:
            parser.error(f"unknown stage {min(unknown)}; there are: {', '.join(STAGES)}")
        args.stages = [stage for stage in STAGES if stage in args.stages or not args.stages]
    return args


def build(args: argparse.Namespace) -> int:
    """write build/kaggle/<stage>/: notebook, metadata, and what they were made of"""
    started = time.monotonic()
    _, dirty = bundle.head()
    if dirty and not args.allow_dirty:
        raise ValueError(
            "There are uncommitted changes; commit them, or say --allow-dirty "
            "(make: ARGS=--allow-dirty)."
        )
    overrides = parse_assignments(args.set)
    choice = {"config": args.config, "overlay": args.overlay, "set": overrides}
    for stage in args.stages:
        folder = bundle.build(STAGES, stage, choice, args.folder)
        size = (folder / bundle.NOTEBOOK).stat().st_size
        where = STAGES[stage].accelerator or "no GPU"
        print(f"{folder}: {size / 1000:.0f} kB, {where} ({STAGES[stage].reason})")
    print(f"built in {time.monotonic() - started:.1f} s")
    return 0


def push(args: argparse.Namespace) -> int:
    """send a build; refused unless what it needs is complete and of the same build"""
    builds = {stage: runs.checked(args.folder / stage, args.allow_dirty) for stage in args.stages}
    session = connected(args)
    for stage, build in builds.items():
        runs.push(session, args.folder / stage, build, STAGES[stage].hours, args.alone)
    return 0


def wait(args: argparse.Namespace) -> int:
    """follow the version that was pushed to its end"""
    return each(args, runs.wait)


def fetch(args: argparse.Namespace) -> int:
    """bring the results of that version, every file checked by its hash"""
    return each(args, runs.fetch, args.out)


def each(args: argparse.Namespace, follow: Callable, *more: Path) -> int:
    for stage in args.stages:
        runs.version_of(args.folder / stage)  # before any request
    session = connected(args)
    for stage in args.stages:
        follow(session, args.folder / stage, *more)
        session.restart_clock()
    return 0


def chain(args: argparse.Namespace) -> int:
    """push, wait and fetch stage by stage; typed again, it goes on where it was"""
    builds = {stage: runs.checked(args.folder / stage, args.allow_dirty) for stage in args.stages}
    session = connected(args)
    for stage, build in builds.items():
        hours = STAGES[stage].hours
        runs.chain(session, args.folder / stage, build, hours, args.alone, args.out)
        session.restart_clock()
    return 0


def status(args: argparse.Namespace) -> int:
    """the state of each stage's kernel, of the pushed version where one is known"""
    session, failed = connected(args), False
    for stage in args.stages:
        ref = bundle.metadata_of(STAGES, stage)["id"]
        record = runs.pushed(args.folder / stage)
        ref, version = record.get("ref", ref), record.get("version")
        try:
            look = functools.partial(service.state, session, ref, version)
            found, failure = service.call(session, f"look at {ref}", look)
        except errors.Problem as problem:
            if problem.status not in service.ABSENT:
                raise
            found, failure = "not there", str(problem)
        failed |= found == "ERROR" or found.startswith("CANCEL")
        words = [f"{stage}:", ref, f"version {version}" if version else "", found, failure]
        errors.say(" ".join(filter(None, words)))
    return errors.KERNEL_FAILED if failed else 0


def delete(args: argparse.Namespace) -> int:
    """delete the kernels with all their versions"""
    session = connected(args)
    for stage in args.stages:
        ref = runs.pushed(args.folder / stage).get("ref")
        ref = ref or bundle.metadata_of(STAGES, stage)["id"]
        service.delete(session, ref)
        (args.folder / stage / bundle.PUSHED).unlink(missing_ok=True)
        errors.say(f"{stage}: deleted {ref}")
    return 0


def quota(args: argparse.Namespace) -> int:
    """GPU hours that are left this week"""
    left, total, until = service.quota_left(connected(args))
    errors.say(f"GPU: {left:.1f} of {total:g} hours left until {until}")
    return 0


def connected(args: argparse.Namespace) -> service.Session:
    return service.connect(args.retries, args.poll, args.deadline)


OPTIONS = {
    "--config": {"default": "sft_qwen05b"},
    "--overlay": {"default": ""},
    "--set": {"action": "append", "default": [], "metavar": "KEY=VALUE"},
    "--allow-dirty": {"action": "store_true", "help": "although changes are not committed"},
    "--alone": {"action": "store_true", "help": "attach nothing; the page builds what it misses"},
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
    "--deadline": {"type": float, "default": 180, "help": "minutes for one stage (180)"},
}
PATIENCE = ["--retries", "--poll", "--deadline"]
PUSH = ["--out-folder", "--allow-dirty", "--alone"]
VERBS = {
    "build": (build, ["--config", "--overlay", "--set", "--allow-dirty", "--out-folder"]),
    "push": (push, [*PUSH, *PATIENCE]),
    "wait": (wait, ["--out-folder", *PATIENCE]),
    "fetch": (fetch, ["--out-folder", "--out", *PATIENCE]),
    "chain": (chain, [*PUSH, "--out", *PATIENCE]),
    "status": (status, ["--out-folder", *PATIENCE]),
    "delete": (delete, ["--out-folder", *PATIENCE]),
    "quota": (quota, PATIENCE),
}

if __name__ == "__main__":
    main()
