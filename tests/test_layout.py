"""The test of a module is found by its path: `graph/calls.py` is tested in `tests/graph/test_calls.py`.

A test file that is not named like a module tests behaviour; the tables below list these files with their reasons.
"""

import re
from pathlib import Path

import pytest

from helpers.children import ROOT

SOURCE, TESTS = ROOT / "src" / "daqconvert", ROOT / "tests"

# Folders of tests without a folder of that name in the package
FOLDERS = {
    "docs": "pages and their commands are true",
    "usage": "what people and torch do with a converted model: compile, copy, distribute, cast, hook",
}
# Files that test more than one module, or one module for a reason of its own
BEHAVIOUR = {
    "test_architecture.py": "the shape of the code",
    "test_architecture_page.py": "the page that shows it",
    "test_layout.py": "the places of the tests",
    "test_contract.py": "what users rely on: keys, loading, classes, hooks, copies, dtypes",
    "test_contract_in_use.py": "what users rely on in use: gradients, contexts, wrappers, shared layers",
    "test_earlier_files.py": "files that earlier versions wrote",
    "test_exactness.py": "the promises of identity",
    "test_examples.py": "the scripts in examples/",
    "test_freeze_memory.py": "memory of freezing and saving",
    "test_gpu.py": "what holds on a GPU",
    "test_public.py": "public names",
    "test_random_graphs.py": "random programs, the whole way",
    "test_scaling.py": "work and memory grow in a straight line",
    "artifact/test_format.py": "docs/artifact.md, read by its prose alone",
    "artifact/test_fuzz.py": "random damage to any part of an artifact",
    "artifact/test_roundtrip.py": "saved and loaded is identical",
    "cli/test_main.py": "the command line itself, whichever command it is asked for",
    "cli/test_interrupts.py": "signals while a command runs",
    "cli/test_unlabelled.py": "finetuning on images without labels",
    "data/test_digits.py": "needs scikit-learn, which the other data sets do not",
    "data/test_unlabelled.py": "images without labels, of all data sets",
    "functional/test_golden_dasr.py": "the authors' code, recorded",
    "functional/test_golden_layer.py": "the authors' code, recorded",
    "deploy/test_bad_input.py": "what cannot be exported, whichever module finds out",
    "deploy/test_exporting_calls.py": "files of models whose sites are calls",
    "deploy/test_networks.py": "files of real architectures",
    "deploy/test_program.py": "torch's own exported program",
    "deploy/onnx/test_openvino.py": "the files in another runtime",
    "functional/test_dasr_slope.py": "the slope of `dasr.py` and its mean, by numerical integration",
    "functional/test_integer_sums.py": "sums of `integer.py` against ONNX Runtime's kernel",
    "functional/test_weight_moments.py": "moments of a weight in every program and layout",
    "functional/test_operators.py": "the operators of inputs and weights keep the same rules",
    "layers/test_baselines.py": "the formulas of EWGS and DSQ",
    "layers/test_gradients.py": "gradients of whole layers against autograd",
    "layers/test_roundings.py": "models of every rounding",
    "policy/test_call_sites.py": "rules for products, computed weights and sites with one scale",
    "quantizers/test_weight_memory.py": "when a weight is quantized again",
    "training/test_killed_runs.py": "runs that SIGKILL ends at any moment",
    "training/test_resume.py": "resumed is uninterrupted",
    "training/parts/test_resume.py": "resumed is uninterrupted, with every part",
}
FILES = sorted(str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py"))


def module(file: str) -> Path:
    """The module that a test file names by its path."""
    path = SOURCE / file
    return path.with_name(path.name.removeprefix("test_"))


@pytest.mark.parametrize("file", FILES)
def test_a_file_names_its_module_or_is_listed(file):
    listed = file in BEHAVIOUR or Path(file).parts[0] in FOLDERS
    assert module(file).is_file() or listed, f"no module is called {module(file).name}: rename it, or list it with why"
    assert not (module(file).is_file() and file in BEHAVIOUR), "it names its module: take it off the list"


def test_nothing_is_listed_that_is_not_there():
    assert set(BEHAVIOUR) <= set(FILES)
    assert all((TESTS / folder).is_dir() for folder in FOLDERS)


def test_what_several_tests_need_is_a_helper():
    """A name that several files need is imported from `helpers`, never from a test or a conftest."""
    imports = re.compile(r"^ *(from|import) ([\w.]*\.)?(test_|conftest)", re.MULTILINE)
    found = {str(path.relative_to(TESTS)) for path in TESTS.rglob("*.py") if imports.search(path.read_text("utf-8"))}
    assert found == {"test_architecture_page.py"}  # it draws the `FLOORS` of `test_architecture.py`
