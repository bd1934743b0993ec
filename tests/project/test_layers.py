"""The import rules: floors, circles, folder sizes, heavy packages, and no code from files."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from places import ROOT

PACKAGES = {
    "genrec_shards": ROOT / "shards" / "genrec_shards",
    "genrec_kernels": ROOT / "kernels" / "genrec_kernels",
    "genrec_dist": ROOT / "genrec_dist",
    "genrec_tuning": ROOT / "tuning" / "genrec_tuning",
}
# Folders and modules of genrec_dist, and the other packages as a whole, bottom to top. A module
# imports from its own folder and from the floors below, never up and never sideways.
FLOORS = (
    {"genrec_shards", "genrec_kernels", "config", "distributed"},
    {"data", "tracking", "console"},
    {"model", "evaluation"},
    {"text", "report"},
    {"decoding", "baselines", "estimate"},
    {"inference"},
    {"training"},
    {"api", "reproduce", "serving", "sharing", "genrec_tuning"},
    {"bench"},
    {"cli"},
    {"train"},
)
# These name the public API and transformers' auto classes, and import what they name when it is
# first used: they stand outside the floors.
LAZY = {"genrec_dist", "genrec_dist.auto_classes"}
# `config` may use the errors and splits of genrec_shards, which imports nothing of ours.
SIDEWAYS = {("config", "genrec_shards"), ("distributed", "genrec_shards")}
MOST_MODULES = 12
# A training machine may have none of these, so nothing may need them to be imported.
HEAVY = {
    "polars",
    "webdataset",
    "pydantic",
    "deepspeed",
    "ray",
    "triton",
    "fastapi",
    "uvicorn",
    "wandb",
    "mlflow",
}
MAY_IMPORT_HEAVY = {
    "kernels/genrec_kernels/triton_embedding_sum.py": {"triton"},
    "genrec_dist/serving/app.py": {"fastapi", "pydantic", "uvicorn"},
    "genrec_dist/serving/connection.py": {"uvicorn"},
}
SOURCES = sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_of(path: Path) -> str:
    folder = next(folder for folder in PACKAGES.values() if path.is_relative_to(folder))
    parts = path.relative_to(folder.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names of all imports among the nodes; of `from a import b` both `a` and `a.b`."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def edges_of(sources: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, anywhere: in functions and for types too."""
    edges = {}
    for module, tree in sources.items():
        names = imported(ast.walk(tree)) & sources.keys()
        # `from a import b` imports the package `a` only where `b` is no module of it.
        edges[module] = {n for n in names if not any(o.startswith(f"{n}.") for o in names)} - {
            module
        }
    return edges


def place_of(module: str) -> str:
    """The unit that has a floor: a package, or a folder or module of genrec_dist."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "genrec_dist" and rest else package


def wrong_arrows(edges: dict[str, set[str]]) -> list[str]:
    floor = {place: number for number, places in enumerate(FLOORS) for place in places}
    found = []
    for module, others in edges.items():
        for other in others if module not in LAZY else ():
            ours, theirs = place_of(module), place_of(other)
            if ours == theirs or (ours, theirs) in SIDEWAYS or other in LAZY:
                continue
            if floor[theirs] >= floor[ours]:
                found.append(f"{module} imports {other}")
    return found


def circle_of(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, or an empty list."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(edges[module]):
            if ring := walk(other, [*path, module]):
                return ring
        done.add(module)
        return []

    return next((ring for module in sorted(edges) if (ring := walk(module, []))), [])


def at_import_time(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run at import: not function bodies, not what only a type checker reads."""
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


def code_from_files(tree: ast.Module) -> list[str]:
    """Calls that would run foreign code from a file: pickle, torch.load, yaml.load."""
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
    pickles = packages(imported(ast.walk(tree))) & {"pickle", "cPickle", "dill", "cloudpickle"}
    return found + [f"imports {name}" for name in sorted(pickles)]


def our_modules() -> dict[str, ast.Module]:
    return {module_of(path): tree_of(path) for path in SOURCES}


def test_imports_go_down_the_floors() -> None:
    assert wrong_arrows(edges_of(our_modules())) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    edges = edges_of(our_modules())
    assert circle_of({m: others for m, others in edges.items() if m not in LAZY}) == []


def test_no_folder_holds_more_than_twelve_modules() -> None:
    for folder in {path.parent for path in SOURCES}:
        modules = [p for p in folder.glob("*.py") if p.name not in ("__init__.py", "__main__.py")]
        # The root of genrec_dist has its few entry points beside the folders.
        assert len(modules) <= MOST_MODULES, f"{name_of(folder)} has {len(modules)} modules"


