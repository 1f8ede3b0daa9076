"""The test of a module is found by its path: `graph/signs.py` is tested in `tests/graph/test_signs.py`.

A test file that is not named like a module tests behaviour across modules; a module without a test file of its name is
held by one of these, or by the test of its nearest user. The tables below list both with their reasons.
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
    "test_quantized_for_targets.py": "what a target asks, from the plan to the frozen model",
    "test_random_graphs.py": "random programs, the whole way",
    "test_scaling.py": "work and memory grow in a straight line",
    "artifact/test_format.py": "docs/artifact.md, read by its prose alone",
    "artifact/test_fuzz.py": "random damage to any part of an artifact",
    "artifact/test_roundtrip.py": "saved and loaded is identical",
    "calibration/test_modes.py": "what is observed: evaluation mode, training mode, or both",
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
# Modules without a test file of their name: the file that holds each, and what of it
ELSEWHERE = {
    "errors.py": ("test_public.py", "its classes are public names; each message is tested where it is raised"),
    "seeding.py": ("training/batching/test_epochs.py", "seeds decide what a loader gives"),
    "version.py": ("test_public.py", "the version is the declared one"),
    "cli/deployment.py": ("cli/test_finetune.py", "the last steps of a run, by the files and the summary they leave"),
    "cli/job.py": ("cli/test_finetune.py", "a run is its job: resumed, refused, started anew"),
    "cli/output.py": ("cli/test_plan.py", "what a command prints, as text and as JSON"),
    "data/input_config.py": ("data/test_images.py", "images are normalized as the model expects them"),
    "deploy/comparing/probes.py": ("deploy/comparing/test_verifying.py", "every layer of two models is watched"),
    "deploy/programs/code_flow.py": ("deploy/programs/test_pt2e.py", "what moves codes, by the program of a network"),
    "deploy/programs/dialects.py": ("deploy/programs/test_pt2e.py", "each dialect, by the programs that it gives"),
    "deploy/onnx/frozen_operators.py": ("deploy/onnx/test_expansion.py", "operators that expansion replaces"),
    "deploy/onnx/lowering.py": ("deploy/test_bad_input.py", "what torch cannot follow is told plainly"),
    "functional/grid.py": ("quantizers/test_weight.py", "grids, levels and codes by hand"),
    "functional/native.py": ("functional/test_operators.py", "registration; kernels and plain torch agree"),
    "functional/product_operator.py": ("functional/test_layer_operator.py", "products are a part of every step"),
    "functional/reference.py": ("functional/test_dasr.py", "what the closed form is compared with"),
    "graph/apply.py": ("graph/test_call_sites.py", "sites are put into a model and frozen there"),
    "graph/calls.py": ("graph/test_call_sites.py", "which calls are found"),
    "graph/multiplying.py": ("graph/test_call_sites.py", "which modules multiply by themselves"),
    "graph/rewrite.py": ("graph/test_call_sites.py", "a rewritten forward computes the same"),
    "graph/scan.py": ("graph/test_sites.py", "a read of a dtype or shape is no product"),
    "graph/trace.py": ("graph/test_sites.py", "what fx cannot follow stays a node"),
    "kernels/loading.py": ("kernels/test_build.py", "built where it is loaded first"),
    "layers/base.py": ("layers/test_families.py", "what all families inherit"),
    "layers/frozen.py": ("test_exactness.py", "a frozen layer computes what its quantized form did"),
    "layers/mode.py": ("test_convert.py", "every module keeps its mode"),
    "layers/registry.py": ("layers/test_lookup.py", "read through the lookup alone"),
    "layers/site.py": ("test_contract.py", "the state of a site is keys that users rely on"),
    "policy/checks.py": ("policy/test_policy_files.py", "a file that is wrong is told what is wrong"),
    "quantizers/base.py": ("quantizers/test_input.py", "a state that every quantizer has"),
    "quantizers/layout.py": ("layers/test_families.py", "output channels, transposed ones too"),
    "quantizers/making.py": ("layers/test_roundings.py", "one word makes other quantizers"),
    "report/fits.py": ("report/test_training_page.py", "fits are a section of the page"),
    "report/html.py": ("report/test_training_page.py", "a page whose tags nest, and whose names are text"),
    "spec/plans.py": ("spec/test_totals.py", "plans by what they sum up"),
    "spec/settings.py": ("spec/test_auto.py", "settings that can be, and those that cannot"),
    "spec/site_facts.py": ("policy/test_plan_json.py", "every field is written and read"),
    "spec/text_table.py": ("deploy/comparing/test_export_report.py", "the text of a report"),
    "spec/toml.py": ("policy/test_policy_files.py", "written and read again"),
    "training/parts/assembly.py": ("training/parts/test_resume.py", "all parts, put together by recipes"),
    "training/parts/measures.py": ("training/parts/test_snapshots.py", "what is measured is what is written"),
    "training/patterns.py": ("training/optim/test_optimizers.py", "names and patterns of no_decay"),
    "training/run.py": ("training/test_looping.py", "data, which the loop fills"),
}
FILES = sorted(str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py"))
MODULES = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if not path.name.startswith("__"))


def module(file: str) -> Path:
    """The module that a test file names by its path."""
    path = SOURCE / file
    return path.with_name(path.name.removeprefix("test_"))


@pytest.mark.parametrize("file", FILES)
def test_a_file_names_its_module_or_is_listed(file):
    listed = file in BEHAVIOUR or Path(file).parts[0] in FOLDERS
    assert module(file).is_file() or listed, f"no module is called {module(file).name}: rename it, or list it with why"
    assert not (module(file).is_file() and file in BEHAVIOUR), "it names its module: take it off the list"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_its_test_file_or_is_listed(name):
    own = str(Path(name).with_name(f"test_{Path(name).name}"))
    assert own in FILES or name in ELSEWHERE, f"nothing tests it: add tests/{own}, or a row that says what does"
    assert not (own in FILES and name in ELSEWHERE), f"tests/{own} is there: take its row off the list"


def test_nothing_is_listed_that_is_not_there():
    assert set(BEHAVIOUR) <= set(FILES)
    assert all((TESTS / folder).is_dir() for folder in FOLDERS)
    assert set(ELSEWHERE) <= set(MODULES)
    assert {file for file, _ in ELSEWHERE.values()} <= set(FILES)


def test_what_several_tests_need_is_a_helper():
    """A name that several files need is imported from `helpers`, never from a test or a conftest."""
    imports = re.compile(r"^ *(from|import) ([\w.]*\.)?(test_|conftest)", re.MULTILINE)
    found = {str(path.relative_to(TESTS)) for path in TESTS.rglob("*.py") if imports.search(path.read_text("utf-8"))}
    assert found == {"test_architecture_page.py"}  # it draws the `FLOORS` of `test_architecture.py`
