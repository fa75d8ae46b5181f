from __future__ import annotations

import pytest
import torch

from fedms.tasks.classification import BINS, Classification, auroc, calibration_error, macro_f1


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("samples", [1, 7, 200])
def test_macro_f1_is_that_of_scikit_learn(classes, samples):
    from sklearn.metrics import f1_score

    predicted, targets = torch.randint(classes, (2, samples))
    expected = f1_score(targets, predicted, average="macro", labels=targets.unique(), zero_division=0)
    assert macro_f1(predicted, targets) == pytest.approx(expected, abs=1e-12)


def predictions(classes, samples, levels=None):
    """Probabilities (samples, classes) and targets; of few levels where ties are wanted."""
    logits = torch.randn(samples, classes, dtype=torch.float64)
    return (logits if levels is None else (logits * levels).round()).softmax(1), torch.randint(classes, (samples,))


@pytest.mark.parametrize("classes, samples, levels", [(2, 3, None), (2, 90, None), (5, 40, None), (5, 200, 1), (9, 12, 2)])
def test_auroc_is_that_of_scikit_learn(classes, samples, levels):
    from sklearn.metrics import roc_auc_score

    probabilities, targets = predictions(classes, samples, levels)
    targets[:2] = torch.tensor([0, 1])      # two classes at least
    expected = [roc_auc_score(targets == label, probabilities[:, label]) for label in targets.unique()]
    assert auroc(probabilities, targets) == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_auroc_of_one_class_is_unknown():
    probabilities, _ = predictions(3, 8)
    assert auroc(probabilities, torch.full((8,), 2)) is None


@pytest.mark.parametrize("classes, samples", [(2, 1), (2, 50), (7, 400)])
def test_calibration_error_is_that_of_a_loop_over_bins(classes, samples):
    probabilities, targets = predictions(classes, samples)
    confidence, predicted = probabilities.max(1)
    expected = 0.0
    for number in range(BINS):
        inside = (confidence >= number / BINS) & ((confidence < (number + 1) / BINS) | (number == BINS - 1))
        if inside.any():
            right = (predicted == targets)[inside].double().mean()
            expected += float(inside.double().mean() * (right - confidence[inside].mean()).abs())
    assert calibration_error(probabilities, targets) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_known_cases():
    sure = torch.eye(4, dtype=torch.float64)
    assert calibration_error(sure, torch.arange(4)) == 0
    assert calibration_error(sure, (torch.arange(4) + 1) % 4) == 1
    even = torch.full((4, 2), 0.5, dtype=torch.float64)
    assert calibration_error(even, torch.tensor([0, 1, 0, 1])) == 0


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_details_are_finite_shares_whatever_the_logits(scale):
    """float32 logits far apart, whose probabilities are 0 and 1."""
    task = Classification(3, torch.nn.Identity, None, 1.0)
    targets = torch.randint(3, (20,))
    found = task.details({"personalized": scale * torch.randn(20, 3)}, targets, None)
    assert found.keys() == {"macro_f1", "calibration_error", "auroc"} and all(0 <= value <= 1 for value in found.values())