def test_no_test_module_imports_another() -> None:
    tests = {path.stem for path in TESTS if path.stem.startswith("test_")}
    for path in TESTS:
        found = imported(ast.walk(tree_of(path))) & {*tests, "conftest"}
        assert not found, f"{name_of(path)} imports {found}: move what they share to tests/helpers"


def test_the_files_that_take_longest_are_begun_first(pytestconfig: pytest.Config) -> None:
    plugins = pytestconfig.pluginmanager.get_plugins()
    (first,) = (plugin.FIRST for plugin in plugins if hasattr(plugin, "FIRST"))
    assert set(first) <= {path.name for path in TESTS}, "a file was renamed or removed"


def test_the_folders_are_not_packages() -> None:
    # A package of that name would shadow others: docs/decisions/0001.
    for name in ("kernels", "shards", "tuning"):
        assert not (ROOT / name / "__init__.py").exists(), name
    for path in [*SOURCES, *TESTS, *SCRIPTS]:
        found = packages(imported(ast.walk(tree_of(path)))) & {"kernels", "shards", "tuning"}
        assert not found, f"{name_of(path)} imports {found}"


def test_heavy_packages_wait_until_they_are_used() -> None:
    for path in SOURCES:
        if not path.is_relative_to(PACKAGES["genrec_tuning"]):
            heavy = packages(imported(at_import_time(tree_of(path)))) & HEAVY
            heavy -= MAY_IMPORT_HEAVY.get(name_of(path), set())
            assert not heavy, f"{name_of(path)} imports {heavy}: import it inside the function"


def test_every_file_begins_with_what_it_is_for() -> None:
    for path in [*SOURCES, *TESTS, *SCRIPTS]:
        docstring = ast.get_docstring(tree_of(path))
        assert docstring, name_of(path)
        assert len(docstring.splitlines()[0]) > 10, name_of(path)


def test_no_file_can_run_foreign_code() -> None:
    for path in [*SOURCES, *SCRIPTS]:
        assert code_from_files(tree_of(path)) == [], name_of(path)


def test_modules_import_without_the_heavy_packages() -> None:
    modules = [
        module_of(path)
        for path in SOURCES
        if not path.is_relative_to(PACKAGES["genrec_tuning"])
        and name_of(path) not in MAY_IMPORT_HEAVY
    ]
    code = f"""
import importlib, sys
from importlib.machinery import PathFinder

class Without:
    # Finds what PathFinder finds, but for the blocked packages, as on a bare machine.
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


def sources(**texts: str) -> dict[str, ast.Module]:
    return {f"genrec_dist.{name.replace('__', '.')}": ast.parse(t) for name, t in texts.items()}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("from genrec_dist.model import genrec", False),
        ("from genrec_dist.inference import load", True),
        ("def f():\n    from genrec_dist.inference.load import load_run", True),
        ("if TYPE_CHECKING:\n    import genrec_dist.baselines.knn", True),
    ],
)
def test_the_rule_of_floors_sees_arrows_up_and_sideways(text: str, wrong: bool) -> None:
    others = {"model__genrec": "", "inference__load": "", "baselines__knn": ""}
    assert bool(wrong_arrows(edges_of(sources(decoding__trie=text, **others)))) == wrong


def test_the_rule_of_circles_sees_a_circle_inside_functions() -> None:
    ring = sources(
        data__a="def f():\n    from genrec_dist.data import b",
        data__b="import genrec_dist.data.c",
        data__c="from genrec_dist.data.a import f",
    )
    assert set(circle_of(edges_of(ring))) == set(ring)
    ring["genrec_dist.data.c"] = ast.parse("")
    assert circle_of(edges_of(ring)) == []


def test_the_other_rules_catch_what_they_name() -> None:
    lazy = ast.parse("def f():\n    import ray\nif TYPE_CHECKING:\n    import triton\n")
    assert not packages(imported(at_import_time(lazy))) & HEAVY
    eager = ast.parse("import ray.tune\ntry:\n    from triton import jit\nexcept E:\n    pass\n")
    assert packages(imported(at_import_time(eager))) & HEAVY == {"ray", "triton"}
    bad = "import pickle\ntorch.load(f)\nyaml.load(f)\nnumpy.load(f, allow_pickle=True)\n"
    assert len(code_from_files(ast.parse(bad))) == 4
    good = "torch.load(f, weights_only=True)\nyaml.safe_load(f)\n"
    assert code_from_files(ast.parse(good)) == []
