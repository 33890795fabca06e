"""shared_basis: the layers of a group write their weights as one basis and coefficients of their own.

    W_i [N, K] ~ C_i [N, R] @ B [R, K]           i = the layers of the group (one layer: SVD-LLM)

    factored    role "basis":               B [R, K]            z = B x          y = C_i z
                role "coefficients.<path>": C_i [N, R]
    pivoted     role "basis":               T [R, K - R]        z = x[pivots] + T x[rest]
                role "pivots":              int32 [R]           y = C_i z
                role "coefficients.<path>": C_i B_p [N, R]
    both        role "bias.<path>":         [N], only where the module has one

Pivoting is exact algebra (`pivot`): R columns of B, chosen so that the others are small combinations
of them, become unit vectors that need not be stored. `rest` are the other columns, ascending.

    K = 4, R = 2, pivots = (2, 0):   z0 = x2 + T00 x1 + T01 x3
                                     z1 = x0 + T10 x1 + T11 x3

Both steps round to the dtype of x, as two linear layers would. With what stands around it (`apply_around`) a basis on a
GPU still takes its two launches; z then waits unscaled for the 1 / rms of a norm, for which fp16 has too little range.

Paths of `apply`, by the number of rows M:

    GPU   M <= GPU_ROWS       Triton, two launches for all stacked modules together (triton_basis.py)
          M above             two cuBLAS GEMMs a module
    CPU   M <= basis_rows     native, one call for all stacked modules
          M above             two of oneDNN's GEMMs a module
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from . import around as around_linear
from . import ops
from .dense import GPU_ROWS, WHOLE_ROWS
from .dispatch import fallback, interpreting
from .native import bindings, library
from .unit import Around, Packed, Prepared, Traffic, Unit

NAME = "shared_basis"
VERSION = 1
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COEFFICIENTS, BIAS = "coefficients.", "bias."

Tensors = Sequence[Any]
"""Order or None, basis, coefficients, bias or None of one module after the other."""

ALIGN = 16
"""Elements, on a GPU: Triton knows of an integer only whether 16 divides it, and then loads 16 bytes at once."""


def fits(unit: Unit) -> str | None:
    """None when the unit is a group of linear modules over one basis, else what keeps it out."""
    basis, pivots = unit.tensors.get("basis"), unit.tensors.get("pivots")
    if basis is None or basis.dim() != 2 or basis.dtype not in DTYPES:
        found = basis if basis is None else f"{tuple(basis.shape)} of {basis.dtype}"
        return f"shared_basis wants a basis [R, K] of bfloat16, float16 or float32, the unit has {found}"
    rank, inputs = basis.shape[0], basis.shape[1] + (0 if pivots is None else basis.shape[0])
    if rank > inputs:
        return f"rank {rank} is above the {inputs} inputs"
    if pivots is not None and not _distinct(pivots, rank, inputs):
        return f"pivots must be {rank} different columns of {inputs}, int32"
    wanted = _shapes(unit.modules, rank)
    for role, tensor in unit.tensors.items():
        if role in ("basis", "pivots"):
            continue
        if tuple(tensor.shape) != wanted.get(role) or tensor.dtype != basis.dtype:
            return f"{role} is {tuple(tensor.shape)} of {tensor.dtype}, expected {wanted.get(role)} of {basis.dtype}"
    missing = [role for role in wanted if role.startswith(COEFFICIENTS) and role not in unit.tensors]
    narrow = [path for path, (_, k) in unit.modules.items() if k != inputs]
    if missing or narrow:
        return f"{missing[0]} is missing" if missing else f"{narrow[0]} does not read {inputs} inputs"
    return None


def encode(unit: Unit) -> Packed:
    """The unit's tensors, contiguous. `pivot` the unit first where that reads fewer bytes."""
    reason = fits(unit)
    if reason:
        raise ValueError(reason)
    tensors = {role: tensor.contiguous() for role, tensor in unit.tensors.items()}
    return Packed(NAME, VERSION, dict(unit.modules), tensors)


def decode(packed: Packed) -> Unit:
    """The unit that was encoded, bit for bit."""
    return Unit(dict(packed.modules), dict(packed.tensors))


