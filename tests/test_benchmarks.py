"""What the benchmarks stand on: workers in turn, disturbed results thrown away, tables between their marks."""

import json
import math
import sys
from pathlib import Path

import pytest

from rtd_jax.base.files import read_json, write_json
from rtd_jax.train.abstract import ARCHITECTURES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import accelerator
import decoding
import gpu_profile
import measure
import peer_on_policy
import peers

WORKER = "import sys; sys.path.insert(0, 'benchmarks'); import measure; print('noise'); measure.report(speed={})"


def test_commands_run_in_turn_and_medians_are_over_rounds(monkeypatch, capsys):
    monkeypatch.setattr(measure, "DISTURBED", 100.0)
    commands = {name: [sys.executable, "-c", WORKER.format(speed)] for name, speed in (("a", 3.0), ("b", 5.0))}
    found = measure.alternate(commands, rounds=2)
    assert [line.split(":")[1].strip() for line in capsys.readouterr().out.splitlines()] == ["a", "b", "a", "b"]
    assert [result.values for result in found["a"]] == [{"speed": 3.0}] * 2
    assert measure.median(found["b"], "speed") == 5.0


def test_a_disturbed_result_is_taken_again_and_at_last_given_up(monkeypatch):
    loads = iter([9.0, 0.0, *[9.0] * measure.ATTEMPTS])
    monkeypatch.setattr(measure, "run_worker", lambda name, command: measure.Result({"speed": 1.0}, next(loads)))
    assert measure.alternate({"a": []}, rounds=1)["a"][0].other_load == 0.0
    with pytest.raises(RuntimeError, match="the machine was busy in 4 attempts at a"):
        measure.alternate({"a": []}, rounds=1)


def test_a_worker_that_fails_is_shown():
    with pytest.raises(RuntimeError, match=r"broken failed:[\s\S]*ZeroDivisionError"):
        measure.alternate({"broken": [sys.executable, "-c", "1 / 0"]}, rounds=1)


