"""Labels of any data become the numbers of a model's outputs, by name."""

from __future__ import annotations

import pytest
import torch
import torchvision

from daqconvert.data import Classes, open_splits, published_classes, read_classes, renumbered
from daqconvert.errors import DataError
from helpers.images import jpeg

FOUR = Classes(4, ("ant", "bee", "cat", "dog"), owner="the run")


def labels(images) -> list[int]:
    return [label for _, label in images]


def test_folders_get_the_numbers_of_the_model(make_folder):
    splits = open_splits(make_folder({"dog": 4, "bee": 2}), holdout=3)
    own = labels(splits.val)
    found = renumbered(splits, FOUR)
    assert labels(found.val) == [{0: 1, 1: 3}[label] for label in own]  # bee is 1, dog is 3
    assert (found.num_classes, found.class_names) == (4, FOUR.names)
    assert found.description.endswith("; 2 of the 4 classes of the run")
    whole = renumbered(open_splits(make_folder(dict.fromkeys(FOUR.names, 2), name="whole"), holdout=4), FOUR)
    assert sorted(labels(whole.val)) == [0, 1, 2, 3]
    assert "classes of" not in whole.description


def test_parquet_files_by_the_names_in_them(make_parquet):
    path = make_parquet([jpeg(i) for i in range(4)], [0, 1, 0, 1], classes="dog,ant")
    found = renumbered(open_splits(path, holdout=2), FOUR)
    assert sorted(labels(found.train) + labels(found.val)) == [0, 0, 3, 3]


def test_labels_that_are_numbers_stay(make_parquet):
    path = make_parquet([jpeg(i) for i in range(4)], [0, 3, 2, 1])
    found = renumbered(open_splits(path, holdout=1), FOUR)
    assert sorted(labels(found.train) + labels(found.val)) == [0, 1, 2, 3]
    assert found.class_names == FOUR.names
    with pytest.raises(DataError, match="labels up to 3, but the run has 3 classes, 0 to 2"):
        renumbered(open_splits(path, holdout=1), Classes(3, ("a", "b", "c"), owner="the run"))


@pytest.mark.parametrize(
    ("counts", "classes", "told"),
    [
        (
            {"dog": 2, "cats": 2},
            FOUR,
            "the run does not know the class 'cats'. Nearest: cat.*It knows 4: ant, bee, cat",
        ),
        ({"Dog": 2, "cat": 2}, FOUR, "does not know the class 'Dog'. Nearest: dog"),
        ({"dog": 2, "cat": 2}, Classes(4, owner="x"), r"x has 4 and nothing says which.*0 to 3.*--classes FILE"),
        ({"1": 2, "01": 2}, Classes(4, owner="x"), "'01' and '1' are the same class of x"),
        ({"1": 2, "4": 2}, Classes(4, owner="x"), "nothing says which of them these are"),
    ],
    ids=["unknown", "case", "no names", "twice", "out of range"],
)
def test_classes_that_cannot_be_mapped(make_folder, counts, classes, told):
    splits = open_splits(make_folder(counts), holdout=2)
    with pytest.raises(DataError, match=told):
        renumbered(splits, classes)


def test_folders_named_by_number(make_folder):
    names = [str(number) for number in range(11)]  # in the order of texts: 0, 1, 10, 2, ...
    splits = open_splits(make_folder(dict.fromkeys(names, 2)), holdout=11)
    numbers = renumbered(splits, Classes(11, numbers=True))  # the model learned labels that were numbers
    assert numbers.class_names == tuple(names)
    texts = [splits.class_names[label] for label in labels(splits.val)]
    assert labels(numbers.val) == [int(text) for text in texts]
    own = renumbered(splits, Classes(11, owner="that checkpoint"))  # as a folder's classes are numbered everywhere
    assert labels(own.val) == labels(splits.val)
    assert own.description.endswith("; numbered in the order of their names, for that checkpoint keeps none")
    few = renumbered(open_splits(make_folder({"3": 2, "10": 2}, name="few"), holdout=2), Classes(11))
    assert sorted(labels(few.val)) == [3, 10]
    assert "which are numbers" in few.description


def test_accents_in_both_forms_of_unicode(make_folder):
    splits = open_splits(make_folder({"cafe\u0301": 2, "the": 2}), holdout=2)
    assert sorted(labels(renumbered(splits, Classes(2, ("the", "caf\u00e9"))).val)) == [0, 1]