def pivot(unit: Unit, scale: torch.Tensor) -> Unit:
    """The same product from K - R columns of basis instead of K: y is unchanged but for rounding.

    scale: [K], the RMS of each input. Columns of B that carry much of z become pivots, which keeps the entries of
    T, and so rounding, small. fp64 inside; the result has the unit's dtype. The idea is PIFA's (performance notes in
    ARCHITECTURE.md), extended to a basis that several modules share.
    """
    basis = unit.tensors["basis"].double()
    rank, inputs = basis.shape
    scale = scale.double().clamp(min=float(scale.max()) * 1e-6 or 1.0)
    lu, swaps, _ = torch.linalg.lu_factor_ex((basis * scale).t())
    columns = _permutation(swaps, inputs)
    lower = lu.tril(-1)
    lower[range(rank), range(rank)] = 1.0
    combined = torch.linalg.solve_triangular(lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True)
    pivots, at = columns[:rank].sort()
    rest, behind = columns[rank:].sort()
    t = scale[pivots, None] * combined.t()[at][:, behind] / scale[rest]
    dtype = unit.tensors["basis"].dtype
    absorbed = {
        role: (tensor.double() @ basis[:, pivots]).to(dtype) if role.startswith(COEFFICIENTS) else tensor
        for role, tensor in unit.tensors.items()
    }
    return Unit(unit.modules, absorbed | {"basis": t.to(dtype), "pivots": pivots.int()})


def weight(packed: Packed, path: str) -> torch.Tensor:
    """The matrix [N, K] that module `path` multiplies by: the fp32 product in the stored dtype."""
    t = packed.tensors
    basis = t["basis"].float()
    if "pivots" in t:
        rank, inputs = len(t["pivots"]), packed.modules[path][1]
        order = _order(t["pivots"], inputs)
        full = basis.new_zeros(rank, inputs)
        full[:, order] = torch.cat([torch.eye(rank, device=basis.device), basis], dim=1)
        basis = full
    return (t[COEFFICIENTS + path].float() @ basis).to(t["basis"].dtype)


def reference(x: torch.Tensor, packed: Packed, path: str) -> torch.Tensor:
    """x [M, K] -> y [M, N] of module `path` in x.dtype: two fp32 products, z rounded between them."""
    t, wide = packed.tensors, x.float()
    if "pivots" in t:
        order, rank = _order(t["pivots"], x.shape[1]), len(t["pivots"])
        z = wide[:, order[:rank]] + wide[:, order[rank:]] @ t["basis"].float().t()
    else:
        z = wide @ t["basis"].float().t()
    y = z.to(x.dtype).float() @ t[COEFFICIENTS + path].float().t()
    if BIAS + path in t:
        y += t[BIAS + path].float()
    return y.to(x.dtype)


def prepare(packed: Packed, device: torch.device | str) -> Prepared:
    """Four tensors a module: order int32 [K] or None, basis, coefficients, bias or None; the first two are shared.

    For a GPU rows of basis and coefficients end in zero columns up to a multiple of ALIGN, where they do not end there
    anyway: 0.2 to 0.9 % more bytes at the ranks of 7B models, which `traffic` leaves out. For a CPU there are also the
    words by which the native kernel finds the tensors: made once, since a token takes a hundred calls and more.
    """

    def laid(weight: torch.Tensor) -> torch.Tensor:
        short = -weight.shape[1] % ALIGN if torch.device(device).type == "cuda" else 0
        return F.pad(weight.to(device), (0, short)) if short else weight.to(device)

    basis = laid(packed.tensors["basis"])
    inputs = next(iter(packed.modules.values()))[1]
    order = _order(packed.tensors["pivots"], inputs).int().to(device) if "pivots" in packed.tensors else None
    tensors: list[torch.Tensor | None] = []
    for path in packed.modules:
        bias = packed.tensors.get(BIAS + path)
        tensors += [order, basis, laid(packed.tensors[COEFFICIENTS + path]), None if bias is None else bias.to(device)]
    outputs: dict[str, tuple[int, ...]] = {path: (n,) for path, (n, _) in packed.modules.items()}
    return Prepared(NAME, outputs, tuple(tensors), _words(tensors))


