"""What a person sees of a training: in terminals of any width, and in a log file."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from genrec_shards.storage.sample_order import SampleOrder
from rich.console import Console

from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Stage
from genrec_dist.training import progress
from genrec_dist.training.progress import TrainingDisplay, clock, fitting, introduction
from genrec_dist.training.setup import build_setup
from genrec_dist.training.stages import StageSteps

FIELDS = {
    "tokens_per_second": 12_345.0,
    "mfu": 0.11,
    "padding_share": 0.2,
    "data_wait_share": 0.0,
    "peak_memory_gib": 1.25,
}
SCORES = {"loss": 2.5, "HR@10": 0.0612, "NDCG@10": 0.0345}


def two_stages() -> list[StageSteps]:
    """1,500 steps of pretraining in 2 epochs, then 3,000 of finetuning in 4."""
    lengths = np.full(3000, 6)
    plans = [SampleOrder(lengths, 100, space="user", batch_size=4, seed=0) for _ in range(2)]
    return [
        StageSteps("pretrain", Stage(epochs=2), plans[0], first_step=0, first_epoch=0),
        StageSteps("finetune", Stage(epochs=4), plans[1], first_step=1500, first_epoch=2),
    ]


def display_of(width: int, terminal: bool) -> tuple[TrainingDisplay, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    return TrainingDisplay(two_stages(), 0, console=console), file


def a_run(display: TrainingDisplay) -> None:
    """The first epoch of each stage, as the loop tells it; a step takes 2 seconds."""
    with display:
        display.say(["a line at the start, of " + "many words " * 10], wrap=True)
        for name, first in (("pretrain", 0), ("finetune", 1500)):
            for step in range(first, first + 750):
                display.advance(name, step + 1, 2.0 if step > first else 60.0)
                if step % 250 == 249:
                    display.show(3.2109, FIELDS)
            display.end_epoch(name, 0, SCORES if name == "finetune" else None, seconds=30.0)
        display.say_stopping(2)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_steps_and_time_left_are_whole_at_any_width_and_facts_go_from_the_right(
    width: int,
) -> None:
    display, _ = display_of(width, terminal=True)
    a_run(display)
    facts = ["loss 3.211", "NDCG@10 0.0345", "12,345 tokens/s", "MFU 11%", "padding 20%"]
    facts.append("1.2 GiB")
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(display._render())
    lines = console.export_text().splitlines()
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)
    # 2,250 steps of 2 seconds, and three validations of 30.
    assert re.match(r"finetune .*  750/3,000  1:16:30 left", lines[1]), lines[1]
    shown = [fact in lines[1] for fact in facts]
    assert shown == sorted(shown, reverse=True)
    assert re.sub(r".* left *", "", lines[1]) == "  ".join(facts[: sum(shown)])
    assert sum(shown) == {40: 0, 60: 1, 80: 2, 120: 4, 200: 6}[width]


def test_in_a_terminal_epochs_stay_in_its_history() -> None:
    display, file = display_of(80, terminal=True)
    a_run(display)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    lines = re.split(r"[\r\n]+", text)
    assert max(map(len, lines)) <= 80
    epochs = [line for line in lines if " epoch 1/" in line]
    assert len(epochs) == 2
    assert epochs[1].startswith("finetune epoch 1/4  NDCG@10 0.0345  HR@10 0.0612")
    assert "pretrain: about 49 min 48 s for 1,494 more steps, by the first of them" in text
    assert "stopping after this step, then a checkpoint; again: end without one" in text


def test_in_a_log_file_each_event_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    display, file = display_of(80, terminal=False)
    a_run(display)
    lines = file.getvalue().splitlines()
    assert [line.split("  ")[0].split(",")[0].split(" of")[0] for line in lines] == [
        "a line at the start",
        "pretrain: about 49 min 48 s for 1",
        "pretrain epoch 1/2",
        "finetune: about 1 h 39 min for 2",
        "finetune epoch 1/4",
        "stopping after this step",
    ]
    assert lines[4].endswith("loss 3.211  12,345 tokens/s  MFU 11%  padding 20%  1.2 GiB")
    assert len(lines[4]) > 80
    # After a while without a line comes one in between.
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    display, file = display_of(80, terminal=False)
    a_run(display)
    between = [line for line in file.getvalue().splitlines() if "/3,000" in line]
    assert between == [
        "finetune    250/3,000  1:31:40 left  loss 3.211  12,345 tokens/s  MFU 11%  "
        "padding 20%  1.2 GiB",
        "finetune    500/3,000  1:23:20 left  loss 3.211  12,345 tokens/s  MFU 11%  "
        "padding 20%  1.2 GiB",
    ]


def test_other_ranks_say_nothing() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True)
    a_run(TrainingDisplay(two_stages(), 0, active=False, console=console))
    assert file.getvalue() == ""


def test_a_stage_is_foretold_by_its_first_seconds_where_steps_take_long() -> None:
    display, file = display_of(200, terminal=False)
    for step in range(5):
        display.advance("pretrain", step + 1, 7.0 if step else 100.0)
    assert (
        file.getvalue() == "pretrain: about 2 h 54 min for 1,497 more steps, by the first of them\n"
    )


def test_the_first_line_names_users_items_parameters_steps_and_device(tiny_recipe: Path) -> None:
    recipe = load_recipe(tiny_recipe, ["finetune.epochs=2"])
    setup, _ = build_setup(recipe)
    line = " ".join(introduction(setup, 123_456, torch.device("cpu"), 1, step=4))
    threads = torch.get_num_threads()
    assert line == (
        f"{recipe.run}: 120 users, 64 items; 123,456 parameters; 3 steps of pretrain in 1 epoch, "
        f"6 steps of finetune in 2 epochs, from step 4 on; CPU, {threads} "
        f"thread{'s' * (threads > 1)}, fp32, micro-batches of up to "
        f"{recipe.micro_batch_tokens:,} tokens"
    )


def test_parts_that_fit_and_clocks() -> None:
    assert fitting(["ab", "cd", "ef"], 6) == ["ab", "cd"]
    assert fitting(["abcdef"], 3) == []
    assert [clock(seconds) for seconds in (0, 61, 3661)] == ["0:00", "1:01", "1:01:01"]
