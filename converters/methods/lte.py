"""Learn-To-be-Efficient (arXiv 2402.06126): each token wakes only those groups of FFN neurons that it needs.

Neurons are sorted into groups of alike ones, a router scores the groups of each layer. Stage 1 trains model and
routers with scores as weights, under a loss that makes them small and keeps them away from tau; in stage 2 routers are
frozen, a group is in or out, and the model adapts.

    L = L_task + eta mean(G^2) + lam mean(1 / (G - tau)^2) + mu L_turn

L_turn is ours and counts in both stages: what noise in an FFN's input would change of its output by turning decisions.
A turned group moves the next layer's input, which turns more, so that bf16 alone may turn some percent of all. L_sep
does not prevent it: larger router weights satisfy it, and then their noise is larger too.

Nothing but the weights of stage 2 is needed afterwards.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from ... import families
from ...errors import BadParameter
from ...kernels.routed_ffn import GROUP_SIZES
from ...spec import Spec
from ..calibration import Calibration
from ..record import Record
from ..routed import Groups, Rule, awake, hard, place, routed, soft
from ..routed_training import Trained, changed, efficiency, live, opened, separability, steady, under
from ..routing import begin, route
from ..training import compiled, fastest_device, next_token_loss, tenths, train

NAME = "lte"
WARM_UP = 0.06  # share of a stage's steps over which the learning rate rises; after it, it falls to zero
START_WINDOWS = 32
_BATCH = 4


@dataclass(frozen=True)
class Params:
    """Of the paper, but for `start`, of which it says nothing, and `mu`, which is ours: 0 is the paper.

    size: neurons of a group. eta: weight of the efficiency loss, the knob of sparsity; lam: of the separability loss;
    mu: of L_turn; at 20 bf16 turned 0.2 % of the decisions of bench/routed.py's models, at 0 mostly 1 to 3 %. tau: the
    score above which a group is in. train: `full` trains the whole model, `lora` adapters on the routed FFNs, `router`
    the routers alone, which leaves stage 2 nothing to do. lr: peak learning rate; router_lr: of the routers, default
    the same. tokens: of each stage, default once through the text; a step takes `accumulate` times `batch` windows of
    `length`. start: share of groups that are in when stage 1 begins. r, alpha: of LoRA. layers: only these.
    """

    size: int = 32
    eta: float = 1.0
    lam: float = 0.5
    tau: float = 0.5
    mu: float = 0.0
    train: Trained = "full"
    lr: float = 1.5e-5
    router_lr: float | None = None
    tokens: int | None = None
    length: int = 512
    batch: int = 16
    accumulate: int = 1
    start: float = 0.75
    r: int = 16
    alpha: float = 32.0
    seed: int = 0
    layers: tuple[int, ...] | None = None

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        "eta": (0, 1e4),
        "lam": (0, 1e4),
        "mu": (0, 1e4),
        "lr": (1e-8, 1),
        "router_lr": (1e-8, 1),
        "tokens": (1, 1 << 50),
        "length": (2, 1 << 20),
        "batch": (1, 1 << 16),
        "accumulate": (1, 1 << 16),
        "start": (0.05, 0.99),
        "r": (1, 4096),
        "alpha": (1e-3, 1e4),
        "seed": (0, 2**31 - 1),
    }

    def __post_init__(self) -> None:
        if self.size not in GROUP_SIZES:
            raise BadParameter(f"size={self.size} is not one of {', '.join(map(str, GROUP_SIZES))} neurons of a group")
        _ = self.groups

    @property
    def groups(self) -> Groups:
        return Groups(self.size, self.tau)

    def batches(self, calibration: Calibration, stage: int) -> list[torch.Tensor]:
        """The windows of a stage, int64 [batch, length] for each backward pass; each stage has its own order."""
        part = self.batch * self.accumulate
        steps = None if self.tokens is None else max(1, self.tokens // (self.length * part))
        found = calibration.windows(steps and steps * part, self.length, self.seed + stage)
        whole = len(found) // part * part
        if not whole:
            raise BadParameter(f"the text holds {len(found)} windows of {self.length} tokens, a step takes {part}")
        return list(found[:whole].split(self.batch))


def search(
    model: PreTrainedModel, calibration: Calibration, record: Record, params: Params, progress: bool = True
) -> None:
    """Train, on a GPU where there is one, and fill `record` with what each stage has made. The model is left as it was.

    A killed run goes on from its last saved step. A loss that is not finite ends its stage with the last good weights,
    with a warning. Raises BadParameter for groups that do not divide an FFN or layers that are not there, SourceError
    for too little text.
    """
    if record.holds("trained"):
        return
    spec = families.read(model.config.to_dict())
    layers = _layers(spec, params)
    student, windows = copy.deepcopy(model).to(fastest_device()), _start_windows(calibration, params)
    begin(student, layers, params.groups, windows, params.start, params.seed, record, progress)
    facts = [train_stage(student, calibration, record, params, stage, progress) for stage in _stages(params)]
    seen = awake(under(student, hard), windows)
    share = {path: 1 - groups.float().mean().item() for path, groups in seen.items()}
    record.save("trained", {}, {"layers": layers, "stages": facts, "sparsity": share})


def apply(model: PreTrainedModel, record: Record) -> None:
    """Put routed FFNs with their trained weights in place; whatever else was trained is overwritten."""
    spec, facts, start = families.read(model.config.to_dict()), record.facts("trained"), record.facts("start")
    orders = record.tensors("start")
    for i in facts["layers"]:
        route(model, spec, i, orders[f"order.{place(spec, i)}"], Groups(start["size"], start["tau"])).rule = hard
    for name, tensor in record.tensors(f"stage-{len(facts['stages'])}").items():
        parameter = model.get_parameter(name)
        parameter.data = tensor.to(torch.float32 if name.endswith(".router.weight") else parameter.dtype)
    model.requires_grad_(False)


def summary(record: Record) -> dict[str, Any]:
    """Each stage's loss over its first and last tenth, and why it ended early, if so; share of groups that are out."""
    facts = record.facts("trained")
    stages = [{"steps": len(s["loss"]), "loss": tenths(s["loss"]), "stopped": s["stopped"]} for s in facts["stages"]]
    shares = facts["sparsity"]
    return {"stages": stages, "sparsity": sum(shares.values()) / len(shares), "layers": shares}