def stack(parts: list[tuple[Prepared, str]]) -> Prepared | None:
    """One Prepared for modules of several units with the same input; nothing is copied."""
    tensors = tuple(t for prepared, path in parts for t in _parts(prepared, path)[0])
    widths = tuple(n for prepared, path in parts for n in prepared.outputs[path])
    return Prepared(NAME, {parts[0][1]: widths}, tensors, _words(tensors))


def apply(x: torch.Tensor, prepared: Prepared, path: str, wide: bool = False) -> torch.Tensor:
    """x [M, K] contiguous -> y [M, sum N] of every module stacked under `path`.

    wide: y is widened after it was rounded, since no method gives a basis to the head.
    """
    y = _BASIS_LINEAR(x, *_parts(prepared, path))
    return y.float() if wide else y


def apply_around(x: torch.Tensor, prepared: Prepared, path: str, around: Around) -> torch.Tensor | None:
    """`apply` with what stands around it in its two launches; None where separate steps have to do it."""
    if not ops.takes_triton(x) or x.shape[0] > WHOLE_ROWS[x.dtype]:
        return None
    widths = prepared.outputs[path]
    if (around.norm is not None and x.dtype == torch.float16) or (around.act and widths[::2] != widths[1::2]):
        return None
    return _BASIS_AROUND(x, _parts(prepared, path)[0], *around)


def slice(packed: Packed, path: str, dim: int, start: int, stop: int) -> Packed:
    """Outputs (dim 0) [start, stop) of module `path`, with the whole basis; inputs (dim 1) of a factored basis."""
    n, k = packed.modules[path]
    if dim not in (0, 1) or not 0 <= start < stop <= (n, k)[dim]:
        raise ValueError(f"{path} is [{n}, {k}]: dim {dim} has no [{start}, {stop})")
    kept = {r: t for r, t in packed.tensors.items() if r in ("basis", "pivots", COEFFICIENTS + path, BIAS + path)}
    if dim == 0:
        for role in kept.keys() - {"basis", "pivots"}:
            kept[role] = kept[role][start:stop].contiguous()
        return Packed(NAME, VERSION, {path: (stop - start, k)}, kept)
    if "pivots" in kept:
        raise ValueError(f"{path} is pivoted: its inputs are spread over pivots and rest; slice its outputs (dim 0)")
    kept["basis"] = kept["basis"][:, start:stop].contiguous()
    if start:
        kept.pop(BIAS + path, None)
    return Packed(NAME, VERSION, {path: (n, stop - start)}, kept)


def traffic(packed: Packed, m: int) -> Traffic:
    """Each module applied once to m rows: every one reads the basis again, and its own coefficients."""
    t, count = packed.tensors, len(packed.modules)
    shared = t["basis"].numel() * count
    own = sum(tensor.numel() for role, tensor in t.items() if role.startswith(COEFFICIENTS))
    biases = sum(tensor.nbytes for role, tensor in t.items() if role.startswith(BIAS))
    inputs = next(iter(packed.modules.values()))[1]
    order = 4 * inputs * count if "pivots" in t else 0
    return Traffic((shared + own) * t["basis"].element_size() + biases + order, 2 * m * (shared + own))


def cases() -> list[Unit]:
    """A lone module and a group, full and ragged ranks, a bias, factored and pivoted, every dtype."""
    generator = torch.Generator().manual_seed(0)

    def unit(outputs: tuple[int, ...], k: int, rank: int, dtype: torch.dtype) -> Unit:
        def random(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5).to(dtype)

        modules = {f"m{i}": (n, k) for i, n in enumerate(outputs)}
        tensors = {"basis": random(rank, k)} | {COEFFICIENTS + p: random(n, rank) for p, (n, _) in modules.items()}
        return Unit(modules, tensors | ({BIAS + "m0": random(outputs[0])} if rank % 2 else {}))

    shapes = [((1,), 1, 1), ((33,), 7, 3), ((64, 64), 96, 40), ((16,), 24, 24), ((130, 130, 130), 257, 129)]
    factored = [unit(*shape, dtype) for shape in shapes for dtype in DTYPES]
    return [*factored, *(pivot(u, torch.linspace(0.1, 2, u.modules["m0"][1])) for u in factored)]


