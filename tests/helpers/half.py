"""Notebooks 03 and 04 in float16 and bfloat16, emulated on a CPU."""

import json
import os
from pathlib import Path

import accelerate
import torch
from checks import ROOT, run_python

# Planted behind the notebook's choice of the device.
CELL = """import half
half.emulate({scale}, {backoff})
device = devices.Device("cpu", {dtype!r}, "emulated")
"""


def emulate(scale: float, backoff: float) -> None:
    """Lift accelerate's refusal to scale float16 gradients on a CPU.

    `scale` is the scaler's first one; an overflow multiplies it by `backoff`.
    """
    plain = accelerate.Accelerator.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if self.mixed_precision == "fp16":
            self.native_amp, self.scaler = (
                True,
                torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=backoff),
            )

    accelerate.Accelerator.__init__ = init


def execute(
    name: str, out: Path, dtype: str, given: dict, scale: float = 65536.0, backoff: float = 0.5
):
    """The finished process that executes notebook `name` in this precision."""
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8"))
    place = next(
        n for n, c in enumerate(notebook["cells"]) if "setup" in c["metadata"].get("tags", [])
    )
    empty = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    cell = empty | {
        "id": "planted",
        "source": CELL.format(dtype=dtype, scale=scale, backoff=backoff),
    }
    notebook["cells"].insert(place + 1, cell)
    planted = out.with_suffix(".planted.ipynb")
    planted.write_text(json.dumps(notebook), "utf-8")
    parameters = {"OVERLAY": "offline", "OUT": str(out), "SET": json.dumps(given)}
    pairs = [part for name, value in parameters.items() for part in ("-p", name, value)]
    path = os.pathsep.join([str(ROOT / "tests" / "helpers"), str(ROOT)])
    executed = out.with_suffix(".ipynb")
    return run_python("-m", "papermill", planted, executed, *pairs, PYTHONPATH=path)
