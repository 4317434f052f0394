"""The overrides with which a whole pipeline takes a minute."""

# Small enough to run the whole pipeline in a minute; it learns nothing, and is not meant to.
TINY = {
    "offline.pretrain_steps": 20,
    "data.n_samples": 64,
    "data.n_validation": 16,
    "train.num_train_epochs": 1,
    "eval.benchmarks": ["ifeval"],
    "eval.limit": 12,
    "eval.max_new_tokens": 24,
}
