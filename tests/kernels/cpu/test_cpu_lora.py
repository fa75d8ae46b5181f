"""The kernels of fedms_ext._C against the float64 reference, on every instruction set of this machine."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fedms_ext
from fedms_ext import _C, philox_mask, reference

# avxvnni runs the avx2 kernels here.
ISAS = [isa for isa in fedms_ext.build_info()["isa_available"] if isa != "avxvnni"]
DIMENSIONS = [1, 8, 15, 31, 64, 100, 431, 768]
ROWS = [1, 2, 3, 7, 15, 17, 48, 63, 127, 197]
RANKS = [1, 2, 3, 5, 7, 8, 9, 16, 17, 64, 128]
NAN = float("nan")


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    before = fedms_ext.build_info()["isa_used"]
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


class Case:
    """Random operands of one call; `run` returns all results of the kernels by name, `want` the reference's."""

    def __init__(self, m: int, n: int, k: int, ranks: list[int], gate: str = "none", dropout_p: float = 0.0):
        self.x, self.dy = torch.randn(m, k), torch.randn(m, n)
        self.a = [torch.randn(r, k) for r in ranks]
        self.b = [torch.randn(n, r) for r in ranks]
        self.scale = [random.choice([0.0, 0.5, -1.25, 2.0]) if i else 0.75 for i, _ in enumerate(ranks)]
        self.gate = self._gate(gate, m, len(ranks))
        self.dropout_p, self.seed = dropout_p, random.getrandbits(63)
        self.base_y, self.base_dx = torch.randn(m, n), torch.randn(m, k)

    @staticmethod
    def _gate(kind: str, m: int, experts: int) -> Tensor | None:
        return {
            "none": lambda: None,
            "row": lambda: torch.randn(m, 1).expand(m, experts),
            "expert": lambda: torch.randn(1, experts).expand(m, experts),
            "both": lambda: torch.randn(m, experts),
            "ones and zeros": lambda: torch.randint(0, 2, (m, experts)).float(),
            "strided": lambda: torch.randn(experts, 2 * m)[:, ::2].T,
        }[kind]()

    def _switches(self):
        return self.a, self.b, self.scale, self.gate, self.dropout_p, self.seed

    def run(self, needs: str = "x gate a b") -> dict[str, Tensor]:
        m, ranks, experts = self.x.shape[0], [a.shape[0] for a in self.a], len(self.a)
        out = {"s": torch.full((m, sum(ranks)), NAN), "y": self.base_y.clone()}
        _C.lora_forward(self.x, *self._switches(), out["s"], out["y"])
        needed = needs.split()
        dx = self.base_dx.clone() if "x" in needed else None
        dgate = torch.full((m, experts), NAN) if "gate" in needed and self.gate is not None else None
        da = [torch.full_like(a, NAN) if "a" in needed else None for a in self.a]
        db = [torch.full_like(b, NAN) if "b" in needed else None for b in self.b]
        kept_x = self.x if "a" in needed else None
        kept_s = out["s"] if "b" in needed or dgate is not None else None
        _C.lora_backward(self.dy, kept_x, *self._switches()[:4], kept_s, self.dropout_p, self.seed, dx, dgate, da, db)
        out |= {"dx": dx, "dgate": dgate}
        for e in range(experts):
            out |= {f"da[{e}]": da[e], f"db[{e}]": db[e]}
        return {name: tensor for name, tensor in out.items() if tensor is not None}

    def want(self) -> dict[str, Tensor]:
        x, dy = self.x.double(), self.dy.double()
        a, b = [t.double() for t in self.a], [t.double() for t in self.b]
        gate = None if self.gate is None else self.gate.double()
        weight = torch.zeros(dy.shape[1], x.shape[1], dtype=torch.float64)
        extras = (self.scale, gate, None, self.dropout_p, self.seed)
        dx, dgate, da, db = reference.expert_linear_backward(dy, x, weight, a, b, *extras)
        dropped = reference.dropout(x, self.dropout_p, self.seed)
        out = {
            "s": torch.cat([dropped @ t.T for t in a], dim=1),
            "y": self.base_y + reference.expert_linear(x, weight, None, a, b, *extras),
            "dx": self.base_dx + dx,
            "dgate": dgate,
        }
        for e in range(len(a)):
            out |= {f"da[{e}]": da[e], f"db[{e}]": db[e]}
        return {name: tensor for name, tensor in out.items() if tensor is not None}

    def check(self, needs: str = "x gate a b") -> None:
        got, want = self.run(needs), self.want()
        for name, tensor in got.items():
            assert_close(name, tensor, want[name])


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float = 2e-6) -> None:
    # NaN in a result that nothing wrote would fail here too: the outputs start as NaN.
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("r", RANKS)
def test_ranks(r):
    Case(m=random.choice(ROWS), n=random.choice(DIMENSIONS), k=random.choice(DIMENSIONS), ranks=[r]).check()


