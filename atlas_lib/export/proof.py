"""Compare an exported model with the evaluated one: prompts, token ids, greedy tokens, stops."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlas_lib import models
from atlas_lib.devices import Device
from atlas_lib.evaluate import checkers, decoding, significance
from atlas_lib.export import gguf_file, llama_cpp
from atlas_lib.schema import Config

CHATS, PROMPTS, SCORED, CAP = 200, 20, 40, 64  # SCORED: prompts if a quantised file is scored
KEPT = 5  # likeliest tokens of a step that are remembered
# Two greedy tokens are tied if the evaluated model's log p of them differ by less than this. For
# the same tokens, llama.cpp's log p (weights and cache in float16) and transformers' differed by at
# most 0.005 in float32, 0.008 in float16 and 0.042 in bfloat16 on the trained tiny model, and by
# 0.012 in float32 on SmolLM2-135M, where the one tie had a gap of 0.007.
TIE = {"float32": 0.05, "float16": 0.05, "bfloat16": 0.2}
PIECES = ("hello", "wörld", "日本", "😀", "ß", " ", "  ", "\n", "\t", "\n\n", "12345")
PIECES += (
    "it's",
    "{{ x }}",
    "<tag>",
    '"quoted"',
    "a_b",
    "...",
    "émigré",
    "\u00a0",
    "العربية",
    "don't",
    "`code`",
)


def random_chats(count: int = CHATS) -> list[list[dict]]:
    """Chats that end with a user's turn: system turn or none, unicode, whitespace."""
    drawn, chats = random.Random(0), []
    for _ in range(count):
        roles = ["system"] * (drawn.random() < 0.5)
        roles += ["user", "assistant"] * drawn.randint(0, 3) + ["user"]
        texts = ["".join(drawn.choices(PIECES, k=drawn.randint(0, 8))) for _ in roles]
        chats.append([{"role": r, "content": text} for r, text in zip(roles, texts, strict=True)])
    return chats


@dataclass(frozen=True)
class Reference:
    """What the evaluated model and the training's chat template give."""

    tokenizer: Any
    device: Device
    chats: list[list[dict]]
    texts: list[str]  # of the chats, by the training template
    text_ids: list[list[int]]
    asked: list[dict]  # dev prompts, in IFEval's schema
    prompts: list[str]  # rendered
    prompt_ids: list[list[int]]
    tokens: list[list[int]]  # greedy, with the stop
    best: list[list[dict[int, float]]]  # for each token, the KEPT likeliest and their log p
    stops: list[int]


def observe(
    model: Any, tokenizer: Any, training_template: str, asked: list[dict], device: Device
) -> Reference:
    """Render chats, and decode greedily from prompts, with the evaluated model."""
    chats = random_chats()
    options = {"tokenize": False, "add_generation_prompt": True}
    texts = [
        tokenizer.apply_chat_template(chat, chat_template=training_template, **options)
        for chat in chats
    ]
    single = [[{"role": "user", "content": each["prompt"]}] for each in asked]
    rendered = [tokenizer.apply_chat_template(chat, **options) for chat in single]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    stops = models.stop_ids(tokenizer, model)
    tokens = decode_greedily(model, ids, stops)
    return Reference(
        tokenizer=tokenizer,
        device=device,
        chats=chats,
        texts=texts,
        text_ids=tokenizer(texts, add_special_tokens=False)["input_ids"],
        asked=asked,
        prompts=rendered,
        prompt_ids=ids,
        tokens=tokens,
        best=[_likeliest(model, *pair) for pair in zip(ids, tokens, strict=True)],
        stops=stops,
    )


def decode_greedily(model: Any, ids: list[list[int]], stops: list[int]) -> list[list[int]]:
    """The new tokens of each prompt, as the evaluation decodes them."""
    import torch

    with torch.inference_mode():
        found = dict(decoding.decode(model.eval(), ids, stops, CAP, None))
    return [found[number] for number in range(len(ids))]


