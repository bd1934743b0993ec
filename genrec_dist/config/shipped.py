"""The files that come with the packages: recipes, launch files, spaces of sweeps."""

from importlib import resources
from pathlib import Path

from genrec_dist.config.suggest import did_you_mean


def shipped_folder(package: str, name: str) -> Path:
    """A folder of files that come with a package.

    Args:
        package: the import package.
        name: the folder. It is inside the package, as recipes are; or, of a wheel, in
            `genrec_dist_files` beside it (`pyproject.toml`); or, of a checkout, beside it itself:
            `launch/` beside `genrec_dist/`, `tuning/spaces/` beside `tuning/genrec_tuning/`.
    """
    home = Path(str(resources.files(package)))
    places = (home / name, home.parent / "genrec_dist_files" / name, home.parent / name)
    return next((place for place in places if place.is_dir()), places[-1])


def shipped_files(folder: Path) -> dict[str, Path]:
    """The files of such a folder by their names in it, but for its README."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path for path in paths if path.suffix != ".md"}


def find_shipped(folder: Path, name: str, what: str) -> Path:
    """The file of this name; its folder and its ending may be left out where one file alone fits.

    Args:
        folder: of `shipped_folder`.
        name: such as `slurm/one_node.sbatch`, or `one_node`.
        what: what these files are, for the message.

    Raises:
        ValueError: no file fits, or more than one.
    """
    files = shipped_files(folder)
    fitting = [
        known
        for known, path in files.items()
        if name in (path.name, path.stem, known.removesuffix(path.suffix))
    ]
    if name in files:
        return files[name]
    if len(fitting) == 1:
        return files[fitting[0]]
    if fitting:
        raise ValueError(f"{name}: more than one {what}: give {' or '.join(fitting)}")
    stems = {path.stem for path in files.values()}
    suggestion = did_you_mean(name, sorted(stems)) or f"; there are: {', '.join(files)}"
    raise ValueError(f"{name}: no such {what}{suggestion}")


def first_comment(path: Path) -> str:
    """What a file says of itself: the text of its first comment, on one line; "" without one."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#!") and not words:
            continue
        if not line.startswith("# "):
            break
        words += line.removeprefix("#").split()
    return " ".join(words)