@pytest.mark.parametrize("m", ROWS)
def test_rows(m):
    Case(m=m, n=100, k=72, ranks=[3, 8], gate="both").check()


@pytest.mark.parametrize("n", DIMENSIONS)
@pytest.mark.parametrize("k", DIMENSIONS)
def test_dimensions(n, k):
    Case(m=random.choice(ROWS), n=n, k=k, ranks=[random.choice(RANKS[:7])]).check()


def test_large_dimensions():
    Case(m=65, n=4104, k=3072, ranks=[8]).check()


@pytest.mark.parametrize("gate", ["none", "row", "expert", "both", "ones and zeros", "strided"])
@pytest.mark.parametrize("ranks", [[8], [1, 17], [2, 8, 5]])
@pytest.mark.parametrize("dropout_p", [0.0, 0.35])
def test_gates_ranks_and_dropout(gate, ranks, dropout_p):
    Case(m=67, n=90, k=101, ranks=ranks, gate=gate, dropout_p=dropout_p).check()


@pytest.mark.parametrize("needs", ["x", "gate", "a", "b", "x b", "gate a", ""])
def test_only_what_is_needed(needs):
    Case(m=33, n=40, k=50, ranks=[4, 3], gate="both", dropout_p=0.2).check(needs)


def test_one_expert_trains_and_the_other_does_not():
    case = Case(m=70, n=40, k=50, ranks=[4, 3])
    s = case.want()["s"].float()
    da, db = torch.full((3, 50), NAN), torch.full((40, 4), NAN)
    _C.lora_backward(
        case.dy, case.x, case.a, case.b, case.scale, None, s, 0.0, 0, None, None, [None, da], [db, None]
    )
    assert_close("da[1]", da, case.want()["da[1]"])
    assert_close("db[0]", db, case.want()["db[0]"])


def test_random_cases():
    for _ in range(25):
        Case(
            m=random.randint(1, 140),
            n=random.randint(1, 300),
            k=random.randint(1, 300),
            ranks=[random.randint(1, 20) for _ in range(random.randint(1, 4))],
            gate=random.choice(["none", "row", "expert", "both", "strided"]),
            dropout_p=random.choice([0.0, 0.0, 0.1, 0.9]),
        ).check()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_bitwise_the_same_for_any_number_of_threads(dropout_p):
    case = Case(m=197, n=431, k=768, ranks=[8, 3], gate="both", dropout_p=dropout_p)
    results = []
    try:
        for threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(threads)
            results.append(case.run())
    finally:
        torch.set_num_threads(2)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_nan_stays_in_its_rows():
    case = Case(m=50, n=70, k=45, ranks=[5, 2], gate="both")
    clean = case.run()
    bad = [0, 7, 49]
    case.x[bad], case.dy[bad] = NAN, NAN
    dirty = case.run()
    good = [i for i in range(50) if i not in bad]
    for name in ("s", "y", "dx", "dgate"):
        assert torch.equal(dirty[name][good], clean[name][good]), name
        assert dirty[name][bad].isnan().all(), name


def test_nothing_is_read_or_written_beyond_the_matrices():
    # Every operand lies between NaNs: reading one poisons the result, writing one shows afterwards.
    def fenced(tensor: Tensor) -> Tensor:
        store = torch.full((tensor.numel() + 128,), NAN)
        fences.append(store)
        inner = store[64:-64].view(tensor.shape)
        inner.copy_(tensor)
        return inner

    for m, n, k, rank in [(5, 37, 19, 3), (50, 65, 97, 9)]:
        fences: list[Tensor] = []
        case = Case(m, n, k, [rank])
        case.x, case.dy, case.base_y, case.base_dx = map(fenced, (case.x, case.dy, case.base_y, case.base_dx))
        case.a, case.b = [fenced(case.a[0])], [fenced(case.b[0])]
        s, y, dx = fenced(torch.zeros(m, rank)), fenced(case.base_y), fenced(case.base_dx)
        da, db = fenced(case.a[0]), fenced(case.b[0])
        _C.lora_forward(case.x, case.a, case.b, case.scale, None, 0.0, 0, s, y)
        _C.lora_backward(
            case.dy, case.x, case.a, case.b, case.scale, None, s, 0.0, 0, dx, None, [da], [db]
        )
        want = case.want()
        for name, tensor in {"s": s, "y": y, "dx": dx, "da[0]": da, "db[0]": db}.items():
            assert_close(name, tensor, want[name])
        assert all(store[:64].isnan().all() and store[-64:].isnan().all() for store in fences)


@pytest.mark.parametrize("k", [1, 3, 64, 77])
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_dropout_bits(k, seed):
    # With A the identity, S is the masked x itself.
    m, p = 37, 0.4
    s = torch.empty(m, k)
    a, b = [torch.eye(k)], [torch.zeros(1, k)]
    _C.lora_forward(torch.ones(m, k), a, b, [1.0], None, p, seed, s, torch.zeros(m, 1))
    assert torch.equal(s != 0, philox_mask(seed, m, k, p))
    assert torch.equal(s[s != 0], torch.full_like(s[s != 0], reference.dropout_scale(p)))


