"""The model card beside the adapter: written from what the run recorded, never by hand."""

from pathlib import Path
from typing import Any

from atlas_lib import session, sources
from atlas_lib.standin import tiny_model

TEMPLATE = Path(__file__).with_suffix(".md.jinja")


def write(folder: Path, config: Any, summary: dict, audit: dict, repo: str | None = None) -> None:
    """README.md into `folder`, from notebook 03's summary and the audit's."""
    from huggingface_hub import ModelCard, ModelCardData

    public = {"base_model": config.model.base, "datasets": [config.data.dataset]}
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        license="apache-2.0",
        language="en",
        tags=["lora", "qlora", "sft", "trl", "transformers"],
        # A local or embedded name would be a dead link, and the hub refuses a card with one.
        **{key: value for key, value in public.items() if _on_the_hub(value)},
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=repo or (config.output.hub_repo or "path/to/this/folder").replace("{user}", "USER"),
        label=config.label,
        config=config,
        recipe=_recipe(config),
        summary=summary,
        audit=audit,
        digest=config.digest("03_sft_train"),
        provenance=session.provenance(),
        at=lambda revision: f" at revision {revision}" if revision else "",
    )
    card.save(folder / "README.md")


def _recipe(config: Any) -> dict[str, Any]:
    """What decides the training, without the data, which has a paragraph of its own."""
    sections = ("seed", "quantization.", "lora.", "train.")
    keys = config.relevant("03_sft_train")
    return {key: value for key, value in keys.items() if key.startswith(sections)}


def _on_the_hub(name: str | list[str]) -> bool:
    names = [name] if isinstance(name, str) else name
    return not any(
        n.startswith(tiny_model.PREFIX) or Path(sources.locate(n)).exists() for n in names
    )
