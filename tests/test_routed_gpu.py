"""What of a routed FFN only a GPU can show: decisions at every M, graphs that fit any of them, the same bits again."""

from __future__ import annotations

import pytest
import torch

from pared.kernels import dispatch, routed_ffn
from pared.kernels.unit import Around, Prepared, Unit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

DEVICE, PATH = "cuda", "m"
HIDDEN, NEURONS, SIZE = 1024, 2816, 32


def prepared(tau: float = 0.5) -> Prepared:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape) * shape[-1] ** -0.5

    tensors = {"gate": random(NEURONS, HIDDEN), "up": random(NEURONS, HIDDEN), "down": random(HIDDEN, NEURONS)}
    tensors = {role: tensor.bfloat16() for role, tensor in tensors.items()}
    params = {"group_size": SIZE, "tau": tau, "activation": "silu"}
    unit = Unit({PATH: (HIDDEN, HIDDEN)}, tensors | {"router": random(NEURONS // SIZE, HIDDEN)}, params)
    return routed_ffn.prepare(routed_ffn.encode(unit), DEVICE)


@pytest.mark.parametrize("offset", [0.0, 3.0], ids=["around zero", "all of one sign"])
@pytest.mark.parametrize("rows", [2, 7, 64, 300])
def test_decisions_are_those_of_one_row(rows, offset):
    """Thresholds are logits of the rows: a sum that differed in its last bit would decide otherwise for some."""
    from pared.kernels import triton_router

    x = (torch.randn(rows, HIDDEN) + offset).bfloat16().to(DEVICE)
    router = (torch.randn(NEURONS // SIZE, HIDDEN) + offset / 10).to(DEVICE)
    exact = (x.double() @ router.double().t()).flatten()
    for threshold in exact[:: len(exact) // 4].tolist():
        chosen, _ = triton_router.route(x, router, threshold)
        own = torch.cat([triton_router.route(row, router, threshold)[0] for row in x.split(1)])
        assert torch.equal(chosen, own)
        assert 0 < chosen.sum() < chosen.numel()


@pytest.mark.parametrize("rows", [1, 4, 24, 128])
def test_a_captured_graph_fits_any_decision_and_repeats_its_bits(rows):
    ffn, x = prepared(), torch.zeros(rows, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    awake = torch.ones(rows, dtype=torch.int64, device=DEVICE)
    around = Around(torch.rand(HIDDEN, device=DEVICE) + 0.5, 1e-5, residual=x)
    with dispatch.strict():
        routed_ffn.apply_around(x, ffn, PATH, around, awake)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = routed_ffn.apply_around(x, ffn, PATH, around, awake)
        for step in range(20):
            x.copy_(torch.randn(rows, HIDDEN) * (step + 1))
            awake[rows // 2 :] = step % 2
            graph.replay()
            found = y.clone()
            assert torch.equal(found, routed_ffn.apply_around(x, ffn, PATH, around, awake))
            assert torch.equal(found[rows // 2 :], x[rows // 2 :]) or step % 2
