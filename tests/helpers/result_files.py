"""Result files of lists that a test has in memory as a whole."""

from pathlib import Path
from typing import Any

import numpy as np
from genrec_shards.dataset import Dataset
from genrec_shards.histories import windows
from genrec_shards.splits import Split

from genrec_dist.baselines.registry import reference_scores
from genrec_dist.evaluation.protocol import Protocol
from genrec_dist.evaluation.results import ResultsWriter


def write_results(
    out_dir: str | Path,
    *,
    system: str,
    split: Split,
    dataset: Dataset,
    user_rows: np.ndarray,
    lists_UN: np.ndarray,
    scores_UN: np.ndarray,
    protocol: Protocol,
    seconds: float,
    recipe: dict[str, Any] | None,
) -> dict[str, Any]:
    """`ResultsWriter` for lists that lie in memory as a whole: `user_rows` int64[U] in any order,
    the rest as in `add`."""
    order = np.argsort(user_rows, kind="stable")
    with ResultsWriter(
        out_dir,
        system=system,
        split=split,
        dataset=dataset,
        protocol=protocol,
        recipe=recipe,
        top=lists_UN.shape[1],
    ) as writer:
        for part in windows(order):
            writer.add(user_rows[part], lists_UN[part], scores_UN[part])
        return writer.finish(seconds, reference_scores(dataset, split, protocol, writer.expected))
