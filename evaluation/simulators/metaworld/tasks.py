"""Meta-World's tasks as data: instructions, and the name and unit of every number. Loads no simulator."""

from __future__ import annotations

from collections.abc import Sequence

from ....configuration.features import ACTION, ENVIRONMENT_STATE, IMAGE_PREFIX, STATE

_AXES = ("x", "y", "z")
_HAND = [(f"hand_{axis}", "m") for axis in _AXES] + [("gripper_opening", "1")]  # opening 0 … 1 is 0 … 0.1 m
# Orientation order differs between tasks (x, y, z, w in some, w, x, y, z in others), hence q0 … q3. A task
# with one object leaves the second at zero.
_OBJECTS = [
    entry
    for number in (1, 2)
    for entry in (
        *((f"object_{number}_{axis}", "m") for axis in _AXES),
        *((f"object_{number}_q{index}", "1") for index in range(4)),
    )
]
_PREVIOUS = [(f"previous_{name}", unit) for name, unit in _HAND + _OBJECTS]
_GOAL = [(f"goal_{axis}", "m") for axis in _AXES]
# A hand action of 1 moves the hand's target by 1 cm in this step; a gripper action of +1 closes, −1 opens.
_ACTION = [(f"hand_delta_{axis}", "cm") for axis in _AXES] + [("gripper_effort", "1")]


def _feature(entries: list[tuple[str, str]]) -> dict:
    names, units = (list(column) for column in zip(*entries, strict=True))
    return {"dtype": "float32", "shape": [len(names)], "names": names, "units": units}


def features(cameras: Sequence[str] = (), size: int = 96, has_gripper: bool = True) -> dict[str, dict]:
    """Return observation and action features of every Meta-World task.

    Args:
        cameras: each gives `observation.images.<camera>`, (size, size, 3).
        size: side of a picture [pixels].
        has_gripper: whether the robot has one; state and action are 3 wide without.

    Returns:
        Name → dtype, shape, names and units; widths 4 (state), 35 (environment state) and 4 (action).
    """
    picture = {"dtype": "video", "shape": [size, size, 3], "names": ["height", "width", "channel"]}
    width = 4 if has_gripper else 3
    return {
        STATE: _feature(_HAND[:width]),
        ENVIRONMENT_STATE: _feature(_OBJECTS + _PREVIOUS + _GOAL),
        **{IMAGE_PREFIX + camera: dict(picture) for camera in cameras},
        ACTION: _feature(_ACTION[:width]),
    }


# Camera → whether its picture has to be turned by half a circle to stand upright.
CAMERAS = {
    "corner2": True,  # sees the whole table
    "behindGripper": False,
    "corner": True,
    "corner3": True,
    "corner4": True,
    "gripperPOV": False,
    "topview": False,
}


INSTRUCTIONS = {
    "assembly-v3": "Pick up the ring by its handle and put it over the peg.",
    "basketball-v3": "Drop the basketball through the hoop.",
    "bin-picking-v3": "Move the block from one bin to the other.",
    "box-close-v3": "Put the lid on the box.",
    "button-press-topdown-v3": "Press the button from above.",
    "button-press-topdown-wall-v3": "Reach over the wall and press the button from above.",
    "button-press-v3": "Press the button.",
    "button-press-wall-v3": "Reach around the wall and press the button.",
    "coffee-button-v3": "Press the button of the coffee machine.",
    "coffee-pull-v3": "Pull the mug away from the coffee machine.",
    "coffee-push-v3": "Push the mug under the coffee machine.",
    "dial-turn-v3": "Turn the dial.",
    "disassemble-v3": "Lift the ring off the peg.",
    "door-close-v3": "Close the door.",
    "door-lock-v3": "Lock the door.",
    "door-open-v3": "Open the door.",
    "door-unlock-v3": "Unlock the door.",
    "drawer-close-v3": "Close the drawer.",
    "drawer-open-v3": "Open the drawer.",
    "faucet-close-v3": "Close the faucet.",
    "faucet-open-v3": "Open the faucet.",
    "hammer-v3": "Hammer the nail into the board.",
    "hand-insert-v3": "Insert the gripper into the hole.",
    "handle-press-side-v3": "Press the handle down from the side.",
    "handle-press-v3": "Press the handle down.",
    "handle-pull-side-v3": "Pull the handle up from the side.",
    "handle-pull-v3": "Pull the handle up.",
    "lever-pull-v3": "Pull the lever up.",
    "peg-insert-side-v3": "Insert the peg into the hole from the side.",
    "peg-unplug-side-v3": "Pull the peg out of the hole.",
    "pick-out-of-hole-v3": "Pick the puck out of the hole.",
    "pick-place-v3": "Pick up the puck and hold it at the goal.",
    "pick-place-wall-v3": "Pick up the puck and carry it over the wall to the goal.",
    "plate-slide-back-side-v3": "Slide the plate out of the cabinet sideways.",
    "plate-slide-back-v3": "Slide the plate out of the cabinet.",
    "plate-slide-side-v3": "Slide the plate into the cabinet sideways.",
    "plate-slide-v3": "Slide the plate into the cabinet.",
    "push-back-v3": "Pull the puck back to the goal.",
    "push-v3": "Push the puck to the goal.",
    "push-wall-v3": "Push the puck around the wall to the goal.",
    "reach-v3": "Move the hand to the goal.",
    "reach-wall-v3": "Move the hand over the wall to the goal.",
    "shelf-place-v3": "Put the block on the shelf.",
    "soccer-v3": "Push the ball into the goal.",
    "stick-pull-v3": "Pull the box to the goal with the stick.",
    "stick-push-v3": "Push the box to the goal with the stick.",
    "sweep-into-v3": "Sweep the puck into the hole.",
    "sweep-v3": "Sweep the puck off the table.",
    "window-close-v3": "Slide the window closed.",
    "window-open-v3": "Slide the window open.",
}
