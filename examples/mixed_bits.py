"""Bits per layer from a file: what a mixed policy saves, and how much accuracy it costs before any further training.

`policy.toml`, beside this file, gives few bits to the wide layers at the end, which hold most of the weights, and more
to the narrow ones at the start. Change it and run this again; `daqconvert plan test_resnet --policy policy.toml` shows
the plan alone.
"""

import argparse
from pathlib import Path

import timm
import torch

import daqconvert as dq
from daqconvert.data import Loaders, create_loaders
from daqconvert.report.tables import plan_table, render, simple_table

POLICY = Path(__file__).with_name("policy.toml")


def train_in_float(model: torch.nn.Module, data: Loaders, epochs: int = 4) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for images, labels in data.train:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", type=Path, default=POLICY, help="by default the one beside this file")
    policy = parser.parse_args().policy

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    data = create_loaders(None, model)
    train_in_float(model, data)

    plan = dq.plan(model, policy=policy, example_inputs=torch.zeros(1, *data.input_size))
    print(render(plan_table(plan)), end="\n\n")  # print(plan) is the short form

    rows = [("float", plan.float_bytes / 1000, dq.evaluate(model, data.val).top1)]
    choices = {f"{bits} bits, first and last 8": {"w_bits": bits, "a_bits": bits} for bits in (8, 6, 4, 3)}
    for name, arguments in {**choices, policy.name: {"policy": policy}}.items():
        qmodel = dq.quantize(model, **arguments)
        dq.calibrate(qmodel, data.calibration)
        rows.append((name, dq.plan(qmodel).bytes / 1000, dq.evaluate(qmodel, data.val).top1))
    print(render(simple_table("", ("policy", "kB", "top-1, not trained further"), rows)))


if __name__ == "__main__":
    main()
