"""Write configs/dev_prompts.jsonl: prompts of our own, in IFEval's schema, to choose settings by.

python -m tools.dev_prompts     # deterministic; a test compares them with IFEval's, where those are
"""

from atlas_lib import artifacts
from atlas_lib.config import CONFIGS, load_config
from atlas_lib.standin import corpus

PATH = CONFIGS / "dev_prompts.jsonl"


def prompts() -> list[dict]:
    """About 120 prompts over all 25 instruction types, on topics that train nothing offline."""
    taught = list(load_config("sft_qwen05b").offline.taught)
    asked = corpus.prompts(1, "dev", 5, 4, taught)
    return [{name: value for name, value in row.items() if name != "answer"} for row in asked]


if __name__ == "__main__":
    artifacts.write_jsonl(PATH, prompts())
    print(f"{len(prompts())} prompts in {PATH}")
