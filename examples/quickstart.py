"""The README's example: from a trained network to the same network at 4 bits, as an artifact and an ONNX file."""

import tempfile
from pathlib import Path

import timm
import torch

import daqconvert as dq
from daqconvert.data import create_loaders

torch.manual_seed(0)
model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
data = create_loaders(None, model)  # None: scikit-learn's handwritten digits, which need no download
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(4):
    for images, labels in data.train:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

out = Path(tempfile.mkdtemp(prefix="daqconvert-"))
print(dq.plan(model, w_bits=4, a_bits=4))  # look first: nothing is converted yet
qmodel = dq.quantize(model, w_bits=4, a_bits=4)  # a new model, yours is untouched
dq.calibrate(qmodel, data.calibration)  # bounds from a few batches
print("float     ", dq.evaluate(model, data.val))
print("calibrated", dq.evaluate(qmodel, data.val))
dq.finetune(qmodel, data.train, data.val, epochs=2)  # towards the labels and the float model's answers
frozen = dq.freeze(qmodel)  # integer codes; computes the same, every element
print("finetuned ", dq.evaluate(frozen, data.val))
dq.save(frozen, out / "artifact")  # packed safetensors and JSON
print(dq.export(frozen, out / "model.onnx", images))  # compares the file in ONNX Runtime with the model
