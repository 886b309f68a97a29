"""A SLURM of one node for a test: three daemons, processes of this user, with all of their files in one folder."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]

# From Debian's and Ubuntu's packages slurmctld, slurmd, slurm-client and munge; the daemons are not on every PATH.
SYSTEM_PATH = os.pathsep.join([os.environ['PATH'], '/usr/sbin', '/sbin'])
PROGRAMS = 'munged', 'slurmctld', 'slurmd', 'sbatch', 'srun'
needed = pytest.mark.skipif(
    any(shutil.which(program, path=SYSTEM_PATH) is None for program in PROGRAMS), reason='SLURM is not installed'
)
GPUS = 4

# The node has cores and GPUs on paper only, so that jobs may ask for a real node's. A job that is queued again waits
# until its credentials have expired, by default for two minutes.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=5
SchedulerParameters=sched_interval=1
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=64 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def cluster(**variables):
    """Starts a SLURM and yields call('sbatch', …): runs a command that talks to it, and returns its output.

    Ends it, with its jobs. variables: of the environment of commands and jobs.
    """
    # Not pytest's own folder, whose path may be too long for a socket.
    with tempfile.TemporaryDirectory(prefix='slurm') as name, contextlib.ExitStack() as daemons:
        folder = Path(name)
        # Without what a job that these tests may run in has set for its own SLURM.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM', 'SBATCH', 'SRUN'))}
        environment |= {'PATH': SYSTEM_PATH, 'SLURM_CONF': str(folder / 'slurm.conf'), **variables}
        _write_config(folder)

        def call(*command):
            return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout

        def start(*command):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            daemons.callback(process.wait)
            daemons.callback(process.terminate)

        munge = folder / 'munge'
        files = [f'--{kind}-file={munge / kind}' for kind in ('key', 'pid', 'log', 'seed')]
        start('munged', '--foreground', '--force', f'--socket={munge / "socket"}', *files)
        start('slurmctld', '-D', '-c')
        start('slurmd', '-D')
        try:
            states = ['sinfo', '--noheader', '--format=%T']
            wait_until(
                lambda: subprocess.run(states, env=environment, capture_output=True).stdout == b'idle\n',
                lambda: 'SLURM: ' + ''.join(path.read_text() for path in folder.glob('*.log')),
                seconds=30,
                pause=0.2,
            )
            yield call
        finally:
            subprocess.run(['scancel', '--user', str(os.getuid())], env=environment, check=False)
            time.sleep(1)


def _write_config(folder):
    for name in ('munge', 'state', 'spool'):
        (folder / name).mkdir(mode=0o700)
    (folder / 'munge' / 'key').write_bytes(os.urandom(1024))
    (folder / 'munge' / 'key').chmod(0o600)
    for gpu in range(GPUS):
        (folder / f'gpu{gpu}').touch()
    (folder / 'gres.conf').write_text(f'Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n')
    with socket.socket() as first, socket.socket() as second:
        for free in (first, second):
            free.bind(('127.0.0.1', 0))
        ports = [free.getsockname()[1] for free in (first, second)]
    values = {'host': socket.gethostname(), 'user': os.getuid(), 'folder': folder, 'gpus': GPUS}
    values |= {'controller_port': ports[0], 'node_port': ports[1]}
    (folder / 'slurm.conf').write_text(CONFIG.format(**values))
