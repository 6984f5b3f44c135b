"""What the suites that run on MuJoCo share: how to draw without a screen."""

import ctypes.util
import os
import sys

from dreamerv3_jax.errors import UserError

NO_RENDERER = ('off', 'disable', 'disabled', 'false', '0')  # values of MUJOCO_GL


def choose_renderer() -> None:
    """Makes MuJoCo draw without a screen where there is none and the user did not choose.

    Has to be called before `dm_control` is imported, which else looks for a screen first.
    """
    if sys.platform != 'linux' or 'MUJOCO_GL' in os.environ or os.environ.get('DISPLAY'):
        return
    libraries = {'egl': 'EGL', 'osmesa': 'OSMesa'}
    found = [name for name, library in libraries.items() if ctypes.util.find_library(library)]
    os.environ['MUJOCO_GL'] = found[0] if found else 'disabled'


def check_renderer() -> None:
    """Checks that pictures can be drawn.

    Raises:
      UserError: they cannot.
    """
    if os.environ.get('MUJOCO_GL') in NO_RENDERER:
        raise UserError(
            'Pictures of MuJoCo need an OpenGL library; install libegl1 or libosmesa6, and set '
            'MUJOCO_GL to egl or osmesa.'
        )
