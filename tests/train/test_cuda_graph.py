"""A recorded step against the same step unrecorded; without a GPU, recorded and repeated operator by operator."""

import dataclasses
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from beit_fast.kernels import registration
from beit_fast.train import engine
from beit_fast.train.config import LogConfig, OptimConfig
from beit_fast.train.cuda_graph import CapturedStep, CudaRecorder, check_cuda_graph
from beit_fast.train.distributed.world import World
from beit_fast.train.metrics import read_metrics
from beit_fast.train.tasks.pretrain import (
    DataConfig,
    MaskedImageModeling,
    MaskingConfig,
    ModelConfig,
    PretrainConfig,
    TokenizerConfig,
)

CPU = torch.device("cpu")
WAITS = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}
"""Operators that make the host wait for a GPU, or whose result has a shape that only the values tell."""


class Tape(TorchDispatchMode):
    """Records every operator with the very tensors it read and wrote; `repeat` computes into those tensors again.

    Like a CUDA graph it knows nothing of Python: what was a number on the host then is that number forever.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @property
    def names(self):
        return {function.overloadpacket.__name__ for function, *_ in self.calls}

    @torch.no_grad()
    def repeat(self):
        for function, args, kwargs, written in self.calls:
            for old, new in zip(tree_leaves(written), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """What `CudaRecorder` is on a GPU. Recording computes here, so what it changed is put back."""

    def __init__(self, state):
        self.state = state
        self.tape = Tape()

    def on_its_stream(self):
        return nullcontext()

    def warm_up(self, function):
        return function()

    def record(self, function):
        state = self.state()
        before, generator = [t.clone() for t in state], torch.get_rng_state()
        with self.tape:
            outputs = function()
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(generator)
        return self.tape.repeat, outputs


def registered(op, *args, **kwargs):
    """A call through the dispatcher, as of an op on a GPU: one operation, whatever it does within."""
    return op._registered(*args, **kwargs)


@pytest.fixture
def recorded(monkeypatch):
    """Runs whose steps are recorded on tape: `with recorded() as recorders: engine.run(...)`."""

    @contextmanager
    def use():
        made = []
        prepare = engine.TrainingRun.prepare

        def state_of(run):
            slots = [t for state in run.optimizer.state.values() for t in state.values()]
            return [
                *run.module.parameters(),
                *slots,
                run.scaler.scale,
                run.scaler.clean_steps,
                *(run.ema or {}).values(),
            ]

        def recording(run, found):
            prepare(run, found)
            made.append(TapeRecorder(lambda: state_of(run)))
            run.compute.record_with(made[-1])

        with monkeypatch.context() as patch:
            patch.setattr(engine.TrainingRun, "prepare", recording)
            # the ops as a GPU sees them: one each, whatever they do within
            patch.setattr(registration.FusedOp, "__call__", registered)
            yield made

    return use


def metrics(folder):
    keys = ("loss", "accuracy", "grad_norm", "loss_scale", "skipped_steps", "held_out_loss")
    return [{k: line[k] for k in keys if k in line} for line in read_metrics(folder / "metrics.jsonl")]


def same(plain, recorded, weights):
    """To rounding: MKL's last bit depends on where a buffer begins."""
    for expected, found in zip(metrics(plain.output_dir), metrics(recorded.output_dir), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    (step, expected), (found_step, found) = weights(plain.output_dir), weights(recorded.output_dir)
    assert step == found_step
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if name != "model/steps":
            x, y = (torch.frombuffer(bytearray(v), dtype=torch.float32) for v in (value, found[name]))
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def pretraining(tmp_path):
    """A small pre-training on the built-in images, everything switched on that changes from step to step."""
    return PretrainConfig(
        output_dir=tmp_path / "plain",
        steps=8,
        batch_size=4,
        batch_per_device=4,
        data=DataConfig(builtin_images=16, builtin_size=48, cache_dir=str(tmp_path / "images"), threads=1),
        model=ModelConfig(size="tiny", image_size=64, width=48, num_heads=3, depth=2, drop_path_rate=0.3),
        masking=MaskingConfig(num_masked=6, min_num_patches=2),
        tokenizer=TokenizerConfig(name="demo"),
        optim=OptimConfig(lr=1e-2, warmup_steps=3, clip_grad=0.5, ema_decay=0.9),
        log=LogConfig(every_steps=1, progress="none"),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_recorded_pretraining_is_the_same(pretraining, recorded, weights, checkpointing):
    """Loss, clipped gradients, learning rates of the schedule, drop path by sample, averaged weights."""
    model = dataclasses.replace(pretraining.model, grad_checkpointing=checkpointing)
    config = dataclasses.replace(pretraining, model=model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration.FusedOp, "__call__", registered)
        engine.run(MaskedImageModeling(config))
    again = dataclasses.replace(config, output_dir=config.output_dir.with_name("recorded"))
    with recorded() as recorders:
        engine.run(MaskedImageModeling(again))
    (recorder,) = recorders
    assert {"attention", "masked_cross_entropy", "_fused_adamw_", "lerp_"} <= recorder.tape.names
    same(config, again, weights)


def test_random_numbers_and_skipped_steps_are_the_same(tiny, tmp_path, recorded, weights):
    """Dropout from torch's generator, and a step that is skipped on the device."""

    class Task(tiny.TinyTask):
        """Its bad steps come with the data: a graph cannot know the number of the step."""

        def batches(self, requests):
            for step, batch in enumerate(super().batches(requests)):
                yield tiny.TinyBatch(batch.features[:8] * (float("nan") if step == 6 else 1), batch.targets[:8])

        def prepare(self, batch, step):
            return batch

        def loss(self, model, batch, num_targets):
            self.bad = False
            found = super().loss(model, batch, num_targets)
            return found._replace(sums={"correct": found.sums["correct"], "targets": torch.full((), 8.0)})

    optim = OptimConfig(lr=1e-2, warmup_epochs=0.4, ema_decay=0.9)
    plain = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "plain", dropout=0.3, precision="bf16", optim=optim)
    engine.run(Task(plain))
    again = dataclasses.replace(plain, output_dir=tmp_path / "recorded")
    with recorded() as recorders:
        engine.run(Task(again))
    assert recorders[0].tape.calls
    assert sum(line.get("skipped_steps", 0) for line in metrics(plain.output_dir)) == 1
    same(plain, again, weights)


def test_the_comparison_sees_what_a_graph_would_freeze(tiny, tmp_path, recorded, weights):
    """A number of the host in the step must make the two differ."""

    class Task(tiny.TinyTask):
        def batches(self, requests):
            for batch in super().batches(requests):
                yield tiny.TinyBatch(batch.features[:8], batch.targets[:8])

        def prepare(self, batch, step):
            self.step = step
            return batch

        def loss(self, model, batch, num_targets):
            self.bad = False
            found = super().loss(model, batch, num_targets)
            return found._replace(loss=found.loss * (1 + self.step))

    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "plain")
    engine.run(Task(config))
    again = dataclasses.replace(config, output_dir=tmp_path / "recorded")
    with recorded():
        engine.run(Task(again))
    with pytest.raises(AssertionError):
        same(config, again, weights)


