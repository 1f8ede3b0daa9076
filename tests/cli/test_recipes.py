"""`daqconvert recipes`."""

from __future__ import annotations

from daqconvert.training import RECIPES


def test_all_recipes_with_all_fields(daq):
    found = daq("recipes", "--json").json
    assert found == {name: recipe.to_dict() for name, recipe in RECIPES.items()}
    text = daq("recipes").out
    assert text.splitlines()[0].split("|")[1:-1] and "paper-imagenet" in text.splitlines()[0]
    (row,) = [line.split("|") for line in text.splitlines() if line.startswith("| epochs ")]
    assert [cell.strip() for cell in row[2:-1]] == [str(recipe.epochs) for recipe in RECIPES.values()]


def test_one_recipe_says_what_its_fields_are(daq):
    text = daq("recipes", "paper-cifar10").out
    (row,) = [line.split("|") for line in text.splitlines() if line.startswith("| clip_grad ")]
    assert [cell.strip() for cell in row[1:-1]] == [
        "clip_grad", "none", "Largest norm of the gradient, or None (0) for no limit."
    ]  # fmt: skip


def test_a_file(daq, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "fewshot"\nlr = 0.5\nprogressive = [[0.5, 8, 8]]\n')
    assert daq("recipes", path, "--json").json[str(path)]["lr"] == 0.5
    assert "[[0.5, 8, 8]]" in daq("recipes", path).out
    assert "Nearest: quick" in daq("recipes", "quik").fails()
