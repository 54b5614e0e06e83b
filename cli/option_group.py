"""Options that several commands share, each command taking all of them as one argument."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any


def take(
    command: Callable[..., None],
    argument: str,
    options: Callable[..., None],
    make: Callable[[Mapping[str, Any]], Any],
    *,
    first: bool,
) -> Callable[..., None]:
    """Give a command the options in place of one of its arguments.

    Args:
        argument: of the command; `make` makes it from the options' values by name.
        options: whose signature declares the options, in the order in which help shows them.
        first: whether help shows them before the command's own options.
    """
    added = list(inspect.signature(options).parameters.values())

    @wraps(command)
    def wrapped(**given: Any) -> None:
        chosen = {option.name: given.pop(option.name) for option in added}
        command(**given, **{argument: make(chosen)})

    signature = inspect.signature(command)
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
        if name != argument
    ]
    parameters = added + own if first else own + added
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped
