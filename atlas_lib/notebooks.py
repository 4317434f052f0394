"""Execute a notebook of this repository headless; the page itself is what runs."""

import logging
import sys
from pathlib import Path
from typing import Any

from atlas_lib import runtime

FOLDER = runtime.ROOT / "notebooks"


def execute(stage: str, out: Path, parameters: dict[str, Any]) -> Path:
    """Run notebooks/<stage>.ipynb with papermill, echo what it prints, keep it in out/notebooks.

    The executed notebook is kept on failure too. Raises RuntimeError with the notebook's error.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    source, target = FOLDER / f"{stage}.ipynb", out / "notebooks" / f"{stage}.ipynb"
    if not source.is_file():
        raise FileNotFoundError(f"{source} is not here: run it elsewhere first, or set model.adapter.")
    target.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("papermill")
    logger.handlers, logger.propagate = [logging.StreamHandler(sys.stdout)], False
    try:
        papermill.execute_notebook(
            source,
            target,
            parameters=parameters | {"OUT": str(out)},
            kernel_name="python3",
            log_output=True,
            progress_bar=False,
            cwd=str(runtime.ROOT),
        )
    except PapermillExecutionError as error:
        raise RuntimeError(f"{stage}: {error.evalue} (the executed notebook: {target})") from None
    return target
