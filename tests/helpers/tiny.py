"""The tiny log and the tiny recipe that most tests train on."""

import random

NUM_USERS, NUM_ITEMS = 120, 64

TINY_RECIPE = """
workers: 0
log_every: 1
micro_batch_tokens: 2048
model: {d_model: 16, encoder_layers: 1, decoder_layers: 1, heads: 2, ffn: 32, max_tokens: 64, init_std: 0.3}
tokens: {vocab_size: 285}
pretrain: {epochs: 1, batch_size: 40}
finetune: {epochs: 1, batch_size: 40, learning_rate: 3.0e-3}
validation: {users: 50, patience: 0}
"""


def tiny_log() -> str:
    """120 users of 4 to 24 of 64 items, none twice; ids that are no numbers, so that a row cannot
    pass for an id."""
    dice = random.Random(7)
    items = [f"B{dice.randrange(10**6):06d}" for _ in range(NUM_ITEMS)]
    lines = [
        " ".join([f"user-{n}", *dice.sample(items, dice.randint(4, 24))])
        for n in range(NUM_USERS - 1)
    ]
    return "\n".join([*lines, " ".join([f"user-{NUM_USERS - 1}", *items])]) + "\n"
