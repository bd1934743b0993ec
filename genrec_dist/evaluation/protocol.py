"""What two runs must share before their metrics may be compared."""

# U users, N list

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from genrec_shards.dataset import Dataset
from genrec_shards.histories import sample_users
from genrec_shards.splits import TrainedThrough


@dataclass(frozen=True)
class Protocol:
    """Everything two numbers must share before they may be compared."""

    numbering: str
    """given, random, train-order, or for hierarchical codes also what they were made from and
    through which position."""
    ties: str
    """What was done with interactions at one time."""
    split: str
    """How sequences were cut: leave-one-out, or global-time with the first dates of its validation
    and test period."""
    trained_through: TrainedThrough
    """n-2: validation and test targets unseen in training; n-1: refit with the validation targets.
    Of a split by time n-2 is the training period, n-1 also the validation period."""
    exclude_history: bool | None
    """Are items of the history left out of the lists? None for a rule whose lists are the
    history."""
    beam: int | None = None
    """Width of the beam; None for systems without one."""
    decode: str | None = None
    """Mode of decoding; None for systems without one."""
    users: str | dict[str, int] = "all"
    """all, or {"sample": n, "seed": s} as in `sample_users`."""
    item_weight: float | None = None
    """Weight of the item head's log-probability beside the decoder's; None for systems that do not
    add the two."""
    graph: dict[str, Any] | None = None
    """Of systems that add the transition graph's log-probability: its weight, epsilon and kNN
    settings (`Mixture.of_graph`)."""

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        *,
        exclude_history: bool | None,
        trained_through: TrainedThrough = "n-2",
        beam: int | None = None,
        decode: str | None = None,
        users: str | dict[str, int] = "all",
        item_weight: float | None = None,
        graph: dict[str, Any] | None = None,
    ) -> Protocol:
        """The protocol of a system on this data set, whose own fields are the data set's."""
        info, codes = dataset.info, dataset.info.hierarchy
        numbering: str = info.numbering
        if codes is not None:
            through = f" through {codes.trained_through}" if codes.trained_through else ""
            numbering = f"{info.numbering}: {codes.made_from}{through}"
        return cls(
            numbering,
            info.ties,
            info.split_name,
            trained_through,
            exclude_history,
            beam,
            decode,
            users,
            item_weight,
            graph,
        )


def expected_users(asked: np.ndarray, protocol: Protocol) -> np.ndarray:
    """The user rows that the protocol asks for, of those who have a target (`asked`), ascending.

    Raises ValueError where it does not say which.
    """
    if isinstance(protocol.users, dict):
        return asked[sample_users(len(asked), protocol.users["sample"], protocol.users["seed"])]
    if protocol.users != "all":
        raise ValueError(
            f'protocol.users is {protocol.users!r}: give all or {{"sample": n, "seed": s}}'
        )
    return asked
