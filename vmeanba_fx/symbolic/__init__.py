"""Symbolic tracing of models with selective scans: a readable, module-level ``torch.fx`` graph.

    gm = vmeanba_fx.symbolic_trace(model, torch.zeros(2, 3, 64, 64))
    print(gm.code)                  # layers, sizes, one call per scan, and the guards

``torch.fx.symbolic_trace`` stops at the first branch, unpacking or item assignment of such models. Here every proxy
carries the value its node has on the example inputs (its shadow), which answers those questions; each answer becomes a
guard that the graph checks when it runs. Two things a proxy cannot see are ``type(x) is ...`` and ``is`` between two
sizes; the finished graph is therefore compared with the model on the example inputs.
"""

from ..errors import GuardError
from .guards import SymbolicTraceError, check_guard
from .leaves import is_scan_signature
from .trace import symbolic_trace

__all__ = ["GuardError", "SymbolicTraceError", "check_guard", "is_scan_signature", "symbolic_trace"]
