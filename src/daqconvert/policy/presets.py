"""Presets, which are policies with a name: `paper-w1a1` ... `paper-w3a32` follow the paper exactly.

They quantize per tensor, subtract the mean of weights, use the mid-rise grid and the slope of the published soft
rounding with its published temperatures, and leave the first and the last layer float. The bits are those of the
paper's table; `a32` leaves the input float.

References: Distance-aware Quantization (Kim, Lee, Ham, ICCV 2021), https://github.com/cvlab-yonsei/DAQ.
"""

from __future__ import annotations

from daqconvert.errors import PolicyError, nearest
from daqconvert.spec import Policy, Settings

_PAPER_BITS = {
    f"paper-w{w}a{a}": (w, a) for w, a in ((1, 1), (1, 2), (2, 2), (3, 3), (4, 4), (1, 32), (2, 32), (3, 32))
}


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets.

    Example:
        >>> preset_names()[0]
        'paper-w1a1'
    """
    return tuple(_PAPER_BITS)


def preset(name: str) -> Policy:
    """Return the policy of that name.

    Args:
        name: One of `preset_names()`.

    Raises:
        PolicyError: If there is no such preset; the message names the nearest.

    Example:
        >>> policy = preset("paper-w1a32")
        >>> policy.default.w_bits, policy.default.a_bits, policy.first
        (1, None, None)
    """
    if not isinstance(name, str) or name not in _PAPER_BITS:
        close = nearest(name, _PAPER_BITS) if isinstance(name, str) else ""
        raise PolicyError(f"preset {name!r} does not exist. Presets are: {', '.join(_PAPER_BITS)}.{close}")
    w_bits, a_bits = _PAPER_BITS[name]
    default = Settings(
        w_bits=w_bits,
        a_bits=a_bits,
        granularity="tensor",
        grid="midrise",
        normalize=True,
        rounding="daq",
        slope="paper",
        w_gamma=2.0,
        w_sigma=1.0,
        a_gamma=2.0,
        a_sigma=2.0,
    )
    return Policy(default=default, first=None, last=None, name=name)


def is_paper(policy_name: str) -> bool:
    """Return whether a policy of this name is a paper preset, or a paper preset that arguments changed.

    Example:
        >>> is_paper("paper-w2a2 + arguments"), is_paper("paper-like.toml")
        (True, False)
    """
    return policy_name.split(" + ")[0] in _PAPER_BITS
