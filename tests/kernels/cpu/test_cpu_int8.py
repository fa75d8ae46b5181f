"""The int8 kernels of fedms_ext._C against the float64 reference, on every instruction set of this machine."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import fedms_ext
from fedms_ext import _C, reference

ISAS = fedms_ext.build_info()["isa_available"]
# One below, at and above: a group of k, a vector, a panel of columns.
DIMENSIONS = [1, 2, 3, 4, 5, 15, 16, 17, 23, 25, 48, 63, 64, 65, 100, 431, 768]
ROWS = [1, 2, 3, 5, 6, 7, 11, 12, 13, 47, 48, 49, 127, 197]
RANKS = [1, 2, 3, 7, 8, 9, 16, 17, 64, 128]
NAN = float("nan")


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    before = fedms_ext.build_info()["isa_used"]
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def packed(weight: Tensor, rotated: int = 0) -> Tensor:
    n, k = weight.shape
    out = torch.full((_C.int8_packed_size(n, k),), 85, dtype=torch.uint8)
    _C.int8_pack(weight.to(torch.int8).contiguous(), out, rotated)
    return out


class Case:
    """Random operands of one call; `forward` and `backward` run the kernels, the others the reference."""

    def __init__(self, m: int, n: int, k: int, ranks: list[int], gate: bool = False, bias: bool = True, dropout_p=0.0):
        self.x, self.dy = torch.randn(m, k), torch.randn(m, n)
        full = torch.randn(n, k)
        self.weight, self.weight_scale = reference.quantize_weight(full)
        self.weight_t, self.weight_t_scale = reference.quantize_weight(full.T)
        self.bias = torch.randn(n) if bias else None
        self.a = [torch.randn(r, k) / k**0.5 for r in ranks]
        self.b = [torch.randn(n, r) for r in ranks]
        self.scale = [random.choice([0.5, -1.25, 2.0]) for _ in ranks]
        self.gate = torch.randn(len(ranks), 2 * m)[:, ::2].T if gate and ranks else None
        self.dropout_p, self.seed = dropout_p, random.getrandbits(63)
        self.packed = packed(self.weight)
        self.packed_t = packed(self.weight_t)

    def forward(self) -> tuple[Tensor, Tensor]:
        m, n, total = self.x.shape[0], self.dy.shape[1], sum(a.shape[0] for a in self.a)
        s, y = torch.full((m, total), NAN), torch.full((m, n), NAN)
        _C.int8_forward(self.x, self.packed, self.weight_scale, self.bias, self.a, self.b, self.scale, self.gate,
                        self.dropout_p, self.seed, s, y)  # fmt: skip
        return y, s

    def want(self) -> Tensor:
        return reference.frozen_linear(self.x, self.weight, self.weight_scale, self.bias, self.a, self.b, self.scale,
                                       self.gate, None, self.dropout_p, self.seed,
                                       steps=_C.int8_steps(self.packed))  # fmt: skip

    def backward(self, needs_dx: bool = True) -> dict[str, Tensor]:
        m, k = self.x.shape
        s = self.forward()[1]
        dx = torch.full((m, k), NAN) if needs_dx else None
        dgate = None if self.gate is None else torch.full((m, len(self.a)), NAN)
        da, db = [torch.full_like(a, NAN) for a in self.a], [torch.full_like(b, NAN) for b in self.b]
        _C.int8_backward(self.dy, self.x, k, self.packed_t if needs_dx else None,
                         self.weight_t_scale if needs_dx else None, self.a, self.b, self.scale, self.gate, s,
                         self.dropout_p, self.seed, dx, dgate, da, db)  # fmt: skip
        out = {"dx": dx, "dgate": dgate}
        for e in range(len(self.a)):
            out |= {f"da[{e}]": da[e], f"db[{e}]": db[e]}
        return {name: tensor for name, tensor in out.items() if tensor is not None}

    def want_backward(self) -> dict[str, Tensor]:
        a, b = [t.double() for t in self.a], [t.double() for t in self.b]
        gate = None if self.gate is None else self.gate.double()
        zero = torch.zeros(self.dy.shape[1], self.x.shape[1], dtype=torch.float64)
        dx, dgate, da, db = reference.expert_linear_backward(
            self.dy.double(), self.x.double(), zero, a, b, self.scale, gate, None, self.dropout_p, self.seed
        )
        steps = _C.int8_steps(self.packed_t)
        out = {"dx": dx + reference.frozen_linear(self.dy, self.weight_t, self.weight_t_scale, None, [], [], [], steps=steps)}
        out |= {} if dgate is None else {"dgate": dgate}
        for e in range(len(a)):
            out |= {f"da[{e}]": da[e], f"db[{e}]": db[e]}
        return out

    def check(self) -> None:
        assert_close("y", self.forward()[0], self.want())
        want = self.want_backward()
        for name, tensor in self.backward().items():
            assert_close(name, tensor, want[name])


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float = 2e-6) -> None:
    # NaN in a result that nothing wrote would fail here too: the outputs start as NaN.
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def product(x: Tensor, weight: Tensor, scale: Tensor, rotated: int) -> Tensor:
    y = torch.full((len(x), len(weight)), NAN)
    _C.int8_forward(x, packed(weight, rotated), scale, None, [], [], [], None, 0.0, 0, torch.empty(len(x), 0), y)
    return y


@pytest.mark.parametrize("k", [4, 12, 16, 48, 64, 100, 576, 1536])
@pytest.mark.parametrize("m", [1, 13, 60])
def test_a_rotated_weight(m, k):
    block = reference.rotated_block(k)
    assert block and k % block == 0
    x, full = torch.randn(m, k), torch.randn(70, k)
    x[:, k // 3] *= 40      # one channel that takes most levels
    weight, scale = reference.quantize_weight(reference.rotate(full))
    y = product(x, weight, scale, block)
    steps = _C.int8_steps(packed(weight, block))
    assert_close("y", y, reference.frozen_linear(x, weight, scale, None, [], [], [], steps=steps, rotated=True))
    if k >= 576 and m > 1 and steps == 255:
        plain = product(x, *reference.quantize_weight(full), 0)
        exact = x.double() @ full.double().T
        assert (y - exact).norm() < 0.5 * (plain - exact).norm()


def test_rotating_twice_changes_nothing():
    for k in (1, 3, 4, 48, 65, 320):
        x = torch.randn(5, k)
        assert torch.allclose(reference.rotate(reference.rotate(x)), x, atol=1e-5)


def test_blocks_that_cannot_be_rotated_are_refused():
    with pytest.raises(ValueError, match="rotated is not 0, or 4, 16 or 64 and a divisor of k"):
        packed(torch.zeros(3, 24), 16)


@pytest.mark.parametrize("n", DIMENSIONS)
@pytest.mark.parametrize("k", DIMENSIONS)
def test_dimensions(n, k):
    Case(m=random.choice(ROWS), n=n, k=k, ranks=[random.choice(RANKS[:6])]).check()


@pytest.mark.parametrize("m", ROWS)
def test_rows(m):
    Case(m=m, n=100, k=72, ranks=[3, 8], gate=True).check()


@pytest.mark.parametrize("r", RANKS)
def test_ranks(r):
    Case(m=random.choice(ROWS), n=130, k=77, ranks=[r]).check()


def test_large_dimensions():
    Case(m=65, n=4104, k=3072, ranks=[8]).check()


@pytest.mark.parametrize("ranks", [[], [8], [1, 17], [2, 8, 5]])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.35])
@pytest.mark.parametrize("m", [2, 67])
def test_experts_gates_and_dropout(m, ranks, gate, dropout_p):
    Case(m=m, n=90, k=101, ranks=ranks, gate=gate, bias=False, dropout_p=dropout_p).check()


@pytest.mark.parametrize("rank", [1, 4, 7, 8, 9, 20])
@pytest.mark.parametrize("m, k", [(3, 5), (13, 64), (29, 100), (67, 384), (40, 1024), (40, 1025)])
def test_s_has_the_bits_of_a_layer_in_float32(m, k, rank):
    """It is made while x is quantized, or beside it, by the products that a layer in float32 takes."""
    case = Case(m, 65, k, [rank])
    s, y = torch.full((m, rank), NAN), torch.zeros(m, 65)
    _C.lora_forward(case.x, case.a, case.b, case.scale, None, 0.0, 0, s, y)
    assert torch.equal(case.forward()[1], s)


def test_without_dx():
    case = Case(m=33, n=40, k=50, ranks=[4])
    want = case.want_backward()
    got = case.backward(needs_dx=False)
    assert "dx" not in got
    for name, tensor in got.items():
        assert_close(name, tensor, want[name])


def test_integer_products_are_exact():
    # The largest products that there are, in one sign: 16-bit sums of two would overflow.
    for k in (4, 64, 3072, 4129, 4130, 8260, 33090, 65536):
        x, weight = torch.full((7, k), 3.0), torch.full((70, k), 127.0)
        x[::2] *= -1
        weight[1::2] *= -1
        y = torch.full((7, 70), NAN)
        _C.int8_forward(x, packed(weight), torch.ones(70), None, [], [], [], None, 0.0, 0, torch.empty(7, 0), y)
        assert torch.allclose(y, x @ weight.T, rtol=1e-6)


def test_random_cases():
    for _ in range(25):
        Case(
            m=random.randint(1, 140),
            n=random.randint(1, 300),
            k=random.randint(1, 300),
            ranks=[random.randint(1, 20) for _ in range(random.randint(0, 3))],
            gate=random.random() < 0.5,
            bias=random.random() < 0.5,
            dropout_p=random.choice([0.0, 0.0, 0.1, 0.9]),
        ).check()


def test_the_frozen_product_is_the_same_on_every_instruction_set(isa):
    case = Case(m=37, n=75, k=150, ranks=[])
    y, steps = case.forward()[0], _C.int8_steps(case.packed)
    _C.set_isa("portable")
    case.packed = packed(case.weight)
    # Bytes have 255 steps, 16-bit values 4095; between them lies what the fewer steps lose.
    assert_close("y", y, case.forward()[0].double(), 1e-7 if steps == _C.int8_steps(case.packed) else 0.01)


@pytest.mark.parametrize("k, most", [(1, 4095), (4096, 4095), (4129, 4095), (4130, 2047), (8260, 2047), (8261, 1023),
                                     (16529, 1023), (16530, 511), (33090, 511), (33091, 255), (65536, 255)])  # fmt: skip
def test_steps_leave_the_sums_in_32_bits(isa, k, most):
    steps = _C.int8_steps(packed(torch.zeros(3, k)))
    assert steps == (most if isa in ("portable", "avx2") else 255)
    assert steps * 127 * k < 2**31
    codes = torch.empty(_C.nibbles_packed_size(3, k, 64), dtype=torch.uint8)
    _C.nibbles_pack(k, 64, reference.LEVELS["nf4"], torch.zeros(3, (k + 1) // 2, dtype=torch.uint8),
                    torch.ones(3, (k + 63) // 64), codes)  # fmt: skip
    assert _C.int8_steps(codes) == 255


@pytest.mark.parametrize("m", [1, 3, 40, 60, 197])
def test_bitwise_the_same_for_any_number_of_threads(m):
    case = Case(m=m, n=431, k=768, ranks=[8, 3], gate=True, dropout_p=0.1)
    results = []
    try:
        for threads in range(1, 9):
            torch.set_num_threads(threads)
            results.append({"y": case.forward()[0]} | case.backward())
    finally:
        torch.set_num_threads(2)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_a_row_does_not_depend_on_the_others():
    case = Case(m=61, n=70, k=45, ranks=[5, 2])
    y = case.forward()[0]
    for rows in (slice(0, 1), slice(7, 9), slice(20, 61)):
        part = Case(m=1, n=70, k=45, ranks=[])
        part.__dict__ |= case.__dict__
        part.x, part.dy = case.x[rows].contiguous(), case.dy[rows]
        assert torch.equal(part.forward()[0], y[rows])


@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_rows(bad):
    case = Case(m=50, n=70, k=45, ranks=[5, 2], gate=True)
    clean = {"y": case.forward()[0], "dx": case.backward()["dx"]}
    rows = [0, 7, 49]
    case.x[rows, 3], case.dy[rows, 3] = bad, bad
    dirty = {"y": case.forward()[0], "dx": case.backward()["dx"]}
    good = [i for i in range(50) if i not in rows]
    for name in clean:
        assert torch.equal(dirty[name][good], clean[name][good]), name
        assert dirty[name][rows].isnan().all(), name


def test_zeros_outliers_and_tiny_rows():
    case = Case(m=12, n=70, k=45, ranks=[4])
    case.x[0] = 0
    case.x[1] = -0.0
    case.x[2, 5] = 1e4
    case.x[3] = 0
    case.x[3, 44] = -2e37
    case.x[4] *= 1e-28
    case.x[5] = 1e-40
    case.x[6] *= 1e-20
    case.a = [a * 0 for a in case.a]  # so that the frozen product stands alone
    y, want = case.forward()[0], case.want()
    for row in range(12):
        assert_close(f"y[{row}]", y[row], want[row])
    for row in (0, 1, 5):
        assert torch.equal(y[row], case.bias)
    case.weight[9] = 0
    case.packed = packed(case.weight)
    assert torch.equal(case.forward()[0][:, 9], case.bias[9].expand(12))


def test_nothing_is_read_or_written_beyond_the_matrices():
    # Every operand lies between NaNs: reading one poisons the result, writing one shows afterwards.
    def fenced(tensor: Tensor) -> Tensor:
        store = torch.full((tensor.numel() + 128,), NAN)
        fences.append(store)
        inner = store[64:-64].view(tensor.shape)
        inner.copy_(tensor)
        return inner

    for m, n, k, rank in [(5, 37, 19, 3), (50, 65, 97, 9), (61, 130, 64, 2)]:
        fences: list[Tensor] = []
        case = Case(m, n, k, [rank])
        case.x, case.bias, case.weight_scale = map(fenced, (case.x, case.bias, case.weight_scale))
        case.a, case.b = [fenced(case.a[0])], [fenced(case.b[0])]
        s, y = fenced(torch.zeros(m, rank)), fenced(torch.zeros(m, n))
        _C.int8_forward(case.x, case.packed, case.weight_scale, case.bias, case.a, case.b, case.scale, None, 0.0, 0, s, y)
        assert_close("y", y, case.want())
        assert all(store[:64].isnan().all() and store[-64:].isnan().all() for store in fences)


def test_pack_and_unpack():
    for n, k in [(1, 1), (3, 5), (64, 64), (65, 130), (431, 77), (0, 4), (4, 0)]:
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        out = torch.full_like(weight, 99)
        _C.int8_unpack(packed(weight), out)
        assert torch.equal(out, weight)


@pytest.mark.parametrize("kind", ["nf4", "int4"])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("m, n, k", [(2, 3, 5), (50, 65, 97), (67, 130, 200), (197, 48, 768)])
def test_weights_of_4_bits(kind, group, m, n, k):
    codes, scale = reference.quantize_groups(torch.randn(n, k) * torch.rand(n, 1), kind, group)
    q = reference.pack_nibbles(codes)
    data = torch.full((_C.nibbles_packed_size(n, k, group),), 85, dtype=torch.uint8)
    _C.nibbles_pack(k, group, reference.LEVELS[kind], q, scale, data)
    back, wide = torch.full_like(q, 99), torch.full((n, k), NAN)
    _C.nibbles_unpack(k, data, back)
    _C.nibbles_dequantize(group, data, scale, wide)
    assert torch.equal(back, q) and torch.equal(wide, reference.dequantize_groups(codes, scale, kind, group))
    case = Case(m, n, k, [3, 8], gate=True)
    case.weight, case.weight_scale = reference.groups_as_int8(codes, scale, kind, group)
    case.packed = data
    s, y = torch.full((m, 11), NAN), torch.full((m, n), NAN)
    _C.int8_forward(case.x, data, None, case.bias, case.a, case.b, case.scale, case.gate, 0.0, 0, s, y)
    assert_close("y", y, case.want())


@pytest.mark.parametrize("kind, group", [("nf4", 64), ("int4", 32)])
@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 33])
@pytest.mark.parametrize("n, k", [(1, 1), (3, 5), (65, 97), (130, 200), (100, 768), (431, 63)])
def test_dx_of_4_bit_weights(kind, group, m, n, k):
    """Against dy W in float64, and bit for bit the same alone and on any number of threads."""
    codes, scale = reference.quantize_groups(torch.randn(n, k) * torch.rand(n, 1), kind, group)
    data = torch.full((_C.nibbles_packed_size(n, k, group),), 85, dtype=torch.uint8)
    _C.nibbles_pack(k, group, reference.LEVELS[kind], reference.pack_nibbles(codes), scale, data)
    dy, threads = torch.randn(m, n), torch.get_num_threads()

    def dx(dy):
        out = torch.full((len(dy), k), NAN)
        _C.nibbles_input_gradient(dy, data, scale, out)
        return out

    got = dx(dy)
    assert_close("dx", got, dy.double() @ reference.dequantize_groups(codes, scale, kind, group).double())
    try:
        torch.set_num_threads(3)
        assert torch.equal(dx(dy), got)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(dx(dy[-1:]), got[-1:])
    bad = dy.clone()
    bad[0, n // 2] = NAN
    assert dx(bad)[0].isnan().any() and torch.equal(dx(bad)[1:], got[1:])


def test_dx_of_4_bit_weights_refuses_another_scale():
    data = torch.empty(_C.nibbles_packed_size(8, 70, 64), dtype=torch.uint8)
    codes, scale = reference.quantize_groups(torch.randn(8, 70), "nf4", 64)
    _C.nibbles_pack(70, 64, reference.LEVELS["nf4"], reference.pack_nibbles(codes), scale, data)
    dy, dx = torch.randn(2, 8), torch.empty(2, 70)
    with pytest.raises(ValueError, match="the packed weight has another group"):
        _C.nibbles_input_gradient(dy, data, torch.ones(8, 3), dx)
    with pytest.raises(ValueError, match="this is a packed int8 weight"):
        _C.nibbles_input_gradient(dy, packed(torch.zeros(8, 70)), scale, dx)


def test_sums_of_4_bit_weights_do_not_saturate():
    # All products of one sign, and the largest that there are: 255 * 63.
    for k in (4, 64, 3072):
        codes, scale = torch.full((70, k), 15, dtype=torch.uint8), torch.ones(70, (k + 63) // 64)
        data = torch.empty(_C.nibbles_packed_size(70, k, 64), dtype=torch.uint8)
        _C.nibbles_pack(k, 64, reference.LEVELS["nf4"], reference.pack_nibbles(codes), scale, data)
        x, y = torch.full((7, k), 3.0), torch.full((7, 70), NAN)
        x[::2] *= -1
        _C.int8_forward(x, data, None, None, [], [], [], None, 0.0, 0, torch.empty(7, 0), y)
        assert torch.allclose(y, x.sum(1, keepdim=True).expand(7, 70), rtol=1e-6)


def test_no_rows_and_no_columns():
    assert Case(m=0, n=5, k=4, ranks=[2]).forward()[0].shape == (0, 5)
    case = Case(m=3, n=5, k=1, ranks=[])
    case.x, case.weight, case.packed = torch.empty(3, 0), torch.empty(5, 0), packed(torch.empty(5, 0))
    assert torch.equal(case.forward()[0], case.bias.expand(3, 5))


def test_refused_operands():
    case = Case(m=4, n=5, k=6, ranks=[2], gate=True)
    s, y = torch.zeros(4, 2), torch.zeros(4, 5)

    def call(x=case.x, packed=case.packed, scale=case.weight_scale, bias=case.bias, y=y):
        _C.int8_forward(x, packed, scale, bias, case.a, case.b, case.scale, case.gate, 0.0, 0, s, y)

    call()
    with pytest.raises(ValueError, match="x is not float32"):
        call(x=case.x.double())
    with pytest.raises(ValueError, match="x is not contiguous"):
        call(x=torch.zeros(6, 4).T)
    with pytest.raises(ValueError, match="packed is not uint8"):
        call(packed=case.packed.to(torch.int8))
    with pytest.raises(ValueError, match="this is not a packed weight"):
        call(packed=torch.zeros(10, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"the packed weight is \(5, 6\), expected \(6, 6\)"):
        _C.int8_unpack(case.packed, torch.zeros(6, 6, dtype=torch.int8))
    nibbles = torch.empty(_C.nibbles_packed_size(5, 6, 64), dtype=torch.uint8)
    _C.nibbles_pack(6, 64, reference.LEVELS["nf4"], torch.zeros(5, 3, dtype=torch.uint8), torch.ones(5, 1), nibbles)
    call(packed=nibbles, scale=None)
    with pytest.raises(ValueError, match="an int8 weight needs its scale"):
        call(scale=None)
    with pytest.raises(ValueError, match="this is a packed weight of 4 bits, expected int8"):
        _C.int8_unpack(nibbles, torch.zeros(5, 6, dtype=torch.int8))
    with pytest.raises(ValueError, match="this is not a packed weight"):
        _C.int8_steps(torch.zeros(200, dtype=torch.uint8))
    with pytest.raises(ValueError, match="this is a packed int8 weight, expected one of 4 bits"):
        _C.nibbles_unpack(6, case.packed, torch.zeros(5, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="has another group"):
        _C.nibbles_dequantize(32, nibbles, torch.ones(5, 1), torch.zeros(5, 6))
    with pytest.raises(ValueError, match="group must be 32 or 64"):
        _C.nibbles_packed_size(5, 6, 48)
    with pytest.raises(ValueError, match="damaged"):
        call(packed=case.packed[:-1])
    with pytest.raises(ValueError, match=r"weight_scale has the shape \(1, 4\), expected \(1, 5\)"):
        call(scale=torch.ones(4))
    with pytest.raises(ValueError, match=r"bias has the shape \(1, 4\)"):
        call(bias=torch.ones(4))
    with pytest.raises(ValueError, match="more than 65536"):
        packed(torch.zeros(1, 65537))
    with pytest.raises(ValueError, match=r"packed has the shape \(1, 1\)"):
        _C.int8_pack(torch.zeros(5, 6, dtype=torch.int8), torch.zeros(1, dtype=torch.uint8))
