"""What happens before the first step of a run: calibration, the teacher, GPTQ, block reconstruction.

GPTQ and reconstruction work on the run's own training batches. Weights that are trained by gradients on a few hundred
images soon overfit. GPTQ needs only the second moments of each layer's inputs, to which every position of every image
contributes, and it solves a small problem for each layer. After GPTQ, steps are for norms, scales and bounds.

A resumed run skips all this and takes the state of its checkpoint.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from daqconvert.batches import run_batch, to_device
from daqconvert.calibration import calibrate, is_calibrated
from daqconvert.convert import current_plan
from daqconvert.errors import DataError, few_names
from daqconvert.models import copy_model, disabled, evaluating, fit_weights, float_copy, quantized_sites
from daqconvert.posttraining import block_names, choose_codes, reconstruct
from daqconvert.report.fits import Fitted
from daqconvert.seeding import preserved_random_state
from daqconvert.training.batching.loaders import UNLABELLED, length, read_batch
from daqconvert.training.checkpoint import model_tensors, write_checkpoint
from daqconvert.training.losses import check_classes, checked_target, logits_of
from daqconvert.training.objective import OWN_TEACHER
from daqconvert.training.recipes import Recipe
from daqconvert.training.run import Run
from daqconvert.training.saving import check_run, last_of, make_optimizers_and_parts, meta, model_copy, restore, save

LOGGER = logging.getLogger(__name__)


def start(run: Run, *, resume: bool) -> None:
    """Bring model, teacher, optimizers and parts into the state of the last checkpoint, or of step 0.

    With `resume` the run goes on with the checkpoint in its directory, if there is one.

    Raises:
        TrainingError: If the checkpoint is damaged or of another run; nothing is changed then.
        DataError: If a loader is empty or its first batch has not the right form.
        CalibrationError: If the data cannot calibrate the model.
    """
    checkpoint = None
    if run.directory is not None:
        model_tensors(run.model)  # raises if the model has state that a checkpoint cannot hold
        if resume:
            checkpoint = run.processes.from_main(lambda: last_of(run.directory))
    if checkpoint is not None:
        check_run(run, checkpoint)
    if run.val_epochs is not None:  # errors in it are found now, not after an epoch
        first = next(iter(run.val_epochs.batches(0, whole=True)), None)
        if first is None:
            raise DataError("val_loader: expected at least one batch, found none. Is the data set empty?")
        _check_batch(run, first, "val_loader, first batch", needs_target=True)
    if checkpoint is None:
        _start_fresh(run)
    else:
        restore(run, checkpoint)
    if run.processes.count > 1 and run.processes.own:
        run.find_unused = run.processes.sum([float(may_miss_gradients(run))])[0] > 0


def may_miss_gradients(run: Run) -> bool:
    """Whether a trained parameter may have no gradient in some step, as the first batch and torch.fx tell.

    A copy of the model runs on the first batch. A parameter that its outputs do not depend on has no gradient. Where
    torch.fx cannot follow the forward, another batch may take another path, so any parameter may have none.
    """
    if current_plan(run.model).order != "fx":
        return True
    probe = copy_model(run.model).train()
    with preserved_random_state(run.train_epochs.loader), torch.enable_grad():
        batch = next(iter(run.train_epochs.batches(0, whole=True)))
        reached = _reached(run_batch(probe, batch))
    return any(value.requires_grad and id(value) not in reached for value in probe.parameters())


def _reached(outputs: Any) -> set[int]:
    """Return the ids of the parameters that outputs depend on, by torch's graph of their gradients."""
    waiting = [value.grad_fn for value in tree_leaves(outputs) if isinstance(value, Tensor) and value.grad_fn]
    seen, found = set(waiting), set[int]()
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def _start_fresh(run: Run) -> None:
    recipe, own = run.recipe, run.teacher_kind == OWN_TEACHER
    _calibrate(run)
    run.processes.agree(run.model)
    if own:
        run.objective.teacher = float_copy(run.model)
    initial = model_copy(run) if own and run.directory is not None else {}
    original = None
    if recipe.reconstruct:  # blocks learn from weights that GPTQ has not changed
        original = run.objective.teacher if own else float_copy(run.model)
    if recipe.gptq:
        _round_weights(run)
    if original is not None:
        _reconstruct_blocks(run, original)
    make_optimizers_and_parts(run)
    if run.directory is not None:
        about = meta(run)
        run.processes.from_main(lambda: _write_start(run, initial, about))
        save(run)


def _fit_weights(run: Run) -> None:
    """Set the bounds of weights anew that were changed after the model was calibrated, as `calibrate` does; warn."""
    refitted, unfit = fit_weights(quantized_sites(run.model))
    if not run.processes.is_main:
        return
    for names, said in (
        (refitted, "were changed after calibration: weight bounds set anew. Their inputs may have changed too: "
                   "calibrate before finetune"),
        (unfit, "have bounds that do not fit them, although both were changed. These bounds stay: to set them anew, "
                "load the weights with daqconvert.load_float"),
    ):  # fmt: skip
        if names:
            LOGGER.warning("finetune: the weights of %d layers (%s) %s.", len(names), few_names(names), said)


