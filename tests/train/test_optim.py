"""Decay groups, the step, the loss scale and the saved state of the optimizer."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from beit_fast.models import BeitConfig, BeitForMaskedImageModeling
from beit_fast.train import optim
from beit_fast.train.checkpoint.state import load_optimizer_state, optimizer_state
from beit_fast.train.config import OptimConfig
from beit_fast.train.optim import (
    LossScaler,
    build_optimizer,
    decay_groups,
    load_apex,
    optimizer_step,
    set_learning_rate,
)

CPU = torch.device("cpu")


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 4))


def fill_gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def test_decay_groups_of_beit_base():
    with torch.device("meta"):
        model = BeitForMaskedImageModeling(BeitConfig.from_preset("base", "plus"))
    decayed, exempt = decay_groups(model, 0.05)
    assert (len(exempt["names"]), len(decayed["names"])) == (137, 52)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    assert {"mask_token", "rel_pos_bias.relative_position_bias_table", "patch_embed.proj.weight"} <= set(
        decayed["names"]
    )
    assert {"cls_token", "blocks.0.gamma_1", "blocks.0.attn.q_bias", "lm_head.bias", "norm.weight"} <= set(
        exempt["names"]
    )


def test_step_equals_torch_with_clip_grad_norm():
    ours, theirs = small_model(), small_model()
    config = OptimConfig(lr=1e-2, weight_decay=0.1, clip_grad=0.5)
    optimizer = build_optimizer(decay_groups(ours, 0.1), config)
    reference = torch.optim.AdamW(
        [{"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
         {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0}],
        lr=1e-2, foreach=False, fused=False,
    )  # fmt: skip
    for step in range(5):
        fill_gradients(ours, step, scale=8.0)  # as if the loss had been scaled by 8
        fill_gradients(theirs, step)
        norm, found_inf = optimizer_step(optimizer, torch.tensor(8.0), config.clip_grad)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        assert found_inf.item() == 0
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("gradient", "clip", "factor"),
    [([3.0, 4.0], None, 1), ([3.0, 4.0], 10.0, 1), ([3.0, 4.0], 1.0, 1 / 5), ([3e-6, 4e-6], 1e-6, 1 / 6)],
)
def test_clipping_by_hand(gradient, clip, factor):
    """A plain step at rate 1: the norm 5 against a limit above it and below it; 1e-6 is added to a norm of 5e-6."""
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = 8 * torch.tensor(gradient)
    sgd = torch.optim.SGD([parameter], lr=1.0)
    norm, _ = optimizer_step(sgd, torch.tensor(8.0), clip)
    assert norm.item() == pytest.approx(5 * gradient[0] / 3)
    assert parameter.tolist() == pytest.approx([-factor * value for value in gradient], rel=1e-5)


def test_groups_as_they_are_given(monkeypatch):
    """No scale means 1; names and parameters belong together; apex's Adam is asked for as AdamW."""
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def groups():
        return [{"params": [first], "names": ["a"]}, {"params": [second], "names": ["b"], "lr_scale": 0.5}]

    optimizer = build_optimizer(groups(), OptimConfig())
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 0.5]
    optimizer.param_groups[0]["lr"] = rate = torch.tensor(1.0)
    set_learning_rate(optimizer, 0.25)
    optimizer.param_groups[1]["lr"] = torch.tensor(1.0)
    set_learning_rate(optimizer, 0.125)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.125, 0.0625]
    assert optimizer.param_groups[0]["lr"] is rate
    with pytest.raises(ValueError, match="`names` and `params` must have one entry each per parameter"):
        build_optimizer([{"params": [first, second], "names": ["a"]}], OptimConfig())
    monkeypatch.setattr(optim, "load_apex", lambda: ApexLike)
    made = build_optimizer(groups(), OptimConfig(impl="apex", lr=0.5, betas=(0.8, 0.9), eps=1e-3))
    assert isinstance(made, ApexLike)
    assert made.defaults == {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-3}


