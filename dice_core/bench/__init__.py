"""Time and peak memory of dice_core beside other libraries: `python -m dice_core.bench`."""
