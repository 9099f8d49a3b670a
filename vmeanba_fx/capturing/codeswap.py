"""Redirect the calls of Python functions, however they are referenced, by exchanging their code objects.

A swapped function is swapped for the whole process, so the new code looks at who calls: the thread that made the swap
gets the handler, every other thread the function's own code, as if nothing had happened. Only ``__code__`` is exchanged,
in one step; defaults stay where they are, and there is no moment at which a call could fail.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any

FILENAME = "<vmeanba_fx code swap>"
_MARK = "__vmeanba_fx_original__"
_PLACEHOLDER = "<the handler goes here>"

# handler(function, original, args, kwargs): `original` runs the function's own code.
Handler = Callable[[types.FunctionType, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@functools.lru_cache
def _template(free_variables: int) -> types.CodeType:
    """Code that calls the placeholder among its constants with ``(args, kwargs)``.

    A function takes only code with as many free variables as its own, so that many are named; in a branch that never
    runs, because a closure cell may still be empty.
    """
    names = [f"free{i}" for i in range(free_variables)]
    lines = [
        "def outer():",
        *(f"    {name} = None" for name in names),
        "    def redirected(*args, **kwargs):",
        *(f"        if 0: {name}" for name in names),
        f"        target = {_PLACEHOLDER!r}",
        "        return target(args, kwargs)",
        "    return redirected",
    ]
    scope: dict[str, Any] = {}
    exec(compile("\n".join(lines), FILENAME, "exec"), scope)
    return scope["outer"]().__code__


def redirecting_code(code: types.CodeType, target: Callable[..., Any]) -> types.CodeType:
    """Code to put in place of ``code`` that calls ``target(args, kwargs)``.

    The target is a constant of the code: the globals it runs with are those of the user's module.
    """
    template = _template(len(code.co_freevars))
    return template.replace(co_consts=tuple(target if c == _PLACEHOLDER else c for c in template.co_consts))


def original_of(fn: types.FunctionType) -> types.FunctionType:
    """A second function with the code, defaults and closure that ``fn`` has now; see :func:`is_original`."""
    twin = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    twin.__kwdefaults__ = fn.__kwdefaults__
    twin.__dict__.update(fn.__dict__, **{_MARK: True})
    return twin


def is_original(fn: types.FunctionType) -> bool:
    """Whether ``fn`` was made by :func:`original_of`: it is no function of the model."""
    return hasattr(fn, _MARK)


class CodeSwap:
    """Context in which this thread's calls of the given functions go to ``handler``; leaving it restores the code.

    Calls of other threads go to ``elsewhere``, by default to the function's own code.
    """

    def __init__(
        self, functions: Iterable[types.FunctionType], handler: Handler, elsewhere: Handler | None = None
    ) -> None:
        self._functions = list(functions)
        self._handler = handler
        self._elsewhere = elsewhere
        self._thread = 0
        self._saved: list[tuple[types.FunctionType, types.CodeType]] = []

    def __enter__(self) -> CodeSwap:
        self._thread = threading.get_ident()
        try:
            for fn in self._functions:
                target = self._target(fn, original_of(fn))
                self._saved.append((fn, fn.__code__))
                fn.__code__ = redirecting_code(fn.__code__, target)
        except BaseException:  # also Ctrl-C: nothing may stay redirected
            self.__exit__()
            raise
        return self

    def _target(self, fn: types.FunctionType, original: Callable[..., Any]) -> Callable[..., Any]:
        def redirect(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            handler = self._handler if threading.get_ident() == self._thread else self._elsewhere
            return original(*args, **kwargs) if handler is None else handler(fn, original, args, kwargs)

        return redirect

    def __exit__(self, *exc: object) -> None:
        while self._saved:
            fn, code = self._saved.pop()
            fn.__code__ = code
        self._thread, self._elsewhere = 0, None  # a call that began before this and goes on after it
