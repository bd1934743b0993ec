"""What people train such a model with, as rivals of ours: Hugging Face's Trainer at two settings,
and the published collate."""

# B samples, L input tokens, T target tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments

from genrec_dist.data.batch import IGNORED
from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.model.genrec import POSITION_OFFSET, GenRecForConditionalGeneration, attention_bias

Sample = dict[str, list[int]]
"""`input_ids`, `position_ids`, `user_rows`, `item_rows`, `labels`, `start` (the decoder's first
token) of one sample."""


class PlainGenRec(nn.Module):
    """The same weights as Hugging Face would have them run: eager or compiled, padded, with the
    logits of every target place."""

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
        """{"loss": mean cross-entropy of the labels}. The embedding sum is spelt out, for
        torch.compile to fuse."""
        bart = self.model.model.encoder
        hidden_BLD = F.embedding(input_ids, bart.embed_tokens.weight)
        hidden_BLD = hidden_BLD + F.embedding(
            position_ids + POSITION_OFFSET, bart.embed_positions.weight
        )
        for table, rows in (
            (self.model.user_embedding, user_rows),
            (self.model.item_embedding, item_rows),
        ):
            assert isinstance(table, nn.Embedding)
            hidden_BLD = hidden_BLD + F.embedding(rows, table.weight, padding_idx=0)
        hidden_BLD = F.dropout(bart.layernorm_embedding(hidden_BLD), bart.dropout, self.training)
        bias = attention_bias(attention_mask[:, None, None], hidden_BLD)
        for layer in bart.layers:
            hidden_BLD = layer(hidden_BLD, bias)
        states_BTD = self.model.decode(decoder_input_ids, hidden_BLD, attention_mask)
        logits = F.linear(states_BTD, self.model.head_weight)
        summed = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": summed / count}


def pad_samples(samples: Sequence[Sample], pad_token: int, multiple: int = 1) -> dict[str, Tensor]:
    """Side by side, to the longest or the next multiple: what a collator hands to the model."""
    longest = -(-max(len(sample["input_ids"]) for sample in samples) // multiple) * multiple

    def side_by_side(name: str, fill: int, length: int = 0) -> Tensor:
        rows = [torch.tensor(sample[name]) for sample in samples]
        padded = pad_sequence(rows, batch_first=True, padding_value=fill)
        return F.pad(padded, (0, max(0, length - padded.shape[1])), value=fill)

    labels_BT = side_by_side("labels", IGNORED)
    start_B1 = torch.tensor([sample["start"] for sample in samples])
    inputs = {
        name: side_by_side(name, fill, longest)
        for name, fill in (
            ("input_ids", pad_token),
            ("position_ids", 0),
            ("user_rows", 0),
            ("item_rows", 0),
        )
    }
    return {
        **inputs,
        "attention_mask": inputs["input_ids"] != pad_token,
        "labels": labels_BT,
        "decoder_input_ids": torch.cat(
            [start_B1, labels_BT[:, :-1].masked_fill(labels_BT[:, :-1] == IGNORED, pad_token)], 1
        ),
    }


def samples_of(encoder: EncoderInput, decoder_input_ids: Tensor, labels: Tensor) -> list[Sample]:
    """A padded batch as a list of samples, as a user would have stored them."""
    found = []
    for row, length in enumerate(encoder.attention_mask.sum(1).tolist()):
        names = ("input_ids", "position_ids", "user_rows", "item_rows")
        inputs = {name: getattr(encoder, name)[row, :length].tolist() for name in names}
        targets = labels[row][labels[row] != IGNORED].tolist()
        found.append({**inputs, "labels": targets, "start": [int(decoder_input_ids[row, 0])]})
    return found


class Words(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples as words, which the collate tokenises anew for every batch, as the published code
    does."""

    def __init__(self, samples: Sequence[dict[str, Any]]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]


class TokenizingCollate:
    """Words to padded arrays: the tokenizer is called for every batch, and the longest sample
    decides."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pad_token: int):
        self.tokenizer, self.pad_token = tokenizer, pad_token

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        tokenizer = self.tokenizer
        texts = tokenizer(
            ["".join(f" {word}" for word in s["words"]) for s in samples],
            add_special_tokens=False,
            return_offsets_mapping=True,
        )
        targets = tokenizer([f" {s['target']}" for s in samples], add_special_tokens=False)
        bos, eos, mask = tokenizer.bos_token_id, tokenizer.eos_token_id, samples[0]["start"]
        made = []
        for number, sample in enumerate(samples):
            # Each word brings the space before it.
            ends = np.cumsum([1 + len(word) for word in sample["words"]])
            last = np.array([end for _, end in texts["offset_mapping"][number]])
            word_of = np.searchsorted(ends, last, side="left").tolist()
            tokens = [bos, *texts["input_ids"][number], mask, eos]
            rows = {
                kind: [0, *(sample[kind][word] for word in word_of), 0, 0]
                for kind in ("user_rows", "item_rows")
            }
            labels = [*targets["input_ids"][number], eos]
            made.append(
                {
                    "input_ids": tokens,
                    "position_ids": list(range(len(tokens))),
                    **rows,
                    "labels": labels,
                    "start": [mask],
                }
            )
        return pad_samples(made, self.pad_token)


class TrainerRival:
    """Seq2SeqTrainer's data loader, collation, sampler, `training_step`, clipping and optimiser, in
    the order of its loop.

    The loop itself is ours, so that rivals can take turns; its logging, callbacks and checkpoints
    are left out, in its favour."""

    def __init__(
        self,
        model: GenRecForConditionalGeneration,
        samples: Any,
        collate: Callable[[Sequence[Any]], dict[str, Tensor]],
        settings: dict[str, Any],
    ):
        """`settings`: of Seq2SeqTrainingArguments."""
        arguments = Seq2SeqTrainingArguments(
            report_to=[], remove_unused_columns=False, save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
            use_cpu=not torch.cuda.is_available(), **settings,
        )  # fmt: skip
        self.trainer = Seq2SeqTrainer(
            PlainGenRec(model), arguments, data_collator=collate, train_dataset=samples
        )
        self.loader = self.trainer.get_train_dataloader()
        self.trainer.create_optimizer_and_scheduler(10_000)
        self.model = self.trainer.accelerator.prepare(self.trainer.model)
        self.trainer.optimizer = self.trainer.accelerator.prepare(self.trainer.optimizer)
        self.trainer.current_gradient_accumulation_steps = 1

    def train(self, num_steps: int) -> int:
        """So many steps of an epoch; the real tokens they held."""
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
