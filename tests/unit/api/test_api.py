"""The public API: small, lazy, known to transformers, and enough for a notebook."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from genrec_shards.prepare import prepare
from two_ranks import environment

import genrec_dist

PUBLIC = [
    "GenRecConfig",
    "GenRecForConditionalGeneration",
    "Recommender",
    "compare",
    "evaluate",
    "load_recipe",
    "prepare",
    "train",
]


def in_fresh_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=400, env=environment()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_import_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, genrec_dist; print({'torch', 'transformers'} & sys.modules.keys())"
    assert in_fresh_python(code) == "set()"


def test_every_public_name_is_listed_and_documented() -> None:
    assert genrec_dist.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(genrec_dist))
    for name in PUBLIC:
        text = getattr(genrec_dist, name).__doc__
        assert text, name
        assert len(text) > 60, name
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        genrec_dist.Trainer  # noqa: B018


IMPORTS = [
    "import genrec_dist; from transformers import AutoConfig, AutoModelForSeq2SeqLM",
    "from transformers import AutoConfig, AutoModelForSeq2SeqLM; import genrec_dist",
    "import genrec_dist.model.genrec; from transformers import AutoConfig, AutoModelForSeq2SeqLM",
]
# Torch is loaded once for all; each order of imports has a process of its own.
EACH_IN_A_FORK = """
import os, sys, torch
assert not {"transformers", "genrec_dist"} & sys.modules.keys()
for code in CODES:
    if (child := os.fork()) == 0:
        exec(code, {})
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, code
"""


def test_auto_classes_load_a_run_whatever_is_imported_first(tiny_run: Path, tmp_path: Path) -> None:
    from genrec_dist.config.recipe import Model
    from genrec_dist.model.build import ModelSizes, build_model

    special = {"bos": 0, "pad": 1, "eos": 2, "mask": 4}
    sizes = ModelSizes(vocab_size=40, num_users=2, num_items=9, num_masks=1, special=special)
    shape = Model(architecture="t5", d_model=16, heads=2, ffn=16, max_tokens=32)
    build_model(shape, sizes).save_pretrained(tmp_path)
    best = str(tiny_run / "best")
    codes = [
        f"{imports}\n"
        f"print(type(AutoConfig.from_pretrained({best!r})).__name__)\n"
        f"print(type(AutoModelForSeq2SeqLM.from_pretrained({best!r})).__name__)\n"
        f"print(type(AutoModelForSeq2SeqLM.from_pretrained({str(tmp_path)!r})).__name__)"
        for imports in IMPORTS
    ]
    said = in_fresh_python(f"CODES = {codes!r}\n{EACH_IN_A_FORK}").split()
    bart, t5 = "GenRecForConditionalGeneration", "GenRecT5ForConditionalGeneration"
    assert said == ["GenRecConfig", bart, t5] * len(IMPORTS)


def test_a_notebook_trains_evaluates_and_recommends(tiny_recipe: Path, tiny_data: Path) -> None:
    from genrec_dist import Recommender, evaluate, load_recipe, train

    recipe = load_recipe(tiny_recipe, ["pretrain.epochs=0"])
    run = train(recipe)
    assert run == Path(recipe.run)
    assert (run / "report.html").is_file()
    metrics = evaluate(run, "test", out_dir=run / "lists")
    written = json.loads((run / "lists" / "metrics-test.json").read_text())
    assert json.loads(json.dumps(metrics)) == written
    assert written["recipe"] == json.loads(json.dumps(recipe.as_dict()))
    lists = pq.read_table(run / "lists" / "top20-test.parquet")
    assert lists.num_rows == metrics["users"]
    history = pq.read_table(tiny_data / "items.parquet")["id"].to_pylist()[:3]
    (answer,) = Recommender.load(run).recommend([history], k=5)
    assert len(answer.items) == 5
    assert not {*answer.items} & {*history}


def test_evaluate_refuses_other_data(tiny_run: Path, tmp_path: Path) -> None:
    from genrec_dist import evaluate

    (tmp_path / "log.txt").write_text("".join(f"u{n} a b c d{n}\n" for n in range(9)))
    prepare(tmp_path / "log.txt", tmp_path / "data")
    with pytest.raises(ValueError, match="numbering"):
        evaluate(tiny_run, data=tmp_path / "data", out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"none: no recipe.yaml in it; is it a directory of"):
        evaluate(tmp_path / "none")


def test_prepare_takes_the_unit_of_times(tmp_path: Path) -> None:
    from genrec_dist import prepare

    rows = [f"u{n},i{k},{1_000_000_000 + k}" for n in range(9) for k in range(6)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,time", *rows]) + "\n")
    # Of seconds, which `auto` takes these for, all would be of 2001 and left out.
    options = {"time_unit": "ms", "until": "1971-01-01", "k_core": 0}
    data = prepare(tmp_path / "log.csv", tmp_path / "data", **options)
    assert json.loads((data / "dataset.json").read_text())["interactions"] == 54
