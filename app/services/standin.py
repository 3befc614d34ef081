"""Services of this process by module-level names, for callers that import functions."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")


def stand_in(service: type[T], make: Callable[[], T]) -> T:
    """Give an object whose methods are those of a service that `make` gives when one is called.

    Until then nothing is made: an import opens no store.
    """

    def look_up(_: T, name: str) -> Any:
        # Asked for what the service's own __init__ would have set, and has not.
        return getattr(make(), name)

    methods = {"__init__": lambda _: None, "__getattr__": look_up}
    return cast("T", type(service.__name__, (service,), methods)())
