"""Finding the sites of a model, by a walk of the module tree and by torch.fx, and converting them in place."""

from daqconvert.graph.apply import apply_sites, integer_sites
from daqconvert.graph.sites import Found, find_sites

__all__ = [
    "Found",
    "apply_sites",
    "find_sites",
    "integer_sites",
]
