"""AdamW's groups, the learning rate's course, and the running average."""

import math

import pytest
import torch
from torch import nn

from genrec_dist.config.recipe import Model, Optimizer, Stage
from genrec_dist.model.build import ModelSizes, build_model
from genrec_dist.model.optimizer import AveragedWeights, build_optimizer, peak_share

SCHEDULES = ["linear", "cosine", "constant"]


@pytest.fixture(scope="module")
def model():
    shape = Model(d_model=8, encoder_layers=1, decoder_layers=1, heads=2, ffn=16, max_tokens=16)
    special = {"bos": 0, "pad": 1, "eos": 2, "mask": 4}
    sizes = {"vocab_size": 20, "num_users": 3, "num_items": 4, "num_masks": 1}
    return build_model(shape, ModelSizes(**sizes, special=special))


def decay_by_name(model, decay: str) -> dict[str, float]:
    """Of each parameter; each is in one group."""
    groups = build_optimizer(model, Optimizer(decay=decay, weight_decay=0.25)).param_groups
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay_of)
    return {name: decay_of[id(parameter)] for name, parameter in model.named_parameters()}


def test_build_optimizer_decays_what_the_recipe_says(model):
    assert set(decay_by_name(model, "all").values()) == {0.25}
    assert set(decay_by_name(model, "none").values()) == {0.0}
    decayed = decay_by_name(model, "matrices")
    assert decayed["user_embedding.weight"] == decayed["item_embedding.weight"] == 0.0
    matrices = ("proj.weight", "fc1.weight", "fc2.weight", "shared.weight")
    for name, value in decayed.items():
        if "bias" in name or "norm" in name:
            assert value == 0.0, name
        elif name.endswith(matrices):
            assert value == 0.25, name
    assert sum(value > 0 for value in decayed.values()) > 10
    optimizer = build_optimizer(model, Optimizer(betas=(0.7, 0.8), eps=1e-5))
    settings = {(group["betas"], group["eps"]) for group in optimizer.param_groups}
    assert settings == {((0.7, 0.8), 1e-5)}


def rates(num_steps: int, **knobs) -> list[float]:
    stage = Stage(learning_rate=2.0, **knobs)
    return [stage.learning_rate * peak_share(stage, step, num_steps) for step in range(num_steps)]


def test_the_learning_rate_rises_evenly_and_falls_by_its_schedule():
    rising = pytest.approx([0.2 * (step + 1) for step in range(10)])
    courses = [rates(100, warmup_fraction=0.1, schedule=schedule) for schedule in SCHEDULES]
    for course in courses:
        assert course[:10] == rising
        assert course[10] == max(course) == 2.0
    assert rates(10, warmup_fraction=0.0)[0] == 2.0
    assert rates(10, warmup_fraction=1.0) == rising
    linear, cosine, constant = courses
    assert linear[10:] == pytest.approx([2.0 * (1 - step / 90) for step in range(90)])
    assert cosine[55] == pytest.approx(1.0)
    assert cosine[10:] == pytest.approx([1 + math.cos(math.pi * step / 90) for step in range(90)])
    assert 0 < cosine[-1] < linear[-1] == pytest.approx(2 / 90)
    assert constant[10:] == [2.0] * 90


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fraction", [0.0, 0.05, 1.0])
def test_a_stage_of_one_step_takes_it_at_full_rate(schedule, fraction):
    assert rates(1, warmup_fraction=fraction, schedule=schedule) == [2.0]


def test_swapping_the_average_once_exchanges_and_twice_changes_nothing():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]
    average = AveragedWeights(weights, 0.9)
    # Of weights that rest it is these weights.
    for step in range(50):
        average.update(step)
    torch.testing.assert_close(average.values, [weight.detach() for weight in weights])
    for weight in weights:
        weight.data.add_(1.0)
    average.update(5)
    before, held = (
        [value.detach().clone() for value in each] for each in (weights, average.values)
    )
    average.swap()
    assert all(torch.equal(weight, value) for weight, value in zip(weights, held, strict=True))
    assert not torch.equal(weights[0], before[0])
    average.swap()
    assert all(torch.equal(weight, value) for weight, value in zip(weights, before, strict=True))
    assert all(torch.equal(value, kept) for value, kept in zip(average.values, held, strict=True))


def test_the_average_follows_its_recurrence():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    average = AveragedWeights([weight], 0.5)
    expected = 0.0
    for step in range(30):
        weight.data.fill_(float(step))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert float(average.values[0]) == pytest.approx(expected)
    weight.data[0] = float("nan")  # it does not hide what is no number
    average.update(30)
    assert torch.isnan(average.values[0][0])
