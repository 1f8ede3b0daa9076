"""One program of `torch.export` for a frozen model, in the dialect of the runtime that shall compute it."""

from daqconvert.deploy.programs.dialects import DIALECTS, Dialect
from daqconvert.deploy.programs.pt2e import Lowered, lower_frozen, program

__all__ = ["DIALECTS", "Dialect", "Lowered", "lower_frozen", "program"]