def _shapes(modules: dict[str, tuple[int, int]], rank: int) -> dict[str, tuple[int, ...]]:
    """What every role beside basis and pivots must look like."""
    coefficients: dict[str, tuple[int, ...]] = {COEFFICIENTS + path: (n, rank) for path, (n, _) in modules.items()}
    return coefficients | {BIAS + path: (n,) for path, (n, _) in modules.items()}


def _distinct(pivots: torch.Tensor, rank: int, inputs: int) -> bool:
    chosen = set(pivots.tolist())
    return (
        pivots.dtype == torch.int32 and pivots.shape == (rank,) and len(chosen) == rank and chosen <= set(range(inputs))
    )


def _permutation(swaps: torch.Tensor, count: int) -> torch.Tensor:
    """The order of rows that LAPACK's successive 1-based row swaps lead to."""
    rows = list(range(count))
    for i, j in enumerate(swaps.tolist()):
        rows[i], rows[j - 1] = rows[j - 1], rows[i]
    return torch.tensor(rows)


def _order(pivots: torch.Tensor, inputs: int) -> torch.Tensor:
    """pivots, then every other column in ascending order: int64 [inputs]."""
    chosen = torch.zeros(inputs, dtype=torch.int8, device=pivots.device)
    chosen[pivots.long()] = 1
    rest = chosen.argsort(stable=True)[: inputs - len(pivots)]  # has a shape on meta tensors too, unlike nonzero
    return torch.cat([pivots.long(), rest])


def _parts(prepared: Prepared, path: str) -> tuple[Tensors, tuple[int, ...]]:
    """Order, basis, coefficients, bias of each module under `path`; and the words of all."""
    before = 0
    for other, widths in prepared.outputs.items():
        after = before + len(widths)
        if other == path:
            words = prepared.ints[bindings.BASIS_WORDS * before : bindings.BASIS_WORDS * after]
            return prepared.tensors[4 * before : 4 * after], words
        before = after
    raise KeyError(f"{path} is not served here; known are {list(prepared.outputs)}")


def _columns(parts: Tensors) -> list[list[Any]]:
    """Every order, every basis, every coefficients, every bias."""
    return [list(parts[i::4]) for i in range(4)]


def _words(parts: Tensors) -> tuple[int, ...]:
    """How the native kernel finds these tensors, which are checked for it; nothing for another device's."""
    if any(t is not None and t.device.type != "cpu" for t in parts):
        return ()
    _check_parts(parts, _inputs(parts))
    return tuple(word for i in range(0, len(parts), 4) for word in bindings.basis_words(*parts[i : i + 4]))


def _inputs(parts: Tensors) -> int:
    """K, by the first module: its rows must not be padded."""
    order, basis = parts[:2]
    return len(order) if order is not None else basis.shape[1]


def _check_input(x: torch.Tensor, inputs: int, dtype: torch.dtype) -> None:
    if x.dim() != 2 or x.shape[1] != inputs or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(
            f"basis_linear wants contiguous x [M, {inputs}] of {dtype}, "
            f"got {tuple(x.shape)} of {x.dtype} with strides {x.stride()}"
        )


