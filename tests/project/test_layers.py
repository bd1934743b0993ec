"""The import rules of the house, read from the syntax trees and tried in a fresh process."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

# Package -> (its folder, what of ours it may import besides itself).
ROOMS = {
    "genrec_shards": (ROOT / "shards" / "genrec_shards", set()),
    "genrec_kernels": (ROOT / "kernels" / "genrec_kernels", set()),
    "genrec_dist": (ROOT / "genrec_dist", {"genrec_shards", "genrec_kernels"}),
    "genrec_tuning": (ROOT / "tuning" / "genrec_tuning", {"genrec_dist", "genrec_shards"}),
}
# The door alone opens the room behind it: `genrec tune` imports it inside the command.
DOORS = {"genrec_dist/cli/app.py": {"genrec_tuning"}}
OURS = set(ROOMS)
FOLDERS = {"kernels", "shards", "tuning"}
# A training machine may have none of these, so nothing that trains or evaluates may need them to be
# imported.
HEAVY = {"polars", "webdataset", "pydantic", "deepspeed", "ray", "triton"}
# Files that may import a heavy package at module level, with the package: a kernel file cannot be
# written otherwise.
ALLOWED: dict[str, set[str]] = {
    "kernels/genrec_kernels/triton_embedding_sum.py": {"triton"},
}

SOURCES = sorted(path for folder, _ in ROOMS.values() for path in folder.rglob("*.py"))
TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py"))
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Top-level names of all imports among the nodes."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # A relative import cannot leave its package.
            found |= {node.module.split(".")[0]} if node.module and not node.level else set()
    return found


def at_import_time(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not function bodies, not what only a type checker
    reads."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)


def breaches(tree: ast.Module) -> list[str]:
    """Calls that would run foreign code from a file: pickle, torch.load of anything but weights,
    yaml.load."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            found.append(f"line {node.lineno}: {called}")
        if keywords.get("allow_pickle") == "True":
            found.append(f"line {node.lineno}: allow_pickle=True")
    for name in ("pickle", "cPickle", "dill", "cloudpickle"):
        if name in imported(ast.walk(tree)):
            found.append(f"imports {name}")
    return found


def test_the_rooms_are_where_the_design_says() -> None:
    for folder, _ in ROOMS.values():
        assert (folder / "__init__.py").is_file(), folder
        assert (folder / "py.typed").is_file(), folder
    for name in FOLDERS:
        # A package of that name would shadow others: docs/decisions/0001.
        assert not (ROOT / name / "__init__.py").exists(), name


@pytest.mark.parametrize("package", sorted(ROOMS))
def test_imports_flow_one_way(package: str) -> None:
    folder, allowed = ROOMS[package]
    for path in folder.rglob("*.py"):
        foreign = imported(ast.walk(tree_of(path))) & OURS - {package} - DOORS.get(
            name_of(path), set()
        )
        assert foreign <= allowed, f"{name_of(path)} imports {', '.join(sorted(foreign - allowed))}"


@pytest.mark.parametrize("path", SOURCES + TESTS + SCRIPTS, ids=name_of)
def test_nobody_imports_the_folders(path: Path) -> None:
    assert not imported(ast.walk(tree_of(path))) & FOLDERS


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if "genrec_tuning" not in path.parts], ids=name_of
)
def test_heavy_packages_wait_until_they_are_used(path: Path) -> None:
    heavy = imported(at_import_time(tree_of(path))) & HEAVY - ALLOWED.get(name_of(path), set())
    assert not heavy, (
        f"{name_of(path)} imports {', '.join(sorted(heavy))} at module level: import inside the function"
    )


@pytest.mark.parametrize("path", SOURCES + TESTS + SCRIPTS, ids=name_of)
def test_the_first_line_says_the_duty(path: Path) -> None:
    docstring = ast.get_docstring(tree_of(path))
    assert docstring, f"{name_of(path)} has no docstring"
    assert len(docstring.splitlines()[0]) > 10, (
        f"{name_of(path)} says too little: {docstring.splitlines()[0]}"
    )


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=name_of)
def test_no_file_can_run_foreign_code(path: Path) -> None:
    assert breaches(tree_of(path)) == []


def test_modules_import_without_the_heavy_packages() -> None:
    modules = [
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
        for package, (folder, _) in ROOMS.items()
        if package != "genrec_tuning"
        for path in sorted(folder.rglob("*.py"))
        if name_of(path) not in ALLOWED
    ]
    code = f"""
import importlib, sys
from importlib.machinery import PathFinder

class Without:
    # Finds what PathFinder finds, but for the blocked packages, which are simply not there, as on a bare machine.
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {HEAVY!r} else PathFinder.find_spec(name, path, target)

    invalidate_caches = PathFinder.invalidate_caches
    find_distributions = PathFinder.find_distributions

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
for module in {modules!r}:
    importlib.import_module(module)
print(len({modules!r}), sorted({HEAVY!r} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == f"{len(modules)} []"


# The rules themselves, tried on what they must catch.


def test_the_rules_catch_what_they_name() -> None:
    lazy = ast.parse("def f():\n    import ray\nif TYPE_CHECKING:\n    import triton\n")
    assert not imported(at_import_time(lazy)) & HEAVY
    eager = ast.parse(
        "import ray.tune\ntry:\n    from triton import jit\nexcept ImportError:\n    pass\nclass A:\n    import polars\n"
    )
    assert imported(at_import_time(eager)) & HEAVY == {"ray", "triton", "polars"}
    assert imported(ast.walk(ast.parse("def f():\n    from genrec_dist.train import train"))) == {
        "genrec_dist"
    }
    bad = "import pickle\ntorch.load(f)\ntorch.load(f, weights_only=False)\nyaml.load(f)\nnumpy.load(f, allow_pickle=True)\n"
    assert len(breaches(ast.parse(bad))) == 5
    good = (
        "torch.load(f, weights_only=True)\nyaml.safe_load(f)\nnumpy.load(f, allow_pickle=False)\n"
    )
    assert breaches(ast.parse(good)) == []
