"""Random conversations for chat templates: whitespace, unicode, quoted markers, tool calls."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from atlas_lib.loss_mask.turns import Chat

DRAWN = ("hello", "wörld", " ", "\n", "assistant", "[/ INST]", "{{ x }}", "a b", "日本", "😀", "x")
QUOTED = ("<|im_end|>", "<|eot_id|>", "</s>", "[INST]", "<end_of_turn>", "<|im_start|>user\n")
ARGUMENTS = ("object", "text")  # how a template wants the arguments of calls
FIELDS = ("reasoning_content", "reasoning", "thinking", "inline")  # keys, or tags in the content
TOOL = {
    "name": "look",
    "description": "Look at a place.",
    "parameters": {
        "type": "object",
        "properties": {"where": {"type": "string", "description": "The place."}},
        "required": ["where"],
    },
}
TOOLS = [{"type": "function", "function": TOOL}]


@dataclass(frozen=True)
class Shape:
    """What conversations contain: system turns, calls with ARGUMENTS, reasoning in FIELDS."""

    system: bool = True
    arguments: str | None = None
    reasoning: str | None = None
    turns: int = 4


class Conversations:
    """Draws conversations whose texts are made of DRAWN and `markers`; 4 % of texts are empty."""

    def __init__(self, seed: int | str, markers: Sequence[str] = ()):
        self.random, self.words = random.Random(seed), (*DRAWN, *markers)

    def text(self) -> str:
        if self.random.random() < 0.04:
            return ""
        count = self.random.randint(1, 8)
        words = self.random.choices(self.words, k=count)
        return "".join(word + self.random.choice(("", " ")) for word in words)

    def draw(self, shape: Shape) -> Chat:
        """One conversation; `shape.turns` is the largest number of questions."""
        chat: Chat = []
        if shape.system and self.random.random() < 0.4:
            chat.append({"role": "system", "content": self.text()})
        for turn in range(self.random.randint(1, shape.turns)):
            chat.append({"role": "user", "content": self.text()})
            if shape.arguments and (turn == 0 or self.random.random() < 0.5):
                content = self.text() if self.random.random() < 0.5 else ""
                chat += [call(self.text(), shape.arguments, content), result(self.text())]
            chat.append(answer(self.text(), self.text(), shape.reasoning))
        return chat


def call(where: str, arguments: str, content: str = "") -> dict:
    """An assistant message that calls the tool."""
    value = {"where": where}
    function = {
        "name": "look", "arguments": value if arguments == "object" else json.dumps(value)
    }  # fmt: skip
    calls = [{"type": "function", "id": "abcdefghi", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(content: str) -> dict:
    return {"role": "tool", "name": "look", "tool_call_id": "abcdefghi", "content": content}


def answer(content: str, thought: str, field: str | None = None) -> dict:
    """An assistant message, with a thought in `field`."""
    if field == "inline":
        return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{content}"}
    return {"role": "assistant", "content": content} | ({field: thought} if field else {})