def test_nothing_in_a_step_waits_for_the_device(pretraining, monkeypatch):
    """From the batch to the sums of the log, tokenizer included; ops count as one, as on a GPU."""
    monkeypatch.setattr(registration.FusedOp, "__call__", registered)
    copied = []
    for name in ("tensor", "as_tensor"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, made=made, **k: copied.append(a) or made(*a, **k))
    tapes, train_step = [], engine.TrainingRun.train_step

    def watched(run, group):
        copied.clear()
        with Tape() as tape:
            train_step(run, group)
        tapes.append(tape)
        assert not copied, "a number was copied to the device, which waits for it"

    monkeypatch.setattr(engine.TrainingRun, "train_step", watched)
    engine.run(MaskedImageModeling(pretraining))
    assert len(tapes) == 8
    assert {"convolution", "argmax", "attention", "_fused_adamw_"} <= tapes[-1].names
    assert not tapes[-1].names & WAITS


def test_the_check_sees_a_wait():
    with Tape() as tape:
        torch.ones(3).nonzero()
        torch.ones(()).item()
    assert tape.names & WAITS == {"nonzero", "_local_scalar_dense"}


def captured(function, warm_up=1):
    return CapturedStep(function, CPU, warm_up, TapeRecorder(list))


def test_inputs_are_copied_and_outputs_are_fresh():
    step = captured(lambda x: {"twice": 2 * x[0], "text": x[1]})
    given = [(torch.full((3,), float(i)), "same") for i in range(4)]
    found = [step(x) for x in given]
    assert [f["twice"].tolist() for f in found] == [[2.0 * i] * 3 for i in range(4)]
    assert [x[0][0].item() for x in given] == [0, 1, 2, 3]
    assert found[0]["text"] == "same"


