"""Calibration windows, and the walk that sees in each layer what the whole model sees there."""

from __future__ import annotations

import pytest
import torch

from pared import families
from pared.converters.calibration import LayerWalk, gram_of_inputs, windows
from pared.errors import SourceError
from pared.tests import tiny


class Counting:
    """A tokenizer that gives 0, 1, 2, ... whatever the text."""

    def __call__(self, text: str, **_: object) -> Counting:
        self.text, self.input_ids = text, torch.arange(100)[None]
        return self


def test_windows_are_cut_one_after_the_other_and_drawn_once_each():
    tokenizer = Counting()
    drawn = windows(tokenizer, ["a", "b"], 14, 7, seed=5)
    assert tokenizer.text == "a\n\nb"
    assert drawn.shape == (14, 7)
    assert sorted(drawn[:, 0].tolist()) == list(range(0, 98, 7))
    assert torch.equal(drawn, drawn[:, :1] + torch.arange(7))
    assert drawn[:, 0].tolist() != sorted(drawn[:, 0].tolist())
    assert torch.equal(windows(tokenizer, ["a"], 3, 7, seed=5), drawn[:3])
    assert not torch.equal(windows(tokenizer, ["a"], 14, 7, seed=6), drawn)


def test_too_little_text():
    with pytest.raises(SourceError, match=r"14 windows of 7 tokens, 15 were asked for; give more text, or fewer"):
        windows(Counting(), ["a"], 15, 7, seed=0)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_walk_sees_what_the_whole_model_sees(name):
    model = tiny.model(name).requires_grad_(False)
    spec = families.read(tiny.CONFIGS[name].to_dict())
    tokens = torch.randint(0, 40, (5, 11), generator=torch.Generator().manual_seed(0))
    paths = [spec.path(i, spec.names.ffn_out) for i in range(len(spec.layers))]
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, path=path: seen[path].append(args[0].flatten(0, -2).double())
        )
        for path in paths
    ]
    model(input_ids=tokens)
    for handle in handles:
        handle.remove()

    walk = LayerWalk(model, spec, tokens, batch=2)
    for i, path in enumerate(paths):
        with gram_of_inputs({path: model.get_submodule(path)}) as grams:
            walk.run(i)
        x = torch.cat(seen[path])
        assert grams[path].dtype == torch.float64
        assert torch.allclose(grams[path], x.t() @ x, rtol=1e-4, atol=1e-4 * float(x.square().mean())), i


def test_hooks_are_gone_after_the_walk():
    model = tiny.model("llama").requires_grad_(False)
    spec = families.read(tiny.CONFIGS["llama"].to_dict())
    walk = LayerWalk(model, spec, torch.zeros(1, 4, dtype=torch.int64))
    target = model.get_submodule(spec.path(0, spec.names.out))
    with pytest.raises(RuntimeError, match="inside"), gram_of_inputs({"o": target}):
        raise RuntimeError("inside")
    walk.run(0)
    assert not any(module._forward_pre_hooks for module in model.modules())
