"""The shape of the code: who may import whom, how long files and functions may be, who owns a heavy library.

The rules are the tables below: a new module takes its place in `FLOORS`, a new heavy library its owner in `OWNERS`.
"""

import ast
import collections
import inspect
from pathlib import Path

import pytest

from helpers.import_graph import Package, cycle

PACKAGE = "daqconvert"

# Lowest first; a module imports from its own line and from those above it in this list, never from below. A floor is a
# group of lines that belong together; `docs/architecture.md` draws it as one.
FLOORS = {
    "ground": (("errors", "version"), ("files", "seeding"), ("spec",), ("kernels",)),
    "mathematics": (("functional",),),
    "modules": (("quantizers",), ("layers",)),
    "seeing": (("models",), ("policy",), ("graph", "macs"), ("report",), ("batches", "kept_plan")),
    "verbs": (("convert", "calibration", "freezing", "counting"),),
    "around": (("sources",), ("data",), ("artifact",)),
    "deeper work": (("posttraining",), ("training",)),
    "deployment": (("deploy",),),
    "faces": (("cli",), ("__init__", "__main__")),
}
LAYERS = tuple(line for lines in FLOORS.values() for line in lines)
# These may import less than their place in the list allows: only what is named here.
KNOWS_ONLY = {
    "errors": (),
    "spec": ("errors",),
    "kernels": (),
    "functional": ("errors", "spec", "kernels"),
    "policy": ("errors", "spec"),
    "report": ("errors", "spec"),
}
# Slow to import, or an extra that may be missing: who may import it, and only inside the function that uses it ...
OWNERS = {
    "rich": ("report", "cli"),
    "typer": ("cli",),
    "matplotlib": ("report",),
    "onnx": ("deploy",),
    "onnxruntime": ("deploy",),
    "onnxscript": ("deploy",),
    "accelerate": ("training",),
    "tomlkit": ("spec",),
    "tensorboard": ("training",),
    "pyarrow": ("data",),
    "sklearn": ("data",),
}
# ... except in these modules, which `import daqconvert` does not load.
EAGER = {"typer": ("cli",)}

COMING = {"ptq", "search", "compile"}  # verbs that are planned: no module may have their names

MAX_FILE = 450
MAX_FUNCTION = 40  # lines, docstring not counted


def misplaced(package: Package) -> list[str]:
    """Return imports that point upward, units missing in `FLOORS`, and units that import more than they may."""
    height = {unit: i for i, layer in enumerate(LAYERS) for unit in layer}
    problems = [
        f"{module} has no place: add {package.unit(module)!r} to FLOORS"
        for module in package.files
        if package.unit(module) not in height
    ]
    for module, targets in package.graph().items():
        for target in sorted(targets):
            unit, other = package.unit(module), package.unit(target)
            if unit == other or unit not in height or other not in height:
                continue
            if height[other] > height[unit]:
                problems.append(f"{module} imports {target}: {other!r} stands above {unit!r}")
            elif other not in KNOWS_ONLY.get(unit, (other,)):
                problems.append(f"{module} imports {target}: {unit!r} may know only {KNOWS_ONLY[unit]}")
    return problems


def heavy(package: Package) -> list[str]:
    """Heavy libraries that are imported by others than their owners, or when the module is imported."""
    problems = []
    for module, imports in package.imports.items():
        for line, target, lazy, typed in imports:
            # torch's front to tensorboard imports it as well
            library = "tensorboard" if target.startswith("torch.utils.tensorboard") else target.partition(".")[0]
            unit = package.unit(module)
            if unit not in OWNERS.get(library, (unit,)):
                problems.append(f"{module}:{line} imports {library}, which belongs to {OWNERS[library]}")
            elif library in OWNERS and not (lazy or typed) and unit not in EAGER.get(library, ()):
                problems.append(
                    f"{module}:{line} imports {library} at its top: move it into the function that uses it"
                )
    return problems


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    doc = first.end_lineno - first.lineno + 1 if ast.get_docstring(function, clean=False) is not None else 0
    return function.end_lineno - function.lineno + 1 - doc


@pytest.fixture(scope="module")
def package(root: Path) -> Package:
    return Package(root / "src" / PACKAGE)


def test_no_import_cycle(package):
    assert not cycle(package), "a cycle of imports: " + " -> ".join(cycle(package))


@pytest.mark.parametrize("folder", ["tests/helpers", "benchmarks"])
def test_helpers_and_benchmarks_import_in_no_circle(root, folder):
    found = cycle(Package(root / folder))
    assert not found, "a cycle of imports: " + " -> ".join(found)


