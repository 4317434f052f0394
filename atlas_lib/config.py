"""Layered YAML -> one validated, immutable object: base.yaml <- config <- overlay <- SET."""

import argparse
import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, create_model

from atlas_lib.schema import (
    Audit,
    Data,
    Eval,
    Lora,
    Model,
    Offline,
    Output,
    Quantization,
    Run,
    Section,
    train_section,
)

PACKAGE = Path(__file__).resolve().parent
# In a checkout configs/ stands beside the package; an installed wheel carries it inside.
CONFIGS = next(
    (p for p in (PACKAGE.parent / "configs", PACKAGE / "configs") if p.is_dir()), PACKAGE
)

# What each stage adds to the keys that decide its result; a later one depends on all earlier ones.
STAGES = {
    "01_data_prep": ("data", "offline"),
    "02_template_audit": (
        "model.tokenizer", "model.tokenizer_revision", "model.chat_template", "model.pad_token",
        "model.base", "model.base_revision", "train.max_length", "audit",
    ),
    "03_sft_train": (
        "seed", "quantization", "lora", "train",
    ),
    "04_ifeval_eval": ("model", "eval", "label"),
}  # fmt: skip
# Names, places and secrets among SFTConfig's fields: they decide no result and enter no manifest.
WITHOUT_EFFECT = re.compile(
    r"train\.(report_to|run_name|project|output_dir|disable_tqdm|log_\w+|logging_dir|push_to_hub"
    r"|hub_\w+|trackio_\w+|dataloader_(?!drop_last)\w+|resume_from_checkpoint)"
)
MISSING = "No layer sets {key!r}; CONFIG must be a whole recipe such as sft_qwen05b."


class Config(Section):
    """A resolved configuration; `digest(stage)` names what decides a stage's result."""

    seed: int
    label: str
    run: Run
    model: Model
    quantization: Quantization
    lora: Lora
    data: Data
    audit: Audit
    train: Any
    eval: Eval
    output: Output
    offline: Offline

    def as_dict(self) -> dict:
        """Plain values, `train` with only the keys that a layer set."""
        return self.model_dump() | {"train": self.train.model_dump(exclude_unset=True)}

    def relevant(self, stage: str) -> dict[str, Any]:
        """Dotted key -> value of everything that decides the result of `stage`."""
        prefixes = tuple(f"{p}." for s, ps in STAGES.items() if s <= stage for p in ps)
        values = {
            key: value
            for key, value in flatten(self.as_dict()).items()
            if f"{key}.".startswith(prefixes) and not WITHOUT_EFFECT.fullmatch(key)
        }
        if any(str(value).startswith("embedded:") for value in values.values()):
            return values
        # The stand-in's sizes decide nothing where it is not used.
        return {key: value for key, value in values.items() if not key.startswith("offline.")}

    def digest(self, stage: str = "04_ifeval_eval") -> str:
        """First 12 hex digits of the SHA-256 of `relevant(stage)`."""
        text = json.dumps(self.relevant(stage), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_config(name: str, overlay: str = "", overrides: dict | str | None = None) -> Config:
    """The config `name`, with `overlay` and then dotted `overrides` on top. Raises ValueError."""
    layers = [_read("base"), *_recipe(name), _read(overlay) if overlay else {}]
    merged: dict = {}
    for layer in [*layers, _overrides(overrides)]:
        _merge(merged, layer)
    if flatten(merged).get("train.hub_token"):
        raise ValueError("train.hub_token would leave a secret in files; set HF_TOKEN instead.")
    try:
        schema = create_model("Config", __base__=Config, train=(train_section(), ...))
        return schema.model_validate(merged)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None


def overlay_layer(overlay: str, overrides: dict) -> dict:
    """An overlay (or none) with dotted `overrides` merged into it: one layer, not validated."""
    merged = _read(overlay) if overlay else {}
    _merge(merged, _overrides(overrides))
    return merged


def available_configs() -> list[str]:
    """Names of the layers above base: recipes for CONFIG and overlays."""
    return sorted(p.stem for p in CONFIGS.glob("*.yaml") if p.stem != "base")


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _read(name: str) -> dict:
    path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"Unknown config {name!r}; there are: {', '.join(available_configs())}.")
    return parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}


def _recipe(name: str, above: tuple[str, ...] = ()) -> list[dict]:
    """The recipe and, first, those that it `extends`. Raises ValueError on a circle."""
    if name in above:
        raise ValueError(f"configs/{name}.yaml extends itself by way of {above[-1]}; mend that.")
    layer = _read(name)
    below = layer.pop("extends", None)
    return [*(_recipe(below, (*above, name)) if below else []), layer]


def parse_yaml(text: str, source: str) -> Any:
    """YAML's value of `text`. Raises ValueError that names the source."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(f"{source} is not YAML: {problem}; check brackets and quotes.") from None


def _overrides(overrides: dict | str | None) -> dict:
    """SET as a nested dict; `papermill -p` delivers it as a JSON or YAML string."""
    given = parse_yaml(overrides, "SET") if isinstance(overrides, str) else overrides
    if not isinstance(given or {}, dict) or not all(isinstance(key, str) for key in given or {}):
        raise ValueError(
            f"SET must map dotted keys to values, like {{train.max_steps: 10}}; got {given!r}."
        )
    nested: dict = {}
    for dotted, value in (given or {}).items():
        *parents, leaf = dotted.split(".")
        for parent in reversed([*parents, leaf]):
            value = {parent: value}
        _merge(nested, value)
    return nested


def _merge(below: dict, above: dict) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value


def _known_keys(model: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        kind = train_section() if prefix + name == "train" else field.annotation
        kind = next((k for k in (kind, *getattr(kind, "__args__", ())) if _is_section(k)), None)
        keys += [f"{prefix}{name}"] + (_known_keys(kind, f"{prefix}{name}.") if kind else [])
    return keys


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def first_problem(
    error: ValidationError, kind: type[Section] = Config, missing: str = MISSING
) -> str:
    """The first problem as one sentence that names key, value and what was expected."""
    problem = error.errors()[0]
    known = _known_keys(kind)
    # Without the union's member that pydantic appends; a list's index stays.
    parts = [p for p in problem["loc"] if isinstance(p, int) or re.fullmatch(r"[a-z_0-9]+", p)]
    key = ".".join(map(str, parts))
    if problem["type"] == "extra_forbidden":
        parent = key.rpartition(".")[0]
        siblings = [k for k in known if k.rpartition(".")[0] == parent]
        near = difflib.get_close_matches(key, siblings, n=1) or difflib.get_close_matches(
            key, known, n=1, cutoff=0.0
        )
        return f"Unknown key {key!r}; the nearest known one is {near[0]!r}."
    if problem["type"] == "missing":
        return missing.format(key=key)
    value = problem["input"]
    expected = problem["msg"].replace("Input should", "it should").removeprefix("Value error, ")
    return f"{key} is {value!r} ({type(value).__name__}); {expected}."


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a resolved configuration and its digest.")
    parser.add_argument("config")
    parser.add_argument("--overlay", default="")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    try:
        config = load_config(args.config, args.overlay, parse_assignments(args.set))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True), end="")
    print(f"# digest: {config.digest()}")


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """["train.max_steps=10"] -> {"train.max_steps": 10}; values are YAML."""
    for text in assignments:
        if "=" not in text:
            raise ValueError(f"--set {text!r} is not KEY=VALUE.")
    pairs = [text.partition("=") for text in assignments]
    return {key: parse_yaml(value, f"--set {key}={value}") for key, _, value in pairs}


if __name__ == "__main__":
    main()
