"""Which site of a plan a product belongs to: by the parameter that its weight operand is computed from."""

from __future__ import annotations

from dataclasses import replace

from daqconvert.macs.counter import Event, owner_of
from daqconvert.spec import Plan, PlanRow


def assign(events: list[Event], plan: Plan | None) -> list[tuple[Event, str | None]]:
    """Pair each product with the name of its site, None where no site of the plan has it.

    A product with a tensor that several sites are parts of (the packed projections of an attention block), and that
    nothing tells apart, is divided evenly among those of them that no other product is known to be of.

    Args:
        events: Products with a weight operand, in order of execution.
        plan: Of the model; None names each product after the module that its weight is a parameter of.
    """
    if plan is None:
        return [(e, next(map(owner_of, e.tensors), e.module)) for e in events]
    places, several = _Places(plan), _several(plan)
    found = [places.site(event) for event in events]
    known = set(found)
    result: list[tuple[Event, str | None]] = []
    for event, site in zip(events, found, strict=True):
        rows = next((several[tensor] for tensor in event.tensors if tensor in several), [])
        rows = [row for row in rows if row.name not in known] or rows
        if site is not None or not rows:
            result.append((event, site))
            continue
        for i, row in enumerate(rows):
            share = event.macs * (i + 1) // len(rows) - event.macs * i // len(rows)
            result.append((replace(event, macs=share), row.name))
    return result


class _Places:
    """Where the sites of a plan keep and use their weights."""

    def __init__(self, plan: Plan) -> None:
        several = _several(plan)
        self._sites = {row.name for row in plan if not row.site.is_product}
        self._modules = {name: name for name in self._sites}
        self._tensors: dict[str, str] = {}
        for row in plan:
            call = row.site.call
            if call is None or call.is_product:
                continue
            # the bounds and the codes are a site's own, even where the weight is not
            quantizer = f"{call.holder}.weight_quantizer"
            own = (f"{quantizer}.upper", f"{quantizer}.step", f"{call.holder}.weight_codes")
            tensors = (tensor for tensor in call.tensors if tensor not in several)
            self._tensors |= dict.fromkeys((*own, *tensors), row.name)
            self._modules[call.holder] = row.name
            if call.dynamic:
                self._modules |= dict.fromkeys(call.modules, row.name)

    def site(self, event: Event) -> str | None:
        """Return the name of the site of a product, or None."""
        return event.site(self._sites, self._tensors, self._modules)


def _several(plan: Plan) -> dict[str, list[PlanRow]]:
    """Tensors that hold the weights of several sites."""
    rows: dict[str, list[PlanRow]] = {}
    for row in plan:
        for tensor in row.site.call.tensors if row.site.call is not None else ():
            rows.setdefault(tensor, []).append(row)
    return {tensor: found for tensor, found in rows.items() if len(found) > 1}
