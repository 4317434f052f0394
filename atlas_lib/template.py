"""Chat templates by name, and the patch that marks the assistant's tokens in Qwen2.5's."""

import difflib
import importlib.util
import re
from pathlib import Path
from typing import Any

# Edits of Qwen2.5's template: (what is looked for, pattern, replacement), each must match exactly
# once. The loss must see what the model has to emit after "<|im_start|>assistant\n":
# the content (or the tool calls) and <|im_end|>, not the newline before, not the newline after.
_EDITS = (
    (
        '`or (message.role == "assistant" and not message.tool_calls)` in the first branch',
        r"\s+or\s+\(?\s*\(?message\.role\s*==\s*(['\"])assistant\1\s+and\s+not\s+message\.tool_calls\s*\)",
        "",
    ),
    (
        '`elif message.role == "assistant"` followed by its header',
        r"\{%-?\s*elif\s+message\.role\s*==\s*(['\"])assistant\1\s*-?%\}\s*"
        r"\{\{-?\s*(['\"])<\|im_start\|>\2\s*\+\s*message\.role\s*-?\}\}",
        '{%- elif message.role == "assistant" and not message.tool_calls %}'
        r"{{- '<|im_start|>assistant\\n' }}{%- generation %}"
        r"{{- message.content + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
        r"""{%- elif message.role == "assistant" %}{{- '<|im_start|>assistant\\n' }}"""
        r"{%- generation %}",
    ),
    (
        "`'\\n' + message.content` of a tool-calling turn",
        r"\{\{-?\s*(['\"])\\n\1\s*\+\s*message\.content\s*-?\}\}",
        r"{{- message.content }}",
    ),
    (
        "`'\\n<tool_call>\\n` of a tool-calling turn",
        r"\{\{-?\s*(['\"])\\n<tool_call>",
        r"{{- ('' if loop.first and not message.content else '\\n') + \1<tool_call>",
    ),
    (
        "`endfor` and the `'<|im_end|>\\n'` that closes a tool-calling turn",
        r"(\{%-?\s*endfor\s*-?%\}\s*)\{\{-?\s*(['\"])<\|im_end\|>\\n\2\s*-?\}\}(?=\s*\{%-?\s*elif)",
        r"\1{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}",
    ),
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def trl_templates() -> dict[str, str]:
    """The chat templates that TRL ships, by name, without importing trl."""
    folder = Path(importlib.util.find_spec("trl").submodule_search_locations[0], "chat_templates")
    return {file.stem: file.read_text(encoding="utf-8") for file in folder.glob("*.jinja")}


def read_template(name: str) -> str:
    """The text of a .jinja file, or of one of TRL's templates. Raises ValueError."""
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    shipped = trl_templates()
    if name not in shipped:
        near = difflib.get_close_matches(name, shipped, n=1)
        raise ValueError(
            f"The chat template {name!r} is neither a file nor a template of TRL"
            + (f"; the nearest one is {near[0]}." if near else ".")
        )
    return shipped[name]


def patch_chat_template_for_assistant_mask(tokenizer: Any) -> bool:
    """Mark the assistant's tokens in `tokenizer.chat_template`; returns False if it was marked.

    Rendered text stays identical. Raises ValueError for a template that is not Qwen2.5's.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError("The tokenizer has no chat template; set model.chat_template: qwen2_5.")
    if GENERATION.search(template):
        return False
    for sought, pattern, replacement in _EDITS:
        template, count = re.subn(pattern, replacement, template)
        if count != 1:
            raise ValueError(
                f"Not Qwen2.5's chat template: {sought} was found {count} times instead of once; "
                "set model.chat_template: qwen2_5, or use a template that has {% generation %}."
            )
    tokenizer.chat_template = template
    return True


if __name__ == "__main__":  # the audit's command had this name first
    import runpy

    runpy.run_module("atlas_lib.audit", run_name="__main__")