def test_imports_point_downward(package):
    assert not misplaced(package), "\n".join(misplaced(package))


def test_heavy_libraries_stay_with_their_owners(package):
    assert not heavy(package), "\n".join(heavy(package))


@pytest.mark.parametrize("folder", ["src", "tests", "examples", "benchmarks"])
def test_files_are_short(root, folder):
    lengths = {
        path.relative_to(root): len(path.read_text("utf-8").splitlines()) for path in root.glob(f"{folder}/**/*.py")
    }
    assert not {str(path): n for path, n in lengths.items() if n > MAX_FILE}


def test_functions_are_short(package):
    functions = [
        (f"{module}.{node.name}", length(node))
        for module, tree in package.trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert not {name: n for name, n in functions if n > MAX_FUNCTION}


def twice(names: list[str]) -> list[str]:
    return sorted(name for name, count in collections.Counter(names).items() if count > 1)


def own_names(package: Package) -> list[str]:
    """Module names of the package, without the files that are named by their place: `base`, and those of commands."""
    stems = [module.split(".")[-1] for module in package.files if package.unit(module) != "cli"]
    return [stem for stem in stems if stem not in ("__init__", "__main__", "base")]


def test_a_module_name_stands_once(package):
    assert not twice(own_names(package))


def test_a_class_name_stands_once(package):
    classes = [node.name for tree in package.trees.values() for node in tree.body if isinstance(node, ast.ClassDef)]
    assert not twice([name for name in classes if not name.startswith("_")])


def test_no_module_is_named_like_an_exported_function(package):
    import daqconvert

    modules = set(own_names(package))
    functions = {name for name in daqconvert.__all__ if inspect.isfunction(getattr(daqconvert, name))} | COMING
    assert not modules & functions, "import daqconvert.NAME would hide daqconvert.NAME()"


# The checks themselves, on small packages that break one rule each.


def write(folder: Path, **files: str) -> Package:
    for name, text in files.items():
        path = folder / PACKAGE / (name.replace("__in__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Package(folder / PACKAGE)


@pytest.mark.parametrize(
    "back",
    [
        pytest.param("from daqconvert.convert import f", id="absolute"),
        pytest.param("import daqconvert.convert", id="dotted"),
        pytest.param("from .convert import f", id="relative"),
        pytest.param("from . import convert", id="sibling"),
        pytest.param("def g():\n    from daqconvert import convert", id="inside a function"),
        pytest.param(
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from daqconvert.convert import f",
            id="for types only",
        ),
        pytest.param("try:\n    from daqconvert.convert import f\nexcept ImportError:\n    pass", id="inside a try"),
    ],
)
def test_a_cycle_is_found(tmp_path, back):
    package = write(tmp_path, __init__="", convert="from daqconvert.freezing import g", freezing=back)
    assert set(cycle(package)) == {"daqconvert.convert", "daqconvert.freezing"}


@pytest.mark.parametrize(
    ("module", "text", "told"),
    [
        pytest.param(
            "layers__in__conv", "from daqconvert.cli import main", "'cli' stands above 'layers'", id="upward"
        ),
        pytest.param("spec", "from daqconvert import quantize", "'__init__' stands above 'spec'", id="the package"),
        pytest.param("report__in__table", "from ..graph import walk", "'report' may know only", id="knows too much"),
        pytest.param("helpers", "", "add 'helpers' to FLOORS", id="no place"),
    ],
)
def test_a_misplaced_import_is_found(tmp_path, module, text, told):
    package = write(tmp_path, __init__="", cli="", graph="", **{module: text})
    assert [told in problem for problem in misplaced(package)] == [True]


@pytest.mark.parametrize(
    ("module", "text", "told"),
    [
        pytest.param("report", "import rich.table", "at its top", id="eager"),
        pytest.param("report", "def f():\n    import rich.table", None, id="lazy"),
        pytest.param("convert", "def f():\n    from onnx import helper", "belongs to", id="not the owner"),
        pytest.param(
            "training", "from torch.utils.tensorboard import SummaryWriter", "at its top", id="by way of torch"
        ),
        pytest.param("cli", "import typer", None, id="allowed"),
    ],
)
def test_a_heavy_import_is_found(tmp_path, module, text, told):
    package = write(tmp_path, __init__="", **{module: text})
    assert [told in problem for problem in heavy(package)] == ([True] if told else [])
