"""Greedy decoding in batches, cut at the first stop id before the text is decoded."""

from typing import Any

from atlas_lib import model as models
from atlas_lib import progress


def encode(tokenizer: Any, prompt: str, form: str) -> list[int]:
    """Prompt ids: "raw" is the bare text, "chat" one user turn and the assistant's header."""
    if form == "raw":
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    form: str,
    max_new_tokens: int,
    batch_size: int,
) -> list[dict]:
    """One {response, n_tokens, stop} a prompt; `stop` is the stop token, or None at the cap."""
    import torch
    from transformers import GenerationConfig

    stop_ids = models.stop_ids(tokenizer)
    encoded = [encode(tokenizer, prompt, form) for prompt in prompts]
    answers: list[dict] = []
    model.eval()
    # Plain greedy: a model's own generation_config may bring sampling or a repetition penalty.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id
    )
    for first in progress.track(range(0, len(encoded), batch_size), f"generating ({form})"):
        batch = encoded[first : first + batch_size]
        padded = tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt")
        padded = padded.to(model.device)
        with torch.inference_mode():
            output = model.generate(**padded, max_new_tokens=max_new_tokens)
        new = output[:, padded["input_ids"].shape[1] :].tolist()
        answers += [cut_at_stop(tokenizer, ids, stop_ids) for ids in new]
    return answers


def cut_at_stop(tokenizer: Any, ids: list[int], stop_ids: list[int]) -> dict:
    """Text before the first stop id: cut first, so that nothing after it leaks into the answer."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    kept = ids if end is None else ids[:end]
    return {
        "response": tokenizer.decode(kept, skip_special_tokens=True),
        "n_tokens": len(kept),
        "stop": None if end is None else tokenizer.convert_ids_to_tokens(ids[end]),
    }


def diagnose(answers: list[dict]) -> dict[str, float]:
    """What confounds a comparison: shares at the cap, stopped, empty; mean tokens; variety."""
    n = len(answers)
    return {
        "at_cap": sum(a["stop"] is None for a in answers) / n,
        "stop_rate": sum(a["stop"] == models.END_OF_TURN for a in answers) / n,
        "empty": sum(not a["response"].strip() for a in answers) / n,
        "mean_length": sum(a["n_tokens"] for a in answers) / n,
        "distinct": len({a["response"] for a in answers}),
    }
