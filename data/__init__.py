"""LeRobot-format episodes: read, write, statistics, video."""
