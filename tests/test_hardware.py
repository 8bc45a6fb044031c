"""The machine: the choice of number format, threads, compiler and ranks, and what `doctor` shows."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from nanoghost import distributed, hardware
from nanoghost.commands import doctor
from nanoghost.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "MASTER_ADDR")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], torch.float32),
        (["avx2", "avx512_f", "avx512_vnni", "amx_int8"], torch.float32),
        (["avx2", "avx512_bf16"], torch.bfloat16),
        (["amx_bf16"], torch.bfloat16),
    ],
)
def test_cpu_dtype_is_bf16_only_if_the_hardware_multiplies_bf16(flags, expected):
    assert hardware.cpu_dtype(flags) == expected


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_the_dtype_is_never_fp16(kind):
    assert hardware.compute_dtype(torch.device(kind)) in (torch.float32, torch.bfloat16)
    assert hardware.compute_dtype() in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("cxx", ["/bin/false", "/no/such/compiler", ""])
def test_a_compiler_that_does_not_run_counts_as_missing(monkeypatch, cxx):
    monkeypatch.setenv("CXX", cxx)
    assert not hardware.has_compiler()
    assert hardware.describe()["compiler"] is False


def test_threads_are_the_cores_of_this_process_or_what_the_user_sets(monkeypatch):
    monkeypatch.setattr(hardware, "cores", lambda: 8)
    assert hardware.threads() == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert hardware.threads() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")  # torchrun sets OMP_NUM_THREADS=1 by itself
    assert hardware.threads() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two nodes
    assert hardware.threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert hardware.threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert hardware.threads() == 3


def test_mistakes_in_the_environment_raise_user_errors(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(UserError, match="OMP_NUM_THREADS=many"):
        hardware.threads()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        distributed.init_distributed()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux has affinity")
def test_cores_respect_affinity_and_container_quota(monkeypatch):
    assert 1 <= hardware.cores() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(hardware, "container_limit", lambda name: "50000 100000")
    assert hardware.cores() == 1


def test_rank_and_world_size_come_from_the_environment(monkeypatch):
    assert distributed.rank_and_world_size() == (0, 1)
    distributed.init_distributed()
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.rank_and_world_size() == (1, 2)


TWO_RANKS = """
import os, torch
from nanoghost import distributed, hardware
child = os.fork()  # torch is imported once for both ranks; safe, since nothing has been computed
os.environ["RANK"] = "0" if child else "1"
hardware.prepare()
distributed.init_distributed()
total = torch.tensor(distributed.rank_and_world_size()[0] + 1)
torch.distributed.all_reduce(total)
assert total == 3 and not torch.tensor(1e-40).mul(1).item()  # denormals are flushed
torch.distributed.destroy_process_group()
assert not child or os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="nccl needs one GPU for each rank")
def test_two_ranks_connect_and_flush_denormals():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torchrun = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    subprocess.run([sys.executable, "-c", TWO_RANKS], env=os.environ | torchrun, check=True, timeout=60)


def test_describe_is_json():
    facts = hardware.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cores"] >= 1 and facts["memory_gb"] > 0 and facts["threads"] >= 1


def test_doctor_prints_an_explanation_and_json(capsys):
    doctor.command(doctor.DoctorSettings(json=True), seconds=0.01)
    out, err = capsys.readouterr()
    facts = json.loads(out.splitlines()[-1])
    measured = [key for key in facts if key.endswith("_per_second")]
    assert len(measured) == 3
    assert all(facts[key] > 0 for key in measured)
    assert facts["dtype"] in err
    assert "torch.compile" in err
    assert torch.get_num_threads() == facts["threads"]
