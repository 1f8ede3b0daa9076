"""The modules of a package and what they import, read from their syntax trees without running them."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Import(NamedTuple):
    """One name imported by one module."""

    line: int
    target: str  # "torch.nn.functional", "daqconvert.spec.Plan"
    lazy: bool  # inside a function: runs when the function is called
    typed: bool = False  # under `if TYPE_CHECKING:`: never runs


def imports_of(tree: ast.Module, package: str) -> Iterator[Import]:
    """Yield what a module of `package` imports, inside functions and under `if TYPE_CHECKING:` too."""

    def visit(node: ast.AST, lazy: bool, typed: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, lazy, typed) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield from (Import(node.lineno, f"{base}.{alias.name}", lazy, typed) for alias in node.names)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checks = isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy, typed or (checks and child not in node.orelse))

    return visit(tree, False, False)


class Package:
    """The modules below one folder, by dotted name; the package itself is `NAME.__init__`."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.files = {self._dotted(folder, path): path for path in sorted(folder.rglob("*.py"))}
        self.trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.files.items()}
        self.imports = {name: list(imports_of(tree, parent(name))) for name, tree in self.trees.items()}

    @staticmethod
    def _dotted(folder: Path, path: Path) -> str:
        return ".".join((folder.name, *path.relative_to(folder).with_suffix("").parts))

    def module(self, target: str) -> str | None:
        """The module of this package in which an imported name lives, or None if it is not of this package."""
        if target != self.name and not target.startswith(self.name + "."):
            return None
        while target:
            for candidate in (target, f"{target}.__init__"):
                if candidate in self.files:
                    return candidate
            target = parent(target)
        return f"{self.name}.__init__"

    def graph(self) -> dict[str, set[str]]:
        """Return module -> the modules of this package that it imports, also lazily or for types only."""
        found = {name: {self.module(i.target) for i in imports} for name, imports in self.imports.items()}
        return {name: {target for target in targets if target} for name, targets in found.items()}

    def unit(self, module: str) -> str:
        """The part of the package a module belongs to: `policy` for `daqconvert.policy.toml`."""
        return module.split(".")[1]


def parent(dotted: str) -> str:
    return dotted.rpartition(".")[0]


def cycle(package: Package) -> list[str]:
    """A cycle of imports, or an empty list."""
    try:
        graphlib.TopologicalSorter(package.graph()).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []
