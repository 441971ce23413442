"""What torch's inductor would launch for a block on a Hopper GPU, and what every kernel moves. No GPU is needed.

    python records/plan.py                          a block of the record preset, forward and backward
    python records/plan.py --layer 9 --tokens 65536 NUM_KV_HEADS=2
    python records/plan.py --set realize_opcount_threshold=30     with other settings of the inductor

A pass is one reading or writing of a bf16 row for every token. At the rate of a large copy it is the floor of a kernel that
computes little; what a change saves can be counted here before a GPU is asked. A slice counts as the tensor it is cut from,
products and attention by their operands. The graph is traced on the CPU, then lowered as if its tensors were on a GPU: this
reaches into torch's internals (written for 2.13), so another version may plan otherwise, or not at all.
"""
import argparse
import contextlib
import copy
import functools
import types
from pathlib import Path
from unittest import mock

import runs
import torch
from runs import pair

CARD = types.SimpleNamespace(  # near enough an H200: the planner asks for its generation, its multiprocessors and their limits
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=139 << 30, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, L2_cache_size=60 << 20, gcnArchName="")


class Planned(Exception):
    """The inductor has made its plan; nothing of it is to be compiled."""


def trace(tg, cfg, layer: int, tokens: int) -> list:
    """[(graph, inputs, whether it is the backward one)] of a block in training, on fake CPU tensors."""
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor import compile_fx
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    mlp = functools.partial(tg.mlp_fused, fp8=cfg.fp8 == "mlp")
    block = tg.Block(cfg, layer, tg.Kernels(tg.attention_triton, mlp=mlp, mix=tg.mix_fused, attention=tg.attention_fused))
    lanes = cfg.parallel_residual == "two" and layer >= cfg.parallel_start_layer
    graphs = []

    def partition(graph, inputs, **more):
        graph = compile_fx._recursive_joint_graph_passes(graph) or graph
        return min_cut_rematerialization_partition(graph, inputs, **more, compiler="inductor")

    def keep(backward: bool):
        def compiler(graph, inputs):
            graphs.append((graph, inputs, backward))
            return make_boxed_func(graph.forward)
        return compiler

    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {n: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
                 for n, p in [*block.named_parameters(), *block.named_buffers()]}
        rows = [torch.empty(tokens, cfg.model_dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(2 + lanes)]
        mix = [torch.empty(2, requires_grad=True), torch.empty(2, 2, requires_grad=True)] if lanes else []
        rope, bounds = [torch.empty(tokens, 1, cfg.rotary_dims) for _ in "cs"], torch.empty(2, tokens, dtype=torch.int32)
        wide = cfg.num_kv_heads * cfg.head_dim
        values = [torch.empty(tokens, *shape, dtype=torch.bfloat16, requires_grad=True)  # read only where a knob says so
                  for shape in ((cfg.num_kv_heads, cfg.head_dim), (wide,))]

        def step(state, rows, values, mix, rope, bounds):
            x, x0, *lane = rows
            args = x, lane[0] if lane else None, x0, tg.OtherValues(*values), tuple(rope), bounds, cfg.train_seq_len, mix or None
            return [y for y in torch.func.functional_call(block, state, args)[:2] if y is not None]
        traced = aot_function(step, fw_compiler=keep(False), bw_compiler=keep(True), partition_fn=partition,
                              decompositions=select_decomp_table(), keep_inference_input_mutations=True)
        out = traced(state, rows, values, mix, rope, bounds)
        torch.autograd.backward(out, [torch.empty_like(y) for y in out])
    return graphs


@contextlib.contextmanager
def pretended_gpu():
    """torch.cuda as the inductor asks it while it plans, where there is none."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    copy_ = torch.Tensor.copy_

    def silent(self, source, *more):  # of fake tensors only shapes count
        return self if self.device.type == "cuda" else copy_(self, source, *more)

    def card(*_):
        return CARD

    def nothing(*_, **__):
        return None

    def zero(*_):
        return 0
    answers = dict(is_available=lambda: True, device_count=lambda: 1, is_initialized=lambda: True, current_device=zero,
                   get_device_properties=card, get_device_capability=lambda *_: (9, 0), synchronize=nothing, _lazy_init=nothing,
                   _exchange_device=zero, _maybe_exchange_device=zero, get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8),
                   set_rng_state=nothing)
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch.multiple(torch.cuda, **answers))
            stack.enter_context(mock.patch.object(torch.cuda, "_get_device_properties", card, create=True))
            stack.enter_context(mock.patch.multiple(CudaInterface, is_available=staticmethod(lambda: True),
                                                    get_device_properties=staticmethod(card),
                                                    get_compute_capability=staticmethod(lambda *_: 90)))
            stack.enter_context(mock.patch.object(CudaInterface.Worker, "get_device_properties", staticmethod(card)))
            stack.enter_context(mock.patch.object(torch.Tensor, "copy_", silent))
            for module, name in ((fuse_attention, "_sfdp_init"), (pad_mm, "_pad_mm_init"), (misc_patterns, "_misc_patterns_init")):
                stack.enter_context(mock.patch.object(module, name, nothing))  # patterns are traced on real tensors
        yield


def moved(graph, inputs, backward: bool, settings: dict) -> list[tuple[str, str, int]]:
    """[(kind, operations, bytes)] of every kernel that the inductor plans for a graph, its tensors taken to be on a GPU."""
    import torch._inductor.config
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    graph, found, gpu = copy.deepcopy(graph), [], torch.device("cuda", 0)
    for node in graph.graph.nodes:
        node.kwargs = {k: gpu if isinstance(v, torch.device) else v for k, v in node.kwargs.items()}
    graph.recompile()
    mode = FakeTensorMode()

    def plan(self):
        self.init_wrapper_code()
        self._update_scheduler()
        for node in self.scheduler.nodes:
            origins = {str(o.target).split(".")[1] for part in node.get_nodes() if part.node is not None
                       for o in part.node.get_origins() if "." in str(o.target)}
            found.append((type(node).__name__.replace("SchedulerNode", "") or "Plain", " ".join(sorted(origins)),
                          node.get_read_write_buffers_sizes()))
        raise Planned

    with mode, torch.no_grad():
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=gpu) if isinstance(x, torch.Tensor) else x
                  for x in inputs]
    with torch.no_grad(), mock.patch.object(GraphLowering, "codegen", plan), tracing(TracingContext(mode)), \
            torch._inductor.config.patch({**settings, "fx_graph_cache": False}):
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        try:
            compile_fx.compile_fx_inner(graph, inputs, is_backward=backward)
        except Exception as e:
            if not found:  # it failed before it had a plan
                raise SystemExit(f"torch {torch.__version__} does not plan this: {type(e).__name__}: {e}")
    return found


def setting(text: str) -> tuple[str, int]:
    """A number of torch._inductor.config."""
    import torch._inductor.config
    name, value = pair(text)
    if not hasattr(torch._inductor.config, name) or not value.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of torch._inductor.config")
    return name, int(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("knobs", nargs="*", type=pair, help="knobs of train_gpt.py, NAME=VALUE")
    parser.add_argument("--program", type=Path, default=Path(__file__).resolve().parents[1] / "train_gpt.py")
    parser.add_argument("--layer", type=int, default=4, help="which block; those with lanes differ")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--rate", type=float, default=4.1e12, help="bytes a second of a large copy")
    parser.add_argument("--set", nargs="*", type=setting, default=[], help="settings of torch._inductor.config, NAME=NUMBER")
    args = parser.parse_args()
    tg = runs.load_program(args.program)
    cfg = tg.load_config({"PRESET": "record", **dict(args.knobs)}, False)
    if not 0 <= args.layer < cfg.num_layers:
        parser.error(f"--layer {args.layer}: the network has layers 0 to {cfg.num_layers - 1}")
    settings = getattr(tg, "INDUCTOR", {}) | dict(args.set)
    row, total = 2 * cfg.model_dim * args.tokens, {"fused": 0.0, "opaque": 0.0}
    with pretended_gpu():  # from the start: what torch finds out about its surroundings it remembers
        for graph, inputs, backward in trace(tg, cfg, args.layer, args.tokens):
            kernels = moved(graph, inputs, backward, settings)
            print(f"{'backward' if backward else 'forward'}: {len(kernels)} kernels, {sum(b for *_, b in kernels) / row:.1f} passes")
            for kind, operations, size in kernels:
                total["opaque" if kind.startswith("Extern") else "fused"] += size / row
                if size >= 0.005 * row:
                    print(f"  {size / row:6.2f}  {kind:22s} {operations[:100]}")
    print(f"both: {sum(total.values()):.1f} passes, of them {total['fused']:.1f} in kernels of the inductor: "
          f"{1000 * total['fused'] * row / args.rate:.3f} ms at {args.rate / 1e12:.1f} TB/s")


if __name__ == "__main__":
    main()
