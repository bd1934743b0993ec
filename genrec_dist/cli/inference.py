"""The commands `genrec evaluate` and `genrec recommend`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from genrec_dist.cli.options import (
    AllowOption,
    BeamOption,
    BlockOption,
    DataOption,
    DecodeOption,
    ExcludeOption,
    RunArgument,
    Split,
    YesNo,
    exclude,
)
from genrec_dist.console import UsageError, out, rank, say, working, world_size

if TYPE_CHECKING:
    import torch

    from genrec_dist.inference.recommend import Recommender

# Modules are imported inside the commands: `genrec --help` must not wait for torch.


def evaluate(
    run: RunArgument,
    split: Annotated[Split, typer.Option(help="Which items are the targets.")] = "test",
    beam: Annotated[
        int, typer.Option(help="Width of the beam; one narrower than the lists is widened.", min=1)
    ] = 20,
    top: Annotated[int, typer.Option(help="Length of the lists; metrics need 20.")] = 20,
    decode: DecodeOption = None,
    item_weight: Annotated[
        float | None,
        typer.Option(
            help="Of the item head in hybrid; default: as --tune-weights chose, else 1.", min=0.0
        ),
    ] = None,
    graph_weight: Annotated[
        float | None,
        typer.Option(
            help="Of the transition graph in hybrid; default: as chosen, else 0.", min=0.0
        ),
    ] = None,
    graph_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--graph-set",
            help="epsilon=value of the mixture, text.key=value of its texts (weight, epsilon, "
            "source, recent, decay, power), or key=value of the graph's kNN; repeatable.",
        ),
    ] = None,
    tune_weights: Annotated[
        bool,
        typer.Option(
            "--tune-weights",
            help="Choose hybrid's weights on validation anew, into RUN/hybrid.json; no lists. The "
            "graph's settings are chosen too, unless --graph-set gives one.",
        ),
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(
            help="With --tune-weights, by what hybrid compares the items' texts: words, factors, "
            "wordllama, a sentence-transformers directory, or none; default: as the recipe says."
        ),
    ] = None,
    exclude_history: ExcludeOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Users decoded at once.", min=1)] = 512,
    users: Annotated[
        int, typer.Option(help="Size of a seeded sample of users; 0: all of them.", min=0)
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of that sample.", min=0)] = 0,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Directory for metrics and lists, if not RUN, to keep those of two --decode.",
        ),
    ] = None,
    data: DataOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Test, though the training has not come to its end.")
    ] = False,
) -> None:
    """Decode every user once, score the lists, and show the baselines beside them; under accelerate
    launch or torchrun on several processes.

    Weights of --decode hybrid are chosen on validation, where RUN/hybrid.json does not hold them
    yet, and then used for test.

    Example: genrec evaluate runs/beauty --split test
    """
    from genrec_dist.config.paths import (
        best_folder,
        check_training_is_over,
        check_writable,
        data_of,
        recipe_of,
    )
    from genrec_dist.evaluation.metrics import TOP

    if top < TOP:
        raise UsageError(f"--top {top}: metrics look at {TOP} places, give --top {TOP} or more")
    recipe = recipe_of(run)
    decode = decode or (recipe.decode if recipe else "exact")
    if tune_weights and (decode != "hybrid" or split != "validation"):
        raise UsageError("--tune-weights goes with --decode hybrid --split validation")
    if tune_weights and users:
        raise UsageError("--tune-weights looks at all users: leave out --users")
    if tune_weights and out_dir is not None:
        raise UsageError("--tune-weights writes RUN/hybrid.json and no lists: leave out --out")
    if text is not None and not tune_weights:
        raise UsageError("--text goes with --tune-weights: hybrid.json holds what was chosen by it")
    if tune_weights and any(setting.startswith("text.") for setting in graph_settings or []):
        raise UsageError("--tune-weights chooses the texts' settings: leave out --graph-set text.")
    if decode != "hybrid" and (graph_weight is not None or graph_settings):
        raise UsageError(
            f"--decode {decode} has no graph: "
            "--graph-weight and --graph-set go with --decode hybrid"
        )
    data = data or data_of(run)
    best_folder(run)  # before torch is loaded
    if out_dir is None and not tune_weights:
        check_writable(run)
    if split == "test" and not force:
        check_training_is_over(run)
    with working():
        from genrec_shards.dataset import load_dataset

        from genrec_dist.distributed.collectives import Ranks
        from genrec_dist.evaluation.table import format_table
        from genrec_dist.inference.evaluate import evaluate as run_evaluate
        from genrec_dist.inference.load import load_run
        from genrec_dist.inference.rank_users import Decoding
        from genrec_dist.inference.tune_mixture import chosen_decoding, mixed_decoding, tune_mixture
        from genrec_dist.report.advice import advice
        from genrec_dist.report.run_files import read_run_files
        from genrec_dist.report.run_report import write_report
        from genrec_dist.tracking.trackers import IDS, Trackers

    trained_through = recipe.trained_through if recipe else "n-2"
    text = text or (recipe.text if recipe else "words")
    dataset = load_dataset(data)
    num_users = len(dataset.sequences.history_and_target(split).users)
    sampled = 0 < users < num_users
    with _process_group() as device:
        # Without transformers, which takes longer to import than a small evaluation.
        loaded = load_run(run, device, light=True)
        decoding = Decoding(
            beam=beam,
            top=top,
            mode=decode,
            batch_size=batch_size,
            exclude_history=exclude(exclude_history, loaded.model.config.exclude_history),
        )
        given = item_weight is not None or graph_weight is not None or bool(graph_settings)
        if decode == "hybrid" and not given and not tune_weights:
            with _progress("weights", num_users) as advance:
                decoding = chosen_decoding(
                    loaded,
                    dataset,
                    decoding,
                    trained_through,
                    text=text,
                    ranks=Ranks(),
                    on_choice=lambda choice: say(
                        f"hybrid's weights, chosen on validation {choice}"
                    ),
                    on_batch=advance,
                )
        elif decode == "hybrid":
            decoding = mixed_decoding(
                loaded,
                dataset,
                decoding,
                trained_through,
                item_weight=item_weight,
                graph_weight=graph_weight,
                overrides=graph_settings,
                anew=tune_weights,
            )
        if tune_weights:
            with _progress("weights", num_users) as advance:
                choice = tune_mixture(
                    loaded,
                    dataset,
                    decoding=decoding,
                    trained_through=trained_through,
                    tune_graph=all(text.startswith("epsilon=") for text in graph_settings or []),
                    text=text,
                    ranks=Ranks(),
                    on_batch=advance,
                )
            if rank() == 0:
                say(str(choice))
            return
        with _progress(f"evaluate {split}", users if sampled else num_users) as advance:
            metrics = run_evaluate(
                loaded,
                dataset,
                split,
                decoding=decoding,
                trained_through=trained_through,
                users={"sample": users, "seed": seed} if sampled else "all",
                recipe=recipe.as_dict() if recipe else None,
                ranks=Ranks(),
                on_batch=advance,
                out_dir=out_dir,
            )
    if metrics is not None:
        out.print(format_table([metrics]))
        for line in advice(read_run_files(out_dir or run)):
            say(line)
        page = write_report(out_dir or run, data)
        say(str(page))
        if recipe is not None and world_size() == 1 and (run / IDS).is_file():
            trackers = Trackers(recipe.tracker, run, recipe.as_dict(), say)
            trackers.results(metrics)
            trackers.finish(page)


def recommend(
    run: RunArgument,
    history: Annotated[
        str | None, typer.Option(help="Item ids, oldest first, separated by commas.")
    ] = None,
    user: Annotated[
        str | None, typer.Option(help="A user's id; with --history: whose history it is.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help='JSON lines {"history": [...], "user": ..., "block": [...]}.'),
    ] = None,
    all_users: Annotated[
        bool, typer.Option("--all-users", help="All users of the data; needs --out.")
    ] = False,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Directory for --all-users.")
    ] = None,
    top: Annotated[int, typer.Option(help="Length of the lists.", min=1)] = 20,
    beam: BeamOption = 20,
    decode: DecodeOption = None,
    exclude_history: ExcludeOption = "auto",
    allow: AllowOption = None,
    block: BlockOption = None,
    titles: Annotated[
        bool,
        typer.Option(
            "--titles",
            help="Lists for a person, with the titles of `prepare --items`, for JSON lines; of a "
            "model that reads titles also the end of the prompt.",
        ),
    ] = False,
    data: DataOption = None,
) -> None:
    """Recommend the next items for a user: JSON lines in your own item ids.

    Scores are natural log-probabilities of the items' texts under the softmax of --decode; equal
    ones are listed by fewer sub-words, then smaller token ids. Under --decode free, texts that are
    no item are left out and counted.

    Example: genrec recommend runs/beauty --history 83,104,105
    """
    from genrec_dist.config.model_manifest import start_check
    from genrec_dist.config.paths import best_folder, data_of

    if sum([history is not None or user is not None, file is not None, all_users]) != 1:
        raise UsageError("give one of --history/--user, --file, --all-users")
    if all_users and out_dir is None:
        raise UsageError("--all-users needs --out DIR")
    if all_users and titles:
        raise UsageError(
            "--titles is for lists that are read: "
            "of --all-users join the lists with DATA/items.parquet"
        )
    checked = start_check(best_folder(run))  # while torch is imported
    with working():
        from genrec_shards.dataset import load_dataset

        from genrec_dist.data.layout import PromptLayout
        from genrec_dist.distributed.collectives import Ranks
        from genrec_dist.inference.export_lists import recommend_all
        from genrec_dist.inference.recommend import Request, read_requests, user_request
        from genrec_dist.inference.titles import Titles

    with _process_group() as device:
        options = {"beam": beam, "mode": decode, "data": data, "checked": checked}
        recommender = load_recommender(run, device, exclude_history, allow, block, **options)
        if all_users:
            assert out_dir is not None
            dataset = load_dataset(data or data_of(run))
            num_users = dataset.sequences.num_users
            with _progress("recommend", num_users) as advance:
                lists = recommend_all(
                    recommender, dataset, out_dir, top=top, ranks=Ranks(), on_batch=advance
                )
            if lists is not None:
                choices = len(recommender.item_filter.rows)
                say(f"{lists}: {num_users:,} users, {choices:,} items to choose from")
            return
        bad: list[str] = []
        if file is not None:
            requests = list(read_requests(file, bad))
        elif history is not None:
            requests = [
                Request([item.strip() for item in history.split(",") if item.strip()], user)
            ]
        else:
            assert user is not None
            requests = [user_request(load_dataset(data or data_of(run)), recommender.run, user)]
        named = None
        if titles and isinstance(recommender.run.layout, PromptLayout):
            named = Titles.of_prompts(recommender.run)
        elif titles:
            named = Titles.of_data(load_dataset(data or data_of(run)))
        for request, answer in zip(requests, recommender.answers(requests, k=top), strict=True):
            if answer.unknown_items:
                unknown = ", ".join(answer.unknown_items)
                typer.echo(f"not in the catalogue, skipped: {unknown}", err=True)
            typer.echo(answer.as_json() if named is None else named.page(request, answer))
        if bad:
            others = f"; {len(bad) - 1} lines more are none" if len(bad) > 1 else ""
            raise ValueError(f"{bad[0]}{others}; the {len(requests)} others are answered")


def load_recommender(
    run: Path,
    device: torch.device,
    exclude_history: YesNo,
    allow: Path | None,
    block: Path | None,
    **options: Any,
) -> Recommender:
    """`Recommender.load` of `options` and of the files of ids that `--allow` and `--block` name; on
    rank 0 the ids that the catalogue lacks are said."""
    from genrec_dist.inference.item_filter import name_some, read_ids
    from genrec_dist.inference.recommend import Recommender

    recommender = Recommender.load(
        run,
        device,
        exclude_history=None if exclude_history == "auto" else exclude_history == "yes",
        allow=None if allow is None else read_ids(allow),
        block=None if block is None else read_ids(block),
        **options,
    )
    items = recommender.item_filter
    for path, ids in ((allow, items.unknown_allow), (block, items.unknown_block)):
        if ids and rank() == 0:
            count = f"{len(ids):,} ids are not in the catalogue, skipped"
            typer.echo(f"{path}: {count}: {name_some(ids)}", err=True)
    return recommender


@contextmanager
def _process_group() -> Iterator[torch.device]:
    """The device of this process; under a launcher also the process group, which is left in good
    order at the end.

    Only decoding happens within, so neither accelerate nor DeepSpeed is involved, whatever the
    launcher has set for them.
    """
    from genrec_dist.distributed.collectives import join, leave
    from genrec_dist.distributed.signals import terminating
    from genrec_dist.inference.load import best_device

    with terminating():  # a launcher sends SIGTERM to all ranks when one is gone
        if world_size() > 1:
            join()
        yield best_device()
    if world_size() > 1:
        leave()


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error of rank 0, so that standard output holds results alone; yields what
    to call with the number of users done since."""
    console = Console(stderr=True)
    with Progress(console=console, disable=rank() != 0 or not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda users: bar.advance(task, users)
