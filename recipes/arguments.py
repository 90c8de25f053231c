"""Values of the recipes' command lines, as `argparse` takes them."""


def positive(text: str) -> int:
    """Read a number of the command line that is at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)  # which argparse turns into its own error
    return number
