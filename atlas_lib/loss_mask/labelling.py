"""From characters to the labels of the loss."""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

IGNORED = -100  # the label that PyTorch's cross-entropy skips
_ASSISTANT_TURN = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


def assistant_spans(text: str) -> list[tuple[int, int]]:
    """Character spans to supervise, from the ChatML grammar alone: content and <|im_end|>."""
    return [match.span(1) for match in _ASSISTANT_TURN.finditer(text)]


def mask_of_spans(
    spans: Iterable[tuple[int, int]], offsets: np.ndarray, added: np.ndarray | None = None
) -> np.ndarray:
    """Mask (n_tokens,) bool of character spans, from offsets (n_tokens, 2) in characters.

    A token counts if it overlaps a span. A token that holds both the newline before a response and
    its first characters is therefore supervised, but not one of the `added` tokens (bool) that
    swallows whitespace at the start of a response, as Phi-3's do.
    """
    mask = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        first = int(np.searchsorted(offsets[:, 1], start, side="right"))
        if added is not None and added[first] and offsets[first, 0] < start:
            first += 1
        mask[first : int(np.searchsorted(offsets[:, 0], end, side="left"))] = True
    return mask


def labels_of(
    input_ids: Sequence[int], mask: Sequence[bool], max_length: int | None = None
) -> list[int]:
    """The labels of the loss: ids where `mask`, IGNORED elsewhere, truncated to `max_length`."""
    return np.where(mask, input_ids, IGNORED)[:max_length].tolist()


def labels_sha256(input_ids: list[int], labels: list[int]) -> str:
    """One hash of a row's ids and labels, both already truncated."""
    return hashlib.sha256(np.asarray([input_ids, labels], dtype=np.int32).tobytes()).hexdigest()
