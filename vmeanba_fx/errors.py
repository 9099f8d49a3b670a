"""Every error this package raises on purpose. Each message says what was wrong, where, and what to do."""

from __future__ import annotations


class VMeanbaError(Exception):
    """Base class: ``except vmeanba_fx.VMeanbaError`` catches all of them."""


class CaptureError(VMeanbaError, RuntimeError):
    """The model could not be turned into one ATen-level graph."""


class GuardError(VMeanbaError, RuntimeError):
    """A traced graph was called with an input for which the model would have taken another way.

    ``condition``: what holds for the inputs that a captured graph takes, as code.
    """

    def __init__(self, message: str, condition: str = "") -> None:
        super().__init__(message)
        self.condition = condition


class NoSitesError(VMeanbaError, ValueError):
    """The captured graph holds no selective scan that can be rewritten."""


class SiteError(VMeanbaError, ValueError):
    """A site was named that does not exist, or that cannot be rewritten."""


class UnknownSizeError(VMeanbaError, RuntimeError):
    """A size of the traced graph is known at run time only."""


class CalibrationError(VMeanbaError, RuntimeError):
    """Calibration data or a metric gave something that cannot be scored."""


class PlanError(VMeanbaError, ValueError):
    """A plan file is damaged, hostile, or belongs to another model, data set or seed."""


class GraphCheckError(VMeanbaError, RuntimeError):
    """A pass left a graph that is not well formed, or that no longer computes the same."""


class PassError(VMeanbaError, ValueError):
    """A graph pass was given an option it does not have."""


class ExportError(VMeanbaError, RuntimeError):
    """A model cannot be written in the format asked for, or a file cannot be loaded; nothing was left behind."""
