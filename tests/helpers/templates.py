"""Chat templates of the kinds found in the wild, with the tiny model's special tokens."""

from tokenizers import AddedToken

_LOOP = "{% for m in messages %}"
_HEADER = "<|im_start|>{{ m.role }}\n"
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = _LOOP + _HEADER + "{{ m.content }}<|im_end|>\n{% endfor %}" + _ASK
# Like Llama-2's: roles are plain text, responses are trimmed, and there is no header to add.
BRACKETS = (
    _LOOP + "{% if m.role == 'assistant' %} {{ m.content | trim }}<|im_end|>"
    "{% else %}[{{ m.role }}] {{ m.content }} [/]{% endif %}{% endfor %}"
)
# Like Qwen3's: only the last response keeps its reasoning.
THINK = (
    _LOOP + _HEADER + "{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + _ASK
)
# Like DeepSeek-R1's: the prompt opens the reasoning, the conversation has none.
OPENS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# Like GLM's: only the next message ends a response.
NO_STOP = _LOOP + _HEADER + "{{ m.content }}{% endfor %}" + _ASK
NO_HEADER = _LOOP + _HEADER + "{{ m.content }}<|im_end|>\n{% endfor %}"
# Like Phi-3's: the system message is left out.
NO_SYSTEM = CHATML.replace(_LOOP, "{% for m in messages if m.role != 'system' %}")
# Like Llama-3.1's and gpt-oss's: a tool call ends with another token than a response.
CALLS = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}<|endoftext|>"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}",
)
ALTERNATES = (
    _LOOP + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    + _HEADER
    + "{{ m.content }}<|im_end|>\n{% endfor %}"
    + _ASK
)
EXACT = {"ChatML": CHATML, "brackets": BRACKETS}


def swallow_whitespace(tokenizer) -> None:
    """Make the special tokens take the whitespace that follows them, as Phi-3's do."""
    for text in ("<|im_start|>", "<|im_end|>"):
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [AddedToken(text, rstrip=True, special=True)]},
            replace_extra_special_tokens=False,
        )
