"""Every Triton kernel of train_gpt.py, compiled for the GPUs that people have, in the shapes of the record and of other presets.

No GPU is needed: the launchers run on a CPU with kernels that only write down how they are called, and Triton's compiler makes
machine code of that for another chip. What is compared is the shared memory that a program takes with what the chip gives one:
a kernel that does not fit is found out on the GPU, and adaptation's only after all of training.
"""
import functools
import types

import pytest
import torch
from conftest import config, trainer

tg = trainer()
pytestmark = pytest.mark.skipif(getattr(tg, "triton", None) is None, reason="triton is not installed")

# bytes of shared memory that a program may ask for: A100; 3090; 4090; H100, H200; B200; RTX 5090 (CUDA's programming guide, compute capabilities)
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
EVERYWHERE, HOPPER = tuple(SHARED), (90, 100)
COLUMNS = 512  # of tensor memory, where sums of products live on a B200
# where a kernel is launched: those of HOPPER stand behind large_tiles(), the others have no gate
WHERE = {"attend_forward": HOPPER, "attend_queries": HOPPER, "attend_keys": HOPPER, "product_kernel": HOPPER, "cached_forward": EVERYWHERE,
         "cached_backward": EVERYWHERE, "capped_nll": EVERYWHERE, "mix_back": EVERYWHERE}
# the record; the seed systems' heads of 64, in groups and each with keys of its own; the smoke run's; one pair of keys for all heads
CASES = {"record": {"PRESET": "record"}, "pr1855": {"PRESET": "pr1855"}, "pr430": {"PRESET": "pr430"}, "smoke": {"PRESET": "smoke"},
         "one kv head": {"PRESET": "record", "NUM_KV_HEADS": 1}}
RINGS = getattr(tg, "RING_TILES", ())
KINDS = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32", torch.float8_e4m3fn: "fp8e4nv"}


def described(x):
    """The compiler's word for an argument, and whether it may rely on a multiple of sixteen, as a launch tells it."""
    if isinstance(x, torch.Tensor):
        return f"*{KINDS[x.dtype]}", x.data_ptr() % 16 == 0
    if isinstance(x, float):
        return "fp32", False
    if isinstance(x, int):
        return "i32", x % 16 == 0
    block = ", ".join(map(str, x.block_shape))
    return f"tensordesc<{KINDS[x.base.dtype]}[{block}]>", False


class Written:
    """Stands where a kernel stood, and keeps how it was called: types, constants, options."""

    def __init__(self, name, kernel, launches):
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *values, num_warps=4, num_stages=3, **named):
        given = dict(zip(self.kernel.arg_names, values)) | named
        # a launch also makes a constant of every 1
        fixed = {p.name: given[p.name] for p in self.kernel.params if p.is_constexpr or isinstance(given[p.name], int) and given[p.name] == 1}
        said = {n: described(x) for n, x in given.items() if n not in fixed}
        aligned = tuple(n for n, (_, multiple) in said.items() if multiple)
        self.launches.append((self.name, tuple((n, kind) for n, (kind, _) in said.items()), tuple(fixed.items()), aligned, num_warps, num_stages))


def kernels():
    """Name -> kernel, of those that are launched and not called by others."""
    from triton.runtime import JITFunction
    return {n: f for n, f in vars(tg).items() if isinstance(f, JITFunction) and f"{n}[" in tg.SOURCE}


def written_down(work):
    """What `work` launches, each way of launching once."""
    launches, real = [], kernels()
    vars(tg).update({n: Written(n, f, launches) for n, f in real.items()})
    try:
        work()
    finally:
        vars(tg).update(real)
    return list(dict.fromkeys(launches))


