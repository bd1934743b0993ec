"""The tensors of a micro-batch: gather tokens, pad or pack."""

# B samples, b samples of a micro-batch, K targets of a sample, T targets, R decoder rows, L input
# tokens; packed: n input tokens, m target tokens

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from genrec_shards.sequences import offsets_of

from genrec_dist.config.recipe import Mask
from genrec_dist.data.batch import IGNORED, Batch, ItemTargets, ModelInputs, SampleRows, Work
from genrec_dist.data.encoder_input import EncoderInput, FlatSequences, encode_words, ragged
from genrec_dist.data.layout import Layout
from genrec_dist.data.packing import Packing, filled_size, segments_of
from genrec_dist.data.samples.masked_samples import MaskedSamples
from genrec_dist.data.samples.soft_targets import Teacher
from genrec_dist.data.word_table import EOS_WORD, FIRST_MASK_WORD

WORTH_A_BATCH = 4096
"""Padding tokens that cost more than one more micro-batch (two CPU cores, width 128: docs/log.md,
2026-11-21)."""
WORTH_A_BATCH_ON_GPU = 2**26
"""The same, times the model's width, of a GPU: there a micro-batch costs the host a thousand
launches, and padding nearly nothing. An estimate, not measured."""


def padding_worth_a_batch(device_type: str, width: int) -> int:
    """`BatchOptions.most_padding` for a device and a model of this width."""
    return WORTH_A_BATCH if device_type == "cpu" else WORTH_A_BATCH_ON_GPU // width


@dataclass(frozen=True)
class BatchOptions:
    """How samples become micro-batches."""

    micro_batch_tokens: int
    """Most encoder tokens of a micro-batch, padding included; one sample is always taken."""
    seed: int = 0
    mask: Mask | None = None
    """The strategy that chooses targets; None: [MASK] after the history."""
    packed: bool = False
    """No padding: sequences one after another."""
    most_padding: int = WORTH_A_BATCH
    """Padding tokens of a micro-batch, where it is not packed."""
    item_targets: bool = False
    """For a model with an item head, or one whose decoder starts from a state."""
    all_prefixes: bool = False
    """Each item of a training part but the first is a target (causal encoders)."""
    share_windows: bool = False
    """With all_prefixes: targets whose history is too long share windows (`prefix_segments`)."""
    teacher: Teacher | None = None
    """With all_prefixes and items of one token that forced tokens follow: what is learned beside
    the targets."""


@dataclass(frozen=True)
class DecoderRows:
    """Each row is its items' tokens and </s>, after the rest of a prompt where there is one."""

    labels_RT: np.ndarray
    """int64 [R, T], IGNORED on padding and on forced tokens."""
    input_ids_RT: np.ndarray
    """int64 [R, T], the same one place later, after the mask to fill."""
    lengths_R: np.ndarray
    """int64 [R], tokens up to the last label."""
    nodes_RT: np.ndarray | None = None
    """int64 [R, T], what `Layout.nodes` says of the labels."""

    def after(self, lead: np.ndarray) -> DecoderRows:
        """The rows after these tokens, which are no labels."""
        if not len(lead):
            return self
        shape = (len(self.lengths_R), len(lead))
        return DecoderRows(
            labels_RT=np.concatenate([np.full(shape, IGNORED), self.labels_RT], 1),
            input_ids_RT=np.concatenate([np.broadcast_to(lead, shape), self.input_ids_RT], 1),
            lengths_R=self.lengths_R + len(lead),
        )


