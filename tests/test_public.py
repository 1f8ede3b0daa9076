"""What `import daqconvert` promises: these names and no others, each explained, and nothing heavy loaded."""

import inspect
import subprocess
import sys
import tomllib

import pytest

import daqconvert

PUBLIC = [
    "ArtifactError",
    "CalibrationError",
    "ConversionError",
    "Coverage",
    "DaqError",
    "DataError",
    "ExportError",
    "FrozenError",
    "Plan",
    "Policy",
    "PolicyError",
    "Recipe",
    "Rule",
    "Settings",
    "TrainingError",
    "__version__",
    "cache_weights",
    "calibrate",
    "coverage",
    "disabled",
    "evaluate",
    "export",
    "finetune",
    "freeze",
    "functional",
    "load",
    "load_float",
    "load_weights",
    "plan",
    "program",
    "quantize",
    "save",
    "verify",
]
EXPLAINED = [name for name in PUBLIC if callable(getattr(daqconvert, name, None))]
HEAVY = [
    "rich",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "accelerate",
    "matplotlib",
    "typer",
    "sklearn",
    "pyarrow",
    "tensorboard",
]


def test_public_names_are_these():
    """A new public name is a decision: it is written down here, in the changelog and in the docs."""
    assert sorted(daqconvert.__all__) == PUBLIC


def test_every_public_name_is_there():
    assert [name for name in daqconvert.__all__ if not hasattr(daqconvert, name)] == []


def test_every_error_class_is_public():
    """Users name the error that they catch by the package: `except daqconvert.ConversionError`."""
    values = vars(daqconvert.errors).values()
    classes = {value.__name__ for value in values if inspect.isclass(value) and issubclass(value, Exception)}
    assert "ConversionError" in classes and sorted(classes - set(PUBLIC)) == []


def test_version_is_the_declared_one(root):
    declared = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert daqconvert.__version__ == declared


@pytest.mark.parametrize("name", EXPLAINED)
def test_public_functions_and_classes_have_an_example(name):
    doc = inspect.getdoc(getattr(daqconvert, name)) or ""
    assert ">>> " in doc, f"daqconvert.{name}: the docstring has no example"


def test_import_loads_nothing_heavy(child_env, tmp_path):
    code = f"import sys, daqconvert; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=child_env, cwd=tmp_path, capture_output=True, text=True
    )
    assert (child.returncode, child.stdout.split(), child.stderr) == (0, [], "")
