"""What runs, in which order, once; what is told of failures; what is left to read. The runs are stand-ins."""

import asyncio
import json
import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from launch import compare as command
from ldmole_ds.compare import report
from ldmole_ds.compare.arguments import parse_compare_flags
from ldmole_ds.compare.report import unfinished, write_outputs
from ldmole_ds.compare.run import Slots, run_plan

BASE = ["--model_name_or_path", "unused", "--seeds", "1,2", "--max_steps", "5"]


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """``compare(*flags) -> (plan, failures, page)``, its runs stand-ins; ``compare.log()`` names those that began."""
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n" + Path(__file__).with_name("fake_run.py").read_text())
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(fake))
    for name in ("plot_methods", "plot_sweep"):
        monkeypatch.setattr(report, name, lambda *what: what[-1].write_text(str(what[1])))
    log = tmp_path / "log.txt"
    log.touch()
    for name, value in {"FAKE_LOG": str(log), "FAKE_LORA": "6", "FAKE_OTHERS": "7"}.items():
        monkeypatch.setenv(name, value)

    def run(*flags):
        argv = [*BASE, "--output_dir", str(tmp_path / "out"), *flags]
        own, plan = parse_compare_flags(argv)
        plan.check_finished()
        run.failures, run.stopped = run_plan(plan, own.parallel, 1)
        return plan, run.failures, write_outputs(plan, argv, own.parallel, 1).read_text()

    def begun(devices=False):
        lines = [line.replace(f"{tmp_path}/out/", "") for line in log.read_text().splitlines()]
        return lines if devices else [line.rpartition(" ")[0] for line in lines]

    run.log = begun
    run.forget = lambda: log.write_text("")
    return run


ONE_RATE = ("--methods", "ld-mole,remole", "--learning_rates", "0.01")


def test_the_table_says_what_the_runs_found(compare, tmp_path):
    plan, failures, page = compare(*ONE_RATE)
    assert failures == [] and unfinished(plan) == 0 and "Incomplete" not in page
    assert "100 test rows; chance 0.100." in page
    lora, ldmole, remole = (line for line in page.splitlines() if line.startswith(("| plain", "| LD-", "| ReM")))
    assert lora == (
        "| plain LoRA, equal rank | 0.01 | 0.600 ± 0.000 (0.600, 0.600) | - | 1.00 of 8 | - | 2000 | 100 | 3.00 GB "
        "| 21.00 M |"
    )
    # Ten of a hundred rows are gained in both seeds: the variance over rows, 0.0909, by 100.
    assert "| 0.700 ± 0.000 (0.700, 0.700) | +0.100 ± 0.030 | 2.50 of 8 | 0.50, 0.10 |" in ldmole
    assert remole.split("|")[1] == " ReMoLE "
    assert "![clinc_domains](compare.clinc_domains.png)" in page
    command = "python launch/compare.py --model_name_or_path unused --seeds 1,2 --max_steps 5 --methods ld-mole,remole"
    assert f"`{command} --learning_rates 0.01`" in page
    plot = tmp_path / "out" / "compare.clinc_domains.png"
    assert plot.read_text() == "clinc_domains: test accuracy against cost"
    results = json.loads((tmp_path / "out" / "compare.json").read_text())
    figures = results["tasks"]["clinc_domains"]["methods"]["ld-mole"]
    assert figures["difference"] == pytest.approx(0.1) and figures["seeds"] == [1, 2]
    assert results["setting"]["seeds"] == [1, 2] and results["setting"]["flags"]["max_steps"] == 5


def test_plain_lora_runs_first_and_what_is_done_is_not_run_again(compare):
    compare(*ONE_RATE)
    log = compare.log()
    assert log[0] == "train.py clinc_domains/lora/lr0.01-seed1" and len(log) == len(set(log)) == 6
    compare.forget()
    compare(*ONE_RATE)
    assert compare.log() == []
    compare("--methods", "ld-mole,remole,softmax", "--learning_rates", "0.01", "--seeds", "1,2,3")
    assert len(compare.log()) == 3 + 3  # a third seed for three methods, three of the new one


def test_a_changed_setting_is_refused(compare):
    compare(*ONE_RATE)
    with pytest.raises(ValueError, match=r"lora/lr0.01-seed1 was run with other settings \(max_steps: 5, now 6\)"):
        compare(*ONE_RATE, "--max_steps", "6")
    with pytest.raises(ValueError, match="r: not set, now 4"):
        compare(*ONE_RATE, "--r", "4")


def test_each_method_takes_its_best_rate(compare):
    _, _, page = compare("--methods", "ld-mole", "--learning_rates", "0.01,0.02,0.04")
    assert "| LD-MoLE | 0.02 | 0.700" in page and "| LD-MoLE | 0.500 | 0.900 | 0.500 |" in page
    log = compare.log()
    assert [line for line in log if line.startswith("evaluate.py")] == [
        "evaluate.py clinc_domains/lora/select-lr0.02-seed1",
        "evaluate.py clinc_domains/ld-mole/select-lr0.02-seed1",
    ]
    assert len(log) == 2 * (3 + 1 + 1)
    compare.forget()
    compare("--methods", "ld-mole", "--learning_rates", "0.01,0.02,0.04")
    assert compare.log() == []


