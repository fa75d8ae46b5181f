"""Linear probe of a pretrained model: logistic regression on its frozen features, beside the same network untrained and
raw pixels. Both parts are of the public half, so that nothing about clients' images is learned by choosing a recipe.

    python -m bench.accuracy.pretrained [vit-fashion] [--train 6000] [--test 4000]
"""
import argparse
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from fedms import models
from fedms.config import ModelTable
from fedms.data import fashion
from fedms.models.vit import RECIPES, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="vit-fashion", choices=[n for n in RECIPES if "fashion" in n])
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--test", type=int, default=4000)
    asked = parser.parse_args()

    _, images, labels = fashion.read(None)
    chosen = np.random.default_rng(0).permutation(fashion.PUBLIC)[:asked.train + asked.test]
    pixels, labels = fashion.pixels(images[chosen]), labels[chosen]
    model = models.load(ModelTable(id=asked.model))
    rows = {"pixels": pixels.flatten(1), asked.model: features(model, pixels)}
    model.module.load_state_dict(build(RECIPES[asked.model]).state_dict())
    rows["untrained"] = features(model, pixels)
    for name, inputs in rows.items():
        print(f"{name:<12} {inputs.shape[1]:>4} features  accuracy {probe(inputs, labels, asked.train):.3f}")


@torch.no_grad()
def features(model, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.features({"pixel_values": part}) for part in pixels.split(500)])


def probe(inputs: torch.Tensor, labels: np.ndarray, train: int) -> float:
    """Accuracy on what lies behind the first `train` rows, for the best of three strengths of the penalty: all rows of
    this table are treated alike."""
    inputs = ((inputs - inputs[:train].mean(0)) / (inputs[:train].std(0) + 1e-6)).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fits = [LogisticRegression(C=c, max_iter=200).fit(inputs[:train], labels[:train]) for c in (0.003, 0.03, 0.3)]
    return max(fit.score(inputs[train:], labels[train:]) for fit in fits)


if __name__ == "__main__":
    main()
