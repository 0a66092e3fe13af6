"""What Pyro, torch and this package raise or warn about: heard, in one line, and with a remedy."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import pyro

# What Pyro says, or a part of it, and what to do.
_FIXES = {
    "Multiple sample sites named": "give each site a name of its own: in a loop, f'x_{i}'",
    "collide at dim": "give each plate a dim of its own, as in dim=-2",
    "duplicate plate": "enter each plate once, and give nested plates names of their own",
    "need to use TraceEnum_ELBO": "use TraceEnum_ELBO(max_plate_nesting=...), or take infer={'enumerate': ...} away",
    "no sample sites configured for enumeration": "use Trace_ELBO, or mark a site with infer={'enumerate': 'parallel'}",
    "sequential enumeration": "use infer={'enumerate': 'parallel'}, or enumerate the site in the guide",
    "vars in model but not guide": "sample it in the guide, or enumerate it with TraceEnum_ELBO",
    "plate statements in guide but not model": "state that plate in the model, too, or leave it out",
    "has_rsample": "say has_rsample=True if the factor comes from a reparameterized draw, has_rsample=False otherwise",
    "mean field restriction": "state the guide's latents in the order of the model, or use Trace_ELBO",
    "fully reparameterized": "use Trace_ELBO, which draws what has no closed form",
    "auxiliary vars in the model": "take is_auxiliary away: the model has the site",
    "max_plate_nesting": "make the loss with max_plate_nesting= the number of nested plates",
    "required positional argument": "pass the arguments of the pair, or return them from data() in its file (--args)",
    "requires_grad=False": "call module.eval(), which tells Pyro that it is frozen on purpose",
}
PYRO = os.path.dirname(pyro.__file__) + os.sep


def fix_for(text: str, otherwise: str) -> str:
    return next((fix for part, fix in _FIXES.items() if part in text), otherwise)


@contextlib.contextmanager
def heard(said: list[Exception | Warning], files: str | tuple[str, ...]) -> Iterator[None]:
    """What is raised, and what code in ``files`` warns about, is appended to ``said``; other warnings pass.

    Args:
        files: how the paths begin.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        raised = []
        try:
            yield
        except Exception as error:  # it may be anything: the code is the user's
            raised.append(error)
    for warning in caught:
        if warning.filename.startswith(files) and isinstance(warning.message, Warning):
            said.append(warning.message)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    said += raised


def without_table(error: BaseException) -> str:
    """What an error says, without the table of shapes that Pyro adds."""
    return str(error).split("Trace Shapes:")[0].strip()


def in_one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    text = " ".join(without_table(error).split())
    if isinstance(error, KeyError) and not text:
        text = "a key is missing"
    return text if len(text) <= 300 else text[:297] + "..."


def remedy_in(error: BaseException) -> str:
    """The remedy in one of our own messages: what follows the colon."""
    return in_one_line(error).rpartition(": ")[2]