def _likeliest(model: Any, prompt: list[int], new: list[int]) -> list[dict[int, float]]:
    """For each new token, the KEPT likeliest tokens in its place and their log p."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([prompt + new[:-1]], device=model.device)
        logits = model(input_ids=ids, logits_to_keep=len(new)).logits[0].float()
        best = logits.log_softmax(-1).topk(KEPT)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [dict(zip(*pair, strict=True)) for pair in pairs]


def compare_texts(expected: Sequence, render: Callable[[Any], Any], given: Sequence) -> dict:
    """{"equal", "of", "first difference"} of what `render` gives for each of `given`."""
    first, equal = None, 0
    for wanted, item in zip(expected, given, strict=True):
        found = render(item)
        equal += found == wanted
        if found != wanted and first is None:
            at = next((i for i, pair in enumerate(zip(wanted, found, strict=False))
                       if pair[0] != pair[1]), min(len(wanted), len(found)))  # fmt: skip
            first = {"at": at, "expected": wanted[at : at + 40], "found": found[at : at + 40]}
    return {"equal": equal, "of": len(expected), "first_difference": first}


def compare_tokens(reference: Reference, found: list[list[int]], tie: float | None) -> dict:
    """Greedy tokens beside the evaluated model's: equal prompts, share of tokens, differences.

    A difference is a tie if the evaluated model's own log p of the two tokens are less than `tie`
    apart. Everything after it is conditioned on another text, and not compared. `tie` is None for
    a quantised file, whose differences are counted and not judged.
    """
    differences, same, total = [], 0, 0
    for number, (wanted, tokens) in enumerate(zip(reference.tokens, found, strict=True)):
        longest = max(len(wanted), len(tokens))
        pairs = [wanted[i : i + 1] == tokens[i : i + 1] for i in range(longest)]
        at = pairs.index(False) if False in pairs else None
        same, total = same + (longest if at is None else at), total + longest
        if at is not None:
            differences.append(_difference(reference, number, at, tokens, tie))
    return {
        "equal": len(found) - len(differences),
        "of": len(found),
        "share_of_tokens": same / total,
        "ties": sum(each["tie"] for each in differences),
        "tie_below": tie,
        "first_difference": min(differences, key=lambda found: found["tie"], default=None),
        "stops": sum(tokens[-1] in reference.stops for tokens in found),
        "stops_expected": sum(tokens[-1] in reference.stops for tokens in reference.tokens),
    }


def _difference(
    reference: Reference, number: int, at: int, tokens: list[int], tie: float | None
) -> dict:
    """A prompt's first differing token; "gap" is a lower bound for a token that was not likely."""
    wanted, token = (
        ids[at] if at < len(ids) else None for ids in (reference.tokens[number], tokens)
    )
    gap, known = None, wanted is not None and token in reference.best[number][at]
    if wanted is not None:
        step = reference.best[number][at]
        gap = step[wanted] - step.get(token, min(step.values()))
    tied = known and gap < (tie or 0)
    return {"prompt": number, "at": at, "expected": wanted, "found": token, "gap": gap, "tie": tied}


def prove_merged(folder: Path, reference: Reference) -> dict[str, Any]:
    """The proof of a merged folder, loaded and decoded by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = reference.device
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, device.dtype), device_map={"": device.name}
    )

    def render(chat: list[dict]) -> str:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    tie = TIE[device.dtype]
    return {
        "by": "transformers",
        "stop_ids": [model.generation_config.eos_token_id, reference.stops],
        "prompts": compare_texts(reference.texts, render, reference.chats),
        "token_ids": compare_texts(
            reference.text_ids,
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            reference.texts,
        ),
        "greedy": compare_tokens(reference, _generate(model, tokenizer, reference), tie),
    }


def _generate(model: Any, tokenizer: Any, reference: Reference) -> list[list[int]]:
    """The new tokens of each prompt by `model.generate`, which stops as the folder's files say."""
    batch = tokenizer.pad(
        {"input_ids": reference.prompt_ids}, padding_side="left", return_tensors="pt"
    ).to(model.device)
    new = model.generate(**batch, max_new_tokens=CAP, do_sample=False)
    new = new[:, batch["input_ids"].shape[1] :].tolist()
    ends = [
        next((i + 1 for i, token in enumerate(ids) if token in reference.stops), None)
        for ids in new
    ]
    return [ids[:end] for ids, end in zip(new, ends, strict=True)]


