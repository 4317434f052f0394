"""What a model must emit in each turn of a conversation, for any chat template.

For the assistant message i of a chat m, inference sends `P = render(m[:i])` with the generation
prompt. `R = render(m[:i + 1])` is the same chat answered, `F = render(m)` the training text. The
model must emit `E = R[len(P) : end of the stop token]`. The turn is exact if R starts with P and F
starts with P + E: then the row shows the context of inference, followed by the response. Messages
after the last response carry no loss and are left out of F.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Chat = list[dict[str, Any]]
Span = tuple[int, int]
RENDERING_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError)
RENDERING_ERRORS += (AttributeError,)
USER, RESPONSE, NEXT = "\ue010", "\ue011", "\ue012"  # contents of the probes, in no template
ANSWER = {"role": "assistant", "content": RESPONSE}
STATUS = {
    "exact": "the row shows the prompt of inference and the response",
    "history": "the row shows another response than inference, because another turn follows",
    "context": "the row shows another context than inference, because another turn follows",
    "prompt": "the answered conversation does not start with the prompt of inference",
    "no stop": "no stop token ends the response",
}
ONE_ROW_PER_TURN = ("exact", "history", "context")


@dataclass(frozen=True)
class Turn:
    """One assistant message: its index, P, R and E as above, and a key of STATUS."""

    message: int
    prompt: str
    answered: str
    emission: str
    status: str


class Ending(NamedTuple):
    """The stop token of a response, and the text that follows it in the last turn.

    `after` is None if only the next message ends a response.
    """

    stop: str
    after: str | None


class Row(NamedTuple):
    """One training row: a chat, its text, and {index of a message: span of characters to learn}."""

    chat: Chat
    text: str
    spans: dict[int, Span]
    tools: list[dict] | None = None


class ChatTemplate:
    """A chat template with the tokenizer and the variables that it renders with.

    Raises ValueError for a template that renders no responses, no generation prompt or no stop.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.tokenizer = tokenizer
        self.variables = tokenizer.special_tokens_map | dict(variables)
        self.text = text or tokenizer.chat_template
        if not isinstance(self.text, str):
            raise ValueError(
                "The tokenizer has no chat template, or several; name one with --template or, in a "
                "config, with model.chat_template."
            )
        added = tokenizer.added_tokens_decoder
        self.added_ids = np.fromiter(added, dtype=np.int64)
        self.added = any_of(token.content for token in added.values())
        self.special = any_of(token.content for token in added.values() if token.special)
        self.ending, self.header = self._probe_ending(), self._probe_header()
        self.call_ending = self._probe_call_ending()
        self._tokens_of: dict[str, list[int]] = {}

    @property
    def marked(self) -> bool:
        """Whether the tokenizer has another template now: this one with markers."""
        return self.tokenizer.chat_template != self.text

    def render(
        self, chats: Sequence[Chat], prompt: bool = False, tools: list[dict] | None = None
    ) -> list[str]:
        """The text of each chat without its null keys, with the generation prompt if `prompt`."""
        texts, _ = render_jinja_template(
            [[{k: m[k] for k in m if m[k] is not None} for m in chat] for chat in chats],
            tools=tools,
            chat_template=self.text,
            add_generation_prompt=prompt,
            **self.variables,
        )
        return texts

    def _probe(self, *messages: dict, prompt: bool = False) -> str:
        """The text of a user turn and `messages`. Raises ValueError."""
        try:
            return self.render([[{"role": "user", "content": USER}, *messages]], prompt)[0]
        except RENDERING_ERRORS as error:
            raise ValueError(f"The chat template does not render a plain chat: {error}.") from None

    def _probe_ending(self) -> Ending:
        """How a response ends."""
        if found := self._ending(ANSWER, {"role": "user", "content": NEXT}):
            return found
        raise ValueError("The chat template ends responses with no special token.")

    def _probe_call_ending(self) -> Ending:
        """How a tool call ends: often as any response does."""
        result = {"role": "tool", "name": "name", "tool_call_id": "call00000", "content": NEXT}
        for arguments in ({"a": RESPONSE}, f'{{"a": "{RESPONSE}"}}'):
            function = {"name": "name", "arguments": arguments}
            call = {"type": "function", "id": "call00000", "function": function}
            calling = {"role": "assistant", "content": "", "tool_calls": [call]}
            with contextlib.suppress(ValueError):  # many templates render no calls
                return self._ending(calling, result) or self.ending
        return self.ending

    def ending_of(self, message: dict) -> Ending:
        """How this message of the assistant ends."""
        return self.call_ending if message.get("tool_calls") else self.ending

    def _ending(self, response: dict, following: dict) -> Ending | None:
        """The special token after RESPONSE that is there in the last turn and in any other.

        The last one that both share; the first one if the template adds the header of a next
        response even where it is not asked to, since that header is shared as well.
        """
        last, followed = self._tails(response, following)
        if shared := list(self.special.finditer(_common_start(last, followed))):
            always_prompts = self._probe(ANSWER, prompt=True) == self._probe(ANSWER)
            stop = shared[0 if always_prompts else -1]
        elif alone := list(self.special.finditer(last)):
            stop = alone[-1]
        else:
            by_next = self.special.search(followed)
            return Ending(by_next[0], None) if by_next else None
        return Ending(stop[0], last[stop.end() :])

    def _tails(self, response: dict, following: dict) -> list[str]:
        """What follows the text of a response, as the last message and before another one."""
        texts = [self._probe(response), self._probe(response, following)]
        if any(RESPONSE not in text for text in texts):
            raise ValueError("The chat template does not render the content of responses.")
        return [text.split(RESPONSE)[-1] for text in texts]

    def _probe_header(self) -> str:
        """The text between the last message and the response, which the generation prompt adds."""
        plain, asked = self._probe(), self._probe(prompt=True)
        if asked != plain and asked.startswith(plain):
            return asked[len(plain) :]
        before = self._probe(ANSWER).split(RESPONSE)[0]
        lead = before[len(asked) :] if before.startswith(asked) else ""
        if self.special.search(lead):
            raise ValueError(f"The chat template has no generation prompt to add {lead!r}.")
        return asked.split(USER)[-1]

    def turns(self, chat: Chat, tools: list[dict] | None = None) -> list[Turn]:
        """The assistant's turns of `chat`. Raises ValueError if the template refuses the chat."""
        where = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        try:
            prompts = self.render([chat[:i] for i in where], True, tools)
            answered = self.render([chat[: i + 1] for i in where], tools=tools)
        except RENDERING_ERRORS as error:
            starts = (i for i in range(len(chat)) if not self.shows(chat[: i + 1], tools=tools))
            refused = next(starts, len(chat) - 1)
            raise ValueError(
                f"the chat template refuses message {refused} ({chat[refused]['role']}): {error}"
            ) from None
        triples = zip(where, prompts, answered, strict=True)
        return [
            _turn(i, prompt, reply, answered[-1], self.ending_of(chat[i]))
            for i, prompt, reply in triples
        ]

    def shows(self, chat: Chat, text: str = "", tools: list[dict] | None = None) -> bool:
        """Whether the template renders `chat`, and `text` in it."""
        try:
            return text in self.render([chat], tools=tools)[0]
        except RENDERING_ERRORS:
            return False

    def rows(self, chat: Chat, turns: Sequence[Turn], tools: list[dict] | None = None) -> list[Row]:
        """One row of the whole chat if all turns are exact, else one row per turn.

        Raises ValueError that names a turn for which no row shows what inference shows.
        """
        for turn in turns:
            if turn.status not in ONE_ROW_PER_TURN:
                raise ValueError(f"message {turn.message}: {STATUS[turn.status]}")
        whole = all(turn.status == "exact" for turn in turns)
        spans = {t.message: (len(t.prompt), len(t.prompt) + len(t.emission)) for t in turns}
        return [
            Row(
                chat[: turn.message + 1],
                turn.answered,
                spans if whole else {turn.message: spans[turn.message]},
                tools,
            )
            for turn in (turns[-1:] if whole else turns)
        ]

    def render_marked(self, row: Row, markers: str) -> tuple[str, list[Span]]:
        """What the template `markers` renders of a row's chat, and the spans that it marks."""
        [text], [spans] = render_jinja_template(
            [row.chat],
            tools=row.tools,
            chat_template=markers,
            return_assistant_tokens_mask=True,
            **self.variables,
        )
        return text, spans

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[np.ndarray]]:
        """Ids of each text, and offsets (n_tokens, 2) in characters."""
        out = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        return out["input_ids"], [np.asarray(o).reshape(-1, 2) for o in out["offset_mapping"]]

    def token_ranges(
        self, text: str, ids: Sequence[int], offsets: np.ndarray, spans: Sequence[Span]
    ) -> Iterator[Span]:
        """Tokens [first, end) of each span: those that follow the prompt's own tokens.

        Added tokens split a text for every tokenizer, so that the tokens of a prompt are those up
        to its last added token, followed by those of its tail.
        """
        added = [match.start() for match in self.added.finditer(text)]
        for start, end in spans:
            split = max((at for at in added if at < start), default=0)
            tail = self._tail_ids(text[split:start])
            first = int(np.searchsorted(offsets[:, 1], split, side="right"))
            same = np.asarray(ids[first : first + len(tail)]) == tail[: len(ids) - first]
            common = len(tail) if same.all() else int(same.argmin())
            yield first + common, int(np.searchsorted(offsets[:, 0], end, side="left"))

    def _tail_ids(self, tail: str) -> np.ndarray:
        if tail not in self._tokens_of:
            ids = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
            self._tokens_of[tail] = np.asarray(ids)
        return self._tokens_of[tail]


def _turn(message: int, prompt: str, answered: str, text: str, ending: Ending) -> Turn:
    after = ending.after or ""
    emission = answered[len(prompt) : len(answered) - len(after)]
    if not answered.startswith(prompt):
        emission, status = "", "prompt"
    elif ending.after is None or not answered.endswith(ending.stop + after):
        status = "no stop"
    elif not text.startswith(prompt):
        status = "context"
    else:
        status = "exact" if text.startswith(prompt + emission) else "history"
    return Turn(message, prompt, answered, emission, status)


def any_of(tokens: Iterable[str]) -> re.Pattern:
    """A pattern that matches the longest of some tokens; of none, it matches nothing."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _common_start(one: str, other: str) -> str:
    same = (a == b for a, b in zip(one, other, strict=False))
    return one[: sum(1 for _ in takewhile(bool, same))]
