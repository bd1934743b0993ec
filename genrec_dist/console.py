"""Terminal output, exit codes, and which process this is among several."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from genrec_dist.config.suggest import did_you_mean


def exit_code_of(action: Callable[[], object], arguments: list[str] | None = None) -> int:
    """Run `action`, print in one line why it failed, and return the process's exit code.

    Args:
        action: what to run.
        arguments: of the command that it is, to name the command that continues it.

    Returns:
        The code that `action` returns; else 0 after success, 1 after a failure, 2 for wrong usage,
        129, 130 and 143 after SIGHUP, SIGINT and SIGTERM.
    """
    from genrec_dist.distributed.signals import Stopped, Terminated

    try:
        # Typer returns the code of a typer.Exit, and None for commands that succeed.
        code = action()
        return code if isinstance(code, int) else 0
    except ClickException as error:
        where = error.ctx.command_path if getattr(error, "ctx", None) else "genrec"
        message = _one_line(error.format_message()) + _suggestion(error)
        typer.echo(f"genrec: {message}; see {where} --help", err=True)
        return int(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except Terminated as end:
        typer.echo(f"genrec: {end}", err=True)
        return 128 + end.number
    except Stopped as stop:
        how = stop.remedy if arguments is None else command_to_continue(arguments, stop.remedy)
        typer.echo(f"genrec: {stop}; continue with: {how}", err=True)
        return 128 + stop.number
    except (ValueError, OSError) as error:
        typer.echo(f"genrec: {shown(_message(error), arguments)}", err=True)
        return 1


def _suggestion(error: Any) -> str:
    """A question about a value that is none of an option's choices; of commands and options the
    library asks itself."""
    given = re.search(r"'([^']*)' is not one of (.*)", error.format_message())
    return did_you_mean(given[1], re.findall(r"'([^']*)'", given[2])) if given else ""


def command_to_continue(arguments: list[str], remedy: str) -> str:
    """The whole command that goes on with a stopped one.

    Args:
        arguments: of the stopped command.
        remedy: options to add, such as `--resume latest`; or words, such as `the same command`.
    """
    option, *value = remedy.split() if remedy.startswith("--") else [""]
    kept, skip = [], 0
    for argument in arguments:
        if option and argument.split("=")[0] == option:
            skip = len(value) * ("=" not in argument)
        elif skip:
            skip -= 1
        else:
            kept.append(argument)
    command = shlex.join(["genrec", *kept, *([option, *value] if option else [])])
    if world_size() > 1:
        # The launcher's own part of its command is not known here.
        return f"{remedy}, added to what was launched ({command})" if option else remedy
    return command


def _message(error: ValueError | OSError) -> str:
    """An error's own message; of the operating system's errors the reason, file and remedy."""
    if not isinstance(error, OSError):
        return str(error)
    if error.errno is None:
        # Of a short write numpy says how much of an array it could write, and not why.
        is_short = re.search(r"\d+ requested and \d+ written", str(error))
        return f"{error}: make room or choose another output" if is_short else str(error)
    reason = os.strerror(error.errno).lower()
    place = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{place}{reason}: make room or choose another output"
    if error.errno == errno.EFBIG:
        return f"{place}{reason}: raise the limit (ulimit -f) or choose another output"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place}{reason}: change its rights or choose another place"
    if error.errno == errno.EEXIST:
        return f"{place}a file is there, not a directory: choose another name, or move the file"
    return f"{place}{reason}: check the path"


LONGEST_LINE = 2000
"""Characters of a message; a value of a file can be of any length."""


def _one_line(text: str) -> str:
    """A message as a terminal may get it: one line, control characters spelled out, of a long one
    the beginning and the end, where the remedy is."""
    line = "".join(
        letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(text.split())
    )
    end = LONGEST_LINE // 4
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE - end - 5]} ... {line[-end:]}"


def shown(text: str, arguments: Sequence[str] | None = None) -> str:
    """A message as a person gave its paths, in one line: an address with both slashes, of which a
    Path keeps one, and a path below the working directory as a relative one.

    Args:
        text: the message.
        arguments: of the command; a working directory that is in them is not taken out.
    """
    text = re.sub(r"\b(s3|gs|https?):/(?=[^/])", r"\1://", _one_line(text))
    with contextlib.suppress(FileNotFoundError):  # the directory may have been removed
        here = f"{os.getcwd().rstrip('/')}/"
        if len(here) > 1 and not any(here in argument for argument in arguments or ()):
            text = re.sub(rf"(?<![\w./-]){re.escape(here)}", "", text)
    return text


out = Console()

# By its version typer has its own click or the real one: only these bases are public in both.
UsageError: Any = typer.BadParameter.__base__

ClickException: Any = UsageError.__base__


def say(text: str, style: str = "") -> None:
    """Print a line as it is: paths are neither wrapped at the terminal's width nor read as
    markup."""
    out.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def working(what: str = "loading torch") -> Iterator[None]:
    """A sign of life on a terminal's standard error, for what says nothing for seconds."""
    console = Console(stderr=True)
    # FORCE_COLOR, which notebooks and CI set, makes `is_terminal` true of files and pipes.
    if rank() != 0 or not (console.is_terminal and sys.stderr.isatty()):
        yield
        return
    from rich.live import Live
    from rich.spinner import Spinner

    # Not `console.status`, which would send standard output there too.
    spinner = Spinner("dots", text=what)
    with Live(spinner, console=console, transient=True, redirect_stdout=False):
        yield


def rank() -> int:
    """Number of this process among those of its launcher; 0 for a process alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))
