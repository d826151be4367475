"""Mixtures: what one policy is to several datasets, whose cameras, widths and robots differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InvalidConfigError, MixtureError
from .features import ACTION, ENVIRONMENT_STATE, STATE, FeatureType, PolicyFeature

VECTORS = (STATE, ENVIRONMENT_STATE, ACTION)


@dataclass(frozen=True)
class Member:
    """Describe one dataset of a mixture.

    Args:
        name: of the dataset.
        embodiment: its robot; None: the only one.
        inputs, outputs: the features of a policy for it.
        names, units: of the dimensions of its vectors, None where they are not recorded.
    """

    name: str
    embodiment: str | None
    inputs: Mapping[str, PolicyFeature]
    outputs: Mapping[str, PolicyFeature]
    names: Mapping[str, Sequence[str] | None] = field(default_factory=dict)
    units: Mapping[str, Sequence[str] | None] = field(default_factory=dict)

    @property
    def features(self) -> dict[str, PolicyFeature]:
        """Inputs and outputs."""
        return dict(self.inputs) | dict(self.outputs)


def joined_features(members: Sequence[Member]) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
    """Return the inputs and outputs of a policy for all members: all their cameras, and every vector at its widest.

    A camera has the shape that it has where it comes first.

    Raises:
        MixtureError: a vector that some members lack, or a camera whose number of channels differs.
    """
    inputs: dict[str, PolicyFeature] = {}
    outputs: dict[str, PolicyFeature] = {}
    for member in members:
        for into, given in ((inputs, member.inputs), (outputs, member.outputs)):
            for name, feature in given.items():
                known = into.setdefault(name, feature)
                if feature.type is FeatureType.VISUAL:
                    if feature.shape[0] != known.shape[0]:
                        raise MixtureError(f"{name} has {_each(members, name, 'channels')}", "Leave out the camera")
                elif feature.shape > known.shape:
                    into[name] = feature
    for name in inputs | outputs:
        if name in VECTORS and (lacking := [m.name for m in members if name not in m.features]):
            having = ", ".join(m.name for m in members if name in m.features)
            raise MixtureError(
                f"{', '.join(lacking)} {'lacks' if len(lacking) == 1 else 'lack'} {name}, which {having} "
                f"{'has' if having.count(',') == 0 else 'have'}: only cameras may be absent from some datasets",
                "Leave it out of all",
            )
    return inputs, outputs


def optional_cameras(members: Sequence[Member]) -> tuple[str, ...]:
    """Return the cameras that some members lack, in the policy's order."""
    inputs, _ = joined_features(members)
    cameras = [name for name, feature in inputs.items() if feature.type is FeatureType.VISUAL]
    return tuple(name for name in cameras if any(name not in member.inputs for member in members))


def robots(members: Sequence[Member]) -> dict[str | None, list[Member]]:
    """Return robot → its datasets; one robot that has no name is None.

    Raises:
        MixtureError: only some are named, or the datasets of one robot have vectors of different widths.
    """
    groups: dict[str | None, list[Member]] = {}
    for member in members:
        groups.setdefault(member.embodiment, []).append(member)
    if None in groups and len(groups) > 1:
        unnamed = ", ".join(member.name for member in groups[None])
        raise MixtureError(f"{unnamed} {'has' if len(groups[None]) == 1 else 'have'} no embodiment", _NAME_ROBOTS)
    for robot, own in groups.items():
        for name in VECTORS:
            if len({member.features[name].shape for member in own if name in member.features}) > 1:
                of = "" if robot is None else f" of the robot {robot!r}"
                raise MixtureError(f"{name}{of} has {_each(own, name, 'dimensions')}", _NAME_ROBOTS)
    return groups


_NAME_ROBOTS = "Say which robot each dataset is of: embodiment: <name>, in Python embodiments=[…]"


def require_fit(config: Any, members: Sequence[Member]) -> None:
    """Check that one policy of a config can learn from all members.

    Raises:
        MixtureError: vectors of different widths, for a policy of exact ones; pictures of different sizes, for one
            that does not resize them; dimensions of the same names in another order, where statistics are joint.
    """
    used = {**config.input_features, **config.output_features}
    members = [_only(member, used) for member in members]
    joined_features(members)
    for name in VECTORS:
        shapes = {member.features[name].shape for member in members if name in member.features}
        if len(shapes) > 1 and (not config.pads_widths or name == ENVIRONMENT_STATE):
            reason = f"{config.title} pads no {name}" if config.pads_widths else f"{config.title} has one width"
            raise MixtureError(
                f"{name} has {_each(members, name, 'dimensions')}, and {reason}",
                "Train a policy that pads, such as gr00t_n1_5 or pi0_policy, or one policy per robot",
            )
    for name in optional_cameras(members):
        if name not in config.optional_cameras:
            lacking = ", ".join(member.name for member in members if name not in member.inputs)
            raise MixtureError(
                f"{lacking} has no {name}", f"Make it optional: optional_cameras=({name!r},), or leave the camera out"
            )
    if not config.resizes_pictures:
        for name in config.image_features:
            if len({member.inputs[name].shape for member in members if name in member.inputs}) > 1:
                raise MixtureError(
                    f"{name} has {_each(members, name, 'pixels')}, and {config.title} takes pictures as they are",
                    "Leave the camera out, or record in one size",
                )
    told_apart = knows_robots(config, members) or _widths_differ(members)
    groups = robots(members) if told_apart else {None: members}
    for own in groups.values():
        _require_same_order(own)


