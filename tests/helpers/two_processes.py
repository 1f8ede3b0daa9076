"""Scenarios of training on several processes.

`python two_processes.py FOLDER` forks two processes, and each saves its results as `FOLDER/RANK.pt`. Started by
`accelerate launch` or `torchrun` this file is one of their processes, and runs the first scenario only.
"""

import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import daqconvert as dq
from daqconvert.errors import DaqError
from daqconvert.training import evaluate, finetune
from daqconvert.training.checkpoint import layer_settings
from helpers.clusters import Clusters, quantized_model

STEPS, GLOBAL_BATCH, SAMPLES = 50, 16, 80  # ten epochs of five steps
OPTIONS = {"lr": 0.02, "distill": 0.5, "progress": False}


def model(*, calibrated: bool = True) -> nn.Module:
    """Return a model without dropout (its random numbers differ between processes), with bounds from the same data."""
    found = quantized_model()
    found[3].p = 0.0
    if calibrated:
        dq.calibrate(found, [torch.stack([x for x, _ in Clusters(SAMPLES)])])
    return found


def loader(batch: int, **options: Any) -> DataLoader:
    return DataLoader(Clusters(SAMPLES, **options), batch_size=batch, shuffle=True)


def trained(processes: int, **options: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The model after 50 steps with one global batch, and the history."""
    qmodel, val = model(), DataLoader(Clusters(SAMPLES), batch_size=12)
    options = {**OPTIONS, "epochs": STEPS // 5, "batch_norm": "freeze", **options}
    batch = GLOBAL_BATCH // processes // options.get("accumulate", 1)
    result = finetune(qmodel, loader(batch, noise=0.3), val, **options)
    return dict(qmodel.state_dict()), result.history


def error_of(*args: Any, **options: Any) -> str:
    try:
        finetune(*args, **{**OPTIONS, **options})
    except DaqError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def calibration(rank: int) -> dict[str, Any]:
    """Calibrate on different data in each process: alone, each would find other bounds and another sign."""
    qmodel = model(calibrated=False)
    data = [(x + 50.0 * rank, y) for x, y in loader(8)]
    finetune(qmodel, data, epochs=1, **{**OPTIONS, "lr": 0.0}, quantizer_lr=0.0, batch_norm="freeze")
    quantizers = [m for m in qmodel.modules() if isinstance(m, dq.quantizers.base.Quantizer)]
    mirrors = [(q.ready, getattr(q, "sign", None), q.lower.requires_grad) for q in quantizers]
    return {"state": dict(qmodel.state_dict()), "mirrors": mirrors}


def batch_norm(rank: int) -> dict[str, Any]:
    qmodel = model()
    clean = set(vars(qmodel))
    finetune(qmodel, loader(8, noise=0.3), epochs=2, precision="bf16", reestimate=2, ema=0.9, **OPTIONS)
    return {"state": dict(qmodel.state_dict()), "left": set(vars(qmodel)) - clean, "settings": layer_settings(qmodel)}


def poisoned(rank: int) -> str:
    qmodel = model()
    if rank == 1:
        qmodel[6].register_forward_hook(lambda module, args, out: out * float("nan") if module.training else out)
    return error_of(qmodel, loader(8), epochs=1, distill=0.0)


def stopped(rank: int, folder: Path) -> dict[str, Any]:
    """Process 1, not the main one, gets SIGTERM; both processes stop after the same step, and are resumed."""
    options = {**OPTIONS, "epochs": 3, "accumulate": 2}
    whole = model()
    finetune(whole, loader(4, noise=0.3), out_dir=folder / "whole", **options)
    calls = []

    def count(module: nn.Module, args: Any) -> None:
        own = module is qmodel and module.training  # not the copies of the model, which have the hook too
        calls.extend([1] * own)
        if rank == 1 and len(calls) == 15 and own:
            os.kill(os.getpid(), signal.SIGTERM)

    qmodel = model()
    handle = qmodel.register_forward_pre_hook(count)
    said = error_of(qmodel, loader(4, noise=0.3), out_dir=folder / "parts", **{**options, "distill": 0.5})
    handle.remove()
    resumed = model()
    finetune(resumed, loader(4, noise=0.3), out_dir=folder / "parts", resume=True, **options)
    same = all(torch.equal(v, whole.state_dict()[k]) for k, v in resumed.state_dict().items())
    return {"said": said, "same": same}


def unwritable(rank: int, folder: Path) -> str:
    (folder / "file").write_text("")
    return error_of(model(), loader(8), out_dir=folder / "file" / "run", epochs=1)


def evaluation() -> dict[str, Any]:
    from accelerate import Accelerator

    seven = DataLoader(Clusters(SAMPLES), batch_size=12)  # batches: four on one process, three on the other
    found = evaluate(model(), seven, topk=(1, 2), accelerator=Accelerator(cpu=True))
    return {"loss": found.loss, "count": found.count, "topk": dict(found.topk)}


def scenarios(rank: int, folder: Path) -> dict[str, Any]:
    return {
        "trained": trained(2),
        "accumulated": trained(2, accumulate=2),
        "calibration": calibration(rank),
        "batch norm": batch_norm(rank),
        "poisoned": poisoned(rank),
        "stopped": stopped(rank, folder),
        "unwritable": unwritable(rank, folder),
        "evaluation": evaluation(),
    }


def child(rank: int, port: int, folder: Path) -> None:
    launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in launch.items()}})
    code = 1
    try:
        torch.save(scenarios(rank, folder), folder / f"{rank}.pt")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        torch.save({"trained": trained(int(os.environ["WORLD_SIZE"]))}, folder / f"{os.environ['RANK']}.pt")
        return 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in (0, 1):
        children.append(os.fork())
        if children[-1] == 0:
            child(rank, port, folder)
    codes = []
    for _ in children:  # if one fails, the other would wait for it forever
        number, status = os.wait()
        codes.append(status)
        if status:
            for other in set(children) - {number}:
                os.kill(other, signal.SIGKILL)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
