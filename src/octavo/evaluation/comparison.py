"""What a comparison of two sets of images found, for people and for JSON."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from octavo.evaluation.intervals import Estimate

TITLES = {
    "fd": "FD to the reference",
    "sfd": "sFD to the reference",
    "kid": "KID to the reference",
    "precision": "precision",
    "recall": "recall",
    "psnr": "PSNR, dB",
    "psnr_pooled": "PSNR pooled, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "inception_score": "IS",
    "fd_real": "FD to real",
    "fd_real_difference": "FD to real, difference",
    "sfd_real": "sFD to real",
    "kid_real": "KID to real",
    "precision_real": "precision, real",
    "recall_real": "recall, real",
    "fd_infinity": "FD-infinity",
}


@dataclass(frozen=True)
class Comparison:
    """Every figure of a set of images against a reference set, each an `Estimate`; None where there is none.

    features: the extractor's name, "none" where no network looked at the images: then there are no distances between
    sets and no tests, only figures of pairs. count: N images on either side. paired: image k of both from one seed.

    Between the two sets: fd (Frechet distance), sfd (of spatial features), kid (unbiased MMD^2, polynomial kernel),
    precision and recall (the reference as the manifold).
    Per same-seed pair, float images: psnr (mean over images), psnr_pooled, ssim, lpips.
    Of either set alone, `..._reference` for the reference: inception_score; to real data fd_real, sfd_real, kid_real,
    precision_real, recall_real. fd_real_difference: fd_real - fd_real_reference, with an interval of its own.
    fd_infinity: fd_real extrapolated to infinitely many images (fd, where there is no real data).

    p_same: the test that both sets are drawn alike. p_same_real: that both are equally far from real data.
    permutations: how many each test drew; tested: the images of either set that p_same is of.
    notes: what a reader must know of bias and of what was left out.
    """

    features: str
    count: int
    paired: bool
    fd: Estimate | None = None
    kid: Estimate | None = None
    precision: Estimate | None = None
    recall: Estimate | None = None
    sfd: Estimate | None = None
    inception_score: Estimate | None = None
    inception_score_reference: Estimate | None = None
    fd_real: Estimate | None = None
    fd_real_reference: Estimate | None = None
    fd_real_difference: Estimate | None = None
    sfd_real: Estimate | None = None
    sfd_real_reference: Estimate | None = None
    kid_real: Estimate | None = None
    kid_real_reference: Estimate | None = None
    precision_real: Estimate | None = None
    precision_real_reference: Estimate | None = None
    recall_real: Estimate | None = None
    recall_real_reference: Estimate | None = None
    fd_infinity: Estimate | None = None
    fd_infinity_reference: Estimate | None = None
    psnr: Estimate | None = None
    psnr_pooled: Estimate | None = None
    ssim: Estimate | None = None
    lpips: Estimate | None = None
    p_same: float | None = None
    p_same_real: float | None = None
    permutations: int = 0
    tested: int = 0
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """All that was measured, JSON-safe, without what is None; an `Estimate` as its value, low, high and method."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Estimate):
                found[field.name] = value.as_json()
            elif isinstance(value, tuple):
                found[field.name] = list(value)
            elif value is not None:
                found[field.name] = value
        return found

    def as_text(self) -> str:
        """A table for a terminal: a figure a line, the set, the reference set where it has that figure too."""
        pairs = "same-seed pairs" if self.paired else "images on either side"
        lines = [f"{self.count} {pairs}, features: {self.features}; in brackets 95 % intervals"]
        for name, title in TITLES.items():
            value: Estimate | None = getattr(self, name)
            if value is None:
                continue
            reference: Estimate | None = getattr(self, f"{name}_reference", None)
            beside = "" if reference is None else f"   reference {reference}"
            lines.append(f"  {title:<24}{value!s:<34}{beside}".rstrip())
        if self.p_same is not None:
            lines.append(f"  drawn alike?            {self.verdict()}")
        if self.p_same_real is not None:
            lines.append(f"  equally far from real?  p = {self.p_same_real:.3g}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def verdict(self, level: float = 0.05) -> str:
        """One line that says whether the two sets differ, as far as these images can tell."""
        if self.p_same is None:
            return "not tested"
        found = "they differ" if self.p_same < level else "no difference found"
        images = self.tested or self.count
        return f"{found} (p = {self.p_same:.3g}, {self.permutations} permutations of {images} images)"
