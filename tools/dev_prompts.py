"""Write configs/dev_prompts.jsonl: prompts in IFEval's schema, used to choose settings.

python -m tools.dev_prompts     # deterministic; tests compare them with IFEval's prompts
"""

import itertools
import random
from pathlib import Path
from typing import Any

from atlas_lib import artifacts
from atlas_lib.config import CONFIGS, parse_yaml
from atlas_lib.evaluate import checkers

PATH = CONFIGS / "dev_prompts.jsonl"
WORDS_FILE = Path(__file__).with_suffix(".yaml")
PER_TYPE, IN_PAIRS, IN_TRIPLES = 8, 160, 60  # prompts; of 541, IFEval has 305, 179 and 57
# Of relations drawn, "less than". Fewer of them can be combined: 37 % are left, as in IFEval.
SHARE_LESS = 0.55
ONE_OF_THREE, REPEAT = "detectable_format:constrained_response", "combination:repeat_prompt"


class Writer:
    """Draws requests, instructions and their wording from WORDS_FILE."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.words = parse_yaml(WORDS_FILE.read_text("utf-8"), str(WORDS_FILE))
        groups = self.words["groups"]
        groups["decisions"]["topics"] = groups["proposals"]["topics"]
        self.requests = {name: self.shuffled_requests(group) for name, group in groups.items()}
        self.conflicts = known_conflicts(self.words["conflicts"])

    def shuffled_requests(self, group: dict) -> list[str]:
        """Every form once before any comes again, each time with the next topic."""
        forms, topics = group["forms"], group["topics"]
        self.rng.shuffle(forms)
        self.rng.shuffle(topics)
        return [
            form.format(topic=topics[(turn * (len(forms) + 1) + place) % len(topics)])
            for turn in range(len(topics))
            for place, form in enumerate(forms)
        ]

    def request(self, instructions: list[str]) -> str:
        """The next request of a group that suits the instructions."""
        if ONE_OF_THREE in instructions:
            return self.requests["decisions"].pop(0)
        groups = [name for name in self.requests if name != "decisions" and self.requests[name]]
        return self.requests[self.rng.choice(groups)].pop(0)

    def arguments(self, instruction: str) -> dict[str, Any]:
        """IFEval's kwargs of the instruction, drawn from the alternatives."""
        options = self.words["instructions"][instruction]["kwargs"]
        less = ["less than" in option.values() for option in options]
        weights = [SHARE_LESS if is_less else 1 - SHARE_LESS for is_less in less]
        [chosen] = self.rng.choices(options, weights)
        return {name: self.value(name, values) for name, values in chosen.items()}

    def value(self, name: str, values: Any) -> Any:
        """One of the listed values, or of those of a list in `words`; some words for 0."""
        if values == 0:
            some = self.words["words"][{"forbidden_words": "forbidden"}.get(name, name)]
            return self.rng.sample(some, self.rng.choice([1, 2, 2, 3]))
        listed = self.words["words"].get(values, values) if isinstance(values, str) else values
        return listed if isinstance(listed, str) else self.rng.choice(list(listed))

    def say(self, instruction: str, kwargs: dict) -> str:
        """One of the ways to put the instruction."""
        shown = dict(kwargs)
        for name, value in kwargs.items():
            if name.endswith("relation"):
                shown["relation"] = value.replace("less", "fewer")
            if isinstance(value, list):
                shown["words"] = " / ".join(value)
        if "language" in shown:
            shown["language"] = self.words["words"]["languages"][shown["language"]]
        return self.rng.choice(self.words["instructions"][instruction]["say"]).format(**shown)

    def prompt(self, instructions: list[str], arguments: list[dict]) -> dict:
        """A row in IFEval's schema, but for its key."""
        request = self.request(instructions)
        if REPEAT in instructions:
            arguments[instructions.index(REPEAT)]["prompt_to_repeat"] = request
        demands = " ".join(map(self.say, instructions, arguments))
        layouts = self.words["layouts"]
        layout = self.rng.choice(layouts[:1] if REPEAT in instructions else layouts)
        text = layout.format(request=request, demands=demands)
        return {"prompt": text, "instruction_id_list": instructions, "kwargs": arguments}

    def compatible(self, instructions: list[str], arguments: list[dict]) -> bool:
        """Whether one response can follow all of them without strain."""
        pairs = itertools.combinations(instructions, 2)
        if any(other in self.conflicts[one] for one, other in pairs):
            return False
        brief, limits = set(self.words["brief"]), ["less than" in a.values() for a in arguments]
        others = [i for i, limit in zip(instructions, limits, strict=True) if not limit]
        return not any(limits) or (sum(limits) == 1 and set(others) <= brief)

    def combination(self, size: int) -> tuple[list[str], list[dict]]:
        """Random instructions with their arguments, drawn again until they are compatible."""
        while True:
            instructions = self.rng.sample(list(self.words["instructions"]), size)
            arguments = [self.arguments(instruction) for instruction in instructions]
            if self.compatible(instructions, arguments):
                return instructions, arguments


def known_conflicts(own: dict[str, list[str]]) -> dict[str, set[str]]:
    """Instruction -> those that cannot stand beside it: IFEval's table and our own, both ways."""
    registry = checkers.lm_eval_checkers().instructions_registry
    table = {name: set(others) for name, others in registry.INSTRUCTION_CONFLICTS.items()}
    for name, others in own.items():
        table[name] |= set(others)
    return registry.conflict_make(table)


def dev_prompts() -> list[dict]:
    """Prompts of all 25 instruction types: each type by itself, then pairs and triples."""
    writer = Writer(seed=1)
    drawn = [
        ([name], [writer.arguments(name)])
        for name in writer.words["instructions"]
        for _ in range(PER_TYPE)
    ]
    drawn += [writer.combination(size) for size in [2] * IN_PAIRS + [3] * IN_TRIPLES]
    rows = [writer.prompt(*given) for given in drawn]
    writer.rng.shuffle(rows)
    return [{"key": key} | row for key, row in enumerate(rows, start=1)]


if __name__ == "__main__":
    artifacts.write_jsonl(PATH, dev_prompts())
    print(f"{len(dev_prompts())} prompts in {PATH}")
