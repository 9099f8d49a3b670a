"""Graph passes: each one function ``(gm, ...) -> gm`` in its own file. A lossy pass says so in its first line."""

from .bake_autocast import bake_autocast
from .channels_last import channels_last
from .cleanup import cleanup
from .drop_annihilated import drop_annihilated
from .flatten_positions import flatten_positions
from .functionalize import functionalize
from .fuse_means import fuse_means
from .fuse_shared import fuse_shared
from .fuse_ss2d import fuse_ss2d
from .join_scans import join_scans
from .lift_skip import lift_skip
from .manager import Pass, PassRecord, check_graph, run_passes
from .mean_scan import mean_scan
from .merge_skips import merge_skips
from .pack_weights import pack_weights
from .rank_scan import RankFit, rank_scan
from .refit import Readout, find_readout, refit
from .unroll_depthwise import unroll_depthwise

__all__ = [
    "Pass",
    "PassRecord",
    "RankFit",
    "Readout",
    "bake_autocast",
    "channels_last",
    "check_graph",
    "cleanup",
    "drop_annihilated",
    "find_readout",
    "flatten_positions",
    "functionalize",
    "fuse_means",
    "fuse_shared",
    "fuse_ss2d",
    "join_scans",
    "lift_skip",
    "mean_scan",
    "merge_skips",
    "pack_weights",
    "rank_scan",
    "refit",
    "run_passes",
    "unroll_depthwise",
]
