"""Ollama's Modelfile: the chat template in Go's text/template, stops and default system turn."""

import json
from collections.abc import Callable
from dataclasses import dataclass

ROLES = ("system", "user", "assistant")
MARKS = ["first mark", "second mark", "third mark", "fourth mark"]


@dataclass(frozen=True)
class Turns:
    """A chat template whose text is the turns one after another, and nothing else."""

    around: dict[str, tuple[str, str]]  # role -> text before and after its content
    header: str  # of the response
    default_system: str | None

    def render(self, chat: list[dict]) -> str:
        """What the Modelfile's template and SYSTEM make of a chat that ends with a user's turn."""
        if self.default_system is not None and chat[0]["role"] != "system":
            chat = [{"role": "system", "content": self.default_system}, *chat]
        wrapped = (self.around[turn["role"]] for turn in chat)
        pairs = zip(wrapped, chat, strict=True)
        return "".join(f"{a}{turn['content']}{b}" for (a, b), turn in pairs) + self.header


def read_turns(render: Callable[..., str]) -> Turns:
    """The turns of a chat template. `render(chat, response)`: its text, with or without a header.

    Raises ValueError for a template that is no sequence of turns.
    """
    chat = [
        {"role": role, "content": mark} for role, mark in zip((*ROLES, "user"), MARKS, strict=True)
    ]
    try:
        whole, pieces = render(chat, False), []
        for mark in MARKS:
            piece, _, whole = whole.partition(mark)
            pieces.append(piece)
        after = {"user": whole, "assistant": render(chat[:3], False).split(MARKS[2])[1]}
        before = {"system": pieces[0], "user": pieces[3].removeprefix(after["assistant"])}
        before["assistant"] = pieces[2].removeprefix(after["user"])
        after["system"] = pieces[1].removesuffix(before["user"])
        around = {role: (before[role], after[role]) for role in ROLES}
        header = render(chat, True).removeprefix(render(chat, False))
        start = render([chat[1]], False).partition(MARKS[1])[0].removesuffix(before["user"])
    except Exception as error:  # a template raises what it likes, here because of the system turn
        raise ValueError(f"the chat template does not render a plain chat ({error})") from None
    system = start.removeprefix(before["system"]).removesuffix(after["system"])
    return Turns(around, header, system if start else None)


def modelfile(turns: Turns, file: str, stops: list[str]) -> str:
    """The Modelfile of a GGUF file beside it."""
    branches = "".join(
        f"{{{{ {'else if' if number else 'if'} eq .Role {_go(role)} }}}}"
        f"{{{{ {_go(before)} }}}}{{{{ .Content }}}}{{{{ {_go(after)} }}}}"
        for number, (role, (before, after)) in enumerate(turns.around.items())
    )
    template = f"{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}"
    lines = [f"FROM ./{file}", f'TEMPLATE """{template}{{{{ {_go(turns.header)} }}}}"""']
    if turns.default_system:
        lines.append(f'SYSTEM """{turns.default_system}"""')
    lines += [f"PARAMETER stop {_go(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def _go(text: str) -> str:
    """A string literal of Go: JSON's, but for surrogates, which are not escaped here."""
    return json.dumps(text, ensure_ascii=False)
