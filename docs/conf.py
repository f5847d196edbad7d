"""Builds the site: `make site`. Pages are the Markdown files here; the reference comes from docstrings."""

import importlib
import inspect
from pathlib import Path

import fulgurite

project, author = "Fulgurite", "The Fulgurite authors"
release = version = fulgurite.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "Fulgurite"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath", "fieldlist"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False

# Where a name stands in several packages, the first of these has it.
PACKAGES = {
    "modules": "Systems",
    "datamodules": "Data",
    "callbacks": "Callbacks",
    "modules.distillation": "Distillation",
    "datamodules.soft_labels": "Soft-label stores",
    "modules.fusion": "Fusion",
    "modules.span_attention": "Attention with spans",
    "modules.spans": "Choosing spans",
    "callbacks.gradient_pruning": "Gradient pruning",
    "modules.offsite": "Offsite tuning",
    "modules.multitask": "Multi-task training",
    "datamodules.multitask": "Tasks",
}


def _write_reference(folder: Path) -> None:
    """Write a page for each package, with every name of its ``__all__``."""
    folder.mkdir(exist_ok=True)
    seen: set[int] = set()
    for name, title in PACKAGES.items():
        package = importlib.import_module(f"fulgurite.{name}")
        lines = [title, "=" * len(title), "", f".. automodule:: fulgurite.{name}", ""]
        for member in package.__all__:
            what = getattr(package, member)
            if id(what) in seen:
                continue
            seen.add(id(what))
            kind = "class" if inspect.isclass(what) else "function" if inspect.isroutine(what) else "data"
            lines += [f".. auto{kind}:: fulgurite.{name}.{member}"]
            lines += [*(["   :members:", "   :exclude-members: training"] if kind == "class" else []), ""]
        text = "\n".join(lines)
        page = folder / f"{name}.rst"
        if not page.is_file() or page.read_text("utf-8") != text:
            page.write_text(text, "utf-8")


_write_reference(Path(__file__).parent / "api")
