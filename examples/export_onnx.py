"""An ONNX file that runs without daqconvert and torch: exported here, then run with ONNX Runtime and numpy alone.

`predict` runs it, in a process of its own: this file, called with `--predict`. That process imports neither daqconvert
nor torch, and prints so.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path


def predict(folder: Path) -> None:
    """Classify images, given as numpy arrays: what a deployed program does."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    images = np.load(folder / "images.npy")
    (scores,) = session.run(None, {session.get_inputs()[0].name: images})
    np.save(folder / "classes.npy", scores.argmax(axis=1))
    foreign = sorted({"torch", "daqconvert"} & set(sys.modules)) or "none"
    print(f"ONNX Runtime {onnxruntime.__version__}: {len(images)} images; modules of torch or daqconvert: {foreign}")


def convert(folder: Path) -> None:
    """Train a small network on scikit-learn's digits, quantize it to 3 bits, export it, compare the classes."""
    import numpy as np
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    import daqconvert as dq

    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float().div(16).unsqueeze(1), torch.from_numpy(digits.target)
    train = list(zip(images[:1300].split(50), labels[:1300].split(50), strict=True))
    test_images, test_labels = images[1300:], labels[1300:]
    stage = [nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    stage += [nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*stage, nn.Linear(64 * 16, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(5):
        for x, y in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    qmodel = dq.quantize(model, w_bits=3, a_bits=3, last=(3, 3))
    dq.finetune(qmodel, train, epochs=3)  # calibrates by itself, on the first batches
    frozen = dq.freeze(qmodel)
    print(dq.plan(qmodel))
    print(dq.export(frozen, folder / "model.onnx", test_images[:1], check_batches=[test_images], overwrite=True))

    np.save(folder / "images.npy", test_images.numpy())
    subprocess.run([sys.executable, __file__, "--predict", "--out", str(folder)], check=True)
    found = torch.from_numpy(np.load(folder / "classes.npy"))
    float_top1 = dq.evaluate(model, [(test_images, test_labels)]).top1
    same = int((frozen(test_images).argmax(1) == found).sum())
    print(f"right: {float_top1:.1%} in float, {(found == test_labels).float().mean():.1%} from the file")
    print(f"the file gives the frozen model's class for {same} of {len(found)} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the files go; by default a temporary folder")
    parser.add_argument("--predict", action="store_true", help="only run the file that is in --out")
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp(prefix="daqconvert-"))
    folder.mkdir(parents=True, exist_ok=True)
    predict(folder) if options.predict else convert(folder)
