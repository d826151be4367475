"""Custom policies: the template of InternManip's document, and plain registered ones."""

import re

import pytest
import torch
from torch import nn

from manipulators import (
    AutoPolicy,
    BasePolicyModel,
    PolicyConfig,
    PolicyModel,
    PolicyOutput,
    PolicyPipeline,
    PolicyProcessor,
    PolicyTrainer,
    PolicyTrainingArguments,
    register_policy,
)
from manipulators.errors import InvalidConfigError, PredictionError, WeightsMismatchError

pydantic = pytest.importorskip("pydantic", reason="the template's config is a pydantic model")

FEATURES = (
    {"observation.state": {"type": "STATE", "shape": [3]}},
    {"action": {"type": "ACTION", "shape": [2]}},
)
STATISTICS = {
    "observation.state": {"mean": [0.0] * 3, "std": [1.0] * 3},
    "action": {"mean": [0.0] * 2, "std": [2.0] * 2},
}


class ReachConfig(pydantic.BaseModel):
    hidden: int = 4
    action_horizon: int = 2


@BasePolicyModel.register("reach_test_policy")
class ReachPolicy(BasePolicyModel):
    def __init__(self, config: ReachConfig):
        super().__init__()
        self.config = config
        self.net = nn.Sequential(nn.Linear(3, config.hidden), nn.Tanh(), nn.Linear(config.hidden, 4))

    def forward(self, batch, train=True, **kwargs):
        actions = self.net(batch["observation.state"]).view(-1, self.config.action_horizon, 2)
        return {"loss": (actions - batch["action"]).abs().mean()} if train else {"action_pred": actions}

    def inference(self, batch, **kwargs):
        return self.forward(batch, train=False, **kwargs)

    def calc_loss(self, batch, **kwargs):
        return self.forward(batch, train=True, **kwargs)["loss"]


@pytest.fixture
def reach():
    torch.manual_seed(0)
    policy = ReachPolicy(ReachConfig(hidden=6))
    policy.config.set_input_output_features(*FEATURES)
    return PolicyPipeline(model=policy, processor=PolicyProcessor.from_config(policy.config, STATISTICS), device="cpu")


def test_the_own_config_can_be_read_through_the_saved_one(reach):
    assert reach.policy.config.hidden == 6
    assert reach.policy.config.own == ReachConfig(hidden=6)
    assert reach.policy.config.action_horizon == 2
    with pytest.raises(AttributeError, match="hidde"):
        reach.policy.config.hidde


def test_trains(reach, tmp_path):
    samples = [
        {"observation.state": torch.ones(3) * i, "action": torch.ones(2, 2), "action_is_pad": torch.zeros(2).bool()}
        for i in range(4)
    ]
    arguments = PolicyTrainingArguments(
        str(tmp_path), max_steps=40, learning_rate=1e-2, logging_steps=10, disable_tqdm=True, use_cpu=True
    )
    trainer = PolicyTrainer(reach.policy, arguments, reach.processor, train_dataset=samples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_saves_and_loads_and_runs(reach, tmp_path):
    reach.save_pretrained(tmp_path)
    loaded = PolicyPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.policy, ReachPolicy)
    assert loaded.policy.config.hidden == 6
    saved = reach.policy.state_dict()
    assert loaded.policy.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.policy.state_dict().items())
    # Close, not equal: loaded weights begin where they do in their file, and some processors' sums depend on that.
    observation = {"observation.state": [0.1, 0.2, 0.3]}
    chunk = loaded.predict_chunk(observation)
    torch.testing.assert_close(chunk, reach.predict_chunk(observation))
    first, second, third = (loaded(observation) for _ in range(3))
    assert torch.equal(torch.stack([first, second]), chunk)
    assert torch.equal(third, first)  # the whole chunk is executed, then a new one predicted


def test_loading_is_strict(reach, tmp_path):
    reach.policy.config.custom = {"hidden": 5, "action_horizon": 2}
    reach.policy.config.save_pretrained(tmp_path)
    reach.policy.save_pretrained(tmp_path)
    with pytest.raises(WeightsMismatchError, match=r"net\.0\.weight"):
        AutoPolicy.from_pretrained(tmp_path)


def test_the_documents_template_is_importable_as_printed(shared):
    document = (shared / "specs" / "internmanip_model_document.md").read_text(encoding="utf-8")
    template = next(
        b for b in re.findall(r"```python\n(.*?)```", document, re.DOTALL) if "BasePolicyModel.register" in b
    )
    template = re.sub(r"from internmanip\.dataset\.\S+ import", "from transformers import", template)
    template = re.sub(r"from internmanip\.\S+ import", "from manipulators import", template)
    namespace = {}
    exec(template, namespace)
    policy = namespace["CustomPolicy"](namespace["CustomPolicyConfig"]())
    assert policy.config.model_type == "custom_policy"
    assert policy.forward({}) is None  # the template's own body is `pass`


def test_a_prediction_without_action_pred_is_refused(reach):
    reach.policy.inference = lambda batch: {"actions": torch.zeros(1, 2, 2)}
    with pytest.raises(PredictionError, match=r"inference returned .*but no 'action_pred'"):
        reach.predict_chunk({"observation.state": [0.0, 0.0, 0.0]})


def test_an_own_config_of_another_kind_is_refused():
    with pytest.raises(InvalidConfigError, match="pydantic model, a dataclass or a mapping; got int"):
        ReachPolicy(3)


class PlainConfig(PolicyConfig):
    model_type = "plain_test_policy"

    gain: float = 1.0
    n_action_steps: int = 1

    @property
    def action_horizon(self):
        return 2


@register_policy("plain_test_policy")
class PlainPolicy(PolicyModel):
    config_class = PlainConfig

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(config.state_dim, 2 * config.action_dim)
        self.post_init()

    def forward(self, state=None, actions=None, action_is_pad=None, return_loss=True):
        predicted = self.config.gain * self.head(state).view(len(state), 2, -1)
        loss = None if actions is None else (predicted - actions).abs().mean()
        return PolicyOutput(loss=loss, actions=predicted)


def test_a_registered_policy_is_loaded_by_its_model_type(tmp_path):
    config = PlainConfig(gain=3, input_features=FEATURES[0], output_features=FEATURES[1])
    policy = PlainPolicy(config).eval()
    policy.save_pretrained(tmp_path)
    loaded = AutoPolicy.from_pretrained(tmp_path)
    assert isinstance(loaded, PlainPolicy)
    inputs = config.example_inputs(3)
    assert torch.equal(loaded.predict_action_chunk(**inputs), policy.predict_action_chunk(**inputs))


def test_a_taken_or_disagreeing_name_is_refused():
    with pytest.raises(InvalidConfigError, match="'plain_test_policy' is taken by PlainPolicy"):

        @register_policy("plain_test_policy")
        class Other(PolicyModel):
            config_class = PlainConfig

    with pytest.raises(InvalidConfigError, match="they must agree"):
        register_policy("another_name")(PlainPolicy)
    with pytest.raises(InvalidConfigError, match="config_class"):
        register_policy("no_config")(nn.Linear)