def collate(
    masked: MaskedSamples,
    user_rows_B: np.ndarray,
    is_padding_B: np.ndarray,
    layout: Layout,
    options: BatchOptions,
) -> Batch:
    """The tensors of one micro-batch. Padding samples are passed through the layers, and have no
    labels."""
    sequences = encode_words(masked.words, masked.offsets, user_rows_B, layout)
    rows = _decoder_rows(masked, layout)
    lengths_B, lengths_R = sequences.lengths_B, rows.lengths_R
    ignored_R = masked.ignored_R(is_padding_B)
    rows.labels_RT[ignored_R] = IGNORED

    item_targets = None
    if options.item_targets:
        if masked.visible_R is not None:  # a causal encoder: the last token that the row reads
            every_B = np.arange(len(lengths_B)) * sequences.longest
            first_B = offsets_of(lengths_B)[:-1] if options.packed else every_B
            places_R = first_B[masked.row_sample] + masked.visible_R - 1
        else:
            assert len(sequences.masks) == len(masked.row_sample), "a mask was cut off"
            places_R = sequences.masks if options.packed else sequences.padded_masks
        items_R = masked.target_items[masked.target_offsets[:-1]].astype(np.int64)
        items_R[ignored_R] = IGNORED
        learned = np.flatnonzero(items_R != IGNORED)
        item_targets = ItemTargets(*map(torch.from_numpy, (places_R, items_R, learned)))

    if options.packed:
        inputs = _packed(sequences, rows, masked, layout, item_targets)
    else:
        visible_R = masked.visible_R
        inputs = ModelInputs(
            encoder=sequences.padded(layout.pad_token),
            encoder_row=torch.from_numpy(masked.row_sample),
            decoder_input_ids=torch.from_numpy(rows.input_ids_RT),
            labels=torch.from_numpy(rows.labels_RT),
            learned=_learned(rows.labels_RT),
            children=_children(rows),
            item_targets=item_targets,
            visible=None if visible_R is None else torch.from_numpy(visible_R),
            rows=None if visible_R is None else SampleRows.of(masked.row_sample),
        )
    # What the samples that count add up to.
    counted_B, counted_R = lengths_B[~is_padding_B], lengths_R[~ignored_R]
    read_R = lengths_B[masked.row_sample] if masked.visible_R is None else masked.visible_R
    pairs_B = counted_B * (counted_B + 1) // 2 if layout.causal else counted_B**2
    is_sample_B = ~is_padding_B if masked.counted_B is None else masked.counted_B & ~is_padding_B
    num_labels = int((rows.labels_RT != IGNORED).sum())
    work = Work(
        inputs=int(counted_B.sum()),
        targets=int(counted_R.sum()),
        labels=num_labels,
        encoder_pairs=int(pairs_B.sum()),
        decoder_pairs=int((counted_R**2).sum()),
        cross_pairs=int((counted_R * read_R[~ignored_R]).sum()),
    )
    return Batch(
        **vars(inputs),
        num_samples=int(is_sample_B.sum()),
        num_target_tokens=num_labels,
        num_targets=int((~ignored_R).sum()),
        num_tokens=work.inputs + work.targets,
        num_slots=inputs.encoder.input_ids.numel() + inputs.labels.numel(),
        work=work,
    )


def target_batch(encoder: EncoderInput, target_items_B: np.ndarray, layout: Layout) -> Batch:
    """The padded batch in which each encoded history has one target: for a validation loss.

    Args:
        encoder: of `encode_histories`.
        target_items_B: int32 [B], item rows.
        layout: as of the histories.
    """
    rows_B = np.arange(len(target_items_B))
    masked = MaskedSamples(
        words=np.empty(0, np.int64),
        offsets=np.zeros(1, np.int64),
        row_sample=rows_B,
        row_mask=np.zeros_like(rows_B),
        target_items=target_items_B,
        target_offsets=np.arange(len(rows_B) + 1),
    )
    rows = _decoder_rows(masked, layout)
    return Batch(
        encoder=encoder,
        encoder_row=torch.from_numpy(rows_B),
        decoder_input_ids=torch.from_numpy(rows.input_ids_RT),
        labels=torch.from_numpy(rows.labels_RT),
        learned=_learned(rows.labels_RT),
        children=_children(rows),
        num_samples=len(rows_B),
        num_target_tokens=int((rows.labels_RT != IGNORED).sum()),
        num_targets=len(rows_B),
        num_tokens=int(encoder.attention_mask.sum()) + int(rows.lengths_R.sum()),
        num_slots=encoder.input_ids.numel() + rows.labels_RT.size,
    )


