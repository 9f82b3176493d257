"""Two hosts, one cut off in mid-epoch: both stop in time and resume to the same bits (Linux, root).

The hosts are two network namespaces of this machine with a cable between them, on one disk.
"""

import argparse
import os
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


def ip(*words: str) -> None:
    """Run `ip`; a refusal ends the script with its reason."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"this machine refuses network namespaces (ip {' '.join(words)}: {done.stderr})")


def connect() -> None:
    """Two namespaces and a cable."""
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
    """Take away what `connect` made, also what an earlier call left."""
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)


def start(out: Path) -> list[subprocess.Popen[str]]:
    """torchrun on both hosts."""
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


def ended(processes: list[subprocess.Popen[str]], *, within: float) -> list[tuple[int, str]]:
    """Exit code and last words of each; a process that takes longer is killed, with code -9."""
    found = []
    until = time.monotonic() + within
    for process in processes:
        try:
            _, said = process.communicate(timeout=max(until - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
        found.append((process.returncode, said))
    return found


def main() -> int:
    """Run the three runs and print what came of them; 0 if all is as it should be."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        straight, cut = Path(place) / "straight", Path(place) / "cut"
        try:
            connect()
            for code, said in ended(start(straight), within=300):
                if code:
                    sys.exit(f"the run that nothing happens to failed ({code}):\n{said[-2000:]}")
            processes = start(cut)
            while len(run_folder.list_checkpoints(cut)) < 2:
                time.sleep(0.02)
            step = max(step for step, _ in run_folder.list_checkpoints(cut))
            ip("-n", HOSTS[1], "link", "set", CABLE[1], "down")
            moment = time.monotonic()
            stopped = ended(processes, within=TIMEOUT_S + 60)
            took = time.monotonic() - moment
            print(f"cable cut after update {step}: both hosts had stopped {took:.1f} s later")
            for host, (code, said) in zip(HOSTS, stopped):
                line = next((one for one in said.splitlines() if "another process" in one), "-")
                print(f"  {host}: torchrun's exit code {code}; {line}")
            heard = all("another process of the run is gone" in said for _, said in stopped)
            ip("-n", HOSTS[1], "link", "set", CABLE[1], "up")
            resumed = ended(start(cut), within=300)
            if any(code for code, _ in resumed):
                sys.exit(f"resuming failed: {resumed}")
        finally:
            disconnect()
        chains = [(out / run_log.HASH_CHAIN).read_bytes() for out in (straight, cut)]
        equal = chains[0] == chains[1]
        print(
            f"resumed on both: {len(chains[0].splitlines())} links of the chain of hashes, ", end=""
        )
        print("all equal to the uninterrupted run" if equal else "NOT equal")
    print(f"{time.monotonic() - started:.0f} s in all")
    return 0 if heard and equal else 1


if __name__ == "__main__":
    sys.exit(main())
