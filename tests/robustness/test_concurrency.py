"""Transforms at the same time: in two threads, beside a thread that scans, and in two processes."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import torch

import vmeanba_fx
from tests import zoo

ROOT = Path(__file__).resolve().parents[2]


def made(model, x):
    """The rewritten model's outputs, sites and number of nodes."""
    gm = vmeanba_fx.transform(model, [x], sites="blocks.0.op")
    with torch.no_grad():
        return gm(x), [s.name for s in vmeanba_fx.find_sites(vmeanba_fx.capture(model, x))], len(gm.graph.nodes)


def test_two_threads_and_one_that_runs_a_model():
    """Both models scan with the same function, whose code a capture exchanges; a third thread calls it all the while, alone
    and in a model of its own."""
    models = [zoo.tiny(2, directions=1, state=1, seed=1), zoo.live(2, directions=2, state=2, seed=2)]
    x = zoo.images(2)
    alone = [made(model, x) for model in models]
    given, bystander = zoo.scan_inputs(), zoo.tiny(1, seed=3)
    with torch.no_grad():
        eager, logits = zoo.selective_scan_fn(**given, delta_softplus=True), bystander(x)
    results, failures, stop = [[], []], [], threading.Event()

    def transform(index):
        try:
            for _ in range(2):
                results[index].append(made(models[index], x))
        except BaseException as error:
            failures.append(error)

    def keep_running():
        try:
            while not stop.is_set():
                with torch.no_grad():
                    found, outputs = zoo.selective_scan_fn(**given, delta_softplus=True), bystander(x)
                assert torch.equal(found, eager), "the running scan was disturbed"
                torch.testing.assert_close(outputs, logits)
        except BaseException as error:
            failures.append(error)

    runner = threading.Thread(target=keep_running)
    workers = [threading.Thread(target=transform, args=(i,)) for i in range(2)]
    runner.start()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    stop.set()
    runner.join()
    assert not failures, failures
    for expected, found in zip(alone, results, strict=True):
        assert len(found) == 2
        for outputs, sites, nodes in found:
            assert torch.equal(outputs, expected[0]) and sites == expected[1] and nodes == expected[2]


CODE = """
import sys, torch
from pathlib import Path
import vmeanba_fx
from tests import zoo
torch.set_num_threads(1)
model, x = zoo.live(2, directions=1, state=1), zoo.images(2)
plan = vmeanba_fx.calibrate(model, zoo.labelled(2, 3), metric="loss", seed=0)
plan.save(sys.argv[1])
print(repr(plan.apply(1)(x).double().sum().item()))
"""


def test_two_processes_share_their_caches(tmp_path):
    """Both start with empty caches of compiled kernels and fill them at the same time; a third reads what they left."""
    caches = {"NUMBA_CACHE_DIR": str(tmp_path / "numba"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    environment = os.environ | caches | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(name):
        argv = [sys.executable, "-c", CODE, str(tmp_path / name)]
        return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    both = [start("a.json"), start("b.json")]
    said = [process.communicate() for process in both]
    assert all(process.returncode == 0 for process in both), said
    third = start("c.json")
    said.append(third.communicate())
    assert third.returncode == 0, said
    assert len({out for out, _ in said}) == 1
    assert len({(tmp_path / name).read_bytes() for name in ("a.json", "b.json", "c.json")}) == 1
