"""Every option of training arrives at the code that acts on it: what a run of the option is made of, part by part.

`made` builds a whole run from a command line and stops before its first step; what it was about to do is looked at.
Options whose effect lies in files, logs or numbers of whole runs are shown in the tests of those.
"""

import datetime
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from musubi_tuner.config.errors import UserError
from musubi_tuner.data.batches import CachedBatches
from musubi_tuner.flow import weighting
from musubi_tuner.flow.timesteps import Distribution, TimestepShape, distribution
from musubi_tuner.optim.schedules import curve
from musubi_tuner.training import assemble, checks, run
from musubi_tuner.training.loop import Plan, Rate
from musubi_tuner.training.machine import MachineOptions, prepare_machine
from musubi_tuner.training.step import Step
from training_place import FAMILY, make_place, options_of


@dataclass
class Made:
    """What a run was about to do."""

    step: Step
    source: CachedBatches
    plan: Plan
    rate: Rate | None
    compiled: Any = None

    @property
    def times(self) -> Distribution:
        return self.step.draws.distribution((16, 1, 8, 8))

    def rates(self, steps: int) -> list[float]:
        """The rate of the first group at every step."""
        found = []
        for number in range(steps):
            self.rate(self.step.optimizer, number)
            found.append(self.step.optimizer.param_groups[0]["lr"])
        return found


def transformer(found: Made) -> torch.nn.Module:
    """The transformer inside a run's `predict`."""
    return next(c.cell_contents for c in found.step.predict.__closure__ if isinstance(c.cell_contents, torch.nn.Module))


class _StopHere(Exception):
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def made(place, tmp_path, monkeypatch):
    """A function from words of a command line to what the run of these is made of."""

    def make(*words: str) -> Made:
        seen: dict[str, Any] = {}

        def instead(step, source, plan, *, rate=None, **_more):
            seen.update(step=step, source=source, plan=plan, rate=rate)
            raise _StopHere

        monkeypatch.setattr(run, "train", instead)
        monkeypatch.setattr(assemble, "compile_blocks", lambda _dit, _lists, settings: seen.update(compiled=settings))
        with pytest.raises(_StopHere):
            run.run(FAMILY, options_of(place, tmp_path / "out", *words))
        return Made(**seen)

    return make


SAMPLERS = {
    "sigma": ([], {}),
    "uniform": ([], {}),
    "sigmoid": (["--sigmoid_scale", "1.7"], {"sigmoid_scale": 1.7}),
    "shift": (["--discrete_flow_shift", "3.0", "--sigmoid_scale", "0.8"], {"shift": 3.0, "sigmoid_scale": 0.8}),
    "flux_shift": (["--sigmoid_scale", "1.2"], {"sigmoid_scale": 1.2}),
    "qwen_shift": ([], {}),
    "logsnr": (["--logit_mean", "-6.0", "--logit_std", "2.0"], {"logit_mean": -6.0, "logit_std": 2.0}),
    "qinglong_flux": (["--logit_mean", "-6.0", "--logit_std", "2.0"], {"logit_mean": -6.0, "logit_std": 2.0}),
    "qinglong_qwen": (["--logit_mean", "1.0"], {"logit_mean": 1.0}),
}
U = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)


