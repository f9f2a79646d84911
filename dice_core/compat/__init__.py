"""Other libraries' losses by their names and arguments, computed by dice_core.

None of these libraries is imported.
"""
