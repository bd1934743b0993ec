"""The order of samples: a pure function of (seed, epoch, step), whatever the number of ranks,
workers or shards."""

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from genrec_shards.keyed_random import keyed_permutation
from genrec_shards.sequences import offsets_of
from genrec_shards.splits import Periods, TrainedThrough, num_held_out

Space = Literal["user", "last", "every-prefix"]

# U users, R records, W windows, B samples of a step.

# Streams of the seed: the order of records in an epoch, the order of samples in a window.
_RECORD_STREAM, _WINDOW_STREAM = 4, 5
_CACHED_WINDOWS = 4


@dataclass(frozen=True, eq=False)
class StepSamples:
    """The samples of one step, or one rank's part of them."""

    sample_ids: np.ndarray
    """int64[B]: the user row (`user`, `last`), or the target's index among all interactions
    (`every-prefix`), of a split by time among those of the training parts."""
    user_rows: np.ndarray
    """int64[B]"""
    target_positions: np.ndarray
    """int32[B], place of the target in the user's sequence, from 0; -1 for `user`: the mask will
    choose."""
    training_lengths: np.ndarray
    """int32[B], items in the user's training part: what comes after must be neither seen nor
    learned."""
    is_padding: np.ndarray
    """bool[B], True for a repeated sample that only evens out the ranks: mask it out of loss and
    counts."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: slice | np.ndarray) -> "StepSamples":
        return StepSamples(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass(frozen=True, eq=False)
class _Epoch:
    """The order of records in one epoch."""

    records: np.ndarray
    """int64[R], permuted."""
    window_starts: np.ndarray
    """int64[W+1], samples before each window."""


@dataclass(frozen=True, eq=False)
class _Window:
    """The order of samples in a few consecutive records of the epoch."""

    users: np.ndarray
    """int64, the user rows of the window's records."""
    sample_ends: np.ndarray
    """int64, cumulative samples of these users."""
    flat_starts: np.ndarray
    """int64, where each user's sequence begins among all interactions."""
    order: np.ndarray
    """int64, the window's samples permuted."""