@pytest.mark.shows("timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "logit_mean", "logit_std")
def test_every_sampler_draws_its_own_distribution(made):
    quantiles = {}
    for name, (words, shape) in SAMPLERS.items():
        times = made("--timestep_sampling", name, *words).times
        quantiles[name] = times.quantile(U)
        assert torch.equal(quantiles[name], distribution(name, (16, 1, 8, 8), TimestepShape(**shape)).quantile(U)), name
    assert len({tuple(q.tolist()) for q in quantiles.values()}) == len(SAMPLERS)


@pytest.mark.shows("mode_scale", "weighting_scheme")
def test_a_scheme_shapes_sigma_or_weighs_the_loss(made):
    for words, shape in (
        (["mode", "--mode_scale", "0.7"], {"density": "mode", "mode_scale": 0.7}),
        (["logit_normal", "--logit_mean", "0.5"], {"density": "logit_normal", "logit_mean": 0.5}),
    ):
        found = made("--timestep_sampling", "sigma", "--weighting_scheme", *words)
        assert torch.equal(
            found.times.quantile(U), distribution("sigma", (1, 1, 8, 8), TimestepShape(**shape)).quantile(U)
        )
        assert found.step.weight is None
    for name in ("sigma_sqrt", "cosmap"):
        assert made("--weighting_scheme", name).step.weight is getattr(weighting, name)


@pytest.mark.shows("min_timestep", "max_timestep", "preserve_distribution_shape")
def test_the_range_squeezes_or_cuts(made):
    words = ["--timestep_sampling", "shift", "--discrete_flow_shift", "3.0", "--min_timestep", "500"]
    whole = made(*words[:4]).times
    squeezed = made(*words, "--max_timestep", "900").times.quantile(U)
    torch.testing.assert_close(squeezed, 0.5 + 0.4 * whole.quantile(U))
    cut = made(*words, "--max_timestep", "900", "--preserve_distribution_shape").times.quantile(U)
    low, high = (float(whole.cdf(torch.tensor(end, dtype=torch.float64))) for end in (0.5, 0.9))
    torch.testing.assert_close(cut, whole.quantile(low + (high - low) * U))


@pytest.mark.shows("num_timestep_buckets")
def test_an_epoch_uses_every_bucket_alike(made):
    found = made("--timestep_sampling", "uniform", "--num_timestep_buckets", "5")
    for epoch in (1, 2):
        t = torch.cat([found.step.draws.t(batch) for batch in found.source.epoch(epoch)])
        assert sorted((t * 5).floor().tolist()) == [0, 1, 2, 3, 4]


def test_the_model_is_told_an_offset_of_t_where_one_is_asked_for(made):
    assert made().step.timestep_offset == 0
    assert made("--timestep_offset", "1").step.timestep_offset == 1


CURVES = {
    "constant_with_warmup": (["--lr_warmup_steps", "4"], {"warmup": 4}),
    "linear": (["--lr_warmup_steps", "10%"], {"warmup": 0.1}),
    "cosine_with_restarts": (["--lr_scheduler_num_cycles", "3"], {"cycles": 3}),
    "polynomial": (["--lr_scheduler_power", "2.5"], {"power": 2.5}),
    "inverse_sqrt": (["--lr_scheduler_timescale", "7", "--lr_warmup_steps", "3"], {"timescale": 7, "warmup": 3}),
    "cosine_with_min_lr": (["--lr_scheduler_min_lr_ratio", "0.2"], {"min_ratio": 0.2}),
    "warmup_stable_decay": (["--lr_decay_steps", "0.25", "--lr_warmup_steps", "2"], {"decay": 0.25, "warmup": 2}),
    "rex": (["--lr_scheduler_args", "rex_alpha=0.5", "rex_beta=0.5"], {"args": {"rex_alpha": 0.5, "rex_beta": 0.5}}),
}


@pytest.mark.shows(
    "lr_scheduler",
    "lr_scheduler_args",
    "lr_warmup_steps",
    "lr_decay_steps",
    "lr_scheduler_num_cycles",
    "lr_scheduler_power",
    "lr_scheduler_timescale",
    "lr_scheduler_min_lr_ratio",
    "learning_rate",
)
def test_schedules_read_their_own_options(made):
    words = ["--max_train_steps", "20", "--learning_rate", "3e-3"]
    for name, (own, arguments) in CURVES.items():
        factor, plain = curve(name, steps=20, rate=3e-3, **arguments), None
        if name not in ("cosine_with_min_lr", "warmup_stable_decay"):
            plain = [curve(name, steps=20, rate=3e-3)(step) for step in range(20)]
        rates = made(*words, "--lr_scheduler", name, *own).rates(20)
        assert rates == pytest.approx([3e-3 * factor(step) for step in range(20)], rel=1e-12), name
        assert plain is None or rates != pytest.approx([3e-3 * f for f in plain]), f"{name}: {own} changes nothing"


@pytest.mark.shows("max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "max_data_loader_n_workers")
def test_lengths_and_readers(made):
    assert made("--max_train_steps", "7").plan == Plan(7, 1)
    assert made("--max_train_epochs", "4", "--gradient_accumulation_steps", "2").plan == Plan(8, 2)  # 3 batches
    assert made("--max_data_loader_n_workers", "1").source.workers == 1
    assert made("--max_data_loader_n_workers", "0").source.workers == 0


@pytest.mark.shows("mixed_precision", "max_grad_norm", "optimizer_type", "optimizer_args")
def test_precision_clipping_and_optimizer(made):
    found = made("--mixed_precision", "bf16", "--max_grad_norm", "0.25", "--optimizer_args", "betas=(0.8,0.95)")
    assert (found.step.runtime.dtype, found.step.max_grad_norm) == (torch.bfloat16, 0.25)
    assert found.step.optimizer.param_groups[0]["betas"] == (0.8, 0.95)
    words = ["--optimizer_type", "torch.optim.RMSprop", "--optimizer_args", "momentum=0.5", "--max_grad_norm", "0"]
    found = made("--mixed_precision", "no", *words)
    assert type(found.step.optimizer) is torch.optim.RMSprop
    assert (found.step.runtime.dtype, found.step.max_grad_norm) == (None, 0)


@pytest.mark.shows("network_dim", "network_alpha", "network_dropout", "network_module", "network_args")
def test_the_adapter_is_as_asked_for(made, caplog):
    with caplog.at_level(logging.INFO):
        found = made("--network_dim", "3", "--network_module", "networks.lora", "--network_args", "verbose=True")
    assert {min(p.shape) for p in found.step.parameters} == {3}
    assert "blocks.2.ffn.2" in caplog.text
    few = made("--network_args", "include_patterns=[r'blocks\\.1\\.ffn.*']")
    assert len(few.step.parameters) == 4
    plus = made("--network_args", "loraplus_lr_ratio=4", "--network_alpha", "2")
    assert [g["lr"] / 1e-2 for g in plus.step.optimizer.param_groups] == pytest.approx([1, 4])
    batch = next(found.source.epoch(1))
    losses = {}
    for name, words in {
        "plain": [],
        "alpha": ["--network_alpha", "4"],
        "dropout": ["--network_dropout", "0.5"],
    }.items():
        step = made(*words).step
        with torch.no_grad():
            for parameter in step.parameters:
                parameter.fill_(0.05)
            losses[name] = float(step.loss(batch))
    assert len(set(losses.values())) == 3


@pytest.mark.shows("gradient_checkpointing", "gradient_checkpointing_cpu_offload")
def test_checkpointing_runs_the_blocks_again(made, monkeypatch):
    asked, wrapped = [], assemble.checkpointed
    monkeypatch.setattr(assemble, "checkpointed", lambda r, *, cpu_offload: asked.append(cpu_offload) or wrapped(r))
    counts = []
    once = ["--gradient_checkpointing"]
    for words in ([], once, [*once, "--gradient_checkpointing_cpu_offload"]):
        found, calls = made(*words), []
        for block in transformer(found).blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(0))
        found.step.loss(next(found.source.epoch(1))).backward()
        counts.append(len(calls))
    assert counts == [3, 6, 6]
    assert asked == [False, True]


@pytest.mark.shows(
    "compile",
    "compile_backend",
    "compile_mode",
    "compile_dynamic",
    "compile_fullgraph",
    "compile_cache_size_limit",
    "dynamo_backend",
    "dynamo_mode",
    "dynamo_fullgraph",
    "dynamo_dynamic",
)
def test_blocks_are_compiled_as_asked_for(made):
    assert made().compiled is None
    words = ["--dynamo_backend", "INDUCTOR", "--dynamo_mode", "max-autotune", "--dynamo_fullgraph", "--dynamo_dynamic"]
    found = made(*words).compiled
    assert (found.backend, found.mode, found.fullgraph, found.dynamic) == ("inductor", "max-autotune", True, True)
    assert made("--dynamo_backend", "INDUCTOR", "--dynamo_mode", "default").compiled.mode is None
    words = ["--compile", "--compile_backend", "aot_eager", "--compile_mode", "reduce-overhead", "--compile_fullgraph"]
    found = made(*words, "--compile_dynamic", "false", "--compile_cache_size_limit", "9").compiled
    assert (found.backend, found.mode, found.fullgraph) == ("aot_eager", "reduce-overhead", True)
    assert (found.dynamic, found.cache_size_limit) == (False, 9)


@pytest.mark.shows("dit_dtype", "full_bf16", "trainable_modules")
def test_weights_have_the_dtype_and_the_part_that_is_asked_for(made):
    dit = transformer(made("--mixed_precision", "bf16", "--dit_dtype", "float32"))
    assert {p.dtype for p in dit.parameters()} == {torch.float32}
    frozen = {p.dtype for p in transformer(made("--mixed_precision", "bf16")).parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    whole = ["--full_finetune", "--mixed_precision", "bf16"]
    assert {p.dtype for p in made(*whole).step.parameters} == {torch.float32}
    for word in (["--full_bf16"], ["--dit_dtype", "bfloat16"]):
        assert {p.dtype for p in made(*whole, *word).step.parameters} == {torch.bfloat16}
    part = made(*whole, "--trainable_modules", "blocks.1.", "head")
    assert 0 < len(part.step.parameters) < len(made(*whole).step.parameters) / 2
    trained = {n for n, p in transformer(part).named_parameters() if p.requires_grad}
    assert all("blocks.1." in name or "head" in name for name in trained)
    assert len(trained) == len(part.step.parameters)


def test_parts_of_a_whole_model_are_saved_with_the_rest(place, tmp_path):
    """In bfloat16, with a state that goes on."""
    words = ["--full_finetune", "--full_bf16", "--mixed_precision", "bf16", "--trainable_modules", "ffn"]
    run.run(FAMILY, options_of(place, tmp_path, *words, "--max_train_steps", "2", "--save_state_on_train_end"))
    before, after = load_file(place / "dit.safetensors"), load_file(tmp_path / "study.safetensors")
    changed = {key for key in before if not torch.equal(before[key].bfloat16(), after[key].bfloat16())}
    assert changed
    assert all("ffn" in key for key in changed)
    with safe_open(tmp_path / "study.safetensors", "pt") as file:
        assert file.metadata()["ss_full_bf16"] == "True"
    more = ["--max_train_steps", "3", "--resume", str(tmp_path / "study-state")]
    run.run(FAMILY, options_of(place, tmp_path, *words, *more))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--full_bf16", "--full_finetune"], "bfloat16 weights need --mixed_precision bf16"),
        (["--dit_dtype", "bfloat16"], "bfloat16 weights need --mixed_precision bf16"),
        (["--full_finetune", "--trainable_modules", "blokcs"], "has 'blokcs' in its name; did you mean blocks"),
        (["--full_finetune", "--full_bf16", "--dit_dtype", "float32"], "contradict each other"),
        (["--full_finetune", "--dit_dtype", "float16"], "use bfloat16 or float32"),
        (["--full_fp16"], "use --full_bf16"),
    ],
)  # fmt: skip
@pytest.mark.shows("full_fp16", "sage_attn")
def test_precisions_that_cannot_be_trained_in_are_told(place, tmp_path, words, sentence):
    with pytest.raises(UserError, match=sentence):
        run.run(FAMILY, options_of(place, tmp_path, *words))
    with pytest.raises(UserError, match="sageattn has no backward pass"):
        checks.check(options_of(place, tmp_path, "--sage_attn"))


