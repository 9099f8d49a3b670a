"""Reading and writing small JSON files that may come from anywhere and must never be left half written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import PlanError

# What the file system, a loop of links (before Python 3.13), and a name with a zero byte raise.
BAD_PATH = (OSError, RuntimeError, ValueError)
_MAX_BYTES = 4 * 2**20
_MAX_DEPTH = 32
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def read_json(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """One JSON object from a file of at most 4 MiB, nested at most 32 deep.

    Raises:
        PlanError: the file is missing, too large, too deeply nested, not JSON, or not an object.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except BAD_PATH as error:
        raise PlanError(f"cannot read {what} {path}: {reason(error)}") from None
    return parse_json(text, f"{what} {path}", what)


def parse_json(text: bytes, name: str, what: str) -> dict[str, Any]:
    """The same from the file's content; ``name`` stands for it in errors."""
    if len(text) > _MAX_BYTES:
        raise PlanError(f"{name} is larger than {_MAX_BYTES // 2**20} MiB, which no {what} is")
    depth = 0
    for byte in text.translate(None, _NOT_BRACKETS):
        depth += 1 if byte in b"[{" else -1
        if depth > _MAX_DEPTH:
            raise PlanError(f"{name} is nested more than {_MAX_DEPTH} deep")
    try:
        content = json.loads(text.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{name} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise PlanError(f"{name} holds a {type(content).__name__}, not an object")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def reason(error: Exception) -> str:
    """What is wrong with a path, without the path."""
    return str(getattr(error, "strerror", None) or error)


def unwritable(target: Path) -> str | None:
    """Why no file can be made at ``target``, or where it links to; None where one can."""
    try:
        folder = target.resolve().parent
        if not folder.is_dir():
            return f"cannot write {target}: there is no folder {folder}"
        if target.is_dir():
            return f"cannot write {target}: that is a folder"
    except BAD_PATH as error:
        return f"cannot write {str(target)[:200]!r}: {reason(error)}"
    return None if os.access(folder, os.W_OK) else f"cannot write {target}: the folder {folder} is not writable"


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` beside ``path``, links followed, and move it there: the old file stays whole until the new one is.

    Raises:
        OSError: the folder is missing, read-only or full; names the path.
    """
    try:
        target = Path(path).resolve()
        # Not tempfile.mkstemp: it makes files that nobody else may read.
        name = target.parent / f".{target.name}.{secrets.token_hex(4)}"
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except BAD_PATH as error:
        raise OSError(getattr(error, "errno", errno.EINVAL), f"cannot write {path}: {reason(error)}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"cannot write {target}: {error.strerror}") from None
        raise


# -- values in files -----------------------------------------------------------------------------------------------


def is_number(v: Any) -> bool:
    """Finite, and so that the difference of two is."""
    return isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) <= 1e300


def is_count(v: Any) -> bool:
    return type(v) is int and 0 <= v < 2**53


def is_text(v: Any, most: int = 10_000) -> bool:
    """Nothing that moves a terminal's cursor or hides what stands there, and not without end."""
    return isinstance(v, str) and len(v) <= most and "".join(v.split()).isprintable()


def is_name(v: Any) -> bool:
    return is_text(v, 1_000) and v.isprintable()


def is_flag(v: Any) -> bool:
    return type(v) is bool


def list_of(ok: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and all(map(ok, v))


def names_to(ok: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, dict) and all(is_name(name) and ok(item) for name, item in v.items())


def fields_of(**kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, dict) and set(v) == set(kinds) and all(ok(v[name]) for name, ok in kinds.items())
