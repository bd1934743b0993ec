"""Which addresses are allowed, and what in an address may be shown."""

import ipaddress
import re
from pathlib import Path
from urllib.parse import urlsplit

from genrec_shards.errors import printable

# A drive's single letter is a path.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]")
ALLOWED = "allowed are https://, s3://, and http:// of this machine (127.0.0.1, [::1], localhost)"


def is_address(path: str | Path) -> bool:
    """Whether this is meant as an address, allowed or not. A directory of such a name is written
    `./name`."""
    return _SCHEME.match(str(path)) is not None or "://" in str(path)


def check_address(text: str) -> str:
    """The address without a slash at its end. Raises ValueError where the address is not allowed.
    The message shows no password."""
    # Neither a query, which may be a signature, nor what may be a password; and one line.
    shown = re.sub(r"//.*@", "//***@", text.split("?")[0], flags=re.DOTALL)
    shown = printable(shown)
    if "::" in re.sub(r"\[[0-9a-fA-F:.]*\]", "", text):
        raise ValueError(f"{shown}: a chain of addresses is not opened; {ALLOWED}")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{shown}: not an address ({error}); {ALLOWED}") from None
    problem = None
    if parts.scheme not in ("https", "s3", "http"):
        problem = f"{parts.scheme}: is not opened; {ALLOWED}"
    elif not host:
        problem = f"names no server; write {parts.scheme}://SERVER/PATH, as text and not as a Path"
    elif "@" in parts.netloc:
        problem = (
            "a password in an address ends up in every run's files; "
            "put it into ~/.netrc (https) or the AWS credentials (s3)"
        )
    elif "?" in text or "#" in text or not text.isprintable() or any(map(str.isspace, text)):
        problem = "an address with ?, # or blanks is not opened; give that of the directory alone"
    elif parts.scheme == "http" and not is_loopback(host):
        problem = f"http of another machine can be read and changed on its way; {ALLOWED}"
    elif parts.scheme == "s3" and not _BUCKET.fullmatch(parts.netloc):
        problem = f"{parts.netloc!r} is no bucket's name"
    if problem is not None:
        raise ValueError(f"{shown}: {problem}")
    return text.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether the host is this machine. Only names and numbers that need no name server count: its
    answer could change from call to call."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
