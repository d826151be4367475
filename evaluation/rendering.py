"""Headless rendering of MuJoCo scenes: one OpenGL context per scene, shared by the environments that show it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import MissingRendererError, MissingSimulatorError

try:
    import mujoco
except ImportError as error:
    raise MissingSimulatorError("MuJoCo", error) from error

# Platforms that render without a display on Linux, the one that starts faster first.
HEADLESS_PLATFORMS = ("egl", "osmesa")
_PROBE = "from mujoco.{} import GLContext\ncontext = GLContext(16, 16)\ncontext.make_current()\ncontext.free()"
# Shadows and reflections take most of the time of a small picture and carry no information for a policy.
_FLAGS_OFF = ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX", "mjRND_HAZE")


class SceneRenderer:
    """Render scenes of one MuJoCo model; acquire it with `shared_renderer` and return it with `release`.

    Setting up a context takes about a second, rendering a picture less than ten milliseconds. All environments of
    a task therefore share one context, for cameras of every size.

    Args:
        model (`mujoco.MjModel`): the model to upload. Its quality settings are lowered.

    Raises:
        MissingRendererError: no renderer works on this machine.
    """

    def __init__(self, model: mujoco.MjModel):
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        self.max_size = min(model.vis.global_.offheight, model.vis.global_.offwidth)
        self.users = 0
        self._context = _make_context(model.vis.global_.offwidth, model.vis.global_.offheight)
        self._resources = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._resources)
        self._scene = mujoco.MjvScene(model, maxgeom=10_000)
        for flag in _FLAGS_OFF:
            self._scene.flags[getattr(mujoco.mjtRndFlag, flag)] = False
        self._option, self._camera = mujoco.MjvOption(), mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def render(self, model: mujoco.MjModel, data: mujoco.MjData, camera: str, size: int) -> np.ndarray:
        """Return a camera's picture, uint8 (size, size, 3), with MuJoCo's own up and right."""
        self._camera.fixedcamid = model.camera(camera).id
        every = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, self._option, None, self._camera, every, self._scene)
        self._context.make_current()
        view = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_render(view, self._scene, self._resources)
        pixels = np.empty((size, size, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(pixels, None, view, self._resources)
        return pixels[::-1]  # OpenGL counts rows from below

    def close(self) -> None:
        """Free what the context holds."""
        if self._resources is not None:
            self._context.make_current()
            self._resources.free()
            self._context.free()
            self._resources = self._context = None


_SHARED: dict[str, SceneRenderer] = {}


def shared_renderer(scene: str, model: mujoco.MjModel) -> SceneRenderer:
    """Return the renderer of a scene, made at its first use; every call needs one `release`.

    Args:
        scene (`str`): identifies the scene, such as the model's file.
        model (`mujoco.MjModel`): the model of that scene.

    Raises:
        MissingRendererError: no renderer works on this machine.
    """
    if scene not in _SHARED:
        _SHARED[scene] = SceneRenderer(model)
    _SHARED[scene].users += 1
    return _SHARED[scene]


def release(renderer: SceneRenderer) -> None:
    """Return a shared renderer; the last user closes it."""
    renderer.users -= 1
    if renderer.users == 0:
        for scene in [scene for scene, shared in _SHARED.items() if shared is renderer]:
            del _SHARED[scene]
        renderer.close()


def _make_context(width: int, height: int) -> Any:
    chosen = os.environ.get("MUJOCO_GL", "").lower().strip()
    try:
        # MuJoCo chooses a platform when it is imported, by default one with a window. Importing the platform's
        # module by name works at any time, and loads OpenGL only when something is rendered.
        if platform.system() == "Linux" and chosen in ("", *HEADLESS_PLATFORMS):
            source = import_module(f"mujoco.{chosen or _working_platform()}")
        else:
            source = import_module("mujoco.gl_context")
        context = source.GLContext(width, height)
        context.make_current()
    except MissingRendererError:
        raise
    except Exception as error:  # bindings raise any kind of error when a library is missing
        raise MissingRendererError({chosen or "default": f"{type(error).__name__}: {error}"}) from error
    return context


@cache
def _working_platform() -> str:
    """Return the first working platform; each is tried in its own process, because OpenGL allows one per process."""
    failures = {}
    for name in HEADLESS_PLATFORMS:
        environment = {key: value for key, value in os.environ.items() if key != "PYOPENGL_PLATFORM"}
        attempt = subprocess.run(
            [sys.executable, "-c", _PROBE.format(name)],
            env=environment | {"MUJOCO_GL": name},
            capture_output=True,
            text=True,
        )
        if attempt.returncode == 0:
            return name
        failures[name] = (attempt.stderr.strip().splitlines() or [f"exit status {attempt.returncode}"])[-1]
    raise MissingRendererError(failures)