def test_classes_of_imagenet_by_synset_word_and_number(make_folder):
    import timm

    model = timm.create_model("test_resnet")
    found = published_classes(model, "timm:test_resnet", 1000)
    torch_found = published_classes(torchvision.models.resnet18(), "torchvision:resnet18", 1000)
    for classes in (found, torch_found):
        assert [classes.number(name) for name in ("n01443537", "Goldfish", "tench, Tinca tinca", "7")] == [1, 1, 0, 7]
        assert classes.number("great_white_shark") == 2
        assert classes.number("crane") is None  # a bird and a machine
    assert published_classes(model, "timm:test_resnet", 10) is None
    splits = open_splits(make_folder({"n01443537": 2, "n03014705": 2}), holdout=2)
    assert sorted(labels(renumbered(splits, found).val)) == [1, 492]
    with pytest.raises(DataError, match="does not know the class 'my cat'"):
        renumbered(open_splits(make_folder({"n01443537": 2, "my cat": 2}, name="b"), holdout=2), found)
    with pytest.raises(DataError, match="nothing says which of them these are"):
        renumbered(open_splits(make_folder({"left": 2, "right": 2}, name="c"), holdout=2), found)


@pytest.mark.parametrize("kinds", ["folders", "parquet", "folder and parquet", "parquet and folder"])
def test_two_sources_are_mapped_by_name(make_folder, make_parquet, kinds):
    """The second one has its classes in another order, and lacks one."""
    images = [jpeg(i) for i in range(3)]
    first = make_folder({"ant": 2, "bee": 2, "cat": 2}, name="train")
    second = make_folder({"bee": 1, "cat": 2}, name="val")
    if kinds.startswith("parquet"):
        first = make_parquet(images, [0, 1, 2], classes="ant,bee,cat", name="train")
    if kinds.endswith("parquet"):
        second = make_parquet(images, [0, 1, 0], classes="cat,bee", name="val")
    found = open_splits(first, val=second)
    assert (found.num_classes, found.class_names) == (3, ("ant", "bee", "cat"))
    assert sorted(labels(found.val)) == [1, 2, 2]


def test_two_sources_one_of_which_has_numbers(make_folder, make_parquet):
    train = make_parquet([jpeg(i) for i in range(12)], [*range(11), 0], name="train")
    names = [str(number) for number in range(11)]
    found = open_splits(train, val=make_folder(dict.fromkeys(names, 1), name="numbers"))
    assert sorted(labels(found.val)) == list(range(11))
    images = [image.tobytes() for image, _ in found.val]
    own = open_splits(train, val=make_folder(dict.fromkeys(names, 1), name="again"))
    assert images == [image.tobytes() for image, _ in own.val]
    assert labels(found.val) == [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]  # as the folders lie, each with its number
    with pytest.raises(DataError, match="nothing says which is which. Name its folders by these numbers"):
        open_splits(train, val=make_folder({"ant": 1, "bee": 1}, name="names"))


def test_each_split_may_have_its_own_where_the_model_knows_them_all(make_folder):
    path = make_folder({"train/ant": 2, "train/bee": 2, "val/bee": 1, "val/dog": 1})
    with pytest.raises(DataError, match="class 'dog' is not among those trained on"):
        open_splits(path)
    found = renumbered(open_splits(path, known=True), FOUR)
    assert (sorted(labels(found.train)), sorted(labels(found.val))) == ([0, 0, 1, 1], [1, 3])
    assert "none of ant" in found.description


def test_a_file_of_names(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("\ufeffdog\nblack cat \n", encoding="utf-8")
    assert read_classes(file) == ("dog", "black cat")
    for text, told in (
        ("", "found none"),
        ("a\n\nb", "line 2: .*found nothing"),
        ("a\na", "line 2: .*'a' a second time"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=told):
            read_classes(file)
    with pytest.raises(DataError, match="--classes .*could not be read"):
        read_classes(tmp_path / "missing.txt")


def test_images_without_labels_keep_none(make_folder):
    splits = open_splits(make_folder({".": 4}, name="flat"), holdout=2)
    assert renumbered(splits, FOUR) is splits
    half = open_splits(make_folder({"dog": 2}, name="half"), val=make_folder({".": 2}, name="flat2"))
    found = renumbered(half, FOUR)
    assert (labels(found.train), labels(found.val)) == ([3, 3], [-100, -100])
    assert torch.tensor(labels(found.val)).eq(-100).all()
