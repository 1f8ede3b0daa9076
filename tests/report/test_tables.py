"""Tables as plain text: a plan against its golden file, and what no cell may do to the terminal."""

import pytest

from daqconvert.report.tables import plan_table, render, short_number, simple_table
from daqconvert.spec import Plan, PlanRow, Settings, Site

INTEGER = Settings(4, 4, "channel", grid="integer", normalize=False)
PAPER = Settings(1, 2, "tensor", grid="midrise", normalize=True)
NOTE = "sums may pass 2**24: layouts and batch sizes may differ in the last bit"


@pytest.fixture
def plan() -> Plan:
    stem = Site("conv1", "Conv2d", (16, 3, 3, 3), 16, 27, 432, first=True, macs=442368)
    block = Site("layer1.0.conv1", "Conv2d", (16, 16, 3, 3), 16, 144, 2304, nonnegative=True, macs=2359296)
    large = Site("layer2.0.conv1", "Conv2d", (512, 512, 3, 3), 512, 4608, 2359296, macs=37748736)
    attention = Site("attn.proj", "Linear", (64, 64), 64, 64, 4160, reason="weight is parametrized")
    head = Site("fc", "Linear", (10, 64), 10, 64, 650, nonnegative=True, last=True, macs=640)
    rows = (
        PlanRow(stem, INTEGER.replace(a_bits=None), "first"),
        PlanRow(block, PAPER, 'rule 1: "re:layer[1].*"', signed=False, notes=(NOTE,)),
        PlanRow(large, INTEGER, "default", notes=(NOTE, "shared by two modules")),
        PlanRow(attention, None, "-", reason="weight is parametrized"),
        PlanRow(head, None, "last", reason="last layer (last = None)"),
    )
    return Plan(rows, "ResNet", other_params=20_000, input_size=(1, 3, 32, 32), policy="policy.toml")


def test_plan_table(plan, golden_text):
    golden_text(render(plan_table(plan)))


def test_plan_table_folds_where_there_is_no_room(plan):
    lines = render(plan_table(plan), width=100).splitlines()
    assert max(map(len, lines)) <= 100
    assert "parametrized" not in "\n".join(lines)  # folded, so the lines above say something


def test_totals_are_the_plans(plan):
    total = next(line for line in render(plan_table(plan)).splitlines() if line.startswith("| total"))
    cells = [cell.strip() for cell in total.strip("|").split("|")]
    assert cells[:2] == ["total", "3 of 5"]
    assert cells[4:8] == ["2.39M", "40.6M", "666M", "1.28 MB"]
    assert cells[9] == "41.5G BOPs, 9.55 MB in float32; scales 2.13 kB besides; MACs of 1 unknown"
    assert (plan.float_bytes, plan.macs, plan.bytes) == (9547368, 40551040, 1279392)
    bops = 442368 * 4 * 32 + 2359296 * 1 * 2 + 37748736 * 4 * 4 + 640 * 32 * 32
    assert (plan.bops, plan.totals.float_bops) == (bops, 40551040 * 1024)
    assert plan.totals.scale_bytes == 4 * 16 + (4 + 5) + (4 * 512 + 5)


def test_a_plan_without_sizes_or_rows():
    text = render(plan_table(Plan((PlanRow(Site("", "Linear"), None, "-", reason="no weight"),), "Linear", "modules")))
    assert text.startswith("Linear: policy arguments, order by registration (torch.fx cannot tell)\n")
    assert "| (root) | Linear | float  | float |      - |    - |    - |     - | -          | no weight" in text
    assert "(others)" not in text
    assert "| total | 0 of 0 |" in render(plan_table(Plan((), "Net")))


def test_rows_left_alone_are_dim_on_a_terminal(plan):
    assert [row.style for row in plan_table(plan).rows] == [None, None, None, "dim", "dim", "dim"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (0.5, "0.5"),
        (7, "7"),
        (999, "999"),
        (999.6, "1k"),
        (1000, "1k"),
        (9408, "9.41k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (11_689_512, "11.7M"),
        (1.814e9, "1.81G"),
        (4e12, "4T"),
        (1234e12, "1.23e+03T"),
    ],
    ids=str,
)
def test_short_number(value, text):
    assert short_number(value) == text


def test_simple_table():
    rows = [("float", 96.52391, 1, None), ("W4A4", 95.0, 20, True)]
    assert render(simple_table("Top-1", ("model", "accuracy", "runs", "done"), rows)).splitlines() == [
        "Top-1",
        "",
        "| model | accuracy | runs | done |",
        "|-------|----------|------|------|",
        "| float |    96.52 |    1 | -    |",
        "| W4A4  |       95 |   20 | True |",
    ]


def test_a_table_of_no_rows():
    assert render(simple_table("", ("a", "b"), [])) == "| a | b |\n|---|---|"


def test_a_row_of_another_length():
    with pytest.raises(ValueError, match=r"expected 2 cells, one for each of \['a', 'b'\]; found 1: \(1,\)"):
        simple_table("", ("a", "b"), [(1,)])


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        pytest.param("re:layer[1-4]", "re:layer[1-4]", id="no markup"),
        pytest.param("[red]x[/]", "[red]x[/]", id="no colour"),
        pytest.param(":smile:", ":smile:", id="no emoji"),
        pytest.param("a\x1b[31mb", "a\\x1b[31mb", id="no escape sequence"),
        pytest.param("a\nb\rc", "a\\nb\\rc", id="one line"),
        pytest.param("Gr\u00f6\u00dfe", "Gr\u00f6\u00dfe", id="letters stay"),
    ],
)
def test_cells_are_shown_as_they_are(cell, shown):
    text = render(simple_table(cell, (cell,), [(cell,)]), width=80)
    assert text.splitlines() == [shown, "", f"| {shown} |", f"|{'-' * (len(shown) + 2)}|", f"| {shown} |"]
