"""Layered YAML -> one `Config`: base.yaml <- the recipe <- an overlay <- SET.

python -m atlas_lib.config sft_qwen05b --set lora.r=8     # print the resolved configuration
"""

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar, get_type_hints

import yaml
from pydantic import ValidationError, create_model

from atlas_lib import artifacts
from atlas_lib.bootstrap import CONFIGS
from atlas_lib.schema import REFUSED, Config, Section, Train, flatten

S = TypeVar("S", bound=Section)
DECIMAL = re.compile(r"[-+]?(0\d+|\d+(\.\d*)?[eE][-+]?\d{1,3})$")
MISSING_KEY = "No layer sets {key!r}; CONFIG must be a whole recipe such as sft_qwen05b."


class DecimalLoader(yaml.SafeLoader):
    """Reads 010 as 10 (not octal) and 1e3 as 1000 (not text), as YAML 1.2 does."""

    yaml_implicit_resolvers: ClassVar = {
        first: [("tag:yaml.org,2002:float", DECIMAL), *resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load_config(name: str, overlay: str = "", overrides: dict | str | None = None) -> Config:
    """The config `name`, with `overlay` and then dotted `overrides` on top. Raises ValueError."""
    given, merged = parse_overrides(overrides), {}
    for layer in (_read_layer("base"), *_recipe_layers(name), overlay_layer(overlay, given)):
        _merge(merged, layer)
    if refused := sorted(REFUSED.keys() & flatten(merged)):
        raise ValueError(f"{refused[0]} is refused: {REFUSED[refused[0]]}.")
    if isinstance(merged.get("train"), dict):
        merged["train"] |= _check_other_arguments(merged["train"])
    config = validate(Config, merged)
    config.parameters.update(CONFIG=name, OVERLAY=overlay, SET=given)
    return config


def _check_other_arguments(train: dict[str, Any]) -> dict[str, Any]:
    """The keys of `train` that the schema does not name, as SFTConfig types them; imports trl."""
    others = {key: value for key, value in train.items() if key not in Train.model_fields}
    if not others:
        return {}
    from trl import SFTConfig

    hints, fields = get_type_hints(SFTConfig), dataclasses.fields(SFTConfig)
    kinds = {field.name: (hints[field.name], None) for field in fields}
    arguments = create_model("Arguments", __base__=Section, **kinds)
    layer = create_model("Layer", __base__=Section, train=(arguments, ...))
    return validate(layer, {"train": others}).train.model_dump(exclude_unset=True)


def validate(schema: type[S], values: dict, missing: str = MISSING_KEY) -> S:
    """An instance of a schema. Raises ValueError that names the first wrong key and its value."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
    # Without the member of a union that pydantic appends; a list's index stays.
    parts = [p for p in problem["loc"] if isinstance(p, int) or re.fullmatch(r"[a-z_0-9]+", p)]
    key, value = ".".join(map(str, parts)), problem["input"]
    expected = problem["msg"].replace("Input should", "it should").removeprefix("Value error, ")
    sentence = f"{key} is {value!r} ({type(value).__name__}); {expected}."
    if problem["type"] == "extra_forbidden":
        key = ".".join(map(str, problem["loc"]))
        nearest = _nearest_key(key, list(_known_keys(schema)))
        sentence = f"Unknown key {key!r}; the nearest known one is {nearest!r}."
    raise ValueError(missing.format(key=key) if problem["type"] == "missing" else sentence)


def _nearest_key(key: str, known: list[str]) -> str:
    siblings = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
    near = difflib.get_close_matches(key, siblings, n=1)
    return (near or difflib.get_close_matches(key, known, n=1, cutoff=0.0))[0]


def _known_keys(schema: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _known_keys(field.annotation, f"{prefix}{name}.")


def overlay_layer(overlay: str, overrides: dict[str, Any]) -> dict:
    """An overlay (or none) with dotted `overrides` merged into it: one layer, not validated."""
    merged = _read_layer(overlay) if overlay else {}
    for dotted, value in overrides.items():
        for part in reversed(dotted.split(".")):
            value = {part: value}
        _merge(merged, value)
    return merged


def _read_layer(name: str) -> dict:
    layers = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    if name not in layers:
        known = ", ".join(name for name in layers if name != "base")
        raise ValueError(f"Unknown config {name!r}; there are: {known}.")
    return parse_yaml(layers[name].read_text(encoding="utf-8"), str(layers[name])) or {}


def _recipe_layers(name: str, above: tuple[str, ...] = ()) -> list[dict]:
    """The recipe after those that it `extends`. Raises ValueError on a cycle."""
    if name in above:
        raise ValueError(f"configs/{name}.yaml extends itself through {above[-1]}; remove one.")
    layer = _read_layer(name)
    below = layer.pop("extends", None)
    return [*(_recipe_layers(below, (*above, name)) if below else []), layer]


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML `text`. Raises ValueError that names the source."""
    try:
        value = yaml.load(text, DecimalLoader)
        json.dumps(value, default=str, skipkeys=True)  # refuses a value that contains itself
        return value
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(f"{source} is not YAML: {problem}; check brackets and quotes.") from None


def parse_overrides(overrides: dict | str | None) -> dict[str, Any]:
    """SET as a mapping of dotted keys; `papermill -p` passes it as a JSON or YAML string."""
    given = parse_yaml(overrides, "SET") if isinstance(overrides, str) else overrides
    if not isinstance(given or {}, dict) or not all(isinstance(key, str) for key in given or {}):
        raise ValueError(
            f"SET must map dotted keys to values, like {{train.max_steps: 10}}; got {given!r}."
        )
    return given or {}


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """["train.max_steps=10"] -> {"train.max_steps": 10}; values are YAML."""
    if wrong := [text for text in assignments if "=" not in text]:
        raise ValueError(f"--set {wrong[0]!r} is not KEY=VALUE.")
    pairs = [text.partition("=") for text in assignments]
    return {key: parse_yaml(value, f"--set {key}={value}") for key, _, value in pairs}


def _merge(below: dict, above: dict) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a resolved configuration and its digest.")
    parser.add_argument("config")
    parser.add_argument("--overlay", default="")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    try:
        config = load_config(args.config, args.overlay, parse_assignments(args.set))
        digest = artifacts.config_digest(config)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True), end="")
    print(f"# digest: {digest}")


if __name__ == "__main__":
    main()
