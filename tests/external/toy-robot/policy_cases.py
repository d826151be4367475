"""The tiny policy on which the library's generic suite runs: POLICY_CASES=this-file pytest tests/modeling."""

from toy_policy import ToyConfig

STATE, ACTION = {"type": "STATE", "shape": (3,)}, {"type": "ACTION", "shape": (2,)}


def tiny_toy():
    return ToyConfig(input_features={"observation.state": STATE}, output_features={"action": ACTION}, chunk_size=8)


CASES = {"toy_policy": {"config": tiny_toy, "complete": True, "graph": True}}
