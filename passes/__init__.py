"""Graph passes: each one function ``(gm, ...) -> gm`` in its own file. A lossy pass says so in its first line."""

from .drop_annihilated import drop_annihilated
from .functionalize import functionalize
from .manager import Pass, PassRecord, check_graph, run_passes
from .mean_scan import mean_scan

__all__ = ["Pass", "PassRecord", "check_graph", "drop_annihilated", "functionalize", "mean_scan", "run_passes"]
