"""Training on two hosts over a slow link that loses packets has the losses of one host."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanoghost.home import ModelFolder
from tests.support import hosts
from tests.test_fault_tolerance import TOY, losses

REASON = hosts.why_impossible()
DELAY, LOSS = 0.005, 0.01  # seconds one way; fraction of the packets


def start_host(number: int, host: str, words: list[str]) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
    rendezvous = ["--master-addr", hosts.ADDRESSES[0], "--master-port", "29511"]
    command = [sys.executable, *torchrun, *rendezvous, "-m", "nanoghost", *words]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": host, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(["ip", "netns", "exec", host, *command], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(bool(REASON), reason=REASON or "two hosts are possible")
def test_two_hosts_on_a_link_with_delay_and_loss_have_the_losses_of_one(nanoghost, toy_file, home):
    common = ["pretrain", "--data", str(toy_file), "--steps", "12", *TOY]
    assert nanoghost(*common, "--name", "one")[0] == 0
    link = hosts.connect(DELAY, LOSS)
    try:
        start = time.time()
        runs = [start_host(number, host, [*common, "--name", "two"]) for number, host in enumerate(hosts.HOSTS)]
        errors = [run.communicate(timeout=200)[1] for run in runs]
        assert [run.returncode for run in runs] == [0, 0], errors
        parameters = ModelFolder("two").card.parameters
        assert hosts.bytes_sent(hosts.HOSTS[0]) > 12 * 2 * parameters, "the gradients must have used the link"
        print(f"{time.time() - start:.0f} s")
    finally:
        hosts.disconnect(link)
    one, two = losses("one"), losses("two")
    assert sorted(two) == sorted(one)
    for step, loss in one.items():  # bf16 sums in another order
        assert two[step] == pytest.approx(loss, rel=1e-2)
