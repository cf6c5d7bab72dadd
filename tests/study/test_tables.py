"""The tables hold the paper's rows, and every row changes what its label says and nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

import octavo
from octavo.calibration import trace
from octavo.diffusion import NDTC, AsPublished, Single, SkewNormal, Uniform
from octavo.errors import OctavoError
from octavo.study import QUICK, Sampler, StudyOptions, Variant
from octavo.study.cells import by_trajectories, plan_cells
from octavo.study.tables import FP, Table, base_variant, plan_tables
from octavo.study.variants import digest


@pytest.fixture(scope="module")
def traced(pipeline):  # type: ignore[no-untyped-def]
    return trace(pipeline)


def plan(pipeline, traced, **change: object) -> list[Table]:  # type: ignore[no-untyped-def]
    return plan_tables(replace(StudyOptions(low_bits=()), **change), pipeline, traced)  # type: ignore[arg-type]


def changed(row: Variant, base: Variant) -> set[str]:
    """The names of what differs, a recipe's fields by their own names."""
    a, b = row.to_dict(), base.to_dict()
    a, b = {**a.pop("recipe"), **a}, {**b.pop("recipe"), **b}
    return {name for name in a if a[name] != b[name]}


def test_every_table_has_its_rows_and_a_base_that_is_the_method(pipeline, traced) -> None:  # type: ignore[no-untyped-def]
    base = base_variant(StudyOptions())
    tables = plan(pipeline, traced)
    assert [table.name for table in tables] == ["T1", "T2", "T3", "T4", "T5"]
    for table in tables[:4]:
        (row,) = [row for row in table.rows if row.label == table.base]
        assert row.variant == base
        labels = [row.label for row in table.rows]
        assert labels[0] == FP and len(set(labels)) == len(labels)


def test_operations_are_quantized_alone_and_with_the_network(pipeline, traced) -> None:  # type: ignore[no-untyped-def]
    (table,) = plan(pipeline, traced, tables=("T1",))
    rows = {row.label: row for row in table.rows}
    base = base_variant(StudyOptions())
    assert changed(rows["x_{t-1} alone"].variant, base) == {"network", "sampled_image"}
    assert changed(rows["mu, the network's output alone"].variant, base) == {"network", "network_output"}
    assert changed(rows["network and all of them"].variant, base) == {"network_output", "sampled_image"}
    assert rows["Sigma alone"].variant is None and "no variance" in rows["Sigma alone"].reason
    (with_variance,) = plan(pipeline, replace(traced, has_variance=True), tables=("T1",))
    rows = {row.label: row for row in with_variance.rows}
    assert changed(rows["Sigma, the learned variance alone"].variant, base) == {"network", "learned_variance"}
    everything = {"network", "network_output", "learned_variance", "sampled_image"}
    assert changed(rows["all of them, network in float"].variant, base) == everything


def test_sources_timesteps_and_metrics_change_that_alone(pipeline, traced) -> None:  # type: ignore[no-untyped-def]
    base = base_variant(StudyOptions())
    for name, field, count in (("T2", "source", 4), ("T3", "timesteps", 12), ("T4", "metric", 5)):
        (table,) = plan(pipeline, traced, tables=(name,))
        variants = [row.variant for row in table.rows if row.variant is not None]
        assert len({digest(variant.to_dict()) for variant in variants}) == len(variants) == count
        found = {frozenset(changed(variant, base) - {"pairs_per_trajectory"}) for variant in variants}
        assert found == {frozenset(), frozenset({field})}


def test_the_readings_of_the_timestep_distribution(pipeline, traced) -> None:  # type: ignore[no-untyped-def]
    (table,) = plan(pipeline, traced, tables=("T3",), single=(0.0, 1.0))
    drawn = [row.variant.recipe.distribution for row in table.rows if row.variant is not None]
    expected = [Single(0.0), Single(1.0), Uniform(), NDTC(0.4, 0.5), NDTC(0.4, "sqrt"), NDTC(0.4, 0.4)]
    assert drawn == [*expected, SkewNormal(), AsPublished()]


def test_samplers_are_calibrated_on_themselves(pipeline, traced) -> None:  # type: ignore[no-untyped-def]
    (table,) = plan(pipeline, traced, tables=("T5",), samplers=(Sampler("ddim", 50), Sampler("ddpm", 2000)))
    assert [row.label for row in table.rows] == [
        "DDIM-50, full precision",
        "DDIM-50, W8A8",
        "DDPM-2000, W8A8",
    ]
    assert table.rows[1].variant.recipe.steps == 50  # type: ignore[union-attr]
    assert table.rows[2].variant is None and "1000" in table.rows[2].reason


