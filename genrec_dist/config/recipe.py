"""The recipe: every setting of a run, typed, once; unknown keys are refused."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

HeadLoss = Literal["full", "chunked", "liger"]
"""How the loss of the output head is computed: see `Recipe.head`."""
EncoderUnit = Literal["subword", "item"]
"""What an encoder position stands for: see `Model.encoder_unit`."""


TrackerName = Literal["none", "tensorboard", "wandb", "mlflow", "trackio"]
"""Where a run's numbers go beside its own files: see `Recipe.tracker`."""

_PATHS = ("data", "run", "shards")
_SAVING = ("checkpoint_minutes", "checkpoint_every", "keep_checkpoints")
_PACE = ("workers", "log_every", "micro_batch_tokens", *_SAVING)
AUTO = "auto"
MICRO_BATCH = "micro_batch_tokens"
CPU_MICRO_BATCH = 6144
"""What `auto` is on a CPU, where all figures of docs/quality.md were made with it: another cut adds
the same numbers in another order, so that a run would not repeat to the bit."""
AUTO_KEYS = {
    "tokens.vocab_size": 1024,
    "model.max_tokens": 512,
    "model.item_text": "none",
    "finetune.distill.weight": 0.0,
    "finetune.batch_size": 256,
    "finetune.epochs": 1,
    "validation.every_epochs": 1,
    MICRO_BATCH: CPU_MICRO_BATCH,
}
"""Keys whose value may be `auto`, chosen from the data (`data.fit_recipe`) or the last one by the
device (`training.step.micro_batches`), and what stands in its place until then."""
MOVES_NO_GRADIENT = (*_PATHS, *_PACE, "decode", "text", "tracker")
"""Keys of a recipe that say where files are and how work is divided: runs that differ in these
alone have the same recipe."""


@dataclass(frozen=True)
class Model:
    """Shape and parts of the model."""

    architecture: Literal["bart", "t5"] = "bart"
    """Whose encoder and decoder these are. bart: the paper's. t5: relative positions instead of a
    table of them; docs/backbones.md says what it lacks. With a `prompt` neither."""
    d_model: int = 128
    """Width of every layer."""
    encoder_layers: int = 2
    """Layers of the encoder."""
    decoder_layers: int = 2
    """Layers of the decoder."""
    heads: int = 4
    """Attention heads of encoder and decoder."""
    ffn: int = 512
    """Width of the feed-forward layers."""
    backbone: str | None = None
    """Name or directory of weights to start from, BART's or T5's, with a `prompt` those of a causal
    language model (Llama and its like); they then set the shape above. null: from scratch."""
    max_tokens: int = 512
    """Longest encoder input in positions (`encoder_unit`); whole oldest items are dropped beyond
    it."""
    dropout: float = 0.1
    """Dropout of the layers' outputs and of the embedding sum."""
    attention_dropout: float = 0.0
    """Dropout of the attention weights."""
    activation_dropout: float = 0.0
    """Dropout inside the feed-forward layers."""
    embedding_dropout: float = 0.0
    """Dropout of the id embeddings alone, before they are summed with the rest."""
    user_ids: bool = True
    """Put the user's word in the text and its id in the sum. Off: items only."""
    item_ids: bool = True
    """Add the item's id embedding to each of its sub-words (the paper's IDEMB)."""
    decoder_start: Literal["mask", "state", "every-state"] = "mask"
    """What the decoder's first input is. mask: the token of the mask it is to fill. state: that,
    plus the encoder's state at this [MASK] (of a causal encoder: at the last item), which so
    reaches the output without going through cross-attention. every-state: the state is added to
    all of the decoder's inputs, so that it also reaches the later tokens of an item."""
    item_loss: float = 0.0
    """Weight per target item of a second head, beside the decoder's loss per token: it predicts the
    item from the encoder's state at [MASK] by a softmax over the whole catalogue, whose rows are
    the item id table's. 0: no such head."""
    item_output: bool = False
    """With `tokens.softmax: siblings`: add the item's id row to the output row of the token that
    leaves this item alone. An item is then known by its own row among the few with the same
    beginning, and the head is as wide as the tokens all the same."""
    id_dim: int = 0
    """Width of the id tables, projected to d_model where it differs; 0: d_model, as in the paper.
    Many ids: 64."""
    encoder_unit: EncoderUnit = "subword"
    """subword: each sub-word has an encoder position (BART, the paper). item: each word has one,
    its embedding the sum of its sub-words', so that a history is as long as it has items. The
    decoder's output is sub-words either way."""
    encoder_attention: Literal["bidirectional", "causal"] = "bidirectional"
    """bidirectional: every position sees all others (BART, the paper). causal: only those before
    it, and no [MASK] or </s> follows a history; the encoding of a history is then the same inside
    each longer one, which `targets: all-prefixes` needs."""
    positions: Literal["from-start", "from-end"] = "from-start"
    """Count encoder positions from <s> (BART, the paper) or back from </s>, so that an item's
    position is its age."""
    scale_embedding: bool = False
    """Multiply token embeddings by sqrt(d_model) (BART: no)."""
    init_std: float = 0.02
    """Standard deviation of the initial weights, id tables included."""
    init_items: Literal["random", "cooccurrence"] = "random"
    """Initial values of the items' rows. cooccurrence: directions that items share with their
    neighbours in the training parts (t_1..t_{n-2} whatever `trained_through`), as long as random
    ones; in the rows of their tokens where each item is one token, else in the item id table and,
    with `tokens.softmax: siblings`, in the rows of tokens, each the mean of its items."""
    item_text: Literal["none", "add", "init"] = "none"
    """What the items' texts do to the rows of their tokens, where each item is one token. add: a
    learned projection of the text's vector is added, in the input and in the output; it is the
    whole row of an item that the training parts do not hold, which is in no loss. init: the rows
    begin so, and texts then play no part. The saved model has the sums and needs no texts."""
    item_text_source: str = "factors"
    """The vectors: `factors`, `wordllama` or a directory, as under `text`."""


