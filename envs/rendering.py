"""Which OpenGL back end MuJoCo renders with: EGL or OSMesa on a machine without a display, whichever works.

MuJoCo reads MUJOCO_GL when it is imported and never again, so the choice comes before that. `prefer_backend` guesses in
no time, for runs that may never render; `require_backend` tries, for those whose observations are images. A back end
that the user has set is never replaced. No simulator is imported here.
"""

import ctypes
import os
import subprocess
import sys

from utils.errors import UserError

BACKENDS = {'egl': 'libEGL.so.1', 'osmesa': 'libOSMesa.so.8'}  # In the order of preference, with their libraries.
# Processes inherit it: the back end that has been tried already.
WORKING = 'INFOM_WORKING_MUJOCO_GL'
TRIAL_SECONDS = 120.0
TRIAL = (
    'import mujoco; model = mujoco.MjModel.from_xml_string("<mujoco/>"); data = mujoco.MjData(model); '
    'renderer = mujoco.Renderer(model, 64, 64); renderer.update_scene(data); renderer.render(); renderer.close()'
)

_chosen_by_us = False


def prefer_backend() -> None:
    """Sets MUJOCO_GL where it is not set and there is no display.

    A back end whose library is missing would make MuJoCo's import fail even for a run that never renders: hence the
    look.
    """
    global _chosen_by_us
    if 'MUJOCO_GL' in os.environ or not sys.platform.startswith('linux') or _has_display():
        return
    _chosen_by_us = True
    os.environ['MUJOCO_GL'] = next((name for name, library in BACKENDS.items() if _loads(library)), 'disable')


def require_backend() -> str:
    """Makes sure that images can be rendered, and sets MUJOCO_GL to a back end that works, here and for the processes
    that this one starts.

    Returns:
        The back end ('' for MuJoCo's own choice, on a machine with a display).

    Raises:
        UserError: none works.
    """
    current = os.environ.get('MUJOCO_GL', '')
    if os.environ.get(WORKING) == current:
        return current
    # What the user has set, or MuJoCo has read already, is the only candidate.
    candidates = list(BACKENDS) if _chosen_by_us and 'mujoco' not in sys.modules else [current]
    failures = {}
    for backend in candidates:
        failures[backend] = _try(backend)
        if failures[backend] is None:
            if backend:
                os.environ['MUJOCO_GL'] = backend
            os.environ[WORKING] = backend
            return backend
    details = '; '.join(f'MUJOCO_GL={backend or "(not set)"}: {failure}' for backend, failure in failures.items())
    raise UserError(
        f'images cannot be rendered on this machine ({details}). Without a display, EGL needs libEGL (Debian and '
        'Ubuntu: apt install libegl1 libgles2), OSMesa needs libOSMesa (apt install libosmesa6)'
    )


def _has_display() -> bool:
    return any(os.environ.get(name) for name in ('DISPLAY', 'WAYLAND_DISPLAY'))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _try(backend: str) -> str | None:
    """Renders an image in a process of its own, for a broken driver may end it; None, or what went wrong."""
    environment = os.environ | ({'MUJOCO_GL': backend} if backend else {})
    try:
        result = subprocess.run(
            [sys.executable, '-c', TRIAL], env=environment, capture_output=True, text=True, timeout=TRIAL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f'no image after {TRIAL_SECONDS:g} seconds'
    if result.returncode == 0:
        return None
    lines = result.stderr.strip().splitlines() or [f'exit code {result.returncode}']
    # What a renderer that failed half-way says when it is thrown away comes after the error itself.
    errors = [line for line in lines if 'Error' in line.split(':')[0] and not line.startswith(' ')]
    return (errors or lines)[0].strip()[:200]
