"""Errors and warnings of Pyro, torch and this package, in one line and with a remedy."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import pyro

# Parts of Pyro's messages, and their remedies.
_FIXES = {
    "Multiple sample sites named": "give each site its own name: in a loop, f'x_{i}'",
    "collide at dim": "give each plate its own dim, such as dim=-2",
    "duplicate plate": "enter each plate once, and give nested plates different names",
    "need to use TraceEnum_ELBO": "use TraceEnum_ELBO(max_plate_nesting=...), or remove infer={'enumerate': ...}",
    "no sample sites configured for enumeration": "use Trace_ELBO, or mark a site with infer={'enumerate': 'parallel'}",
    "sequential enumeration": "use infer={'enumerate': 'parallel'}, or enumerate the site in the guide",
    "vars in model but not guide": "sample it in the guide, or enumerate it with TraceEnum_ELBO",
    "plate statements in guide but not model": "state that plate in the model too, or leave it out",
    "has_rsample": "pass has_rsample=True if the factor comes from a reparameterized draw, has_rsample=False otherwise",
    "mean field restriction": "state the guide's latents in the order of the model, or use Trace_ELBO",
    "fully reparameterized": "use Trace_ELBO, which samples KLs without a closed form",
    "auxiliary vars in the model": "remove is_auxiliary: the model has the site",
    "max_plate_nesting": "make the loss with max_plate_nesting= the number of nested plates",
    "required positional argument": "pass the arguments of the pair, or return them from data() in its file (--args)",
    "requires_grad=False": "call module.eval(), which tells Pyro that it is frozen on purpose",
}
PYRO = os.path.dirname(pyro.__file__) + os.sep


def fix_for(text: str, otherwise: str) -> str:
    return next((fix for part, fix in _FIXES.items() if part in text), otherwise)


@contextlib.contextmanager
def heard(said: list[Exception | Warning], files: str | tuple[str, ...]) -> Iterator[None]:
    """Append errors, and warnings from code in ``files``, to ``said``; let other warnings pass.

    Args:
        files: prefixes of the paths.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        raised = []
        try:
            yield
        except Exception as error:  # of any kind, because the code is the user's
            raised.append(error)
    for warning in caught:
        if warning.filename.startswith(files) and isinstance(warning.message, Warning):
            said.append(warning.message)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    said += raised


def without_table(error: BaseException) -> str:
    """The message of an error, without the table of shapes that Pyro appends."""
    return str(error).split("Trace Shapes:")[0].strip()


def in_one_line(error: BaseException) -> str:
    """The message of an error in one line of at most 300 characters."""
    text = " ".join(without_table(error).split())
    if isinstance(error, KeyError) and not text:
        text = "a key is missing"
    return text if len(text) <= 300 else text[:297] + "..."


def remedy_in(error: BaseException) -> str:
    """The remedy in a message of this package: the text after the colon."""
    return in_one_line(error).rpartition(": ")[2]
