"""daqconvert: any `torch.nn.Module` in, the same model at 1 to 8 bits out; finetune it, freeze it, deploy it."""

from daqconvert import functional
from daqconvert.artifact import load, save
from daqconvert.calibration import calibrate
from daqconvert.convert import load_float, plan, quantize
from daqconvert.counting import Coverage, coverage
from daqconvert.deploy.comparing.verifying import verify
from daqconvert.deploy.exporting import export
from daqconvert.deploy.programs.pt2e import program
from daqconvert.errors import (
    ArtifactError,
    CalibrationError,
    ConversionError,
    DaqError,
    DataError,
    ExportError,
    FrozenError,
    PolicyError,
    TrainingError,
)
from daqconvert.freezing import freeze
from daqconvert.models import cache_weights, disabled
from daqconvert.spec import Plan, Policy, Rule, Settings
from daqconvert.training import Recipe, evaluate, finetune, load_weights
from daqconvert.version import __version__ as __version__

__all__ = [
    # verbs
    "cache_weights",
    "calibrate",
    "coverage",
    "disabled",
    "evaluate",
    "export",
    "finetune",
    "freeze",
    "load",
    "load_float",
    "load_weights",
    "plan",
    "program",
    "quantize",
    "save",
    "verify",
    # data
    "Coverage",
    "Plan",
    "Policy",
    "Recipe",
    "Rule",
    "Settings",
    # errors
    "ArtifactError",
    "CalibrationError",
    "ConversionError",
    "DaqError",
    "DataError",
    "ExportError",
    "FrozenError",
    "PolicyError",
    "TrainingError",
    # maths
    "functional",
    "__version__",
]
