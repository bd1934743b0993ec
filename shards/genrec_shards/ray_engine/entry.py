"""What `prepare` asks of the cluster: a log from a path or an address, clean."""

from __future__ import annotations

from pathlib import Path

from genrec_shards.cleaning.clean import Cleaning, CleanLog
from genrec_shards.dataset import Source
from genrec_shards.errors import BadLines
from genrec_shards.ray_engine.clean_log import clean_log, hashes_of, source_from
from genrec_shards.ray_engine.log_spans import Sizes
from genrec_shards.ray_engine.sources import check_source, format_of, log_files_of, place_of
from genrec_shards.ray_engine.tasks import connected
from genrec_shards.readers.read_log import LogOptions

__all__ = ["check_source", "clean_on_ray", "format_of", "place_of"]

SIZES = Sizes()


def clean_on_ray(
    source: str | Path,
    format: str,
    bad: BadLines,
    cleaning: Cleaning,
    options: LogOptions,
    folder: Path,
    address: str | None,
) -> tuple[CleanLog, Source]:
    """As `clean_log`, and where it came from. `address`: of the cluster, None for one of our
    own."""
    files = log_files_of(source, format)
    is_folder = [file.place for file in files] != [str(source)]
    name = (
        Path(source).resolve().name
        if is_folder and isinstance(source, Path)
        else str(source).rpartition("/")[2]
    )
    with connected(address) as tasks:
        hashes = hashes_of(files, tasks)
        found = clean_log(files, format, bad, cleaning, options, folder, str(source), tasks, SIZES)
        return found, source_from(name, files, is_folder, hashes, tasks)
