"""Statistics of datasets: computed, checked, joined."""
