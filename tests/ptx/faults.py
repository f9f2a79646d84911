"""The error of every check."""


class Fault(AssertionError):
    """PTX that is not understood, or that does what no kernel may do."""
