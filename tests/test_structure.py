"""The structure of the library: dependency order of the packages, no import cycles, only declared dependencies."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
MINI = ROOT / "packages" / "florence-vl-mini"
# From the ground up. A room imports its own modules and those of lower levels; rooms of one level know nothing of each
# other.
LEVELS = (
    ("registry", "import_hook"),
    ("files", "statistics"),
    ("model",),
    ("convert", "data"),
    ("serve",),
    ("train", "evaluate"),
    ("analyze",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def modules(package: str) -> dict[str, Path]:
    folder = SRC / package
    found = {}
    for path in sorted(folder.rglob("*.py")):
        name = ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        found[name] = path
    return found


def imports(path: Path, deferred: bool) -> set[str]:
    """Absolute names that a file imports, without those for type checkers.

    Args:
        path: The file.
        deferred: Also the imports inside functions.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not deferred:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


LIBRARY = modules("florence_vl")


def edges(deferred: bool) -> dict[str, set[str]]:
    """Module -> modules of the library that it imports."""

    def owner(name: str) -> str | None:
        while name and name not in LIBRARY:
            name = name.rpartition(".")[0]
        return name or None

    return {
        module: {target for name in imports(path, deferred) if (target := owner(name)) and target != module}
        for module, path in LIBRARY.items()
    }


def test_no_room_imports_one_above_it():
    wrong = []
    for module, targets in edges(deferred=True).items():
        room = module.split(".")[1] if "." in module else ""
        if room not in LEVEL:
            continue  # the package itself and __main__ know all rooms
        for target in targets:
            other = target.split(".")[1] if "." in target else ""
            if other and other != room and LEVEL.get(other, 99) >= LEVEL[room]:
                wrong.append(f"{module} -> {target}")
    assert not wrong, "imports that run up or sideways: " + ", ".join(sorted(wrong))


def test_every_room_has_its_place():
    rooms = {module.split(".")[1] for module in LIBRARY if module.count(".")} - {"__main__", "recipes"}
    assert rooms == set(LEVEL)


def test_no_import_circles():
    graph = edges(deferred=True)
    done: set[str] = set()
    circles = []

    def walk(module: str, chain: tuple[str, ...]) -> None:
        if module in chain:
            circles.append(" -> ".join((*chain[chain.index(module) :], module)))
        elif module not in done:
            for target in sorted(graph[module]):
                # a package's __init__ that re-exports its modules does not count as a cycle
                if not module.startswith(f"{target}."):
                    walk(target, (*chain, module))
            done.add(module)

    for module in graph:
        walk(module, ())
    assert not circles, circles


def test_scenes_know_nothing_of_the_library():
    scenes = MINI / "src" / "florence_vl_mini" / "scenes"
    known = {}
    for path in scenes.rglob("*.py"):
        known[path.name] = sorted(n for n in imports(path, True) if n.split(".")[0] == "florence_vl")
    assert known
    assert not {name: names for name, names in known.items() if names}


def requirements(project: Path) -> set[str]:
    text = (project / "pyproject.toml").read_text(encoding="utf-8")
    if sys.version_info >= (3, 11):
        import tomllib

        table = tomllib.loads(text)["project"]
        lists = [table["dependencies"], *table.get("optional-dependencies", {}).values()]
        named = [item for items in lists for item in items]
    else:
        named = re.findall(r'^\s*"([A-Za-z][\w.-]*\s*[\[<>=!~;"].*?)"', text, re.MULTILINE)
    return {re.split(r"[\s\[<>=!~;\"]", item)[0].lower().replace("_", "-") for item in named}


@pytest.mark.parametrize(("project", "package"), [(ROOT, SRC / "florence_vl"), (MINI, MINI / "src/florence_vl_mini")])
def test_every_import_is_declared(project, package):
    declared = requirements(project)
    own = {"florence_vl", "florence_vl_mini"}
    distributions = metadata.packages_distributions() if hasattr(metadata, "packages_distributions") else {}
    # Imported when it is there, never installed by us: hosts that load this package as a plugin, weights in packages.
    hosts = {"vllm", "sglang", "lmms_eval", "efficientnet_lite_pytorch"}
    absent = {"megatron": "megatron-energon", "resvg_py": "resvg-py"}  # extras that need not be installed here
    undeclared = {}
    for path in package.rglob("*.py"):
        for name in imports(path, True):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in own or top in hosts:
                continue
            known = distributions.get(top, [absent.get(top, top)])
            providers = {d.lower().replace("_", "-") for d in known}
            if not providers & declared:
                undeclared.setdefault(top, []).append(path.relative_to(ROOT).as_posix())
    assert not undeclared
