"""A Slurm of this machine's own: munged, slurmctld and several slurmd, each a node (needs root).

Debian: apt-get install slurm-wlm munge. Everything is in one folder and ends with it; a Slurm that
is installed as a service is not touched.
"""

import contextlib
import os
import secrets
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import Self

from megatron_r1.base.processes import children

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo")
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1
ReturnToService=2
MinJobAge=3600
KillWait=5
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
NODE = (
    "NodeName=127.0.0.{number} NodeHostname={host} NodeAddr=127.0.0.{number} Port={port} CPUs=2 "
    "Gres=gpu:8 State=UNKNOWN"
)


def obstacle() -> str | None:
    """Why there can be no cluster here; None if there can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not found; on Debian: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "a Slurm of its own needs root: run the tests as root"


class Cluster:
    """`num_nodes` nodes of 2 CPUs, named by their loopback addresses."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder, self.num_nodes = folder, num_nodes
        self._daemons: list[subprocess.Popen] = []
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}

    def __enter__(self) -> Self:
        host, folder = socket.gethostname().partition(".")[0], self.folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        port = 20_000 + os.getpid() % 20_000
        nodes = [
            NODE.format(number=i + 2, host=host, port=port + 1 + i) for i in range(self.num_nodes)
        ]
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(host=host, port=port, folder=folder, nodes="\n".join(nodes))
        )
        for gpu in range(8):
            os.mknod(folder / f"gpu{gpu}", stat.S_IFCHR | 0o600, os.makedev(1, 3))  # as /dev/null
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        self._daemon("munged", "--foreground", "--force", "--key-file", key, *self._munge_files())
        self._until(lambda: (folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-c", "-f", folder / "slurm.conf")
        for i in range(self.num_nodes):
            (folder / f"spool-127.0.0.{i + 2}").mkdir()
            self._daemon("slurmd", "-D", "-N", f"127.0.0.{i + 2}", "-f", folder / "slurm.conf")
        self._until(self._is_idle, "slurm")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["scancel", "--user=root"], env=self.env, capture_output=True, timeout=9)
        for daemon in reversed(self._daemons):
            children.stop(daemon)

    def run(self, *command: object) -> str:
        """What a Slurm command prints; raises with its own error."""
        done = subprocess.run(
            list(map(str, command)), env=self.env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def submit(self, *arguments: object, env: dict[str, str], folder: Path) -> str:
        """`sbatch` from `folder`; the job's number."""
        command = ["sbatch", "--parsable", *map(str, arguments)]
        done = subprocess.run(
            command, env=self.env | env, cwd=folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """Of `scontrol show job`, such as JobState; of a heterogeneous job, its leader's."""
        words = self.run("scontrol", "show", "job", job).split()
        return next(w.partition("=")[2] for w in words if w.startswith(f"{name}="))

    def wait(self, job: str, *states: str, seconds: float) -> str:
        """The state of `states` that the job reaches."""
        state = self._until(
            lambda: (now := self.field(job, "JobState")) in states and now,
            f"job {job} {' or '.join(states)}",
            seconds,
        )
        return str(state)

    def _munge_files(self) -> list[str]:
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self.folder}/munge.{end}" for option, end in files.items()]

    def _daemon(self, *command: object) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    list(map(str, command)),
                    env=self.env,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    preexec_fn=children.die_with_parent,
                )
            )

    def _is_idle(self) -> bool:
        answer = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%t"], env=self.env, capture_output=True, text=True
        )
        return answer.stdout.split() == ["idle"] * self.num_nodes

    def _until(self, condition, what: str, seconds: float = 30.0):
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            logs = "".join(p.read_text()[-1500:] for p in self.folder.glob("slurm*.log"))
            assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s\n{logs}"
            time.sleep(0.2)
        return value