@dataclass(frozen=True)
class Tokens:
    """Tokenizer and output vocabulary."""

    tokenizer: str | None = None
    """Name or directory of a Hugging Face fast tokenizer. null: the backbone's, or a byte-level BPE
    trained on the item words."""
    vocab_size: int = 1024
    """Size of the BPE that is trained when no tokenizer is named; large enough, each item becomes
    one token."""
    trim: bool = False
    """Keep only the tokens that words use: the others have no row in embedding and head, of BART's
    50,265 all but about 1,100. The output vocabulary is the tokens of items and </s>; users'
    tokens, masks and <s> are input only."""
    forced: Literal["learned", "given"] = "learned"
    """Tokens that the catalogue leaves no choice about: an item's only continuation, and </s> where
    nothing else can follow. learned: in loss and score like all others, as in the paper. given: in
    neither, their probability is 1."""
    softmax: Literal["vocabulary", "siblings"] = "vocabulary"
    """What a token's probability is a share of. vocabulary: all tokens of the output vocabulary, as
    in the paper. siblings: those that can follow the same beginning in the catalogue, so that
    nothing is spent on learning which can. Needs `forced: given`, and no item's word may be the
    beginning of another's (hierarchical codes)."""


@dataclass(frozen=True)
class Prompt:
    """What a causal language model reads, and writes after it the title of the next item. A
    template makes the model one of these; `model.backbone` then names its weights (docs/llama.md).
    """

    template: str = ""
    """The text around a history's titles, which go where {history} is; the answer follows its end.
    Empty: no prompt, an encoder-decoder over the words of items."""
    separator: str = "\n"
    """Between two titles; no title may contain it."""
    max_titles: int = 20
    """Latest items of a history that are read, as far as they fit `model.max_tokens`; whole titles
    are left out, oldest first."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters of a model with a prompt; the other weights then stay as they are."""

    rank: int = 0
    """Rank of each adapter. 0: none, all weights are trained."""
    alpha: float = 32.0
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout of an adapter's input."""
    targets: str = "all-linear"
    """Modules with an adapter: all-linear (those of all layers, not the head), or names with commas
    between them, such as q_proj,v_proj."""


@dataclass(frozen=True)
class Mask:
    """The masking strategy of a stage whose targets are `mask`."""

    strategy: Literal["single", "last-biased", "recency", "span", "multi"] = "single"
    """Which items of the training part become the target of a pretraining sample."""
    p: float = 0.5
    """last-biased: probability of the last item. recency: ratio of the geometric law, 0 < p <= 1,
    larger is more recent."""
    k: int = 4
    """span: longest span. multi: number of targets."""


@dataclass(frozen=True)
class Distill:
    """What a decoder learns beside each target: the distribution over the next item that the
    transition graph and the items' texts (`text`) have after the target's history, in the training
    parts, the user's own pairs left out. The graph's settings are chosen on validation. One beam
    search then has most of what `decode: hybrid` adds. Needs `all-prefixes`, `tokens.forced: given`
    and items of one token or `tokens.softmax: siblings`, where an item is drawn from the
    distribution in place of the target, and each of its tokens learns the shares of its
    siblings."""

    weight: float = 0.0
    """Its part of the target's probability in the loss. 0: none."""
    temperature: float = 1.0
    """By which its logarithms are divided: above 1 it is flatter."""
    top: int = 50
    """How many of its likeliest items are kept."""


