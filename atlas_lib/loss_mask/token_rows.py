"""Training rows as tokens and labels."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from atlas_lib.loss_mask import labelling
from atlas_lib.loss_mask.turns import Chat, ChatTemplate, Row, Span


@dataclass
class TokenRow:
    """A training row as tokens: ids, offsets (n, 2), `mask` (n,): what the trainer supervises."""

    row: Row
    ids: list[int]
    offsets: np.ndarray
    ranges: list[Span]  # the tokens of each response, by prefixes
    rendered: str  # the text that the trainer tokenises
    mask: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def prefixes(self) -> np.ndarray:
        """The mask that follows from the prompts of inference."""
        mask = np.zeros(len(self.ids), dtype=bool)
        for first, end in self.ranges:
            mask[first:end] = True
        return mask

    def labels_sha256(self, limit: int) -> str:
        """One hash of ids and labels, truncated to `limit` tokens."""
        labels = labelling.labels_of(self.ids, self.mask, limit)
        return labelling.labels_sha256(self.ids[:limit], labels)

    def straddling(self) -> int:
        """Responses whose first token begins in the prompt."""
        starts = zip(self.ranges, self.row.spans.values(), strict=True)
        return sum(int(self.offsets[first, 0]) < start for (first, _), (start, _) in starts)


def tokenise(chat_template: ChatTemplate, rows: Sequence[Row]) -> Iterator[TokenRow]:
    """The rows as tokens; with markers in the tokenizer's template, as transformers makes them."""
    if not rows:
        return
    tokenizer = chat_template.tokenizer
    texts, chats = [row.text for row in rows], [row.chat for row in rows]
    masks: Iterable = [None] * len(rows)
    if chat_template.marked:
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        out = tokenizer.apply_chat_template(
            chats,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        ids, offsets, masks = out["input_ids"], out["offset_mapping"], out["assistant_masks"]
    else:
        ids, offsets = chat_template.tokenize(texts)
    for row, text, row_ids, places, mask in zip(rows, texts, ids, offsets, masks, strict=True):
        places = np.asarray(places).reshape(-1, 2)
        spans = list(row.spans.values())
        ranges = list(chat_template.token_ranges(row.text, row_ids, places, spans))
        tokens = TokenRow(row, row_ids, places, ranges, text)
        tokens.mask = tokens.prefixes() if mask is None else np.asarray(mask, dtype=bool)
        yield tokens


def labelled(
    chat_template: ChatTemplate, conversations: Iterable[Chat]
) -> list[dict[str, list[int]]]:
    """Rows of `input_ids` and `labels`, not truncated, as TRL's trainer takes them.

    Raises ValueError for a conversation of which no row shows what inference shows.
    """
    pairs = ((chat, chat_template.turns(chat)) for chat in conversations)
    rows = [row for chat, turns in pairs for row in chat_template.rows(chat, turns)]
    return [
        {"input_ids": row.ids, "labels": labelling.labels_of(row.ids, row.mask)}
        for row in tokenise(chat_template, rows)
    ]