# --- what is trained, and on what -------------------------------------------------------------------


def _start_windows(calibration: Calibration, params: Params) -> Sequence[torch.Tensor]:
    """The same few windows for the routers' start and for the sparsity at the end."""
    found = calibration.windows(None, params.length, params.seed)[:START_WINDOWS]
    return found.split(_BATCH)


def _layers(spec: Spec, params: Params) -> list[int]:
    """The layers to route. Raises BadParameter for those that are not there, and for FFNs that groups do not divide."""
    count = len(spec.layers)
    layers = sorted(set(range(count) if params.layers is None else params.layers))
    if not layers or layers[-1] >= count:
        raise BadParameter(f"layers={params.layers} names layers that are not there; the model has 0 to {count - 1}")
    for i in layers:
        if spec.layers[i].ffn % params.size:
            raise BadParameter(
                f"groups of {params.size} do not divide the {spec.layers[i].ffn} neurons of layer {i}; "
                f"choose another size= or other layers="
            )
    return layers


# --- the two stages --------------------------------------------------------------------------------


def _stages(params: Params) -> tuple[int, ...]:
    return (1,) if params.train == "router" else (1, 2)


def train_stage(
    model: PreTrainedModel,
    calibration: Calibration,
    record: Record,
    params: Params,
    stage: int,
    progress: bool,
    rule: Rule | None = None,
) -> dict[str, Any]:
    """One stage: its losses and why it ended early, {"loss", "stopped"}; `record` keeps its end as `stage-<n>`.

    rule: of the groups, default soft in stage 1 and hard in stage 2. A model without routed FFNs is only fine-tuned.
    """
    part = f"stage-{stage}"
    if not record.holds(part):
        batches = params.batches(calibration, stage)
        steps = len(batches) // params.accumulate
        under(model, rule or _rule(params, stage))
        saved = Record(record.folder / part)
        with (
            opened(model, params.train, stage == 1, params.r, params.alpha, params.seed),
            compiled(model, _decoder_layers(model), steps),
        ):
            losses, complaint = train(
                model,
                steps,
                _loss(model, batches, params, stage, decides=rule is None),
                saved,
                lambda name: (params.router_lr or params.lr) if name.endswith(".router.weight") else params.lr,
                int(WARM_UP * steps),
                progress,
                f"stage {stage}",
                params.accumulate,
                lambda: live(model),
            )
        if complaint:
            warnings.warn(f"lte, stage {stage}: {complaint}; going on with the last good weights", stacklevel=2)
        record.save(part, changed(model, params.train), {"loss": losses, "stopped": complaint})
        saved.discard("step")
    for name, tensor in record.tensors(part).items():
        model.get_parameter(name).data.copy_(tensor)
    return record.facts(part)


def _decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    spec = families.read(model.config.to_dict())
    return [model.get_submodule(spec.path(i, "").rstrip(".")) for i in range(len(spec.layers))]


def _rule(params: Params, stage: int) -> Rule:
    rule = soft if stage == 1 else hard
    return steady(rule) if params.mu else rule


def _loss(
    model: PreTrainedModel, batches: Sequence[torch.Tensor], params: Params, stage: int, decides: bool
) -> Callable[[int], torch.Tensor]:
    """The loss of backward pass i. decides: routers do, so that their losses count."""
    ffns = list(routed(model).values()) if decides else []

    def of(i: int) -> torch.Tensor:
        loss = next_token_loss(model, batches[i].to(model.device))
        if ffns and stage == 1:
            scores = [ffn.shares for ffn in ffns]
            loss = loss + params.eta * efficiency(scores) + params.lam * separability(scores, params.tau)
        if ffns and params.mu:
            loss = loss + params.mu * torch.stack([ffn.turned for ffn in ffns]).mean()
        return loss

    return of
