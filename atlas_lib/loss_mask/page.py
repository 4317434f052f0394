"""One self-contained HTML page that shows the rows of an audit, every token coloured."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path

import jinja2
import numpy as np

from atlas_lib import artifacts, notebooks
from atlas_lib.loss_mask.audit import Auditor, Judged
from atlas_lib.loss_mask.token_rows import TokenRow

PAGE = Path(__file__).with_suffix(".html.jinja")
PAGE_BYTES = 950_000  # bytes of a page


def write_page(path: Path, auditor: Auditor, judged: Sequence[Judged]) -> None:
    """Write the page of `render_page`."""
    artifacts.write_lines(path, [render_page(auditor, judged, path.stem)])


def render_page(auditor: Auditor, judged: Sequence[Judged], name: str) -> str:
    """The HTML text: conversations that failed first, as many as fit into PAGE_BYTES."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(PAGE.read_text("utf-8"))
    blocks: dict[bool, list[str]] = {True: [], False: []}  # those that failed, the others
    left = PAGE_BYTES - len(template.render(blocks=[], name=name).encode())
    for record, rows, opinions in judged:
        failed = record["verdict"] == "failed"
        if not failed and sum(map(len, blocks[False])) >= left:
            continue
        panels = [
            _panels(row, {"learned": row.mask, **auditor.references(row, opinion)}, auditor)
            for row, opinion in zip(rows, opinions, strict=True)
        ]
        blocks[failed].append(template.module.block(record, panels))
    shown = []
    for block in (*blocks[True], *blocks[False]):
        left -= len(block.encode())
        if left < 0:
            break
        shown.append(block)
    return template.render(blocks=shown, name=name, judged=len(judged))


def _panels(row: TokenRow, masks: dict[str, np.ndarray], auditor: Auditor) -> list[dict]:
    """The row once for what is learned, and once for each method that differs from it.

    A panel has the `names` of the methods that agree and `runs`: (learned, differs, tokens).
    """
    ends = [0, *np.maximum.accumulate(row.offsets[:, 1]).tolist()]
    tokens = [notebooks.printable(row.row.text[start:end]) for start, end in pairwise(ends)]
    if not auditor.template.marked:
        del masks["prefixes"]  # the rows are trained from them
    masks |= {"TRL's template": auditor.trl_mask(row)} if auditor.trl_template else {}
    names: dict[bytes, list[str]] = {}
    for name, mask in masks.items():
        names.setdefault(np.asarray(mask, dtype=bool).tobytes(), []).append(name)
    panels = []
    for packed, agreeing in names.items():
        mask = np.frombuffer(packed, dtype=bool)
        kinds = zip(mask.tolist(), (mask != row.mask).tolist(), tokens, strict=True)
        grouped = groupby(kinds, key=lambda kind: kind[:2])
        runs = [(*kind, [token for *_, token in run]) for kind, run in grouped]
        panels.append({"names": agreeing, "differing": int((mask != row.mask).sum()), "runs": runs})
    return panels