def _calibrate(run: Run) -> None:
    """Calibrate the model where it needs that; in any case check the first training batch."""
    batches = iter(run.train_epochs.batches(0, whole=True))
    first = list(itertools.islice(batches, 1))
    if not first and is_calibrated(run.model):
        raise DataError("train_loader: expected at least one batch, found none. Is the data set empty?")
    for batch in first:
        _check_batch(run, batch, "train_loader, first batch", needs_target=run.objective.needs_target, training=True)
    if is_calibrated(run.model):
        _fit_weights(run)
        return
    recipe = run.recipe
    count = min(recipe.calibration_batches, length(run.train_epochs.loader) or recipe.calibration_batches)
    run.begin_training(hold_batch_norms=_held(recipe))
    found = run.calibration = calibrate(
        run.model, itertools.chain(first, batches), method=recipe.calibration_method, mode="both", max_batches=count,
        progress=run.show,
    )  # fmt: skip
    if found.differing and run.processes.is_main:
        LOGGER.warning(
            "calibration: %d of %d inputs have another range in training mode than in evaluation mode: %s. Either "
            "batch norms have running statistics that are not those of these batches (a new network, other data), or "
            "dropout acts. The bounds fit both modes; results of the first epochs may not. See docs/training.md.",
            len(found.differing), len(found.inputs), few_names(found.differing),
        )  # fmt: skip


def _held(recipe: Recipe) -> bool:
    """Whether every step of training uses the running statistics that batch norms have now."""
    return recipe.batch_norm == "freeze" and not (recipe.reestimate or recipe.reconstruct)


def _check_batch(run: Run, batch: Any, where: str, *, needs_target: bool, training: bool = False) -> None:
    """Raise if a batch has not the right form, or its target does not fit the outputs that the model gives for it.

    That is found out before calibration, GPTQ and reconstruction, and on a GPU by an error that can be read. What asks
    is a copy without the user's hooks, in float; a model that does not run like that is asked by training itself.

    Raises:
        DataError: With the place `where`.
    """
    inputs, target = read_batch(
        batch, run.processes.device, where, needs_target=needs_target, hint=UNLABELLED * training, model=run.model
    )
    if not needs_target or run.objective.loss_fn is not None:
        return
    model = copy_model(run.model, to_look_at=True)
    with evaluating(model), disabled(model), torch.no_grad():
        try:
            outputs = model(*inputs[0], **inputs[1])
        except Exception:  # NOTE: any error, because it may come of the missing hooks; a real one comes again
            return
    if training and not isinstance(outputs, Tensor):
        return  # in training mode it may return something else
    logits = logits_of(outputs).cpu()
    try:
        check_classes(logits, checked_target(logits, to_device(target, logits.device)))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _round_weights(run: Run) -> None:
    """Let GPTQ choose the weights' codes from the first `gptq` training batches, the same on every process."""
    with preserved_random_state(run.train_epochs.loader):
        batches = list(itertools.islice(run.train_epochs.batches(0, whole=True), run.recipe.gptq))
    rows = choose_codes(run.model, batches, block_names(run.model), show=run.show)
    _note(run, "gptq", "layers keep the nearest levels of their weights", rows)
    run.processes.agree(run.model)


def _reconstruct_blocks(run: Run, teacher: nn.Module) -> None:
    """Train block after block towards a float copy of the model, `reconstruct` steps each, on all processes alike."""
    recipe = run.recipe
    with preserved_random_state(run.train_epochs.loader):
        batches = list(itertools.islice(_endless_batches(run), recipe.reconstruct_batches))
        names = block_names(run.model)
        rows = reconstruct(run.model, teacher, batches, names, recipe.reconstruct, seed=recipe.seed, show=run.show)
    _note(run, "reconstruct", "blocks stay as they are", rows)
    run.processes.agree(run.model)


def _endless_batches(run: Run) -> Iterator[Any]:
    """Yield the batches of one epoch after the other, each augmented anew; none where the loader is empty."""
    for epoch in itertools.count():
        empty = True
        for batch in run.train_epochs.batches(epoch, whole=True):
            empty = False
            yield batch
        if empty:
            return


def _note(run: Run, field: str, what: str, rows: list[Fitted]) -> None:
    """Keep what was done to each layer or block for the report; the main process warns of those left alone.

    The warning reads `FIELD: 2 of 9 WHAT: NAME (why), NAME (why).`
    """
    run.fitted[field] = rows
    left = [row for row in rows if row.left_alone]
    if left and run.processes.is_main:
        names = few_names([f"{row.name} ({row.left_alone})" for row in left])
        LOGGER.warning("%s: %d of %d %s: %s.", field, len(left), len(rows), what, names)


def _write_start(run: Run, initial: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Remove the files of an earlier run from the directory; write the recipe and the run's own teacher."""
    assert run.directory is not None
    run.directory.clear()
    run.directory.write_recipe(run.recipe)
    if run.teacher_kind == OWN_TEACHER:
        write_checkpoint(run.directory.teacher, initial, about)
