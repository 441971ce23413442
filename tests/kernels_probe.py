"""Our Triton kernels in Triton's interpreter, on a CPU, beside their eager twins; a process of its own, since the choice of
the interpreter is made when Triton is imported. Prints one JSON line: what was compared -> largest relative error.

    TRITON_INTERPRET=1 python tests/kernels_probe.py
"""
import functools
import json

import torch
from triton.runtime import interpreter
from test_model import make_row
from toy import lively, quiet_run, small, tg


def repair_bounds():
    """Loops between bounds of one element: the interpreter's way to an integer is one that numpy has given up."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())
    interpreter._patch_lang_tensor = patched


def repair_rounding():
    """A carry from the mantissa: the interpreter's way to FP8 forgets it, and makes 1.0 of 1.98."""
    convert = interpreter._convert_float

    def patched(numbers, source, target, mode):
        if target.name != "fp8e4nv":
            return convert(numbers, source, target, mode)
        return torch.from_numpy(numbers.copy()).to(tg.E4M3).view(torch.uint8).numpy()
    interpreter._convert_float = patched


def error(a, b):
    """Relative to the reference's norm; gradients of sums over many rows are large."""
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-12))


def compare(fast, eager, inputs, *rest):
    """Largest error of outputs and of the gradients of all inputs that take one, both from the same random gradient."""
    results = []
    for f in (fast, eager):
        mine = [x.clone().requires_grad_() for x in inputs]
        out = f(*mine, *rest)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        total = sum((o * torch.randn(o.shape)).sum() for o in out)  # not randn_like, which follows strides
        results.append([*out, *torch.autograd.grad(total, mine)])
    return max(map(error, *results))


def nll(tokens, vocab, cap):
    """Logits far beyond the cap among them."""
    inputs = [3 * torch.randn(tokens, 8), 3 * torch.randn(vocab, 8)]
    return compare(tg.head_nll_fused, tg.head_nll_eager, inputs, torch.randint(0, vocab, (tokens,)), cap)


def mlp(tokens, dim, hidden, slope, onto=False):
    """Rows and columns that fill no tile, with and without a residual stream."""
    weights = [torch.randn(*shape) / dim ** 0.5 for shape in ((hidden, dim), (dim, hidden))]

    def form(f):
        def run(x, up, down, *stream):
            linear = [tg.Linear(*w.shape) for w in (up, down)]
            for module, w in zip(linear, (up, down)):
                del module.weight
                module.weight = w  # a plain tensor, so that its gradient is seen
            return f(x, *linear, slope, *stream)
        return run
    return compare(form(tg.mlp_fused), form(tg.mlp_eager), [torch.randn(tokens, dim), *weights, *[torch.randn(tokens, dim)] * onto])


def mix(tokens, dim, lead):
    """A block's start, of which all outputs are used."""
    depth = torch.tensor(0.7)
    return compare(*[lambda *rows, f=f: f(*rows, depth, lead, True) for f in (tg.mix_fused, tg.mix_eager)],
                   [*(torch.randn(tokens, dim) for _ in "xx"), torch.randn(2, dim)])


def mlp8(tokens, dim, hidden, slope, stream=False):
    """The form in FP8 beside the same roundings in plain fp32 products, gradients of tokens a hundredfold apart."""
    x, grad = tg.norm(torch.randn(tokens, dim)), torch.randn(tokens, dim) * (torch.randn(tokens, 1) * 2).exp() * 1e-6
    up, down = torch.randn(hidden, dim) / dim ** 0.5, torch.randn(dim, hidden) * 0.02
    x, grad, up, down = (t.bfloat16() for t in (x, grad, up, down))
    onto = torch.randn(tokens, dim).bfloat16() if stream else None
    mine = [t.clone().requires_grad_() for t in (x, up, down, onto) if t is not None]
    y = tg.MLP8.apply(*mine[:3], mine[3] if stream else None, slope)
    got = [g.float() for g in (y, *torch.autograd.grad(y, mine, grad))]
    x, grad, up, down = (t.float() for t in (x, grad, up, down))

    def rounded(t, factor):
        return tg.in_e4m3(t, factor).float() / factor
    top, size = tg.headroom(dim), grad.square().mean(1, keepdim=True).sqrt()
    h = rounded(x, top) @ rounded(up, tg.WEIGHT_8).T
    square = torch.nn.functional.leaky_relu(h, slope).square()
    back = rounded(grad / size, top) @ rounded(down, tg.WEIGHT_8) * 2 * square.sqrt() * torch.where(h < 0, -slope, 1.0)
    low = rounded(back, tg.BACK_8 * top * tg.WEIGHT_8) * size
    want = [(onto.float() if stream else 0) + rounded(square, tg.HIDDEN_8) @ rounded(down, tg.WEIGHT_8).T, low @ rounded(up, tg.WEIGHT_8), (back * size).T @ x, grad.T @ square]
    return max(map(error, got, [*want, *[grad] * stream]))


def cached(slots, rows, heads, window, begin):
    """The lock step's attention over rings not yet full, full, and turned over, in every tile; rows as views of wider ones."""
    group, width = 2, 16
    begin, cells = torch.tensor(begin), window + 8
    past = tg.Past(torch.randn(slots, cells, heads, width), torch.randn(slots, cells, heads, width), begin, window)

    def form(f):
        return lambda qk, v: f(*qk.split((group * heads, heads), 1), v[:, heads:], past)
    inputs = [torch.randn(slots * rows, (group + 1) * heads, width), torch.randn(slots * rows, 2 * heads, width)]
    return max(compare(form(functools.partial(tg.attention_cached_triton, tile=tile)), form(tg.attention_cached_eager), inputs)
               for tile in tg.RING_TILES)


