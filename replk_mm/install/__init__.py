"""Getting an environment to work: probes of what runs, mmcv compiled for the torch at hand. Standard library only."""
