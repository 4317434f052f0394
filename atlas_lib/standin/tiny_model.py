"""The tiny model of the offline overlay, its tokenizer and its data: local folders, built by name.

A Qwen2 of half a million parameters that shows that the code works and says nothing about Qwen.
Every part is built once and then loaded by path, through the same calls as files from the hub.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atlas_lib import progress, template
from atlas_lib.schema import Config
from atlas_lib.standin import corpus

STOP, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # in Qwen's order of ids
# How Qwen2 splits text before BPE merges (Qwen/Qwen2.5-0.5B, tokenizer.json, pre_tokenizer).
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SUMS = "sha256.json"  # in each built folder
TEXT_KEYS = ("corpus_seed", "taught", "n_texts", "vocab_size")
# Part -> the keys of the section `offline` that decide it; the base also depends on `seed`.
PARTS = {
    "ultrachat": ("corpus_seed", "taught", "n_conversations"),
    "ifeval": ("corpus_seed", "taught", "n_prompts_per_type"),
    "dev": ("corpus_seed", "taught", "n_dev_prompts_per_type"),
    "tokenizer": TEXT_KEYS,
    "base": (
        *TEXT_KEYS, "texts_per_document", "hidden_size", "num_layers", "pretrain_steps",
        "pretrain_batch", "pretrain_length", "pretrain_learning_rate",
    ),
}  # fmt: skip


def made_from(part: str, config: Config) -> dict[str, Any]:
    """What determines a part: its config keys and this code. Raises ValueError."""
    if part not in PARTS:
        known = ", ".join(f"embedded:{name}" for name in PARTS)
        raise ValueError(f"'embedded:{part}' does not exist; there are {known}.")
    values = {f"offline.{key}": getattr(config.offline, key) for key in PARTS[part]}
    values |= {"seed": config.seed} if part == "base" else {}
    code = hashlib.sha256()
    for source in (Path(__file__), Path(corpus.__file__), corpus.WORDS):
        code.update(source.read_bytes())
    return values | {"content of the tiny model's code": code.hexdigest()[:12]}


def build(part: str, config: Config) -> Path:
    """The folder of a part in the user's cache, built if absent; the base takes half a minute.

    A folder appears complete or not at all, even if two processes build it or one is killed. One
    that was damaged later is built again.
    """
    import filelock
    import platformdirs

    text = json.dumps(made_from(part, config), sort_keys=True)
    name = f"tiny-{part}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    target = Path(platformdirs.user_cache_dir("atlas")) / name
    if is_intact(target):
        return target
    scratch = target.parent / ".tiny"
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.parent / "tiny.lock"):
        shutil.rmtree(scratch, ignore_errors=True)  # of a killed process
        if not is_intact(target):
            print(f"Building embedded:{part} in {target}", flush=True)
            _write(part, scratch, config)
            (scratch / SUMS).write_text(json.dumps(checksums(scratch)), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)
    return target


def is_intact(folder: Path) -> bool:
    """Whether a built part still has the files that were written."""
    try:
        return json.loads((folder / SUMS).read_bytes()) == checksums(folder)
    except (OSError, ValueError):
        return False


def checksums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, of all files but SUMS."""
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _write(part: str, target: Path, config: Config) -> None:
    options = config.offline
    seed, taught = options.corpus_seed, options.taught
    if part == "ultrachat":
        rows = corpus.conversations(seed, options.n_conversations, taught)
        write_dataset(target, "train_sft", rows, config.label)
    elif part == "ifeval":
        rows = corpus.prompts(seed, "prompts", *options.n_prompts_per_type, taught)
        write_dataset(target, "train", rows, config.label)
    elif part == "dev":
        rows = corpus.prompts(seed, "dev", *options.n_dev_prompts_per_type, taught)
        write_dataset(target, "train", rows, config.label)
    else:
        texts = corpus.plain_text(seed, options.n_texts, taught)
        tokenizer = train_tokenizer(texts, options.vocab_size)
        tokenizer.save_pretrained(target)  # as on the hub, the weights have one of their own
        if part == "base":
            pretrain(tokenizer, texts, config).save_pretrained(target)


def write_dataset(target: Path, split: str, rows: list[dict], label: str) -> None:
    """Rows as JSON lines, and the card that tells `datasets` which file is which split."""
    target.mkdir(parents=True)
    shipped = [{k: v for k, v in row.items() if k not in ("answer", "turns")} for row in rows]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shipped)
    (target / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    # `datasets` caches a local folder by its name and this config_name, never by its content.
    config_name = hashlib.sha256(lines.encode()).hexdigest()[:12]
    data_files = [{"split": split, "path": f"{split}.jsonl"}]
    card = json.dumps({"configs": [{"config_name": config_name, "data_files": data_files}]})
    (target / "README.md").write_text(f"---\n{card}\n---\n\n{label}\n", encoding="utf-8")


def train_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE cut as Qwen's, with its three special tokens and chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    alphabet, specials = pre_tokenizers.ByteLevel.alphabet(), [STOP, TURN_START, TURN_END]
    size, chat_template = vocab_size - len(specials), template.read_template("qwen2_5")
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*texts, chat_template], trainer)  # it holds the system prompt
    bpe.add_special_tokens(specials)  # after the merges, as in Qwen: the highest ids
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=TURN_END, pad_token=STOP, model_max_length=1024,
        extra_special_tokens=[TURN_START, TURN_END],
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    return tokenizer


def new_model(tokenizer, options):
    """An untrained Qwen2ForCausalLM; as any base, it knows <|endoftext|> and no turns."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    stop = tokenizer.convert_tokens_to_ids(STOP)
    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=stop,
        eos_token_id=stop,
    )
    return Qwen2ForCausalLM(shape)


def windows(tokenizer, texts: list[str], options, seed: int) -> Iterator:
    """Random batches (pretrain_batch, pretrain_length) of token ids; each row begins with a text.

    A text is followed by the next: only one in texts_per_document ends with <|endoftext|>, and none
    holds a chat token, so that the base does not learn to stop after an answer.
    """
    import torch

    encoded = tokenizer(texts)["input_ids"]
    for ids in encoded[:: options.texts_per_document]:
        ids.append(tokenizer.convert_tokens_to_ids(STOP))
    stream = torch.tensor([token for ids in encoded for token in ids])
    starts = torch.tensor([0, *(len(ids) for ids in encoded)]).cumsum(0)
    starts = starts[starts <= len(stream) - options.pretrain_length]
    generator = torch.Generator().manual_seed(seed)
    while True:
        picked = torch.randint(len(starts), (options.pretrain_batch, 1), generator=generator)
        yield stream[starts[picked] + torch.arange(options.pretrain_length)]


def pretrain(tokenizer, texts: list[str], config):
    """A model after pretrain_steps of next-token prediction on the texts, decided by the seed."""
    import torch

    options = config.offline
    with torch.random.fork_rng(devices=[]):  # the caller's own random state stays as it was
        torch.manual_seed(config.seed)
        model = new_model(tokenizer, options)
    rate, steps = options.pretrain_learning_rate, options.pretrain_steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    batches = windows(tokenizer, texts, options, config.seed)
    for _ in progress.track(range(steps), "pretraining the tiny model"):
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()