def attended(borders, heads, gain=1.0):
    """Attention alone over segments that fill no block, a one-token and an empty one among them."""
    total, (queries, keys) = borders[-1], heads
    cu, keyed, values = torch.tensor(borders, dtype=torch.int32), tg.norm(torch.randn(total, keys, 32)), torch.randn(total, keys, 32)
    near = tg.norm(keyed.repeat_interleave(queries // keys, 1) + torch.randn(total, queries, 32))  # some scores reach the bound
    rows = torch.cat((gain * near, keyed, values), 1)

    def form(f, where):
        return lambda rows: f(*rows.split((queries, keys, keys), 1), where, total)
    return compare(form(tg.attention_triton, tg.segment_bounds(cu, total)), form(tg.attention_eager, cu), [rows])


def attention(borders, onto, **knobs):
    """Attention's layer as one operator beside its parts: norm, rotation, gains, XSA, the gate and the residual stream inside."""
    cfg, total, cu = small(model_dim=64, num_heads=2, **knobs), borders[-1], torch.tensor(borders, dtype=torch.int32)
    layer = tg.Attention(cfg, 3, tg.Kernels(tg.attention_eager, attention=tg.attention_fused))
    names, weights = zip(*((n, torch.randn(p.shape) / 8 + (p.dim() < 2)) for n, p in layer.named_parameters()))
    pos = torch.cat([torch.arange(b - a) for a, b in zip(borders, borders[1:])])
    rope, rows = tg.Rotary(cfg.rotary_dims, 1e4)(pos), [torch.randn(total, 64) for _ in range(1 + onto)]

    def form(fused, where):
        def run(x, *more):
            layer.fused, state = fused, dict(zip(names, more[onto:]))
            rest = tg.OtherValues(), rope, where, total, tg.VisitAdapters(), None, more[0] if onto else None
            return torch.func.functional_call(layer, state, (x, x[:, :layer.reads], *rest))[0]
        return run
    return compare(form(tg.attention_fused, tg.segment_bounds(cu, total)), form(None, cu), [*rows, *weights])


def gain_of_nothing():
    """A head whose gain is 0 has no gradient for its queries and says nothing of its gain; every other number is the eager twin's."""
    cfg, cu = small(model_dim=64, num_heads=2, attn_gate="none"), torch.tensor([0, 70], dtype=torch.int32)
    layer = tg.Attention(cfg, 3, tg.Kernels(tg.attention_eager, attention=tg.attention_fused))
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape) / 8 + (p.dim() < 2))
        layer.q_gain[0] = 0
    x, grad, rope, results = torch.randn(70, 64), torch.randn(70, 64), tg.Rotary(cfg.rotary_dims, 1e4)(torch.arange(70)), []
    for layer.fused, where in ((tg.attention_fused, tg.segment_bounds(cu, 70)), (None, cu)):
        out = layer(x.requires_grad_(), x[:, :0], tg.OtherValues(), rope, where, 70, tg.VisitAdapters(), None)[0]
        gain, *others = torch.autograd.grad(out, [layer.q_gain, x, layer.qkv.weight, layer.o.weight, layer.o.scale], grad)
        results.append([out, *others, gain[1:]])
    return max(map(error, *results))


def network(looping):
    """Loss of a whole toy network, and the gradient of every parameter, with a one-token and an empty segment."""
    row, results = make_row(quiet_run(small())), []
    for kernels in (tg.Kernels(), tg.Kernels(tg.attention_triton, tg.head_nll_fused, tg.mlp_fused, tg.mix_fused, tg.attention_fused)):
        model = lively(small(), None, looping)
        model = rebuilt(model, kernels, looping)
        loss = model.nll(*row)
        loss.mean().backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    return max(map(error, *results[::-1]))


def rebuilt(model, kernels, looping):
    """The same weights behind other kernels."""
    other = tg.GPT(small(), kernels)
    other.load_state_dict(model.state_dict())
    other.looping = looping
    return other


repair_bounds()
repair_rounding()
torch.manual_seed(0)
found = {f"nll {c}": nll(*c) for c in ((7, 64, 30.0), (5, 50, 15.0), (1, 300, 5.0))}
found |= {f"mlp {c}": mlp(*c) for c in ((300, 64, 264, 0.5), (1, 32, 64, 0.0), (129, 96, 520, 0.5, True))}
found |= {f"fp8 {c}": mlp8(*c) for c in ((300, 64, 272, 0.5, True), (1, 32, 64, 0.0))}
found |= {f"mix {c}": mix(*c) for c in ((300, 64, 12), (1, 40, 0))}
found |= {f"cached {c}": cached(*c) for c in ((3, 5, 2, 64, (0, 7, 64)), (2, 16, 1, 40, (41, 500)))}
ODD, WHOLE = (0, 1, 2, 67, 100, 100, 101, 333), (0, 64, 128, 192, 192, 192)
found |= {f"attended {c}": attended(*c) for c in (
    (ODD, (4, 1)), (WHOLE, (2, 2)), (ODD, (4, 2), 20.0))}  # that gain is four times what fp32 could bear unshifted
found |= {f"attention {n}": attention(borders, onto, **knobs) for n, (borders, onto, knobs) in enumerate((
    (ODD, True, {}), (WHOLE, False, {"attn_gate": "none"}), (ODD, True, {"attn_gate": "scalar", "num_kv_heads": 1, "rope_dims": 0}),
    ((0, 20, 40, 77), False, {"attn_gate": "out", "xsa_last_n": 0, "rope_dims": 8})))}
found["attention with a gain of 0"] = gain_of_nothing()
found |= {f"network looping={c}": network(c) for c in (False, True)}
print(json.dumps(found))
