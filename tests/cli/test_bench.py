"""bench: it times only what it has checked, and saves what it prints."""

import json

import pytest
import torch

import vmeanba_fx
from tests.cli.running import refused, run
from vmeanba_fx.cli import bench, bench_kernels, bench_profile


def test_bench_times_the_model_and_its_rewritten_forms(capsys, spec):
    argv = ["bench", "--model", spec, "--batch", 2, "--size", 32, "--min-time", 0.01, "--device", "cpu"]
    argv += ["--parts", "model"]
    found = json.loads(run(capsys, *argv, "--json")[1])
    assert [r["name"] for r in found["rows"]] == ["original", "k = 0", "k = 1", "k = 3"]
    assert [r["k"] for r in found["rows"]] == [None, 0, 1, 3]
    assert found["environment"]["input"] == [2, 1, 32, 32] and found["rows"][0]["speedup"] == 1.0
    flops = [r["flops"] for r in found["rows"]]
    assert flops[0] == flops[1] > flops[2] > flops[3]
    for row in found["rows"]:
        assert row["milliseconds"] > 0 and row["images_per_second"] == pytest.approx(2e3 / row["milliseconds"])
        assert row["speedup"] == pytest.approx(found["rows"][0]["milliseconds"] / row["milliseconds"])


def test_bench_under_autocast(capsys, spec):
    argv = ["bench", "--model", spec, "--size", 32, "--min-time", 0.01, "--device", "cpu", "--parts", "model", "-k", 0]
    code, out, _ = run(capsys, *argv, "--autocast", "bfloat16")
    assert code == 0 and "1x1x32x32 float32 under bfloat16 autocast" in out and "k = 0" in out


def test_bench_text_with_data_and_plan(capsys, tmp_path, spec, data):
    plan = tmp_path / "plan.json"
    run(capsys, "score", "--model", spec, "--data", data, "--batches", 1, "--out", plan)
    argv = ["bench", "--model", spec, "--data", data, "--plan", plan, "-k", 1, "--min-time", 0.01, "--device", "cpu"]
    code, out, _ = run(capsys, *argv)
    assert code == 0 and "1x1x32x32" in out and "original" in out and "k = 1" in out and "k = 0" not in out
    assert "one channel us" in out and "kernels of" in out


def test_bench_times_nothing_whose_numbers_are_wrong(capsys, spec, monkeypatch):
    apply = vmeanba_fx.Plan.apply

    def wrong(self, k, **options):
        gm = apply(self, k, **options)
        with torch.no_grad():
            gm.get_parameter(next(n for n, _ in gm.named_parameters() if n.endswith("head.weight"))).mul_(1.01)
        return gm

    monkeypatch.setattr(vmeanba_fx.Plan, "apply", wrong)
    monkeypatch.setattr(bench, "Timer", lambda *_, **__: pytest.fail("a wrong model was timed"))
    argv = ["bench", "--model", spec, "--batch", 2, "--size", 32, "-k", 0, "--device", "cpu"]
    assert "nothing was timed" in refused(capsys, *argv)


def test_bench_asks_for_its_folder_before_it_measures(capsys, tmp_path, spec, monkeypatch):
    monkeypatch.setattr(bench, "_graphs", lambda *_: pytest.fail("something was measured"))
    (tmp_path / "file").write_text("")
    argv = ["bench", "--model", spec, "--size", 32, "--device", "cpu", "--out"]
    assert "is not a folder" in refused(capsys, *argv, tmp_path / "file")
    assert str(tmp_path / "file") in refused(capsys, *argv, tmp_path / "file" / "results")


def test_bench_of_kernels_and_profile_saved(capsys, tmp_path, spec):
    out = tmp_path / "results"
    argv = ["bench", "--model", spec, "--size", 32, "--min-time", 0.01, "--device", "cpu", "--parts", "kernels", "profile"]
    code, text, _ = run(capsys, *argv, "--out", out)
    assert code == 0 and "1x1x32x32" in text and "one channel us" in text and "kernels of" in text and "original" not in text
    (path,) = out.glob("*.json")
    found = json.loads(path.read_text())
    assert "rows" not in found and sum(row["sites"] for row in found["kernels"]) == 3
    assert all(row["factor"] == pytest.approx(row["full_us"] / row["one_us"]) for row in found["kernels"])
    shares = [row["share"] for row in found["profile"]]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    assert len(list(out.glob("*_kernels.csv"))) == len(list(out.glob("*_profile.csv"))) == len(list(out.glob("*.txt"))) == 1
    pytest.importorskip("matplotlib")
    assert len(list(out.glob("*_profile.png"))) == 1


def test_bench_shortens_the_names_of_kernels():
    add = "void at::native::elementwise_kernel<128, 4, gpu_kernel_impl_nocast<at::native::CUDAFunctor_add<float> >(int)>"
    assert bench_profile._short(add) == "elementwise_kernel (CUDAFunctor_add)"
    norm = "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>(int, float)"
    assert bench_profile._short(norm) == "vectorized_layer_norm_kernel"
    assert bench_profile._short("vmeanba_fx::selective_scan") == "vmeanba_fx::selective_scan"
    assert bench_profile._short("sm90_" + "x" * 80) == "sm90_" + "x" * 62 + "..."


def test_bench_refuses_a_wrong_kernel(capsys, spec, monkeypatch):
    full = torch.ops.vmeanba_fx.selective_scan
    monkeypatch.setattr(vmeanba_fx.ops, "selective_scan", lambda *args: full(*args) * 1.01)
    monkeypatch.setattr(bench_kernels, "Timer", lambda *_, **__: pytest.fail("a wrong kernel was timed"))
    argv = ["bench", "--model", spec, "--size", 32, "--device", "cpu", "--parts", "kernels"]
    assert "nothing was timed" in refused(capsys, *argv)


def test_bench_refuses_a_block_that_is_not_there(capsys, spec):
    argv = ["bench", "--model", spec, "--size", 32, "--device", "cpu", "--parts", "profile", "--block", "nowhere"]
    assert "no such module" in refused(capsys, *argv)
