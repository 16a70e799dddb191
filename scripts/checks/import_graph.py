"""Draw the import graph between the folders of src/ into docs/architecture.md.

    python scripts/checks/import_graph.py            # update the graph
    python scripts/checks/import_graph.py --check    # status 1 if the graph is out of date

A "room" is a folder in a package, or a module next to these folders. Imports inside functions are included.
"""

import argparse
import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- import graph -->\n", "<!-- end of import graph -->\n"
PACKAGES = ("train", "models", "data")


def imports(file: Path) -> set[str]:
    """Return the full names of a file's imports; for `from a import b`, both `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules(source: Path = ROOT / "src") -> dict[str, Path]:
    """Return the files of the three packages by module name, without `__init__` files, which only re-export."""
    files = [file for package in PACKAGES for file in (source / package).rglob("*.py") if file.name != "__init__.py"]
    return {".".join(file.relative_to(source).with_suffix("").parts): file for file in files}


def room(module: str) -> str:
    """Return the room of a module: `models.loss.objectives` -> `models.loss`, `models.draft` -> `models.draft`."""
    return ".".join(module.split(".")[:2])


def arrows(source: Path = ROOT / "src") -> dict[str, set[str]]:
    """Return the rooms that each room imports."""
    files = modules(source)
    rooms = {room(name): set() for name in files}
    for name, file in files.items():
        found = {room(other) for other in imports(file) if room(other) in rooms}
        rooms[room(name)] |= found - {room(name)}
    return rooms


def order(graph: dict[str, set[str]]) -> list[str]:
    """Return the rooms in topological order, imported rooms first.

    Raises:
        graphlib.CycleError: the rooms have an import cycle.
    """
    return list(TopologicalSorter(graph).static_order())


def direct(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the transitive reduction of the graph, for a readable diagram."""
    below: dict[str, set[str]] = {}
    for name in order(graph):
        below[name] = graph[name].union(*(below[other] for other in graph[name]))
    return {name: {o for o in found if not any(o in below[x] for x in found - {o})} for name, found in graph.items()}


def picture(graph: dict[str, set[str]]) -> str:
    """Format the graph as a Mermaid diagram, with a box per room and an arrow per non-transitive import."""
    lines = ["```mermaid", "flowchart TD"]
    for package in PACKAGES:
        names = sorted(name for name in graph if name.startswith(f"{package}."))
        boxes = [f"    {name}[{name.split('.')[1].strip('_')}]" for name in names]
        lines += [f"  subgraph {package}", *boxes, "  end"]
    lines += [f"  {name} --> {other}" for name, found in sorted(direct(graph).items()) for other in sorted(found)]
    return "\n".join([*lines, "```", ""])


def with_picture(text: str) -> str:
    """Return the page with the diagram between its two markers replaced by the current one."""
    before, rest = text.split(START)
    return before + START + picture(arrows()) + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only check; status 1 if the graph is out of date")
    check = parser.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    if check and with_picture(text) != text:
        sys.exit(f"{PAGE.relative_to(ROOT)}: the import graph is out of date. Run scripts/checks/import_graph.py.")
    if not check:
        PAGE.write_text(with_picture(text), encoding="utf-8")


if __name__ == "__main__":
    main()
