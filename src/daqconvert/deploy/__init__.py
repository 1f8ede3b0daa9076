"""Deployment: a frozen model as a file for another runtime, and the comparison of any two models.

`exporting` holds the verb `export`, `onnx/` how an ONNX file is made and run, `programs/` how a frozen model becomes a
program in the dialect of a runtime, `comparing/` how two models are
compared: the verb `verify`, and the check of every file that `export` writes.
"""

from daqconvert.deploy.comparing.export_report import ExportReport, ProgramReport
from daqconvert.deploy.comparing.verify_report import VerifyReport
from daqconvert.deploy.comparing.verifying import verify
from daqconvert.deploy.exporting import export, export_float
from daqconvert.deploy.onnx.runtime import OnnxModel, time_session
from daqconvert.deploy.programs import program

__all__ = [
    "ExportReport",
    "OnnxModel",
    "ProgramReport",
    "VerifyReport",
    "export",
    "export_float",
    "program",
    "time_session",
    "verify",
]
