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

import math

import torch
import torch.nn.functional as F

from . import ops
from .dispatch import fallback
from .fused import ACTIVATIONS
from .unit import Around, Packed, Prepared, Traffic, Unit

NAME = "routed_ffn"
VERSION = 1
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUP_SIZES = (8, 16, 32)
KINDS = tuple(ACTIVATIONS)
BIASES = ("gate_bias", "up_bias", "down_bias")
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
    logits = (x.double() @ router.double().t()).float()
    chosen = logits > threshold
    return chosen if awake is None else chosen & (awake != 0)[:, None]


def reference(x: Tensor, packed: Packed, path: str) -> Tensor:
    """x [M, K] -> y [M, N] in x.dtype: fp32 products, the hidden values rounded once; sleeping neurons are zero."""
    t, size = packed.tensors, packed.params["group_size"]
    biases, act = [t.get(role) for role in BIASES], packed.params["activation"]
    chosen = decide(x, t["router"], threshold(packed.params["tau"]))
    return _masked(x, t["groups"], biases, chosen, size, act).to(x.dtype)


def _masked(x: Tensor, groups: Tensor, biases: list[Tensor | None], chosen: Tensor, size: int, act: str) -> Tensor:
    """Every neuron of every row, of which those of sleeping groups count nothing: y fp32 [M, N]."""
    *ins, down = (rows.flatten(0, 1).float() for rows in groups.unbind(1))
    shifts = [None if bias is None else bias.float() for bias in biases]
    hidden = F.linear(x.float(), ins[-1], shifts[1])
    if len(ins) > 1:
        hidden = ACTIVATIONS[act](F.linear(x.float(), ins[0], shifts[0])) * hidden
    else:
        hidden = ACTIVATIONS[act](hidden)
    hidden = hidden.where(chosen.repeat_interleave(size, dim=1), 0)
    return F.linear(hidden.to(x.dtype).float(), down.t(), shifts[2])


def prepare(packed: Packed, device: torch.device | str) -> Prepared:
    """tensors: groups, gate_bias, up_bias, down_bias or None each, router. ints: group size, index of the activation
    in KINDS. floats: what a logit has to exceed."""
    t, params = packed.tensors, packed.params
    roles = ("groups", *BIASES, "router")
    tensors = tuple(None if t.get(role) is None else t[role].to(device).contiguous() for role in roles)
    outputs: dict[str, tuple[int, ...]] = {path: (n,) for path, (n, _) in packed.modules.items()}
    ints = (params["group_size"], KINDS.index(params["activation"]))
    return Prepared(NAME, outputs, tensors, ints, (threshold(params["tau"]),))


def stack(parts: list[tuple[Prepared, str]]) -> Prepared | None:
    """None: no other module reads the same input."""
    return None


def apply(x: Tensor, prepared: Prepared, path: str, wide: bool = False, awake: Tensor | None = None) -> Tensor:
    """x [M, K] contiguous -> y [M, N] of the whole layer; rows whose `awake` int64 [M] is 0 wake no group."""
    groups, *biases, router = prepared.tensors
    y = _ROUTED_FFN(x, groups, biases, router, *prepared.ints, *prepared.floats, awake)
    return y.float() if wide else y


def apply_around(x: Tensor, prepared: Prepared, path: str, around: Around) -> Tensor | None:
    """None: norm and residual are steps of their own."""
    return None


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
    """With every group awake, which is the most: all tensors once, two flops for each weight and row."""
    t = packed.tensors
    weights = t["groups"].numel() + t["router"].numel()
    return Traffic(sum(tensor.nbytes for tensor in t.values()), 2 * m * weights)


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
        (1, 8, 1, True, False, "silu"),
        (3, 16, 33, True, True, "gelu_new"),
        (5, 8, 48, False, True, "relu"),
        (6, 32, 130, True, False, "silu"),
        (40, 32, 257, False, False, "gelu"),
    ]
    return [unit(*shape, dtype) for shape in shapes for dtype in DTYPES]


def _check(x: Tensor, groups: Tensor, biases: list[Tensor | None], router: Tensor, awake: Tensor | None) -> None:
    inputs = groups.shape[3]
    if x.dim() != 2 or x.shape[1] != inputs or x.dtype != groups.dtype or not x.is_contiguous():
        raise ValueError(
            f"routed_ffn wants contiguous x [M, {inputs}] of {groups.dtype}, "
            f"got {tuple(x.shape)} of {x.dtype} with strides {x.stride()}"
        )
    if awake is not None and (awake.shape != x.shape[:1] or awake.dtype != torch.int64):
        raise ValueError(f"routed_ffn wants awake [{x.shape[0]}] of int64, got {tuple(awake.shape)} of {awake.dtype}")


def _on_cpu(
    x: Tensor,
    groups: Tensor,
    biases: list[Tensor | None],
    router: Tensor,
    size: int,
    kind: int,
    threshold: float,
    awake: Tensor | None,
) -> Tensor:
    _check(x, groups, biases, router, awake)
    fallback("routed_ffn", "no kernel yet")
    return _masked(x, groups, biases, decide(x, router, threshold, awake), size, KINDS[kind]).to(x.dtype)


_ROUTED_FFN = ops.register(
    "routed_ffn(Tensor x, Tensor groups, Tensor?[] biases, Tensor router, int size, int kind, float threshold, "
    "Tensor? awake) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_cpu,
    fake=lambda x, *_: torch.empty_like(x),
)
