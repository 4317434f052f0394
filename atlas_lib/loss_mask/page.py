"""One self-contained HTML page that shows any row of an audit, every token coloured."""

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import jinja2
import numpy as np

from atlas_lib import artifacts
from atlas_lib.loss_mask.audit import Auditor
from atlas_lib.loss_mask.token_rows import TokenRow

PAGE = Path(__file__).with_suffix(".html.jinja")
ROWS = 500  # rows of a page, failed ones first: about 5 kB each


def write_page(path: Path, auditor: Auditor, conversations: Iterable) -> None:
    """Write the page with up to ROWS conversations, those that failed first."""
    failed, others = [], []
    for record, rows, opinions in auditor.judge(conversations):
        if record["verdict"] == "failed" or len(others) < ROWS:
            shown = {"idx": record["idx"], "verdict": record["verdict"], "error": record["error"]}
            pairs = zip(rows, opinions, strict=True)
            shown["rows"] = [
                _as_tokens(row, {"learned": row.mask, **auditor.references(row, opinion)}, auditor)
                for row, opinion in pairs
            ]
            (failed if record["verdict"] == "failed" else others).append(shown)
    data = json.dumps([*failed, *others][:ROWS], ensure_ascii=False).replace("<", "\\u003c")
    template = jinja2.Template(PAGE.read_text("utf-8"), autoescape=True)
    artifacts.write_lines(path, [template.render(data=data, name=path.stem)])


def _as_tokens(row: TokenRow, masks: dict[str, np.ndarray], auditor: Auditor) -> dict:
    """{"tokens": text of each token, "masks": {method: one 0 or 1 per token}}."""
    ends = [0, *np.maximum.accumulate(row.offsets[:, 1]).tolist()]
    if not auditor.marked:
        del masks["prefixes"]  # the rows are trained from them
    masks |= {"TRL's template": auditor.trl_mask(row)} if auditor.trl_template else {}
    return {
        "tokens": [row.row.text[start:end] for start, end in pairwise(ends)],
        "masks": {name: "".join(str(int(bit)) for bit in mask) for name, mask in masks.items()},
    }
