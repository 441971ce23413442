"""Our Triton kernels in Triton's interpreter, on a CPU, beside their eager twins; a process of its own, since the choice of
the interpreter is made when Triton is imported. Prints one JSON line: what was compared -> largest relative error.

    TRITON_INTERPRET=1 python tests/kernels_probe.py
"""
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


def mlp(tokens, dim, hidden, slope):
    """Rows and columns that fill no tile."""
    weights = [torch.randn(*shape) / dim ** 0.5 for shape in ((hidden, dim), (dim, hidden))]

    def form(f):
        def run(x, up, down):
            linear = [tg.Linear(*w.shape) for w in (up, down)]
            for module, w in zip(linear, (up, down)):
                del module.weight
                module.weight = w  # a plain tensor, so that its gradient is seen
            return f(x, *linear, slope)
        return run
    return compare(form(tg.mlp_fused), form(tg.mlp_eager), [torch.randn(tokens, dim), *weights])


def mlp8(tokens, dim, hidden, slope):
    """The form in FP8 beside the same roundings in plain fp32 products, gradients of tokens a hundredfold apart."""
    x, grad = tg.norm(torch.randn(tokens, dim)), torch.randn(tokens, dim) * (torch.randn(tokens, 1) * 2).exp() * 1e-6
    up, down = torch.randn(hidden, dim) / dim ** 0.5, torch.randn(dim, hidden) * 0.02
    x, grad, up, down = (t.bfloat16() for t in (x, grad, up, down))
    mine = [t.clone().requires_grad_() for t in (x, up, down)]
    y = tg.MLP8.apply(*mine, slope)
    got = [g.float() for g in (y, *torch.autograd.grad(y, mine, grad))]
    x, grad, up, down = (t.float() for t in (x, grad, up, down))

    def rounded(t, factor):
        return tg.in_e4m3(t, factor).float() / factor
    top, size = tg.headroom(dim), grad.square().mean(1, keepdim=True).sqrt()
    h = rounded(x, top) @ rounded(up, tg.WEIGHT_8).T
    square = torch.nn.functional.leaky_relu(h, slope).square()
    back = rounded(grad / size, top) @ rounded(down, tg.WEIGHT_8) * 2 * square.sqrt() * torch.where(h < 0, -slope, 1.0)
    low = rounded(back, tg.BACK_8 * top * tg.WEIGHT_8) * size
    want = [rounded(square, tg.HIDDEN_8) @ rounded(down, tg.WEIGHT_8).T, low @ rounded(up, tg.WEIGHT_8), (back * size).T @ x, grad.T @ square]
    return max(map(error, got, want))


def cached(slots, rows, heads, window, begin):
    """The lock step's attention over rings not yet full, full, and turned over; rows as views of wider ones."""
    group, width = 2, 16
    begin, cells = torch.tensor(begin), window + 8
    past = tg.Past(torch.randn(slots, cells, heads, width), torch.randn(slots, cells, heads, width), begin, window)

    def form(f):
        return lambda qk, v: f(*qk.split((group * heads, heads), 1), v[:, heads:], past)
    fused = form(lambda q, k, v, past: tg.CachedAttention.apply(q, k, v, past.k, past.v, past.begin, past.window))
    return compare(fused, form(tg.attention_cached_eager), [torch.randn(slots * rows, (group + 1) * heads, width),
                                                            torch.randn(slots * rows, 2 * heads, width)])


def attended(borders, heads, xsa, factors, gain=1.0):
    """Attention and its ending over segments that fill no block, a one-token and an empty one among them."""
    total, (queries, keys) = borders[-1], heads
    cu, rows = torch.tensor(borders, dtype=torch.int32), torch.randn(total, queries + 2 * keys, 32)
    rows[:, :queries + keys] = tg.norm(rows[:, :queries + keys])
    rows[:, :queries] *= gain

    def form(f):
        return lambda rows, *gate: f(*rows.split((queries, keys, keys), 1), *gate)
    whole = form(lambda q, k, v, gate=None: tg.attention_whole(q, k, v, tg.segment_bounds(cu, total), xsa, gate))
    eager = form(lambda q, k, v, gate=None: tg.finish_heads(tg.attention_eager(q, k, v, cu, total), v, xsa, gate))
    return compare(whole, eager, [rows, *([torch.rand(*factors)] if factors else [])])


def network(looping):
    """Loss of a whole toy network, and the gradient of every parameter, with a one-token and an empty segment."""
    row, results = make_row(quiet_run(small())), []
    for kernels in (tg.Kernels(), tg.Kernels(tg.attention_triton, tg.head_nll_fused, tg.mlp_fused, tg.attention_whole)):
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
found |= {f"mlp {c}": mlp(*c) for c in ((300, 64, 264, 0.5), (1, 32, 64, 0.0), (129, 96, 520, 0.5))}
found |= {f"fp8 {c}": mlp8(*c) for c in ((300, 64, 272, 0.5), (1, 32, 64, 0.0))}
found |= {f"cached {c}": cached(*c) for c in ((3, 5, 2, 64, (0, 7, 64)), (2, 16, 1, 40, (41, 500)))}
ODD, WHOLE = (0, 1, 2, 67, 100, 100, 101, 333), (0, 64, 128, 192, 192, 192)
found |= {f"attended {c}": attended(*c) for c in (
    (ODD, (4, 2), True, (333, 4)), (WHOLE, (4, 2), True, ()), (ODD, (4, 1), False, (333, 4)), (WHOLE, (2, 2), False, ()),
    ((0, 20, 40, 77), (4, 2), True, (4,)), (ODD, (4, 2), True, (), 20.0))}  # that gain is four times what fp32 could bear unshifted
found |= {f"network looping={c}": network(c) for c in (False, True)}
print(json.dumps(found))