def test_a_failure_is_told_and_loses_nothing_else(compare, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_FAIL", "relu")
    plan, failures, page = compare(*ONE_RATE)
    assert [cell.settings["seed"] for cell in failures] == [1, 2] and "2 runs are not done or failed" in page
    told = capfd.readouterr().out
    assert "FAILED clinc_domains remole lr 0.01 seed 1: exit code 1" in told and "out of memory, says the fake" in told
    assert "| LD-MoLE | 0.01 | 0.700" in page and "| ReMoLE" not in page
    monkeypatch.delenv("FAKE_FAIL")
    compare.forget()
    _, failures, page = compare(*ONE_RATE)
    assert failures == [] and "| ReMoLE | 0.01 | 0.700" in page and len(compare.log()) == 2


def test_without_signal_nothing_more_is_run(compare, monkeypatch):
    monkeypatch.setenv("FAKE_LORA", "1")
    plan, failures, page = compare(*ONE_RATE)
    assert compare.log() == ["train.py clinc_domains/lora/lr0.01-seed1"] and unfinished(plan) == 0
    assert "| clinc_domains | 0.100 | 0.100 | 0.0 | 100 |" in page and "## No signal" in page and not failures


def test_a_sweep_has_a_curve(compare, tmp_path):
    sweep = ("--sweep", "target_num_experts", "--sweep_values", "1,4", "--sparsity_loss_weight", "1")
    _, _, page = compare(*sweep, "--learning_rates", "0.01")
    assert "| target_num_experts 4 | 0.01 | 0.700" in page and page.startswith("# Sweep of target_num_experts")
    assert (tmp_path / "out" / "compare.clinc_domains.png").read_text() == "target_num_experts"


def test_runs_beside_each_other_have_a_gpu_each(compare, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("FAKE_SLEEP", "0.3")
    compare(*ONE_RATE, "--parallel", "2")
    assert {line.rpartition(" ")[2] for line in compare.log(devices=True)} == {"0", "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,8")
    compare.forget()
    compare(*ONE_RATE, "--parallel", "2", "--seeds", "1,2,3")
    assert {line.rpartition(" ")[2] for line in compare.log(devices=True)} == {"5", "7"}


def test_stopped_and_gone_on_with(compare, monkeypatch):
    """SIGTERM ends the runs; what was done stays done, and the rest runs later."""
    monkeypatch.setenv("FAKE_SLEEP", "0.5")

    def stop_when_the_third_begins():  # of two at a time: one is done then
        while len(compare.log()) < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_the_third_begins, daemon=True).start()
    _, failures, page = compare(*ONE_RATE, "--parallel", "2")
    begun = compare.log()
    assert compare.stopped and failures == [] and "Incomplete" in page and 0 < len(begun) < 6
    monkeypatch.setenv("FAKE_SLEEP", "0")
    compare.forget()
    _, _, page = compare(*ONE_RATE)
    again = compare.log()
    assert not compare.stopped and "Incomplete" not in page
    assert set(begun) | set(again) > set(begun) and len(again) < 6 and len(set(begun + again)) == 6


def test_what_an_unfinished_run_with_other_settings_left_goes(compare, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "lora")
    compare(*ONE_RATE)
    left = tmp_path / "out" / "clinc_domains" / "lora" / "lr0.01-seed1" / "checkpoint-3"
    left.mkdir()
    compare(*ONE_RATE)
    assert left.is_dir()  # the same settings: training goes on from it
    compare(*ONE_RATE, "--r", "4")
    assert not left.exists()


def test_a_dry_run_runs_nothing(compare, tmp_path, monkeypatch, capsys):
    compare("--methods", "ld-mole", "--learning_rates", "0.01")
    compare.forget()
    command.main([*BASE, *ONE_RATE, "--output_dir", str(tmp_path / "out"), "--dry_run"])
    listed = capsys.readouterr().out
    assert compare.log() == [] and listed.count("done   ") == 4 and listed.count("to do  ") == 2
    assert "--router relu" in listed
    left = []
    monkeypatch.setattr(command, "leave", left.append)
    monkeypatch.setenv("FAKE_FAIL", "relu")
    command.main([*BASE, *ONE_RATE, "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert left == [1] and "error: 2 runs failed:\n    clinc_domains remole lr 0.01 seed 1: " in said.err
    command.main([*BASE, *ONE_RATE, "--output_dir", str(tmp_path / "out"), "--tables_only"])
    assert left == [1] and len(compare.log()) == 2


def test_the_lowest_turn_is_next():
    async def order():
        slots, done = Slots(1), []

        async def job(turn):
            async with slots.taken(turn):
                await asyncio.sleep(0)
                done.append(turn)

        await asyncio.gather(*(job(turn) for turn in (5, 3, 9, 3, 1)))
        return done

    assert asyncio.run(order()) == [5, 1, 3, 3, 9]
