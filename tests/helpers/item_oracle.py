"""Brute force for the item head."""

from __future__ import annotations

import copy

import numpy as np
import torch
from beam_oracle import History, Word, World, sharp_model

from genrec_dist.model.genrec import GenRecForConditionalGeneration


def with_item_head(
    model: GenRecForConditionalGeneration, weight: float
) -> GenRecForConditionalGeneration:
    model = copy.deepcopy(model)
    model.config.item_loss = weight
    return model


def item_truth(world: World, histories: list[History]) -> np.ndarray:
    """float64 [B, N]: log p of the item head, user by user."""
    rows = []
    for row, history in enumerate(histories):
        encoder = world.encoder([history], users=[row % 6])
        with torch.inference_mode():
            state = world.model.encode(encoder)[0, -2]
            rows.append(
                (world.model.item_embedding.weight[1:] @ state)
                .log_softmax(0)
                .numpy()[: len(world.items)]
            )
    return np.stack(rows)


def item_world(items: list[Word], start: str = "mask") -> World:
    model = with_item_head(sharp_model(num_items=len(items)), 1.0)
    model.config.decoder_start = start
    return World(items, model)
