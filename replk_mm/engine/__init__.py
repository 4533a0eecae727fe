"""From a config to a run on this machine."""
