"""The machine: what is decided about number format, threads, compiler and ranks, and that `doctor` says it."""

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
def test_cpu_dtype_is_bf16_iff_the_hardware_multiplies_it(flags, expected):
    assert hardware.cpu_dtype(flags) == expected


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_dtype_is_never_fp16(kind):
    assert hardware.compute_dtype(torch.device(kind)) in (torch.float32, torch.bfloat16)
    assert hardware.compute_dtype() in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("cxx", ["/bin/false", "/no/such/compiler", ""])
def test_a_compiler_that_does_not_run_is_none(monkeypatch, cxx):
    monkeypatch.setenv("CXX", cxx)
    assert not hardware.has_compiler()
    assert hardware.describe()["compiler"] is False


def test_threads_share_the_cores_and_obey_the_user(monkeypatch):
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


def test_mistakes_in_the_environment_are_explained(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(UserError, match="OMP_NUM_THREADS=many"):
        hardware.threads()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        distributed.init_distributed()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux has affinity")
def test_cores_obey_affinity_and_container_quota(monkeypatch):
    assert 1 <= hardware.cores() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(hardware, "container_limit", lambda name: "50000 100000")
    assert hardware.cores() == 1


def test_ranks_come_from_torchrun(monkeypatch):
    assert distributed.rank_and_world_size() == (0, 1)
    distributed.init_distributed()
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.rank_and_world_size() == (1, 2)


TWO_RANKS = """
import os, torch
from nanoghost import distributed, hardware
child = os.fork()  # one import of torch for both ranks; fine, as nothing has run yet
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
def test_two_ranks_find_each_other():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torchrun = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    subprocess.run([sys.executable, "-c", TWO_RANKS], env=os.environ | torchrun, check=True, timeout=60)


def test_describe_is_json():
    facts = hardware.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cores"] >= 1 and facts["memory_gb"] > 0 and facts["threads"] >= 1


def test_doctor_explains_to_eyes_and_prints_json_to_programs(capsys):
    doctor.command(doctor.DoctorSettings(json=True), seconds=0.01)
    out, err = capsys.readouterr()
    facts = json.loads(out.splitlines()[-1])
    rates = [key for key in facts if key.endswith("_per_second")]
    assert len(rates) == 3 and all(facts[key] > 0 for key in rates)
    assert facts["dtype"] in err and "torch.compile" in err
    assert torch.get_num_threads() == facts["threads"]
