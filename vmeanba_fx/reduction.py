"""What a full scan is reduced to: the paper's mean over channels, or a learned rank-r scan."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .errors import CalibrationError

Reduce = Literal["mean", "rank"]
DEFAULT_RANK, DEFAULT_ENERGY = 4, 0.9


@dataclass(frozen=True)
class Reduction:
    """``rank`` is a number or "auto": then the least rank whose fit explains ``energy`` of a site's scan."""

    kind: Reduce = "mean"
    rank: int | Literal["auto"] | None = None
    energy: float | None = None

    @classmethod
    def of(cls, reduce: str, rank: int | str | None = None, energy: float | None = None) -> Reduction:
        """A checked reduction.

        Raises:
            CalibrationError: an unknown name, or a rank or energy that makes no sense or does not belong there.
        """
        if reduce not in ("mean", "rank"):
            raise CalibrationError(f"reduce={reduce!r}: choose 'mean' (the paper's) or 'rank'")
        if reduce == "mean":
            if rank is not None or energy is not None:
                raise CalibrationError("rank= and energy= belong to reduce='rank'")
            return cls()
        if rank is None:
            rank = DEFAULT_RANK if energy is None else "auto"
        if rank == "auto":
            energy = DEFAULT_ENERGY if energy is None else energy
            number = isinstance(energy, (int, float)) and not isinstance(energy, bool)
            if not number or not math.isfinite(energy) or not 0 < energy <= 1:
                raise CalibrationError(f"energy={energy!r}: give a share of the scan's energy, above 0 and at most 1")
            return cls("rank", "auto", float(energy))
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise CalibrationError(f"rank={rank!r}: give a whole number of at least 1, or 'auto'")
        if energy is not None:
            raise CalibrationError("energy= chooses the rank: give it without rank=, or with rank='auto'")
        return cls("rank", rank)

    def __str__(self) -> str:
        if self.kind == "mean":
            return "mean"
        return f"rank {self.rank}" if self.energy is None else f"rank for {self.energy:.0%} of the energy"

    def options(self) -> dict[str, Any]:
        """What a fingerprint holds of it: nothing for the mean, as in plans made before there was a choice."""
        return {} if self.kind == "mean" else {"reduce": self.kind, "rank": self.rank, "energy": self.energy}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: Any) -> Reduction:
        """Raises ``ValueError`` where ``d`` is not what :meth:`to_dict` made."""
        if not isinstance(d, dict) or set(d) != {"kind", "rank", "energy"}:
            raise ValueError("the reduction is incomplete")
        try:
            return cls.of(d["kind"], d["rank"], d["energy"])
        except CalibrationError as error:
            raise ValueError(str(error)) from None
