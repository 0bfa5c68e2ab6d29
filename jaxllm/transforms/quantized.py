"""What quantized kernels have in common."""


class Quantized:
    """A frozen kernel in fewer bits. `codes` has the kernel's axes."""

    codes: object