@dataclass(frozen=True)
class Stage:
    """Pretraining or finetuning."""

    epochs: int = 0
    """Passes over the stage's samples; 0 skips the stage."""
    epoch_fraction: float = 1.0
    """Share of the samples after which an epoch ends, for long logs and slow models: with 0.1 ten
    epochs have as many samples as the data, each drawn anew, and ten validations."""
    batch_size: int = 256
    """Samples per step over all ranks."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_fraction: float = 0.05
    """Share of the stage's steps with rising learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up, down to zero at the stage's end."""
    targets: Literal["mask", "last", "every-prefix", "all-prefixes"] = "last"
    """mask: the strategy below chooses inside the training part. last, every-prefix: [MASK] after
    the history. all-prefixes: the samples of every-prefix, those of a user in one step and with
    one encoded sequence (causal encoders); a batch counts users."""
    windows: Literal["own", "shared"] = "own"
    """With all-prefixes, what a target reads whose history is longer than `model.max_tokens`. own:
    the longest suffix that fits, as when lists are made; each such target is encoded alone. shared:
    between half of that and all of it; windows begin every half of `max_tokens` and are encoded
    once, which long histories need."""
    mask: Mask = field(default_factory=Mask)
    """Which items are masked; read when targets is mask."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over the output vocabulary."""
    distill: Distill = field(default_factory=Distill)
    """Of finetuning alone: soft targets."""

    @property
    def sample_unit(self) -> Literal["users", "samples"]:
        """What a sample is: a user, but for every-prefix, which makes several of each."""
        return sample_unit(self.targets)


def sample_unit(targets: Any) -> Literal["users", "samples"]:
    """See `Stage.sample_unit`; for `targets` of a recipe that was read without its schema."""
    return "samples" if targets == "every-prefix" else "users"


