"""Compare the masks of two methods token by token, for families of models with real tokenizers."""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from atlas_lib import template
from atlas_lib.config import load_config
from atlas_lib.loss_mask.audit import Auditor
from atlas_lib.loss_mask.token_rows import TokenRow, tokenise
from atlas_lib.loss_mask.turns import ChatTemplate
from tools import npm_tokenizers
from tools.judge_template import Judge, StandIn, Verdict

CONVERSATIONS = 500  # of each family, shared equally by the kinds that its template renders
OWN = "its own"
FAMILIES = (  # name, tokenizer, template: its own, one of TRL's, or that of a repository
    ("Qwen2.5", "qwen2_5", OWN),
    ("Qwen3", "qwen3", OWN),
    ("Qwen3-Instruct-2507", "qwen3", "qwen3_instruct_2507"),
    ("Qwen3.5", "qwen3", "qwen3_5_think"),
    ("Llama 3", "llama3", "llama3"),
    ("Llama 3.1", "llama3_1", "llama3_1"),
    ("Llama 3.2", "llama3_2", OWN),
    ("Gemma 3", "gemma3", OWN),
    ("Mistral Nemo", "mistral_nemo", OWN),
    ("Mistral Small 3.1", "mistral_nemo", "mistralai/Mistral-Small-3.1-24B-Instruct-2503"),
    ("Phi-3", "llama3", "phi3"),
    ("Phi-4", "qwen3", "microsoft/phi-4"),
    ("SmolLM2", "qwen2_5", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ("SmolLM3", "llama3_2", "HuggingFaceTB/SmolLM3-3B"),
    ("DeepSeek-V3", "deepseek_v3", OWN),
    ("DeepSeek-V3.1", "deepseek_v3", "deepseek-ai-DeepSeek-V3.1"),
    ("gpt-oss", "qwen3", "gptoss"),
    ("GLM-4.5", "qwen3", "glm4moe"),
    ("OLMo 3", "qwen3", "allenai/Olmo-3-7B-Instruct"),
    ("Granite 4", "qwen2_5", "ibm-granite-granite-4.0"),
    ("Command R (Cohere)", "qwen3", "cohere"),
    ("LFM2", "qwen3", "lfm2"),
)
ROWS_EXPLAINED = {  # why rows differ, by family
    "gpt-oss": (
        "The template ends tool calls with another token than other responses, and a call that "
        "quotes the usual stop token seems to end there by prefixes."
    ),
}
COUNTED = (  # over the training rows of a family, which has none if its template has no stop
    *("rows", "responses", "tokens", "supervised", "straddling", "other_prompts"),
    *("judged_by_both", "rows_that_differ"),
)
STRIPPING = ("phi3",)  # templates whose published tokens swallow the whitespace that follows


@dataclass
class Counts:
    """What is counted over the conversations of a family."""

    statuses: Counter = field(default_factory=Counter)
    tokens: Counter = field(default_factory=Counter)  # by COUNTED
    trl: Counter = field(default_factory=Counter)
    beyond: Counter = field(default_factory=Counter)  # by the text of what TRL trains
    differences: list[dict[str, Any]] = field(default_factory=list)


def survey_tokens(templates: dict[str, str]) -> Iterator[dict[str, Any]]:
    """One record per family; `templates` by the name of a repository. Raises ValueError."""
    templates = templates | template.trl_templates()
    loaded = {}
    for name, source, text in FAMILIES:
        if source not in loaded:
            folder = npm_tokenizers.tokenizer_folder(source)
            loaded[source] = AutoTokenizer.from_pretrained(folder)
        tokenizer = copy.deepcopy(loaded[source])
        if text != OWN:
            add_markers(tokenizer, templates[text], text in STRIPPING)
        found = survey_family(tokenizer)
        if found["rows_that_differ"]:
            found["explanation"] = ROWS_EXPLAINED.get(name, "not explained")
        yield {"family": name, "tokenizer": source, "template": text} | found


def add_markers(tokenizer: PreTrainedTokenizerBase, text: str, rstrip: bool) -> None:
    """Give `tokenizer` another template, and the template's markers as special tokens."""
    bos, eos = StandIn.special_tokens_map.values()
    markers = [marker for marker in StandIn(text).markers if marker not in (bos, eos)]
    tokens = [AddedToken(marker, special=True, rstrip=rstrip) for marker in markers]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.chat_template = text


def survey_family(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    chat_template, counts = ChatTemplate(tokenizer), Counts()
    auditor = Auditor(chat_template, load_config("sft_qwen05b"), "survey")
    judge = Judge(chat_template)
    shapes = judge.shapes()
    for number, (kind, shape) in enumerate(shapes.items()):
        count = (CONVERSATIONS + number) // len(shapes)
        for verdict in judge.verdicts(kind, count, shape):
            counts.statuses[verdict.status] += 1
            compare(verdict, auditor, counts)
    trl = {**counts.trl, "beyond": dict(counts.beyond.most_common(5))}
    return {
        "kinds": list(shapes),
        "stop": chat_template.ending.stop,
        "eos": tokenizer.eos_token,
        "conversations": counts.statuses.total(),
        "statuses": dict(counts.statuses),
        **{name: counts.tokens[name] for name in COUNTED},
        "differences": counts.differences[:5],
        "trl": trl if auditor.trl_template else None,
    }


def compare(verdict: Verdict, auditor: Auditor, counts: Counts) -> None:
    """Count the tokens of a conversation's rows, and those that two methods disagree on."""
    rows = tokenise(auditor.template, verdict.rows)
    for row, opinion in zip(rows, verdict.opinions, strict=True):
        by_prefixes, masks = row.prefixes(), auditor.references(row, opinion)
        wrong = np.flatnonzero(masks.get("sentinels", by_prefixes) != by_prefixes)
        counts.tokens.update(
            rows=1,
            responses=len(row.ranges),
            tokens=len(row.ids),
            supervised=int(by_prefixes.sum()),
            straddling=row.straddling(),
            other_prompts=other_prompts(row, auditor.template.tokenizer),
            judged_by_both=int("sentinels" in masks),
            rows_that_differ=int(wrong.size > 0),
        )
        if wrong.size:
            tokens = [auditor.decode(row.ids[at]) for at in wrong]
            counts.differences.append({"text": row.row.text[-300:], "tokens": tokens[:8]})
        if auditor.trl_template and len(verdict.rows) == 1:
            compare_with_trl(row, auditor, counts)


def other_prompts(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> int:
    """Responses that do not begin where the ids of their whole prompt end to equal the row's."""
    wrong = 0
    for (first, _), (start, _) in zip(row.ranges, row.row.spans.values(), strict=True):
        prompt = tokenizer(row.row.text[:start], add_special_tokens=False)["input_ids"]
        pairs = enumerate(zip(prompt, row.ids, strict=False))
        common = next((at for at, (a, b) in pairs if a != b), min(len(prompt), len(row.ids)))
        wrong += common != first
    return wrong


def compare_with_trl(row: TokenRow, auditor: Auditor, counts: Counts) -> None:
    """Count the tokens that TRL's markers train beyond the responses of a whole conversation."""
    trained, wanted = auditor.trl_mask(row), row.prefixes()
    if not trained.any():
        counts.trl["rows_with_another_text"] += 1
        return
    beyond = np.flatnonzero(trained & ~wanted)
    counts.trl.update(
        rows=1,
        responses=len(row.ranges),
        tokens_beyond=len(beyond),
        tokens_missing=int((wanted & ~trained).sum()),
    )
    counts.beyond.update(auditor.decode(row.ids[at]) for at in beyond)
