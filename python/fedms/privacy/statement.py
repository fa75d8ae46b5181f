"""What a run guarantees, in a sentence that can be quoted."""
from __future__ import annotations

from typing import Any


def statement(privacy: dict[str, Any]) -> str:
    """Return the guarantee of a run in one or a few sentences.

    Args:
        privacy: The values under "privacy" in the summary of the run.
    """
    mode, clients = privacy["mode"], privacy["clients"]
    masked = (f"the server sees the sum of at least {privacy['threshold']} clients' updates and no single one, as long as fewer than "
              "a third of a round's clients help it")
    if mode == "secure":
        return f"Secure aggregation: {masked}; no noise is added, so this run is not differentially private."
    sampling = ("without amplification by sampling, each client counting as taking part in every release"
                if privacy["sampling"] == "fixed" else
                f"each client being drawn secretly with probability {privacy['sampling_rate']:g} for each round (Poisson sampling)")
    against = ("readers of the models and records that leave the server, not against the server itself" if mode == "central" else
               f"readers of the models and records, and against the server: {masked}, and as long as all clients "
               "whose updates are in a sum have added their share of the noise")
    return (f"This run is (epsilon, delta)-differentially private with epsilon = {privacy['epsilon']:.4g} and delta = "
            f"{privacy['delta']:g}; the unit is a client: whether any one of the {clients} clients took part, with all of its data, "
            f"changes the probability of what is released by no more than that. Accountant: {privacy['accountant'].upper()} of "
            f"dp-accounting over {privacy['releases']} releases, {sampling}. It protects against {against}.")
