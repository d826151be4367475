"""What to do about a dataset that cannot be read whole, as errors say it: in Python and on the command line alike.

`LeRobotDataset` and `convert_dataset` take the arguments, a recipe its `data` section, and so do the commands
`manipulators train … --data.NAME` and `manipulators convert-dataset … --NAME`.
"""

LEAVE_OUT_FEATURE = "Leave it out with features=[…] (train: --data.features, convert-dataset: --features)"
LEAVE_OUT_FEATURE_OR_EPISODE = (
    "Leave the feature out with features=[…], or the episode with episodes=[…] (train: --data.features and "
    "--data.episodes, convert-dataset: --features and --episodes)"
)
ONLY_EPISODES = "episodes=[…] (train: --data.episodes, convert-dataset: --episodes)"
LARGER_TOLERANCE = "a larger tolerance_s= (train: --data.tolerance_s, convert-dataset: --tolerance-s)"
OTHER_REVISION = 'revision="v3.0" or revision="v2.1" (train: --data.revision, convert-dataset: --revision)'
