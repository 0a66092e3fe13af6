"""The site: `make docs`. Sources are docs/ and tutorials/ as they stand, seen from the repository's root."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

import dgm_pyro

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "dgm_pyro"
author = copyright = "dgm_pyro contributors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "docs/api/*.md", "tutorials/*.ipynb"]
exclude_patterns = [".*", "build", "site", "dist", "runs", "tour", "bench", "node_modules", "**.ipynb_checkpoints"]
nitpicky = True
# Type variables, and what only the tour's own modules name.
nitpick_ignore = [
    ("py:class", "dgm_pyro.program.P"),
    ("py:class", "dgm_pyro.training.options.Documented"),
    ("py:class", "dgm_pyro.experiments.tour.stops.Stop"),
    ("py:class", "dgm_pyro.experiments.commands.Found"),
    ("py:obj", "dgm_pyro.experiments.commands.Found"),
]

# -- pages and notebooks -----------------------------------------------------------------------------------------------

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]

# -- the reference -----------------------------------------------------------------------------------------------------

default_role = "py:obj"
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_inherit_docstrings = False  # torch's of forward() says nothing here
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_param = False  # it takes "alpha, sigma: ..." for a sigma of type alpha
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
add_module_names = False
toc_object_entries_show_parents = "hide"

# -- what it looks like ------------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = "dgm_pyro"
html_static_path = ["_static", "../build/static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
templates_path = ["_templates"]
pygments_style = "friendly"
pygments_dark_style = "monokai"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5f99", "color-brand-content": "#1f5f99"},
    "dark_css_variables": {"color-brand-primary": "#7ab8f5", "color-brand-content": "#7ab8f5"},
}
# From the site itself, so that equations need no network.
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}
mathjax4_config = None


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if exception is not None or app.builder.format != "html" or spec is None or spec.origin is None:
        return
    source, target = Path(spec.origin).parent / "static" / "mathjax", app.outdir / "_static" / "mathjax"
    fonts = Path("output/chtml/fonts/woff-v2")
    shutil.copytree(source / fonts, target / fonts, dirs_exist_ok=True)
    shutil.copy(source / "tex-chtml.js", target)


def escape(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """In a docstring's text, p(x | z) holds no substitution of reStructuredText, and (*batch, P) no emphasis."""
    kept = r"``.*?``|(?::\w+:)?`[^`]+`|^ *\.\. math::.*?(?=^\S|\Z)"
    bare = lambda text: re.sub(r"\||(?<=[(, ])\*(?=\w+[,)])", r"\\\g<0>", text)  # noqa: E731
    text = "\n".join(lines)
    parts, start = [], 0
    for match in re.finditer(kept, text, re.DOTALL | re.MULTILINE):
        parts += [bare(text[start : match.start()]), match[0]]
        start = match.end()
    lines[:] = "".join([*parts, bare(text[start:])]).split("\n")


# -- references --------------------------------------------------------------------------------------------------------


def names_of_ours() -> tuple[set[str], set[str]]:
    """Names of modules, classes and functions of the package: those in an ``__all__``, and those that are in none."""
    public, helpers = {"dgm_pyro"}, set()
    for info in pkgutil.walk_packages(dgm_pyro.__path__, "dgm_pyro."):
        if info.name == "dgm_pyro.__main__":
            continue
        public.add(info.name)
        module = importlib.import_module(info.name)
        listed = getattr(module, "__all__", ())
        for name, value in vars(module).items():
            if getattr(value, "__module__", "") == info.name and (inspect.isclass(value) or inspect.isfunction(value)):
                (public if name in listed else helpers).add(name)
    return public, helpers - public


PUBLIC, HELPERS = names_of_ours()


def documented(env: BuildEnvironment, name: str) -> str | None:
    """The full name of the one documented object that ``name`` can mean; `dgm.fit` is `dgm_pyro.training.fit.fit`."""
    objects = PythonDomain(env).objects
    name = re.sub(r"^dgm(?=\.)", "dgm_pyro", name)
    if name in objects:
        return name
    last = name.removeprefix("dgm_pyro.")
    *path, attribute = last.split(".")
    owner = functools.reduce(lambda value, part: getattr(value, part, None), path, dgm_pyro)
    exported = getattr(owner, attribute, None)
    full = f"{getattr(exported, '__module__', '')}.{getattr(exported, '__qualname__', '')}"
    if full in objects:
        return full
    found = [full for full, entry in objects.items() if full.endswith("." + last) and entry.objtype != "module"]
    return found[0] if len(found) == 1 else None


def inherited(env: BuildEnvironment, node: nodes.Element) -> str | None:
    """The full name of a method that the class being documented has from another."""
    module, name = node.get("py:module"), node.get("py:class")
    if module is None or name is None:
        return None
    owner = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    names = [f"{base.__module__}.{base.__qualname__}.{node['reftarget']}" for base in inspect.getmro(owner)]
    return next((full for full in names if full in PythonDomain(env).objects), None)


def link(app: Sphinx, fromdoc: str, full: str, content: nodes.Node) -> nodes.reference:
    entry = PythonDomain(app.env).objects[full]
    return make_refnode(app.builder, fromdoc, entry.docname, entry.node_id, [content], full)


def resolve(app: Sphinx, env: BuildEnvironment, node: nodes.Element, content: nodes.Node) -> nodes.Node | None:
    """Python names that Sphinx cannot resolve: ours by their last part; torch's and Pyro's are left as plain text.

    A public name of ours that no page documents stays unresolved, and so fails the build.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    here = f"{node.get('py:module')}.{target}"
    full = documented(env, here) or documented(env, target) or inherited(env, node)
    if full is not None:
        return link(app, node.get("refdoc", env.docname), full, content)
    ours, last = target.startswith("dgm_pyro.") or target in PUBLIC, target.split(".")[-1]
    return None if ours and last not in HELPERS and last != "T" else content


def number(app: Sphinx, doctree: nodes.document) -> None:
    """A chapter's number, which stands in the name of its file, before its title."""
    chapter = re.match(r"tutorials/(\d+)-", app.env.docname)
    title = next(doctree.findall(nodes.title), None)
    if chapter and title is not None:
        title.insert(0, nodes.Text(f"{chapter[1]} "))


class LinkCode(SphinxPostTransform):
    """In pages and notebooks, ``code`` that names a class, ``dgm.something`` or a file of the package leads to it."""

    default_priority = 5

    def run(self, **kwargs: object) -> None:
        if self.env.docname.startswith("docs/api/") and self.env.docname != "docs/api/index":
            return
        for node in list(self.document.findall(nodes.literal)):
            if isinstance(node.parent, (nodes.reference, nodes.title)) or node.get("classes") not in ([], ["code"]):
                continue
            text = node.astext()
            name = re.match(r"((?:dgm\.|dgm_pyro\.)[\w.]+|[A-Z]\w+)(\(.*\))?$", text, re.DOTALL)
            # A method that a base class documents leads to the class.
            full = name and (documented(self.env, name[1]) or documented(self.env, name[1].rpartition(".")[0]))
            if full:
                node.replace_self(link(self.app, self.env.docname, full, node.deepcopy()))


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", escape, priority=400)
    app.connect("doctree-read", number, priority=100)
    app.connect("missing-reference", resolve)
    app.connect("build-finished", copy_mathjax)
    app.add_post_transform(LinkCode)
