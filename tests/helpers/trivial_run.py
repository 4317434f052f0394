"""A runner for sweeps that takes the arguments of tools.run and needs no model.

It writes what 03 would: a validation loss that the overrides decide. `label` tells it how to
behave: sleep so many seconds, or fail with those words.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from atlas_lib import artifacts
from atlas_lib.config import parse_assignments


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stages", nargs="+")
    for name in ("--config", "--overlay", "--out"):
        parser.add_argument(name)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    values = parse_assignments(args.set)
    out = Path(args.out)
    with (out / "starts.txt").open("a") as file:
        file.write("started\n")
    given = {name: os.environ.get(name) for name in ("WANDB_RUN_GROUP", "WANDB_NAME")}
    artifacts.write_json(out / "environment.json", given)
    does = json.loads(values["label"]) if "label" in values else {}
    time.sleep(does.get("sleep", 0))
    if "03_sft_train" in args.stages and values["lora.r"] in does.get("fails", []):
        sys.exit(f"error: rank {values['lora.r']} was told to fail")
    loss = float(values["train.learning_rate"]) * 1000 + values["lora.r"] / 100
    loss += values["train.seed"] / 1e6
    stage = out / "03_sft_train"
    artifacts.write_json(stage / "summary.json", {"validation_loss": loss})
    artifacts.write_jsonl(stage / "train_log.jsonl", [{"step": 1, "loss": 2 * loss}])


if __name__ == "__main__":
    main()
