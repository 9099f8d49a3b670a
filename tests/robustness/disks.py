"""A disk that fails: what is written to files passes through a function of the test's."""

from collections.abc import Callable
from typing import Any


class WatchedFile:
    """``file``, whose texts go through ``write(file, text)``."""

    def __init__(self, file: Any, write: Callable[[Any, str], Any]) -> None:
        self.file, self._write = file, write

    def __enter__(self) -> "WatchedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, text: str) -> Any:
        return self._write(self.file, text)


def watched(fdopen: Callable[..., Any], write: Callable[[Any, str], Any]) -> Callable[..., WatchedFile]:
    """``os.fdopen`` with every file watched."""
    return lambda *args, **kwargs: WatchedFile(fdopen(*args, **kwargs), write)
