"""Check that runs on two hosts stop after a network failure and resume to the same bits.

The hosts are two network namespaces of this machine, connected by a virtual cable, on one disk.
Needs Linux and root.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from deit.core import run_folder, run_log  # noqa: E402

HOSTS = ("deit-host-a", "deit-host-b")
CABLE = ("deit-a", "deit-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
TIMEOUT_S = 10
_LOST_PEER = re.compile(r"another process of th(e|is) run")  # in the error message of a run
RUN = (
    *(
        "digits",
        "--loss",
        "none",
        "--teacher.source",
        "none",
        "--views.auto_augment",
        "randaugment",
    ),
    *("--student.depth", "4", "--optim.batch_size", "64", "--optim.epochs", "6"),
    *("--optim.warmup_epochs", "1", "--optim.ema_epochs", "1", "--run.eval_every_epochs", "1"),
    *("--run.save_every_steps", "5", "--run.timeout_s", str(TIMEOUT_S), "--resume"),
)


def ip(*arguments: str) -> None:
    """Run `ip`; exit with its error if it fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"this machine refuses network namespaces (ip {' '.join(arguments)}: {done.stderr})"
        )


def connect() -> None:
    """Create two network namespaces and connect them."""
    disconnect()
    for host in HOSTS:
        ip("netns", "add", host)
    ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
    for host, end, address in zip(HOSTS, CABLE, ADDRESSES):
        ip("link", "set", end, "netns", host)
        ip("-n", host, "addr", "add", f"{address}/24", "dev", end)
        ip("-n", host, "link", "set", end, "up")
        ip("-n", host, "link", "set", "lo", "up")


def disconnect() -> None:
    """Delete the network namespaces, also those of an earlier call."""
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)


def start(out: Path) -> list[subprocess.Popen[str]]:
    """Start torchrun on both hosts."""
    processes = []
    for rank, (host, end) in enumerate(zip(HOSTS, CABLE)):
        command = [
            *("ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)),
            *("--master_addr", ADDRESSES[0], "--master_port", "29507"),
            *(str(ROOT / "train_deit.py"), *RUN, "--out", str(out)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": end}
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                cwd=out.parent,
            )
        )
    return processes


def wait_for_all(processes: list[subprocess.Popen[str]], *, within: float) -> list[tuple[int, str]]:
    """Return exit code and standard error of each process. Kills a process, with code -9, that runs
    longer than `within` seconds."""
    results = []
    deadline = time.monotonic() + within
    for process in processes:
        try:
            _, output = process.communicate(timeout=max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            _, output = process.communicate()
        results.append((process.returncode, output))
    return results


def main() -> int:
    """Run all runs and print the results. Returns 0 if both hosts stopped and the hashes match."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        uninterrupted, cut = Path(name) / "uninterrupted", Path(name) / "cut"
        try:
            connect()
            for code, output in wait_for_all(start(uninterrupted), within=300):
                if code:
                    sys.exit(f"the uninterrupted run failed ({code}):\n{output[-2000:]}")
            processes = start(cut)
            while len(run_folder.list_checkpoints(cut)) < 2:
                time.sleep(0.02)
            step = max(step for step, _ in run_folder.list_checkpoints(cut))
            ip("-n", HOSTS[1], "link", "set", CABLE[1], "down")
            cut_at = time.monotonic()
            stopped = wait_for_all(processes, within=TIMEOUT_S + 60)
            seconds = time.monotonic() - cut_at
            print(f"cable cut after step {step}: both hosts stopped {seconds:.1f} s later")
            for host, (code, output) in zip(HOSTS, stopped):
                line = next((line for line in output.splitlines() if _LOST_PEER.search(line)), "-")
                print(f"  {host}: torchrun's exit code {code}; {line}")
            all_noticed = all(_LOST_PEER.search(output) for _, output in stopped)
            ip("-n", HOSTS[1], "link", "set", CABLE[1], "up")
            resumed = wait_for_all(start(cut), within=300)
            if any(code for code, _ in resumed):
                sys.exit(f"resuming failed: {resumed}")
        finally:
            disconnect()
        chains = [(out / run_log.HASH_CHAIN).read_bytes() for out in (uninterrupted, cut)]
        equal = chains[0] == chains[1]
        print(f"resumed on both: {len(chains[0].splitlines())} hashes in the chain, ", end="")
        print("all equal to the uninterrupted run" if equal else "NOT equal")
    print(f"{time.monotonic() - started:.0f} s in all")
    return 0 if all_noticed and equal else 1


if __name__ == "__main__":
    sys.exit(main())
