"""A network of your own, with skip connections and a transposed convolution, that removes noise from digits.

The class knows nothing of quantization. It is converted as it is, trained with its own loss, saved, and loaded into a
fresh `Denoiser()`: an artifact holds no code, so a model that is not built by timm or torchvision needs a skeleton.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import daqconvert as dq


class Denoiser(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, noisy: Tensor) -> Tensor:
        fine = F.relu(self.stem(noisy))
        coarse = F.relu(self.down(fine))
        coarse = coarse + F.relu(self.middle(coarse))  # nothing negative in this sum: the plan proves `up` unsigned
        return noisy - self.head(self.up(coarse) + fine)  # nothing is proven for `head`: calibrate decides from data


def batches(images: Tensor, seed: int, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Pairs (noisy, clean): any list or loader of (input, target) will do."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return list(zip((images + 0.3 * noise).split(size), images.split(size), strict=True))


def psnr(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> str:
    """Peak signal-to-noise ratio in decibels, for pixels from 0 to 1."""
    error = dq.evaluate(model, pairs, loss_fn=F.mse_loss).loss
    return f"{-10 * torch.tensor(error).log10():.1f} dB"


def drawn(image: Tensor) -> list[str]:
    return ["".join(" .:-=+*#%@"[int(v)] * 2 for v in row) for row in image[0].clamp(0, 1).mul(9.99)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the artifact goes; by default a temporary folder")
    out = parser.parse_args().out or Path(tempfile.mkdtemp(prefix="daqconvert-"))

    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images).float().div(16).unsqueeze(1)
    train, held_out = batches(images[:1300], seed=1), batches(images[1300:], seed=2)
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        for noisy, clean in train:
            optimizer.zero_grad()
            F.mse_loss(model(noisy), clean).backward()
            optimizer.step()

    print(dq.plan(model, w_bits=4, a_bits=4))
    qmodel = dq.quantize(model, w_bits=4, a_bits=4)
    dq.calibrate(qmodel, train)
    print(f"\nnoisy {psnr(nn.Identity(), held_out)}, float {psnr(model, held_out)}")
    print(f"calibrated at 4 bits {psnr(qmodel, held_out)}")
    # Distillation compares classes, which these outputs are not, so a loss of your own needs distill=0.
    dq.finetune(qmodel, train, held_out, loss_fn=F.mse_loss, distill=0.0, lr=0.1, epochs=5)

    frozen = dq.freeze(qmodel)
    dq.save(frozen, out / "artifact")
    again = dq.load(out / "artifact", model=Denoiser())
    noisy, clean = held_out[0]
    same = torch.equal(again(noisy), frozen(noisy))
    print(f"finetuned, frozen, saved and loaded {psnr(again, held_out)}; every pixel as before saving: {same}\n")
    print("  ".join(name.ljust(16) for name in ("noisy", "float", "4 bits", "clean")))
    for rows in zip(*(drawn(pixels[3]) for pixels in (noisy, model(noisy), again(noisy), clean)), strict=True):
        print("  ".join(rows))


if __name__ == "__main__":
    main()