def test_layers_without_blocks():
    """The stem is one layer below the rest."""
    model = nn.Linear(2, 2)
    model.cls_token = nn.Parameter(torch.ones(1, 1, 2))
    groups = decay_groups(model, 0.1, 0.5)
    assert {group["names"][0]: group["lr_scale"] for group in groups} == {"cls_token": 0.5, "bias": 1, "weight": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_bad_step_changes_nothing_bit_for_bit(value, clip):
    model = small_model()
    optimizer = build_optimizer(decay_groups(model, 0.1), OptimConfig(lr=1e-2))
    for step in range(3):
        fill_gradients(model, step)
        optimizer_step(optimizer, torch.tensor(1.0), clip)
    before = copy.deepcopy([model.state_dict(), optimizer_state(optimizer)])
    fill_gradients(model, 3)
    model[0].weight.grad[0, 0] = value
    _, found_inf = optimizer_step(optimizer, torch.tensor(1.0), clip)
    assert found_inf.item() == 1
    for old, new in zip(before, [model.state_dict(), optimizer_state(optimizer)], strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_saved_state_continues_exactly():
    model = small_model()
    optimizer = build_optimizer(decay_groups(model, 0.1), OptimConfig(lr=1e-2))
    for step in range(3):
        fill_gradients(model, step)
        optimizer_step(optimizer, torch.tensor(1.0), None)
    twin = copy.deepcopy(model)
    other = build_optimizer(decay_groups(twin, 0.1), OptimConfig(lr=1e-2))
    load_optimizer_state(other, copy.deepcopy(optimizer_state(optimizer)))
    for m, o in ((model, optimizer), (twin, other)):
        fill_gradients(m, 7)
        optimizer_step(o, torch.tensor(1.0), None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_state_of_another_model_is_refused():
    model = small_model()
    optimizer = build_optimizer(decay_groups(model, 0.1), OptimConfig())
    fill_gradients(model, 0)
    optimizer_step(optimizer, torch.tensor(1.0), None)
    state = optimizer_state(optimizer)
    with pytest.raises(ValueError, match=r"the model lacks, e\.g\. extra\.exp_avg"):
        load_optimizer_state(optimizer, state | {"extra.exp_avg": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"0\.weight\.exp_avg has shape \(3,\)"):
        load_optimizer_state(optimizer, state | {"0.weight.exp_avg": torch.zeros(3)})


class ApexLike(torch.optim.Optimizer):
    """apex's FusedAdam as far as its state goes: two moments per parameter, one step count per group (a Python int).

    The arithmetic is torch's AdamW; the point is the conversion between the two forms of the state.
    """

    def __init__(self, groups, lr, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), t = group["betas"], group["step"]
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s["exp_avg"], s["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                s["exp_avg"].lerp_(p.grad, 1 - beta1)
                s["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (s["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
                with torch.no_grad():
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] / (1 - beta1**t) * s["exp_avg"] / denominator)


@pytest.mark.parametrize("first", ["torch", "apex"])
def test_state_moves_between_torch_and_apex_forms(first):
    """Three steps with one form, three with the other, against six with torch's."""
    config = OptimConfig(lr=1e-2)

    def build(model, impl):
        groups = decay_groups(model, 0.1)
        if impl == "torch":
            return build_optimizer(groups, config)
        for group in groups:
            group["lr_scale"] = 1.0
        return ApexLike(groups, config.lr, config.betas, config.eps, adam_w_mode=True)

    mixed, straight = small_model(), small_model()
    optimizers = [build(mixed, first), build(mixed, "apex" if first == "torch" else "torch")]
    reference = build(straight, "torch")
    for step in range(6):
        if step == 3:
            load_optimizer_state(optimizers[1], copy.deepcopy(optimizer_state(optimizers[0])))
        for model, optimizer in ((mixed, optimizers[step // 3]), (straight, reference)):
            fill_gradients(model, step)
            optimizer_step(optimizer, torch.tensor(2.0), 1.0)
    for a, b in zip(mixed.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "apex is not installed"),
        # as the index's package of that name is laid out: it needs Pyramid to be imported, and has no optimizers
        (
            {"apex/__init__.py": "import pyramid_is_missing", "apex/lib/__init__.py": "", "apex/models.py": ""},
            "not NVIDIA's",
        ),
        (
            {"apex/__init__.py": "", "apex/optimizers/__init__.py": "import gone"},
            "cannot be imported (No module named 'gone')",
        ),
        ({"apex/__init__.py": "", "apex/optimizers/__init__.py": "class FusedAdam: pass"}, "no CUDA extensions"),
        ({"apex.py": ""}, "the apex installed at {}/apex.py is not NVIDIA's"),
        ({"apex/x.py": "", "second/apex/y.py": ""}, "the apex installed at {}/apex is not NVIDIA's"),
    ],
)
def test_wrong_apex_is_one_line(files, message, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "second")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(ModuleNotFoundError) as caught:
            load_apex()
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
            del sys.modules[name]
    assert message.format(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "--optim.impl torch" in str(caught.value)


@pytest.mark.slow
def test_the_very_package_of_that_name(tmp_path, environment):
    """`pip install apex`, where an index is at hand; without its own dependencies and with them it is told apart."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--pre",
        "--target",
        str(tmp_path),
        "apex==0.9.10.dev0",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        pytest.skip(f"the package cannot be fetched here: {done.stderr.strip().splitlines()[-1:]}")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom beit_fast.train.optim import load_apex\nload_apex()"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
    assert "is not NVIDIA's" in done.stderr.splitlines()[-1]


def test_loss_scale_follows_torch_grad_scaler():
    """The same sequence of overflows, with a short growth interval, gives torch's own scales."""
    ours = LossScaler(CPU, enabled=True, initial=1024.0, interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for bad in [0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]:
        parameter.grad = torch.tensor([float("inf") if bad else 1.0])
        theirs.scale(torch.ones(()))
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(float(bad)))
        assert float(ours.scale) == theirs.get_scale()
    again = LossScaler(CPU, enabled=True)
    assert again.state()["scale"] == torch.amp.GradScaler("cpu").get_scale()
    assert again.interval == torch.amp.GradScaler("cpu").get_growth_interval()
    again.load(ours.state())
    assert again.state() == ours.state()
    off = LossScaler(CPU, enabled=False)
    off.load(ours.state())
    off.update(torch.tensor(1.0))
    assert off.state() == {"scale": 1.0, "clean_steps": 0.0}
