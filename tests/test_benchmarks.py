"""What the benchmarks compute of what they measured; measuring itself needs a GPU."""

import csv
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end, kernels, roofline, running, ss2d, summary
from benchmarks.running import Jobs, Turn

ROOT = Path(__file__).resolve().parent.parent
CARD = roofline.Card(copy=1e12, product=1e14, clock=1e9, processors=100)


def op(number, name, start, dims=(), types=(), concrete=(), **args):
    inputs = {"Input Dims": dims, "Input type": types, "Concrete Inputs": concrete}
    return {"cat": "cpu_op", "name": name, "ts": start, "dur": 10, "args": {"External id": number} | inputs | args}


def launch(number, name, microseconds):
    return {"cat": "kernel", "name": name, "ts": 0, "dur": microseconds, "args": {"External id": number}}


HALF = ("c10::Half",) * 3


@pytest.mark.parametrize(
    ("of", "kind", "moved", "operations"),
    [
        (op(1, "aten::mm", 0, [[8, 16], [16, 4], [8, 4]], HALF), "matrix products", 2 * (128 + 64 + 32), 1024),
        (op(1, "aten::addmm", 0, [[4], [8, 16], [16, 4]], HALF), "matrix products", 2 * (128 + 64 + 32), 1024),
        (op(1, "aten::convolution", 0, [[2, 6, 8, 8], [6, 1, 3, 3], []], HALF, ["", "", "", "[1, 1]", "[1, 1]"]),
         "depthwise convolutions", 2 * (2 * 768 + 54), 2 * 768 * 9),
        (op(1, "aten::convolution", 0, [[2, 3, 8, 8], [6, 3, 3, 3], [6]], HALF, ["", "", "", "[2, 2]", "[1, 1]"]),
         "other convolutions", 2 * (384 + 162 + 192), 2 * 192 * 27),
        (op(1, "triton_poi_fused_gelu_3", 0, kernel_num_gb=0.5), "gelu passes", 5e8, 0),
    ],
)  # fmt: skip
def test_kernel_of_a_trace(of, kind, moved, operations):
    inner = of | {"name": "aten::inner", "ts": 2, "dur": 5, "args": {"External id": 2}}
    memset = launch(2, "Memset", 1) | {"cat": "gpu_memset"}
    (found,) = roofline.of_trace([inner, memset, launch(2, "some_kernel", 19), of], CARD)
    assert (found.kind, found.moved, found.operations) == (kind, moved, operations)
    assert found.seconds == pytest.approx(2e-5)
    assert found.floor == pytest.approx(max(moved / 1e12, operations / 1e14))


def test_kernels_in_groups():
    events = [launch(9, "memcpy", 500), op(1, "triton_gelu", 0, kernel_num_gb=0.2), launch(1, "k", 400)]
    page = roofline.page([*roofline.of_trace(events, CARD)], ms=1.0, graph=0.9)
    assert "| all         |       2 | 0.900 | 0.20 |   0.000 |       0.200 |           0.22 |" in page
    assert "1.00 ms, 0.10 of it between kernels" in page


