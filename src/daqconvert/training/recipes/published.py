"""The recipes that have a name.

References: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), section 4.1 and the authors' published training
code; "Network Quantization with Element-wise Gradient Scaling" (Lee, Kim, Ham, CVPR 2021) for ImageNet.
"""

from __future__ import annotations

from typing import Any

from daqconvert.training.recipes.recipe import Recipe

_PUBLISHED: dict[str, Any] = {
    "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine", "batch_size": 256, "distill": 0.0,
    "calibration_batches": 1, "calibration_method": "std", "final_a_sigma": 0.0,
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "quick": Recipe(),
    "short": Recipe(
        "short",
        epochs=10,
        batch_size=256,
        lr=0.03,
        quantizer_lr=1e-4,
        features=("auto",),
        reconstruct=100,
        reconstruct_batches=16,
    ),
    "fewshot": Recipe(
        "fewshot",
        epochs=4,
        batch_size=25,
        optimizer="adam",
        lr=5e-3,
        lr_unit="size",
        weight_decay=0.0,
        quantizer_lr=5e-3,
        distill=1.0,
        temperature=1.0,
        features=("auto",),
        feature_weight=10.0,
        ema=0.98,
        final_a_sigma=0.0,
        crop_scale=0.35,
        batch_norm="freeze",
        reconstruct=300,
        reestimate=8,
    ),
    "paper-cifar10": Recipe("paper-cifar10", epochs=400, lr=0.1, quantizer_lr=1e-4, **_PUBLISHED),
    "paper-imagenet": Recipe("paper-imagenet", epochs=100, lr=0.01, quantizer_lr=1e-5, **_PUBLISHED),
}
