"""Counting multiply-accumulates (MACs): which operators ran, how often they multiply, where operands came from."""

from daqconvert.macs.attribution import Places, assign
from daqconvert.macs.counter import Event, counting, eager
from daqconvert.macs.dry_run import count_macs, example_arguments, observe

__all__ = [
    "Event",
    "Places",
    "assign",
    "count_macs",
    "counting",
    "eager",
    "example_arguments",
    "observe",
]
