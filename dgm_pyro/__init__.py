"""Deep generative models as probabilistic programs."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgm_pyro.api import *  # noqa: F403
    from dgm_pyro.api import __version__ as __version__


if not TYPE_CHECKING:  # a checker of types would take any name for one of ours
    # torch takes seconds to import, and `dgm --help` needs none of it.
    def __getattr__(name: str) -> Any:
        if name.startswith("__") and name not in ("__all__", "__version__"):
            raise AttributeError(name)
        api = importlib.import_module("dgm_pyro.api")
        if hasattr(api, name):
            return getattr(api, name)
        if name in globals():  # a module that the api has imported just now
            return globals()[name]
        raise AttributeError(f"dgm_pyro has no {name!r}{api.place_of(name)}")


def __dir__() -> list[str]:
    return importlib.import_module("dgm_pyro.api").__all__