class SampleOrder:
    """Which samples make up each step, for every epoch, computed for any step on its own.

    Records are permuted by (seed, epoch); the samples of `window_records` consecutive permuted
    records are permuted by (seed, epoch, window). A step therefore touches few records, and any
    step is found from cumulative counts by record: nothing is replayed. Each sample comes once an
    epoch; the last step is smaller, never dropped."""

    def __init__(
        self,
        lengths: np.ndarray,
        users_per_record: int,
        *,
        space: Space,
        batch_size: int,
        seed: int,
        trained_through: TrainedThrough = "n-2",
        window_records: int = 64,
        periods: Periods | None = None,
    ) -> None:
        """Count the samples; no order is made yet.

        Args:
            lengths: int[U], items per user by user row.
            users_per_record: as in the shards' manifest.
            space: one sample per user, per user with the last training item as its target, or per
                prefix of the training part.
            batch_size: samples of a step over all ranks.
            seed: of the order.
            trained_through: where the training part ends under leave-one-out.
            window_records: records whose samples are mixed with each other.
            periods: of a split by time; no number then depends on what is held out.

        Raises:
            ValueError: a wrong setting, or no sample at all.
        """
        if space not in get_args(Space):
            raise ValueError(f"space is {space!r}: choose one of {', '.join(get_args(Space))}")
        for name, value in (
            ("users_per_record", users_per_record),
            ("batch_size", batch_size),
            ("window_records", window_records),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}: at least 1 is needed")
        self._held_out = num_held_out(trained_through)
        if periods is not None:
            lengths, self._held_out = periods.lengths(trained_through), 0
        self.lengths = np.ascontiguousarray(lengths, dtype=np.int32)  # [U]
        self.users_per_record = users_per_record
        self.space: Space = space
        self.batch_size = batch_size
        self.seed = seed
        self.trained_through: TrainedThrough = trained_through
        self.window_records = window_records
        # Counts by record; what is kept is 16 bytes per record.
        first_users = np.arange(0, len(self.lengths), users_per_record)
        counts = self._num_samples_of(self.lengths)
        self.users_without_samples = int((counts == 0).sum())
        self._record_samples = np.add.reduceat(counts, first_users)  # int64[R]
        items = np.add.reduceat(self.lengths, first_users, dtype=np.int64)
        self._record_starts = np.cumsum(items) - items  # int64[R], interactions before each record
        self.num_samples = int(self._record_samples.sum())
        if self.num_samples == 0:
            complaint = f"no sample in {len(self.lengths)} users for space {space}"
            raise ValueError(f"{complaint}: longer sequences are needed")
        self.__setstate__({})

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def step(self, epoch: int, step: int) -> StepSamples:
        """The samples of one step over all ranks.

        Args:
            epoch: from 0.
            step: of the epoch, from 0.

        Raises:
            ValueError: the epoch has no such step.
        """
        if not 0 <= step < self.steps_per_epoch:
            steps = f"an epoch of {self.steps_per_epoch} steps"
            raise ValueError(f"step {step} of {steps}: count from 0 in each epoch")
        start = step * self.batch_size
        end = min(start + self.batch_size, self.num_samples)
        window_starts = self._epoch(epoch).window_starts
        first, last = np.searchsorted(window_starts, [start, end - 1], side="right") - 1
        parts = []
        for window in range(int(first), int(last) + 1):
            base = int(window_starts[window])
            bounds = max(start - base, 0), min(end, int(window_starts[window + 1])) - base
            parts.append(self._samples(epoch, window, slice(*bounds)))
        names = [field.name for field in fields(StepSamples)]
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return StepSamples(**arrays)

    def __getstate__(self) -> dict[str, object]:
        caches = ("_epoch", "_window")
        return {name: value for name, value in self.__dict__.items() if name not in caches}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        # Caches belong to the object, so that they go with it and are not pickled.
        self._epoch = lru_cache(maxsize=2)(self._order_records)
        self._window = lru_cache(maxsize=_CACHED_WINDOWS)(self._order_window)

    def _num_samples_of(self, lengths: np.ndarray) -> np.ndarray:
        """int64, samples of users with so many items."""
        training_lengths = lengths.astype(np.int64) - self._held_out
        if self.space == "every-prefix":
            return np.maximum(training_lengths - 1, 0)
        return (training_lengths >= (1 if self.space == "user" else 2)).astype(np.int64)

    def _order_records(self, epoch: int) -> _Epoch:
        records = keyed_permutation(len(self._record_samples), self.seed, epoch, _RECORD_STREAM)
        firsts = np.arange(0, len(records), self.window_records)
        window_samples = np.add.reduceat(self._record_samples[records], firsts)
        return _Epoch(records=records, window_starts=offsets_of(window_samples))

    def _order_window(self, epoch: int, window: int) -> _Window:
        # Two users per record, the window's records are 2 and 0, every user has 4 items and 1
        # sample: users 4 5 0 1, sample_ends 1 2 3 4, flat_starts 16 20 0 4.
        records = self._epoch(epoch).records[window * self.window_records :][: self.window_records]
        first_users = records * self.users_per_record
        num_users = np.minimum(self.users_per_record, len(self.lengths) - first_users)
        first_places = np.cumsum(num_users) - num_users
        users = np.repeat(first_users - first_places, num_users) + np.arange(num_users.sum())
        lengths = self.lengths[users].astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        shifts = self._record_starts[records] - starts[first_places]
        sample_ends = np.cumsum(self._num_samples_of(lengths))
        order = keyed_permutation(int(sample_ends[-1]), self.seed, epoch, window, _WINDOW_STREAM)
        return _Window(
            users=users,
            sample_ends=sample_ends,
            flat_starts=starts + np.repeat(shifts, num_users),
            order=order,
        )

    def _samples(self, epoch: int, number: int, part: slice) -> StepSamples:
        window = self._window(epoch, number)
        picks = window.order[part]
        places = np.searchsorted(window.sample_ends, picks, side="right")
        users = window.users[places]
        training_lengths = self.lengths[users] - np.int32(self._held_out)
        if self.space == "user":
            ids, positions = users, np.full(len(users), -1, dtype=np.int32)
        elif self.space == "last":
            ids, positions = users, training_lengths - np.int32(1)
        else:
            firsts = np.where(places > 0, window.sample_ends[places - 1], 0)
            positions = (picks - firsts + 1).astype(np.int32)
            ids = window.flat_starts[places] + positions
        padding = np.zeros(len(users), dtype=bool)
        return StepSamples(ids, users, positions, training_lengths, is_padding=padding)


def split_among_ranks(samples: StepSamples, rank: int, world_size: int) -> StepSamples:
    """This rank's contiguous part of a step, as long as every other rank's.

    Parts differ by at most one sample; shorter ones repeat their last sample (the step's first one
    if they have none) with `is_padding` True. Raises ValueError for a rank outside 0..world_size-1.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}: ranks count from 0")
    shortest, num_longer = divmod(len(samples), world_size)
    start = rank * shortest + min(rank, num_longer)
    end = start + shortest + (rank < num_longer)
    index = np.arange(start, start + shortest + (num_longer > 0))
    part = samples[np.where(index < end, index, end - 1 if end > start else 0)]
    return replace(part, is_padding=part.is_padding | (index >= end))