def test_the_papers_numbers_stand_where_they_belong(pipeline, traced) -> None:  # type: ignore[no-untyped-def]
    beside = {
        (table.name, row.label): row.paper.to_dict()
        for table in plan(pipeline, traced)
        for row in table.rows
        if row.paper
    }
    assert beside["T2", "raw images x_0"] == {"is": 6.90, "fid": 128.63, "sfid": 90.04, "note": ""}
    assert beside["T4", "KL divergence"]["fid"] == 47.27
    assert (
        beside["T5", "DDIM-100, W8A8"]["fid"] == 24.92
        and beside["T5", "DDIM-100, full precision"]["fid"] == 21.70
    )


def test_a_single_t_takes_as_many_different_pairs_as_other_rows(pipeline, traced) -> None:  # type: ignore[no-untyped-def]
    (table,) = plan(pipeline, traced, tables=("T3",))
    for row in table.rows:
        if row.variant is not None:
            single = isinstance(row.variant.recipe.distribution, Single)
            assert row.variant.recipe.pairs_per_trajectory == (1 if single else 4)


def test_the_papers_8_bit_numbers_stand_beside_8_bits_only(pipeline, traced) -> None:  # type: ignore[no-untyped-def]
    for table in plan(pipeline, traced, low_bits=((8, 6),)):
        assert any(row.paper for row in table.rows) == (table.bits == "W8A8")


def test_sources_that_a_scheduler_cannot_make_are_left_out_with_a_reason(pipeline, traced) -> None:  # type: ignore[no-untyped-def]
    flow = copy.copy(pipeline)
    flow.scheduler = FlowMatchEulerDiscreteScheduler()
    (table,) = plan(flow, traced, tables=("T2",), sampler="own")
    reasons = {row.label: row.reason for row in table.rows if row.reason}
    assert set(reasons) == {"noise x_T", "q(x_t | x_0), training-mimic"}
    assert all("FlowMatchEulerDiscreteScheduler has no" in reason for reason in reasons.values())
    assert any(row.variant is not None and row.variant.source == "raw" for row in table.rows)


def test_lower_widths_repeat_the_tables_asked_for(pipeline, traced) -> None:  # type: ignore[no-untyped-def]
    tables = plan(pipeline, traced, low_bits=((8, 6), (4, 8)))
    found = [(table.name, table.bits) for table in tables[5:]]
    assert found == [(name, bits) for bits in ("W8A6", "W4A8") for name in ("T1", "T2", "T3", "T4")]
    for table in tables[5:]:
        for row in table.rows:
            if row.variant is not None and row.variant.network:
                recipe = row.variant.recipe
                assert f"W{recipe.weights}A{recipe.activations}" == table.bits


def test_operations_alone_are_measured_once_for_all_weight_widths(pipeline, traced) -> None:  # type: ignore[no-untyped-def]
    tables = plan(pipeline, traced, tables=("T1",), low_bits=((8, 6), (6, 6)))
    cells = {digest(cell.variant.to_dict()) for cell in plan_cells(tables, seeds=1)}
    alone = {
        bits: [row.variant for row in table.rows if row.variant and not row.variant.network]
        for table in tables
        for bits in [table.bits]
    }
    assert alone["W8A6"] == alone["W6A6"] != alone["W8A8"]
    assert len(cells) == 2 * len(alone["W8A8"]) + 3 * 2


def test_cells_are_shared_and_grouped_by_trajectories_seed_by_seed(pipeline, traced) -> None:  # type: ignore[no-untyped-def]
    tables = plan(pipeline, traced, low_bits=((6, 6),))
    cells = plan_cells(tables, seeds=2)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    per_seed = [digest(cell.variant.to_dict()) for cell in cells if cell.seed == 0]
    rows = [row for table in tables for row in table.rows if row.variant is not None]
    assert len(set(per_seed)) == len(per_seed) < len(rows)  # the base stands in every table
    groups = list(by_trajectories(cells))
    keys = [(group[0].seed, digest(group[0].variant.trajectories())) for group in groups]
    assert len(set(keys)) == len(keys)  # no trajectories are run twice
    assert {cell.variant.recipe.weights for cell in groups[0]} == {6, 8}  # pairs do not depend on bits
    assert {cell.variant.source for cell in groups[0]} == {"denoising", "forward", "raw", "noise"}


def test_a_cell_that_is_not_one_is_told() -> None:
    recipe = octavo.PTQ4DM(steps=50)
    with pytest.raises(OctavoError, match="source: 'real'"):
        Variant(Sampler("ddim", 50), recipe, source="real")
    with pytest.raises(OctavoError, match="50 steps are not those of DDIM-10"):
        Variant(Sampler("ddim", 10), recipe)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seeds": 0}, "seeds: 0"),
        ({"num_images": 4}, "num_images: 4"),
        ({"tables": ("T6",)}, "tables: 'T6'"),
        ({"tables": ()}, "tables: choose"),
        ({"low_bit_tables": ("T9",)}, "low_bit_tables: 'T9'"),
    ],
)
def test_options_out_of_range_are_told(change: dict[str, object], told: str) -> None:
    with pytest.raises(OctavoError, match=told):
        replace(QUICK, **change)  # type: ignore[arg-type]
