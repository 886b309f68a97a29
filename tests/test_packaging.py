"""What a fresh clone relies on: the requirement files fit each other and the imports, and make installs when it must.

A real installation takes minutes and is left to `make test`; here the Makefile runs with stand-ins for python and
pip.
"""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in (line.split('#')[0].strip() for line in lines) if line]


def locked():
    return {
        canonicalize_name(line.name): str(line.specifier).removeprefix('==')
        for line in requirements('requirements.lock')
    }


def test_lock_pins_exact_versions_and_names_no_host():
    for line in (ROOT / 'requirements.lock').read_text().splitlines():
        assert re.fullmatch(r'#.*|[\w.-]+==[\w.]+(; python_version < "3\.\d+")?', line), line
    assert '://' not in (ROOT / 'requirements.lock').read_text() + (ROOT / 'requirements.txt').read_text()
    assert len(locked()) == len(requirements('requirements.lock')), 'a package is locked twice'


def test_lock_lies_within_the_tested_ranges():
    pins = locked()
    for requirement in requirements('requirements.txt'):
        name = canonicalize_name(requirement.name)
        assert name in pins, f'{name} is not locked'
        assert pins[name] in requirement.specifier, f'{name} {pins[name]} is outside {requirement.specifier}'


def test_lock_is_complete():
    """`pip install --no-deps` suffices: what a locked package needs on this machine is locked too."""
    pins = locked()
    extras = {canonicalize_name(line.name): line.extras for line in requirements('requirements.txt')}
    for name in pins:
        if name == 'sweeps':
            continue  # Never imported: a test reads wandb's schema of sweep files out of it.
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # Left out by its marker, or another environment than the lock's.
        for text in needed:
            requirement = Requirement(text)
            wanted = [{'extra': extra} for extra in extras.get(name, ())] or [{'extra': ''}]
            if requirement.marker is None or any(requirement.marker.evaluate(context) for context in wanted):
                assert canonicalize_name(requirement.name) in pins, f'{name} needs {text}'


def test_mujoco_4_is_kept_out():
    (mujoco,) = (line for line in requirements('requirements.txt') if line.name == 'mujoco')
    assert '3.17.0' in mujoco.specifier
    assert '4.0.0' not in mujoco.specifier


def test_every_import_is_a_requirement():
    required = {canonicalize_name(line.name) for line in requirements('requirements.txt')}
    required.add('packaging')  # pytest's own requirement, used by this file.
    own = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == '.py'}
    extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
    own |= {Requirement(line).name for lines in extras.values() for line in lines}  # Need not be installed here.
    owners = importlib.metadata.packages_distributions()
    missing = set()
    for path in ROOT.rglob('*.py'):
        if any(part.startswith('.') for part in path.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in {name.split('.')[0] for name in names} - own - sys.stdlib_module_names:
                if not {canonicalize_name(owner) for owner in owners.get(module, ())} & required:
                    missing.add(f'{path.relative_to(ROOT)}: {module}')
    assert not missing


FAKE_PYTHON = """#!/bin/sh
echo "$@" >> calls
[ "$1" = -c ] && exit $OLD
mkdir -p .venv/bin
printf '#!/bin/sh\\necho pip >> calls\\nexit $PIP\\n' > .venv/bin/pip
chmod +x .venv/bin/pip
"""


@pytest.fixture
def make(tmp_path):
    """make() → (process, installations), in a folder with the real Makefile and with stand-ins for python and pip."""
    (tmp_path / 'Makefile').write_text((ROOT / 'Makefile').read_text())
    (tmp_path / 'requirements.lock').write_text('one==1\n')
    (tmp_path / 'fake').write_text(FAKE_PYTHON)
    (tmp_path / 'fake').chmod(0o755)

    def run(*, old=0, pip=0):
        (tmp_path / 'calls').write_text('')
        result = subprocess.run(
            ['make', '.venv', 'PYTHON=./fake'],
            cwd=tmp_path,
            env={'PATH': os.environ['PATH'], 'OLD': str(old), 'PIP': str(pip)},
            capture_output=True,
            text=True,
            check=False,
        )
        return result, (tmp_path / 'calls').read_text().count('pip')

    return run


def test_make_installs_once_and_again_only_when_the_lock_changes(make, tmp_path):
    result, installations = make()
    assert (result.returncode, installations) == (0, 1), result.stderr
    assert make()[1] == 0
    later = (tmp_path / '.venv' / 'requirements.lock').stat().st_mtime + 10
    lock = tmp_path / 'requirements.lock'
    os.utime(lock, (later, later))
    assert make()[1] == 0, 'a checkout that only touched the lock file installs nothing'
    lock.write_text('one==2\n')
    os.utime(lock, (later + 20, later + 20))
    assert make()[1] == 1


def test_make_tries_again_after_a_failed_installation(make):
    result, installations = make(pip=1)
    assert result.returncode != 0
    assert installations == 1
    assert make()[1] == 1


def test_make_refuses_an_old_python(make):
    result, installations = make(old=1)
    assert result.returncode != 0
    assert 'Python 3.11 or newer is needed' in result.stderr
    assert installations == 0


def test_ci_runs_tests_then_lint():
    script = ROOT / '.ci' / 'run'
    assert script.stat().st_mode & 0o100
    text = script.read_text()
    assert 'set -euo pipefail' in text
    assert text.index('make test') < text.index('make lint')
    for target in ('demo', 'test', 'lint', 'bench'):
        commands = subprocess.run(['make', '-n', target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert '.venv/bin/' in commands
