"""Time and peak memory of the loss beside the installed peers: `python -m dice_core.bench`.

The measuring is in three files: `implementations` (what runs), `measure` (how a step is timed and
weighed), `floor` (what the memory of this machine allows at best).
"""
