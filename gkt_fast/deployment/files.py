"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_writable", "written_whole"]


def check_writable(path: str | Path) -> None:
    """Checks that a file can be written in the path's folder, by writing one.

    Raises:
        OSError: it can't be, or the path is a folder.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(f"path is {str(path)!r}, which can't be written: {reason}") from error


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Gives another name in the same folder, whose file takes the path's place when the block is left without an error.

    Raises:
        OSError: the path can't be written; found before anything is computed.
    """
    path = Path(path)
    check_writable(path)
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
