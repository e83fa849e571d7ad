"""The table of costs in the docs is what the engine counts."""

from __future__ import annotations

import pytest

from benchmarks.cost import PAGE, TYPICAL, Costs, table, with_table
from tests.controls.test_contracts import SETTINGS


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_every_control_has_one_row_with_a_page(page: str) -> None:
    rows = [line for line in page.splitlines() if line.startswith("| [") and "](controls/" in line]
    names = [line.partition("[")[2].partition("]")[0] for line in rows]
    assert sorted(names) == sorted(SETTINGS)
    for line in rows:
        assert (PAGE.parent / line.partition("](")[2].partition(")")[0]).is_file()


def test_what_makes_a_run_typical_belongs_to_a_control() -> None:
    for name, typical in TYPICAL.items():
        assert not {*typical.default} - {*SETTINGS[name](PAGE.parent)}


def test_known_costs(tmp_path_factory: pytest.TempPathFactory) -> None:
    costs = Costs(tmp_path_factory.mktemp("costs"))
    plain, three, net = costs.of(), costs.of("perturbed_attention_guidance"), costs.of("controlnet")
    assert (plain.steps, plain.rows, plain.passes, plain.side_passes) == (20, 40, 20, 0)
    assert (three.rows, three.passes) == (60, 20)
    assert (net.rows, net.side_passes) == (40, 20)


def test_a_page_without_its_markers_is_refused(page: str) -> None:
    assert "changed\n" in with_table(page, "changed\n")
    with pytest.raises(SystemExit, match="lacks"):
        with_table("# Speed\n", "changed\n")


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_the_code_gives(page: str) -> None:
    assert with_table(page, table()) == page, "run `python -m benchmarks.cost --write`"
