"""Finding the sites of a model: a walk of the module tree for coverage, torch.fx for dataflow."""

from daqconvert.graph.apply import apply_sites, integer_sites
from daqconvert.graph.sites import Found, find_sites

__all__ = [
    "Found",
    "apply_sites",
    "find_sites",
    "integer_sites",
]
