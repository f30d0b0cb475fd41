"""Learning-rate curves against measured ones, step by step."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.optim.build import build_optimizer, parse_arguments, scheduler_class
from musubi_tuner.optim.schedules import SCHEDULES, Schedule, SchedulerClass, curve, steps_or_ratio

CASES = json.loads((Path(__file__).parents[1] / "data/reference/behaviour/lr_schedulers.json").read_text())["cases"]
# AdaFactor's relative steps and schedule-free optimizers set their own rate: no curve is laid over them
OWN_RATE = [c for c in CASES if c["config"]["optimizer_type"] in ("AdaFactor", "schedulefree.AdamWScheduleFree")]
BY_CLASS = [c for c in CASES if c["config"]["lr_scheduler_type"]]
BY_NAME = [c for c in CASES if c.get("lr") and c not in OWN_RATE and c not in BY_CLASS]
REFUSED = {"nonsense", "greedy", "reduce_lr_on_plateau", "cosine_warmup_with_min_lr"}


def name_of(case):
    c = case["config"]
    words = [c["lr_scheduler"], c["max_train_steps"], c["lr_warmup_steps"], c["lr_decay_steps"]]
    words += [c["lr_scheduler_num_cycles"], c["lr_scheduler_power"], c["lr_scheduler_min_lr_ratio"]]
    return "-".join(str(w) for w in words)


def factor_of(config):
    return curve(
        config["lr_scheduler"],
        steps=config["max_train_steps"],
        processes=config["num_processes"],
        warmup=config["lr_warmup_steps"],
        decay=config["lr_decay_steps"],
        cycles=config["lr_scheduler_num_cycles"],
        power=config["lr_scheduler_power"],
        timescale=config["lr_scheduler_timescale"],
        min_ratio=config["lr_scheduler_min_lr_ratio"],
        rate=config["learning_rate"],
        args=parse_arguments(config["lr_scheduler_args"] or [], "lr_scheduler_args"),
    )


def optimizer_of(config):
    rates = config["group_lrs"] or [config["learning_rate"]]
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=config["learning_rate"])


def rates_of(setter, optimizer, count):
    """What each optimiser step would use; the optimizer steps, so that scheduler classes are content."""
    found = []
    for step in range(count):
        setter(optimizer, step)
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
    return torch.tensor(found, dtype=torch.float64)


def expected_of(case):
    lr = torch.tensor(case.get("lr_corrected") or case["lr"], dtype=torch.float64)
    return lr if lr.ndim == 2 else lr[:, None]


@pytest.mark.parametrize("case", BY_NAME, ids=name_of)
def test_curve_equals_the_measured_one(case):
    config = case["config"]
    found = rates_of(Schedule(factor_of(config)), optimizer_of(config), len(case["lr"]))
    torch.testing.assert_close(found, expected_of(case), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case", BY_CLASS, ids=lambda c: c["config"]["lr_scheduler_type"])
def test_scheduler_class_equals_the_measured_one(case):
    config = case["config"]
    optimizer = optimizer_of(config)
    arguments = parse_arguments(config["lr_scheduler_args"], "lr_scheduler_args")
    scheduler = scheduler_class(config["lr_scheduler_type"])(optimizer, **arguments)
    found = rates_of(SchedulerClass(scheduler), optimizer, len(case["lr"]))
    torch.testing.assert_close(found, expected_of(case), rtol=1e-9, atol=1e-15)


def test_every_named_schedule_is_measured():
    assert {c["config"]["lr_scheduler"].lower() for c in BY_NAME} == set(SCHEDULES)


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.get("lr") and c["config"]["optimizer_type"] == "AdamW"], ids=name_of
)
def test_what_the_established_tool_refuses_is_refused(case):
    config = case["config"]
    if config["optimizer_args"]:
        with pytest.raises(UserError, match="foo=bar"):
            parse_arguments(config["optimizer_args"], "optimizer_args")
    elif config["lr_scheduler"] == "adafactor":
        with pytest.raises(UserError, match="adafactor"):
            factor_of(config)
    else:
        with pytest.raises(UserError, match=r"use |needs "):
            factor_of(config)
    assert config["lr_scheduler"] in REFUSED | set(SCHEDULES) | {"adafactor"}


def test_optimizers_of_the_data_are_built():
    built = {}
    for case in CASES:
        c = case["config"]
        kind = c["optimizer_type"] or ""
        if kind.startswith("schedulefree") or c["optimizer_args"] == ["foo=bar"]:
            continue
        arguments = parse_arguments(c["optimizer_args"] or [], "optimizer_args")
        group = {"params": [nn.Parameter(torch.zeros(2))], "name": "unet"}
        built[kind] = build_optimizer(kind, [group], arguments, rate=c["learning_rate"])
        for key, value in arguments.items():
            assert built[kind].param_groups[0][key] == value
    assert type(built[""]) is torch.optim.AdamW  # the help's default; an empty name failed in the established tool
    assert {type(o).__name__ for o in built.values()} == {"AdamW", "SGD", "RMSprop", "Adafactor"}


def test_a_schedule_has_no_memory():
    config = next(c for c in BY_NAME if c["config"]["lr_scheduler"] == "cosine")["config"]
    schedule, optimizer = Schedule(factor_of(config)), optimizer_of(config)
    forward = rates_of(schedule, optimizer, 50)
    schedule(optimizer, 17)
    assert optimizer.param_groups[0]["lr"] == forward[17, 0]


@pytest.mark.parametrize(
    ("text", "value"), [("12%", 0.12), ("0.1", 0.1), ("1", 1), ("100", 100), ("0", 0), ("100%", 1.0)]
)
def test_steps_or_ratio(text, value):
    found = steps_or_ratio(text)
    assert found == pytest.approx(value)
    assert isinstance(found, int) == (value >= 1 and "%" not in text)


@pytest.mark.parametrize("text", ["1.5", "-3", "nan", "ten"])
def test_steps_or_ratio_refuses_what_has_no_meaning(text):
    with pytest.raises(ValueError):  # noqa: PT011 -- float's own words for "ten"
        steps_or_ratio(text)


def test_near_names_are_offered():
    with pytest.raises(UserError, match="did you mean cosine"):
        curve("cosin", steps=10)
    with pytest.raises(UserError, match="did you mean weight_decay"):
        build_optimizer("AdamW", [{"params": [nn.Parameter(torch.zeros(1))]}], {"weight_decy": 0.1}, rate=1e-3)
    with pytest.raises(UserError, match="did you mean AdamW"):
        build_optimizer("AdmW", [{"params": [nn.Parameter(torch.zeros(1))]}], {}, rate=1e-3)
    with pytest.raises(UserError, match="not installed"):
        build_optimizer("my_local_file.Opt", [{"params": [nn.Parameter(torch.zeros(1))]}], {}, rate=1e-3)
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer("AdamW", [{"params": []}], {}, rate=1e-3)
