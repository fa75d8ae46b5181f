"""Quantized layers, and `quantize` and `dequantize` on whole models."""
from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import fedms_ext
from fedms_ext import ExpertLinear, FrozenLinear, LoRA, QuantizedWeight, reference
from fedms_ext.quantization.formats import EIGHT_BITS, KINDS

BACKENDS = ["cpu", "eager"]


class Net(nn.Module):
    """Two blocks and a head on vectors of 48."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(48, 70), nn.GELU(), nn.Linear(70, 48)) for _ in range(2))
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def with_experts(rank: int = 4) -> Net:
    net = Net()
    fedms_ext.attach(net, "all-linear", {"a": LoRA(rank, 8), "b": LoRA(rank + 1, 8)})
    for layer in fedms_ext.expert_layers(net).values():
        for b in layer.lora_b.values():
            nn.init.normal_(b, std=0.1)
    fedms_ext.activate(net, "a", depth=2)
    fedms_ext.activate(net, "b", depth=0, applied_depth=2)
    return net


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def layer_reference(layer: ExpertLinear, x: Tensor) -> Tensor:
    """The float64 reference of a quantized layer."""
    applied = layer.applied
    return reference.frozen_linear(
        x, layer.frozen.q, layer.frozen.scale, layer.bias, [layer.lora_a[e] for e in applied],
        [layer.lora_b[e] for e in applied], [layer.experts[e].scale for e in applied], steps=layer.frozen.int8_steps,
        rotated=layer.frozen.kind == "int8_rotated")


@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 5, 48), (2, 3, 2, 48), (0, 48)])
def test_a_frozen_linear_computes_the_reference(shape):
    linear = nn.Linear(48, 70)
    layer = FrozenLinear(QuantizedWeight(linear.weight), linear.bias)
    x = torch.randn(shape)
    want = reference.frozen_linear(x, layer.frozen.q, layer.frozen.scale, linear.bias, [], [], [],
                                   steps=layer.frozen.int8_steps)
    y = layer(x)
    assert y.shape == (*shape[:-1], 70)
    assert torch.allclose(y.double(), want, rtol=1e-5, atol=1e-5)
    if y.numel():
        assert error(y, linear(x)) < 0.013


@pytest.mark.parametrize("kind", ["int8", "int8_rotated"])
def test_layers_with_experts_compute_the_reference(kind):
    net = with_experts()
    fedms_ext.quantize(net, kind)
    layer, x = net.blocks[0][0], torch.randn(7, 48)
    assert error(layer(x), layer_reference(layer, x)) < 1e-6
    layer.set_state("a", "off")
    layer.set_state("b", "off")
    assert error(layer(x), layer_reference(layer, x)) < 1e-6


@pytest.mark.parametrize("strided", [lambda x: x.t(), lambda x: x[::2], lambda x: x[:1].expand(6, -1)],
                         ids=["transposed", "sliced", "expanded"])
def test_inputs_with_gaps(strided):
    linear = nn.Linear(48, 70)
    layer = FrozenLinear(QuantizedWeight(linear.weight), linear.bias)
    x = strided(torch.randn(48, 48))
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, kind):
    net = with_experts()
    layer = net.blocks[1][0]
    fedms_ext.quantize(net, kind)
    weight = layer.frozen.dequantize()
    x, gate = torch.randn(3, 9, 48, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    dy = torch.randn(3, 9, 70)
    with fedms_ext.use_backend(backend), fedms_ext.gated([layer], gate):
        layer(x).backward(dy)
    dx, dgate, da, db = reference.expert_linear_backward(
        dy, x.detach(), weight, list(layer.lora_a.values()), list(layer.lora_b.values()),
        [layer.experts[e].scale for e in "ab"], gate.detach()[:, None, :])
    # For int8 W^T is quantized apart, and on the CPU dy too; the other formats are made float32.
    assert error(x.grad, dx) < (0.03 if kind in EIGHT_BITS else 1e-5)
    assert error(gate.grad, dgate.sum(1)) < 1e-5
    assert error(layer.lora_a["a"].grad, da[0]) < 1e-5
    assert error(layer.lora_b["a"].grad, db[0]) < 1e-5
    assert layer.lora_a["b"].grad is None and layer.lora_b["b"].grad is None   # it is frozen


def test_the_transposed_weight_is_packed_only_where_dx_is_asked_for():
    net = with_experts()
    fedms_ext.activate(net, "a", depth=1, applied_depth=2)
    fedms_ext.quantize(net)
    net(torch.randn(4, 48)).sum().backward()
    packed = {name: m._transposed is not None for name, m in net.named_modules() if isinstance(m, QuantizedWeight)}
    assert packed == {"blocks.0.0.frozen": False, "blocks.0.2.frozen": False, "blocks.1.0.frozen": False,
                      "blocks.1.2.frozen": True, "head.frozen": True}


def test_bytes_held():
    for n, k in [(384, 384), (1536, 384), (384, 1536), (768, 768)]:
        weight = QuantizedWeight(torch.randn(n, k))
        assert weight.nbytes <= 0.27 * 4 * n * k
        weight.for_dx()
        assert weight.nbytes <= 0.53 * 4 * n * k


@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_4_bit_layers_compute_the_reference(kind):
    net = with_experts()
    fedms_ext.quantize(net, kind)
    layer, x = net.blocks[0][0], torch.randn(7, 48)
    codes = reference.unpack_nibbles(layer.frozen.q, 48)
    q, scale = reference.groups_as_int8(codes, layer.frozen.scale, kind)
    want = reference.frozen_linear(x, q, scale, layer.bias, [layer.lora_a[e] for e in "ab"],
                                   [layer.lora_b[e] for e in "ab"], [layer.experts[e].scale for e in "ab"],
                                   steps=layer.frozen.int8_steps)
    assert error(layer(x), want) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_kind_takes_every_dtype(dtype, kind):
    net = with_experts().to(dtype)
    fedms_ext.quantize(net, kind)
    x = torch.randn(6, 48).to(dtype).requires_grad_()
    y = net.blocks[0][0](x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_go_through_float32(dtype):
    net = with_experts()
    fedms_ext.quantize(net)
    layer = net.blocks[0][0]
    x = torch.randn(6, 48).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert error(y, layer_reference(layer, x.detach())) < {torch.bfloat16: 5e-3}.get(dtype, 1e-3)


def test_autocast_rounds_as_a_linear_does():
    linear = nn.Linear(48, 70)
    layer = FrozenLinear(QuantizedWeight(linear.weight), linear.bias)
    x = torch.randn(6, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == linear(x).dtype == torch.bfloat16


def test_dropout_in_training():
    net = Net()
    fedms_ext.attach(net, "all-linear", {"a": LoRA(4, 8, dropout=0.5)})
    fedms_ext.activate(net, "a", depth=2)
    fedms_ext.quantize(net)
    layer = net.blocks[0][0].train()
    nn.init.normal_(layer.lora_b["a"])
    x = torch.randn(6, 48)
    torch.manual_seed(1)
    seed = int(torch.randint(2**63 - 1, ()))
    torch.manual_seed(1)
    want = reference.frozen_linear(x, layer.frozen.q, layer.frozen.scale, layer.bias, list(layer.lora_a.values()),
                                   list(layer.lora_b.values()), [2.0], None, None, 0.5, seed, steps=layer.frozen.int8_steps)
    assert error(layer(x), want) < 1e-6


ERRORS = {"int8": 0.02, "int8_rotated": 0.02, "fp16": 5e-4, "bf16": 5e-3, "nf4": 0.15, "int4": 0.15}   # of a model's output


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("make", [Net, with_experts])
def test_quantize_a_model(make, kind):
    net = make().requires_grad_(False)
    x = torch.randn(16, 48)
    before = net(x)
    names = fedms_ext.quantize(net, kind)
    assert names == ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "head"]
    assert 0 < error(net(x), before) < ERRORS[kind]
    assert not any(name.endswith("weight") for name, _ in net.named_parameters())
    with pytest.raises(ValueError, match="quantized already"):
        fedms_ext.quantize(net)


@pytest.mark.parametrize("k", [48, 64, 100])
def test_the_gradient_of_an_input_is_that_of_the_weight_that_is_not_rotated(k):
    linear = nn.Linear(k, 40).requires_grad_(False)
    layer = FrozenLinear(QuantizedWeight(linear.weight, "int8_rotated"), linear.bias)
    x, dy = torch.randn(3, k, requires_grad=True), torch.randn(3, 40)
    layer(x).backward(dy)
    assert error(x.grad, dy @ linear.weight) < 0.02 and error(layer.weight, linear.weight) < 0.02


def test_a_layer_without_a_bias_is_quantized_and_restored_twice():
    net = nn.Sequential(nn.Linear(8, 8, bias=False)).requires_grad_(False)
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for _ in range(2):
        fedms_ext.quantize(net)
        fedms_ext.dequantize(net, weights)
    assert net[0].bias is None and torch.equal(net[0].weight, weights["0.weight"])


def test_what_is_left_alone():
    net = Net().requires_grad_(False)
    net.head.requires_grad_(True)                       # trained
    net.blocks[1][0].weight = net.blocks[0][0].weight   # shared
    assert fedms_ext.quantize(net) == ["blocks.0.2", "blocks.1.2"]
    assert type(net.head) is nn.Linear and type(net.blocks[1][0]) is nn.Linear
    net = Net().requires_grad_(False)
    assert fedms_ext.quantize(net, exclude=("head", "1.0")) == ["blocks.0.0", "blocks.0.2", "blocks.1.2"]
    assert type(net.head) is nn.Linear and type(net.blocks[1][0]) is nn.Linear


def test_pytorchs_fused_encoder_layers_call_the_quantized_ones():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval().requires_grad_(False)
    model, x = nn.ModuleList([layer]), torch.randn(2, 5, 32)
    before = layer(x)
    assert fedms_ext.quantize(model) == ["0.linear1", "0.linear2"]
    with torch.no_grad():
        assert 0 < error(layer(x), before) < 0.01


def test_training_lowers_the_loss():
    net = with_experts()
    fedms_ext.quantize(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    x, labels = torch.randn(64, 48), torch.randint(0, 5, (64,))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_restores_the_model(kind):
    net = with_experts()
    weights = {name: t.clone() for name, t in net.state_dict().items()}
    x = torch.randn(4, 48)
    before = net(x)
    fedms_ext.quantize(net, kind)
    with pytest.raises(RuntimeError, match="the weight is quantized"):
        fedms_ext.merge(net, "a")
    with pytest.raises(KeyError, match="'blocks.0.0.weight' is missing"):
        fedms_ext.dequantize(net, {})
    with pytest.raises(ValueError, match="blocks.0.2.weight is not the weight that was quantized"):
        fedms_ext.dequantize(net, weights | {"blocks.0.2.weight": weights["blocks.0.2.weight"] + 1e-3})
    assert fedms_ext.dequantize(net, weights) == ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "head"]
    assert torch.equal(net(x), before)
    fedms_ext.merge(net, "a")
    with pytest.raises(RuntimeError, match="an expert is merged into 'blocks.0.0'"):
        fedms_ext.quantize(net)
    with pytest.raises(ValueError, match="holds no quantized layer"):
        fedms_ext.dequantize(net, weights)


def test_detach_keeps_the_quantized_weight():
    net = with_experts()
    fedms_ext.quantize(net)
    for layer in fedms_ext.expert_layers(net).values():
        layer.set_state("a", "off")
        layer.set_state("b", "off")
    x = torch.randn(4, 48)
    before = net(x)
    fedms_ext.detach(net)
    assert type(net.blocks[0][0]) is FrozenLinear and torch.equal(net(x), before)


def test_experts_can_be_added_to_a_quantized_layer():
    net = with_experts()
    fedms_ext.quantize(net)
    layer, x = net.blocks[0][0], torch.randn(4, 48)
    before = layer(x)
    layer.add_expert("c", LoRA(3, 8))
    assert torch.allclose(layer(x), before, atol=1e-5)


def test_state_dict_holds_the_logical_form():
    net, other = with_experts(), with_experts()
    fedms_ext.quantize(net)
    fedms_ext.quantize(other)
    state = net.state_dict()
    assert state["blocks.0.0.frozen.q"].shape == (70, 48) and state["blocks.0.0.frozen.q"].dtype == torch.int8
    assert state["blocks.0.0.frozen.scale"].shape == (70,)
    x = torch.randn(4, 48)
    other(x)
    other.load_state_dict(state)
    assert torch.equal(other(x), net(x))
    with pytest.raises(RuntimeError, match=r"blocks.0.0.frozen.q is torch.int8 \(48, 70\)"):
        other.load_state_dict(state | {"blocks.0.0.frozen.q": state["blocks.0.0.frozen.q"].T})
    with pytest.raises(RuntimeError, match="Missing key.*blocks.0.0.frozen.scale"):
        other.load_state_dict({name: t for name, t in state.items() if name != "blocks.0.0.frozen.scale"})


def steps(model: nn.Module) -> list[int]:
    """Of the inputs, which int8 takes in more steps where the CPU multiplies 16-bit values."""
    return [m.int8_steps for m in model.modules() if isinstance(m, QuantizedWeight) and m.kind in EIGHT_BITS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ["portable", fedms_ext.build_info()["isa_detected"]])
def test_copies_and_pickles(isa, kind):
    net = with_experts()
    fedms_ext.quantize(net, kind)
    x = torch.randn(4, 48)
    twin, pickled = copy.deepcopy(net), pickle.dumps(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    before = fedms_ext.build_info()["isa_used"]
    fedms_ext._C.set_isa(isa)   # a pickle is packed anew where it is read
    try:
        for model in (twin, pickle.loads(pickled), torch.load(file, weights_only=False)):
            assert error(model(x), net(x)) < (1e-6 if steps(model) == steps(net) else 0.02)
            assert all(p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), net.parameters()))
    finally:
        fedms_ext._C.set_isa(before)


def test_changes_of_dtype_leave_the_weight_alone():
    layer = FrozenLinear(QuantizedWeight(torch.randn(5, 8)), torch.randn(5))
    layer.half()
    assert layer.frozen.scale.dtype == torch.float32 and layer(torch.randn(2, 8).half()).dtype == torch.float16


@pytest.mark.parametrize("kind", ["int8", "int8_rotated", "nf4", "fp16"])
def test_compiles_without_a_break(kind):
    net = with_experts()
    fedms_ext.quantize(net, kind)
    x = torch.randn(6, 48)
    net(x)   # the transposed weights, which are made when they are first needed, cannot be made in a graph
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), net(x))
    net(x).sum().backward()
    want = [p.grad.clone() for p in net.parameters() if p.requires_grad]
    net.zero_grad()
    compiled(x).sum().backward()
    assert all(torch.equal(p.grad, w) for p, w in zip((p for p in net.parameters() if p.requires_grad), want))


@pytest.mark.parametrize("needs_dx", [False, True])
def test_opcheck(needs_dx):
    weight = QuantizedWeight(torch.randn(6, 8))
    a, b = [torch.randn(2, 8), torch.randn(3, 8)], [torch.randn(6, 2), torch.randn(6, 3)]
    scale, gate, x, dy = torch.tensor([1.0, 2.0]), torch.rand(4, 2), torch.randn(4, 8), torch.randn(4, 6)
    ops = torch.ops.fedms_ext
    form = weight.kind, weight.group
    arguments = (x, weight.data, weight.scale, *form, None, a, b, scale, gate, None, 0.0, 0, None)
    s = ops.expert_linear(*arguments)[1]
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.expert_linear.default, arguments, test_utils=utils)
    torch.library.opcheck(
        ops.expert_linear_backward.default,
        (dy, x, 8, *(weight.for_dx() if needs_dx else (None, None)), *form, a, b, scale, gate, None, 0.0, 0, None, s,
         needs_dx, True, [True, False], [False, True]), test_utils=utils)


def test_refusals():
    with pytest.raises(ValueError, match="cannot quantize to 'int3'; expected int8, int8_rotated, fp16, bf16, nf4, int4"):
        fedms_ext.quantize(Net(), "int3")
    with pytest.raises(ValueError, match="no Linear layer with a frozen weight"):
        fedms_ext.quantize(Net())
    with pytest.raises(ValueError, match="no Linear layer's name ends in 'v_proj'; their names end in 0, 2, head"):
        fedms_ext.quantize(Net().requires_grad_(False), exclude=("head", "v_proj"))
    with pytest.raises(ValueError, match="infinity or a NaN"):
        QuantizedWeight(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match=r"expected \(N, K\)"):
        QuantizedWeight(torch.zeros(3))
    layer = FrozenLinear(QuantizedWeight(torch.randn(5, 8)))
    with pytest.raises(ValueError, match=r"x has the shape \(2, 7\)"):
        layer(torch.randn(2, 7))
    with pytest.raises(TypeError, match="x is torch.int64"):
        layer(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="weight is on cpu, but x is on meta"):
        layer(torch.zeros(2, 8, device="meta"))


@pytest.mark.parametrize("quantized", [False, True])
def test_a_state_dict_of_the_other_storage_says_what_to_call(quantized):
    def model(storage):
        made = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
        fedms_ext.attach(made, "all-linear", {"global": LoRA(rank=2, alpha=4.0)}, blocks="0")
        if storage:
            fedms_ext.quantize(made, "int8")
        return made

    advice = r"fedms_ext.dequantize\(model, state_dict\)" if quantized else r"call fedms_ext.quantize\(model, KIND\)"
    with pytest.warns(UserWarning, match=advice), pytest.raises(RuntimeError, match="Missing key"):
        model(quantized).load_state_dict(model(not quantized).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(quantized).load_state_dict(model(quantized).state_dict())
