"""A data directory whose items have titles, and a small recipe with a prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from genrec_shards.prepare import prepare
from genrec_shards.sequences import write_sequences
from genrec_shards.storage.write import write_shards
from genrec_shards.synthetic import make_process

from genrec_dist.bench.titles import WORDS

RECIPE = """
data: {data}
run: {run}
micro_batch_tokens: 512
workers: 0
log_every: 1
checkpoint_every: 3
keep_checkpoints: 99
model: {{d_model: 16, decoder_layers: 2, heads: 2, ffn: 32, max_tokens: 96, init_std: 0.1}}
tokens: {{vocab_size: 320}}
prompt: {{template: "Seen:\\n{{history}}\\nNext:\\n", max_titles: 5}}
pretrain: {{epochs: 0}}
finetune: {{epochs: 2, batch_size: 16, learning_rate: 1.0e-2, targets: all-prefixes}}
optimizer: {{max_grad_norm: 1.0, eps: 1.0e-4}}
validation: {{users: 30}}
"""
# `eps`: AdamW would blow rounding up where gradients are almost zero.


def titled_data(folder: Path, num_users: int = 90) -> Path:
    """`folder/data` with its shards: users of 5 to 9 of 64 items whose order can be learned;
    some titles are equal."""
    write_sequences(
        make_process(num_items=64, num_groups=8).sample(num_users, 5, 9), folder / "log.txt"
    )
    dice = np.random.default_rng(3)
    ids = sorted(
        {
            item
            for line in (folder / "log.txt").read_text().splitlines()
            for item in line.split()[1:]
        }
    )
    titles = [" ".join(dice.choice(WORDS, dice.integers(1, 4))) for _ in ids]
    titles[5] = titles[4]
    rows = [f"{item},{title}" for item, title in zip(ids, titles, strict=True)]
    (folder / "items.csv").write_text("\n".join(["item,title", *rows]) + "\n", encoding="utf-8")
    dataset = prepare(folder / "log.txt", folder / "data", items=folder / "items.csv")
    write_shards(dataset, folder / "data" / "shards", users_per_shard=32, users_per_record=16)
    return folder / "data"