def test_a_table_replaces_the_one_before_it_and_nothing_else(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- t -->\nold\n<!-- end t -->\nafter\n")
    table = measure.markdown_table(["", "x"], [["row", 1]])
    measure.write_section(document, "t", table)
    assert document.read_text() == "before\n<!-- t -->\n|  | x |\n|---|--:|\n| row | 1 |\n<!-- end t -->\nafter\n"
    with pytest.raises(ValueError, match="no marks <!-- u --> and <!-- end u -->"):
        measure.write_section(document, "u", "x")


def test_decoded_ids_agree_up_to_the_first_difference():
    # Row 0 is equal, row 1 differs from its second id on although its third is equal again: 4 + 1 of 8 ids.
    ours, theirs = [[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 0, 7, 0]]
    assert decoding.agreement(ours, theirs) == (1, 5 / 8)
    assert decoding.agreement(ours, ours) == (2, 1.0)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        decoding.agreement(ours, [[1, 2, 3], [5, 6, 7, 8]])  # systems that stop at different lengths are not compared


def test_rounds_that_others_disturbed_give_way_to_quiet_ones():
    class Counted:
        def __init__(self, others):
            self.others, self.calls = others, 0

        def run(self):
            self.calls += 1
            others = self.others[self.calls - 1]
            return {"seconds": self.calls, "cpu": 1.0, "ids": [], "others": others}

    # The first call warms up; rounds 2 and 4 are disturbed in one system or the other.
    workers = {"ours": Counted([9, 0.1, 0.9, 0.0, 0.1, 0.1]), "theirs": Counted([9, 0.0, 0.0, 0.1, 0.9, 0.0])}
    found = decoding.compare({name: w.run for name, w in workers.items()}, "batch 1", rounds=3, attempts=5)
    assert sorted(a["seconds"] for a in found["ours"][1:]) == [2, 4, 6]
    assert sorted(a["seconds"] for a in found["theirs"][1:]) == [2, 4, 6]
    assert found["ours"][0]["seconds"] == 1


def test_random_prompts_are_repeatable_and_inside_the_vocabulary():
    prompts = decoding.make_prompts(Path("unused"), None, 5, 100)
    assert prompts == decoding.make_prompts(Path("unused"), None, 5, 100)
    assert all(30 <= len(p) < 120 and min(p) >= 0 and max(p) < 100 for p in prompts)
    assert len(set(map(len, prompts))) > 1


def test_the_gpu_benchmark_runs_the_recipes_step_online_and_from_a_cache(tmp_path, monkeypatch, capsys):
    """On the CPU, with small models in the place of the published ones."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"num_hidden_layers": 2, "head_dim": 16, "vocab_size": 512}
    name = "meta-llama/Llama-3.2-1B-Instruct"
    write_json(tmp_path / "config.json", read_json(ARCHITECTURES)[name] | small)
    sizes = {"teacher.path": str(tmp_path), "student.path": str(tmp_path), "batch_size": 2, "data.row_length": 128}
    cases = {"RTD": sizes, "cached": sizes | {"teacher.cache": "cache"}}
    monkeypatch.setattr(accelerator, "CASES", {name: ("rtd_1b", of) for name, of in cases.items()})
    found = []
    for name in cases:
        accelerator.run_case(name)
        found.append(json.loads(capsys.readouterr().out.removeprefix(measure.MARK)))
    assert [case["tokens"] for case in found] == [256, 256]
    assert all(math.isfinite(case["loss"]) and case["grad_norm"] > 0 and len(case["seconds"]) == 6 for case in found)
    # A teacher of the student's sizes: its forward pass is one of the four that an update has.
    assert found[1]["flops"] == pytest.approx(0.75 * found[0]["flops"])
    # By hand: median 2 s, 4e14 FLOP in 2 s are 20% of 989e12 a second, 50 tokens/s against the first case's 100.
    case = found[0] | {"seconds": [1.0, 2.0, 3.0], "tokens": 100, "flops": 0.4 * 989e12, "device": "NVIDIA H100 80GB"}
    cells = accelerator.row("x", case, case | {"tokens": 200})
    assert cells[:5] == ("x", "2.000 (1.000 to 3.000)", "50", "20.0", "2.000")


def test_an_update_that_differs_from_the_cpus_is_seen(monkeypatch):
    assert accelerator.update_errors() == {"loss": 0.0, "update": 0.0}  # both are the CPU's here
    weights = iter((0.3, 0.31))
    monkeypatch.setattr(
        accelerator, "coefficients_of", lambda o: o.coefficients() | {"alignment": {"weight": next(weights)}}
    )
    errors = accelerator.update_errors()
    assert errors["loss"] > 1e-4
    assert errors["update"] > 1e-4
    assert accelerator.relative([3.0, [4.0]], [3.0, [5.0]]) == pytest.approx(1 / 34**0.5)


def test_a_case_that_fails_on_the_gpu_is_a_line_and_the_first_one_an_error(monkeypatch):
    case = {"seconds": [2.0], "tokens": 100, "flops": 1e14, "compiled_in": 9.0, "planned": 3.0, "peak": 4.0}
    case |= {"device": "NVIDIA H200", "loss": 1.5, "grad_norm": 0.5}
    errors = {f"{kernel}_{of}": 1e-3 for kernel in ("xla", "cudnn") for of in ("value", "gradient")}
    known = {"a": case, "agreement": {"attention": errors, "update": {"loss": 0.0, "update": 0.0}, "matmul": 7e14}}
    known["agreement"]["jax"] = "0.11"
    written = []

    def run_worker(name, command):
        if name not in known:
            raise RuntimeError(f"{name} failed: out of memory")
        return measure.Result(known[name], 0.0)

    monkeypatch.setattr(accelerator, "run_worker", run_worker)
    monkeypatch.setattr(accelerator, "write_section", lambda document, name, text: written.append(text))
    monkeypatch.setattr(sys, "argv", ["accelerator.py"])
    monkeypatch.setattr(accelerator, "CASES", dict.fromkeys(("a", "b")))
    accelerator.main()
    assert len(written) == 2
    assert (
        "| a | 2.000 (2.000 to 2.000) | 50 | 5.1 | 1.000 | 3.0 | 4.0 | 9.0 | 1.5 | 0.5 |\n| b | failed |" in written[1]
    )
    assert "On NVIDIA H200, JAX 0.11" in written[1]
    monkeypatch.setattr(accelerator, "CASES", dict.fromkeys(("b", "a")))
    with pytest.raises(RuntimeError, match="b failed: out of memory"):
        accelerator.main()


def test_kernels_are_counted_once_for_their_part_and_kind():
    found = [
        ("nvjet_sm90_tst_128x160", "dot.1", 0.0, 2.0),
        ("cudnn_generated_fort_native_sdpa_sm90_flash", "custom-call.3", 2.0, 3.0),
        ("MemcpyD2D", "copy.1", 2.5, 4.0),
        ("loop_multiply_fusion", "unknown", 6.0, 7.0),
    ]
    instructions = {"dot.1": ("dot", "teacher, MLP"), "custom-call.3": ("custom-call", "teacher, attention")}
    instructions["copy.1"] = ("copy", "teacher, attention")
    assert gpu_profile.seconds_by_kind(found, instructions) == {
        ("teacher, MLP", "products"): 2.0,
        ("teacher, attention", "attention"): 1.0,
        ("teacher, attention", "copies"): 1.5,
        (gpu_profile.OTHER, "others"): 1.0,
    }
    assert gpu_profile.idle_seconds(found) == (7.0, 2.0)  # between 4 and 6 nothing ran; 2.5 to 3 is not counted twice


def test_peers_on_policy_are_compared_on_what_they_wrote(monkeypatch):
    commands, written = [], {}

    def alternate(of_systems, rounds):
        commands.extend(of_systems.values())
        values = {"peak_gb": 1.0, "drawing_share": 0.25, "first_loss": 0.0188, "last_loss": 0.0174}
        speeds = {"ours_on_policy": 300.0, "trl_on_policy": 100.0}
        return {name: [measure.Result(values | {"tokens_per_sec": speeds[name]}, 0.0)] for name in of_systems}

    monkeypatch.setattr(peers, "write_checkpoints", lambda *_: None)
    monkeypatch.setattr(peers, "alternate", alternate)
    monkeypatch.setattr(peers, "write_section", lambda document, name, text: written.update({name: text}))
    monkeypatch.setattr(sys, "argv", ["peers.py", "--on_policy", "--systems", "trl_on_policy", "ours_on_policy"])
    peers.main()
    assert [command[1:3] + command[4:] for command in commands[:2]] == [
        ["benchmarks/peer_on_policy.py", system, "23", "64"] for system in ("ours_on_policy", "trl_on_policy")
    ]
    cells = "| 100 (100 to 100) | 1.00 | 3.00 | 1.00 | 25% | 18.80 to 17.40 |"
    assert f"| 8,192 entries, 8 x (64 + 64) tokens: TRL GKDTrainer, lmbda 1 {cells}" in written["peers_on_policy"]
    assert set(peers.ON_POLICY) == set(peer_on_policy.SYSTEMS)