def knows_robots(config: Any, members: Sequence[Member]) -> bool:
    """Return whether a policy tells the robots of a mixture apart: it has slots for them, or pads their widths."""
    if not config.pads_widths or len({member.embodiment for member in members}) == 1:
        return False
    return _widths_differ(members) or hasattr(config, "embodiment_ids")


def _widths_differ(members: Sequence[Member]) -> bool:
    return any(len({m.features[name].shape for m in members if name in m.features}) > 1 for name in VECTORS)


def config_fields(config_class: type, members: Sequence[Member], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a policy's config for a mixture: features, optional cameras and robots.

    Args:
        config_class: of the policy.
        members: of the mixture.
        given: fields that the caller has set, which stand.
    """
    inputs, outputs = joined_features(members)
    fields: dict[str, Any] = {"input_features": inputs, "output_features": outputs} | dict(given)
    used = [_only(member, {**fields["input_features"], **fields["output_features"]}) for member in members]
    fields["optional_cameras"] = tuple(dict.fromkeys((*given.get("optional_cameras", ()), *optional_cameras(used))))
    return fields | slot_fields(config_class, [member.embodiment for member in members], given)


def slot_fields(config_class: type, embodiments: Sequence[str | None], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that give every named robot a slot, of configs that have some: the lowest free ones."""
    named = [name for name in dict.fromkeys(embodiments) if name is not None]
    if not named or not hasattr(config_class, "default_embodiments"):
        return {}
    slots = given.get("embodiment_ids")
    slots = dict(config_class.default_embodiments if slots is None else slots)
    for name in named:
        if name not in slots:
            taken = set(slots.values())
            slots[name] = next(slot for slot in range(len(taken) + 1) if slot not in taken)
    tag = given.get("embodiment_tag")
    return {"embodiment_ids": slots, "embodiment_tag": tag if tag in named else named[0]}


def robot_features(members: Sequence[Member]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return robot → feature → its `shape`, and of vectors the `names` and `units` of its dimensions."""
    described = {}
    for robot, own in robots(members).items():
        features: dict[str, dict[str, Any]] = {}
        for member in own:
            for name, feature in member.features.items():
                entry = features.setdefault(name, {"shape": list(feature.shape)})
                if name in VECTORS:
                    for kind, known in (("names", member.names), ("units", member.units)):
                        entry[kind] = entry.get(kind) or (list(known[name]) if known.get(name) else None)
        described[robot] = features
    return described


def same_names(members: Sequence[Member], kind: str, name: str) -> list[str] | None:
    """Return the `names` or `units` of a vector's dimensions, those of the first member that has some."""
    return next((list(found) for m in members if (found := getattr(m, kind).get(name))), None)


def _only(member: Member, used: Mapping[str, Any]) -> Member:
    inputs = {name: feature for name, feature in member.inputs.items() if name in used}
    outputs = {name: feature for name, feature in member.outputs.items() if name in used}
    return Member(member.name, member.embodiment, inputs, outputs, member.names, member.units)


def _require_same_order(members: Sequence[Member]) -> None:
    """Check that vectors that share statistics have their dimensions in one order.

    Raises:
        MixtureError: the same names in another order, or in other units. Other names may be another spelling.
    """
    for name in VECTORS:
        for kind in ("names", "units"):
            known = {
                m.name: list(found) for m in members if name in m.features and (found := getattr(m, kind).get(name))
            }
            if len(known) < 2:
                continue
            (first, expected), *others = known.items()
            for other, found in others:
                if found == expected or (kind == "names" and sorted(found) != sorted(expected)):
                    continue
                raise MixtureError(
                    f"{name} has the {kind} {expected} in {first} and {found} in {other}",
                    "Bring them into one order and one unit, or name two embodiments for a policy that knows robots",
                )


def _each(members: Sequence[Member], name: str, what: str) -> str:
    """Return the size of a feature in each dataset: `4 dimensions in a, 3 in b`."""
    sizes = {}
    for member in members:
        if name in member.features:
            shape = member.features[name].shape
            sizes[member.name] = f"{shape[1]} × {shape[2]}" if what == "pixels" else str(shape[0])
    return ", ".join(
        f"{size} {what} in {dataset}" if i == 0 else f"{size} in {dataset}"
        for i, (dataset, size) in enumerate(sizes.items())
    )


def require_embodiment_names(names: Sequence[Any]) -> None:
    """Check that the names of robots are words, or None.

    Raises:
        InvalidConfigError: one is something else.
    """
    for name in names:
        if name is not None and not (isinstance(name, str) and name.strip()):
            raise InvalidConfigError(f"An embodiment is a name, such as 'arm_a'; got {name!r}.")
