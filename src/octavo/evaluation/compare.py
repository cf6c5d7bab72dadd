"""Two sets of images compared: every figure with its interval, and tests of whether they differ at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from octavo.errors import OctavoError
from octavo.evaluation.comparison import Comparison
from octavo.evaluation.features import NO_FEATURES, FeatureExtractor, Features, check_images, extract
from octavo.evaluation.frechet import (
    FeatureStatistics,
    fd_infinity_estimate,
    frechet_difference,
    frechet_estimate,
)
from octavo.evaluation.generate import Images
from octavo.evaluation.inception_score import inception_score_estimate
from octavo.evaluation.intervals import mean_estimate
from octavo.evaluation.kernel import kernel_distance
from octavo.evaluation.manifold import precision_recall
from octavo.evaluation.paired_test import same_distance_to, same_distribution
from octavo.evaluation.perceptual import lpips
from octavo.evaluation.similarity import SMALLEST_SSIM, pooled_psnr, psnr, ssim

Uint8Images = NDArray[np.uint8]
FEWEST = 8  # images a side: what precision and recall need
FEWEST_INFINITY = 80
MOST_NEIGHBOURS = 5_000  # rows whose distances to each other are held for precision and recall: 200 MB


def compare(
    images: Uint8Images,
    reference_images: Uint8Images,
    *,
    extractor: FeatureExtractor | None,
    real: Features | FeatureStatistics | None = None,
    paired: bool,
    floats: Images | None = None,
    reference_floats: Images | None = None,
    seed: int = 0,
    permutations: int = 1000,
    extrapolate: bool = False,
    progress: bool = False,
) -> Comparison:
    """Every figure of `images` against `reference_images`, both uint8 [N, height, width, channels].

    `extractor`: see `load_features`; None: figures of pairs alone. `real`: the features of real images, or
    their statistics (then kernel distance, precision and recall to them are left out); taken as exact, see
    `real_statistics`. `paired`: image k of both comes from one seed; only then are there PSNR, SSIM and LPIPS, and the
    tests flip pairs instead of shuffling labels.
    `floats`, `reference_floats`: the same images before their rounding to 8 bits, float [N, height, width, channels]
    in [0, 1], what PSNR and SSIM are taken of (else the 8-bit images). `seed`, `permutations`: of the tests.
    `extrapolate`: also FD-infinity. The larger set is cut to the size of the smaller; a note says so.

    Raises `OctavoError` for fewer than 8 images, real ones too, pairs of different sizes, or where without an extractor
    there is nothing to compare.
    """
    check_images(images)
    check_images(reference_images, "reference_images")
    notes: list[str] = []
    count = min(len(images), len(reference_images))
    if count < FEWEST:
        raise OctavoError(f"images: {count} are too few to compare; give at least {FEWEST} on either side")
    if isinstance(real, Features) and len(real) < FEWEST:
        raise OctavoError(f"real: {len(real)} images are too few for distances; give at least {FEWEST}")
    if len(images) != len(reference_images):
        notes.append(
            f"{len(images)} images against {len(reference_images)}: the first {count} of either are compared"
        )
    images, reference_images = images[:count], reference_images[:count]
    if paired and images.shape[1:3] != reference_images.shape[1:3]:
        raise OctavoError(
            f"images: {images.shape[1:3]} pixels differ from the reference's {reference_images.shape[1:3]}, "
            "so they are no pairs; compare them unpaired"
        )
    if extractor is None:
        if not paired or extrapolate or real is not None:
            raise OctavoError(
                "features: none leaves only figures of same-seed pairs, PSNR and the like; say --same-seeds of such "
                "--images, or name features"
            )
        result = Comparison(features=NO_FEATURES, count=count, paired=True)
        bias: list[str] = []
    else:
        ours = extract(extractor, images, progress=progress)
        theirs = extract(extractor, reference_images, progress=progress)
        result = _between(ours, theirs, extractor.name, paired, seed, permutations, notes)
        if real is not None:
            result = _to_real(result, ours, theirs, real, seed)
        if extrapolate:
            result = _extrapolated(result, ours, theirs, real, seed, notes)
        bias = _bias_notes(count, ours.pooled.shape[1], paired, real)
    if paired:
        result = _same_seed(
            result,
            _floats(floats, images, "floats"),
            _floats(reference_floats, reference_images, "reference_floats"),
            notes,
        )
    return replace(result, notes=(*notes, *bias))


def _between(
    ours: Features, theirs: Features, name: str, paired: bool, seed: int, permutations: int, notes: list[str]
) -> Comparison:
    near = slice(MOST_NEIGHBOURS)
    shares = precision_recall(ours.pooled[near], theirs.pooled[near], paired=paired)
    test = same_distribution(ours.pooled, theirs.pooled, paired=paired, permutations=permutations, seed=seed)
    for used, what in ((min(len(ours), MOST_NEIGHBOURS), "precision and recall"), (test.images, "p_same")):
        if used < len(ours):
            notes.append(f"{what}: of the first {used} images of either set")
    result = Comparison(
        features=name,
        count=len(ours),
        paired=paired,
        fd=frechet_estimate(ours.pooled, theirs.pooled, paired=paired),
        kid=kernel_distance(ours.pooled, theirs.pooled, paired=paired),
        precision=shares.precision,
        recall=shares.recall,
        p_same=test.p_value,
        permutations=permutations,
        tested=test.images,
    )
    if ours.spatial is not None and theirs.spatial is not None:
        result = replace(result, sfd=frechet_estimate(ours.spatial, theirs.spatial, paired=paired))
    if ours.logits is not None and theirs.logits is not None:
        result = replace(
            result,
            inception_score=inception_score_estimate(ours.logits),
            inception_score_reference=inception_score_estimate(theirs.logits),
        )
    return result


def _to_real(
    result: Comparison, ours: Features, theirs: Features, real: Features | FeatureStatistics, seed: int
) -> Comparison:
    target = real if isinstance(real, FeatureStatistics) else FeatureStatistics.of(real.pooled)
    test = same_distance_to(
        target,
        ours.pooled,
        theirs.pooled,
        paired=result.paired,
        permutations=result.permutations,
        seed=seed,
    )
    result = replace(
        result,
        fd_real=frechet_estimate(ours.pooled, target),
        fd_real_reference=frechet_estimate(theirs.pooled, target),
        fd_real_difference=frechet_difference(ours.pooled, theirs.pooled, target, paired=result.paired),
        p_same_real=test.p_value,
    )
    if isinstance(real, FeatureStatistics):
        return result
    if real.spatial is not None and ours.spatial is not None and theirs.spatial is not None:
        spatial = FeatureStatistics.of(real.spatial)
        result = replace(
            result,
            sfd_real=frechet_estimate(ours.spatial, spatial),
            sfd_real_reference=frechet_estimate(theirs.spatial, spatial),
        )
    near = slice(MOST_NEIGHBOURS)
    shares = precision_recall(ours.pooled[near], real.pooled[near])
    shares_reference = precision_recall(theirs.pooled[near], real.pooled[near])
    return replace(
        result,
        kid_real=kernel_distance(ours.pooled, real.pooled),
        kid_real_reference=kernel_distance(theirs.pooled, real.pooled),
        precision_real=shares.precision,
        precision_real_reference=shares_reference.precision,
        recall_real=shares.recall,
        recall_real_reference=shares_reference.recall,
    )


def _extrapolated(
    result: Comparison,
    ours: Features,
    theirs: Features,
    real: Features | FeatureStatistics | None,
    seed: int,
    notes: list[str],
) -> Comparison:
    if len(ours) < FEWEST_INFINITY:
        notes.append(f"FD-infinity: left out, {len(ours)} images are fewer than {FEWEST_INFINITY}")
        return result
    if len(ours) < 8 * ours.pooled.shape[1]:
        notes.append(
            f"FD-infinity: {len(ours)} images are few for {ours.pooled.shape[1]} features, so that the distance is "
            "not quite straight in 1/N and part of the bias stays"
        )
    if real is None:
        return replace(result, fd_infinity=fd_infinity_estimate(ours.pooled, theirs.pooled, seed=seed))
    target = real if isinstance(real, FeatureStatistics) else FeatureStatistics.of(real.pooled)
    return replace(
        result,
        fd_infinity=fd_infinity_estimate(ours.pooled, target, seed=seed),
        fd_infinity_reference=fd_infinity_estimate(theirs.pooled, target, seed=seed),
    )


def _same_seed(result: Comparison, images: Images, reference: Images, notes: list[str]) -> Comparison:
    if images.shape != reference.shape:  # grey beside colour
        images, reference = _in_colour(images), _in_colour(reference)
    decibels = psnr(images, reference)
    equal = int(np.isinf(decibels).sum())
    if equal:
        notes.append(
            f"PSNR: {equal} of {len(images)} pairs are equal (infinite); the mean is over the others"
            if equal < len(images)
            else "PSNR: all pairs are equal"
        )
    result = replace(
        result,
        psnr=mean_estimate(decibels[np.isfinite(decibels)] if equal < len(images) else decibels),
        psnr_pooled=pooled_psnr(images, reference),
    )
    if min(images.shape[1:3]) >= SMALLEST_SSIM:
        result = replace(result, ssim=mean_estimate(ssim(images, reference)))
    else:
        notes.append(f"SSIM: left out, images have fewer than {SMALLEST_SSIM} pixels a side")
    perceptual = lpips(images, reference)
    if isinstance(perceptual, str):
        notes.append(f"LPIPS: left out, {perceptual}")
        return result
    return replace(result, lpips=mean_estimate(perceptual))


def _floats(floats: Images | None, images: Uint8Images, name: str) -> Images:
    """What PSNR is taken of: the images before their rounding to 8 bits, where they are given."""
    if floats is None:
        return images.astype(np.float32) / np.float32(255)
    if floats.ndim != 4 or len(floats) < len(images) or floats.shape[1:] != images.shape[1:]:
        raise OctavoError(f"{name}: shape {floats.shape} is not that of the 8-bit images, {images.shape}")
    return floats[: len(images)]


def _in_colour(images: Images) -> Images:
    """Grey repeated for each colour, so that it can stand beside colour."""
    return np.broadcast_to(images, (*images.shape[:3], 3))


def _bias_notes(
    count: int, num_features: int, paired: bool, real: Features | FeatureStatistics | None
) -> list[str]:
    notes = [
        f"FD: {count} images on either side; its bias falls as 1/N, so compare FDs of equal N only"
        + ("; between same-seed pairs that are nearly alike it nearly cancels" if paired else "")
    ]
    if count < 2 * num_features:
        notes.append(
            f"FD: {count} images are few for {num_features} features, so its bias may exceed the distance itself"
        )
    if real is not None:
        moments_only = isinstance(real, FeatureStatistics)
        reference = real.count if isinstance(real, FeatureStatistics) else len(real)
        notes.append(
            f"real data: {reference} images, taken as exact; intervals hold sampling of the generated only"
            + (
                "; of their moments alone, so no sFD, KID, precision or recall to them"
                if moments_only
                else ""
            )
        )
    return notes
