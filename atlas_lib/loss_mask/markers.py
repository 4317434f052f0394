"""Where the loss is restricted by markers in a chat template, and where by labels."""

from typing import Any

from atlas_lib import template

OWN_MARKERS = "its own markers"


def trl_markers(text: str) -> tuple[str | None, str | None]:
    """Name and text of the template from whose markers TRL trains; (None, None) if it refuses."""
    if template.GENERATION.search(text):
        return OWN_MARKERS, text
    shipped = template.trl_templates()
    names = (f"{name}_training" for name, each in shipped.items() if each == text)
    name = next((name for name in names if name in shipped), None)
    return name, shipped.get(name)


def choose_supervision(tokenizer: Any) -> str:
    """Mark Qwen2.5's template and leave others alone; how rows are trained, in one sentence."""
    try:
        if template.patch_chat_template_for_assistant_mask(tokenizer):
            return "Markers in Qwen2.5's template restrict the loss to the assistant's tokens."
        reason = "The template has markers of its own, which need not be exact"
    except ValueError as error:
        reason = str(error).split(":")[0]
    return f"{reason}: rows are trained from labels."
