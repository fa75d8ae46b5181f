"""Writes the ELPV data set (Buerhop-Lutz et al. 2018) as FOLDER/PLANT/CLASS/*.png, for solar_cells.toml.

    python solar_cells.py images [--cells 600]

A cell counts as defective if experts gave it a probability of defect above one half. The data set has no plants; six are
made up here: monocrystalline and polycrystalline modules go to three plants each, and each of the three sees another
share of the sound cells, so that plants differ in what they see and in how often it is broken.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

SHARES = (0.5, 0.3, 0.2)  # of a kind's sound cells, by plant; of its defective ones in the opposite order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; must not exist")
    parser.add_argument("--cells", type=int, default=None, help="only so many cells, drawn at random")
    arguments = parser.parse_args()
    try:
        from elpv_dataset.utils import load_dataset
    except ModuleNotFoundError:
        parser.error("the data set is not installed: pip install elpv-dataset")
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists; name another folder")
    images, probabilities, kinds = load_dataset()

    generator = np.random.default_rng(0)
    chosen = generator.permutation(len(images))[: arguments.cells]
    for kind in ("mono", "poly"):
        for label, shares in (("functional", SHARES), ("defective", SHARES[::-1])):
            cells = [i for i in chosen if kinds[i] == kind and (probabilities[i] > 0.5) == (label == "defective")]
            ends = np.cumsum([round(share * len(cells)) for share in shares])[:-1]
            for plant, part in enumerate(np.split(np.array(cells, dtype=int), ends), start=1):
                place = arguments.folder / f"{kind}{plant}" / label
                place.mkdir(parents=True)
                for i in part:
                    Image.fromarray(images[i]).save(place / f"cell{i:04d}.png")
    print(f"{len(chosen)} cells in {arguments.folder}")


if __name__ == "__main__":
    main()
