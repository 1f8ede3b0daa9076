"""Does the command for ImageNet work from end to end? The very command of docs/imagenet.md, dry.

An ImageFolder of 1,000 classes with two small random JPEG files each in train/ and val/; for each network a checkpoint
of random weights instead of `--pretrained`. Then the published recipe for one epoch, killed (SIGKILL) once it has
written a checkpoint in the middle of that epoch, resumed, evaluated, frozen, exported and compared in ONNX Runtime.
Each step is checked; accuracies mean nothing here.

    python benchmarks/imagenet_path.py            # the result in results/imagenet_path.json
    python benchmarks/imagenet_path.py --classes 10 --batch-size 4 --models resnet18 --print
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is a package there

from benchmarks import common
from daqconvert.sources import build_model

NETWORKS = {  # network: preset
    "resnet18": "paper-w1a1",
    "torchvision:resnet34": "paper-w2a2",
    "torchvision:mobilenet_v2": "paper-w4a4",
}
COMMAND = "finetune {model} --data {data} --preset {preset} --recipe paper-imagenet --out {out}"
IMAGES, SIDE = 2, (96, 72)  # a class and split; larger than 64 pixels, so that the transform is ImageNet's
LIMIT = 3600  # seconds


def make_folder(root: Path, classes: int, seed: int = 0) -> Path:
    """Write train/ and val/ with a folder of images for each class."""
    random = np.random.default_rng(seed)
    for split in ("train", "val"):
        for number in range(classes):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            for index in range(IMAGES):
                coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
                coarse.resize(SIDE).save(folder / f"{index}.JPEG", quality=60)
    return root


def random_weights(model: str, classes: int, path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(build_model(model, num_classes=classes).state_dict(), path)
    return path


def daqconvert(*arguments: object) -> dict[str, Any]:
    """Run a command with --json and return its document.

    Exit code 1 is done, with classes that differ: of random weights the best logits nearly tie. How many is checked.
    """
    command = [sys.executable, "-m", "daqconvert", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    check(
        done.returncode in (0, 1) and bool(done.stdout),
        f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}",
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def killed(arguments: list[str], out: Path) -> dict[str, Any]:
    """Start a command, kill it once a checkpoint within the epoch is there, and return where the run stands."""
    with (out.parent / "killed.log").open("w") as log:
        child = subprocess.Popen([sys.executable, "-m", "daqconvert", *arguments], stdout=log, stderr=log)
        started = time.monotonic()
        while not any((out / "checkpoints").glob("step-*[1-9].safetensors")) and time.monotonic() - started < LIMIT:
            if child.poll() is not None:
                break
            time.sleep(0.01)
        child.kill()
        code = child.wait()
    check(code == -signal.SIGKILL, f"ended before it was killed ({code}): {(out.parent / 'killed.log').read_text()}")
    found: dict[str, Any] = daqconvert("inspect", out)["progress"]
    return found


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(otherwise)


def path_of(model: str, preset: str, data: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Walk the whole path with one network, and check each step."""
    out = folder / "run"
    published = COMMAND.format(model=model, data=data, preset=preset, out=out).split()
    weights = random_weights(model, options.classes, folder / "random.pt")
    dry = ["--checkpoint", str(weights), "--epochs", "1", "--input-size", str(options.input_size)]
    dry += ["--batch-size", str(options.batch_size), "--with", "checkpoint_steps=1"]
    stopped = killed([*published, *dry], out)
    resumed = daqconvert("finetune", "--out", out, "--resume")
    ended = daqconvert("inspect", out)["progress"]
    results = daqconvert("eval", out)["results"]
    frozen = daqconvert("freeze", out, "--out", folder / "artifact")
    exported = daqconvert(
        "export", folder / "artifact", "--out", folder / "again.onnx", "--input-size", options.input_size
    )
    bits = resumed["bits"]
    images, steps = IMAGES * options.classes, IMAGES * options.classes // options.batch_size
    quantized, as_codes = results[f"{bits}, quantized"], results[f"{bits}, frozen"]
    check(0 < stopped["step"] < steps, f"{model}: killed at step {stopped['step']} of {steps}")
    check((ended["step"], ended["epochs_done"]) == (steps, 1), f"{model}: ended as {ended}")
    check(quantized == as_codes and quantized["images"] == images, f"{model}: {quantized} and {as_codes}")
    check(resumed["top1"]["quantized"] == quantized["top1"], f"{model}: {resumed['top1']}, evaluated {quantized}")
    check(frozen["bytes"] == resumed["bytes"]["artifact"], f"{model}: artifacts of {frozen} and {resumed['bytes']}")
    check(resumed["onnx_class_agreement"] >= 0.99, f"{model}: ONNX agrees for {resumed['onnx_class_agreement']}")
    shown = " ".join(["daqconvert", *published, *dry]).replace(f"{folder}/", "").replace(str(data), data.name)
    layers = resumed["onnx"]["layers"]
    return {
        "command": shown, "bits": bits, "steps": steps, "killed_after_step": stopped["step"],
        "images_evaluated": images, "quantized_equals_frozen": True,
        "onnx_images_checked": resumed["onnx_images_checked"], "onnx_class_agreement": resumed["onnx_class_agreement"],
        "onnx_layers_compared": len(layers), "onnx_codes_compared": sum(layer["elements"] for layer in layers),
        "onnx_codes_differing": sum(layer["differing"] for layer in layers), "bytes": resumed["bytes"],
        "exported_from_artifact_bytes": exported["file_bytes"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--input-size", type=int, default=64, help="instead of 224, which takes an hour on two cores")
    parser.add_argument("--models", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--print", action="store_true", dest="shown", help="print the result, write no file")
    options = parser.parse_args()
    source = str(Path(__file__).resolve().parent.parent / "src")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    instead: dict[str, Any] = {"--pretrained": "--checkpoint of random weights", "--epochs": 1}
    instead |= {"--input-size": options.input_size, "--batch-size": options.batch_size, "checkpoint_steps": 1}
    found: dict[str, Any] = {}
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="imagenet-path-") as temporary:
        data = make_folder(Path(temporary) / "imagenet", options.classes)
        for model in options.models:
            folder = Path(temporary) / model.rpartition(":")[2]
            folder.mkdir()
            found[model] = path_of(model, NETWORKS[model], data, folder, options)
            result = {"classes": options.classes, "images_a_class": IMAGES, "instead": instead, "networks": found}
            if not options.shown:  # after each network: a part of the result is one, too
                common.write("imagenet_path", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
