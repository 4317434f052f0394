"""Write configs/dev_prompts.jsonl: prompts in IFEval's schema, used to choose settings.

python -m tools.dev_prompts     # deterministic; a test checks that none is a prompt of IFEval
"""

from atlas_lib import artifacts
from atlas_lib.config import CONFIGS, load_config
from atlas_lib.standin import corpus

PATH = CONFIGS / "dev_prompts.jsonl"


def dev_prompts() -> list[dict]:
    """About 120 prompts over all 25 instruction types, on topics without offline training rows."""
    taught = list(load_config("sft_qwen05b").offline.taught)
    asked = corpus.prompts(1, "dev", 5, 4, taught)
    return [{name: value for name, value in row.items() if name != "answer"} for row in asked]


if __name__ == "__main__":
    artifacts.write_jsonl(PATH, dev_prompts())
    print(f"{len(dev_prompts())} prompts in {PATH}")
