from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import octavo
from octavo.errors import OctavoError
from octavo.evaluation.generate import generate, to_uint8
from octavo.evaluation.similarity import psnr
from octavo.quantization import quantized_layers
from octavo.study import Sampler, workbench
from octavo.study.cells import Cell
from octavo.study.tables import base_variant
from octavo.study.workbench import SEED_STRIDE, Workbench


@pytest.fixture
def cell(options) -> Cell:  # type: ignore[no-untyped-def]
    return Cell(base_variant(options), 0)


def changed(cell: Cell, recipe: dict[str, object] | None = None, **variant: object) -> Cell:
    return replace(
        cell,
        variant=replace(cell.variant, recipe=replace(cell.variant.recipe, **(recipe or {})), **variant),  # type: ignore[arg-type]
    )


def scales(pipeline) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return torch.stack([layer.input_scale for _, layer in quantized_layers(pipeline.unet)])


def test_a_cell_quantizes_as_octavo_does(bench: Workbench, cell: Cell, pipeline) -> None:  # type: ignore[no-untyped-def]
    ours = bench.quantized(replace(cell, seed=1)).unet.state_dict()
    theirs = octavo.quantize(
        pipeline, cell.variant.recipe, seed=2 * SEED_STRIDE, batch_size=8, progress=False
    ).unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_was_measured_is_what_the_figures_say(bench: Workbench, cell: Cell, pipeline) -> None:  # type: ignore[no-untyped-def]
    measured = bench.measure(cell)
    images = {
        name: generate(one, 8, steps=4, batch_size=8, progress=False)
        for name, one in (("fp", pipeline), ("int8", bench.quantized(cell)))
    }
    assert np.array_equal(bench.reference(cell.variant.sampler), images["fp"])
    expected = psnr(images["int8"], images["fp"]).mean()
    assert measured["figures"]["psnr"]["value"] == pytest.approx(expected)
    assert {"fd", "inception_score", "sfd", "kid"} <= measured["figures"].keys()
    assert {"inception_score"} == measured["reference_figures"].keys()
    assert measured["how"] == "simulation (torch)" and measured["num_images"] == 8


def test_trajectories_weights_and_references_are_made_once(
    bench: Workbench, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, int] = {}

    def counted(name: str) -> None:
        real = getattr(workbench, name)

        def count(*args: object, **kwargs: object) -> object:
            calls[name] = calls.get(name, 0) + 1
            return real(*args, **kwargs)

        monkeypatch.setattr(workbench, name, count)

    for name in ("observe", "round_weights", "generate"):
        counted(name)
    cells = [cell, changed(cell, {"activations": 6}), changed(cell, {"sampled_image": True}, network=False)]
    for one in cells:
        bench.measure(one)
    assert calls == {"observe": 1, "round_weights": 1, "generate": 4}  # and one reference
    bench.measure(changed(cell, {"metric": "minmax"}, source="noise"))
    assert calls == {"observe": 2, "round_weights": 2, "generate": 5}
    assert len(list(bench.work.glob("pairs-*"))) == 1
    bench.quantized(replace(cell, seed=1))
    (folder,) = bench.work.glob("pairs-*")  # of these trajectories only
    assert folder.name.endswith("seed1")


def test_weights_in_groups_are_kept_with_their_multipliers(bench: Workbench, cell: Cell) -> None:
    def integers(group_size: int | None) -> list[torch.Tensor]:
        made = bench.quantized(changed(cell, {"weights": 4, "group_size": group_size}))
        return [layer.weight_int8 for _, layer in quantized_layers(made.unet)]

    first = integers(16)
    assert any(int(weight.abs().max()) > 7 for weight in first)
    assert all(int(weight.abs().max()) <= 7 for weight in integers(None))
    assert all(torch.equal(a, b) for a, b in zip(first, integers(16), strict=True))


def test_sources_and_seeds_change_the_ranges(bench: Workbench, cell: Cell) -> None:
    base = scales(bench.quantized(cell))
    for other in (
        changed(cell, source="noise"),
        changed(cell, source="raw"),
        changed(cell, source="forward"),
        replace(cell, seed=1),
    ):
        assert not torch.equal(scales(bench.quantized(other)), base)


def test_an_operation_alone_leaves_the_network_in_float(bench: Workbench, cell: Cell) -> None:
    alone = bench.quantized(changed(cell, {"network_output": True}, network=False)).unet
    assert not list(quantized_layers(alone))
    output = alone(torch.zeros(1, 3, 8, 8), 5).sample / alone.octavo_operations["network_output"].scale
    torch.testing.assert_close(output, output.round(), atol=1e-3, rtol=0)


def test_given_images_are_x0_and_what_real_means(bench: Workbench, cell: Cell, pipeline) -> None:  # type: ignore[no-untyped-def]
    real = to_uint8(np.random.default_rng(0).random((20, 8, 8, 3), dtype=np.float32))
    work = bench.work.with_name("other")
    other = Workbench(pipeline, bench.traced, bench.options, work, bench.references, "tiny", images=real)
    raw = changed(cell, source="raw")
    own, given = bench.measure(raw), other.measure(raw)
    assert "fd_real" not in own["figures"]  # the real data of the features are digits, these images are not
    assert given["figures"]["fd_real"]["value"] > 0 and "fd_real" in given["reference_figures"]
    assert own["figures"]["psnr"] != given["figures"]["psnr"]
    work, quarter = bench.work.with_name("third"), real[:, :4, :4]
    small = Workbench(pipeline, bench.traced, bench.options, work, bench.references, "tiny", images=quarter)
    with pytest.raises(OctavoError, match="the network reads 3 x 8 x 8"):
        small.quantized(raw)


def test_another_sampler_has_its_own_reference(bench: Workbench, cell: Cell) -> None:
    sampler = Sampler("ddpm", 5)
    ddpm = bench.measure(changed(cell, {"steps": 5}, sampler=sampler))
    assert ddpm["figures"]["psnr"]["value"] > 20  # the same noise in every step
    assert len(list(bench.references.iterdir())) == 1
    bench.reference(cell.variant.sampler)
    assert len(list(bench.references.iterdir())) == 2
