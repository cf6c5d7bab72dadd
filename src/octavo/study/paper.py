"""The paper's numbers, to stand beside ours: ImageNet 64x64, 10,000 images, 8 bits (PTQ4DM 2211.15736, tables 1-5)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PaperFigures:
    """Inception score, FID and sFID as published; `note` says where they are not quite the same thing as our row."""

    inception_score: float
    fid: float
    sfid: float
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {"is": values["inception_score"], **{name: values[name] for name in ("fid", "sfid", "note")}}


FULL_PRECISION = {
    "DDIM-100": PaperFigures(15.38, 21.70, 17.93),
    "DDIM-250": PaperFigures(14.88, 21.63, 17.66),
    "DDPM-1000": PaperFigures(15.93, 20.82, 17.42, "DDPM-4000"),
}
QUANTIZED = {
    "DDIM-100": PaperFigures(15.52, 24.92, 17.36),
    "DDIM-250": PaperFigures(15.88, 23.96, 17.67),
    "DDPM-1000": PaperFigures(15.28, 23.64, 17.29, "DDPM-4000"),
}
OPERATIONS = {
    "float": PaperFigures(14.88, 21.63, 17.66, "DDIM-250"),
    "network_output": PaperFigures(15.51, 21.38, 17.41),
    "learned_variance": PaperFigures(15.47, 21.96, 17.62),
    "sampled_image": PaperFigures(15.26, 21.94, 17.67),
    "all": PaperFigures(14.94, 21.99, 17.84),
}
SOURCES = {
    "noise": PaperFigures(13.92, 33.15, 20.38),
    "raw": PaperFigures(6.90, 128.63, 90.04),
    "forward": PaperFigures(12.91, 34.55, 25.18),
}
TIMESTEPS = {
    "single": PaperFigures(11.92, 49.37, 41.33, "the best single t"),
    "uniform": PaperFigures(14.99, 26.19, 19.51),
    "ndtc": PaperFigures(15.68, 24.26, 17.28, "standard deviation not certain"),
}
METRICS = {
    "l1": PaperFigures(7.38, 100.52, 63.01),
    "cosine": PaperFigures(12.85, 34.81, 23.75),
    "kl": PaperFigures(11.74, 47.27, 45.08),
    "mse": PaperFigures(13.76, 30.46, 19.42),
}
