"""Deciding which layer gets which bits: makes a `Plan` from a `Policy`; imports only `spec` and `errors`."""

from daqconvert.policy.policy_files import from_dict, from_toml
from daqconvert.spec.toml import to_dict, to_toml

__all__ = [
    "from_dict",
    "from_toml",
    "to_dict",
    "to_toml",
]