def prove_gguf(file: Path, kind: str, reference: Reference, config: Config) -> dict[str, Any]:
    """The proof of a GGUF file by llama.cpp; {"by": None} if it is not installed.

    Raises ValueError if llama.cpp cannot load the file or render its chat template.
    """
    if not llama_cpp.is_installed():
        return {"by": None}
    server = llama_cpp.LlamaServer(file, max(map(len, reference.prompt_ids)) + CAP)
    found = [server.complete(prompt, CAP) for prompt in reference.prompts]
    tokens = [each["tokens"] for each in found]
    tie = TIE[reference.device.dtype] if kind == "f16" else None
    return {
        "by": "llama.cpp of xllamacpp",
        "stop_ids": [gguf_file.stop_in(file), reference.stops[0]],
        "prompts": compare_texts(reference.texts, server.render, reference.chats),
        "token_ids": compare_texts(reference.text_ids, server.tokenize, reference.texts),
        "greedy": compare_tokens(reference, tokens, tie),
        "log_p_difference": _log_p_difference(reference, found),
    } | ({} if tie else {"score": compare_scores(reference, tokens, config)})


def _log_p_difference(reference: Reference, found: list[dict]) -> float:
    """The largest difference in log p of a token, where the tokens before it are the same."""
    worst = 0.0
    for wanted, best, each in zip(reference.tokens, reference.best, found, strict=True):
        for token, likeliest, got, logprob in zip(
            wanted, best, each["tokens"], each["logprobs"], strict=False
        ):
            if token != got:
                break
            if logprob is not None:
                worst = max(worst, abs(likeliest[token] - logprob))
    return worst


def compare_scores(reference: Reference, tokens: list[list[int]], config: Config) -> dict[str, Any]:
    """Verdicts on responses cut at CAP tokens: the evaluated model's beside the file's, paired."""

    def text(ids: list[int]) -> str:
        return decoding.cut_at_stop(reference.tokenizer, ids, reference.stops)["response"]

    both = [
        checkers.score(reference.asked, list(map(text, responses)))
        for responses in (reference.tokens, tokens)
    ]
    found = significance.paired(*both)
    verdict = significance.verdict(
        found, found["mcnemar_p"], config.eval.alpha, config.eval.clear_margin
    )
    passed = [sum(each["prompt_strict"] for each in verdicts) for verdicts in both]
    kept = ("only_a", "only_b", "mcnemar_p", "difference_points", "difference_ci95")
    return (
        {"n": len(tokens), "unquantised": passed[0], "quantised": passed[1]}
        | {key: found[key] for key in kept}
        | {"verdict": verdict}
    )


def failures(record: dict[str, Any]) -> Iterator[str]:
    """What keeps a record from being a proof, as sentences."""
    if record["by"] is None:
        yield f"not proved, as llama.cpp is not installed: `{llama_cpp.INSTALL}`, then export again"
        return
    for name in ("prompts", "token_ids"):
        if first := record[name]["first_difference"]:
            yield f"{name.replace('_', ' ')} differ from the training's, first as {first}"
    if record["stop_ids"][0] != record["stop_ids"][1]:
        yield "the file names the stop ids {}, the evaluated model {}".format(*record["stop_ids"])
    first = record.get("before_quantising", record["greedy"])["first_difference"]
    if first and not first["tie"]:
        yield f"greedy tokens differ from the evaluated model's, first as {first}"
    if not record["greedy"]["stops"]:
        yield "no response ends with a stop token"
    if record.get("score", {}).get("verdict") == "worse":
        yield "the quantised model follows fewer instructions than the evaluated one"


def summary_lines(record: dict[str, Any]) -> list[str]:
    """The record in lines."""
    lines = [f"compared by {record['by']}"] if record["by"] else []
    if greedy := record.get("greedy"):
        for name in ("prompts", "token_ids", "modelfile"):
            if found := record.get(name):
                lines.append(f"{name}: {found['equal']} of {found['of']} chats equal")
        lines.append(
            f"greedy: {greedy['equal']} of {greedy['of']} responses equal, {greedy['ties']} more "
            f"by ties, {greedy['share_of_tokens']:.1%} of the tokens; {greedy['stops']} stop"
        )
    if score := record.get("score"):
        lines.append(
            f"IFEval-style, {score['n']} dev prompts cut at {CAP} tokens: {score['quantised']} "
            f"followed, unquantised {score['unquantised']}: {score['verdict']}"
        )
    return lines + record["failures"]
