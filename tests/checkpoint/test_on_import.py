from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.checkpoint.on_import import when_imported


def test_a_hook_runs_once_behind_the_code_of_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waited_for.py").write_text("value = 1\n")
    (tmp_path / "reader.py").write_text("import waited_for\nseen = waited_for.value\n")
    monkeypatch.syspath_prepend(tmp_path)
    when_imported("waited_for", lambda module: setattr(module, "value", module.value + 1))
    assert "waited_for" not in sys.modules
    import reader  # type: ignore[import-not-found]
    import waited_for  # type: ignore[import-not-found]

    assert reader.seen == waited_for.value == 2
    assert type(waited_for.__spec__.loader).__module__ != "octavo.checkpoint.on_import"
    when_imported("waited_for", lambda module: setattr(module, "value", module.value + 1))  # at once
    assert waited_for.value == 3


def test_what_is_not_there_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    when_imported("octavo_waits_for_nothing", print)
    with pytest.raises(ModuleNotFoundError):
        __import__("octavo_waits_for_nothing")


@pytest.mark.parametrize(
    "before", ["", "import diffusers", "from diffusers import DDIMPipeline, UNet2DModel"]
)
def test_diffusers_is_told_whenever_it_is_imported(before: str) -> None:
    code = f"""
{before}
import octavo
from diffusers import DDIMPipeline
from diffusers.quantizers import auto
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
import json
wrapped = [hasattr(m, "octavo_original") for m in (
    DDIMPipeline.__init__, DDIMPipeline.save_pretrained, DDIMPipeline.from_pretrained,
)]
table = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
print(json.dumps([table["octavo"].__name__, auto.AUTO_QUANTIZER_MAPPING.get("octavo").__name__,
    table.get("none"), [v.__name__ for v in table.values()][-1], "octavo" in LOADABLE_CLASSES, *wrapped]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        "OctavoConfig",
        "OctavoQuantizer",
        None,
        "OctavoConfig",
        True,
        True,
        True,
        True,
    ]
