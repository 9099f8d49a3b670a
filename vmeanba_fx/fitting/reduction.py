"""What a full scan is reduced to: the paper's mean over channels, or a learned rank-r scan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ..errors import CalibrationError
from ..files import is_number

Reduce = Literal["mean", "rank"]
Fit = Literal["scan", "outputs"]
DEFAULT_RANK, DEFAULT_ENERGY = 4, 0.9


@dataclass(frozen=True)
class Reduction:
    """``rank`` is a number or "auto": then the least rank whose fit explains ``energy`` of a site's scan.

    ``fit``: what a fit keeps, the scan's own output or, of that, what the model's outputs depend on.
    """

    kind: Reduce = "mean"
    rank: int | Literal["auto"] | None = None
    energy: float | None = None
    fit: Fit = "scan"

    @classmethod
    def of(
        cls, reduce: str, rank: int | str | None = None, energy: float | None = None, fit: Fit | None = None
    ) -> Reduction:
        """A checked reduction.

        Raises:
            CalibrationError: an unknown name, or a rank, energy or fit that makes no sense or does not belong there.
        """
        if reduce not in ("mean", "rank"):
            raise CalibrationError(f"reduce={reduce!r}: choose 'mean' (the paper's) or 'rank'")
        if reduce == "mean":
            if not (rank is None and energy is None and fit in (None, "scan")):
                raise CalibrationError("rank=, energy= and fit= belong to reduce='rank'")
            return cls()
        fit = "scan" if fit is None else fit
        if fit not in get_args(Fit):
            raise CalibrationError(f"fit={fit!r}: choose 'scan' or 'outputs'")
        if rank is None:
            rank = DEFAULT_RANK if energy is None else "auto"
        if rank == "auto":
            energy = DEFAULT_ENERGY if energy is None else energy
            if not is_number(energy) or not 0 < energy <= 1:
                raise CalibrationError(f"energy={energy!r}: give a share of the scan's energy, above 0 and at most 1")
            return cls("rank", "auto", float(energy), fit)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise CalibrationError(f"rank={rank!r}: give a whole number of at least 1, or 'auto'")
        if energy is not None:
            raise CalibrationError("energy= chooses the rank: give it without rank=, or with rank='auto'")
        return cls("rank", rank, None, fit)

    def __str__(self) -> str:
        if self.kind == "mean":
            return "mean"
        text = f"rank {self.rank}" if self.energy is None else f"rank for {self.energy:.0%} of the energy"
        return text if self.fit == "scan" else f"{text}, fitted to the outputs"

    def options(self) -> dict[str, Any]:
        """What a fingerprint holds of it: nothing for the mean, as in plans made before there was a choice."""
        if self.kind == "mean":
            return {}
        found = {"reduce": self.kind, "rank": self.rank, "energy": self.energy}
        return found if self.fit == "scan" else found | {"fit": self.fit}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: Any) -> Reduction:
        """Raises ``ValueError`` where ``d`` is not what :meth:`to_dict` made."""
        if not isinstance(d, dict) or set(d) - {"fit"} != {"kind", "rank", "energy"}:
            raise ValueError("the reduction is incomplete")
        try:
            return cls.of(d["kind"], d["rank"], d["energy"], d.get("fit"))
        except CalibrationError as error:
            raise ValueError(str(error)) from None
