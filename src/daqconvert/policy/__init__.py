"""Deciding which layer gets which bits: a `Policy` in, a `Plan` out; knows `spec` and `errors` alone."""

from daqconvert.policy.policy_files import from_dict, from_toml
from daqconvert.spec.toml import to_dict, to_toml

__all__ = [
    "from_dict",
    "from_toml",
    "to_dict",
    "to_toml",
]