@functools.cache
def shared(launch, arch):
    """Bytes of shared memory that a program of a launch takes on a chip; infinite where tensor memory is too small for it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    name, kinds, fixed, aligned, warps, stages = launch
    kernel = kernels()[name]
    places, kinds, fixed = {n: (i,) for i, n in enumerate(kernel.arg_names)}, dict(kinds), dict(fixed)
    source = ASTSource(kernel, {n: kinds.get(n, "constexpr") for n in places}, {places[n]: x for n, x in fixed.items()},
                       {places[n]: [["tt.divisibility", 16]] for n in aligned})
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages})
    return made.metadata.shared if (getattr(made.metadata, "tmem_size", 0) or 0) <= COLUMNS else float("inf")


def randoms(*shapes):
    return [torch.randn(*shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]


@functools.cache
def training(case):
    """The launches of one forward and backward pass through every operation that has kernels."""
    cfg, rows = config(**CASES[case]), 256
    heads, keys, wide, dim, hidden = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.model_dim, cfg.hidden_dim
    linear = {"qkv": ((heads + 2 * keys) * wide, dim), "o": (dim, heads * wide), "up": (hidden, dim), "down": (dim, hidden)}
    layers = {n: tg.Linear(*shape) for n, shape in linear.items()}
    for layer in layers.values():
        torch.nn.init.normal_(layer.weight)
    cu, rope = torch.tensor([0, 100, rows], dtype=torch.int32), tg.Rotary(cfg.rotary_dims, cfg.rope_base)(torch.arange(rows))

    def work():
        torch.manual_seed(0)
        x, onto, gate = randoms((rows, dim), (rows, dim), (rows, heads))
        made = []
        for one in (gate, None):  # gated and not, with and without its own value taken out
            made.append(tg.attention_fused(x, layers["qkv"], layers["o"], torch.ones(heads, requires_grad=True), one, rope,
                                           tg.segment_bounds(cu, rows), one is not None, onto))
        made += [tg.mlp_fused(x, layers["up"], layers["down"], 0.5, onto, fp8) for fp8 in (False, cfg.fp8 == "mlp") if cfg.mlp_act == "leaky_relu2"]
        made += tg.mix_fused(x, onto, torch.ones(2, dim, requires_grad=True), torch.tensor(0.7), cfg.gate_window, True)
        targets, (vocabulary,) = torch.zeros(rows, dtype=torch.int64), randoms((cfg.vocab_size, dim))
        made.append(tg.head_nll_fused(x, vocabulary, targets, cfg.logit_softcap))
        with torch.no_grad():  # scoring
            tg.head_nll_fused(x, vocabulary, targets, cfg.logit_softcap)
        sum(y.float().sum() for y in made).backward()
    return written_down(work)


@functools.cache
def adapting(case, tile):
    """The launches of a lock step's attention with one of RING_TILES: forward, backward."""
    cfg, slots = config(**CASES[case]), 2
    rows, cells = slots * cfg.ttt_chunk_size, cfg.eval_seq_len + tg.Slots.SPARE
    ring = [torch.zeros(slots, cells, cfg.num_kv_heads, cfg.head_dim, dtype=torch.bfloat16) for _ in "kv"]
    q, k, v = randoms(*((rows, n, cfg.head_dim) for n in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)))
    return written_down(lambda: tg.CachedAttention.apply(q, k, v, *ring, torch.zeros(slots, dtype=torch.int64), cfg.eval_seq_len,
                                                         tile).float().sum().backward())


def test_every_kernel_is_in_the_table():
    assert WHERE.keys() == kernels().keys()
    # and something here launches it
    assert WHERE.keys() == {launch[0] for launch in training("record") + [x for tile in RINGS[:1] for x in adapting("record", tile)]} | (
        set() if RINGS else {"cached_forward", "cached_backward"})


@pytest.mark.parametrize("arch", SHARED)
def test_large_tiles_says_where_hoppers_kernels_run(arch, monkeypatch):
    card = types.SimpleNamespace(major=arch // 10, minor=arch % 10, shared_memory_per_block_optin=SHARED[arch])
    monkeypatch.setattr(tg.torch.cuda, "get_device_properties", lambda *device: card)
    monkeypatch.setattr(tg.torch.cuda, "get_device_capability", lambda *device: (card.major, card.minor))
    monkeypatch.setattr(tg.torch.cuda, "current_device", lambda: 0)
    assert tg.large_tiles() == (arch in HOPPER)


# fewer keys, or heads of 64 without groups, change nothing here but attention's grid
@pytest.mark.parametrize("arch, case", [(arch, case) for arch in SHARED for case in ("record", "pr1855", "smoke") if arch != 100 or case == "record"])
def test_what_is_launched_in_training_fits(arch, case):
    taken = {launch: shared(launch, arch) for launch in training(case) if arch in WHERE[launch[0]]}
    assert taken and all(size <= SHARED[arch] for size in taken.values()), {launch[0]: size for launch, size in taken.items()}


@pytest.mark.skipif(not RINGS, reason="no RING_TILES")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", SHARED)
def test_adaptations_attention_has_a_tile_that_fits(arch, case):
    """RING_TILES are tried in their order, and the eager form, several times slower, is for what nobody has thought of."""
    tried = {}
    for tile in RINGS:
        launches = adapting(case, tile)
        assert {launch[0] for launch in launches} == {"cached_forward", "cached_backward"}
        for launch in reversed(launches):  # backward wants more
            tried[tile] = max(tried.get(tile, 0), shared(launch, arch))
            if tried[tile] > SHARED[arch]:
                break
        else:
            assert arch != 90 or tile == RINGS[0]  # a Hopper GPU runs the form it was tuned for
            return
    pytest.fail(f"none of {tried} fits {SHARED[arch]} bytes")