@dataclass(frozen=True)
class Optimizer:
    """AdamW, gradient clipping, the id tables' optimiser and the average of the weights."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """AdamW's term that keeps the division finite."""
    weight_decay: float = 0.01
    """AdamW's weight decay, of the parameters that `decay` names."""
    decay: Literal["all", "matrices", "none"] = "matrices"
    """What is decayed: everything (the paper's code), all but biases, norms and id tables, or
    nothing."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""
    id_tables: Literal["dense", "row-adagrad"] = "dense"
    """dense: the id tables are parameters among the others. row-adagrad: they are outside autograd
    and ZeRO, rows sharded over the ranks; a step fetches, updates (row-wise Adagrad) and sends only
    the rows it uses: for millions of ids."""
    id_learning_rate: float = 0.05
    """Peak learning rate of row-adagrad; it follows the stage's schedule. Such tables are neither
    decayed nor clipped."""
    ema_decay: float = 0.0
    """Decay of the running average of the weights that is validated and kept as `best`; 0 keeps the
    weights themselves. Id tables of row-adagrad are not averaged."""


@dataclass(frozen=True)
class Validation:
    """What is decoded between epochs of finetuning, and early stopping by it."""

    users: int = 2000
    """Users of the seeded sample that is decoded after each epoch of finetuning; 0: all."""
    beam: int = 20
    """Width of the beam."""
    decode: Literal["exact", "items", "hybrid"] = "exact"
    """By which head users are ranked: the decoder, the item head, or both with equal weight."""
    every_epochs: int = 1
    """Epochs of finetuning from one validation to the next."""
    patience: int = 3
    """Stop after this many validations without a better NDCG@10; 0 never stops."""


@dataclass(frozen=True)
class Recipe:
    """A run, from data to `best/`. Topology (processes, ZeRO stage) is not here: it belongs to the
    launch file."""

    data: str
    """Directory of `genrec prepare`."""
    run: str
    """Directory of the run."""
    init_from: str | None = None
    """Run directory, or a directory like its `best/`, whose weights and tokenizer this run starts
    from (`genrec train --from`); rows are added for users and items that are new
    (docs/refresh.md). null: fresh weights."""
    shards: str | None = None
    """Directory of `genrec shard`. null: `shards/` inside the data directory."""
    seed: int = 0
    """Seed of the initial weights, the order of samples, masks and dropout."""
    decode: Literal["exact", "items", "hybrid"] = "exact"
    """How `evaluate` and `recommend` score items where --decode is not given. hybrid: the decoder
    with the transition graph, the items' texts where the data has any and, where lists may repeat
    the history, a repeat model; training ends with choosing their weights on validation."""
    text: str = "words"
    """By what hybrid compares the items' texts. words: TF-IDF of their words. factors: the largest
    factors of it. wordllama: that package's token vectors. A directory: the sentence-transformers
    model in it. none: not at all."""
    trained_through: Literal["n-2", "n-1"] = "n-2"
    """Last position the model may learn; n-1 is the refit that also learns the validation item. Of
    a split by time the training period, and that with the validation period."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """auto: bf16 on a GPU and on a CPU with instructions for it, fp32 elsewhere; the run's
    recipe.yaml holds which of them it was, and a resumed run keeps it."""
    micro_batch_tokens: int = 8192
    """Encoder tokens, padding included, that a rank takes through the model at once (with a
    `prompt`: tokens of prompts and answers); a step accumulates as many micro-batches of samples of
    similar length as its share needs. auto: on a GPU as many as `genrec plan` says that its free
    memory holds, a whole step at most; on a CPU, and for models that are not foretold, 6,144. The
    run's recipe.yaml holds the number, and a resumed run keeps it."""
    head: Literal["auto", HeadLoss] = "auto"
    """How the loss of the output head is computed. full: the logits of all target tokens of a
    micro-batch at once, and their gradients. chunked: some rows of them at a time. liger: the same
    by Liger-Kernel on a GPU. auto: chunked on a CPU, where it is also faster (docs/log.md), full
    elsewhere until it is measured there."""
    packing: Literal["auto", "packed", "padded"] = "auto"
    """How the sequences of a micro-batch lie in memory. packed: one after another, no padding; on
    a GPU attention then takes torch's kernel for ragged sequences. padded: side by side, to the
    longest one. auto: packed on a CPU, where it is measured (docs/speed.md), padded elsewhere until
    it is measured there, and for T5. Losses and gradients are the same to rounding."""
    compile: Literal["none", "layers"] = "none"
    """layers: torch.compile of each layer around its attention, for packed micro-batches. It takes
    a minute at the start; the gain is in docs/speed.md."""
    step_graph: Literal["auto", "on", "off"] = "auto"
    """on: on one GPU a step is captured as CUDA graphs over packed micro-batches of one size, so
    that the host launches two things in place of a thousand (decision 0019); what cannot be
    captured is refused by name. auto: off, until a GPU has shown it."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer and compute the rest again in the backward pass: a third
    more operations for a fraction of the memory."""
    deterministic: bool = False
    """On a GPU add in a fixed order, so that the same steps give the same bits: torch's
    deterministic algorithms and cuBLAS's fixed workspace. It takes time, most of it in the backward
    pass of attention, and memory; how much is not measured. A CPU's sums have a fixed order
    anyway."""
    workers: int = 1
    """Processes per rank that prepare batches ahead; 0 prepares them in the training process."""
    log_every: int = 10
    """Steps between two `step` events."""
    checkpoint_minutes: float = 5.0
    """Minutes between two checkpoints; 0: time brings none. One is also written at the end of each
    epoch. They are written while the training goes on."""
    checkpoint_every: int = 0
    """Steps between two checkpoints, besides; 0: none by steps."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay; older ones are deleted."""
    tracker: tuple[TrackerName, ...] = ("tensorboard",)
    """Where the run's numbers go beside events.jsonl: one, or a list of several. A tracker that
    fails is given up with one warning, and the run goes on (docs/track.md)."""
    model: Model = field(default_factory=Model)
    tokens: Tokens = field(default_factory=Tokens)
    prompt: Prompt = field(default_factory=Prompt)
    lora: Lora = field(default_factory=Lora)
    pretrain: Stage = field(default_factory=lambda: Stage(targets="mask"))
    """The first stage, in which the model learns to fill masks."""
    finetune: Stage = field(default_factory=Stage)
    """The second stage, in which it learns what comes after a history."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    validation: Validation = field(default_factory=Validation)
    auto_keys: tuple[str, ...] = ()
    """Keys that were given as `auto`: their values are chosen before a run's first step. (Not a key
    of its own.)"""

    @property
    def num_masks(self) -> int:
        """Mask tokens the tokenizer needs: `multi` numbers its targets."""
        stages = (self.pretrain, self.finetune)
        masking = [stage.mask for stage in stages if stage.epochs > 0 and stage.targets == "mask"]
        return max([mask.k for mask in masking if mask.strategy == "multi"], default=1)

    @property
    def shards_dir(self) -> str:
        """Where the shards are: a directory, or a URL as it was given."""
        return str(Path(self.data) / "shards") if self.shards is None else self.shards

    def as_dict(self) -> dict[str, Any]:
        """Nested keys and values; `auto` for what is to be chosen from the data."""
        values = dataclasses.asdict(self)
        for key in values.pop("auto_keys"):
            *sections, name = key.split(".")
            functools.reduce(dict.__getitem__, sections, values)[name] = AUTO
        return values
