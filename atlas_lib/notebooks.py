"""Start a notebook, show its figures, and execute notebooks headless."""

import contextlib
import html
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas_lib import artifacts, session, stages
from atlas_lib.bootstrap import NOTEBOOKS, platform_name
from atlas_lib.config import load_config
from atlas_lib.schema import Config

if TYPE_CHECKING:
    from IPython.display import DisplayHandle
    from matplotlib.figure import Figure
    from pandas import DataFrame

STAMP = "atlas"  # in the metadata of an output: digest, commit, platform, out, parameters
CONTROL = {code: repr(chr(code))[1:-1] for code in (*range(9), *range(11, 32), *range(127, 160))}


def start(
    name: str, config_name: str, overlay: str, out: str, overrides: dict | str
) -> tuple[Config, Path]:
    """The configuration and OUT of a notebook; prints what identifies the run.

    The metadata of an empty output, STAMP, holds the same for the tools that read notebooks.
    """
    from IPython.display import display

    config = load_config(config_name, overlay, overrides)
    folder = session.output_folder(out, config_name, overlay)
    if session.NESTED not in os.environ and (folder / session.LOCK).is_file():
        with session.hold(folder / session.LOCK, f"OUT {folder}"):
            pass  # only a look: a notebook may stay open for hours
    session.export_secrets()
    stage = name if name in stages.STAGES else stages.IFEVAL_EVAL  # a report is no stage
    stamp = {
        "digest": artifacts.config_digest(config, stage),
        "commit": session.commit(),
        "platform": platform_name(),
        "out": str(folder),
    }
    versions = " · ".join(f"{package} {each}" for package, each in session.versions().items())
    lines = [config.label, " · ".join(f"{key} {each}" for key, each in stamp.items()), versions]
    print(*filter(None, lines), sep="\n")
    metadata = {STAMP: stamp | {"parameters": config.parameters}}
    display({"text/html": ""}, raw=True, metadata=metadata)
    return config, folder


def headline() -> "DisplayHandle":
    """A line that a cell at the end of the notebook replaces by its finding."""
    from IPython.display import Markdown, display

    return display(Markdown("*The result appears here at the end.*"), display_id=True)


def ledger(out: Path) -> "DataFrame":
    """What each stage in `out` took, from its manifest: a column per stage; "-" if not known."""
    import pandas as pd

    taken = pd.DataFrame(artifacts.read_ledgers(out))
    return taken.map(lambda x: "-" if pd.isna(x) else f"{x:,.{0 if x > 99 else 2}f}")


def printable(text: str) -> str:
    """Text of a data set with its control characters, except tabs and line breaks, escaped."""
    return text.translate(CONTROL)


def show_figure(figure: "Figure", alt: str, label: str = "") -> None:
    """Display a figure once, `label` above it and `alt` as its alternative text.

    The site and nbconvert's classic template read `alt` from the output's metadata.
    """
    import matplotlib.pyplot as plt
    from IPython.display import display

    if label:
        figure.suptitle(label, fontsize=8, color="#555555")
    plt.setp(figure.findobj(plt.Text), parse_math=False)  # a $ in a name starts no formula
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)  # the inline backend would show it a second time, without the text


def show_page(page: str, title: str) -> None:
    """Display a self-contained HTML page in a frame of its own."""
    from IPython.display import HTML, display

    frame = f'<iframe title="{title}" style="width:100%;height:32rem" srcdoc="{html.escape(page)}">'
    display(HTML(f"<div>{frame}</iframe></div>"))


def execute(name: str, out: Path, parameters: dict[str, Any]) -> Path:
    """Run notebooks/<name>.ipynb with papermill, echo its output, keep it in out/notebooks.

    The executed notebook is kept on failure too. SIGTERM is passed on to its process, so that it
    can save. Raises RuntimeError with the notebook's error.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target = out / "notebooks" / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    os.environ[session.NESTED] = "1"
    try:
        with _forwarding_sigterm():
            papermill.execute_notebook(
                NOTEBOOKS / f"{name}.ipynb",
                target,
                parameters=parameters | {"OUT": str(out)},
                kernel_name="python3",
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                extra_arguments=["--log-level=ERROR"],  # the kernel's own messages
            )
    except (RuntimeError, PapermillExecutionError) as error:
        reason = f"its process did not start ({error}); run it again when the machine is less "
        reason += "busy, and if its loopback interface is down, after `ip link set lo up`"
        if isinstance(error, DeadKernelError):
            reason = "its process was killed or ran out of memory; run it again to continue"
        if isinstance(error, PapermillExecutionError):
            reason = f"{error.evalue} ({error.ename}; the executed notebook is {target})"
        raise RuntimeError(f"{name} stopped: {reason}.") from None
    finally:
        del os.environ[session.NESTED]
    return target


@contextlib.contextmanager
def _forwarding_sigterm() -> Iterator[None]:
    """Pass SIGTERM on to the kernel, which has a session of its own, instead of ending first."""
    import psutil

    def forward(number, frame):
        kernels = psutil.Process().children()
        for kernel in kernels:
            kernel.send_signal(number)
        if not kernels:
            signal.signal(number, before)
            os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def keep(name: str, out: Path) -> None:
    """On Kaggle, copy the running notebook to out/notebooks: a kernel returns only files."""
    running = session.KAGGLE / "working" / "__notebook__.ipynb"
    if session.NESTED in os.environ or platform_name() != "kaggle" or not running.is_file():
        return
    text = running.read_text(encoding="utf-8")
    artifacts.write_lines(out / "notebooks" / f"{name}.ipynb", [text.rstrip("\n")])
