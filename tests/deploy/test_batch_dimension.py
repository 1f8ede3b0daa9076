"""Which inputs carry the batch, and that files take other batch sizes with their side inputs unchanged."""

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.deploy import exporting
from daqconvert.deploy.batch_dimension import find_batch, other_rows
from daqconvert.deploy.signature import output_tensors
from daqconvert.errors import ExportError


class Summed(nn.Module):
    """Adds a table over positions that is summed over its first dimension: doubled, it counts twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x, table):
        return self.b(torch.relu(self.a(x) + table.sum(0)))


class Added(Summed):
    """Adds a table that all samples share, broadcast."""

    def forward(self, x, table):
        return self.b(torch.relu(self.a(x) + table))


class Masked(Summed):
    """Takes a mask for every sample, a scale of no dimension and a position for every token."""

    def forward(self, x, mask, scale, positions):
        hidden = torch.relu(self.a(x) * scale + positions)
        return self.b(hidden * mask.unsqueeze(-1)), mask


class Classes(Summed):
    """Multiplies with a matrix whose first size may be that of the batch by chance."""

    def forward(self, x, matrix):
        return self.b(torch.relu(self.a(x))) @ matrix


class Table(Summed):
    """The side input comes first."""

    def forward(self, table, x):
        return self.b(torch.relu(self.a(x) + table.mean(0)))


def found(model, *args):
    """Return the places of the inputs that carry the batch, and those of which one sample does not tell."""

    def run(arguments):
        return output_tensors(model(*arguments[0], **arguments[1]))

    with torch.no_grad():
        batch = find_batch(model, (args, {}), run)
    return batch.places, batch.doubtful


def frozen(model, batch):
    qmodel = dq.quantize(model.eval(), w_bits=8, a_bits=8)
    dq.calibrate(qmodel, [batch])
    return dq.freeze(qmodel)


def ones(size):
    """Inputs of `Masked` for a batch of that size."""
    mask = (torch.rand(size, 5) > 0.3).float()
    return {"x": torch.randn(size, 5, 8), "mask": mask, "scale": torch.tensor(0.7), "positions": torch.randn(1, 5, 8)}


def test_inputs_are_told_apart_by_what_the_model_does_with_them():
    x, table = torch.randn(4, 5, 8), torch.randn(1, 5, 8)
    assert found(Summed(), x, table) == ((0,), ())
    assert found(Summed(), x[:1], table) == ((0,), ())  # both of first size 1: only one may be repeated
    assert found(Added(), x, table) == ((0,), ())
    assert found(Added(), x, torch.randn(4, 5, 8)) == ((0, 1), ())
    assert found(Masked(), *ones(3).values()) == ((0, 1), ())
    assert found(Classes(), torch.randn(4, 8), torch.randn(4, 6)) == ((0,), ())  # 4 and 4 by chance
    assert found(Table(), torch.randn(7, 8), torch.randn(4, 8)) == ((1,), ())
    assert found(Table(), torch.randn(4, 8), torch.randn(4, 8)) == ((1,), ())


def test_one_sample_leaves_a_doubt_and_is_told():
    x, table = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    assert found(Added(), x, table) == ((0, 1), (0, 1))


def test_other_rows_are_of_another_number_and_order():
    assert [len(other_rows(size)) != size for size in (1, 2, 3, 64)] == [True] * 4
    assert other_rows(64) == [63, 0]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", [Summed, Added, Masked])
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_files_take_another_batch_with_the_side_input_unchanged(kind, size, suffix, tmp_path):
    given, more = ones(size), ones(3)
    if kind is not Masked:
        given, more = ({"x": b["x"], "table": b["positions"]} for b in (given, more))
    model, path = frozen(kind(), more), tmp_path / f"model.{suffix}"
    known = ["x", "mask"] if kind is Masked else ["x"]
    doubt = size == 1 and kind is not Summed  # one sample: which inputs carry the batch has to be said
    report = dq.export(model, path, given, dynamic_batch=known if doubt else True)
    assert report.agrees, str(report)
    with torch.no_grad():
        wanted = output_tensors(model(**more))
    if suffix == "onnx":
        answers = dq.deploy.OnnxModel(path).run((), more)
    else:
        answers = output_tensors(torch.export.load(path).module()(**more))
    assert len(answers) == len(wanted)
    for one, other in zip(wanted, answers, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert any(f"the batch is the first dimension of {', '.join(known)};" in note for note in report.notes)


def test_a_doubt_names_what_to_type(tmp_path):
    x = {"x": torch.randn(1, 5, 8), "table": torch.randn(1, 5, 8)}
    report = dq.export(frozen(Added(), x), tmp_path / "model.onnx", x)
    doubt = next(note for note in report.notes if "nobody can tell" in note)
    assert "whether x or table is the same for all samples" in doubt  # a sum does not say which of the two it is
    assert "dynamic_batch=['x']" in doubt


def test_a_file_that_is_wrong_at_another_batch_size_does_not_agree(tmp_path, monkeypatch):
    """The file adds 100 for every sample after the first: with the example alone nobody would see it."""
    lower = exporting.lower

    def adding(model, arguments, batch):
        own = model.forward
        model.forward = lambda x: own(x) + 100.0 * (x.shape[0] - 1)
        try:
            return lower(model, arguments, batch)
        finally:
            del model.forward

    monkeypatch.setattr(exporting, "lower", adding)
    x = torch.randn(1, 8)
    with pytest.warns(UserWarning, match="at another batch size than the example's: for the same codes"):
        report = dq.export(frozen(nn.Sequential(nn.Linear(8, 4)), x), tmp_path / "model.onnx", x)
    assert report.largest_difference < 1e-5
    assert report.other_batch and not report.agrees and "DOES NOT AGREE" in str(report)


def test_names_say_it_without_a_trial():
    x, table = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    batch = find_batch(Added(), ((x, table), {}), lambda _: pytest.fail("tried"), ["x"])
    assert (batch.places, batch.size) == ((0,), 4)
    with pytest.raises(ExportError, match=r"'tabel' is no input; the inputs are x, table\. Nearest: table"):
        find_batch(Added(), ((x, table), {}), lambda _: [], ["x", "tabel"])
    with pytest.raises(ExportError, match="expected inputs of the same first size"):
        find_batch(Added(), ((x, table[:1]), {}), lambda _: [], ["x", "table"])


def test_a_model_of_one_batch_size_is_told_so(tmp_path):
    class Fixed(Summed):
        def forward(self, x):
            return self.b(torch.relu(self.a(x))).reshape(4, 20)

    x = torch.randn(4, 5, 8)
    model = frozen(Fixed(), x)
    for name in ("model.onnx", "model.pt2"):
        with pytest.raises(ExportError, match=r"Fixed runs at no other batch size .*pass dynamic_batch=False"):
            dq.export(model, tmp_path / name, x)
        assert dq.export(model, tmp_path / name, x, dynamic_batch=False).agrees
    with pytest.raises(ExportError, match="at least one sample"):
        dq.export(frozen(nn.Sequential(nn.Linear(8, 4)), x), tmp_path / "none.onnx", x[:0])
