"""A run that begins with another's weights: what was there stays to the bit, what is new has a row,
what contradicts is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from genrec_shards.append import append
from genrec_shards.dataset import load_dataset
from genrec_shards.numbering.cooccurrence import cooccurrences
from genrec_shards.prepare import prepare
from genrec_shards.storage.write import write_shards
from run_events import events
from tiny import TINY_RECIPE, tiny_log
from zero_launch import launch

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import dump_recipe, load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.encoder_input import encode_histories
from genrec_dist.data.tokenizer import grow_tokenizer, train_tokenizer
from genrec_dist.data.word_table import build_words, item_text
from genrec_dist.decoding.trie import build_trie
from genrec_dist.distributed.accelerator import make_accelerator
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.inference.load import load_run, make_searcher
from genrec_dist.inference.rank_users import Decoding, rank_batch
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.training.checkpoint import Checkpoint, list_checkpoints, save_best
from genrec_dist.training.id_tables import IdTables
from genrec_dist.training.loop import Loop
from genrec_dist.training.run import train
from genrec_dist.training.setup import TrainingSetup, build_setup, describe

WHOLE = [
    *("tokens.vocab_size=4096", "tokens.trim=true", "tokens.forced=given"),
    *("model.user_ids=false", "model.decoder_start=state", "model.encoder_attention=causal"),
    *("finetune.targets=all-prefixes", "pretrain.epochs=0", "finetune.epochs=2"),
]
"""As the recipe `best`: each item one token, of a trimmed vocabulary."""
ROWS = ["optimizer.id_tables=row-adagrad"]
KINDS = {
    "whole": WHOLE,
    "spelled": [],
    "spelled-trimmed": ["tokens.trim=true", "model.id_dim=8"],
    "rows": ROWS,
}
NUM_OLD_USERS, NUM_OLD_ITEMS, NUM_NEW_ITEMS = 120, 64, 9


def old_lines() -> list[list[str]]:
    return [line.split() for line in tiny_log().splitlines()]


def new_lines() -> list[str]:
    """Known users go on, new ones come; of nine new items one stands beside new items alone in each
    training part."""
    items = old_lines()[-1][1:]
    known = [
        f"user-{n} {items[n % 64]} new-{n % 8} {items[(n + 7) % 64]} {items[(n + 9) % 64]}"
        for n in range(0, 100, 3)
    ]
    fresh = [
        f"fresh-{n} {items[n]} new-{n % 8} {items[n + 1]} {items[n + 2]} {items[n + 3]}"
        for n in range(12)
    ]
    return [*known, *fresh, "loner new-lonely new-1 new-2"]


@dataclass(frozen=True)
class World:
    """Old data, longer data, and models trained on the old ones, or rather: with weights that are
    none of a fresh model."""

    folder: Path
    old: Path
    longer: Path

    def recipe(self, kind: str, data: Path, run: Path | str, *more: str) -> Recipe:
        path = self.folder / "recipe.yaml"
        path.write_text(f"data: {data}\nrun: {run}\n{TINY_RECIPE}", encoding="utf-8")
        return load_recipe(path, [*KINDS[kind], "validation.users=20", *more])

    def warm_recipe(self, kind: str, data: Path, *more: str, run: Path | None = None) -> Recipe:
        """A recipe that starts from the model of `kind`."""
        run = run or self.folder / "unset"
        return self.recipe(kind, data, run, f"init_from={self.origin(kind)}", *more)

    def origin(self, kind: str) -> Path:
        return self.folder / kind


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("refresh")
    (folder / "old.txt").write_text(tiny_log())
    (folder / "new.txt").write_text("\n".join(new_lines()) + "\n")
    made = World(folder, folder / "old", folder / "longer")
    prepare(folder / "old.txt", made.old)
    append(folder / "new.txt", made.old, made.longer)
    for data in (made.old, made.longer):
        write_shards(load_dataset(data), data / "shards", users_per_shard=64, users_per_record=32)
    for kind in KINDS:
        keep_a_model(made.recipe(kind, made.old, made.origin(kind)))
    return made


def keep_a_model(recipe: Recipe) -> None:
    """`best/` as a run leaves it, of weights that no fresh model has."""
    setup, model = build_setup(recipe)
    torch.manual_seed(99)
    tables = IdTables(model.config, 17, Ranks(), torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            moved = torch.randn_like(parameter) * 0.1
            if name in ("user_embedding.weight", "item_embedding.weight"):
                moved[0] = 0
            parameter += moved
    whole = tables.whole(model)
    assert whole is not None
    setup.run.mkdir()
    (setup.run / "recipe.yaml").write_text(dump_recipe(recipe))
    trie = build_trie(*setup.words.tokens_of_items())
    save_best(setup, whole, trie, step=0)


def opened(
    world: World, kind: str, data: Path, *more: str
) -> tuple[TrainingSetup, GenRecForConditionalGeneration, GenRecForConditionalGeneration]:
    """(setup, its model whole, the origin's model)."""
    recipe = world.warm_recipe(kind, data, *more)
    setup, model = build_setup(recipe)
    tables = IdTables(model.config, recipe.seed, Ranks(), torch.device("cpu"))
    assert setup.warm_start is not None
    tables.begin_with(setup.warm_start.id_rows)
    whole = tables.whole(model)
    assert whole is not None
    return setup, whole.eval(), load_run(world.origin(kind)).model


def rows_by_word(model: GenRecForConditionalGeneration, words) -> list[torch.Tensor]:
    table = model.model.shared.weight.detach()
    return [
        table[words.tokens[slice(*words.offsets[n : n + 2])].astype(np.int64)]
        for n in range(len(words.lengths))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_same_data_it_is_the_same_model(world: World, kind: str) -> None:
    setup, model, before = opened(world, kind, world.old)
    theirs = dict(before.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs.pop(name)), name
    assert not theirs
    assert setup.warm_start is not None
    assert (setup.warm_start.users, setup.warm_start.items, setup.warm_start.tokens) == (0, 0, 0)
    loaded = load_run(world.origin(kind))
    view = load_dataset(world.old).sequences.history_and_target("test")
    users, decoding = np.arange(40), Decoding(mode="all", exclude_history=False)
    now = rank_batch(make_searcher(model, setup.words, "cpu"), setup.layout, view, users, decoding)
    then = rank_batch(loaded.searcher, loaded.layout, view, users, decoding)
    assert np.array_equal(now.items, then.items)
    assert np.array_equal(now.scores, then.scores)


@pytest.mark.parametrize("kind", KINDS)
def test_old_rows_stay_to_the_bit_where_there_are_new_ones(world: World, kind: str) -> None:
    setup, model, before = opened(world, kind, world.longer)
    loaded = load_run(world.origin(kind))
    ours, theirs = rows_by_word(model, setup.words), rows_by_word(before, loaded.words)
    first, first_before = setup.words.first_user_word, loaded.words.first_user_word
    same = [
        *zip(ours[: NUM_OLD_ITEMS + 2 + setup.words.num_masks], theirs[:first_before], strict=True)
    ]
    # Of a model without user ids `best/` has no users.
    num_users = NUM_OLD_USERS if before.config.num_users else 0
    same += zip(ours[first : first + num_users], theirs[first_before:], strict=True)
    assert len(same) == len(theirs)
    assert all(torch.equal(one, other) for one, other in same)
    held = dict(before.named_parameters())
    for name, parameter in model.named_parameters():
        if name in ("user_embedding.weight", "item_embedding.weight"):
            assert len(parameter) > len(held[name])
            assert torch.equal(parameter[: len(held[name])], held[name]), name
        elif name != "model.shared.weight":
            assert torch.equal(parameter, held[name]), name
    assert model.config.num_items == NUM_OLD_ITEMS + NUM_NEW_ITEMS
    assert (model.config.num_users or NUM_OLD_USERS) == (
        NUM_OLD_USERS + 13 if kind != "whole" else NUM_OLD_USERS
    )
    assert model.lm_head.weight.data_ptr() == model.model.shared.weight.data_ptr()
    assert model.config.numbering_hash == load_dataset(world.longer).numbering.numbering_hash()
    if kind == "whole":
        tokens, offsets = setup.words.tokens_of_items()
        assert (np.diff(offsets) == 1).all()
        assert setup.warm_start is not None
        assert setup.warm_start.tokens == NUM_NEW_ITEMS == setup.warm_start.items
        assert (tokens < model.config.spoken_tokens).all()
    bias = model.final_logits_bias[0]
    spoken = model.config.spoken_tokens or model.config.vocab_size
    assert (bias[:spoken] == 0).all()
    assert torch.isinf(bias[spoken:]).all()
    assert bias.shape == (model.config.vocab_size,)


@pytest.mark.parametrize("kind", ["whole", "spelled", "rows"])
def test_old_items_have_their_logits_after_an_old_users_history(world: World, kind: str) -> None:
    """The softmax has more tokens now; what the model says of the old ones is the same."""
    setup, model, before = opened(world, kind, world.longer)
    loaded = load_run(world.origin(kind))
    view = load_dataset(world.old).sequences.history_and_target("test")
    users = np.arange(30)
    items = np.concatenate([view.items[view.starts[u] : view.ends[u]] for u in users])
    offsets = np.concatenate([[0], np.cumsum((view.ends - view.starts)[users])])
    found = []
    for network, words, layout in (
        (model, setup.words, setup.layout),
        (before, loaded.words, loaded.layout),
    ):
        encoder = encode_histories(items, offsets, users, layout)
        assert encoder.attention_mask.sum() > 0
        with torch.inference_mode():
            memory = network.encode(encoder)
            start = torch.full((len(users), 1), network.config.decoder_start_token_id)
            state = (
                network.masked_states(memory, encoder.attention_mask) if kind == "whole" else None
            )
            hidden = network.decode(start, memory, encoder.attention_mask, state)[:, 0]
            tokens, spans = words.tokens_of_items()
            firsts = torch.from_numpy(tokens[spans[:NUM_OLD_ITEMS]].astype(np.int64))
            found.append((hidden, hidden @ network.head_weight[firsts].T))
    (ours, our_logits), (theirs, their_logits) = found
    assert torch.equal(ours, theirs)
    assert torch.equal(our_logits, their_logits)
    assert our_logits.std() > 0.01


def test_a_new_items_rows_begin_among_its_neighbours(world: World) -> None:
    setup, model, _ = opened(world, "whole", world.longer)
    sequences = load_dataset(world.longer).sequences
    near = cooccurrences(sequences, 6).toarray()
    shares = near[:, :NUM_OLD_ITEMS] / np.sqrt(near.sum(1)[:NUM_OLD_ITEMS] + 1)
    tokens = setup.words.tokens_of_items()[0].astype(np.int64)
    rows = {
        "token": model.model.shared.weight.detach()[tokens],
        "id": model.item_embedding.weight.detach()[1:],  # type: ignore[union-attr]
    }
    lonely = sequences.item_ids.index("new-lonely")
    assert not shares[lonely].any()
    for table in rows.values():
        old = table[:NUM_OLD_ITEMS].double().numpy()
        for item in range(NUM_OLD_ITEMS, NUM_OLD_ITEMS + NUM_NEW_ITEMS):
            if item == lonely:
                drawn = table[item].numpy() - old.mean(0)
                assert 0.05 < drawn.std() < 1  # a fresh row (init_std 0.3) beside the mean
                continue
            expected = shares[item] / shares[item].sum() @ old
            np.testing.assert_allclose(table[item].numpy(), expected, atol=1e-5)


def test_new_users_begin_like_untrained_ones(world: World) -> None:
    _, model, _ = opened(world, "spelled", world.longer)
    new = model.user_embedding.weight.detach()[NUM_OLD_USERS + 1 :]  # type: ignore[union-attr]
    assert len(new) == 13
    assert 0.2 < float(new.std()) < 0.4  # init_std 0.3
    assert not model.user_embedding.weight[0].any()  # type: ignore[union-attr]
    _, again, _ = opened(world, "spelled", world.longer)
    assert torch.equal(again.user_embedding.weight, model.user_embedding.weight)  # type: ignore[union-attr]


def test_tables_outside_the_model_hold_the_rows_before_any_step(world: World) -> None:
    recipe = world.warm_recipe("rows", world.longer)
    setup, model = build_setup(recipe)
    tables = Loop(setup, model, make_accelerator(recipe)).tables.tables
    before = load_run(world.origin("rows")).model
    for kind, num_old in (("item", NUM_OLD_ITEMS), ("user", NUM_OLD_USERS)):
        rows = tables[kind].full()  # type: ignore[index]
        assert rows is not None
        assert torch.equal(rows[:num_old], getattr(before, f"{kind}_embedding").weight[1:])
        assert rows[num_old:].std() > 0.05


# Tokenizers

CODES = {
    "numbers": ([str(n) for n in range(1, 90)], ["90", "91", "901", "0"]),
    "levels": (
        [f"a{n % 4 + 1}-b{n % 3 + 1}-c{n // 12 + 1}" for n in range(36)],
        ["a1-b1-c4", "a4-b3-c17", "a2-b1-c3000"],
    ),
    "ids": (["B00-x", "a b", "é", "12", "ü.ß"], ["B00-y", "a b c", "日本", "1", "<x>", "123"]),
}


@pytest.mark.parametrize("codes", CODES)
def test_new_words_become_whole_where_the_old_ones_are(codes: str, tmp_path: Path) -> None:
    known, new = CODES[codes]
    tokenizer = train_tokenizer(known, 4096, num_masks=3)
    grown = grow_tokenizer(tokenizer, known, new)
    users = [str(n) for n in range(200)]
    before, after = (
        build_words(tokenizer, known, users, 3),
        build_words(grown, [*known, *new], users, 3),
    )
    for kind in ("item", "user"):
        first, second = (getattr(words, f"first_{kind}_word") for words in (before, after))
        for place in range(len(known) if kind == "item" else len(users)):
            one, other = (
                words.tokens[slice(*words.offsets[at + place : at + place + 2])]
                for words, at in ((before, first), (after, second))
            )
            assert np.array_equal(one, other)
    parts = [
        len(grown.backend_tokenizer.pre_tokenizer.pre_tokenize_str(item_text(code)))
        for code in [*known, *new]
    ]
    assert np.diff(after.tokens_of_items()[1]).tolist() == parts
    assert build_trie(*after.tokens_of_items()).item_node.min() > 0
    assert len(grown) == len(set(grown.get_vocab().values()))
    assert [grown.mask_token_id, grown.pad_token_id] == [
        tokenizer.mask_token_id,
        tokenizer.pad_token_id,
    ]
    texts = [item_text(code) for code in [*known, *new]]
    ids = [
        encoding.ids
        for encoding in grown.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    ]
    assert grown.backend_tokenizer.decode_batch(ids) == texts
    grown.save_pretrained(tmp_path)
    again = type(grown).from_pretrained(tmp_path)
    assert [
        e.ids for e in again.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    ] == ids
    assert set(again.all_special_ids) == set(tokenizer.all_special_ids)


def test_spelled_words_keep_their_tokenizer() -> None:
    known = [str(n) for n in range(1, 90)]
    tokenizer = train_tokenizer(known, 285)
    assert grow_tokenizer(tokenizer, known, ["90", "91"]) is tokenizer
    whole = train_tokenizer(known, 4096)
    assert grow_tokenizer(whole, known, []) is whole


# Refusals


@pytest.mark.parametrize(
    ("kind", "override", "said"),
    [
        (
            "spelled",
            "model.d_model=32",
            "is 32 in the recipe and 16 in its model: set model.d_model=16",
        ),
        ("spelled", "model.encoder_layers=2", "model.encoder_layers is 2"),
        ("spelled", "model.decoder_layers=3", "model.decoder_layers is 3"),
        ("spelled", "model.heads=4", "model.heads is 4"),
        ("spelled", "model.ffn=64", "model.ffn is 64"),
        ("spelled", "model.scale_embedding=true", "set model.scale_embedding=false"),
        ("spelled", "model.user_ids=false", "model.user_ids is false"),
        ("spelled", "model.item_ids=false", "model.item_ids is false"),
        ("spelled", "model.id_dim=8", "model.id_dim is 8 in the recipe and 16"),
        ("spelled", "model.encoder_unit=item", "model.encoder_unit is item"),
        ("spelled", "model.positions=from-end", "model.positions is from-end"),
        ("spelled", "model.decoder_start=state", "model.decoder_start is state"),
        ("spelled", "tokens.trim=true", "tokens.trim is true"),
        ("spelled", "tokens.forced=given", "tokens.forced is given"),
        ("spelled", "model.max_tokens=80", "model.max_tokens 80: its model has 64 positions"),
        ("spelled", "pretrain.mask={strategy: multi, k: 3}", "mask.k 3: its tokenizer has 1 masks"),
        ("whole", "tokens.trim=false", "tokens.trim is false"),
    ],
)
def test_what_contradicts_the_model_is_refused_by_its_key(
    world: World, kind: str, override: str, said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        opened(world, kind, world.longer, override)
    assert said in str(caught.value)
    assert str(world.origin(kind)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_may_change_may(world: World) -> None:
    """Rates, dropout, losses, a shorter text, where the id tables live."""
    more = ["model.dropout=0.3", "model.max_tokens=40", "model.init_std=0.5", *ROWS]
    more.append("tokens.vocab_size=9999")
    setup, model, before = opened(world, "spelled", world.longer, *more)
    assert (model.config.dropout, model.config.max_input_tokens) == (0.3, 40)
    assert torch.equal(
        model.item_embedding.weight[: NUM_OLD_ITEMS + 1], before.item_embedding.weight
    )  # type: ignore[union-attr]
    assert len(setup.tokenizer) == len(load_run(world.origin("spelled")).tokenizer)


def test_other_data_are_refused(world: World, tmp_path: Path) -> None:
    other = prepare(world.folder / "old.txt", tmp_path / "other", seed=1)
    write_shards(other, tmp_path / "other" / "shards")
    row = r"its item row 0 is 'B\d+' with code '\d+', in .*other it is 'B\d+' with code"
    with pytest.raises(ValueError, match=row):
        opened(world, "spelled", tmp_path / "other")
    lines = tiny_log().splitlines()
    (tmp_path / "fewer.txt").write_text("\n".join(lines[:100]) + "\n")
    fewer = prepare(tmp_path / "fewer.txt", tmp_path / "fewer", numbering="random")
    write_shards(fewer, tmp_path / "fewer" / "shards")
    with pytest.raises(ValueError, match=r"user|item"):
        opened(world, "spelled", tmp_path / "fewer")
    gone = world.recipe("spelled", world.longer, "unset", f"init_from={tmp_path / 'gone'}")
    with pytest.raises(ValueError, match=r"gone: neither a run with best/ in it nor a model's dir"):
        build_setup(gone)


def test_weights_that_have_seen_validation_stay_out_of_it(world: World, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    shutil.copytree(world.origin("spelled"), seen)
    text = (seen / "recipe.yaml").read_text()
    (seen / "recipe.yaml").write_text(text.replace("trained_through: n-2", "trained_through: n-1"))
    more = [world.longer, "unset", f"init_from={seen}"]
    with pytest.raises(ValueError, match=r"trained_through n-2, and its weights have learned"):
        build_setup(world.recipe("spelled", *more))
    refit = world.recipe("spelled", *more, "trained_through=n-1")
    assert build_setup(refit)[0].warm_start is not None


def test_weights_of_another_split_may_know_what_is_held_out(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(world.origin("spelled"), other)
    config = json.loads((other / "best" / "config.json").read_text())
    assert config["split"] == "leave-one-out"
    config["split"] = "global-time 2014-05-01,2014-06-01"
    (other / "best" / "config.json").write_text(json.dumps(config))
    (other / "best" / "manifest.json").unlink()  # it has the hash of the file as it was
    split = "learned under the split global-time 2014-05-01,2014-06-01, .* has leave-one-out: they"
    with pytest.raises(ValueError, match=split):
        build_setup(world.recipe("spelled", world.longer, "unset", f"init_from={other}"))
    assert run_command(["evaluate", str(other), "--data", str(world.old)]) == 1
    assert not list(other.glob("metrics-*.json"))
    evaluate = ["evaluate", str(world.origin("spelled")), "--data", str(world.old)]
    assert run_command([*evaluate, "--out", str(tmp_path)]) == 0


# Runs


def weights(run: Path) -> dict[str, torch.Tensor]:
    return Checkpoint(list_checkpoints(run)[-1], {}, Ranks()).weights()


@pytest.mark.parametrize("kind", ["whole", "rows"])
def test_such_a_run_says_so_and_resumes_to_the_bit(world: World, kind: str, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    shutil.copytree(world.origin(kind), origin)
    often = ["checkpoint_every=2", "keep_checkpoints=99"]
    recipe = world.recipe(kind, world.longer, tmp_path / "run", f"init_from={origin}", *often)
    run = train(recipe)
    assert load_recipe(run / "recipe.yaml").init_from == str(origin)
    (start,) = events(run, "start")
    told = start["begun_from"]
    assert told["path"] == start["recipe"]["init_from"] == str(origin)
    assert (told["new_items"], told["new_users"]) == (NUM_NEW_ITEMS, 0 if kind == "whole" else 13)
    assert load_run(run).words.num_items == NUM_OLD_ITEMS + NUM_NEW_ITEMS
    state = json.loads((list_checkpoints(run)[0] / "state.json").read_text())
    assert state["identity"]["origin"] == told["weights_sha256"]
    expected, last = weights(run), list_checkpoints(run)[-1].name
    for path in list_checkpoints(run)[1:]:
        shutil.rmtree(path)
    train(recipe, resume="latest")
    assert list_checkpoints(run)[-1].name == last
    found = weights(run)
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert events(run, "start")[1]["resumed_from"]

    anew = world.recipe(kind, world.longer, run, *often)
    with pytest.raises(ValueError, match=r"its (origin|vocabulary) is not this run's"):
        train(anew, resume="latest")
    shutil.rmtree(origin)
    shutil.copytree(run / "best", origin / "best")
    with pytest.raises(ValueError, match="is not this run's"):
        train(recipe, resume="latest")


def test_the_command_begins_from_a_run_and_from_a_copy_of_its_model(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world.origin("whole") / "best", tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(world.recipe("whole", world.longer, tmp_path / "run")))
    assert run_command(["train", str(path), "--from", str(tmp_path / "model"), "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["items"] == NUM_OLD_ITEMS + NUM_NEW_ITEMS
    by_run = describe(world.warm_recipe("whole", world.longer))
    assert by_run["first loss"] == told["first loss"]
    fresh = describe(world.recipe("whole", world.longer, tmp_path / "run"))
    assert fresh["first loss"] != told["first loss"]
    assert run_command(["train", str(path), "--from", str(tmp_path / "gone")]) == 1
    assert "gone: neither a run" in capsys.readouterr().err


@pytest.mark.dist
@pytest.mark.ranks
def test_two_ranks_begin_with_the_same_weights(world: World, tmp_path: Path) -> None:
    """At a rate that moves nothing, what is kept of a run over two ranks is what it began with: DDP
    with sharded id tables, and weights that ZeRO shards."""
    still = ["finetune.learning_rate=1e-12", "pretrain.epochs=0", "optimizer.weight_decay=0.0"]
    still += ["validation.users=10", "optimizer.id_learning_rate=1e-12"]
    jobs = []
    for name, kind, stage in (
        ("ddp", "rows", None),
        ("zero-2", "whole", 2),
        ("zero-3", "spelled", 3),
    ):
        recipe = world.warm_recipe(kind, world.longer, *still, run=tmp_path / name)
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_recipe(recipe))
        job = {"name": name, "stage": stage, "recipe": str(path), "job": "train"}
        jobs.append({**job, "set": [], "resume": None})
    launch(jobs, tmp_path, 2)
    for job, kind in zip(jobs, ("rows", "whole", "spelled"), strict=True):
        assert json.loads((tmp_path / f"{job['name']}.json").read_text()).get("error") is None
        kept = dict(load_run(tmp_path / str(job["name"])).model.named_parameters())
        _, begun, _ = opened(world, kind, world.longer, *still)
        assert kept.keys() == dict(begun.named_parameters()).keys()
        for name, values in begun.named_parameters():
            torch.testing.assert_close(kept[name], values, atol=1e-8, rtol=1e-6)
