"""A small network's sites, and the plan of a policy for them."""

from daqconvert.policy.resolve import resolve
from daqconvert.spec import Plan, Policy, Site

SITES = (
    Site("conv1", "Conv2d", (16, 3, 3, 3), 16, reduction=27, params=432, first=True, macs=442368),
    Site("layer1.0.conv1", "Conv2d", (16, 16, 3, 3), 16, reduction=144, params=2304, nonnegative=True),
    Site("layer1.0.attn.qkv", "Linear", (48, 16), 48, reduction=16, params=816),
    Site("layer2.0.conv1", "Conv2d", (32, 16, 3, 3), 32, reduction=144, params=4608, nonnegative=True),
    Site("layer2.0.attn.proj", "Linear", (32, 32), 32, 32, 1056, reason="its weight is parametrized", notes=("seen",)),
    Site("head.fc", "Linear", (10, 32), 10, reduction=32, params=330, nonnegative=True, last=True),
)


def planned(policy: Policy, sites: tuple[Site, ...] = SITES) -> Plan:
    """Resolve a policy for the six layers, or for others."""
    return resolve(policy, sites, model="Net", order="fx", other_params=64, input_size=(1, 3, 32, 32))