@pytest.mark.parametrize("p", [0.0, 2.0**-18, 2.0**-16, 0.5, 0.9999999])
def test_the_smallest_and_the_largest_dropout(p):
    # What is not a multiple of 2^-16 is rounded, and of the largest probabilities something is left.
    m, k = 97, 1000
    s = torch.empty(m, 1)
    _C.lora_forward(torch.ones(m, k), [torch.ones(1, k)], [torch.zeros(1, 1)], [1.0], None, p, 7, s, torch.zeros(m, 1))
    kept = philox_mask(7, m, k, p).sum(dim=1, keepdim=True)
    assert torch.equal(s, kept * reference.dropout_scale(p)) if p else torch.equal(s, torch.full_like(s, k))
    assert (kept < k).any() == (p >= 2.0**-16) and kept.sum() > 0


def test_no_rows():
    case = Case(m=0, n=5, k=4, ranks=[2])
    got = case.run()
    assert got["y"].shape == (0, 5) and got["dx"].shape == (0, 4)
    assert torch.equal(got["da[0]"], torch.zeros(2, 4)) and torch.equal(got["db[0]"], torch.zeros(5, 2))


@pytest.mark.parametrize("use_exchange", [True, False])
def test_refused_operands(use_exchange):
    if _C.set_tensor_types(Tensor, nn.Parameter, use_exchange) != use_exchange:
        pytest.skip("this torch has no DLPack exchange API")
    try:
        case = Case(m=4, n=5, k=6, ranks=[2], gate="both")
        case.check()
        s, y = torch.zeros(4, 2), torch.zeros(4, 5)

        def call(x=case.x, a=case.a, s=s, y=y, gate=case.gate, p=0.0):
            _C.lora_forward(x, a, case.b, case.scale, gate, p, 0, s, y)

        call()
        with pytest.raises(ValueError, match="x is not float32"):
            call(x=case.x.double())
        with pytest.raises(ValueError, match="x is not contiguous"):
            call(x=torch.zeros(6, 4).T)
        with pytest.raises((ValueError, RuntimeError)):  # torch itself refuses to describe it through DLPack
            call(x=torch.zeros(4, 6, device="meta"))
        with pytest.raises(ValueError, match="x has 0 dimensions"):
            call(x=torch.tensor(1.0))
        with pytest.raises(ValueError, match="gate has 3 dimensions"):
            call(gate=torch.zeros(4, 1, 1))
        with pytest.raises(TypeError, match="x is not a tensor"):
            call(x=[1.0])
        with pytest.raises(ValueError, match=r"a has the shape \(2, 7\)"):
            call(a=[torch.zeros(2, 7)])
        with pytest.raises(ValueError, match=r"s has the shape \(4, 3\)"):
            call(s=torch.zeros(4, 3))
        with pytest.raises(ValueError, match=r"y has the shape \(3, 5\)"):
            call(y=torch.zeros(3, 5))
        with pytest.raises(ValueError, match=r"gate has the shape \(4, 2\)"):
            call(gate=torch.zeros(4, 2))
        with pytest.raises(ValueError, match="dropout_p"):
            call(p=1.0)
    finally:
        _C.set_tensor_types(Tensor, nn.Parameter)


@pytest.mark.parametrize("use_exchange", [True, False])
def test_what_is_no_plain_tensor_is_refused_before_its_memory_is_read(use_exchange):
    if _C.set_tensor_types(Tensor, nn.Parameter, use_exchange) != use_exchange:
        pytest.skip("this torch has no DLPack exchange API")
    try:
        weight, y = torch.randn(4, 3).half(), torch.empty(2, 4)
        with FakeTensorMode():
            fake = torch.empty(2, 3)
        x = torch.randn(2, 3)
        for odd, error, message in (
            (fake, TypeError, "x is a FakeTensor"),
            (TwoTensor(x, x), TypeError, "x is a TwoTensor"),
            (torch._neg_view(x), ValueError, "x is negated when it is read"),
            (torch.empty(2, 3, device="meta"), (ValueError, RuntimeError), "not on the CPU|meta"),
            (x.to_sparse(), (RuntimeError, BufferError), ""),
            ([[1.0] * 3] * 2, TypeError, "x is not a tensor but list"),
        ):
            with pytest.raises(error, match=message):
                _C.fp16_forward(odd, weight, None, y)
        _C.fp16_forward(nn.Parameter(x), weight, None, y)
        assert torch.allclose(y, x @ weight.float().T, atol=1e-5)
    finally:
        _C.set_tensor_types(Tensor, nn.Parameter)


def test_unknown_isa():
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        _C.set_isa("sse9")
