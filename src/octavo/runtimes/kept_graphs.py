"""OpenVINO's converted graphs of a network: made from it at first use, kept on the disk, found there again."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from octavo.errors import OctavoError
from octavo.files import atomic_path
from octavo.fingerprint import contents
from octavo.runtimes.audit import audited
from octavo.runtimes.calls import Call
from octavo.runtimes.convert import FixedRows
from octavo.runtimes.core import import_openvino
from octavo.runtimes.edges import save_with_f32_layers
from octavo.runtimes.graph_folders import graph_folder, tell_of_others
from octavo.runtimes.held import ReadsValues
from octavo.runtimes.integer_graph import nodes_in_f32, to_integer_graph
from octavo.runtimes.memory_needed import tell_if_short
from octavo.runtimes.network import has_foreign_code
from octavo.runtimes.pointwise import convolutions_are_faster
from octavo.runtimes.sums import is_intact, write_sums
from octavo.runtimes.time_table import INDEX, tabulate, without_index

if TYPE_CHECKING:
    import openvino

FORMAT = "20"
"""Raised when a change of this file or of `convert` makes cached graphs stale."""
FIXED_ROWS = "fixed-rows"
"""A file in place of a cached graph: there is one for each number of rows."""
HELD = "held.txt"
"""A file in place of a cached graph: the names of the tensors that it has to hold."""


@dataclass
class KeptGraphs:
    """Graphs of `denoiser` for the calls that it gets, kept in `folder` within `cache`.

    `folder` is named by the network's contents, and by the versions and the processor that its graphs are for; where
    only those of others are there, a warning says so. None, and nothing is kept, for a network with hooks or methods
    that are not Octavo's: their code has no name. `fixed_rows`: the constants of the calls whose graphs are for one
    number of rows.
    """

    core: openvino.Core
    denoiser: nn.Module
    cache: Path
    split: list[str]
    timesteps: int
    folder: Path | None = field(init=False)
    fixed_rows: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._contents = contents(self.denoiser)
        made_for = (FORMAT, import_openvino().__version__, *processor(self.core), *self.split)
        if audited(self.denoiser) and convolutions_are_faster():
            made_for = (*made_for, "pointwise")
        named = graph_folder(self.cache, self._contents, made_for)
        self.folder = None if has_foreign_code(self.denoiser) else named
        self._told = False

    def converted(self, call: Call) -> openvino.Model:
        """The graph with a dynamic number of rows, if there can be one, from the cache or by conversion.

        Raises `OctavoError` if the network was changed, and where the disk is full.
        """
        if contents(self.denoiser) != self._contents:
            raise OctavoError(
                "denoiser: its weights were changed after it was accelerated; accelerate it again"
            )
        if self.folder is None:
            with tempfile.TemporaryDirectory() as temporary:
                try:
                    return self._saved(call, Path(temporary))
                except FixedRows:
                    self.fixed_rows.add(call.constants)
                    return self._saved(call, Path(temporary))
        tell_of_others(self.folder)
        table = str(self.timesteps) if INDEX in call.names else ""
        names = digest(call.constants, repr(call.names), repr(call.row_dynamic_shapes()), table)
        folder = self.folder / names
        if (folder / HELD).is_file():
            held = set((folder / HELD).read_text().splitlines()).intersection(call.names)
            if held:
                raise ReadsValues(f"{folder / HELD}: {', '.join(held)}", held)
            shutil.rmtree(folder, ignore_errors=True)  # damaged, as below
        if (folder / FIXED_ROWS).is_file():
            self.fixed_rows.add(call.constants)
        if call.constants in self.fixed_rows:
            folder = self.folder / f"{names}-{call.rows}"
        if folder.is_dir():
            with suppress(RuntimeError):  # damage is not an error: what is in a cache can be made again
                if is_intact(folder):
                    return self.core.read_model(folder / "graph.xml")
            shutil.rmtree(folder, ignore_errors=True)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            try:
                self._saved(call, temporary)
                write_sums(temporary)
            except FixedRows:
                (temporary / FIXED_ROWS).touch()
            except ReadsValues as read:
                (temporary / HELD).write_text("\n".join(sorted(read.names)))
        if (folder / FIXED_ROWS).is_file() or (folder / HELD).is_file():
            return self.converted(call)
        return self.core.read_model(folder / "graph.xml")

    def _saved(self, call: Call, folder: Path) -> openvino.Model:
        """Convert, save in `folder`, and read what was saved: it shares no memory with the network."""
        rows = call.rows if call.constants in self.fixed_rows else None
        if not self._told:
            self._told = True
            tell_if_short(self.denoiser, self.split)
        model = to_integer_graph(self.denoiser, without_index(call), self.split, rows)
        if INDEX in call.names and rows is None:
            tabulate(self.core, model, self.timesteps)
        try:
            save_with_f32_layers(model, nodes_in_f32(model, self.denoiser), folder / "graph.xml")
        except RuntimeError as error:
            if "iostream" not in str(error):  # all that OpenVINO says of a full disk
                raise
            raise OctavoError(
                f"{self.cache}: the converted network cannot be written; make room, or set OCTAVO_CACHE to "
                "another place"
            ) from error
        return self.core.read_model(folder / "graph.xml")


def processor(core: openvino.Core) -> list[str]:
    """What the engine can compute in on this processor: a folder of caches may be another's too."""
    return sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def digest(*texts: str) -> str:
    """16 hex digits that name these texts in their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
