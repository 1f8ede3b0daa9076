"""What `finetune` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from daqconvert.calibration import CalibrationReport
from daqconvert.report.fits import Fitted
from daqconvert.training.rundir import Row


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` did.

    Attributes:
        history: One row per epoch since the start of the run, also of what an earlier, resumed call trained. Keys:
            `epoch` (from 1), `step` (optimizer steps so far), `lr` and `quantizer_lr` (of its last step),
            `train_loss`, `train_top1`, `val_loss`, `val_top1` (shares 0..1), `images_per_second`, `seconds`; None
            where there is no value.
        epochs: Epochs of the run, `len(history)`.
        best_epoch: The epoch of `best`, or None without a validation loader.
        best_top1: Its top-1 on the validation loader, 0..1.
        seconds: Time that this call took.
        out_dir: The run directory, or None.
        last: Checkpoint of the last epoch, or None.
        best: Checkpoint of the best epoch, or None.
        calibration: What calibration found, if this call had to calibrate.
        stop: Why the run ended before its last epoch, or None.
        fitted: What became of each layer or block before the first step: by field of the recipe, `gptq` and
            `reconstruct`.
    """

    history: list[Row]
    epochs: int
    best_epoch: int | None
    best_top1: float | None
    seconds: float
    out_dir: Path | None = None
    last: Path | None = None
    best: Path | None = None
    calibration: CalibrationReport | None = None
    stop: str | None = None
    fitted: dict[str, list[Fitted]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return a short summary: epochs, time, last and best accuracy, where the files are."""
        final = self.history[-1] if self.history else {}
        parts = [f"{self.epochs} epochs, {self.seconds:.1f} s in this call"]
        if final.get("train_loss") is not None:
            parts.append(f"train loss {final['train_loss']:.4f}")
        if final.get("val_top1") is not None:
            parts.append(f"top-1 {100 * final['val_top1']:.2f} %")
        if self.best_top1 is not None:
            parts.append(f"best {100 * self.best_top1:.2f} % (epoch {self.best_epoch})")
        if self.stop is not None:
            parts.append(f"stopped early: {self.stop}")
        for how, rows in self.fitted.items():
            if done := [row for row in rows if not row.left_alone]:
                before, after = (sum(getattr(row, key) for row in done) / len(done) for key in ("before", "after"))
                parts.append(f"{how}: {len(done)} of {len(rows)}, mean error {before:.3g} -> {after:.3g}")
        where = f"\n{self.out_dir}: {', '.join(p.name for p in (self.last, self.best) if p)}" if self.out_dir else ""
        return ", ".join(parts) + where