@pytest.mark.parametrize(
    "other", [(torch.zeros(4), 1), (torch.zeros(3, dtype=torch.int64), 1), (torch.zeros(3), 2), (torch.zeros(3),)]
)
def test_inputs_that_change_are_refused(other):
    step = captured(lambda x: x[0] + 1)
    step((torch.zeros(3), 1))
    with pytest.raises(ValueError, match=r"this step's inputs are .*leave out --cuda-graph where they change"):
        step(other)


def test_inputs_in_which_no_tensors_are_seen_are_refused():
    @dataclasses.dataclass
    class Hidden:
        x: torch.Tensor

    with pytest.raises(TypeError, match="hold a Hidden, in which no tensors can be found"):
        captured(lambda x: x)(Hidden(torch.zeros(3)))


@pytest.mark.parametrize(
    ("device", "changes", "world", "message"),
    [
        ("cpu", {}, 1, "needs a GPU, and this run is on the cpu"),
        ("cuda", {"parallel": "fsdp2"}, 2, "works with --parallel ddp only"),
        ("cuda", {"optim": OptimConfig(impl="apex")}, 1, "works with --optim.impl torch only"),
        ("cuda", {"batch_per_device": 2}, 1, "this one has 2: --batch-per-device 4"),
    ],
)
def test_what_cannot_be_recorded_is_refused(pretraining, device, changes, world, message):
    config = dataclasses.replace(pretraining, cuda_graph=True, **changes)
    with pytest.raises(ValueError, match=f"--cuda-graph .*{message}"):
        check_cuda_graph(MaskedImageModeling(config), World(0, world, torch.device(device)))


def test_a_run_on_a_cpu_refuses_in_one_line(pretraining):
    config = dataclasses.replace(pretraining, cuda_graph=True)
    with pytest.raises(ValueError, match="--cuda-graph needs a GPU"):
        engine.run(MaskedImageModeling(config))
    with pytest.raises(ValueError, match="masks of one size"):
        dataclasses.replace(config, masking=dataclasses.replace(config.masking, mode="official"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile_blocks", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_on_a_gpu_the_losses_are_the_same(pretraining, precision, compile_blocks):
    config = dataclasses.replace(pretraining, precision=precision, compile=compile_blocks, steps=12)
    engine.run(MaskedImageModeling(config))
    again = dataclasses.replace(config, output_dir=config.output_dir.with_name("graph"), cuda_graph=True)
    engine.run(MaskedImageModeling(again))
    assert metrics(config.output_dir) == metrics(again.output_dir)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_random_numbers_are_those_of_the_seed():
    """A replay draws what the generator, seeded before it, would have given without a graph."""
    device = torch.device("cuda", torch.cuda.current_device())
    step = CapturedStep(lambda x: torch.nn.functional.dropout(x, 0.5) * x, device, 2, CudaRecorder(device))
    x = torch.ones(64, 64, device=device)
    for seed in range(6):
        torch.manual_seed(seed)
        expected = torch.nn.functional.dropout(x, 0.5) * x
        torch.manual_seed(seed)
        assert torch.equal(step(x), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_step_waits_for_nothing(pretraining, monkeypatch):
    train_step = engine.TrainingRun.train_step

    def watched(run, group):
        torch.cuda.set_sync_debug_mode("error" if run.step > 3 else "default")
        try:
            train_step(run, group)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine.TrainingRun, "train_step", watched)
    engine.run(MaskedImageModeling(pretraining))
