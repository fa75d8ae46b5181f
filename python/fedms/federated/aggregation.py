"""How the server combines what clients send."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class WeightedMean:
    """Weighted mean of each tensor over the clients that sent it, as replies stream in.

    The divisor is kept per tensor: where clients train different depths, a tensor is divided by the weight of those
    that trained it, or its update would shrink. Sums are in float64, in the order of arrival; callers add clients in
    ascending order of their ids, so that every engine gives the same bits.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Add one reply.

        Raises:
            ValueError: If the weight is not above 0, or the shape of a tensor differs from that in an earlier reply.
        """
        if not weight > 0:
            raise ValueError(f"a reply's weight must be above 0, got {weight}")
        for name, tensor in tensors.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
                self.weights[name] = 0.0
            elif self.sums[name].shape != tensor.shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)} does not match {tuple(self.sums[name].shape)} "
                                 "sent by other clients")
        if tensors:     # all at once: they are many, and small
            torch._foreach_add_([self.sums[name] for name in tensors], list(tensors.values()), alpha=weight)
        for name in tensors:
            self.weights[name] += weight

    def result(self) -> dict[str, Tensor]:
        """Return the means, float32, of the tensors that any client sent."""
        return {name: (total / self.weights[name]).float() for name, total in self.sums.items()}


class Residual:
    """What averaging A and B apart loses: mean(B A) - mean(B) mean(A), for each LoRA pair of a round.

    Keeps the round's pairs (references, rank-sized). Source: definition, section 5; FedEx-LoRA (Singhal et al.,
    arXiv 2410.09432).
    """

    def __init__(self) -> None:
        self.pairs: dict[str, list[tuple[Tensor, Tensor, float]]] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Add the pairs `<layer>.lora_a` (r, K) and `<layer>.lora_b` (N, r) of one reply."""
        for name, a in tensors.items():
            layer = name.removesuffix(".lora_a")
            if layer != name and f"{layer}.lora_b" in tensors:
                self.pairs.setdefault(layer, []).append((a, tensors[f"{layer}.lora_b"], weight))

    def norm(self) -> float | None:
        """Relative size `||residual|| / ||mean(B A)||` over all pairs together, Frobenius norms; None if no pair was
        sent or all products are zero."""
        lost = kept = 0.0
        for _, pairs in sorted(self.pairs.items()):
            its_lost, its_kept = _norms_squared(*_stacked(pairs))
            lost, kept = lost + its_lost, kept + its_kept
        return (lost / kept) ** 0.5 if kept > 0 else None

    def corrections(self, means: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """Return `correction/<layer>` (N, K) float64, which is to be added to each frozen weight.

        With it, the pair of `means`, applied with this scale, does what the mean of the clients' products would do.
        """
        found = {}
        for layer, pairs in self.pairs.items():
            a, b, _ = _stacked(pairs)
            lost = b.flatten(0, 1).T @ a.flatten(0, 1)
            lost -= means[f"{layer}.lora_b"].double() @ means[f"{layer}.lora_a"].double()
            found[f"correction/{layer.removeprefix('expert/')}"] = scale * lost
        return found

    def factored(self) -> dict[str, Tensor]:
        """New pairs A (r, K) and B (N, r), float32, whose products are the best of their rank to the means of the clients' products
        (FlexLoRA: Bai et al., arXiv 2402.11505). Of U S V^T, in the order of falling singular values, B is U S and A is V^T; the
        largest entry of each column of U is positive, so that the signs do not depend on the solver."""
        found = {}
        for layer, pairs in self.pairs.items():
            a, b, _ = _stacked(pairs)
            (left, of_left), (right, of_right) = (torch.linalg.qr(x.flatten(0, 1).T) for x in (b, a))
            u, s, vt = torch.linalg.svd(of_left @ of_right.T)
            rank = min(a.shape[1], len(s))
            u, vt = (left @ u)[:, :rank], (vt @ right.T)[:rank]
            signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()[0]
            found[f"{layer}.lora_a"], found[f"{layer}.lora_b"] = torch.zeros_like(pairs[0][0]), torch.zeros_like(pairs[0][1])
            found[f"{layer}.lora_a"][:rank] = (vt * signs[:, None]).float()
            found[f"{layer}.lora_b"][:, :rank] = (u * (s[:rank] * signs)).float()
        return found


def _stacked(pairs: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (k, r, K), the transposed B times the client's share of the weights (k, r, N), and these shares (k,); float64."""
    shares = torch.tensor([weight for _, _, weight in pairs], dtype=torch.float64)
    shares /= shares.sum()
    return (torch.stack([a for a, _, _ in pairs]).double(),
            torch.stack([b for _, b, _ in pairs]).double().mT * shares[:, None, None], shares)


def _norms_squared(a: Tensor, b: Tensor, shares: Tensor) -> tuple[float, float]:
    """Return `||mean(B A) - mean(B) mean(A)||^2` and `||mean(B A)||^2` of stacked pairs.

    The smaller matrices are used: products (N, K), or the inner products of all k r rank-one terms, `(B^T B) * (A A^T)`.
    """
    mean_a, mean_b = torch.tensordot(shares, a, 1), b.sum(0)
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    if (count := len(a)) > min(a.shape[1], b.shape[1]):
        product = b.T @ a
        return float((product - mean_b.T @ mean_a).square().sum()), float(product.square().sum())
    a, b = torch.cat([a, mean_a]), torch.cat([b, -mean_b])
    inner = (b @ b.T) * (a @ a.T)
    return max(float(inner.sum()), 0.0), max(float(inner[:count, :count].sum()), 0.0)


# Rules that need all replies of a round at once. Each reply counts once, whatever its weight: a client could claim any
# number of samples.

def median(replies: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """By element, the median over the clients that sent a tensor (Yin et al., arXiv 1803.01498), float32."""
    return _by_tensor(replies, lambda values: np.median(values, axis=0))


def trimmed_mean(replies: Sequence[Mapping[str, Tensor]], trim: float) -> dict[str, Tensor]:
    """By element, the mean over the clients that sent a tensor without the floor(trim * k) lowest and highest of its k
    values (Yin et al., arXiv 1803.01498), float32."""
    import scipy.stats      # takes longer to import than a small client to train

    return _by_tensor(replies, lambda values: scipy.stats.trim_mean(values, trim, axis=0))


def _by_tensor(replies: Sequence[Mapping[str, Tensor]],
               combine: Callable[[np.ndarray], np.ndarray]) -> dict[str, Tensor]:
    names = {name: None for reply in replies for name in reply}     # in the order of their arrival
    return {name: torch.from_numpy(np.asarray(combine(
        torch.stack([reply[name] for reply in replies if name in reply]).double().numpy()))).float() for name in names}


def krum(replies: Sequence[Mapping[str, Tensor]], current: Mapping[str, Tensor], byzantine: int) -> dict[str, Tensor]:
    """Return the reply with the least sum of squared distances to its k - byzantine - 2 nearest ones of k replies.

    This is Krum (Blanchard et al., NeurIPS 2017). A tensor that a reply lacks counts with its `current` value, because that client
    did not change it.
    """
    distances = torch.zeros(len(replies), len(replies), dtype=torch.float64)
    for name in {name for reply in replies for name in reply}:
        values = torch.stack([reply.get(name, current[name]) for reply in replies]).double().flatten(1)
        distances += torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").square()
    itself, neighbors = 1, max(1, len(replies) - byzantine - 2)
    scores = distances.sort(dim=1).values[:, itself:itself + neighbors].sum(1)
    return dict(replies[int(scores.argmin())])
