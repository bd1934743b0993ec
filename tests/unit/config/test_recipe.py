"""The recipe: what does not fit is refused by name, in one line; what is written down reads back
equal."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT

from genrec_dist.config.load import dump_recipe, load_recipe
from genrec_dist.config.native_precision import slow_precision, with_precision
from genrec_dist.config.recipe import Mask, Model, Recipe, Stage
from genrec_dist.config.validate import LIMITS, check_recipe

SHIPPED = sorted((ROOT / "genrec_dist" / "recipes").glob("*.yaml"))
SMALLEST = {"data": "d", "run": "r", "finetune": {"epochs": 1}}


@pytest.fixture
def write(tmp_path):
    def write_recipe(values) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return path

    return write_recipe


def refusal(path, overrides=None) -> str:
    with pytest.raises(ValueError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"model": {"d_modle": 8}}, "model.d_modle"),
        ({"pretrain": {"mask": {"q": 1}}}, "pretrain.mask.q"),
        ({"lr": 1}, "unknown key lr"),
        ({"model": {"heads": "four"}}, "model.heads: 'four' is not a whole number"),
        ({"model": {"heads": True}}, "model.heads: True is not a whole number"),
        ({"model": {"heads": 4.0}}, "model.heads: 4.0 is not a whole number"),
        ({"model": {"user_ids": 1}}, "model.user_ids: 1 is not true or false"),
        ({"model": {"backbone": 3}}, "model.backbone: 3 is not a text"),
        ({"model": {"dropout": "much"}}, "model.dropout: 'much' is not a number"),
        ({"model": {"dropout": True}}, "model.dropout: True is not a number"),
        ({"model": None}, "model: None is not a section"),
        ({"precision": "fp8"}, "precision: 'fp8' is none of auto, fp32, bf16, fp16"),
        ({"pretrain": {"mask": {"strategy": "last"}}}, "mask.strategy: 'last' is none of single,"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas: [0.9] is not a list of 2 values"),
        ({"optimizer": {"betas": [0.9, "x"]}}, "optimizer.betas: 'x' is not a number"),
    ],
)
def test_what_does_not_fit_is_named_with_file_and_key(write, values, key):
    path = write({**SMALLEST, **values})
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert key in message


def test_a_file_that_is_no_recipe_is_named(write, tmp_path):
    assert "not YAML" in refusal(write("a: [1,\nb: }"))
    assert "mapping" in refusal(write("- 1\n- 2"))
    assert "run is missing" in refusal(write({"data": "d"}))
    assert "no such recipe file; shipped recipes: " in refusal(tmp_path / "none.yaml")
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"data: \xff\xfe")
    assert str(path) in refusal(path)


def test_set_reaches_nested_keys_and_makes_missing_sections(write):
    path, epochs = write(SMALLEST), ["pretrain.mask.strategy=multi", "pretrain.epochs=2"]
    recipe = load_recipe(path, [*epochs, "model.d_model=64", "shards=null"])
    assert recipe.pretrain.mask == Mask(strategy="multi")
    assert (recipe.pretrain.epochs, recipe.model.d_model, recipe.shards) == (2, 64, None)
    assert recipe.finetune.epochs == 1
    assert load_recipe(path, ["run=a=b"]).run == "a=b"
    assert load_recipe(path, ["optimizer.betas=[0.8, 0.9]"]).optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "write it as dotted.key=value"),
        ("=1", "write it as dotted.key=value"),
        ("seed.deep=1", "seed is a value"),
        ("model.nothing=1", "unknown key model.nothing"),
        ("run=[", "--set run=[: not YAML"),
        ("run=@here", "--set run=@here: not YAML"),
    ],
)
def test_a_wrong_set_is_refused_in_one_line(write, override, said):
    assert said in refusal(write({**SMALLEST, "seed": 3}), [override])


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_every_way_to_write_a_rate_is_a_number(write, text):
    path = write(f"data: d\nrun: r\nfinetune: {{epochs: 1, learning_rate: {text}}}")
    assert load_recipe(path).finetune.learning_rate == 1e-3
    assert load_recipe(path, [f"pretrain.learning_rate={text}"]).pretrain.learning_rate == 1e-3


def test_a_whole_number_serves_as_a_rate_and_stays_a_float(write):
    rate = load_recipe(
        write({**SMALLEST, "optimizer": {"max_grad_norm": 1}})
    ).optimizer.max_grad_norm
    assert isinstance(rate, float)


IMPOSSIBLE = """
pretrain.epochs=-1 finetune.batch_size=0 finetune.learning_rate=0 pretrain.learning_rate=.nan
finetune.learning_rate=.inf pretrain.warmup_fraction=1.1 pretrain.mask.p=0 finetune.mask.k=0
finetune.label_smoothing=1 model.heads=0 model.d_model=0 model.dropout=1 model.init_std=0
model.embedding_dropout=-.1 model.max_tokens=15 model.encoder_layers=0 micro_batch_tokens=100
workers=-1 keep_checkpoints=0 checkpoint_every=-1 checkpoint_minutes=-1 log_every=0 validation.users=-1 validation.beam=0
validation.every_epochs=0 validation.patience=-1 optimizer.ema_decay=1 optimizer.eps=0
model.d_model=1000000000 model.ffn=1000000000000
model.encoder_layers=1000000 model.decoder_layers=1000000 model.heads=1000000000
model.id_dim=1000000000 model.max_tokens=1000000000 optimizer.betas=[1,0.9] optimizer.weight_decay=-1 optimizer.max_grad_norm=-1
"""


@pytest.mark.parametrize("override", IMPOSSIBLE.split())
def test_values_no_run_can_have_are_refused_with_key_and_value(write, override):
    path = write(SMALLEST)
    message = refusal(path, [override])
    assert message.startswith(f"{path}: ")
    assert override.split("=")[0] in message


def test_values_that_do_not_go_together_are_refused(write):
    path = write(SMALLEST)
    for overrides, message in (
        (["model.d_model=130"], "model.d_model 130 is no multiple of model.heads 4"),
        (["finetune.epochs=0"], "nothing to train"),
        (["micro_batch_tokens=500"], "micro_batch_tokens 500 is below model.max_tokens 512"),
        (["optimizer={id_tables: row-adagrad, decay: all}"], "row-adagrad decays no ids"),
        (["precision=fp16", "optimizer.id_tables=row-adagrad"], "set precision bf16"),
        (["validation.decode=items"], "there is no item head: set model.item_loss"),
        (["model={item_loss: 1, item_ids: false}"], "set model.item_ids true"),
        (["finetune.targets=all-prefixes"], "set model.encoder_attention causal"),
        (["finetune.targets=mask", "model.encoder_attention=causal"], "sees nothing after a mask"),
    ):
        assert message in refusal(path, overrides)


def test_every_number_of_a_recipe_has_its_limit():
    # Any seed will do, the tokenizer checks its own size, and trackers are names.
    free = {"seed", "tokens.vocab_size", "auto_keys", "tracker"}
    assert _numbers(Recipe("d", "r"), "") - free == set(LIMITS)


def _numbers(section, prefix: str) -> set[str]:
    found = set()
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            found |= _numbers(value, f"{prefix}{field.name}.")
        elif isinstance(value, int | float | tuple) and not isinstance(value, bool):
            found.add(f"{prefix}{field.name}")
    return found


strategies = st.sampled_from(["span", "multi"])
recipes = st.builds(
    Recipe,
    data=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1),
    run=st.sampled_from(["null", "1e3", "007", "no", "a: b", "~"]),
    shards=st.sampled_from([None, "elsewhere"]),
    seed=st.integers(),
    model=st.builds(Model, dropout=st.floats(0, 0.99), backbone=st.sampled_from([None, "a/b"])),
    pretrain=st.builds(Stage, st.just(1), learning_rate=st.floats(1e-12, 10)),
    finetune=st.builds(Stage, mask=st.builds(Mask, strategies, k=st.integers(1, 9))),
)


@given(recipe=recipes)
@settings(max_examples=60, deadline=None)
def test_a_dumped_recipe_loads_back_equal(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_by_name_and_survives_a_round_trip(path, write):
    recipe = load_recipe(path.stem)
    assert recipe == load_recipe(path)
    check_recipe(recipe)
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_pretraining_masks_unless_it_says_otherwise(write):
    for pretrain, targets in (
        (None, "mask"),
        ({"epochs": 1}, "mask"),
        ({"epochs": 1, "targets": "last"}, "last"),
    ):
        recipe = load_recipe(write({**SMALLEST, **({"pretrain": pretrain} if pretrain else {})}))
        assert (recipe.pretrain.targets, recipe.finetune.targets) == (targets, "last")


def test_masks_are_counted_only_where_a_stage_numbers_them():
    multi = Stage(epochs=1, targets="mask", mask=Mask("multi", k=5))
    for pretrain, num_masks in (
        (multi, 5),
        (dataclasses.replace(multi, epochs=0), 1),
        (dataclasses.replace(multi, targets="last"), 1),
        (dataclasses.replace(multi, mask=Mask("span", k=5)), 1),
    ):
        assert Recipe("d", "r", pretrain=pretrain).num_masks == num_masks


def test_shards_lie_inside_the_data_unless_named():
    assert Recipe("d", "r").shards_dir == str(Path("d/shards"))
    assert Recipe("d", "r", shards="s").shards_dir == "s"


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")],
)
def test_auto_precision_is_bf16_where_the_cpu_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, amx: bool, avx512: bool, expected: str
) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = Recipe("d", "r", precision="auto")
    assert with_precision(recipe).precision == expected
    assert with_precision(Recipe("d", "r", precision="fp16")).precision == "fp16"
    # What is asked for is done, and said to be slow where it is.
    assert bool(slow_precision(Recipe("d", "r", precision="bf16"))) == (expected != "bf16")
    assert not slow_precision(with_precision(recipe))
    # A resumed run keeps what it began with, on whatever machine.
    for begun in ("fp32", "bf16"):
        (tmp_path / "recipe.yaml").write_text(
            f"data: d\nrun: r\nprecision: {begun}\nfinetune: {{epochs: 1}}\n"
        )
        assert with_precision(recipe, tmp_path).precision == begun
    assert with_precision(recipe, tmp_path / "new").precision == expected
    # A run whose file still says auto, written before its training began.
    (tmp_path / "recipe.yaml").write_text(
        "data: d\nrun: r\nprecision: auto\nfinetune: {epochs: 1}\n"
    )
    assert with_precision(recipe, tmp_path).precision == expected
