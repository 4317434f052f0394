"""Execute a notebook of this repository headless; the page itself is what runs."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atlas_lib import bootstrap, session

# In a checkout notebooks/ stands beside the package; an installed wheel carries it inside.
PAGES = (bootstrap.ROOT / "notebooks", Path(__file__).resolve().parent / "pages")
FOLDER = next((folder for folder in PAGES if folder.is_dir()), PAGES[0])


def execute(stage: str, out: Path, parameters: dict[str, Any]) -> Path:
    """Run notebooks/<stage>.ipynb with papermill, echo what it prints, keep it in out/notebooks.

    The executed notebook is kept on failure too. A SIGTERM reaches the notebook's own process, so
    that it can save. Raises RuntimeError with the notebook's error.
    """
    source, target = FOLDER / f"{stage}.ipynb", out / "notebooks" / f"{stage}.ipynb"
    if not source.is_file():
        raise FileNotFoundError(
            f"{source} is not here: run it elsewhere first, or set model.adapter."
        )
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target.parent.mkdir(parents=True, exist_ok=True)
    if bootstrap.platform_name() == "colab":
        os.environ[session.NESTED] = "1"
    try:
        with _forwarding_sigterm():
            papermill.execute_notebook(
                source,
                target,
                parameters=parameters | {"OUT": str(out)},
                kernel_name="python3",
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                cwd=str(bootstrap.ROOT),
                extra_arguments=["--log-level=ERROR"],  # not about the run
            )
    except DeadKernelError:
        raise RuntimeError(
            f"{stage} stopped: its process was killed or ran out of memory; run the same again, "
            "and it goes on at this stage."
        ) from None
    except PapermillExecutionError as error:
        raise RuntimeError(
            f"{stage} stopped: {error.evalue} ({error.ename}; the executed notebook is {target})"
        ) from None
    finally:
        os.environ.pop(session.NESTED, None)
    return target


def keep(stage: str, out: Path) -> None:
    """On Kaggle, copy the running page to out/notebooks: only files come back from a kernel."""
    running = session.KAGGLE / "working" / "__notebook__.ipynb"
    if bootstrap.platform_name() != "kaggle" or not running.is_file():
        return
    page = running.read_text(encoding="utf-8")
    if json.dumps(f'keep("{stage}"')[1:-1] in page:  # not the page that called this one
        target = out / "notebooks" / f"{stage}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        part.write_text(page, encoding="utf-8")
        part.replace(target)


@contextlib.contextmanager
def _forwarding_sigterm() -> Iterator[None]:
    """Pass SIGTERM on to the kernel, which has a session of its own, instead of dying first."""
    import psutil

    def forward(number, frame):
        kernels = psutil.Process().children()
        for kernel in kernels:
            kernel.send_signal(signal.SIGTERM)
        if not kernels:  # nothing that could save: end as if nobody had listened
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        before = signal.signal(signal.SIGTERM, forward)
    except ValueError:  # not the main thread: nothing to listen with
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ran_through(stage: str, out: Path) -> bool:
    """Whether out/notebooks has this very page, executed to its end without an error."""
    try:
        page = json.loads((out / "notebooks" / f"{stage}.ipynb").read_bytes())
        run = page["metadata"]["papermill"]
        source = json.loads((FOLDER / f"{stage}.ipynb").read_bytes())
    except (OSError, ValueError, KeyError):
        return False
    done = bool(run["end_time"]) and not run["exception"]
    return done and sources(page, ("code",)) == sources(source, ("code",))


def sources(page: dict, kinds: tuple[str, ...] = ("code", "markdown")) -> list[str]:
    """The sources of the cells of these kinds, without the one that papermill injected."""
    return [
        "".join(cell["source"])
        for cell in page["cells"]
        if cell["cell_type"] in kinds
        and "injected-parameters" not in cell["metadata"].get("tags", [])
    ]
