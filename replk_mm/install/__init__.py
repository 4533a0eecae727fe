"""Getting an environment to work: probes of what runs, and mmcv compiled for the torch at hand. Standard library only."""
