from __future__ import annotations

import pytest
import torch

from fedms.tasks.classification import macro_f1


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("samples", [1, 7, 200])
def test_macro_f1_is_that_of_scikit_learn(classes, samples):
    from sklearn.metrics import f1_score

    predicted, targets = torch.randint(classes, (2, samples))
    expected = f1_score(targets, predicted, average="macro", labels=targets.unique(), zero_division=0)
    assert macro_f1(predicted, targets) == pytest.approx(expected, abs=1e-12)
