"""The embedded stand-in for the hub: a tiny Qwen2 base, its tokenizer, and three data sets.

It shows that the machinery works and says nothing about Qwen. Everything is built on the spot, once
a digest, and then loaded by path through the same calls that load the real things from the hub.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from atlas_lib import progress, template
from atlas_lib.standin import corpus

PREFIX = "embedded:"
NAMES = ("base", "tokenizer", "ultrachat", "ifeval", "dev")
STOP, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # in Qwen's order of ids
# How Qwen2 cuts text before BPE merges (Qwen/Qwen2.5-0.5B, tokenizer.json, pre_tokenizer).
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def resolve(name: str, config) -> str:
    """The local path of an `embedded:` name, built first if absent; any other name unchanged.

    Raises ValueError for an unknown embedded name.
    """
    if not name.startswith(PREFIX):
        return name
    part = name.removeprefix(PREFIX)
    if part not in NAMES:
        known = ", ".join(PREFIX + known for known in NAMES)
        raise ValueError(f"{name!r} is not part of the offline stand-in; it has {known}.")
    return str(folder(config) / part)


def digest(config) -> str:
    """12 hex digits over all that decides the stand-in: parameters, seed and sources."""
    parameters = {"seed": config.seed, **vars(config.offline)}
    sources = (Path(__file__), Path(corpus.__file__), Path(corpus.__file__).with_suffix(".yaml"))
    found = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode())
    for source in sources:
        found.update(source.read_bytes())
    return found.hexdigest()[:12]


def folder(config) -> Path:
    """The stand-in's folder. It appears whole or not at all, even if two build or one is killed."""
    import platformdirs

    target = Path(platformdirs.user_cache_dir("atlas")) / f"standin-{digest(config)}"
    if target.is_dir():
        return target
    print(f"Building the stand-in in {target} ({config.label})", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".standin-", dir=target.parent) as scratch:
        build(Path(scratch) / "standin", config)
        try:
            (Path(scratch) / "standin").rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first: its copy is as good
                raise
    return target


def build(target: Path, config) -> None:
    """Write all five parts below target."""
    options = config.offline
    seed, taught = options.corpus_seed, list(options.taught)
    conversations = corpus.conversations(seed, options.n_conversations, taught)
    write_dataset(target / "ultrachat", "train_sft", conversations, config.label)
    counts = {"prompts": options.n_prompts_per_type, "dev": options.n_dev_prompts_per_type}
    for name, split in {"ifeval": "prompts", "dev": "dev"}.items():
        rows = corpus.prompts(seed, split, *counts[split], taught)
        write_dataset(target / name, "train", rows, config.label)
    texts = corpus.plain_text(seed, options.n_texts, taught)
    tokenizer = train_tokenizer(texts, options.vocab_size)
    for name in ("tokenizer", "base"):  # as on the hub, the weights have a tokenizer of their own
        tokenizer.save_pretrained(target / name)
    pretrain(tokenizer, texts, config).save_pretrained(target / "base")


def write_dataset(target: Path, split: str, rows: list[dict], label: str) -> None:
    """Rows as JSON lines, and the card that tells `datasets` which file is which split."""
    target.mkdir(parents=True)
    shipped = [{k: v for k, v in row.items() if k not in ("answer", "turns")} for row in rows]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shipped)
    (target / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    # `datasets` caches a local folder by its name and this config_name, never by what is in it.
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
    size, chat_template = vocab_size - len(specials), template.shipped_template("qwen2_5")
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
    for _ in progress.track(range(steps), "pretraining the stand-in"):
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()