@pytest.mark.shows("ddp_timeout", "cuda_allow_tf32", "cuda_cudnn_benchmark")
def test_switches_of_the_machine(monkeypatch, caplog):
    import accelerate

    given = {}

    class State:
        device, num_processes, process_index = torch.device("cpu"), 1, 0

        def __init__(self, **more):
            given.update(more)

    monkeypatch.setattr(accelerate, "PartialState", State)
    run_options = MachineOptions(ddp_timeout=90)
    from musubi_tuner.training.runtime import launched

    launched("no", run_options.timeout)
    assert given["timeout"] == datetime.timedelta(minutes=90)

    def switches() -> tuple[bool, ...]:
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark

    def switch(products: bool, convolutions: bool, benchmark: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions
        torch.backends.cudnn.benchmark = benchmark

    before = switches()
    try:
        switch(False, False, False)
        prepare_machine(MachineOptions(), torch.device("cpu"))
        assert (switches(), caplog.text) == ((False, False, False), "")
        prepare_machine(MachineOptions(cuda_allow_tf32=True), torch.device("cpu"))
        assert switches() == (True, True, False)
        prepare_machine(MachineOptions(cuda_cudnn_benchmark=True), torch.device("cuda"))
        assert switches() == (True, True, True)
    finally:
        switch(*before)
    assert "cuda_allow_tf32: no effect on cpu" in caplog.text
    assert "benchmark" not in caplog.text


CARD = {
    "metadata_title": "Red brush",
    "metadata_author": "me",
    "metadata_description": "strokes",
    "metadata_license": "CC-BY-4.0",
    "metadata_tags": "brush,red",
}


@pytest.mark.shows(
    "metadata_title",
    "metadata_author",
    "metadata_description",
    "metadata_license",
    "metadata_tags",
    "metadata_reso",
    "metadata_arch",
    "save_precision",
)
def test_the_card_of_a_file_is_the_users(place, tmp_path):
    words = [word for key, value in CARD.items() for word in (f"--{key}", value)]
    words += ["--metadata_reso", "960x544", "--metadata_arch", "own/lora", "--save_precision", "bf16"]
    run.run(FAMILY, options_of(place, tmp_path, "--max_train_steps", "1", *words))
    with safe_open(tmp_path / "study.safetensors", "pt") as file:
        told = {key.removeprefix("modelspec."): v for key, v in file.metadata().items() if key.startswith("modelspec.")}
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118 -- not a mapping
    expected = {key.removeprefix("metadata_"): value for key, value in CARD.items()}
    assert (expected | {"resolution": "960x544", "architecture": "own/lora"}).items() <= told.items()
