"""Check that an adapter belongs to the base model, before any model responds.

peft itself accepts an adapter whose weights it cannot place: the result is the bare base model.
"""

from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from atlas_lib import sources
from atlas_lib.schema import Config

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedModel

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_adapter(adapter: str | Path, config: Config) -> None:
    """Raises ValueError if `adapter` is incomplete, damaged or was not made for `model.base`.

    Reads the adapter's two files and the base's config.json, none of the base's weights.
    """
    place, revision = sources.fetch(str(adapter), config.model.adapter_revision, config)
    try:
        folder = local_folder(place, revision, [SETTINGS, WEIGHTS])
        problem = next(_misfits(folder, config), None)
    except Exception as error:  # a damaged file: peft and safetensors raise whatever they meet
        problem = f"cannot be used ({shorten(str(error).rstrip('.'), 200)})"
    if problem:
        raise ValueError(f"The adapter {adapter} {problem}.")


def is_adapter(name: str, config: Config) -> bool:
    """Whether a folder or hub id holds an adapter, else a whole model. Raises ValueError."""
    folder = local_folder(*sources.fetch(name, None, config), [SETTINGS, "config.json"])
    if (folder / SETTINGS).is_file():
        return True
    if (folder / "config.json").is_file():
        return False
    raise ValueError(f"{name} holds no verdicts.jsonl, no {SETTINGS} and no config.json.")


def local_folder(place: str | Path, revision: str | None, files: list[str]) -> Path:
    """The folder itself or, for a hub id, that of the cached download of these files."""
    from huggingface_hub import snapshot_download

    if sources.locate(str(place)) is None:
        place = snapshot_download(place, revision=revision, allow_patterns=files)
    return Path(place)


def _misfits(folder: Path, config: Config) -> Iterator[str]:
    """Why the adapter cannot be used, as predicates; each holds only if there is none before it."""
    import torch
    from peft import PeftConfig
    from safetensors.torch import load_file

    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            yield f"has no {name}; peft's save_pretrained writes both, pickled weights are not read"
    settings = PeftConfig.from_pretrained(folder)
    stated, base = settings.base_model_name_or_path, config.model.base
    expected = config.model.adapter_base or base
    if stated and (sources.locate(stated) or stated) != (sources.locate(expected) or expected):
        yield (
            f"was trained on {stated}, not on {expected}: set model.base={stated}, or "
            f"model.adapter_base={stated} to evaluate it on {base} all the same"
        )
    found, placed = load_file(folder / WEIGHTS), _weights_of(settings, config)
    if odd := sorted(found.keys() ^ placed.keys()):
        yield (
            f"does not fit {base} and its own {SETTINGS}: {len(odd)} weights are missing or have "
            f"no place, such as {odd[0]}"
        )
    if odd := [key for key in sorted(found) if found[key].shape != placed[key].shape]:
        shapes = [tuple(weights[odd[0]].shape) for weights in (found, placed)]
        yield f"does not fit {base}: {odd[0]} has the shape {shapes[0]} instead of {shapes[1]}"
    if odd := [key for key in sorted(found) if not torch.isfinite(found[key]).all()]:
        yield f"has {len(odd)} weights with values that are not finite, such as {odd[0]}"


def _weights_of(settings: "PeftConfig", config: Config) -> dict[str, "torch.Tensor"]:
    """The weights of such an adapter on the base, by name, as tensors without content."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    with torch.device("meta"):
        model = PeftModel(base_without_weights(config), settings)
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def base_without_weights(config: Config) -> "PreTrainedModel":
    """The base model with tensors without content; only its configuration is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place, revision = sources.fetch(config.model.base, config.model.base_revision, config)
    shape = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape, trust_remote_code=False)