def _packed(
    sequences: FlatSequences,
    rows: DecoderRows,
    masked: MaskedSamples,
    layout: Layout,
    item_targets: ItemTargets | None,
) -> ModelInputs:
    """Packed inputs. A last sample of padding without a label fills them up to one of few numbers
    of tokens."""
    # Three users whose rows have 2, 1 and 3 tokens, one row each; 2 tokens of padding for example:
    #   labels_RT = [[a /] [b -] [c d /]] without padding is [a / b c d /], then [- -]
    #   rows.offsets = [0 2 3 6 8], positions_m = [0 1 0 0 1 2 0 0]
    # The padding's row attends to the padding sequence, the last of the encoder's.
    sequences = sequences.with_padding_sequence(layout.pad_token)
    lengths_R = rows.lengths_R
    missing = filled_size(int(lengths_R.sum())) - int(lengths_R.sum())
    real_RT = np.arange(rows.labels_RT.shape[1]) < lengths_R[:, None]
    by_row = segments_of(np.append(lengths_R, missing))
    sample_of_row = np.append(masked.row_sample, len(sequences.lengths_B) - 1)
    targets_B = np.bincount(sample_of_row, by_row.lengths, len(sequences.lengths_B))
    visible_m = None
    if masked.visible_R is not None:
        visible_m = np.repeat(np.append(masked.visible_R, sequences.lengths_B[-1]), by_row.lengths)
    packing = Packing(
        encoder=segments_of(sequences.lengths_B),
        targets=segments_of(targets_B.astype(np.int64)),
        rows=by_row,
        positions_m=torch.from_numpy(np.append(real_RT.nonzero()[1], np.zeros(missing, np.int64))),
        causal=layout.causal,
        visible_m=visible_m,
    )
    input_ids_m = np.append(rows.input_ids_RT[real_RT], np.full(missing, layout.pad_token))
    labels_m = np.append(rows.labels_RT[real_RT], np.full(missing, IGNORED))
    return ModelInputs(
        encoder=sequences.packed(),
        encoder_row=torch.from_numpy(masked.row_sample),
        decoder_input_ids=torch.from_numpy(input_ids_m),
        labels=torch.from_numpy(labels_m),
        learned=_learned(labels_m),
        children=_children(rows),
        item_targets=item_targets,
        packing=packing,
    )


def _learned(labels: np.ndarray) -> torch.Tensor:
    """`ModelInputs.learned` of these labels."""
    return torch.from_numpy(np.flatnonzero(labels != IGNORED))


def _children(rows: DecoderRows) -> torch.Tensor | None:
    """`ModelInputs.children` of these rows; padding has no labels, so the order is that of
    packed ones, too."""
    if rows.nodes_RT is None:
        return None
    return torch.from_numpy(rows.nodes_RT[rows.labels_RT != IGNORED])


def _decoder_rows(masked: MaskedSamples, layout: Layout) -> DecoderRows:
    """The decoder rows of samples. Forced tokens are no labels, and rows end with their last
    label."""
    words = layout.words
    item_words = words.item_words(masked.target_items)
    flat, token_offsets = ragged(words.offsets[item_words], words.lengths[item_words])
    lengths_R = np.diff(token_offsets[masked.target_offsets])
    columns, last = np.arange(lengths_R.max(initial=0) + 1), (np.arange(len(lengths_R)), lengths_R)
    labels_RT = np.full((len(lengths_R), len(columns)), IGNORED, np.int64)
    is_token_RT = columns < lengths_R[:, None]
    labels_RT[is_token_RT] = words.tokens[flat]
    labels_RT[last] = words.tokens[words.offsets[EOS_WORD]]
    input_ids_RT = np.empty_like(labels_RT)
    input_ids_RT[:, 0] = words.tokens[words.offsets[FIRST_MASK_WORD + masked.row_mask + 1] - 1]
    before_RT = labels_RT[:, :-1]
    input_ids_RT[:, 1:] = np.where(before_RT == IGNORED, layout.pad_token, before_RT)
    if layout.forced is None:
        return DecoderRows(labels_RT, input_ids_RT, lengths_R + 1).after(layout.lead)
    assert len(masked.target_items) == len(lengths_R), "several items in one answer have no trie"
    forced_RT = np.ones(labels_RT.shape, bool)
    forced_RT[is_token_RT] = layout.forced.tokens[flat]
    forced_RT[last] = layout.forced.ends[item_words]
    labels_RT[forced_RT] = IGNORED
    lengths_R = len(columns) - np.argmin(forced_RT[:, ::-1], axis=1)
    input_ids_RT[columns >= lengths_R[:, None]] = layout.pad_token
    longest = int(lengths_R.max(initial=0))
    nodes_RT = None
    if layout.nodes is not None:
        nodes_RT = np.zeros_like(labels_RT)
        nodes_RT[is_token_RT] = layout.nodes[flat]
        nodes_RT = nodes_RT[:, :longest]
    rows = DecoderRows(labels_RT[:, :longest], input_ids_RT[:, :longest], lengths_R, nodes_RT)
    return rows.after(layout.lead)
