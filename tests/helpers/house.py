"""Measures of the code: sizes, import layers, cycles; `python tests/helpers/house.py`."""

import ast
import statistics
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("data_prep", "loss_mask", "train", "evaluate", "export", "sweep", "standin")


def files(folder: str, pattern: str = "**/*.py") -> list[Path]:
    return sorted((ROOT / folder).glob(pattern))


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of this project that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & known) or {node.module}
    return (found & known) - {module_name(path)}


def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports, over atlas_lib and tools."""
    paths = [*files("atlas_lib"), *files("tools")]
    known = {module_name(path) for path in paths}
    return {module_name(path): imports(path, known) for path in paths}


def cycle(modules: dict[str, set[str]]) -> list[str]:
    """One import cycle, or nothing."""
    try:
        TopologicalSorter(modules).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def layers(modules: dict[str, set[str]]) -> int:
    """Length of the longest chain of imports between the flat files of atlas_lib."""
    flat = {name for name in modules if name.startswith("atlas_lib.") and name.count(".") == 1}
    flat -= {f"atlas_lib.{room}" for room in ROOMS}
    depth: dict[str, int] = {}
    for name in TopologicalSorter(modules).static_order():
        depth[name] = 1 + max((depth[other] for other in modules[name] & flat), default=0)
    return max(depth[name] for name in flat)


def measures() -> dict[str, object]:
    """The table of sizes, as `wc -l` counts them."""
    library, tools = files("atlas_lib"), files("tools")
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in library + tools}
    functions = [
        node.end_lineno - node.lineno + 1
        for path in library
        for node in ast.walk(trees[path])
        if isinstance(node, ast.FunctionDef)
    ]
    raises = sum(isinstance(n, ast.Raise) for path in library for n in ast.walk(trees[path]))
    places = defaultdict(set)
    for path, tree in trees.items():
        for node in tree.body:
            targets = [getattr(node, "name", None), *getattr(node, "targets", [])]
            for target in targets:
                places[getattr(target, "id", target)].add(path)
    twice = sorted(
        name for name, where in places.items() if isinstance(name, str) and len(where) > 1
    )
    aliased = [
        path.name
        for path in [*library, *tools, *files("tests"), *files("notebooks"), *files("benchmarks")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith(("atlas_lib", "tools"))
        and any(alias.asname for alias in node.names)
    ]
    modules = graph()
    return {
        "atlas_lib flat files": lines(files("atlas_lib", "*.py")),
        "atlas_lib with its rooms": lines(library),
        "tools": lines(tools),
        "tests": lines(files("tests")),
        "import cycle": cycle(modules) or 0,
        "layers of flat files": "-" if cycle(modules) else layers(modules),
        "median / longest function": f"{statistics.median(functions):g} / {max(functions)}",
        "raise per thousand lines": round(1000 * raises / lines(library), 1),
        "names defined twice": f"{len(twice)}: {', '.join(twice)}",
        "files with an alias": f"{len(set(aliased))}: {', '.join(sorted(set(aliased)))}",
    }


if __name__ == "__main__":
    for name, value in measures().items():
        print(f"{name:<28}{value}")