def _check_parts(parts: Tensors, inputs: int, align: int = 1) -> None:
    """align: rows of basis and coefficients may end in zero columns up to a multiple of it."""

    def as_wide(weight: torch.Tensor, columns: int) -> bool:
        return weight.shape[1] in (columns, -(-columns // align) * align)

    for order, basis, coefficients, bias in zip(*_columns(parts), strict=True):
        rank = basis.shape[0]
        kept = [t for t in (basis, coefficients, bias) if t is not None]
        if (
            not as_wide(basis, inputs - (0 if order is None else rank))
            or not as_wide(coefficients, rank)
            or (order is not None and (order.shape, order.dtype) != ((inputs,), torch.int32))
            or (bias is not None and bias.shape != coefficients.shape[:1])
            or not all(t.dtype == parts[1].dtype and t.is_contiguous() for t in kept)
        ):
            found = "; ".join(f"{tuple(t.shape)} of {t.dtype}" for t in kept)
            raise ValueError(
                f"basis_linear: basis, coefficients and bias are {found}; {'not ' if order is None else ''}pivoted, "
                f"for {inputs} inputs: they do not meet"
            )


def _torch_path(x: torch.Tensor, parts: Tensors) -> torch.Tensor:
    """Two of torch's linears a module: the best there is once compute and not bytes is the limit."""
    outputs = []
    for o, b, c, shift in zip(*_columns(parts), strict=True):
        rank = b.shape[0]
        if o is None:
            z = F.linear(x, b[:, : x.shape[1]])
        else:
            gathered = _in_order(x, o)
            z = torch.addmm(gathered[:, :rank], gathered[:, rank:], b[:, : x.shape[1] - rank].t())
        outputs.append(F.linear(z, c[:, :rank], shift))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _in_order(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x [M, K] with its columns in this order."""
    native = library.load() if x.device.type == "cpu" else None
    if native is None:
        return x.index_select(1, order)
    ordered = torch.empty_like(x)
    native.in_order(x, order, ordered)
    return ordered


def _basis_linear_cpu(x: torch.Tensor, parts: Tensors, words: Sequence[int]) -> torch.Tensor:
    words = words or _words(parts)
    _check_input(x, _inputs(parts), parts[1].dtype)
    native = library.load()
    if native is None:
        fallback("basis_linear", library.why_not())
    elif x.shape[0] <= native.basis_rows(x.dtype):
        y = x.new_empty(x.shape[0], _width(parts))
        native.basis_linear(x, words, y)
        return y
    return _torch_path(x, parts)


def _check_gpu(x: torch.Tensor, parts: Tensors) -> None:
    inputs = x.shape[-1] if parts[0] is None else len(parts[0])
    _check_input(x, inputs, parts[1].dtype)
    _check_parts(parts, inputs, ALIGN)


def _basis_linear_gpu(x: torch.Tensor, parts: Tensors, words: Sequence[int]) -> torch.Tensor:
    _check_gpu(x, parts)
    kernels = ops.triton_kernels("basis")
    if kernels is None:
        fallback("basis_linear", "Triton is not installed")
    elif x.shape[0] <= GPU_ROWS[x.dtype] or interpreting():
        return kernels.basis_linear(x, *_columns(parts))
    return _torch_path(x, parts)


def _width(parts: Tensors) -> int:
    return sum(len(coefficients) for coefficients in parts[2::4])


def _basis_linear_fake(x: torch.Tensor, parts: Tensors, words: Sequence[int]) -> torch.Tensor:
    return x.new_empty(x.shape[0], _width(parts))


_BASIS_LINEAR = ops.register(
    "basis_linear(Tensor x, Tensor?[] parts, int[] words) -> Tensor",
    cpu=_basis_linear_cpu,
    gpu=_basis_linear_gpu,
    fake=_basis_linear_fake,
)


def _around_cpu(x: torch.Tensor, parts: Tensors, *around: Any) -> torch.Tensor:
    return around_linear.reference(x, lambda normed: _torch_path(normed, parts), Around(*around))


def _around_gpu(x: torch.Tensor, parts: Tensors, *around: Any) -> torch.Tensor:
    _check_gpu(x, parts)
    around_linear.check("basis_linear_around", x, _width(parts), Around(*around))
    return ops.triton_kernels("basis").basis_linear(x, *_columns(parts), Around(*around))


_BASIS_AROUND = ops.register(
    "basis_linear_around(Tensor x, Tensor?[] parts, Tensor? norm, float eps, str? act, Tensor? residual) -> Tensor",
    cpu=_around_cpu,
    gpu=_around_gpu,
    fake=lambda x, parts, *around: x.new_empty(x.shape[0], _width(parts) // (2 if Around(*around).act else 1)),
)
