"""RecTools' SASRec, trained on a split of `genrec export`, as lists that `genrec score` reads.

    python rectools_sasrec.py SPLIT --out sasrec.csv

It needs an environment of its own (README.md), and nothing of genrec-dist. The epoch is chosen by
the loss of the validation targets, as RecTools' own guide does; test is never read."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

LISTED = 21
"""One more than is scored: it says whether a tie goes on beyond the list."""


def read(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, dtype={Columns.User: str, Columns.Item: str})
    return frame.astype({Columns.Datetime: "datetime64[ns]"})


def fitted(train: pd.DataFrame, targets: pd.DataFrame, options: argparse.Namespace) -> SASRecModel:
    """The model with the weights of the epoch whose loss on the targets is lowest."""
    seed_everything(options.seed, workers=True)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val_loss", save_weights_only=True)

        def trainer() -> Trainer:
            stop = EarlyStopping("val_loss", patience=options.patience)
            return Trainer(
                max_epochs=options.epochs,
                accelerator="auto",
                deterministic=True,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[stop, best],
            )

        model = SASRecModel(
            n_blocks=options.blocks,
            n_heads=options.heads,
            n_factors=options.factors,
            dropout_rate=options.dropout,
            session_max_len=options.max_length,
            loss="softmax",
            lr=options.lr,
            batch_size=options.batch_size,
            get_trainer_func=trainer,
            get_val_mask_func=lambda rows: np.arange(len(rows)) >= len(train),
        )
        model.fit(Dataset.construct(pd.concat([train, targets], ignore_index=True)))
        # The trainer is a copy, and so are its callbacks.
        (kept,) = (c for c in model.fit_trainer.callbacks if isinstance(c, ModelCheckpoint))
        print(f"{Path(kept.best_model_path).stem}: val_loss {kept.best_model_score:.4f}")
        model.load_weights_from_checkpoint(kept.best_model_path)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("split", type=Path, help="directory of genrec export --to rectools")
    parser.add_argument("--out", type=Path, required=True, help="CSV of the lists")
    parser.add_argument("--lists-of", choices=["validation", "test"], default="test")
    parser.add_argument("--keep-history", action="store_true", help="list items again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--factors", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--max-length", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    train, validation = (read(options.split / f"{n}.csv") for n in ("train", "validation"))
    # A split by time has more rows in that period; the first one of a user is the target.
    model = fitted(train, validation.groupby(Columns.User, sort=False).head(1), options)
    known = train
    if options.lists_of == "test":
        known = pd.concat([train, validation], ignore_index=True)
    lists = model.recommend(
        users=known[Columns.User].unique(),
        dataset=Dataset.construct(known),
        k=LISTED,
        filter_viewed=not options.keep_history,
    )
    lists.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
