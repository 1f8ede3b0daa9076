"""Recipes by name, from a file, from texts such as `lr=0.1`, and those of earlier runs."""

import dataclasses

import pytest

from daqconvert.errors import TrainingError
from daqconvert.training import RECIPES, Recipe, recipe
from daqconvert.training.recipes import FIELDS, completed, parse_overrides
from daqconvert.training.recipes.named import BEFORE

FIRST = """
    name epochs batch_size accumulate precision optimizer lr momentum weight_decay decay no_decay quantizer_optimizer
    quantizer_lr quantizer_weight_decay clip_grad schedule warmup_steps step_epochs step_factor label_smoothing mixup
    cutmix augment color_jitter random_erasing crop_scale distill temperature features feature_weight ema ema_warmup
    batch_norm batch_norm_freeze_at reestimate freeze_bounds_at progressive patience oscillation oscillation_threshold
    explode checkpoint_steps keep calibration_batches calibration_method seed
""".split()  # the fields of the first runs' recipes


def test_the_published_recipes_are_as_published():
    cifar, imagenet = RECIPES["paper-cifar10"], RECIPES["paper-imagenet"]
    assert (cifar.epochs, cifar.batch_size, cifar.lr, cifar.quantizer_lr) == (400, 256, 0.1, 1e-4)
    assert (imagenet.epochs, imagenet.batch_size, imagenet.lr, imagenet.quantizer_lr) == (100, 256, 1e-2, 1e-5)
    for published in (cifar, imagenet):
        assert (published.momentum, published.weight_decay, published.decay) == (0.9, 1e-4, "all")
        assert (published.schedule, published.warmup_steps, published.distill) == ("cosine", 0, 0.0)
        assert (published.calibration_method, published.calibration_batches) == ("std", 1)


def test_short_is_what_was_measured():
    measured = {"distill": 0.5, "temperature": 2.0, "features": ("auto",), "lr": 0.03}
    measured |= {"reconstruct": 100, "reconstruct_batches": 16, "calibration_method": "mse", "calibration_batches": 8}
    measured |= {"final_a_sigma": 2.0}  # two bits are more than `final_sigma_bits`
    assert RECIPES["short"] == recipe("paper-cifar10", name="short", epochs=10, **measured)


def test_the_default_is_quick_and_its_name_is_its_key():
    assert recipe() == Recipe() == RECIPES["quick"]
    assert all(found.name == name for name, found in RECIPES.items())


def test_a_field_that_came_later_has_a_value_for_the_runs_before_it():
    assert set(BEFORE) == set(FIELDS) - set(FIRST)
    Recipe(**BEFORE)


def test_runs_that_sharpened_before_there_was_a_bound_did_so_at_two_bits():
    assert completed({"final_a_sigma": 2.0})["final_sigma_bits"] == 2
    assert completed({"final_w_sigma": 1.0})["final_sigma_bits"] == 2
    assert completed({})["final_sigma_bits"] == Recipe().final_sigma_bits
    assert completed({"final_sigma_bits": 3})["final_sigma_bits"] == 3


def test_overrides_change_a_copy():
    assert recipe("paper-cifar10", epochs=5).epochs == 5
    assert RECIPES["paper-cifar10"].epochs == 400
    assert recipe(Recipe(lr=1), seed=3) == Recipe(lr=1.0, seed=3)


def test_messages_name_the_nearest_word():
    with pytest.raises(TrainingError, match="'epoch' is not a field of a recipe. Nearest: epochs"):
        recipe("quick", epoch=3)
    with pytest.raises(TrainingError, match="Nearest: cosine"):
        Recipe(schedule="cosin")
    with pytest.raises(TrainingError, match="Nearest: paper-imagenet"):
        recipe("paper-imagnet")


@pytest.mark.parametrize("source", [None, 3, "", "a/folder"], ids=repr)
def test_what_is_no_recipe(source):
    with pytest.raises(TrainingError, match="expected one of quick, short, fewshot, paper-cifar10"):
        recipe(source)


@pytest.mark.parametrize("found", [*RECIPES.values(), Recipe('a "b" \\ c\n\x7f', clip_grad=1.0, lr=1e-30)])
def test_toml_round_trip(found, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(found.to_toml(), encoding="utf-8")
    assert recipe(path) == found == recipe(str(path))


def test_a_file_starts_from_a_base(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "paper-cifar10"\nepochs = 5\nlr = 1\n')
    expected = dataclasses.replace(RECIPES["paper-cifar10"], name="mine.toml", epochs=5, lr=1.0)
    assert recipe(path) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("epochs = ", "not valid TOML"),
        ("lerning_rate = 1", "'lerning_rate' is not a field"),
        ('base = "quik"', "Nearest: quick"),
        ("base = 3", "base: expected one of"),
        ("epochs = 0", "mine.toml.*epochs: expected an integer of 1 or more; found 0"),
        ("[lr]\nvalue = 1", "lr: expected"),
        (b"\xff\xfe", "not valid TOML"),
    ],
    ids=str,
)
def test_a_bad_file_is_named(text, told, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TrainingError, match=told):
        recipe(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TrainingError, match="none.toml: cannot be read"):
        recipe(tmp_path / "none.toml")


def test_overrides_are_texts_of_every_kind():
    texts = [
        "epochs=10", "lr = 1e-3", "ema_warmup=false", "clip_grad=none", "schedule=step", "augment=rand-m9-mstd0.5",
        "features=layer1, layer2.*", 'no_decay=["re:a{1,2}"]', "progressive=[[0.2,4,4],[0.5,2,3]]", "name=a=b",
    ]  # fmt: skip
    assert parse_overrides(texts) == {
        "epochs": 10, "lr": 1e-3, "ema_warmup": False, "clip_grad": None, "schedule": "step",
        "augment": "rand-m9-mstd0.5", "features": ("layer1", "layer2.*"), "no_decay": ("re:a{1,2}",),
        "progressive": ((0.2, 4, 4), (0.5, 2, 3)), "name": "a=b",
    }  # fmt: skip
    assert parse_overrides(["features=", "clip_grad=1"]) == {"features": (), "clip_grad": 1.0}


@pytest.mark.parametrize("found", [*RECIPES.values(), Recipe(features=("a", "b"), progressive=((0.5, 4, 4),))])
def test_overrides_say_whatever_a_recipe_can(found):
    shown = [f"{field}={getattr(found, field)}" for field in FIELDS]
    shown = [text.replace("(", "[").replace(")", "]").replace("True", "true") for text in shown]
    assert Recipe(**parse_overrides(shown)) == found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("epochs", "override 'epochs': expected FIELD=VALUE"),
        ("epoch=3", "'epoch' is not a field of a recipe. Nearest: epochs"),
        ("epochs=many", "epochs: expected an integer of 1 or more; found 'many'"),
        ("epochs=1.5", "epochs: expected an integer"),
        ("lr=", "lr: expected a number"),
        ("schedule=cosin", "Nearest: cosine"),
        ("progressive=[[0.2,4]]", "progressive: expected stages"),
        ("ema_warmup=yes", "ema_warmup: expected true or false; found 'yes'"),
    ],
)
def test_an_override_that_cannot_be(text, told):
    with pytest.raises(TrainingError, match=told):
        parse_overrides([text])


def test_an_override_is_given_once():
    with pytest.raises(TrainingError, match="lr is given twice"):
        parse_overrides(["lr=1", "lr=2"])