def test_row_replaces_its_predecessor(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card")
    row = {"model": "m", "precision": "amp16", "batch": 128, "variant": "ours k=10, baked", "mode": "compiled", "ms": 2.0}
    for changes in ({}, {"variant": "official"}, {"variant": "ours k=2, baked"}, {"ms": 3.0}):
        end_to_end.write(row | changes, tmp_path, "")
    (path,) = tmp_path.glob("end_to_end_A-Card_*.csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["variant"] for r in rows] == ["official", "ours k=2, baked", "ours k=10, baked"]
    assert rows[-1]["ms"] == "3.0"


def test_summary_compares_with_the_same_mode_and_with_eager():
    def row(variant, mode, ms):
        return {"model": "vmamba_tiny_s1l8", "precision": "amp16", "batch": "128", "variant": variant, "mode": mode,
                "ms": str(ms), "peak MiB": "100.0"}  # fmt: skip

    rows = [row("official", "eager", 40), row("official", "compiled", 20), row("ours k=0, baked", "compiled", 10)]
    rows += [row("ours k=14, baked", "compiled", 8), row("ours k=0, half", "compiled", 1)]
    rows += [row("ours k=7, baked", "compiled", "nan"), row("ours k=14, baked, unrolled", "compiled", 5)]
    baked, unrolled = summary.summary(rows, "compiled")
    assert baked == ["T", "fp16", "128", "20.00", "10.00 (2.00x, 4.00x)", "", "", "8.00 (2.50x, 5.00x)", "100, 100, 100"]
    assert unrolled == ["T, unrolled", "fp16", "128", "20.00", "", "", "", "5.00 (4.00x, 8.00x)", "100, 100"]


@pytest.mark.parametrize("script", [end_to_end, kernels, roofline, ss2d])
def test_without_a_gpu_there_is_nothing_to_measure(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit, match=r"^script\.py needs an NVIDIA GPU"):
        script.main()


def test_summary_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["summary.py", str(tmp_path / "missing.csv")])
    with pytest.raises(SystemExit):
        summary.main()
    assert "missing.csv: no such CSV file" in capsys.readouterr().err


MODELS = {"T": ("vmamba_tiny_s1l8", 14), "S": ("vmamba_small_s1l20", 26), "B": ("vmamba_base_s1l20", 26)}
KINDS = {"bf16": "ampbf16", "fp32": "fp32", "fp32 (TF32 allowed)": "fp32"}


def gpu_tables_of_the_readme():
    """(model, precision, batch, mode, unrolled) and the four cells of each row."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## On a GPU")[1].split("\n## ")[0]
    model = ""
    for line in section.splitlines():
        if not (line.startswith("| VMamba-") or line.startswith("| | ")):
            continue
        head, second, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        name, _, kind = head.removeprefix("VMamba-").partition(", ")
        model = name or model
        mode, _, unrolled = second.partition(", ")
        if kind:
            yield (model, KINDS[kind], "128", "compiled", False), [second, *cells]
        elif second.isdigit():
            yield (model, "amp16", second, "compiled, CUDA graph", False), cells
        elif mode in ("eager", "compiled"):
            yield (model, "amp16", "128", mode, bool(unrolled)), cells


def test_gpu_tables_of_the_readme_are_those_of_the_results():
    with open(ROOT / "benchmarks" / "results" / "end_to_end_NVIDIA-H100-80GB-HBM3_torch2.11.0.csv", newline="") as file:
        of = {tuple(row[f] for f in end_to_end.FIELDS[:5]): float(row["ms"]) for row in csv.DictReader(file)}
    found = 0
    for (model, precision, batch, mode, unrolled), cells in gpu_tables_of_the_readme():
        name, n = MODELS[model]
        suffix = (", baked" if precision != "fp32" else "") + (", unrolled" if unrolled else "")
        variants = ["official", *(f"ours k={k}{suffix}" for k in (0, n // 2, n))]
        ms = [of[name, precision, batch, variant, mode] for variant in variants]
        for cell, measured in list(zip(cells, ms, strict=True))[unrolled:]:
            shown, *factor = cell.split(" ")
            digits = len(shown.partition(".")[2])
            assert shown == f"{measured:.{digits}f}", (model, mode, cell, measured)
            assert factor in ([], [f"({ms[0] / measured:.1f})"]), (model, mode, cell)
            found += 1
    assert found == 9 * 4 - 3 + 6 * 4 + 6 * 4


def hold(path, number, log):
    turn = Turn(path)
    turn.take()
    for word in ("takes", "gives"):
        with open(log, "a") as file:
            file.write(f"{number} {word}\n")
        time.sleep(0.05)


def test_jobs_take_turns(tmp_path):
    jobs, log = Jobs(3), tmp_path / "log"
    for number in range(4):
        jobs.start(hold, tmp_path / "lock", number, log)
    jobs.wait()
    lines = log.read_text().split("\n")[:-1]
    assert sorted(lines[::2]) == [f"{n} takes" for n in range(4)]
    assert [line.split()[0] for line in lines[::2]] == [line.split()[0] for line in lines[1::2]]


def test_candidates_are_timed_in_turn(tmp_path, monkeypatch):
    turn, held = Turn(tmp_path / "lock"), []
    monkeypatch.setattr(turn, "take", lambda: held.append("takes"))
    monkeypatch.setattr(turn, "give", lambda: held.append("gives"))

    def alone(*_, rep):
        held.append(rep)

    monkeypatch.setattr(running.InductorBenchmarker, "benchmark_gpu", alone)
    with running.candidates_in_turn(turn):
        running.InductorBenchmarker().benchmark_gpu(print, rep=3)
    assert held == ["takes", 3, "gives"]
    assert running.InductorBenchmarker.benchmark_gpu is alone
