"""The rivals of `genrec bench train`: Hugging Face's Trainer and the published collate."""

# B samples, L input tokens, T target tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments

from genrec_dist.data.batch import IGNORED, Batch
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.model.network import POSITION_OFFSET, attention_bias

INPUTS = ("input_ids", "position_ids", "user_rows", "item_rows")
Sample = dict[str, Any]
"""Lists `input_ids`, `position_ids`, `user_rows`, `item_rows`, `labels`, `start` (the decoder's
first token) of one sample; for the tokenizing collate also the strings `text` and `target`."""


class PlainGenRec(nn.Module):
    """The same weights as Hugging Face would run them: padded, eager or compiled, with the logits
    of every target place."""

    def __init__(self, model: GenRecForConditionalGeneration):
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        user_rows: Tensor,
        item_rows: Tensor,
        decoder_input_ids: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """`{"loss": mean cross-entropy of the labels}`."""
        bart = self.model.model.encoder
        users, items = self.model.user_embedding, self.model.item_embedding
        assert isinstance(users, nn.Embedding)
        assert isinstance(items, nn.Embedding)
        # Spelled out, for torch.compile to fuse.
        hidden_BLD = F.embedding(input_ids, bart.embed_tokens.weight)
        positions_BL = position_ids + POSITION_OFFSET
        hidden_BLD = hidden_BLD + F.embedding(positions_BL, bart.embed_positions.weight)
        hidden_BLD = hidden_BLD + F.embedding(user_rows, users.weight, padding_idx=0)
        hidden_BLD = hidden_BLD + F.embedding(item_rows, items.weight, padding_idx=0)
        hidden_BLD = F.dropout(bart.layernorm_embedding(hidden_BLD), bart.dropout, self.training)
        bias = attention_bias(attention_mask[:, None, None], hidden_BLD)
        for layer in bart.layers:
            hidden_BLD = layer(hidden_BLD, bias)
        states_BTD = self.model.decode(decoder_input_ids, hidden_BLD, attention_mask)
        logits_nV = F.linear(states_BTD, self.model.head_weight).flatten(0, 1).float()
        summed = F.cross_entropy(logits_nV, labels.flatten(), ignore_index=IGNORED, reduction="sum")
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": summed / count}


def pad_samples(samples: Sequence[Sample], pad_token: int, multiple: int = 1) -> dict[str, Tensor]:
    """What a collator gives the model: samples side by side, padded to the longest or to the next
    multiple."""
    longest = -(-max(len(sample["input_ids"]) for sample in samples) // multiple) * multiple

    def side_by_side(name: str, fill: int, length: int = 0) -> Tensor:
        rows = [torch.tensor(sample[name]) for sample in samples]
        padded = pad_sequence(rows, batch_first=True, padding_value=fill)
        return F.pad(padded, (0, max(0, length - padded.shape[1])), value=fill)

    labels_BT, start_B1 = side_by_side("labels", IGNORED), side_by_side("start", pad_token)
    before_BT = labels_BT[:, :-1].masked_fill(labels_BT[:, :-1] == IGNORED, pad_token)
    inputs = {
        name: side_by_side(name, pad_token if name == "input_ids" else 0, longest)
        for name in INPUTS
    }
    return {
        **inputs,
        "attention_mask": inputs["input_ids"] != pad_token,
        "labels": labels_BT,
        "decoder_input_ids": torch.cat([start_B1, before_BT], 1),
    }


def samples_of(batch: Batch) -> list[Sample]:
    """A padded batch as a list of samples, as a user would have stored them."""
    found: list[Sample] = []
    for row, length in enumerate(batch.encoder.attention_mask.sum(1).tolist()):
        sample = {name: getattr(batch.encoder, name)[row, :length].tolist() for name in INPUTS}
        sample["labels"] = batch.labels[row][batch.labels[row] != IGNORED].tolist()
        found.append({**sample, "start": batch.decoder_input_ids[row, :1].tolist()})
    return found


class TokenizingCollate:
    """Texts to padded arrays: the tokenizer is called anew for every batch, and the longest sample
    decides, as in the published code.

    The rows of users and items are taken as stored; the published code looks them up as well."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pad_token: int):
        self.tokenizer, self.pad_token = tokenizer, pad_token

    def with_texts(self, sample: Sample) -> Sample:
        """The sample with the texts of its history and of its target."""
        # <s> user items <mask> </s>, and item </s>.
        text = self.tokenizer.decode(sample["input_ids"][1:-2])
        return {**sample, "text": text, "target": self.tokenizer.decode(sample["labels"][:-1])}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        texts, targets = (
            self.tokenizer([sample[key] for sample in samples], add_special_tokens=False).input_ids
            for key in ("text", "target")
        )
        made = [
            {**sample, "input_ids": [bos, *text, *sample["start"], eos], "labels": [*target, eos]}
            for sample, text, target in zip(samples, texts, targets, strict=True)
        ]
        return pad_samples(made, self.pad_token)


class TrainerRival:
    """Seq2SeqTrainer's data loader, collation, sampler, `training_step`, clipping and optimizer, in
    the order of its loop.

    The loop itself is ours, so that rivals can take turns; its logging, callbacks and checkpoints
    are left out, in its favour."""

    def __init__(
        self,
        model: GenRecForConditionalGeneration,
        samples: Sequence[Sample],
        collate: Callable[[Sequence[Sample]], dict[str, Tensor]],
        settings: dict[str, Any],
    ):
        """`settings`: of Seq2SeqTrainingArguments."""
        arguments = Seq2SeqTrainingArguments(
            report_to=[],
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=0,
            use_cpu=not torch.cuda.is_available(),
            **settings,
        )
        data = {"data_collator": collate, "train_dataset": samples}
        self.trainer = Seq2SeqTrainer(PlainGenRec(model), arguments, **data)
        self.loader = self.trainer.get_train_dataloader()
        self.trainer.create_optimizer_and_scheduler(10_000)
        self.model = self.trainer.accelerator.prepare(self.trainer.model)
        self.trainer.optimizer = self.trainer.accelerator.prepare(self.trainer.optimizer)
        self.trainer.current_gradient_accumulation_steps = 1

    def train(self, num_steps: int) -> int:
        """Take so many steps of an epoch; returns the real tokens they held."""
        trainer, tokens = self.trainer, 0
        for inputs in islice(self.loader, num_steps):
            tokens += int(inputs["attention_mask"].sum()) + int((inputs["labels"] != IGNORED).sum())
            trainer.training_step(self.model, inputs)
            trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
            assert trainer.optimizer is not None
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
            self.model.zero_grad()
        return tokens

    def slots(self) -> int:
        """Encoder places of an epoch, padding included."""
        return sum(int(inputs["input_ids"].numel()) for inputs in self.loader)
