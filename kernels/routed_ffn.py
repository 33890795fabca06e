"""routed_ffn: a feed-forward layer whose neurons lie in groups, of which a router wakes some for each token.

    group g is awake for x  <=>  router[g] . x > log(tau / (1 - tau)), which is sigmoid(router[g] . x) > tau
    y = sum over the awake groups of act(gate_g x) * (up_g x) times down_g, or of act(up_g x) times down_g

The second stage of Learn-To-be-Efficient (arXiv 2402.06126): a group is in or out, its score does not multiply. A unit
is the whole layer, one module [N, K]; neurons are sorted so that group g owns rows g * size to (g + 1) * size - 1:

    role "groups"     [G, 3, size, K]      gate rows, up rows and down columns of a group, one slab; N = K
                      [G, 2, size, K]      without a gate
    role "gate_bias", "up_bias" [F], "down_bias" [N]    only when the unit has them
    role "router"     fp32 [G, K]
    params            {"group_size": 32, "tau": 0.5, "activation": "silu"}

A decision is made in fp32, in one order of sums for every M, so that rows with the same bits wake the same groups in
any company. Rows whose `awake` is 0 wake nothing: they pad a captured step.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from . import around as around_ffn
from . import ops, routed_layout
from .dispatch import fallback
from .fused import ACTIVATIONS, act_reference, gated_act_reference
from .masked import for_triton
from .native import library
from .unit import Around, Packed, Prepared, Traffic, Unit

NAME = "routed_ffn"
VERSION = 1
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUP_SIZES = (8, 16, 32)
KINDS = tuple(ACTIVATIONS)
BIASES = ("gate_bias", "up_bias", "down_bias")
MOST_ROWS = 512
"""Rows of x that the native kernel takes at once: it keeps all their hidden values and sums."""
PARAMS = ("group_size", "tau", "activation")

Tensor = torch.Tensor


def fits(unit: Unit) -> str | None:
    """None when the unit is one FFN with its router, else what keeps it out."""
    tensors, params = unit.tensors, unit.params
    if not {"up", "down", "router"} <= tensors.keys() <= {"gate", "up", "down", "router", *BIASES}:
        return f"routed_ffn stores up, down, router, perhaps gate and biases, the unit has {sorted(tensors)}"
    if params.keys() != set(PARAMS):
        return f"routed_ffn has the parameters {', '.join(PARAMS)}, the unit {sorted(params)}"
    size, tau, act = (params[name] for name in PARAMS)
    if size not in GROUP_SIZES:
        return f"group_size is {size!r}, it must be one of {', '.join(map(str, GROUP_SIZES))}"
    if not isinstance(tau, float) or not 0 < tau < 1:
        return f"tau is {tau!r}, it must lie between 0 and 1"
    if act not in ACTIVATIONS:
        return f"activation is {act!r}, it must be one of {', '.join(ACTIVATIONS)}"
    weights = {role: tensor for role, tensor in tensors.items() if role != "router"}
    if len({t.dtype for t in weights.values()}) > 1 or tensors["up"].dtype not in DTYPES:
        found = sorted({str(t.dtype) for t in weights.values()})
        return f"routed_ffn takes one dtype of bfloat16, float16 and float32, the unit has {found}"
    if tensors["router"].dtype != torch.float32:
        return f"the router must be float32, it is {tensors['router'].dtype}"
    return _misshapen(unit)


def _misshapen(unit: Unit) -> str | None:
    """What of the unit's shapes does not meet."""
    size, shapes = unit.params["group_size"], {role: tuple(t.shape) for role, t in unit.tensors.items()}
    neurons, inputs = shapes["up"][0], shapes["up"][-1]
    if neurons % size or not neurons:
        return f"{neurons} neurons are no groups of {size}"
    wanted: dict[str, tuple[int, ...]] = {
        "gate": (neurons, inputs),
        "up": (neurons, inputs),
        "down": (inputs, neurons),
        "router": (neurons // size, inputs),
        "gate_bias": (neurons,),
        "up_bias": (neurons,),
        "down_bias": (inputs,),
    }
    for role, shape in shapes.items():
        if shape != wanted[role]:
            return f"{role} is {list(shape)}, with {neurons} neurons of {inputs} inputs it must be {list(wanted[role])}"
    if "gate_bias" in shapes and "gate" not in shapes:
        return "there is a gate_bias without a gate"
    if list(unit.modules.values()) != [(inputs, inputs)]:
        return f"the FFN is [{inputs}, {inputs}], the modules are {unit.modules}"
    return None


def encode(unit: Unit) -> Packed:
    """Groups as slabs; everything else as it is."""
    reason = fits(unit)
    if reason:
        raise ValueError(reason)
    tensors, size = unit.tensors, unit.params["group_size"]
    rows = [tensors["up"], tensors["down"].t()]
    if "gate" in tensors:
        rows.insert(0, tensors["gate"])
    groups = torch.stack([each.unflatten(0, (-1, size)) for each in rows], dim=1)
    others = {role: tensors[role].contiguous() for role in (*BIASES, "router") if role in tensors}
    return Packed(NAME, VERSION, dict(unit.modules), {"groups": groups.contiguous(), **others}, dict(unit.params))


def decode(packed: Packed) -> Unit:
    """The unit that was encoded, bit for bit."""
    *ins, down = (rows.flatten(0, 1).contiguous() for rows in packed.tensors["groups"].unbind(1))
    names = ("gate", "up")[-len(ins) :]
    others = {role: tensor for role, tensor in packed.tensors.items() if role != "groups"}
    tensors = dict(zip(names, ins, strict=True)) | {"down": down.t().contiguous()} | others
    return Unit(dict(packed.modules), tensors, dict(packed.params))


def threshold(tau: float) -> float:
    """What a group's logit has to exceed: log(tau / (1 - tau)) as an fp32 value."""
    return torch.tensor(math.log(tau / (1 - tau)), dtype=torch.float32).item()


def decide(x: Tensor, router: Tensor, threshold: float, awake: Tensor | None = None) -> Tensor:
    """bool [M, G]: the groups that each row of x [M, K] wakes; none where `awake` int64 [M] is 0.

    Sums in fp64 and rounds them to fp32: a result on which no order of sums has a say, whatever M is.
    """
    return _awake((x.double() @ router.double().t()).float(), threshold, awake)


def _awake(logits: Tensor, threshold: float, awake: Tensor | None) -> Tensor:
    chosen = logits > threshold
    return chosen if awake is None else chosen & (awake != 0)[:, None]


def reference(x: Tensor, packed: Packed, path: str) -> Tensor:
    """x [M, K] -> y [M, N] in x.dtype: fp32 sums, each product rounded to it; sleeping neurons are zero."""
    t, params = packed.tensors, packed.params
    chosen = decide(x, t["router"], threshold(params["tau"]))
    return _masked(x, t["groups"], [t.get(role) for role in BIASES], chosen, params["activation"])


def _masked(x: Tensor, groups: Tensor, biases: Sequence[Tensor | None], chosen: Tensor, act: str) -> Tensor:
    """Every neuron of every row, of which those of sleeping groups count nothing: y [M, N] in x.dtype.

    groups [G, rows, size, K] of any dtype; gate, up and their product are rounded to x.dtype, as torch's own would be.
    """
    *ins, down = (rows.flatten(0, 1).to(x.dtype) for rows in groups.unbind(1))
    shifts = [None if bias is None else bias.to(x.dtype) for bias in biases]
    up = F.linear(x, ins[-1], shifts[1])
    hidden = (
        gated_act_reference(torch.cat([F.linear(x, ins[0], shifts[0]), up], 1), act)
        if len(ins) > 1
        else act_reference(up, act)
    )
    hidden = hidden.where(chosen.repeat_interleave(groups.shape[2], dim=1), 0)
    return F.linear(hidden, down.t(), shifts[2])


def prepare(packed: Packed, device: torch.device | str) -> Prepared:
    """tensors: the weights, two for a CPU (routed_layout.py), groups [rows, G, size, K] and None for Triton, so that
    gate, up and down are matrices; gate_bias, up_bias, down_bias or None each; router; counts int64 [3].

    ints: group size, index of the activation in KINDS, 1 with a gate. floats: what a logit has to exceed. `counts`
    grows with every call: rows, groups that they woke, groups that were read.
    """
    t, params = packed.tensors, packed.params
    weights = (t["groups"].transpose(0, 1), None) if for_triton(device) else routed_layout.laid_out(t["groups"])
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    tensors = (*weights, *(t.get(role) for role in (*BIASES, "router")), counts)
    moved = tuple(None if tensor is None else tensor.to(device).contiguous() for tensor in tensors)
    outputs: dict[str, tuple[int, ...]] = {path: (n,) for path, (n, _) in packed.modules.items()}
    ints = (params["group_size"], KINDS.index(params["activation"]), t["groups"].shape[1] - 2)
    return Prepared(NAME, outputs, moved, ints, (threshold(params["tau"]),))


def stack(parts: list[tuple[Prepared, str]]) -> Prepared | None:
    """None: no other module reads the same input."""
    return None


def apply(x: Tensor, prepared: Prepared, path: str, wide: bool = False, awake: Tensor | None = None) -> Tensor:
    """x [M, K] contiguous -> y [M, N] of the whole layer; rows whose `awake` int64 [M] is 0 wake no group."""
    weights, downs, *biases, router, counts = prepared.tensors
    y = _ROUTED_FFN(x, weights, downs, biases, router, counts, *prepared.ints, *prepared.floats, awake)
    return y.float() if wide else y


def apply_around(
    x: Tensor, prepared: Prepared, path: str, around: Around, awake: Tensor | None = None
) -> Tensor | None:
    """`apply` with norm and residual in its own launches on a GPU; elsewhere None: they are steps of their own."""
    if not ops.takes_triton(x) or around.act:
        return None
    weights, downs, *biases, router, counts = prepared.tensors
    given = (awake, around.norm, around.eps, around.residual)
    return _AROUND(x, weights, downs, biases, router, counts, *prepared.ints, *prepared.floats, *given)


def decisions(x: Tensor, prepared: Prepared) -> Tensor:
    """bool [M, G]: the groups that `apply` wakes on a CPU for the rows of x [M, K]."""
    router = prepared.tensors[-2]
    assert router is not None
    return _decide_on_cpu(x, router, prepared.floats[0], None)


def groups_of(prepared: Prepared) -> int:
    """How many groups a prepared unit has."""
    router = prepared.tensors[-2]
    assert router is not None
    return len(router)


def slice(packed: Packed, path: str, dim: int, start: int, stop: int) -> Packed:
    """Groups [start, stop), dim 2: their own router decides, results add up, the first shard has the down_bias."""
    groups = len(packed.tensors["router"])
    if dim != 2 or not 0 <= start < stop <= groups:
        raise ValueError(f"{path} is cut into groups alone, dim 2 of {groups}: dim {dim} has no [{start}, {stop})")
    size = packed.params["group_size"]
    tensors = {role: packed.tensors[role][start:stop].contiguous() for role in ("groups", "router")}
    for role in ("gate_bias", "up_bias"):
        if role in packed.tensors:
            tensors[role] = packed.tensors[role][size * start : size * stop].contiguous()
    if "down_bias" in packed.tensors and start == 0:
        tensors["down_bias"] = packed.tensors["down_bias"]
    return Packed(NAME, VERSION, dict(packed.modules), tensors, dict(packed.params))


def traffic(packed: Packed, m: int) -> Traffic:
    """With every group awake, which is the most: what `prepare` lays out for a CPU, two flops a weight and row."""
    t = packed.tensors
    weights = t["groups"].numel() + t["router"].numel()
    counts, spare = 24, -t["router"].shape[1] % routed_layout.TILE_OUTPUTS * t["groups"][:, -1, :, 0].numel()
    laid = sum(tensor.nbytes for tensor in t.values()) + spare * t["groups"].element_size()
    return Traffic(laid + counts, 2 * m * weights)


def cases() -> list[Unit]:
    """One group, odd widths, biases, with a gate and without, every size of groups and every dtype."""
    generator = torch.Generator().manual_seed(0)

    def unit(groups: int, size: int, k: int, gated: bool, biased: bool, act: str, dtype: torch.dtype) -> Unit:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

        neurons = groups * size
        tensors = {"gate": random(neurons, k)} if gated else {}
        tensors |= {"up": random(neurons, k), "down": random(k, neurons)}
        if biased:
            widths = {"gate_bias": neurons, "up_bias": neurons, "down_bias": k}
            tensors |= {role: random(n) for role, n in widths.items() if gated or role != "gate_bias"}
        tensors = {role: tensor.to(dtype) for role, tensor in tensors.items()}
        params = {"group_size": size, "tau": 0.5 if gated else 0.4, "activation": act}
        return Unit({"m": (k, k)}, tensors | {"router": random(groups, k)}, params)

    shapes: list[tuple[int, int, int, bool, bool, str]] = [
        (1, 8, 41, True, False, "silu"),
        (3, 16, 33, True, True, "gelu_new"),
        (5, 8, 48, False, True, "relu"),
        (6, 32, 130, True, False, "silu"),
        (40, 32, 257, False, False, "gelu"),
    ]
    return [unit(*shape, dtype) for shape in shapes for dtype in DTYPES]


def _check(x: Tensor, groups: Tensor, router: Tensor, awake: Tensor | None) -> None:
    inputs = router.shape[1]
    if x.dim() != 2 or x.shape[1] != inputs or x.dtype != groups.dtype or not x.is_contiguous():
        raise ValueError(
            f"routed_ffn wants contiguous x [M, {inputs}] of {groups.dtype}, "
            f"got {tuple(x.shape)} of {x.dtype} with strides {x.stride()}"
        )
    if awake is not None and (awake.shape != x.shape[:1] or awake.dtype != torch.int64 or not awake.is_contiguous()):
        raise ValueError(
            f"routed_ffn wants contiguous awake [{x.shape[0]}] of int64, got {tuple(awake.shape)} of {awake.dtype}"
        )


def _on_cpu(
    x: Tensor,
    ins: Tensor,
    downs: Tensor,
    biases: Sequence[Tensor | None],
    router: Tensor,
    counts: Tensor,
    size: int,
    kind: int,
    gated: int,
    threshold: float,
    awake: Tensor | None,
) -> Tensor:
    _check(x, ins, router, awake)
    native = library.load()
    most = 0 if native is None else native.routed_rows(x.dtype)
    if native is None:
        fallback("routed_ffn", library.why_not())
    elif x.shape[0] <= most or most >= MOST_ROWS:
        y = torch.empty_like(x)
        for part, rows, live in _parts(x, y, awake):
            how = (size, bool(gated), KINDS[kind], threshold)
            native.routed_ffn(part, (ins, downs), biases, router, counts, *how, live, rows)
        return y
    chosen = _decide_on_cpu(x, router, threshold, awake)
    count(counts, chosen, awake)
    return _masked(x, routed_layout.groups(ins, downs), biases, chosen, KINDS[kind])


def _decide_on_cpu(x: Tensor, router: Tensor, threshold: float, awake: Tensor | None) -> Tensor:
    """`decide` as the native kernel does it, where there is one: more rows must not decide otherwise."""
    native = library.load()
    if native is None:
        return decide(x, router, threshold, awake)
    logits = x.new_empty(x.shape[0], len(router), dtype=torch.float32)
    native.route(x, router, logits)
    return _awake(logits, threshold, awake)


def _parts(x: Tensor, y: Tensor, awake: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """MOST_ROWS rows of each at a time."""
    for first in range(0, x.shape[0], MOST_ROWS):
        rows = builtins.slice(first, first + MOST_ROWS)
        yield x[rows], y[rows], None if awake is None else awake[rows]


def count(counts: Tensor, chosen: Tensor, awake: Tensor | None) -> None:
    """Add to counts int64 [3]: live rows, groups that they woke, groups that were read."""
    live = torch.ones_like(chosen[:, 0]) if awake is None else awake != 0
    counts += torch.stack([live.sum(), chosen.sum(), chosen.any(0).sum()])


def _on_gpu(
    x: Tensor,
    groups: Tensor,
    downs: None,
    biases: Sequence[Tensor | None],
    router: Tensor,
    counts: Tensor,
    size: int,
    kind: int,
    gated: int,
    threshold: float,
    awake: Tensor | None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    _check(x, groups, router, awake)
    around = Around(norm, eps, residual=residual)
    around_ffn.check("routed_ffn", x, x.shape[1], around)
    kernels = ops.triton_kernels("routed_ffn")
    if kernels is not None:
        weights = kernels.Weights(groups, tuple(biases), router, KINDS[kind], threshold)
        y: Tensor = kernels.routed_ffn(x, weights, counts, awake, norm, eps, residual)
        return y
    fallback("routed_ffn", "Triton is not installed")

    def step_by_step(x: Tensor) -> Tensor:
        chosen = decide(x, router, threshold, awake)
        count(counts, chosen, awake)
        return _masked(x, groups.transpose(0, 1), biases, chosen, KINDS[kind])

    return around_ffn.reference(x, step_by_step, around)


_ROUTED_FFN = ops.register(
    "routed_ffn(Tensor x, Tensor weights, Tensor? downs, Tensor?[] biases, Tensor router, Tensor(a!) counts, "
    "int size, int kind, int gated, float threshold, Tensor? awake) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=lambda x, *_: torch.empty_like(x),
)


def _around_cpu(x: Tensor, *given: Any) -> Tensor:
    *ffn, norm, eps, residual = given
    return around_ffn.reference(x, lambda x: _on_cpu(x, *ffn), Around(norm, eps, residual=residual))


_AROUND = ops.register(
    "routed_ffn_around(Tensor x, Tensor weights, Tensor? downs, Tensor?[] biases, Tensor router, Tensor(a!) counts, "
    "int size, int kind, int gated, float threshold, Tensor? awake, Tensor? norm, float eps, Tensor? residual) "
    "-> Tensor",
    cpu=_around_cpu,
    gpu=_on_gpu,
    fake=lambda x, *_: torch.empty_like(x),
)
