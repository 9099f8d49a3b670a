"""The file a calibration that was killed goes on from: one section per pass over the data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import PlanError
from ..files import read_json, unwritable, write_atomically
from .fingerprint import Fingerprint

_VERSION = 2
T = TypeVar("T")


class Saved:
    """Sections of a state file, or of nothing where ``path`` is None.

    Raises:
        PlanError: the file cannot be written, is damaged, or of another model, option or seed.
    """

    def __init__(self, path: str | os.PathLike[str] | None, fingerprint: Fingerprint) -> None:
        self.path = path
        self._head = {"format": "vmeanba_fx.calibration", "version": _VERSION, "fingerprint": fingerprint.to_dict()}
        self._sections: dict[str, Any] = {}
        if path is None:
            return
        if reason := unwritable(Path(path)):
            raise PlanError(reason)
        if not Path(path).exists():
            return
        state = read_json(path, "calibration state")
        if not isinstance(state.get("sections"), dict) or state.get("version") != _VERSION:
            raise PlanError(f"{path} is not a calibration state of this release: remove it to start again")
        try:
            reason = Fingerprint.from_dict(state.get("fingerprint")).difference(fingerprint)
        except ValueError as error:
            raise PlanError(f"{path} is not a calibration state: {error}; remove it to start again") from None
        if reason:
            raise PlanError(f"{path} belongs to another run ({reason}): remove it to start again")
        self._sections = state["sections"]

    def read(self, name: str, parse: Callable[[Any], T]) -> T | None:
        """Section ``name`` parsed, or None where there is none.

        Raises:
            PlanError: the section is damaged.
        """
        if name not in self._sections:
            return None
        try:
            return parse(self._sections[name])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{self.path} is not a calibration state: {error!r}; remove it to start again") from None

    def write(self, **sections: Any) -> None:
        """Replace sections (None removes one) and write the file; does nothing without a path."""
        if self.path is None:
            return
        changed = {k: v for k, v in (self._sections | sections).items() if v is not None}
        if changed == self._sections:
            return
        self._sections = changed
        write_atomically(self.path, json.dumps(self._head | {"sections": self._sections}))
