from __future__ import annotations

from pathlib import Path

from octavo.calibration import PTQ4DM, collect_pairs, observe


def test_no_more_rows_are_evaluated_at_once_than_were_denoised(pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Several pairs of one trajectory must not take more memory than the batch size that the user chose."""
    store = collect_pairs(
        pipeline, PTQ4DM(samples=14, steps=6, pairs_per_trajectory=4), tmp_path, batch_size=3, progress=False
    )
    rows = []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["sample"])), with_kwargs=True
    )
    try:
        observe(pipeline.unet, store, progress=False)
    finally:
        hook.remove()
    assert sum(rows) == 14
    assert max(rows) == 3
