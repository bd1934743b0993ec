"""The two kinds of model that are trained: GenRec's encoder-decoder, and a causal language model
that reads titles."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from genrec_dist.config.recipe import Recipe
from genrec_dist.data.batch import ModelInputs
from genrec_dist.model.build import CodedConfig, CodedModel
from genrec_dist.model.causal.config import PromptedConfig
from genrec_dist.model.causal.prompted import PromptedModel, blank_prompted
from genrec_dist.model.genrec import choose_attention, choose_layers, choose_loss
from genrec_dist.model.head_loss import summed_loss


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name; without those that adapters leave as they are."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


AnyModel = CodedModel | PromptedModel
AnyConfig = CodedConfig | PromptedConfig


def set_up(model: AnyModel, recipe: Recipe) -> None:
    """Set how a model on its device trains, as the recipe and the device have it."""
    choose_loss(model, recipe.head)
    if isinstance(model, PromptedModel):
        if recipe.activation_checkpointing:
            model.recompute_layers()
        return
    choose_attention(model, recipe.precision)
    choose_layers(model, recipe.compile == "layers", recipe.activation_checkpointing)


def loss_of_targets(model: AnyModel, inputs: ModelInputs) -> Tensor:
    """The summed cross-entropy of the decoder's labels alone, of padded inputs."""
    if isinstance(model, PromptedModel) or model.siblings is None:
        return summed_loss(*model.target_logits(inputs))
    assert inputs.children is not None
    hidden_nD, _ = model.target_states(model.encode(inputs.encoder), inputs)
    return model.siblings.loss(hidden_nD, inputs.children, model.output_rows())


def empty_copy(model: AnyModel, recipe: Recipe, device: torch.device) -> AnyModel:
    """A model of the same form on a device, for decoding; its parameters have no values yet."""
    copy: AnyModel
    if isinstance(model, PromptedModel):
        copy = blank_prompted(model)
    else:
        with torch.device("meta"):
            copy = type(model)(model.config)
            copy.item_text = None if model.item_text is None else model.item_text.like()
        if model.siblings is not None:
            copy.siblings = deepcopy(model.siblings).to("meta")
    copy.to_empty(device=device)
    copy.tie_weights()
    buffers = zip(copy.named_buffers(), model.named_buffers(), strict=True)
    for (_, ours), (_, theirs) in buffers:
        ours.copy_(theirs)
    if not isinstance(copy, PromptedModel):
        choose_attention(copy, recipe.precision)
    return copy.eval()
