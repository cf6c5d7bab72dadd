"""The bundled digit classifier, its record and its reference statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.errors import OctavoError
from octavo.evaluation.digits import (
    FeatureStatistics,
    classifier_record,
    load_digit_classifier,
    reference_statistics,
)


@pytest.fixture(scope="module")
def classifier():
    return load_digit_classifier()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_shapes_and_dtypes(classifier, images) -> None:
    features, logits = classifier(images)
    assert features.shape == (5, 64) and features.dtype == torch.float32
    assert logits.shape == (5, 10) and logits.dtype == torch.float32


def test_is_loaded_for_evaluation(classifier) -> None:
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_an_image_is_treated_alone(classifier, images) -> None:
    together = classifier(images)[0]
    alone = torch.cat([classifier(image[None])[0] for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 3, 16, 16), (2, 1, 8, 8)])
def test_other_shapes_are_refused(classifier, shape) -> None:
    with pytest.raises(OctavoError, match="expected N x 1 x 16 x 16"):
        classifier(torch.zeros(shape))


def test_record() -> None:
    record = classifier_record()
    assert record["held_out_accuracy"] > 0.98
    assert record["held_out_images"] == 360
    assert f"--seed {record['seed']}" in record["command"]


def test_statistics_agree_with_numpy() -> None:
    features = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)) * 3 + 2
    statistics = FeatureStatistics.of(features)
    rows = features.double().numpy()
    np.testing.assert_allclose(statistics.mean.numpy(), rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(rows.T), rtol=1e-10, atol=1e-12)
    assert statistics.count == 50


@pytest.mark.parametrize(("split", "count"), [("train", 1437), ("held_out", 360)])
def test_reference_statistics(split: str, count: int) -> None:
    statistics = reference_statistics()[split]
    assert statistics.count == count
    assert statistics.mean.shape == (64,) and statistics.mean.dtype == torch.float64
    assert statistics.covariance.shape == (64, 64) and statistics.covariance.dtype == torch.float64
    torch.testing.assert_close(statistics.covariance, statistics.covariance.T, rtol=0, atol=1e-12)
    eigenvalues = torch.linalg.eigvalsh(statistics.covariance)
    assert eigenvalues.min() > -1e-9 * eigenvalues.max()


def test_record_and_statistics_hold_for_the_weights(classifier) -> None:
    """The bundled files belong together: measured again on the held-out digits themselves."""
    pytest.importorskip("sklearn")
    import digits

    images, labels = digits.load("held_out")
    features, logits = classifier(images)
    right = int((logits.argmax(1) == labels).sum())
    assert right == round(classifier_record()["held_out_accuracy"] * len(labels))
    measured, bundled = FeatureStatistics.of(features), reference_statistics()["held_out"]
    torch.testing.assert_close(measured.mean, bundled.mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(measured.covariance, bundled.covariance, rtol=1e-2, atol=1e-3)
