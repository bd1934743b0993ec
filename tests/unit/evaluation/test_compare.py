"""Compare: honest error rates on simulated runs, equality with brute force, Holm by hand, and what
is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from genrec_shards.dataset import Dataset
from genrec_shards.prepare import prepare
from result_files import write_results

from genrec_dist.baselines.run import run_baseline
from genrec_dist.config.recipe import Recipe
from genrec_dist.evaluation.bootstrap import (
    bootstrap_difference,
    distinct_tuples,
    holm,
    training_variance,
)
from genrec_dist.evaluation.compare import compare, conclusion
from genrec_dist.evaluation.compared_runs import seeds_of
from genrec_dist.evaluation.metrics import (
    METRICS,
    WEIGHTS,
)
from genrec_dist.evaluation.protocol import Protocol


def simulated(
    rng: np.random.Generator,
    num_users: int,
    seeds: tuple[int, int],
    training: float = 0.0,
    better: float = 0.0,
) -> np.ndarray:
    """Ranks int[S, U]: some users are easier than others, each run has its luck with each,
    trainings differ by `training`."""
    easy_U = rng.normal(-1.5, 1.0, num_users)
    runs = []
    for shift, count in zip((better, 0.0), seeds, strict=True):
        for _ in range(count):
            luck_U = rng.normal(0, 0.7, num_users)
            hit_U = easy_U + luck_U + training * rng.normal() + shift > 0
            runs.append(np.where(hit_U, 1 + np.minimum(rng.geometric(0.2, num_users), 19), 0))
    return np.stack(runs)


def share_rejected(seeds: tuple[int, int], times: int, **options) -> tuple[float, float]:
    """How often NDCG@10 is found to differ, and how often any metric after Holm, out of so many
    simulated comparisons."""
    one = any_ = 0
    for number in range(times):
        ranks_SU = simulated(np.random.default_rng(number), 400, seeds, **options)
        found = bootstrap_difference(
            *distinct_tuples(ranks_SU), seeds[0], resamples=300, seed=number
        )
        one += found["NDCG@10"].p < 0.05
        any_ += any(row.p_holm < 0.05 for row in found.values())
    return one / times, any_ / times


def test_no_difference_is_rarely_called_one():
    one, any_ = share_rejected((1, 1), 300)
    assert 0.015 <= one <= 0.09
    assert any_ <= 0.07


def test_trainings_that_differ_are_not_a_difference_of_recipes():
    one, any_ = share_rejected((3, 3), 120, training=0.3)
    assert one <= 0.1
    assert any_ <= 0.1
    # One run a side cannot know that; the verdict says so.
    assert share_rejected((1, 1), 60, training=0.3)[0] > 0.3


def test_seeds_that_differ_by_luck_alone_cost_little():
    one, _ = share_rejected((3, 3), 120)
    assert 0.0 < one <= 0.09


@pytest.mark.parametrize("seeds", [(1, 1), (3, 3), (3, 1)])
def test_a_real_difference_is_found(seeds):
    one, any_ = share_rejected(seeds, 20, better=0.6)
    assert one >= 0.9
    assert any_ >= 0.8


def test_it_equals_a_bootstrap_by_brute_force():
    ranks_SU = simulated(np.random.default_rng(5), 150, (3, 2), training=0.3, better=0.2)
    ranks_SU[ranks_SU > 10] = 0
    gains_SUM = np.stack([WEIGHTS[name][ranks_SU] for name in METRICS], axis=2)
    rng = np.random.default_rng(6)
    spreads = [
        (dof, np.sqrt(variance_by_loop(part) / len(part)))
        for part, dof in ((gains_SUM[:3], 2), (gains_SUM[3:], 1))
    ]
    draws = []
    for _ in range(8000):
        means_SM = gains_SUM[:, rng.integers(0, 150, 150)].mean(axis=1)
        draw_M = means_SM[:3].mean(axis=0) - means_SM[3:].mean(axis=0)
        for dof, spread_M in spreads:
            draw_M = draw_M + rng.standard_t(dof) * spread_M
        draws.append(draw_M)
    found = bootstrap_difference(*distinct_tuples(ranks_SU), 3, resamples=40_000)
    for m, name in enumerate(METRICS):
        ours, theirs = found[name], np.array(draws)[:, m]
        assert ours.difference == pytest.approx(
            gains_SUM[:3, :, m].mean() - gains_SUM[3:, :, m].mean()
        )
        low, high = np.percentile(theirs, [2.5, 97.5])
        assert ours.ci95 == pytest.approx((low, high), abs=0.12 * (high - low)), name
        assert ours.p == pytest.approx(
            2 * min((theirs <= 0).mean(), (theirs >= 0).mean()), abs=0.03
        )


def variance_by_loop(gains_SUM: np.ndarray) -> np.ndarray:
    """Mean squares of a table users x seeds without replication: (MS_seeds - MS_rest) / U."""
    S, U, M = gains_SUM.shape
    found = []
    for m in range(M):
        table = gains_SUM[:, :, m]
        between = U * sum((table[s].mean() - table.mean()) ** 2 for s in range(S)) / (S - 1)
        rest = sum(
            (table[s, u] - table[s].mean() - table[:, u].mean() + table.mean()) ** 2
            for s in range(S)
            for u in range(U)
        ) / ((S - 1) * (U - 1))
        found.append(max(between - rest, 0.0) / U)
    return np.array(found)


def test_training_variance_is_that_of_the_analysis_of_variance():
    ranks_SU = np.where(
        (found := simulated(np.random.default_rng(1), 90, (4, 0), training=0.3)) > 10, 0, found
    )
    tuples_KS, counts_K = distinct_tuples(ranks_SU)
    gains = np.stack([WEIGHTS[name][tuples_KS] for name in METRICS], axis=2)
    expected = variance_by_loop(np.stack([WEIGHTS[name][ranks_SU] for name in METRICS], axis=2))
    assert (expected > 0).all()
    assert training_variance(gains, counts_K) == pytest.approx(expected)
    assert training_variance(gains[:, :1], counts_K).tolist() == [0.0] * 4


def test_seeds_whose_means_differ_widen_the_interval():
    """The same ranks of each user dealt to other seeds: all users keep their means, the seeds lose
    their difference."""
    ranks_SU = simulated(np.random.default_rng(2), 400, (3, 3), training=0.3)
    rng = np.random.default_rng(0)
    dealt_SU = np.concatenate(
        [rng.permuted(ranks_SU[:3], axis=0), rng.permuted(ranks_SU[3:], axis=0)]
    )
    wide, narrow = (
        bootstrap_difference(*distinct_tuples(ranks), 3, resamples=4000)["NDCG@10"]
        for ranks in (ranks_SU, dealt_SU)
    )
    assert wide.difference == pytest.approx(narrow.difference)
    assert wide.ci95[1] - wide.ci95[0] > 1.5 * (narrow.ci95[1] - narrow.ci95[0])


def test_pairing_counts():
    """Two runs that agree on most users differ less by chance than two that have nothing in
    common."""
    rng = np.random.default_rng(3)
    a = simulated(rng, 400, (1, 0))[0]
    b = np.where(rng.random(400) < 0.1, rng.permutation(a), a)
    close, apart = (
        bootstrap_difference(*distinct_tuples(np.stack([a, other])), 1)["HR@10"]
        for other in (b, rng.permutation(b))
    )
    assert close.difference == pytest.approx(apart.difference)
    assert close.ci95[1] - close.ci95[0] < 0.6 * (apart.ci95[1] - apart.ci95[0])


def test_holm_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.3, 0.02])) == pytest.approx([0.3, 0.04])
    assert holm(np.array([0.9, 0.6, 0.7])) == pytest.approx([1.0, 1.0, 1.0])


def test_resamples_are_seeded_and_a_run_is_equal_to_itself():
    tuples = distinct_tuples(simulated(np.random.default_rng(4), 200, (1, 1)))
    assert bootstrap_difference(*tuples, 1, 500) == bootstrap_difference(*tuples, 1, 500)
    assert bootstrap_difference(*tuples, 1, 500) != bootstrap_difference(*tuples, 1, 500, seed=1)
    ranks_U = simulated(np.random.default_rng(4), 200, (1, 0))[0]
    for row in bootstrap_difference(
        *distinct_tuples(np.stack([ranks_U, ranks_U])), 1, 500
    ).values():
        assert (row.difference, row.ci95, row.p, row.p_holm) == (0.0, (0.0, 0.0), 1.0, 1.0)


NUM_USERS, NUM_ITEMS = 60, 50


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = [
        f"user-{user} " + " ".join(f"i{item}" for item in rng.permutation(NUM_ITEMS)[:6])
        for user in range(NUM_USERS)
    ]
    (folder / "log.txt").write_text("\n".join(lines))
    return prepare(folder / "log.txt", folder / "prepared")


def make_run(
    out: Path,
    dataset: Dataset,
    seed: int = 0,
    hits: float = 0.3,
    recipe: dict | None = None,
    top: int = 20,
    **protocol,
) -> Path:
    """Random lists with the target somewhere in the first ten for a share of the users."""
    rng = np.random.default_rng(seed)
    targets_U = dataset.sequences.history_and_target("test").targets
    lists_UN = np.stack([rng.permutation(NUM_ITEMS)[:top] for _ in range(NUM_USERS)])
    for user in np.flatnonzero(rng.random(NUM_USERS) < hits):
        others = lists_UN[user][lists_UN[user] != targets_U[user]][: top - 1]
        lists_UN[user] = np.insert(others, rng.integers(0, 10), targets_U[user])[:top]
    told = Protocol.of(
        dataset, **{"exclude_history": False, "beam": 20, "decode": "exact", **protocol}
    )
    write_results(
        out, system="genrec", split="test", dataset=dataset, user_rows=np.arange(NUM_USERS), lists_UN=lists_UN,
        scores_UN=-np.arange(top, dtype=np.float32) * np.ones((NUM_USERS, 1), np.float32),
        protocol=told, seconds=1.0, recipe={"seed": seed, "width": 64, "run": str(out), **(recipe or {})},
    )  # fmt: skip
    return out


def edit(run: Path, **changes) -> None:
    file = run / "metrics-test.json"
    metrics = json.loads(file.read_text())
    for key, value in changes.items():
        (metrics["protocol"] if key in metrics["protocol"] else metrics)[key] = value
    file.write_text(json.dumps(metrics))


def test_two_runs_from_their_files(tmp_path, dataset):
    good, bad = (
        make_run(tmp_path / "good", dataset, hits=0.9, top=30),
        make_run(tmp_path / "bad", dataset, hits=0.05),
    )
    found = compare(good, bad)
    for side, run in (("a", good), ("b", bad)):
        metrics = json.loads((run / "metrics-test.json").read_text())
        for name in METRICS:
            assert getattr(found.metrics[name], side) == pytest.approx(metrics[name])
    assert found.users == NUM_USERS
    assert found.metrics["HR@10"].p_holm < 0.01
    words = conclusion(found)
    assert "A is better in HR@5, NDCG@5, HR@10, NDCG@10 (on test, 60 users" in words
    assert "A and B stand for one training run" in words
    assert "B is better in" in compare(bad, good).verdict()
    assert "No difference that these lists can show" in compare(bad, bad).verdict()
    assert (
        json.loads(json.dumps(found.as_dict()))["metrics"]["HR@5"]["p"] == found.metrics["HR@5"].p
    )


def test_baselines_are_runs_too(tmp_path, dataset):
    for name in ("popularity", "knn", "repeat"):
        run_baseline(name, dataset, "validation", tmp_path / name, exclude_history=False)
    found = compare(tmp_path / "popularity", tmp_path / "knn", split="validation", resamples=200)
    assert (found.a.system, found.b.system, found.split) == ("popularity", "knn", "validation")
    assert "training run" not in found.verdict()
    assert (
        compare(tmp_path / "repeat", tmp_path / "knn", split="validation", resamples=200).users
        == NUM_USERS
    )


def test_a_folder_of_runs_is_one_recipe_with_several_seeds(tmp_path, dataset, monkeypatch):
    for seed in range(3):
        make_run(tmp_path / "a" / f"seed-{seed}", dataset, seed, hits=0.5)
        make_run(tmp_path / "b" / f"seed-{seed}", dataset, 10 + seed, hits=0.2)
    found = compare(tmp_path / "a", tmp_path / "b", resamples=500)
    means = [
        json.loads((tmp_path / "a" / f"seed-{seed}" / "metrics-test.json").read_text())["HR@10"]
        for seed in range(3)
    ]
    assert found.metrics["HR@10"].a == pytest.approx(np.mean(means))
    assert len(found.a.runs) == len(found.b.runs) == 3
    assert "3 seeds" in conclusion(found)
    assert "training run" not in found.verdict()
    monkeypatch.setattr("genrec_dist.evaluation.compared_runs._USERS_AT_ONCE", 7)
    assert compare(tmp_path / "a", tmp_path / "b", resamples=500) == found


def test_what_may_differ_is_told(tmp_path, dataset):
    a, b = (
        make_run(tmp_path / "a", dataset),
        make_run(tmp_path / "b", dataset, beam=50, decode="compact"),
    )
    edit(b, numbering="given")
    found = compare(a, b, resamples=200)
    assert found.differs == {
        "numbering": ["random", "given"],
        "beam": [20, 50],
        "decode": ["exact", "compact"],
    }
    assert "beam differs: 20 and 50" in conclusion(found)


@pytest.mark.parametrize(
    ("a", "b", "differs"),
    [
        ({}, {"beam": None, "decode": None}, {}),  # a baseline
        ({}, {"beam": 50, "decode": "items"}, {"decode": ["exact", "items"]}),
        ({"decode": "all"}, {"beam": 50, "decode": "all"}, {}),
    ],
)
def test_what_one_side_does_not_have_does_not_differ(tmp_path, dataset, a, b, differs):
    run_a, run_b = (
        make_run(tmp_path / name, dataset, **side) for name, side in (("a", a), ("b", b))
    )
    found = compare(run_a, run_b, resamples=200)
    assert found.differs == differs
    assert ("differs" in conclusion(found)) == bool(differs)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "ties",
            "shuffle",
            'different data: ties is "keep" in .*a and "shuffle" in .*b: .* one data directory',
        ),
        ("trained_through", "n-1", '^trained_through is "n-2" .* under one protocol'),
        ("exclude_history", True, "exclude_history is false in .*a and true in .*b"),
        ("users", {"sample": 60, "seed": 1}, 'users is "all"'),
    ],
)
def test_other_protocols_are_refused(tmp_path, dataset, key, value, said):
    a, b = make_run(tmp_path / "a", dataset), make_run(tmp_path / "b", dataset)
    edit(b, **{key: value})
    with pytest.raises(ValueError, match=said):
        compare(a, b)


def test_other_users_and_targets_are_refused(tmp_path, dataset):
    a, b = make_run(tmp_path / "a", dataset), make_run(tmp_path / "b", dataset)
    lists = b / "top20-test.parquet"
    table = pq.read_table(lists)
    users = table.column("user").to_pylist()
    pq.write_table(table.set_column(0, "user", [[*users[:41], "somebody", *users[42:]]]), lists)
    with pytest.raises(
        ValueError,
        match=r"different data: user 'user-41' in row 41 of .*a.*, 'somebody' in that of .*b",
    ):
        compare(a, b)
    targets = table.column("target").to_pylist()
    pq.write_table(table.set_column(1, "target", [[*targets[1:], targets[0]]]), lists)
    with pytest.raises(ValueError, match=r"different data: target .* in row 0"):
        compare(a, b)
    pq.write_table(table.slice(0, 30), lists)
    with pytest.raises(ValueError, match=r"different data: 60 users in .*a.*, 30 in .*b"):
        compare(a, b)


def test_files_that_do_not_belong_together_are_refused(tmp_path, dataset):
    a, b = make_run(tmp_path / "a", dataset), make_run(tmp_path / "b", dataset, seed=1)
    shutil.copy(a / "top20-test.parquet", b / "top20-test.parquet")
    with pytest.raises(
        ValueError, match=r"b: the lists give HR@5 .*, metrics say .*: evaluate again"
    ):
        compare(a, b)
    table = pq.read_table(b / "top20-test.parquet")
    whole = (b / "top20-test.parquet").read_bytes()
    # The header of its first page: an error of the system's kind, without the file's name.
    (b / "top20-test.parquet").write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    with pytest.raises(ValueError, match=r"top20-test\.parquet: not readable as Parquet"):
        compare(a, b)
    pq.write_table(table.drop_columns("rank"), b / "top20-test.parquet")
    with pytest.raises(
        ValueError, match=r"no column rank: it was written by an older version; evaluate again"
    ):
        compare(a, b)
    (b / "top20-test.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="not readable as Parquet"):
        compare(a, b)
    (b / "top20-test.parquet").unlink()
    with pytest.raises(ValueError, match=r"top20-test\.parquet: no such file: evaluate again"):
        compare(a, b)
    (b / "metrics-test.json").write_text('{"protocol": {}}')
    with pytest.raises(ValueError, match=r"metrics-test\.json: not a metrics file of this program"):
        compare(a, b)


def test_a_run_of_before_a_key_is_a_seed_of_the_recipe_with_its_default(tmp_path, dataset):
    recipe = Recipe("d", "r").as_dict()
    del recipe["seed"]
    make_run(tmp_path / "seeds" / "0", dataset, 0, recipe=recipe)
    older = {key: value for key, value in recipe.items() if key != "step_graph"}
    older["model"] = {k: v for k, v in recipe["model"].items() if k != "architecture"}
    make_run(tmp_path / "seeds" / "1", dataset, 1, recipe=older)
    assert len(seeds_of(tmp_path / "seeds", "test")) == 2
    make_run(tmp_path / "seeds" / "2", dataset, 2, recipe=older | {"step_graph": "on"})
    with pytest.raises(ValueError, match="step_graph differs"):
        seeds_of(tmp_path / "seeds", "test")


def test_runs_that_are_not_seeds_of_one_recipe_are_refused(tmp_path, dataset):
    folder, other = tmp_path / "seeds", make_run(tmp_path / "other", dataset)
    with pytest.raises(ValueError, match="no such directory"):
        compare(folder, other)
    make_run(folder / "0", dataset, 0)
    make_run(folder / "1", dataset, 1, recipe={"width": 128})
    with pytest.raises(
        ValueError, match=r"1: not of one recipe with .*0: width differs; compare them apart"
    ):
        compare(folder, other)
    make_run(folder / "1", dataset, 1, beam=50)
    with pytest.raises(ValueError, match="beam differs"):
        compare(folder, other)
    make_run(folder / "1", dataset, 0)
    with pytest.raises(ValueError, match=r"both have seed 0: one run twice is not two seeds"):
        compare(folder, other)
    (folder / "1" / "metrics-test.json").unlink()
    (folder / "1" / "recipe.yaml").write_text("seed: 1")
    with pytest.raises(ValueError, match=r"1: a run without metrics-test\.json: evaluate it too"):
        compare(folder, other)
    with pytest.raises(
        ValueError,
        match=r"no metrics-validation\.json in it, nor in a folder of it: run `genrec evaluate",
    ):
        compare(other, other, split="validation")
    with pytest.raises(ValueError, match="50 resamples tell nothing"):
        compare(other, other, resamples=50)


def test_the_command_prints_a_table_and_writes_json(tmp_path, dataset, capfd):
    from genrec_dist.cli.app import run_command

    a, b = make_run(tmp_path / "a", dataset, hits=0.9), make_run(tmp_path / "b", dataset, hits=0.1)
    assert (
        run_command(
            ["compare", str(a), str(b), "--resamples", "300", "--json", str(tmp_path / "c.json")]
        )
        == 0
    )
    printed = capfd.readouterr().out
    for words in ("95 % interval", "p (Holm)", f"A: {a} (genrec, 1 run)", "A is better in HR@5"):
        assert words in printed, printed
    assert json.loads((tmp_path / "c.json").read_text())["verdict"].startswith("A is better in")
    assert run_command(["compare", str(a), str(tmp_path / "none")]) == 1
    assert "no such directory" in capfd.readouterr().err
