"""Graph passes: each one function ``(gm, ...) -> gm`` in its own file. A lossy pass says so in its first line."""

from .functionalize import functionalize

__all__ = ["functionalize"]
