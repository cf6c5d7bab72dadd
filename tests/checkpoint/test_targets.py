"""Where a pipeline may be saved, and what is never lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from octavo.checkpoint.save import check_target
from octavo.errors import OctavoError


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A saved folder of our own, to be replaced or not."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_saving_leaves_other_peoples_folders_alone(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OctavoError, match="mine"):
        quantized.save_pretrained(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_what_octavo_wrote_is_replaced(quantized, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    before = (model / "unet/config.json").stat().st_ino
    quantized.save_pretrained(model)
    assert (model / "unet/config.json").stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "name", ["thesis.txt", ".git/HEAD", "unet/notes.md", "photos/mum.png", "unet/old/a.json"]
)
def test_a_pipeline_with_something_more_is_kept(quantized, model: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("years of work")
    with pytest.raises(OctavoError, match=name.split("/")[0]):
        quantized.save_pretrained(model)
    assert (model / name).read_text() == "years of work"


def test_a_pipeline_that_octavo_did_not_write_is_kept(quantized, pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pipeline.save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "README.md").write_text("---\ntags:\n- octavo\n---\n")
    with pytest.raises(OctavoError, match="tiny"):
        quantized.save_pretrained(tmp_path / "tiny")
    assert (tmp_path / "tiny" / "unet").is_dir()


@pytest.mark.parametrize("place", [".", "..", "/", "/dev/null/model"])
def test_places_that_cannot_be_are_told(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OctavoError):
        check_target(Path(place))


def test_a_failed_save_leaves_nothing(quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(type(quantized.scheduler), "save_pretrained", fails)
    with pytest.raises(OctavoError, match=r"model: cannot be written \(No space left on device\)"):
        quantized.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_chat_template_is_part_of_a_component(quantized, model: Path) -> None:  # type: ignore[no-untyped-def]
    (model / "scheduler" / "chat_template.jinja").write_text("{{ messages }}")
    check_target(model)
