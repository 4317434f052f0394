"""float16 and bfloat16 training of notebook 03, emulated on a CPU."""

import json
import os
from pathlib import Path

import accelerate
import torch
from checks import ROOT, run_python

# Planted behind the notebook's choice of the device.
CELL = "import half\nhalf.emulate({scale})\ndevice = devices.Device('cpu', {dtype!r}, 'emulated')\n"


def emulate(scale: float) -> None:
    """Lift accelerate's refusal to scale float16 gradients on a CPU; `scale` is the first one."""
    plain = accelerate.Accelerator.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if self.mixed_precision == "fp16":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)

    accelerate.Accelerator.__init__ = init


def train(out: Path, dtype: str, given: dict, scale: float = 65536.0):
    """The finished process that executes notebook 03 in this precision."""
    notebook = json.loads((ROOT / "notebooks" / "03_sft_train.ipynb").read_text("utf-8"))
    place = next(
        n for n, c in enumerate(notebook["cells"]) if "setup" in c["metadata"].get("tags", [])
    )
    empty = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    cell = empty | {"id": "planted", "source": CELL.format(dtype=dtype, scale=scale)}
    notebook["cells"].insert(place + 1, cell)
    planted = out.with_suffix(".planted.ipynb")
    planted.write_text(json.dumps(notebook), "utf-8")
    parameters = {"OVERLAY": "offline", "OUT": str(out), "SET": json.dumps(given)}
    pairs = [part for name, value in parameters.items() for part in ("-p", name, value)]
    path = os.pathsep.join([str(ROOT / "tests" / "helpers"), str(ROOT)])
    executed = out.with_suffix(".ipynb")
    return run_python("-m", "papermill", planted, executed, *pairs, PYTHONPATH=path)
