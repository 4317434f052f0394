"""The model card beside the adapter, rendered from what the run has recorded."""

from pathlib import Path
from typing import Any

from atlas_lib import artifacts, devices, session, sources, stages
from atlas_lib.schema import Config

CARD_TEMPLATE = Path(__file__).with_suffix(".md.jinja")


def write_card(
    folder: Path, config: Config, summary: dict[str, Any], audit: dict[str, Any], repo: str | None
) -> None:
    """Write README.md into `folder`, from the summaries of notebooks 03 and 02."""
    from huggingface_hub import ModelCard, ModelCardData

    decided_by = artifacts.made_from(stages.SFT_TRAIN, config)
    sections = ("seed", "quantization.", "lora.", "train.")  # the data has its own paragraph
    recipe = {key: value for key, value in decided_by.items() if key.startswith(sections)}
    recipe["train.activation_checkpointing"] = summary["activation_checkpointing"]  # if left open
    sources_on_hub = {"base_model": config.model.base, "datasets": config.data.dataset}
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        license="apache-2.0",
        language="en",
        tags=["lora", "qlora", "sft", "trl", "transformers"],
        # The hub rejects a card with the name of a local folder.
        **{key: name for key, name in sources_on_hub.items() if not sources.content(name, config)},
    )
    card = ModelCard.from_template(
        data,
        template_str=CARD_TEMPLATE.read_text(encoding="utf-8"),
        name=repo or (config.output.hub_repo or "path/to/this/folder").replace("{user}", "USER"),
        config=config,
        recipe=recipe,
        summary=summary,
        audit=audit,
        digest=artifacts.digest(decided_by),
        provenance=session.provenance(),
        memory=devices.peak_memory(),
    )
    card.save(folder / "README.md")
