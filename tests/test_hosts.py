"""Training on two hosts that a slow wire connects which loses packets: the same result as on one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanoghost.home import ModelFolder
from tests.support import hosts
from tests.test_fault_tolerance import TOY, losses

REASON = hosts.possible()
DELAY, LOSS = 0.005, 0.01  # seconds one way; share of packets


@pytest.mark.skipif(bool(REASON), reason=REASON or "two hosts are possible")
def test_two_hosts_with_delay_and_loss_learn_what_one_learns(nanoghost, toy_file, home):
    common = ["pretrain", "--data", str(toy_file), "--steps", "12", *TOY]
    assert nanoghost(*common, "--name", "one")[0] == 0
    process = hosts.wire(DELAY, LOSS)
    try:
        runs = []
        for number, host in enumerate(hosts.HOSTS):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1",
                        "--master-addr", hosts.ADDRESSES[0], "--master-port", "29511", "-m", "nanoghost"]  # fmt: skip
            environment = os.environ | {"GLOO_SOCKET_IFNAME": host, "PYTHONPATH": str(Path(__file__).parents[1])}
            command = ["ip", "netns", "exec", host, *torchrun, *common, "--name", "two"]
            runs.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        start = time.time()
        said = [run.communicate(timeout=200)[1] for run in runs]
        assert [run.returncode for run in runs] == [0, 0], said
        size = ModelFolder("two").card.parameters
        assert hosts.sent(hosts.HOSTS[0]) > 12 * 2 * size, "the gradients went over the wire"
        print(f"{time.time() - start:.0f} s")
    finally:
        hosts.unplug(process)
    one, two = losses("one"), losses("two")
    assert sorted(two) == sorted(one)
    for step, loss in one.items():  # bf16, summed in another order
        assert two[step] == pytest.approx(loss, rel=1e-2)
