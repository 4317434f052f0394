"""CUDA graphs emulated on a CPU: a capture records operations, a replay runs them once more.

As on a GPU, a replay runs no Python, reads and writes the memory that was captured, and a capture
refuses whatever waits for a result.
"""

from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITING = {aten.item.default, aten._local_scalar_dense.default, aten.equal.default}


def memory(values: Any) -> set[int]:
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


class Recorded(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph; `made` lists those captured so far."""

    made: ClassVar[list["Recorded"]] = []
    wrong = False  # whether a replay's integers, such as tokens, are one too large

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, output in self.calls:
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif not memory(output) & memory((args, kwargs)):  # not a view
                self._overwrite(output, func(*args, **kwargs))
        if self.wrong:
            output.add_(1)

    def _overwrite(self, output: Any, anew: Any) -> None:
        for old, new in zip(tree_leaves(output), tree_leaves(anew), strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)

    def pool(self) -> None:
        return None


class Capture:
    """Stands in for torch.cuda.graph."""

    def __init__(self, graph: Recorded, pool: Any, capture_error_mode: str):
        self.graph = graph

    def __enter__(self) -> None:
        self.graph.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.graph.__exit__(*error)
        Recorded.made.append(self.graph)


def emulate(monkeypatch: Any, wrong: bool = False) -> list[Recorded]:
    """Put the emulation in place; the graphs that will be captured."""
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(Recorded, "wrong", wrong)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return Recorded.made
