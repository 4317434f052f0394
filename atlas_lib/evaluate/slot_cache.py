"""A KV cache whose rows come and go, and the decoder that gives each row its next token.

A step touches the weights and every row's keys and values once. On a GPU its shape is one of a few,
so that a CUDA graph can replay it instead of launching hundreds of kernels one by one.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

FIXED_SHAPES = ("cuda",)  # elsewhere a step has the exact shape: a CPU pays for what is unused
FEWEST = 16  # the memory-efficient kernel pads masks of other widths


def rounded_up(n: int, most: int) -> int:
    """The next of 16, 32, 48 ... 128, 160, 192 ...: beyond 64, less than a quarter above `n`."""
    step = max(FEWEST, 2 ** n.bit_length() // 8)
    return min(-(-n // step) * step, most)


def packed_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """sdpa for one new token a row, without repeating the keys for the query heads that share them.

    The heads of a group take the place of query tokens, [rows, key heads, group, d]: each attends
    to its group's keys with the mask of its row. transformers 5.23 packs, too; 5.16 does not.
    """
    import torch

    rows, heads, _, width = query.shape
    packed = query.reshape(rows, key.shape[1], -1, width)
    output = torch.nn.functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(rows, 1, heads, -1), None


@contextlib.contextmanager
def packed_heads() -> Iterator[None]:
    """`packed_attention` as transformers' sdpa."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = packed_attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before


class SlotCache:
    """Keys and values of all rows, [slots, heads, columns, d] a layer, as a model's KV cache.

    The token at position t of a row is in column t.
    """

    def __init__(self, slots: int, columns: int):
        self.slots, self.columns = slots, -(-columns // FEWEST) * FEWEST
        self.layers: dict[int, list] = {}

    def expect(self, first: int, positions: Any, window: int) -> None:
        """Where the next pass stores its tokens, [rows, width], from row `first` on.

        Padding before a prompt has negative positions and goes behind the prompt, where the row's
        next tokens overwrite it. The pass reads `window` columns.
        """
        import torch

        self.rows = torch.arange(first, first + len(positions), device=positions.device)[:, None]
        self.places = torch.where(positions < 0, positions + positions.shape[1], positions)
        self.window = slice(first, first + len(positions)), slice(None), slice(window)

    def update(self, keys: Any, values: Any, layer: int, *_: Any, **__: Any) -> tuple:
        """Called by transformers' attention: store [rows, heads, width, d], return the window."""
        if layer not in self.layers:  # zeros: a masked NaN would still be one in the product
            shape = (self.slots, keys.shape[1], self.columns, keys.shape[3])
            self.layers[layer] = [keys.new_zeros(shape), values.new_zeros(shape)]
        for kept, new in zip(self.layers[layer], (keys, values), strict=True):
            kept[self.rows, :, self.places] = new.transpose(1, 2)
        return tuple(kept[self.window] for kept in self.layers[layer])

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of a row to another one."""
        for kept in (kept for layer in self.layers.values() for kept in layer):
            kept[target, :, :length] = kept[source, :, :length]


class SlotDecoder:
    """A model and its cache of slots: the next tokens of new rows and of all rows in use.

    Rows in use come first.
    """

    def __init__(self, model: Any, slots: int, columns: int):
        import torch

        self.model, self.cache = model, SlotCache(slots, columns)
        self.lengths: list[int] = []  # tokens held by every row in use
        self.fixed = self.graphed = model.device.type in FIXED_SHAPES
        self.inputs = torch.zeros(2, slots, dtype=torch.long, device=model.device)
        self.graphs: dict[tuple[int, int], tuple] = {}
        self.pool = None  # of memory, shared by the graphs: they never run at the same time

    def add(self, prompts: list[list[int]]) -> list[int]:
        """Take in rows; the first new token of each."""
        import torch

        device, width, first = self.model.device, max(map(len, prompts)), len(self.lengths)
        padded = [[0] * (width - len(row)) + row for row in prompts]
        begins = torch.tensor([width - len(row) for row in prompts], device=device)
        positions = torch.arange(width, device=device) - begins[:, None]
        self.lengths += map(len, prompts)
        ids = torch.tensor(padded, device=device)
        return self._forward(ids, positions, first, width).tolist()

    def remove(self, row: int) -> None:
        """Free the slot of `row`: the last row in use moves into it."""
        length, last = self.lengths.pop(), len(self.lengths)
        if row < last:
            self.lengths[row] = length
            self.cache.move(last, row, length)

    def step(self, tokens: list[int]) -> list[int]:
        """The next token of every row in use, given the last one of each."""
        import torch

        rows = len(tokens)
        self.inputs[:, :rows] = torch.tensor([tokens, self.lengths], device=self.inputs.device)
        self.lengths = [length + 1 for length in self.lengths]
        window = max(self.lengths)
        if not self.fixed:
            return self.one_token(rows, window).tolist()
        # Slots that are not in use compute too, each a token at the start of its own row.
        self.inputs[:, rows:] = 0
        shape = rounded_up(rows, self.cache.slots), rounded_up(window, self.cache.columns)
        return self._replay(shape)[:rows].tolist()

    def one_token(self, rows: int, window: int) -> Any:
        """The next token of the first `rows` slots; run twice, it writes and gives the same."""
        ids, positions = self.inputs[:, :rows, None]
        with packed_heads():
            return self._forward(ids, positions, 0, window)

    def _forward(self, ids: Any, positions: Any, first: int, window: int) -> Any:
        """The most likely token after each row of `ids`, which end at the last column."""
        import torch

        # Always pass a mask: without one a T4 takes sdpa's slow path. Padding attends to column 0,
        # since a softmax over nothing is NaN and would spread through its keys and values.
        self.cache.expect(first, positions, window)
        positions = positions.clamp(min=0)
        mask = torch.arange(window, device=ids.device) <= positions[:, :, None]
        logits = self.model(
            input_ids=ids,
            attention_mask=mask[:, None],  # [rows, 1, width, window]
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1].argmax(-1)

    def _replay(self, shape: tuple[int, int]) -> Any:
        """`one_token` by a CUDA graph, whose first tokens must be those of the model itself.

        If a graph cannot be captured or gives others, all further steps run without one.
        """
        import torch

        if shape in self.graphs:
            graph, tokens = self.graphs[shape]
            graph.replay()
            return tokens
        expected = self.one_token(*shape)
        if not self.graphed:
            return expected
        try:
            graph, tokens = self.graphs[shape] = self._capture(shape)
            graph.replay()
            if torch.equal(tokens, expected):
                return expected
            reason = "the first tokens of one differ"
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
        print(f"decoding without CUDA graphs, which is slower: {reason}", flush=True)
        self.graphed = False
        self.graphs.clear()
        return self.one_token(*shape)  # it rewrites the keys and values of this step

    def _capture(self, shape: tuple[int, int]) -> tuple:
        import torch

        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # a failed capture leaves its own
            torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"),
        ):
            tokens = self.one_token(*shape)
        self.pool = graph.pool()
        return graph, tokens
