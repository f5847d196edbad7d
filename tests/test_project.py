"""The shape of the project: floors, packaging, documented commands."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("modules", "datamodules", "callbacks", "experiments")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources():
    return [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def imported_floors(path):
    """The floors that a file imports from, by relative imports or by name."""
    inside = path.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(inside[: len(inside) - node.level])
            target = [*base, *(node.module or "").split(".")]
            names = [target[0]] if target[0] else [alias.name for alias in node.names]
            yield from (name for name in names if name in FLOORS)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "fulgurite" for name in names), f"{path}: import relatively inside the package"


def test_imports_only_go_down():
    for path in sources():
        here = FLOORS.index(path.relative_to(ROOT).parts[0])
        for floor in imported_floors(path):
            assert FLOORS.index(floor) <= here, f"{path.relative_to(ROOT)} imports {floor}"


def test_list_of_packages_is_whole():
    found = {"fulgurite"} | {
        "fulgurite." + ".".join(path.parent.relative_to(ROOT).parts) for path in sources() if path.name == "__init__.py"
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])
    for path in sources():
        assert (path.parent / "__init__.py").is_file(), path


FOR_FLOWER = "fulgurite.experiments.offsite.federation.apps"  # it is Flower that imports this one


def test_every_module_is_imported_without_the_extras():
    extras = " ".join(sum(PROJECT["project"]["optional-dependencies"].values(), []))
    barred = {re.split(r"[<>=~!\[ ]", name)[0].replace("-", "_") for name in extras.split() if name[0].isalpha()}
    # An extra may add extras to what is always there.
    barred = sorted(barred - {re.split(r"[<>=~!\[ ]", name)[0] for name in PROJECT["project"]["dependencies"]})
    names = [".".join(("fulgurite", *path.relative_to(ROOT).with_suffix("").parts)) for path in sources()]
    names = [name.removesuffix(".__init__") for name in names if name != FOR_FLOWER]
    code = f"""
import builtins, importlib
real = builtins.__import__
def without(name, globals=None, *rest, **more):
    # Our own imports only: libraries look for the extras by themselves.
    if name.split(".")[0] in {barred!r} and (globals or {{}}).get("__name__", "").startswith("fulgurite"):
        raise ModuleNotFoundError(name)
    return real(name, globals, *rest, **more)
builtins.__import__ = without
for name in {names!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_constraints_satisfy_the_ranges():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[canonicalize_name(name)] = version
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [
        *PROJECT["project"]["dependencies"],
        *sum((extras[name] for name in ("dev", "docs", "data", "report", "spans", "sweep", "eval", "offsite")), []),
    ]:
        requirement = Requirement(text)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{text} does not admit the tested {version}"


def test_packaged_files_are_declared():
    declared = PROJECT["tool"]["setuptools"]["package-data"]
    for path in (ROOT / "experiments").rglob("*.yaml"):
        package = "fulgurite." + ".".join(path.parent.relative_to(ROOT).parts)
        assert "*.yaml" in declared[package], path


def test_results_do_not_make_a_checkout_unclean():
    from fulgurite.experiments.environment import _CODE

    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "--", *_CODE], capture_output=True, text=True).stdout
    assert "experiments/distillation/benchmark.yaml" in listed
    assert "/results/" not in listed


def readme_commands():
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]


def test_readme_begins_with_the_two_commands():
    assert [command.split("#")[0].strip() for command in readme_commands()][:2] == ["make demo", "make test"]


def test_commands_of_the_documents_parse():
    """Every documented ``fulgurite`` command names a command, config and options that exist; the long ones run elsewhere."""
    from fulgurite.experiments.configs import resolve_config
    from fulgurite.experiments.main import COMMANDS

    texts = [(ROOT / "README.md").read_text("utf-8"), *(path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md"))]
    joined = "\n".join(texts).replace("\\\n", " ")
    commands = re.findall(r"^(?:\.venv/bin/)?fulgurite (.+)$", joined, re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        words = command.split("#")[0].split()
        assert words[0] in COMMANDS or words[0].startswith("--"), command
        for flag, value in zip(words, words[1:]):
            if flag in ("-c", "--copy") and "/" in value and not value.endswith(".yaml"):
                resolve_config(value)


def test_links_of_the_documents_lead_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_no_source_file_is_longer_than_400_lines():
    for path in sources():
        assert len(path.read_text("utf-8").splitlines()) <= 400, path


def public(node):
    """The public functions and classes within a module or class, and in public classes of it."""
    for entry in node.body:
        if isinstance(entry, ast.ClassDef | ast.FunctionDef) and not entry.name.startswith("_"):
            yield entry
            if isinstance(entry, ast.ClassDef):
                yield from public(entry)


def test_docstrings_of_what_is_public_give_shapes_where_it_takes_tensors():
    for path in sources():
        for entry in public(ast.parse(path.read_text("utf-8"))):
            told = ast.get_docstring(entry) or ""
            where = f"{path.relative_to(ROOT)}: {entry.name}"
            assert told, where
            if isinstance(entry, ast.FunctionDef):
                kinds = [ast.unparse(each.annotation) for each in (*entry.args.args, *entry.args.kwonlyargs) if each.annotation]
                assert "[" in told or "See ``" in told or not any(re.search(r"\bTensor\b", kind) for kind in kinds), where


@pytest.mark.parametrize("floor", FLOORS)
def test_public_names_have_docstrings(floor):
    module = importlib.import_module(f"fulgurite.{floor}")
    for name in getattr(module, "__all__", []):
        assert len(getattr(module, name).__doc__ or "") > 60, name
