"""Redirect the calls of Python functions, however they are referenced, by exchanging their code objects."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

FILENAME = "<vmeanba_fx code swap>"
_MARK = "__vmeanba_fx_original__"
_PLACEHOLDER = "<the handler goes here>"

# handler(function, original, args, kwargs): `original` runs the function's own code.
Handler = Callable[[types.FunctionType, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def _redirecting_code(free_variables: int, target: Callable[..., Any]) -> types.CodeType:
    """Code that calls ``target(args, kwargs)``.

    A function takes only code with as many free variables as its own, so that many are named; in a branch that never
    runs, because a closure cell may still be empty. The target is a constant of the code: the globals it runs with
    are those of the user's module.
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
    code: types.CodeType = scope["outer"]().__code__
    return code.replace(co_consts=tuple(target if c == _PLACEHOLDER else c for c in code.co_consts))


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
    """Context in which every call of the given functions goes to ``handler``; leaving it restores the code."""

    def __init__(self, functions: set[types.FunctionType], handler: Handler) -> None:
        self._functions = functions
        self._handler = handler
        self._saved: list[tuple[types.FunctionType, types.CodeType]] = []

    def __enter__(self) -> CodeSwap:
        try:
            for fn in self._functions:
                target = self._target(fn, original_of(fn))
                self._saved.append((fn, fn.__code__))
                fn.__code__ = _redirecting_code(len(fn.__code__.co_freevars), target)
        except BaseException:  # also Ctrl-C: nothing may stay redirected
            self.__exit__()
            raise
        return self

    def _target(self, fn: types.FunctionType, original: types.FunctionType) -> Callable[..., Any]:
        def redirect(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._handler(fn, original, args, kwargs)

        return redirect

    def __exit__(self, *exc: object) -> None:
        while self._saved:
            fn, code = self._saved.pop()
            fn.__code__ = code
